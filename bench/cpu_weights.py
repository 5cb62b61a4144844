"""The weights of the CPU bench: every built-in format, mixes of them, and work that is spread badly."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import stoicc
from stoicc.pools import TiledWeight

TILE = 64
KEPT = {
    "dense": 1.0,
    "nv24": 0.5,
    "bitmap 50%": 0.5,
    "nm 2:8": 0.25,
    "int8 g=128": 1.0,
    "int4 g=128": 1.0,
    "int4_nv24 g=128": 0.5,
    "int3 g=128": 1.0,
    "int2 g=128": 1.0,
    "fp8": 1.0,
    "mxfp4": 1.0,
    "nvfp4": 1.0,
    "bitmap 50% over int8 g=128": 0.5,
    "bitmap 50% over int4 g=128": 0.5,
    "nm 2:8 over int4 g=128": 0.25,
    "nv24 over fp8": 0.5,
    "outlier 1% over int4 g=128": 1.0,
    "group_sparse 50% g=16": 0.5,
    "mosaic of 5": 0.6,
    "half empty": 0.5,
}
"""Share of the weights of each mix that a product has to multiply."""
MAIN = (
    "dense", "nv24", "bitmap 50%", "int8 g=128", "int4 g=128", "int4_nv24 g=128", "mosaic of 5", "half empty",
)  # fmt: skip
"""Mixes that are timed at every batch and in every dtype; the others in bf16 and at `FEW` batches."""
FEW = (1, 4, 16)
Weight = stoicc.ops.CompressedWeight | TiledWeight | Tensor


def random_weight(shape: tuple[int, int]) -> Tensor:
    """A normal fp32 weight `[M, K]`; the same numbers in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02


def mixes(weight: Tensor, names: Sequence[str] = tuple(KEPT)) -> dict[str, Weight]:
    """What is measured, by name: formats, a mosaic with a fifth of its tiles in each, and half of the tiles empty."""
    grid = (-(-weight.shape[0] // TILE), -(-weight.shape[1] // TILE))
    prune, quantize = stoicc.ops.nm_magnitude, stoicc.ops.group_absmax
    makers: dict[str, Callable[[], Weight]] = {
        "dense": lambda: weight,
        "nv24": lambda: prune(weight),
        "bitmap 50%": lambda: _unstructured(weight),
        "nm 2:8": lambda: prune(weight, 2, 8),
        "int8 g=128": lambda: quantize(weight, 8, 128),
        "int4 g=128": lambda: quantize(weight, 4, 128),
        "int4_nv24 g=128": lambda: quantize(prune(weight), 4, 128),
        "int3 g=128": lambda: quantize(weight, 3, 128),
        "int2 g=128": lambda: quantize(weight, 2, 128),
        **{name: partial(_approximated, weight, name) for name in ("fp8", "mxfp4", "nvfp4")},
        "bitmap 50% over int8 g=128": lambda: _held(quantize(_unstructured(weight), 8, 128), "masked<values=int8$>"),
        "bitmap 50% over int4 g=128": lambda: _held(quantize(_unstructured(weight), 4, 128), "masked<values=int4$>"),
        "nm 2:8 over int4 g=128": lambda: _held(quantize(prune(weight, 2, 8), 4, 128), "masked<mask=nm, values=int4$>"),
        "nv24 over fp8": partial(_approximated, weight, "masked<mask=nv24, values=fp8>"),
        "outlier 1% over int4 g=128": partial(_approximated, weight, "outlier<values=int4<group_size=128>>", 128),
        "group_sparse 50% g=16": partial(_approximated, weight, "group_sparse"),
        "mosaic of 5": lambda: _mosaic(weight, grid),
        "half empty": lambda: prune(weight, 0, 4, where=half_of(grid)),
    }
    return {name: makers[name]() for name in names}


def _approximated(weight: Tensor, fmt: str, columns: int = TILE) -> Weight:
    """Every tile in one format, with loss."""
    grid = (-(-weight.shape[0] // TILE), -(-weight.shape[1] // columns))
    return stoicc.inspect(weight, tile=(TILE, columns), tile_map=[[fmt] * grid[1]] * grid[0], approximate=True)


def _held(codes: Weight, fmt: str) -> Weight:
    """An operator's codes in groups of 128, every tile in one format."""
    return stoicc.inspect(codes, [fmt.replace("$", "<group_size=128>")])


def _unstructured(weight: Tensor) -> Tensor:
    """A random half of the weights, wherever they stand."""
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) < 0.5
    return weight.where(kept, 0)


def _mosaic(weight: Tensor, grid: tuple[int, int]) -> Weight:
    """Empty, nv24, int4_nv24, int4 and dense tiles, a fifth each at random."""
    kind = torch.randint(0, 5, grid, generator=torch.Generator().manual_seed(1))
    emptied = stoicc.ops.nm_magnitude(weight, 0, 4, where=kind == 0)
    pruned = stoicc.ops.nm_magnitude(emptied, where=(kind == 1) | (kind == 2))
    return stoicc.ops.group_absmax(pruned, 4, 64, where=(kind == 2) | (kind == 3))


def half_of(grid: tuple[int, int]) -> Tensor:
    """A random half of the tiles, `[tile rows, tile columns]` bool."""
    return torch.rand(grid, generator=torch.Generator().manual_seed(2)) < 0.5


def skewed_pair(shape: tuple[int, int]) -> dict[str, Weight]:
    """Two mosaics of the same tiles and bytes: the dense tiles all in one tile row, or as many in each.

    One tile row's worth of tiles is dense, an eighth of the others int4, the rest empty, so that the
    dense tiles are most of the bytes and the threads can only share them within their tile row.
    """
    grid = (shape[0] // TILE, shape[1] // TILE)
    skewed, uniform = torch.zeros(grid, dtype=torch.long), torch.zeros(grid, dtype=torch.long)
    few = grid[1] // 8
    skewed[1:, :few] = 1
    skewed[0] = 2
    spread = skewed.flatten()[torch.randperm(skewed.numel(), generator=torch.Generator().manual_seed(3))]
    uniform.copy_(spread.view(grid))
    weight = random_weight(shape).bfloat16()
    return {name: _three_kinds(weight, kind) for name, kind in (("skewed", skewed), ("uniform", uniform))}


def _three_kinds(weight: Tensor, kind: Tensor) -> Weight:
    """Empty where kind is 0, int4 where it is 1, dense where it is 2."""
    emptied = stoicc.ops.nm_magnitude(weight, 0, 4, where=kind == 0)
    return stoicc.ops.group_absmax(emptied, 4, TILE, where=kind == 1)
