"""Checks of what large batches run: products of warpgroups, and a vendor's library as an executor.

No GPU has run either yet, so their results stand in a report before their times.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu_check import REPEATS, Check, Plan, compare, run_once
from bench.gpu_runners import TENSOR_CORE_TILE, has_warpgroups

MIXES = {
    "dense": ("dense",),
    "nv24": ("nv24",),
    "mosaic": ("dense", "nv24", "int4<group_size=64>", "int4_nv24<group_size=64>", "int8<group_size=64>", "empty"),
}


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
