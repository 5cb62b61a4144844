"""Cutting a matrix in tiles and laying tiles back, batched and padded at the tails."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from stoicc.ir.errors import InputError
from stoicc.ir.types import TILE_SIZES


def check_tile(tile: tuple[int, int]) -> tuple[int, int]:
    """A tile shape (BM, BK) that formats and backends accept, or InputError."""
    if not isinstance(tile, (tuple, list)) or len(tile) != 2 or any(extent not in TILE_SIZES for extent in tile):
        raise InputError(f"tile: expected two of {', '.join(map(str, TILE_SIZES))}, found {tile}; for example (64, 64)")
    return int(tile[0]), int(tile[1])


def grid_of(shape: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """Tile rows and tile columns that cover a matrix of this shape."""
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def to_tiles(matrix: Tensor, tile: tuple[int, int], fill: float = 0) -> Tensor:
    """`[M, K]` -> contiguous `[tile rows * tile columns, BM, BK]`, row-major, tails filled."""
    rows, columns = grid_of((matrix.shape[0], matrix.shape[1]), tile)
    extra = rows * tile[0] - matrix.shape[0], columns * tile[1] - matrix.shape[1]
    if any(extra):
        matrix = pad(matrix, (0, extra[1], 0, extra[0]), value=fill)
    return matrix.view(rows, tile[0], columns, tile[1]).transpose(1, 2).reshape(-1, *tile)


def from_tiles(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `to_tiles`: `[tiles, BM, BK]` -> `[M, K]` with the padding cut off."""
    tile = (tiles.shape[1], tiles.shape[2])
    rows, columns = grid_of(shape, tile)
    whole = tiles.view(rows, columns, *tile).transpose(1, 2).reshape(rows * tile[0], columns * tile[1])
    return whole[: shape[0], : shape[1]]


def row_blocks(shape: tuple[int, int], weights: int = 1 << 21) -> Iterator[slice]:
    """Runs of whole rows of about so many weights, for work that is independent by row."""
    height = max(1, weights // max(shape[1], 1))
    for first in range(0, shape[0], height):
        yield slice(first, min(first + height, shape[0]))


def spread_tile_mask(where: Tensor, shape: tuple[int, int], tile: tuple[int, int]) -> Tensor:
    """Bool per tile `[tile rows, tile columns]` -> bool per weight `[M, K]`."""
    return where.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)[: shape[0], : shape[1]]


def as_bool_map(where: object, grid: tuple[int, int], what: str) -> Tensor:
    """A user's tile mask as a bool tensor of the tile grid, or InputError."""
    mask = torch.as_tensor(where)
    if mask.shape != grid or mask.dtype != torch.bool:
        raise InputError(
            f"{what}: expected a bool mask of the tile grid {grid}, found {mask.dtype} of shape {tuple(mask.shape)}; "
            "one entry says whether the operator touches that tile"
        )
    return mask
