"""The buffers that a kernel of this dialect reads: blobs of tiles in the order of work, and where they stand.

Tiles are laid out item by item, within an item csr by csr: the order in which a program fetches them,
so that one pointer walks through them whatever their formats are.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stoicc.codegen.executor import Pools
from stoicc.codegen.gluon.register_order import CHUNK, BlobLayout, pack
from stoicc.ir.fragment import Fragment
from stoicc.ir.planes import tile_planes
from stoicc.ir.schedule import Schedule
from stoicc.ir.types import Module

SIZE_BITS = 13
"""A descriptor is `tile column << SIZE_BITS | 16-byte chunks of the blob`: the largest has 64 KB, 128 x 256 in bf16."""

LOOK_AHEAD = 16
"""Descriptors past the last: a program reads some that it does not use."""

PACK_TILES = 1 << 12
"""Tiles that are packed at a time, to bound scratch memory."""


@dataclass(frozen=True)
class GluonLoop:
    """One consumer loop: a csr whose tiles are operands of the same kind.

    Attributes:
        index: which csr.
        text: the format in words, for a comment.
        name: the format's name, for a blob's section of the text.
    """

    index: int
    segment: int
    text: str
    name: str
    fragment: Fragment
    blob: BlobLayout


@dataclass(frozen=True, eq=False)
class Buffers:
    """Attributes:
    blobs: int32, all tiles in the order of work.
    descriptors: int32, one per tile in that order (`SIZE_BITS`), LOOK_AHEAD zeros at the end.
    items: int32 `[items, 5 + loops]`: tile row, slot, first descriptor, end, first chunk, tiles of each loop.
    row_slots: int32 `[tile rows + 1]`, where the slots of each tile row begin.
    places: of each loop, the first chunk of each of its tiles, in payload order.
    """

    blobs: Tensor
    descriptors: Tensor
    items: Tensor
    row_slots: Tensor
    places: tuple[np.ndarray, ...]


def make_buffers(module: Module, schedule: Schedule, loops: tuple[GluonLoop, ...], pools: Pools) -> Buffers:
    """Pack a module's pools, on the device where they are."""
    device = next(iter(pools.values())).device if pools else torch.device("cpu")
    order = [_tiles_in_order(schedule, loop) for loop in loops]
    counts = np.array([[b - a for a, b in item.ranges] for item in schedule.items], dtype=np.int64)
    counts = counts.reshape(len(schedule.items), -1)[:, [loop.index for loop in loops]]
    sizes = np.array([loop.blob.chunks for loop in loops], dtype=np.int64)
    assert not sizes.size or sizes.max() < 1 << SIZE_BITS, "no tile that launch.py lets through is larger"
    first = np.concatenate([[0], np.cumsum(counts.sum(1))])
    chunk = np.concatenate([[0], np.cumsum(counts @ sizes)])
    # where each loop's tiles of an item begin, within all tiles and within all chunks
    places = first[:-1, None] + np.cumsum(counts, 1) - counts
    starts = chunk[:-1, None] + np.cumsum(counts * sizes, 1) - counts * sizes
    descriptors = np.zeros(int(first[-1]) + LOOK_AHEAD, dtype=np.int64)
    found: list[np.ndarray] = []
    blobs = torch.empty(int(chunk[-1]) * CHUNK, dtype=torch.int32, device=device)
    for at, loop in enumerate(loops):
        within = _ramp(counts[:, at])
        columns = np.asarray(schedule.csrs[loop.index].col_idx, dtype=np.int64)[order[at]]
        descriptors[np.repeat(places[:, at], counts[:, at]) + within] = columns << SIZE_BITS | loop.blob.chunks
        into = np.repeat(starts[:, at], counts[:, at]) + within * loop.blob.chunks
        place = np.empty_like(into)
        place[order[at]] = into
        _pack_tiles(module, loop, pools, place, blobs)
        found.append(place)
    slots, row_slots = _slots(schedule)
    rows = np.array([item.row for item in schedule.items], dtype=np.int64)
    items = np.column_stack([rows, slots, first[:-1], first[1:], chunk[:-1], counts])
    return Buffers(
        blobs, _indices(descriptors, device), _indices(items, device), _indices(row_slots, device), tuple(found)
    )


def _tiles_in_order(schedule: Schedule, loop: GluonLoop) -> np.ndarray:
    """The tiles of a loop's csr, as the items visit them."""
    spans = [item.ranges[loop.index] for item in schedule.items]
    return np.concatenate([np.arange(0), *(np.arange(begin, end) for begin, end in spans)]).astype(np.int64)


def _ramp(counts: np.ndarray) -> np.ndarray:
    """0 .. count - 1 for each count, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if ends.size else 0) - np.repeat(ends - counts, counts)


def _pack_tiles(module: Module, loop: GluonLoop, pools: Pools, place: np.ndarray, blobs: Tensor) -> None:
    """Tiles of one csr into their places; `place[t]` is the first chunk of tile t."""
    chunks = blobs.view(-1, CHUNK)
    for begin in range(0, place.size, PACK_TILES):
        end = min(begin + PACK_TILES, place.size)
        planes = tile_planes(module.tiles, loop.segment, pools, begin, end)
        packed = pack(loop.fragment.operands(planes, module.tiles.tile), loop.blob)
        rows = place[begin:end, None] + np.arange(loop.blob.chunks)
        chunks[torch.from_numpy(rows.ravel()).to(blobs.device)] = packed.view(-1, CHUNK)


def _slots(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """The slot of each item: parts of all rows in row and part order, whatever the order of work."""
    parts = np.zeros(len(schedule.row_order) + 1, dtype=np.int64)
    for item in schedule.items:
        parts[item.row + 1] = item.parts
    starts = np.cumsum(parts)
    return np.array([starts[item.row] + item.part for item in schedule.items], dtype=np.int64), starts


def _indices(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.int32)).to(device)
