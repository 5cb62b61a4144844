"""Checks of what stands around the tiles: x scaled and permuted, products of warpgroups, a vendor's library.

No GPU has run any of them yet, so their results stand in a report before their times.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu_check import REPEATS, Check, Plan, compare, run_once
from bench.gpu_runners import TENSOR_CORE_TILE, has_warpgroups
from stoicc.ir.digest import digest
from stoicc.ir.dtypes import DTYPE_NAMES
from stoicc.ir.types import Pool

MIXES = {
    "dense": ("dense",),
    "nv24": ("nv24",),
    "mosaic": ("dense", "nv24", "int4<group_size=64>", "int4_nv24<group_size=64>", "int8<group_size=64>", "empty"),
}


def check_prologue(plan: Plan, dtype: torch.dtype) -> Iterator[Check]:
    """x permuted, and but for f16 scaled, in the launch that multiplies and in launches before it, padded or not."""
    import stoicc

    generator = torch.Generator().manual_seed(4)
    rows, columns = plan.check_shape
    for where, inside, width in (
        ("in the launch", 1, columns),
        ("before it", 0, columns),
        ("padded before it", 0, columns - 3),
    ):
        pipeline = f"build-csr,split-k{{parts=2}},fuse-epilogue,launch{{prologue={inside}}}"
        tiled = permuted_weight((rows, width), dtype, generator)
        kernel = stoicc.compile(tiled, target="cuda", pipeline=pipeline).to(plan.device)
        dense = kernel.to_dense().double()
        for batch in (1, 18, 40):
            x = inputs(batch, width, dtype, generator, plan.device)
            yield compare(kernel, "tiles", x, F.linear(x.double(), dense), f"x {where}")


def permuted_weight(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Any:
    """A tiled weight whose x is permuted, and scaled unless it is f16."""
    import stoicc

    names = tile_map(("nv24", "int4<group_size=64>"), shape)
    weight = torch.randn(*shape, generator=generator).to(dtype)
    tiled = stoicc.inspect(weight, tile=TENSOR_CORE_TILE, tile_map=names, approximate=True)
    pools = {"column_permutation": torch.randperm(shape[1], generator=generator).to(torch.int32)}
    if dtype != torch.float16:
        pools["input_scale"] = torch.rand(shape[1], generator=generator) + 0.5
    found: dict[str, Any] = {
        name: Pool(name, DTYPE_NAMES[pool.dtype], (shape[1],), digest(pool)) for name, pool in pools.items()
    }
    program = replace(tiled.program, beside=replace(tiled.program.beside, **found))
    return replace(tiled, program=program, pools={**tiled.pools, **pools})


def check_warpgroups(plan: Plan, dtype: torch.dtype) -> Iterator[Check]:
    """Each mix at whole blocks and with tails against float64, in parts and whole, then the same bits each time."""
    import stoicc

    if not has_warpgroups(plan.device):
        return
    generator = torch.Generator().manual_seed(2)
    rows, columns = plan.check_shape
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    for name, formats in MIXES.items():
        for parts in (1, 2):
            names = tile_map(formats, (rows, columns))
            tiled = stoicc.inspect(weight, tile=TENSOR_CORE_TILE, tile_map=names, approximate=True)
            text = f"build-csr,split-k{{parts={parts}}},launch{{wgmma=1}}"
            kernel = stoicc.compile(tiled, target="cuda", pipeline=text).to(plan.device)
            dense = kernel.to_dense().double()
            for batch in (64, 67, 128, 256, 300):
                x = inputs(batch, columns, dtype, generator, plan.device)
                yield replace(compare(kernel, "tiles", x, F.linear(x.double(), dense), name), executor="wgmma")
        first, *others = (run_once(kernel.executor("tiles"), x, rows) for _ in range(REPEATS))
        same = all(torch.equal(first, other) for other in others)
        weight_dtype, x_dtype = kernel.program.dtype, str(dtype).removeprefix("torch.")
        yield Check(f"{name}, {REPEATS} times", weight_dtype, x_dtype, len(x), "wgmma", None, same)


def check_vendor(plan: Plan, dtype: torch.dtype) -> Iterator[Check]:
    """A dense matrix, and on a GPU a 2:4 one, by the library that multiplies it."""
    import stoicc

    generator = torch.Generator().manual_seed(3)
    rows, columns = (64, 128) if plan.device.type == "cpu" else (256, 512)  # what a library takes
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    for fmt in ("dense", "nv24") if plan.device.type == "cuda" else ("dense",):
        names = tile_map((fmt,), (rows, columns), (64, 64))
        tiled = stoicc.inspect(weight, tile=(64, 64), tile_map=names, approximate=True)
        kernel = stoicc.compile(tiled, target="cuda", pipeline="build-csr").to(plan.device)
        dense = kernel.to_dense().double()
        for batch in (16, 300):
            x = inputs(batch, columns, dtype, generator, plan.device)
            yield compare(kernel, "vendor", x, F.linear(x.double(), dense), fmt)


def tile_map(
    formats: tuple[str, ...], shape: tuple[int, int], tile: tuple[int, int] = TENSOR_CORE_TILE
) -> list[list[str]]:
    """Formats in turn over the tiles of a matrix."""
    rows, columns = (-(-extent // side) for extent, side in zip(shape, tile, strict=True))
    return [[formats[(row * columns + column) % len(formats)] for column in range(columns)] for row in range(rows)]


def inputs(batch: int, columns: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(batch, columns, generator=generator).to(dtype).to(device)
