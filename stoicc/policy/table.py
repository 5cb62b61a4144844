"""What every tile of a weight would cost in every format: bytes, and the error that it would bring."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stoicc.choosing import guarded
from stoicc.ir.dtypes import DTYPE_NAMES
from stoicc.ir.errors import FormatError, InputError
from stoicc.ir.format import PlaneKind, TileFormat
from stoicc.ops._hessian import Factor
from stoicc.ops.statistics import Statistics
from stoicc.policy.rounding import lattice_errors
from stoicc.tiling import grid_of, to_tiles

CHUNK = 1 << 19
"""Weights that are encoded at a time, so that what encoding needs stays in cache."""


@dataclass(frozen=True, eq=False)
class TileTable:
    """Costs of every tile in every candidate format.

    Attributes:
        formats: F candidates, cheapest first.
        grid: tile rows and tile columns; tiles are numbered row by row.
        errors: `[T, F]`, squared output error that a tile brings; infinite where it cannot have the format.
        bytes: `[T, F]`.
        weights: M x K.
        beside: bytes that stand beside the tiles whatever is chosen (the order of the columns).
    """

    formats: tuple[TileFormat, ...]
    grid: tuple[int, int]
    errors: NDArray[np.float64]
    bytes: NDArray[np.float64]
    weights: int
    beside: int = 0

    def error(self, choice: NDArray[np.int64]) -> float:
        """The squared error of a choice `[T]`."""
        return float(self.errors[np.arange(len(choice)), choice].sum())

    def bytes_of(self, choice: NDArray[np.int64]) -> float:
        """Bytes of a choice `[T]`, with what stands beside."""
        return float(self.bytes[np.arange(len(choice)), choice].sum()) + self.beside

    def map(self, choice: NDArray[np.int64]) -> list[list[TileFormat]]:
        """The choice as a tile map."""
        rows = choice.reshape(self.grid).tolist()
        return [[self.formats[index] for index in row] for row in rows]


def measure(
    values: Tensor,
    formats: Sequence[TileFormat],
    tile: tuple[int, int],
    seen: Statistics | None,
    factor: Factor | None = None,
    rows: Tensor | None = None,
) -> TileTable:
    """Encode every tile in every format, and weigh what that loses.

    Without `factor`, tiles are encoded and decoded by their format, and the error is tr(E G E^T) over the tile's own
    block of G = X^T X, of its diagonal where that is all there is, or of plain squares without statistics. With it, a
    tile is rounded weight by weight as a sweep does, and column j of its error counts by 1 / U_jj**2, H^-1 = U^T U:
    what is left of it once the columns to come have answered (Frantar and Alistarh 2023, Section 3). Tiles then add
    up without cross terms. Weights that are dropped count by H_jj: what would answer for them may be dropped as well.

    Args:
        values: `[M, K]` in tile order.
        formats: candidates whose planes belong to single tiles.
        seen: statistics of the inputs as the tiles see them.
        factor: of their Hessian.
        rows: `[M]`, what a squared error in each row of the output counts; None for one.

    Raises:
        InputError: a format that shares planes between tiles.
        FormatError: a format that cannot encode what it is given.
    """
    shape = (values.shape[0], values.shape[1])
    dtype = DTYPE_NAMES[values.dtype]
    grid = grid_of(shape, tile)
    by_cost = sorted(formats, key=lambda fmt: (fmt.cost(tile, dtype).bytes, str(fmt)))
    for fmt in by_cost:
        _refuse_shared(fmt, tile, dtype)
    weigher = _Weigher(shape[1], tile[1], seen, factor)
    errors, sizes = (np.zeros((grid[0] * grid[1], len(by_cost))) for _ in range(2))
    height = max(1, CHUNK // (tile[0] * tile[1] * grid[1]))
    for first in range(0, grid[0], height):
        lines = slice(first * tile[0], (first + height) * tile[0])
        tiles = to_tiles(values[lines], tile)
        place = slice(first * grid[1], first * grid[1] + len(tiles))
        factors = None
        if rows is not None:
            factors = to_tiles(rows[lines, None].float().expand(-1, grid[1]).contiguous(), (tile[0], 1)).squeeze(2)
        for index, fmt in enumerate(by_cost):
            found = weigher.errors(fmt, tiles, factors)
            errors[place, index] = found.numpy()
            sizes[place, index] = fmt.tile_bytes(_kept(fmt, tiles, dtype), dtype).numpy()
    return TileTable(tuple(by_cost), grid, errors, sizes, shape[0] * shape[1])


def merged(tables: Sequence[TileTable], factors: Sequence[float]) -> TileTable:
    """Tables of several layers as one, the errors of each multiplied by its factor.

    Raises:
        InputError: tables of other formats.
    """
    if any(table.formats != tables[0].formats for table in tables):
        raise InputError("Budget: expected the same formats and dtype in every layer, found others; use two rules")
    tiles = sum(len(table.errors) for table in tables)
    return replace(
        tables[0],
        grid=(tiles, 1),
        errors=np.concatenate([table.errors * factor for table, factor in zip(tables, factors, strict=True)]),
        bytes=np.concatenate([table.bytes for table in tables]),
        weights=sum(table.weights for table in tables),
        beside=sum(table.beside for table in tables),
    )


class _Weigher:
    """Errors of encoded tiles, weighted by what is known of the inputs."""

    def __init__(self, columns: int, width: int, seen: Statistics | None, factor: Factor | None) -> None:
        count = -(-columns // width)
        self.compensated, self.blocks, plain = factor is not None, None, None
        extra = count * width - columns
        if factor is not None:
            diagonal = factor.left
            assert seen is not None
            plain = torch.nn.functional.pad(seen.square.double(), (0, extra)).view(count, width).float()
        elif seen is not None:
            diagonal = seen.square.double()
        else:
            diagonal = torch.ones(columns, dtype=torch.float64)
        self.diagonal = torch.nn.functional.pad(diagonal, (0, extra)).view(count, width).float()
        self.dropped = self.diagonal if plain is None else torch.maximum(plain, self.diagonal)
        if factor is None and seen is not None and seen.gram is not None:
            gram = torch.nn.functional.pad(seen.gram, (0, extra, 0, extra)).view(count, width, count, width)
            self.blocks = gram.diagonal(dim1=0, dim2=2).permute(2, 0, 1).float().contiguous()

    def errors(self, fmt: TileFormat, tiles: Tensor, rows: Tensor | None) -> Tensor:
        """`[T]` float64, T whole tile rows."""
        shape = (tiles.shape[1], tiles.shape[2])
        repeats = len(tiles) // len(self.diagonal)
        lattice = fmt.lattice(shape) if self.compensated else None
        if lattice is not None:
            return lattice_errors(
                tiles, lattice, self.diagonal.repeat(repeats, 1), self.dropped.repeat(repeats, 1), rows
            )
        lost = tiles.float() - _decoded(fmt, tiles, self.diagonal.repeat(repeats, 1)).float()
        if self.blocks is None:
            squares = lost.square().mul_(self.diagonal.repeat(repeats, 1)[:, None]).sum(2)
        else:
            by_column = lost.unflatten(0, (repeats, -1)).transpose(0, 1).reshape(len(self.blocks), -1, shape[1])
            squares = torch.bmm(by_column, self.blocks).mul_(by_column).sum(2)
            squares = squares.view(-1, repeats, shape[0]).transpose(0, 1).reshape(-1, shape[0])
        return (squares if rows is None else squares * rows).sum(1, dtype=torch.float64)


def _kept(fmt: TileFormat, tiles: Tensor, dtype: str) -> Tensor:
    """Tiles with zeros where a format whose bytes depend on them drops weights; rounding can only add to those."""
    if all(plane.kind is not PlaneKind.RAGGED for plane in fmt.planes((tiles.shape[1], tiles.shape[2]), dtype)):
        return tiles
    kept = fmt.keep(tiles.float().abs())
    return tiles if kept is None else tiles.where(kept, 0)


def _decoded(fmt: TileFormat, tiles: Tensor, weights: Tensor) -> Tensor:
    """What a format makes of tiles where it may change them."""
    shape, dtype = (tiles.shape[1], tiles.shape[2]), DTYPE_NAMES[tiles.dtype]
    if not fmt.planes(shape, dtype):
        return torch.zeros_like(tiles)
    slots = torch.arange(len(tiles))
    planes = guarded(fmt, "approximate", tiles, lambda: fmt.approximate(tiles, slots, weights).planes)
    return guarded(fmt, "decode", tiles, lambda: fmt.decode(planes, shape, dtype))


def stands_alone(fmt: TileFormat, tile: tuple[int, int], dtype: str) -> bool:
    """Whether a format suits a tile shape, and no tile of it shares planes with others."""
    return why_not(fmt, tile, dtype) is None


def why_not(fmt: TileFormat, tile: tuple[int, int], dtype: str) -> str | None:
    """Why tiles of this shape cannot have a format each on its own, in words; None where they can."""
    try:
        kinds = {plane.kind for plane in fmt.planes(tile, dtype)}
    except FormatError as error:
        return str(error)
    return "shares planes between tiles" if kinds & {PlaneKind.GROUP, PlaneKind.MATRIX} else None


def _refuse_shared(fmt: TileFormat, tile: tuple[int, int], dtype: str) -> None:
    try:
        fmt.planes(tile, dtype)
    except FormatError as error:
        raise FormatError(f"Budget: {error}") from None
    if not stands_alone(fmt, tile, dtype):
        raise InputError(
            f"Budget: expected formats whose tiles stand alone, found {fmt}, which shares planes between tiles; "
            f"{_way_out(fmt, tile)}leave it out"
        )


def _way_out(fmt: TileFormat, tile: tuple[int, int]) -> str:
    if not hasattr(fmt, "group_size"):
        return ""
    return f"give it a group_size that divides the tile's {tile[1]} columns, or "
