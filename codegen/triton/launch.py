"""Launch choices, and the tensors and helper product that every Triton executor needs."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from stoicc.codegen.executor import Pools
from stoicc.codegen.triton.interpreter import interpreting
from stoicc.codegen.triton.loops import aligned
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.factors import factor_values
from stoicc.ir.format import Tile
from stoicc.ir.types import Module

ROUND = 128
"""Pieces of a batch are whole multiples of this many rows: the largest batch block."""

PARTS_BYTES = 64 << 20
"""Most workspace that split-K parts take, unless one round of rows needs more."""

ALIGNMENT = 256
"""Parts of a workspace start at multiples of this many bytes."""


@dataclass(frozen=True)
class LaunchConfig:
    """Rows of the batch per program, warps per program, stages of the load pipeline."""

    block_n: int
    num_warps: int
    num_stages: int

    @staticmethod
    def choose(batch: int, x_dtype: torch.dtype, tile: Tile, launch: Mapping[str, int] | None = None) -> "LaunchConfig":
        """Defaults for a batch of x, and what a schedule's launch parameters say instead.

        fp32 operands have no tensor-core path at full precision: their products are scalar
        multiply-adds over fragments in registers, so a program takes few rows of x and more
        warps. The limits are those under which no kernel class spills in a loop. A stage of the
        pipeline is half a tile ahead, because the column of x's block has to be loaded first:
        6 stages keep two tiles in flight. With 8 warps or a wide tile a program has registers for one, with
        fp32 operands for none, and in a tall tile not even for half of one; AMD's shared memory is small, so 2
        stages there.
        """
        given = launch or {}
        scalar = x_dtype == torch.float32
        block_n = next((size for size in (16, 32, 64) if batch <= size), ROUND)
        most = (32 if scalar else ROUND) // (1 if tile[0] * tile[1] <= 64 * 64 else 2)
        block_n = min(given.get("block_n", block_n), most)
        macs = tile[0] * tile[1] * block_n
        many = macs > (64 * 64 * 16 if scalar else 64 * 64 * 64)
        wide = tile[0] * tile[1] > 128 * 64
        tall = tile[0] * tile[1] > 64 * 64
        stages = 1 if scalar and tall and many else 2 if torch.version.hip or scalar else 4 if many or wide else 6
        return LaunchConfig(block_n, given.get("num_warps", 8 if many else 4), given.get("num_stages", stages))

    def options(self) -> dict[str, Any]:
        """Options of a Triton launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def rows_of_a_piece(batch: int, slot_bytes: int) -> int:
    """Rows of x whose parts of `slot_bytes` each fit the workspace bound, in whole rounds."""
    return min(batch, max(ROUND, PARTS_BYTES // max(slot_bytes, 1) // ROUND * ROUND))


def dot_dtype(x_dtype: torch.dtype, scaled: bool) -> torch.dtype:
    """Operand dtype of `tl.dot`: that of x; fp32 where that would lose something.

    fp16 x times an input scale (`scaled`) may leave fp16's range, so both operands are fp32 and
    multiply as tf32, which keeps as many bits as fp16. The interpreter cannot multiply bf16.
    """
    if interpreting() or (scaled and x_dtype == torch.float16):
        return torch.float32
    return x_dtype


TRITON_DOTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_precision(x_dtype: torch.dtype) -> str:
    """fp32 inputs are multiplied in fp32; of narrower ones, tf32 keeps every bit of an operand as given."""
    return "ieee" if x_dtype == torch.float32 or interpreting() else "tf32"


def beside_tensors(module: Module, pools: Pools) -> dict[str, Tensor]:
    """What stands beside the tiles, by the name of the kernel argument."""
    beside = module.tiles.beside
    named = ("bias", "row_permutation", "column_permutation", "input_scale", "output_scale")
    tensors = {name: aligned(pools[getattr(beside, name).name]) for name in named if getattr(beside, name) is not None}
    if beside.low_rank is not None:
        left, right = (aligned(factor_values(factor, pools)) for factor in beside.low_rank)
        tensors |= {"low_rank_left": left, "low_rank_right": right}
    return tensors


def low_rank_bytes(batch: int, rank: int) -> int:
    """Workspace for R x in fp32, rounded up so that what follows is aligned."""
    return -(-batch * rank * 4 // ALIGNMENT) * ALIGNMENT


def right_factors(beside: Mapping[str, Tensor], weight: str) -> dict[torch.dtype, Tensor]:
    """The right factor `[rank, K]` in every input dtype of a kernel; nothing without a factor.

    Made when an executor is built, because a run may be captured in a CUDA graph.
    """
    right = beside.get("low_rank_right")
    return {} if right is None else {dtype: right.to(dtype) for dtype in (TORCH_DTYPES[weight], torch.float32)}


def low_rank_product(x: Tensor, rights: Mapping[torch.dtype, Tensor], out: Tensor) -> Tensor:
    """R x for every row of x into `out`: `[N, rank]` in fp32, by one vendor GEMM."""
    return product_fp32(x, rights[x.dtype].t(), out)


def product_fp32(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b in fp32 for operands of one dtype: what a 16-bit GEMM accumulates is not rounded to 16 bits."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda and not torch.version.hip:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    # ROCm and the interpreter have no such GEMM: the same numbers from fp32 copies of the operands
    return torch.mm(a.float(), b.float(), out=out)


def device_of(pools: Pools) -> torch.device:
    """Where the pools are; without any (nothing but empty tiles), where kernels run."""
    if pools:
        return next(iter(pools.values())).device
    return torch.device("cpu") if interpreting() else torch.device("cuda", torch.cuda.current_device())


def kept_bytes(tensors: Iterable[Tensor | None], owned: Container[int]) -> int:
    """Bytes of tensors, each counted once, that are none of the canonical pools (`owned`, by address)."""
    return sum({t.data_ptr(): t.nbytes for t in tensors if t is not None and t.data_ptr() not in owned}.values())
