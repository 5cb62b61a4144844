"""Launch choices, and the tensors and helper product that every Triton executor needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from stoicc.codegen.executor import Pools
from stoicc.codegen.triton.interpreter import interpreting
from stoicc.codegen.triton.loops import aligned
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
        6 stages keep two tiles in flight. With 8 warps a program has registers for one, with fp32
        operands for none; AMD's shared memory is small, so 2 stages there.
        """
        given = launch or {}
        scalar = x_dtype == torch.float32
        block_n = next((size for size in (16, 32, 64) if batch <= size), ROUND)
        most = (32 if scalar else ROUND) // (1 if tile[0] * tile[1] <= 64 * 64 else 2)
        block_n = min(given.get("block_n", block_n), most)
        macs = tile[0] * tile[1] * block_n
        many = macs > (64 * 64 * 16 if scalar else 64 * 64 * 64)
        stages = 2 if torch.version.hip or scalar else 4 if many else 6
        return LaunchConfig(block_n, given.get("num_warps", 8 if many else 4), given.get("num_stages", stages))

    def options(self) -> dict[str, Any]:
        """Options of a Triton launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def dot_dtype(x: Tensor) -> tl.dtype:
    """Operand dtype of `tl.dot`: that of x; fp32 in the interpreter, which cannot multiply bf16."""
    if interpreting() or x.dtype == torch.float32:
        return tl.float32
    return tl.float16 if x.dtype == torch.float16 else tl.bfloat16


def dot_precision(x: Tensor) -> str:
    """fp32 operands are multiplied in fp32; narrower ones know no other way."""
    return "ieee" if x.dtype == torch.float32 or interpreting() else "tf32"


def beside_tensors(module: Module, pools: Pools) -> dict[str, Tensor]:
    """What stands beside the tiles, by the name of the kernel argument."""
    beside = module.tiles.beside
    named = ("bias", "row_permutation", "column_permutation", "input_scale", "output_scale")
    tensors = {name: aligned(pools[getattr(beside, name).name]) for name in named if getattr(beside, name) is not None}
    if beside.low_rank is not None:
        left, right = beside.low_rank
        tensors |= {"low_rank_left": aligned(pools[left.name]), "low_rank_right": aligned(pools[right.name])}
    return tensors


def low_rank_bytes(batch: int, rank: int, dtype: torch.dtype) -> int:
    """Workspace for R x, rounded up so that what follows is aligned."""
    return -(-batch * rank * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def low_rank_product(x: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """R x for every row of x: `[N, rank]` in x's dtype, by one vendor GEMM."""
    return torch.mm(x, right.to(x.dtype).t(), out=out)
