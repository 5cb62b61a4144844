"""The inspector: from a weight matrix to a tile program and its pools.

Tile rows are taken in chunks of a few million weights, so that temporaries stay small; within a
chunk everything is batched over tiles. Each tile gets the cheapest allowed format (in bytes) that
holds it bit for bit, or the format that the user's tile map names.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stoicc.formats import formats as registered
from stoicc.ir.dtypes import DTYPE_NAMES
from stoicc.ir.errors import FormatError, InputError
from stoicc.ir.format import PlaneKind, Planes, TileCodes, TileFormat
from stoicc.ir.registry import find_formats
from stoicc.ir.schedule import entry_slots
from stoicc.ops.graph import CompressedWeight
from stoicc.ops.lowering import CodeSheet, Lowered, lower
from stoicc.pools import PoolBuilder, TiledWeight, beside_pools
from stoicc.tiling import check_tile, grid_of, to_tiles
from stoicc.weights import FormatLike, TileMap, as_matrix, as_tile_map, non_finite

CHUNK_WEIGHTS = 1 << 21
"""Weights per chunk of tile rows: 4 MB in bf16, so that a chunk's temporaries stay in cache."""


def inspect(
    weight: object,
    formats: Sequence[FormatLike] | None = None,
    tile: tuple[int, int] | None = None,
    tile_map: TileMap | None = None,
    *,
    approximate: bool = False,
    name: str = "weight",
    bias: Tensor | None = None,
    activation: str | None = None,
) -> TiledWeight:
    """Cut a weight in tiles and give every tile a format.

    Lossless by default: the tiles decode to the given weight bit for bit, and each tile has the
    cheapest format (in bytes) of `formats` that holds it.

    Args:
        weight: `[M, K]` torch tensor, numpy array, scipy sparse matrix (f32, f16, bf16), or an
            operator's result.
        formats: formats to choose from, by text (`"int4<group_size=128>"`) or as objects;
            default: every registered one.
        tile: (BM, BK), powers of two from 16 to 256; default (64, 64), or the operators' tile.
        tile_map: a format for each tile, `[tile rows][tile columns]` of texts or formats.
        approximate: let a tile map change values (prune, quantize) where a tile does not fit.
        name: what the program is called in its text.
        bias: `[M]`, added by the executor.
        activation: one of `stoicc.ir.types.ACTIVATIONS`, applied last.

    Raises:
        InputError: a weight, tile or map that cannot be used.
        FormatError: a tile that no allowed format holds, or an unknown format.
    """
    lowered = lower(weight) if isinstance(weight, CompressedWeight) else Lowered(as_matrix(weight))
    marked = weight.tile if isinstance(weight, CompressedWeight) else None
    shape = (lowered.values.shape[0], lowered.values.shape[1])
    chosen_tile = check_tile(tile or marked or (64, 64))
    if marked is not None and chosen_tile != marked:
        raise InputError(f"tile: expected {marked}, the tile of the operators, found {chosen_tile}; leave tile out")
    grid = grid_of(shape, chosen_tile)
    requested = None if tile_map is None else as_tile_map(tile_map, grid)
    allowed = requested[0] if requested else _candidates(formats, lowered, chosen_tile)
    chooser = _Chooser(lowered, chosen_tile, allowed, None if requested is None else requested[1], approximate)
    builder = PoolBuilder(name, shape, chosen_tile, DTYPE_NAMES[lowered.values.dtype], allowed)
    for chunk in chooser.chunks():
        builder.add(chunk.choice, {i: chooser.encode(chunk, i) for i in chunk.choice.unique().tolist()})
    return builder.finish(beside_pools(lowered, bias, activation))


@dataclass
class _Chunk:
    """A run of whole tile rows: tiles `[T, BM, BK]`, their grid coordinates, and the choice."""

    tiles: Tensor
    rows: np.ndarray[tuple[int], np.dtype[np.int64]]
    columns: np.ndarray[tuple[int], np.dtype[np.int64]]
    codes: list[tuple[TileCodes, Tensor]]
    choice: Tensor


class _Chooser:
    """Chooses a format for each tile of a lowered weight, chunk by chunk."""

    def __init__(
        self,
        lowered: Lowered,
        tile: tuple[int, int],
        formats: tuple[TileFormat, ...],
        requested: Tensor | None,
        approximate: bool,
    ) -> None:
        self.lowered, self.tile, self.formats = lowered, tile, formats
        self.requested, self.approximate = requested, approximate
        self.dtype = DTYPE_NAMES[lowered.values.dtype]
        self.grid = grid_of((lowered.values.shape[0], lowered.values.shape[1]), tile)
        for fmt in formats:
            fmt.planes(tile, self.dtype)  # an unusable group_size is refused before any work

    def chunks(self) -> Iterator[_Chunk]:
        height = max(1, CHUNK_WEIGHTS // (self.tile[0] * self.tile[1] * self.grid[1]))
        for first in range(0, self.grid[0], height):
            count = min(height, self.grid[0] - first)
            lines = slice(first * self.tile[0], (first + count) * self.tile[0])
            values = self.lowered.values[lines]
            bad = non_finite(values)
            if bad is not None:
                row, column = bad[0] + lines.start, bad[1]
                raise InputError(
                    f"weight: expected finite values, found {bad[2]} at row {row}, column {column}; "
                    "repair the weight before compiling"
                )
            tiles = to_tiles(values, self.tile)
            index = np.arange(tiles.shape[0])
            codes = [_tile_codes(sheet, lines, self.tile) for sheet in self.lowered.sheets]
            chunk = _Chunk(tiles, first + index // self.grid[1], index % self.grid[1], codes, torch.empty(0))
            chunk.choice = self._choose(chunk, first, count)
            yield chunk

    def slots(self, chunk: _Chunk, fmt: TileFormat, chosen: Tensor) -> Tensor:
        """Shared entries of the chosen tiles: by the format's GROUP planes, else one for each."""
        spans = [p.span for p in fmt.planes(self.tile, self.dtype) if p.kind is PlaneKind.GROUP]
        picked = chosen.numpy()
        slots = entry_slots(chunk.rows[picked], chunk.columns[picked], spans[0] if spans else 1)
        return torch.from_numpy(slots)

    def encode(self, chunk: _Chunk, index: int) -> Planes:
        """Planes of the chunk's tiles that chose format `index`, in tile order."""
        fmt, chosen = self.formats[index], (chunk.choice == index).nonzero().flatten()
        parts: list[tuple[Tensor, Planes]] = []
        left = torch.ones(chosen.numel(), dtype=torch.bool)
        for codes, held in chunk.codes:
            here = held[chosen] & left
            here[here.clone()] = ~fmt.reject_codes(codes.select(chosen[here]))
            if here.any():
                parts.append((here.nonzero().flatten(), fmt.from_planes(codes.select(chosen[here]))))
                left &= ~here
        if left.any():
            rest = chosen[left]
            tiles = chunk.tiles if rest.numel() == chunk.tiles.shape[0] else chunk.tiles[rest]
            slots = self.slots(chunk, fmt, rest)
            lossy = self.requested is not None and self.approximate
            planes = fmt.approximate(tiles, slots).planes if lossy else fmt.encode_shared(tiles, slots)
            parts.append((left.nonzero().flatten(), planes))
        return parts[0][1] if len(parts) == 1 else _merge(parts, chosen.numel())

    def _choose(self, chunk: _Chunk, first: int, count: int) -> Tensor:
        if self.requested is not None:
            choice = self.requested[first : first + count].flatten()
            if not self.approximate:
                self._check_requested(chunk, choice)
            return choice
        quantized = torch.zeros(chunk.tiles.shape[0], dtype=torch.bool)
        for _, held in chunk.codes:
            quantized |= held
        choice = torch.full((chunk.tiles.shape[0],), -1)
        for index, fmt in enumerate(self.formats):
            open_ = choice == -1
            for codes, held in chunk.codes:
                here = (open_ & held).nonzero().flatten()
                if here.numel():
                    choice[here[~fmt.reject_codes(codes.select(here))]] = index
            # Floats of a matrix that an operator quantized go to formats that keep floats, so
            # that scales found here never meet scales that the operator chose.
            if not (chunk.codes and fmt.planes_hold_codes):
                here = ((choice == -1) & ~quantized).nonzero().flatten()
                choice[self._fitting(chunk, fmt, here)] = index
        for index, fmt in enumerate(self.formats):
            here = ((choice == -1) & quantized).nonzero().flatten()
            if not fmt.planes_hold_codes:
                choice[self._fitting(chunk, fmt, here)] = index
        self._check_all_chosen(chunk, choice)
        return choice

    def _fitting(self, chunk: _Chunk, fmt: TileFormat, candidates: Tensor) -> Tensor:
        """The candidates that the format holds; with shared planes, until those left agree."""
        while candidates.numel():
            tiles = chunk.tiles if candidates.numel() == chunk.tiles.shape[0] else chunk.tiles[candidates]
            rejected = fmt.reject_shared(tiles, self.slots(chunk, fmt, candidates))
            kept = candidates[~rejected]
            shared = any(p.kind is PlaneKind.GROUP for p in fmt.planes(self.tile, self.dtype))
            if not shared or kept.numel() == candidates.numel():
                return kept
            candidates = kept
        return candidates

    def _check_requested(self, chunk: _Chunk, choice: Tensor) -> None:
        for index, fmt in enumerate(self.formats):
            here = (choice == index).nonzero().flatten()
            if not here.numel():
                continue
            rejected = fmt.reject_shared(chunk.tiles[here], self.slots(chunk, fmt, here))
            for codes, held in chunk.codes:
                coded = held[here]
                rejected[coded.clone()] &= fmt.reject_codes(codes.select(here[coded]))
            if rejected.any():
                self._refuse(chunk, fmt, int(here[rejected][0]))

    def _check_all_chosen(self, chunk: _Chunk, choice: Tensor) -> None:
        left = (choice == -1).nonzero().flatten()
        if left.numel():
            self._refuse(chunk, self.formats[-1], int(left[0]))

    def _refuse(self, chunk: _Chunk, fmt: TileFormat, tile: int) -> None:
        place = f"({chunk.rows[tile]}, {chunk.columns[tile]})"
        raise FormatError(f"format {fmt}, tile {place}: {fmt.why(chunk.tiles[tile])}")


def _candidates(
    formats: Sequence[FormatLike] | None, lowered: Lowered, tile: tuple[int, int]
) -> tuple[TileFormat, ...]:
    """The formats to choose from, cheapest first, with variants that hold the operators' codes."""
    dtype = DTYPE_NAMES[lowered.values.dtype]
    chosen = find_formats(registered() if formats is None else formats)
    if formats is None:
        variants = [
            fmt.for_codes(sheet.bits, sheet.group_size, sheet.zeros is not None)
            for sheet in lowered.sheets
            for fmt in chosen
        ]
        chosen = tuple(dict.fromkeys((*chosen, *(fmt for fmt in variants if fmt is not None))))
        chosen = tuple(fmt for fmt in chosen if _usable(fmt, tile, dtype))
    if not chosen:
        raise FormatError("formats: expected at least one format, found none; leave formats out to allow all")
    return tuple(sorted(chosen, key=lambda fmt: fmt.cost(tile, dtype).bytes))


def _usable(fmt: TileFormat, tile: tuple[int, int], dtype: str) -> bool:
    """Whether a format's parameters suit the tile at all (a default group may be too long)."""
    try:
        fmt.planes(tile, dtype)
    except FormatError:
        return False
    return True


def _tile_codes(sheet: CodeSheet, lines: slice, tile: tuple[int, int]) -> tuple[TileCodes, Tensor]:
    """The codes of a chunk of tile rows, and which of its tiles are quantized by this sheet."""
    zero = 1 << (sheet.bits - 1)
    codes = to_tiles(sheet.codes[lines], tile, zero if sheet.zeros is None else 0)
    per_tile = max(1, tile[1] // sheet.group_size) if sheet.group_size else 1
    columns = -(-sheet.codes.shape[1] // tile[1])

    def groups(values: Tensor) -> Tensor:
        if sheet.group_size == 0 or sheet.group_size > tile[1]:
            repeat = columns if sheet.group_size == 0 else sheet.group_size // tile[1]
            values = values.repeat_interleave(repeat, 1)[:, :columns]
        return to_tiles(values, (tile[0], per_tile))

    zeros = None if sheet.zeros is None else groups(sheet.zeros[lines])
    if zeros is not None and codes.shape[2] * columns > sheet.codes.shape[1]:
        codes = _fill_tail(codes, zeros, sheet.codes.shape[1] - (columns - 1) * tile[1], columns)
    # A tile at the seam of a stack may be quantized in part: it keeps its values instead.
    held = to_tiles(sheet.where[lines], tile, fill=True).flatten(1).all(1)
    return TileCodes(codes, groups(sheet.scales[lines]), zeros, sheet.bits, sheet.group_size), held


def _fill_tail(codes: Tensor, zeros: Tensor, valid: int, columns: int) -> Tensor:
    """Make the padded columns of the last tile column mean 0.0: the code of their zero point."""
    last = codes[columns - 1 :: columns]
    fill = zeros[columns - 1 :: columns].repeat_interleave(codes.shape[2] // zeros.shape[2], 2)
    last[:, :, valid:] = fill[:, :, valid:]
    return codes


def _merge(parts: list[tuple[Tensor, Planes]], tiles: int) -> Planes:
    """Planes of disjoint sets of tiles, put back in tile order."""
    merged: Planes = {}
    for where, planes in parts:
        for name, plane in planes.items():
            merged.setdefault(name, plane.new_empty(tiles, *plane.shape[1:]))[where] = plane
    return merged
