"""Choosing a format for every tile, a chunk of tile rows at a time, batched over tiles."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stoicc.codes import quantized_by_any, tile_codes
from stoicc.ir.dtypes import DTYPE_NAMES
from stoicc.ir.errors import FormatError, InputError, StoiccError
from stoicc.ir.format import PlaneKind, Planes, TileCodes, TileFormat
from stoicc.ir.schedule import entry_slots
from stoicc.ops.lowering import Lowered
from stoicc.tiling import grid_of, to_tiles
from stoicc.weights import non_finite, version_of

CHUNK_WEIGHTS = 1 << 21
"""Weights per chunk of tile rows: 4 MB in bf16, so that a chunk's temporaries stay in cache."""

Result = TypeVar("Result")


@dataclass
class Chunk:
    """A run of whole tile rows: tiles `[T, BM, BK]`, their grid coordinates, codes, and the choice.

    Attributes:
        real: share of each tile `[T]` that is no padding, float64.
    """

    tiles: Tensor
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    codes: list[tuple[TileCodes, Tensor]]
    choice: Tensor
    real: Tensor

    def pick(self, chosen: Tensor) -> Tensor:
        """The chosen tiles, without a copy where they are all."""
        return self.tiles if chosen.numel() == self.tiles.shape[0] else self.tiles[chosen]


class Chooser:
    """Chooses and encodes the tiles of a lowered weight.

    Args:
        formats: to choose from, cheapest first.
        requested: an index into `formats` per tile `[tile rows, tile columns]`, or None to choose.
        approximate: encode a requested format with loss where a tile does not fit.
        importance: `[K]`, what an error in each column counts then; None for one.
    """

    def __init__(
        self,
        lowered: Lowered,
        tile: tuple[int, int],
        formats: tuple[TileFormat, ...],
        requested: Tensor | None,
        approximate: bool,
        importance: Tensor | None = None,
    ) -> None:
        self.lowered, self.tile, self.formats = lowered, tile, formats
        self.requested, self.approximate = requested, approximate
        self.dtype = DTYPE_NAMES[lowered.values.dtype]
        self.grid = grid_of((lowered.values.shape[0], lowered.values.shape[1]), tile)
        self.importance = None if importance is None else to_tiles(importance[None].float(), (1, tile[1])).squeeze(1)
        self.planes = [fmt.planes(tile, self.dtype) for fmt in formats]

    def chunks(self) -> Iterator[Chunk]:
        """The matrix from top to bottom, each chunk with its choice made.

        Raises:
            InputError: a value that is not finite.
            FormatError: a tile that no format, or not the requested one, can hold.
        """
        height = max(1, CHUNK_WEIGHTS // (self.tile[0] * self.tile[1] * self.grid[1]))
        for first in range(0, self.grid[0], height):
            count = min(height, self.grid[0] - first)
            lines = slice(first * self.tile[0], (first + count) * self.tile[0])
            values = self.lowered.values[lines]
            bad = non_finite(values)
            if bad is not None:
                raise InputError(
                    f"weight: expected finite values, found {bad[2]} at row {bad[0] + lines.start}, column {bad[1]}; "
                    "repair the weight before compiling"
                )
            tiles = to_tiles(values, self.tile)
            index = np.arange(tiles.shape[0])
            codes = [tile_codes(sheet, lines, self.tile) for sheet in self.lowered.sheets]
            chunk = Chunk(
                tiles, first + index // self.grid[1], index % self.grid[1], codes, torch.empty(0), self._real(values)
            )
            chunk.choice = self._choose(chunk) if self.requested is None else self._requested(chunk, first, count)
            yield chunk

    def payload(self, chunk: Chunk) -> float:
        """Bytes that the chunk's tiles take in the formats that they chose."""
        chosen = ((index, (chunk.choice == index).nonzero().flatten()) for index in chunk.choice.unique().tolist())
        return sum(float(self._bytes(chunk, index, tiles).sum()) for index, tiles in chosen)

    def encode(self, chunk: Chunk, index: int) -> Planes:
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
            tiles, slots = chunk.pick(chosen[left]), self._slots(chunk, index, chosen[left])
            if self.requested is not None and self.approximate:
                weights = None if self.importance is None else self.importance[chunk.columns[chosen[left]]]
                planes = guarded(fmt, "approximate", tiles, lambda: fmt.approximate(tiles, slots, weights).planes)
            else:
                planes = guarded(fmt, "encode", tiles, lambda: fmt.encode_shared(tiles, slots))
            parts.append((left.nonzero().flatten(), planes))
        return parts[0][1] if len(parts) == 1 else _merge(parts, chosen.numel())

    def _choose(self, chunk: Chunk) -> Tensor:
        """The cheapest format in bytes that holds each tile; codes go to formats that hold codes."""
        quantized = quantized_by_any(chunk.codes, chunk.tiles.shape[0])
        choice = torch.full((chunk.tiles.shape[0],), -1)
        least = torch.full((chunk.tiles.shape[0],), torch.inf, dtype=torch.float64)

        def offer(index: int, tiles: Tensor) -> None:
            cost = self._bytes_if_whole(chunk, index, tiles)
            better = cost < least[tiles]
            choice[tiles[better]] = index
            least[tiles[better]] = cost[better]

        for index, fmt in enumerate(self.formats):
            open_ = least > fmt.cost(self.tile, self.dtype).bytes
            offer(index, self._holding_codes(chunk, index, open_))
            # Floats of a matrix that an operator quantized go to formats that keep floats, so
            # that scales found here never meet scales that the operator chose.
            if not (chunk.codes and fmt.planes_hold_codes):
                offer(index, self._fitting(chunk, index, (open_ & ~quantized).nonzero().flatten()))
        for index, fmt in enumerate(self.formats):
            if not fmt.planes_hold_codes:  # codes that no format takes: their values, as they are
                offer(index, self._fitting(chunk, index, (quantized & (choice == -1)).nonzero().flatten()))
        left = (choice == -1).nonzero().flatten()
        if left.numel():
            self._refuse(chunk, len(self.formats) - 1, int(left[0]))
        return choice

    def _real(self, values: Tensor) -> Tensor:
        """Of tiles of the rows `values`, the share that is no padding."""
        within = [
            (extent - torch.arange(0, extent, side)).clamp_max(side).double() / side
            for extent, side in zip(values.shape, self.tile, strict=True)
        ]
        return torch.outer(*within).flatten()

    def _bytes_if_whole(self, chunk: Chunk, index: int, tiles: Tensor) -> Tensor:
        """Bytes `[tiles]` as if no tile were padded: tails go to the formats that the rest of a weight goes to."""
        fixed = self.formats[index].cost(self.tile, self.dtype).bytes
        return fixed + (self._bytes(chunk, index, tiles) - fixed) / chunk.real[tiles]

    def _bytes(self, chunk: Chunk, index: int, tiles: Tensor) -> Tensor:
        """Bytes that each of the tiles would take, `[tiles]` float64."""
        fmt = self.formats[index]
        if any(plane.kind is PlaneKind.RAGGED for plane in self.planes[index]):
            return fmt.tile_bytes(chunk.pick(tiles), self.dtype)
        return torch.full((tiles.numel(),), fmt.cost(self.tile, self.dtype).bytes, dtype=torch.float64)

    def _holding_codes(self, chunk: Chunk, index: int, open_: Tensor) -> Tensor:
        """Open quantized tiles whose codes the format holds; one sheet for each shared entry."""
        fmt, found = self.formats[index], [torch.empty(0, dtype=torch.int64)]
        slots = self._slots(chunk, index, torch.arange(chunk.tiles.shape[0]))
        owner = torch.full_like(slots, -1)
        for sheet, (codes, held) in enumerate(chunk.codes):
            here = (open_ & held).nonzero().flatten()
            here = here[~fmt.reject_codes(codes.select(here))] if here.numel() else here
            here = here[(owner[slots[here]] == -1) | (owner[slots[here]] == sheet)]
            if self._shares(index):
                owner[slots[here]] = sheet
            found.append(here)
        return torch.cat(found).unique()

    def _fitting(self, chunk: Chunk, index: int, candidates: Tensor) -> Tensor:
        """The candidates that the format holds; with shared planes, until those left agree."""
        fmt = self.formats[index]
        while candidates.numel():
            tiles, slots = chunk.pick(candidates), self._slots(chunk, index, candidates)
            kept = candidates[~_reject(fmt, tiles, slots)]
            if not self._shares(index) or kept.numel() == candidates.numel():
                return kept
            candidates = kept
        return candidates

    def _requested(self, chunk: Chunk, first: int, count: int) -> Tensor:
        """The user's choice; every tile is checked unless it may be approximated."""
        assert self.requested is not None
        choice = self.requested[first : first + count].flatten()
        for index, fmt in enumerate(self.formats if not self.approximate else ()):
            here = (choice == index).nonzero().flatten()
            if not here.numel():
                continue
            rejected = _reject(fmt, chunk.pick(here), self._slots(chunk, index, here))
            for codes, held in chunk.codes:
                coded = held[here]
                rejected[coded.clone()] &= fmt.reject_codes(codes.select(here[coded]))
            if rejected.any():
                self._refuse(chunk, index, int(here[rejected][0]))
        return choice

    def _shares(self, index: int) -> bool:
        return any(plane.kind is PlaneKind.GROUP for plane in self.planes[index])

    def _slots(self, chunk: Chunk, index: int, chosen: Tensor) -> Tensor:
        """The shared entry of each chosen tile, by the format's GROUP planes; else one for each."""
        spans = [plane.span for plane in self.planes[index] if plane.kind is PlaneKind.GROUP]
        picked = chosen.numpy()
        return torch.from_numpy(entry_slots(chunk.rows[picked], chunk.columns[picked], spans[0] if spans else 1))

    def _refuse(self, chunk: Chunk, index: int, tile: int) -> None:
        fmt, why = self.formats[index], None
        for codes, held in chunk.codes:
            if held[tile] and fmt.planes_hold_codes:
                groups = f"in groups of {codes.group_size}" if codes.group_size else "with one scale a row"
                why = (
                    f"expected codes of its own kind, found {codes.bits}-bit codes {groups}; "
                    "leave formats out, or add 'dense' to keep the values"
                )
        where = f"format {fmt}, tile ({chunk.rows[tile]}, {chunk.columns[tile]})"
        raise FormatError(f"{where}: {why or fmt.why(chunk.tiles[tile])}")


def guarded(fmt: TileFormat, what: str, tiles: Tensor, call: Callable[[], Result]) -> Result:
    """Call a format's method; whatever it raises, and a change of its input, names the format."""
    before = version_of(tiles)
    try:
        result = call()
    except StoiccError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise FormatError(
            f"format {fmt}: expected {what} to take {tuple(tiles.shape)} tiles, found {type(error).__name__}: {error}; "
            "run stoicc.testing.check_format on it"
        ) from error
    if version_of(tiles) != before:
        raise FormatError(f"format {fmt}: expected {what} to leave its tiles alone, found them changed; work on a copy")
    return result


def _reject(fmt: TileFormat, tiles: Tensor, slots: Tensor) -> Tensor:
    rejected = guarded(fmt, "reject", tiles, lambda: fmt.reject_shared(tiles, slots))
    if not isinstance(rejected, Tensor) or rejected.shape != (len(tiles),) or rejected.dtype != torch.bool:
        raise FormatError(f"format {fmt}: expected reject to give a bool per tile, found {rejected!r:.80}")
    return rejected


def _merge(parts: list[tuple[Tensor, Planes]], tiles: int) -> Planes:
    """Planes of disjoint sets of tiles, put back in tile order."""
    merged: Planes = {}
    ragged = {name.removesuffix("_ptr") for _, planes in parts for name in planes if f"{name}_ptr" in planes}
    for name in parts[0][1]:
        if name in ragged:
            merged |= _merge_runs(name, parts, tiles)
        elif name.removesuffix("_ptr") not in ragged:
            for where, planes in parts:
                merged.setdefault(name, planes[name].new_empty(tiles, *planes[name].shape[1:]))[where] = planes[name]
    return merged


def _merge_runs(name: str, parts: list[tuple[Tensor, Planes]], tiles: int) -> Planes:
    """A RAGGED plane of disjoint sets of tiles, and its offsets, put back in tile order."""
    counts = torch.zeros(tiles + 1, dtype=torch.int64)
    for where, planes in parts:
        counts[where + 1] = planes[f"{name}_ptr"].diff()
    offsets = counts.cumsum(0)
    whole = parts[0][1][name].new_empty(int(offsets[-1]), *parts[0][1][name].shape[1:])
    for where, planes in parts:
        own = planes[f"{name}_ptr"]
        moved = (offsets[where] - own[:-1]).repeat_interleave(own.diff())
        whole[torch.arange(len(moved)) + moved] = planes[name]
    return {name: whole, f"{name}_ptr": offsets}
