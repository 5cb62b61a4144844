"""The kernel classes that are compiled and run in tests, and how a weight of a class is made.

A class is what an emitted kernel's text and its launch constants depend on. `KERNEL_CLASSES` is a
pairwise cover: every two values of different parameters occur together in at least one class
(`tests/codegen/triton/test_kernel_classes.py` checks it). It is written out as data, so that a
failing class can be named, and nothing is compiled without bound.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import stoicc.formats  # noqa: F401  (registers the formats that classes name)
from stoicc.ir.digest import digest
from stoicc.ir.dtypes import DTYPE_NAMES, TORCH_DTYPES
from stoicc.ir.schedule import Schedule, TileCsr
from stoicc.ir.types import Beside, Module, Pool

EPILOGUES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "bias": ("bias",),
    "gelu": ("bias", "gelu"),
    "scales": ("input_scale", "output_scale", "relu"),
    "permuted": ("row_permutation", "column_permutation", "gelu_tanh"),
    "low_rank": ("low_rank", "silu"),
    "all": ("bias", "low_rank", "row_permutation", "column_permutation", "input_scale", "output_scale", "gelu"),
}
"""Sets of what stands beside the tiles, by name; activations by their own name."""

MIXES: dict[str, tuple[str, ...]] = {
    "dense": ("dense",),
    "nv24": ("nv24",),
    "int8": ("int8",),
    "int4": ("int4",),
    "int4_nv24": ("int4_nv24",),
    "rows": ("int4<group_size=0>", "int8<group_size=0, zero_points=true>", "int4_nv24<group_size=0>"),
    "zeros": ("int4<group_size=16, zero_points=true>", "int4_nv24<group_size=16, zero_points=true>"),
    "mosaic": ("dense", "nv24", "int4", "int4_nv24", "empty"),
}
"""Formats that occur together, by name."""

FURTHER: dict[str, tuple[str, ...]] = {
    "kept": ("bitmap", "nm"),
    "narrow": ("int2", "int3", "int3<group_size=0, zero_points=true>"),
    "floats": ("fp8", "fp8<kind=e5m2, group_size=16>", "mxfp4", "nvfp4"),
    "composed": (
        "masked",
        "masked<mask=nm, values=int8<group_size=0, zero_points=true>>",
        "masked<mask=nm, values=int4>",
        "masked<mask=nv24, values=fp8>",
        "masked<values=mxfp4>",
        "masked<values=nvfp4>",
        "masked<values=int2>",
    ),
    "apart": (
        "group_sparse",
        "group_sparse<group_size=8, zero_points=true>",
        "outlier<values=int4<group_size=32>>",
        "outlier<values=int3<group_size=16, zero_points=true>, share=0.05>",
    ),
}
"""Formats that are compiled and run in a few classes only: a decode does not depend on what follows it."""

GLUON_MIXES: dict[str, tuple[str, ...]] = {
    "wide_zeros": (
        "int4<group_size=32, zero_points=true>", "int8<group_size=64, zero_points=true>",
        "int4_nv24<group_size=64, zero_points=true>",
    ),
    "int4_64": ("int4<group_size=64>",),
    "int4_nv24_64": ("int4_nv24<group_size=64>",),
    "mosaic_64": ("dense", "nv24", "int4<group_size=64>", "int4_nv24<group_size=64>", "empty"),
}  # fmt: skip
GLUON_EPILOGUES: dict[str, tuple[str, ...]] = {
    "output_scale": ("output_scale", "relu"),
    "rows": ("row_permutation", "gelu_tanh"),
    "most": ("bias", "low_rank", "row_permutation", "output_scale", "gelu"),
}
"""More that only the Gluon dialect's classes name."""


@dataclass(frozen=True)
class KernelClass:
    """One class of kernel.

    Attributes:
        formats: a key of MIXES or FURTHER, or one format.
        tile: (BM, BK).
        weight: weight dtype; `x` is "same" or "f32".
        beside: a key of EPILOGUES.
        split: work items are parts of tile rows.
        block_n: rows of the batch per program.
    """

    formats: str
    tile: tuple[int, int]
    weight: str
    x: str
    beside: str
    split: bool
    block_n: int

    @property
    def name(self) -> str:
        tile, split = f"{self.tile[0]}x{self.tile[1]}", "split" if self.split else "whole"
        return f"{self.formats}-{tile}-{self.weight}-x_{self.x}-{self.beside}-{split}-n{self.block_n}"

    @property
    def x_dtype(self) -> torch.dtype:
        return torch.float32 if self.x == "f32" else TORCH_DTYPES[self.weight]


PARAMETERS: dict[str, tuple[object, ...]] = {
    "formats": tuple(MIXES),
    "tile": ((64, 64), (32, 32), (64, 128), (128, 64)),
    "weight": ("bf16", "f16", "f32"),
    "x": ("same", "f32"),
    "beside": tuple(EPILOGUES),
    "split": (False, True),
    "block_n": (16, 32, 64, 128),
}


def allowed(a: tuple[str, object], b: tuple[str, object]) -> bool:
    """Whether two values can meet: fp32 operands run with a batch block of at most 32."""
    pair = dict((a, b))
    wide = pair.get("block_n") in (64, 128)
    return not (wide and (pair.get("x") == "f32" or pair.get("weight") == "f32"))


@dataclass(frozen=True, eq=False)
class Case:
    """A weight of a class: its module and pools, ready for a backend."""

    module: Module
    pools: dict[str, Tensor]


def make_case(
    kernel: KernelClass,
    shape: tuple[int, int],
    *,
    seed: int = 0,
    parts: int = 3,
    empty: float = 0.2,
    device: str = "cpu",
) -> Case:
    """A random weight `[M, K]` of a class: its formats in turn over the tiles, shuffled.

    A share `empty` of the tiles is empty besides; 1.0 leaves no other.
    """
    from stoicc.inspector import inspect

    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(*shape, generator=generator) * 0.5).to(TORCH_DTYPES[kernel.weight])
    formats = {**MIXES, **FURTHER, **GLUON_MIXES}.get(kernel.formats, (kernel.formats,))
    grid = (-(-shape[0] // kernel.tile[0]), -(-shape[1] // kernel.tile[1]))
    count = grid[0] * grid[1]
    order = torch.randperm(count, generator=generator).tolist()
    texts = [formats[index % len(formats)] for index in order]
    dropped = (torch.rand(count, generator=generator) < empty).tolist()
    for tile, index in enumerate(order):
        if dropped[tile] and (index >= len(formats) or empty == 1.0):  # every format keeps a tile
            texts[tile] = "empty"
    rows = [texts[r * grid[1] : (r + 1) * grid[1]] for r in range(grid[0])]
    tiled = inspect(weight, tile=kernel.tile, tile_map=rows, approximate=True)
    beside, pools = make_beside(kernel, shape, generator)
    program = replace(tiled.program, beside=beside)
    pools = {name: pool.to(device) for name, pool in {**tiled.pools, **pools}.items()}
    return Case(schedule_by_hand(Module(program), parts if kernel.split else 1), pools)


def make_beside(
    kernel: KernelClass, shape: tuple[int, int], generator: torch.Generator, rank: int = 5
) -> tuple[Beside, dict[str, Tensor]]:
    """What the class has beside its tiles, with random values."""
    (rows, columns), wanted = shape, {**EPILOGUES, **GLUON_EPILOGUES}[kernel.beside]
    everything = {
        "bias": torch.randn(rows, generator=generator),
        "row_permutation": torch.randperm(rows, generator=generator).to(torch.int32),
        "column_permutation": torch.randperm(columns, generator=generator).to(torch.int32),
        "input_scale": torch.rand(columns, generator=generator) + 0.5,
        "output_scale": torch.rand(rows, generator=generator) + 0.5,
    }
    pools = {name: values for name, values in everything.items() if name in wanted}
    described = {name: _describe(name, values) for name, values in pools.items()}
    low_rank = None
    if "low_rank" in wanted:
        dtype = TORCH_DTYPES[kernel.weight]
        pools["left"] = torch.randn(rows, rank, generator=generator).to(dtype)
        pools["right"] = (torch.randn(rank, columns, generator=generator) * columns**-0.5).to(dtype)
        low_rank = (_describe("left", pools["left"]), _describe("right", pools["right"]))
    activation = next((name for name in wanted if name in ("relu", "gelu", "gelu_tanh", "silu")), None)
    return Beside(**described, low_rank=low_rank, activation=activation), pools


def schedule_by_hand(module: Module, parts: int) -> Module:
    """The schedule that drop-empty, build-csr and split-k give, without the passes."""
    program = module.tiles
    tile_map = program.map_array()
    live = tuple(index for index, segment in enumerate(program.segments) if segment.pools)
    csrs = tuple(
        TileCsr(
            index,
            (0, *(int(n) for n in (tile_map == index).sum(1).cumsum())),
            tuple(int(column) for row in tile_map for column in (row == index).nonzero()[0]),
        )
        for index in live
    )
    schedule = Schedule(live, tuple(range(program.grid[0])), csrs)
    return replace(module, schedule=schedule.split_k(parts).order(tuple(reversed(range(program.grid[0])))))


def reference(case: Case, x: Tensor) -> Tensor:
    """y in float64, from the decoded tiles: `[N, M]`."""
    from stoicc.codegen.reference import ReferenceBackend

    executor = ReferenceBackend().build(case.module, case.pools, "tiles", "error")
    out = torch.full((x.shape[0], case.module.tiles.shape[0]), torch.nan, dtype=torch.float64, device=x.device)
    executor.run(x.double(), out, torch.empty(0, dtype=torch.uint8))
    return out


def _describe(name: str, values: Tensor) -> Pool:
    return Pool(name, DTYPE_NAMES[values.dtype], tuple(values.shape), digest(values))


KERNEL_CLASSES: tuple[KernelClass, ...] = (
    KernelClass("dense", (64, 64), "f32", "f32", "plain", False, 16),
    KernelClass("dense", (32, 32), "bf16", "f32", "low_rank", False, 32),
    KernelClass("dense", (64, 128), "f16", "same", "scales", True, 64),
    KernelClass("dense", (64, 128), "f16", "f32", "permuted", True, 16),
    KernelClass("dense", (128, 64), "bf16", "same", "gelu", False, 64),
    KernelClass("dense", (128, 64), "bf16", "same", "all", True, 128),
    KernelClass("dense", (128, 64), "f16", "f32", "bias", True, 16),
    KernelClass("nv24", (64, 64), "bf16", "same", "scales", False, 32),
    KernelClass("nv24", (32, 32), "f16", "f32", "gelu", True, 16),
    KernelClass("nv24", (32, 32), "f32", "f32", "all", True, 16),
    KernelClass("nv24", (64, 128), "bf16", "same", "plain", True, 64),
    KernelClass("nv24", (64, 128), "bf16", "same", "permuted", False, 128),
    KernelClass("nv24", (128, 64), "bf16", "same", "bias", False, 64),
    KernelClass("nv24", (128, 64), "f32", "same", "low_rank", False, 32),
    KernelClass("int8", (64, 64), "f16", "same", "all", True, 64),
    KernelClass("int8", (64, 64), "f32", "f32", "plain", False, 32),
    KernelClass("int8", (32, 32), "bf16", "same", "bias", False, 128),
    KernelClass("int8", (32, 32), "f16", "same", "scales", True, 128),
    KernelClass("int8", (64, 128), "f32", "f32", "gelu", True, 32),
    KernelClass("int8", (128, 64), "f16", "same", "permuted", False, 128),
    KernelClass("int8", (128, 64), "f32", "same", "low_rank", True, 16),
    KernelClass("int4", (64, 64), "bf16", "same", "gelu", True, 64),
    KernelClass("int4", (64, 64), "bf16", "same", "low_rank", False, 128),
    KernelClass("int4", (32, 32), "f16", "same", "scales", True, 64),
    KernelClass("int4", (32, 32), "f16", "same", "permuted", True, 64),
    KernelClass("int4", (64, 128), "bf16", "same", "plain", False, 64),
    KernelClass("int4", (64, 128), "bf16", "f32", "all", False, 16),
    KernelClass("int4", (128, 64), "f32", "same", "bias", True, 32),
    KernelClass("int4_nv24", (64, 64), "f16", "f32", "bias", True, 16),
    KernelClass("int4_nv24", (32, 32), "f32", "same", "all", True, 32),
    KernelClass("int4_nv24", (64, 128), "bf16", "same", "plain", True, 128),
    KernelClass("int4_nv24", (128, 64), "bf16", "same", "gelu", False, 64),
    KernelClass("int4_nv24", (128, 64), "bf16", "same", "low_rank", True, 64),
    KernelClass("int4_nv24", (128, 64), "bf16", "f32", "scales", False, 32),
    KernelClass("int4_nv24", (128, 64), "bf16", "f32", "permuted", True, 16),
    KernelClass("rows", (64, 64), "bf16", "f32", "permuted", False, 32),
    KernelClass("rows", (32, 32), "f32", "f32", "gelu", True, 16),
    KernelClass("rows", (32, 32), "f32", "f32", "scales", True, 16),
    KernelClass("rows", (64, 128), "bf16", "same", "bias", False, 128),
    KernelClass("rows", (64, 128), "f16", "same", "low_rank", False, 128),
    KernelClass("rows", (64, 128), "f16", "same", "all", False, 64),
    KernelClass("rows", (128, 64), "f16", "same", "plain", False, 64),
    KernelClass("zeros", (64, 64), "f32", "same", "low_rank", True, 16),
    KernelClass("zeros", (32, 32), "bf16", "f32", "plain", False, 16),
    KernelClass("zeros", (32, 32), "bf16", "f32", "permuted", True, 16),
    KernelClass("zeros", (32, 32), "f16", "same", "all", False, 32),
    KernelClass("zeros", (64, 128), "f16", "same", "bias", False, 64),
    KernelClass("zeros", (128, 64), "bf16", "same", "scales", False, 128),
    KernelClass("zeros", (128, 64), "f32", "f32", "gelu", False, 32),
    KernelClass("mosaic", (64, 64), "bf16", "same", "gelu", False, 128),
    KernelClass("mosaic", (64, 64), "f32", "same", "bias", False, 16),
    KernelClass("mosaic", (32, 32), "bf16", "f32", "all", False, 16),
    KernelClass("mosaic", (64, 128), "f16", "same", "low_rank", True, 64),
    KernelClass("mosaic", (128, 64), "f16", "same", "plain", True, 32),
    KernelClass("mosaic", (128, 64), "f16", "same", "scales", True, 128),
    KernelClass("mosaic", (128, 64), "f32", "f32", "permuted", False, 16),
)
"""The pairwise cover."""

FURTHER_CLASSES = tuple(
    replace(kernel, formats=formats)
    for formats in FURTHER
    for kernel in (
        KernelClass("", (64, 64), "bf16", "same", "plain", False, 16),
        KernelClass("", (32, 32), "f16", "f32", "bias", True, 32),
        KernelClass("", (128, 64), "f32", "same", "plain", False, 16),
    )
)
