"""From pools to planes and back: which entries a tile owns, and which it shares.

The IR stores every plane once (`[entries, ...]`); formats see planes tile by tile
(`[tiles, ...]`). The functions here are the only place that knows the difference.
"""

from abc import abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stoicc.ir.format import Plane, PlaneKind, Planes
from stoicc.ir.schedule import entry_slots
from stoicc.ir.types import TileProgram


class PlaneSource(Mapping[str, Tensor]):
    """Pools of which not all need to be there: a plane, or a run of its entries, is made when it is asked for."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the pools are."""

    @abstractmethod
    def entries(self, segment: int, ranges: Mapping[str, tuple[int, int]]) -> Planes:
        """Entries [first, last) of planes of a segment, by plane name; for reading only."""

    def packed(self, segment: int) -> Planes | None:
        """The planes of a segment in the order in which an executor holds them; None where none does."""
        return None

    @abstractmethod
    def whole(self) -> dict[str, Tensor]:
        """All pools by name, for reading only."""

    @property
    @abstractmethod
    def unpacked_bytes(self) -> int:
        """Bytes of the pools that `whole` would have to make."""


def pool_name(segment: int, plane: str) -> str:
    """The pool that holds a plane of a segment; a RAGGED plane's offsets are `plane + "_ptr"`."""
    return f"p{segment}_{plane}"


def tile_coordinates(program: TileProgram, segment: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tile rows and tile columns of a segment's tiles in payload (row-major) order."""
    rows, columns = np.nonzero(program.map_array() == segment)
    return rows, columns


def plane_slots(plane: Plane, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """The entry of a plane that each tile reads, `[tiles]` int64."""
    if plane.kind is PlaneKind.MATRIX:
        return np.zeros(rows.size, dtype=np.int64)
    if plane.kind is PlaneKind.GROUP:
        return entry_slots(rows, columns, plane.span)
    return np.arange(rows.size, dtype=np.int64)


def entry_count(plane: Plane, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> int:
    """How many entries a plane's pool has for tiles at these coordinates."""
    if plane.kind is PlaneKind.MATRIX:
        return 1
    slots = plane_slots(plane, rows, columns)
    return int(slots[-1]) + 1 if slots.size else 0


def stored_range(plane: Plane, slots: NDArray[np.int64], begin: int, end: int) -> tuple[int, int]:
    """Of a plane that is not RAGGED, the entries [first, last) that tiles [begin, end) read; slots `[tiles]`."""
    if plane.kind is PlaneKind.TILE or begin == end:
        return begin, end
    return int(slots[begin]), int(slots[end - 1]) + 1


def stored_entries(segment: int, pools: Mapping[str, Tensor], ranges: Mapping[str, tuple[int, int]]) -> Planes:
    """Entries [first, last) of planes of a segment, by plane name: of pools, or of a source of them."""
    if isinstance(pools, PlaneSource):
        return pools.entries(segment, ranges)
    return {name: pools[pool_name(segment, name)][first:last] for name, (first, last) in ranges.items()}


def chosen_planes(program: TileProgram, segment: int, pools: Mapping[str, Tensor], tiles: NDArray[np.int64]) -> Planes:
    """The planes of some tiles of a segment, by payload index `[T]`, one entry per tile: what `decode` takes."""
    planes: Planes = {}
    for plane in program.segments[segment].resolve().planes(program.tile, program.dtype):
        pool = pools[pool_name(segment, plane.name)]
        if plane.kind is PlaneKind.RAGGED:
            ptr = pools[pool_name(segment, f"{plane.name}_ptr")].tolist()
            planes[plane.name] = torch.cat([pool[ptr[tile] : ptr[tile + 1]] for tile in tiles])
            counts = [0, *(ptr[tile + 1] - ptr[tile] for tile in tiles)]
            planes[f"{plane.name}_ptr"] = torch.tensor(counts, device=pool.device).cumsum(0)
        else:
            slots = plane_slots(plane, *tile_coordinates(program, segment))[tiles]
            planes[plane.name] = pool[torch.from_numpy(slots).to(pool.device)]
    return planes


def tile_planes(
    program: TileProgram, segment: int, pools: Mapping[str, Tensor], begin: int = 0, end: int | None = None
) -> Planes:
    """The planes of tiles [begin, end) of a segment, one entry per tile: what `decode` takes.

    RAGGED planes come as the run of elements plus `<plane>_ptr`, offsets from 0 `[tiles + 1]`.
    """
    fmt = program.segments[segment].resolve()
    rows, columns = tile_coordinates(program, segment)
    stop = rows.size if end is None else end
    declared = fmt.planes(program.tile, program.dtype)
    slots = {plane.name: plane_slots(plane, rows, columns) for plane in declared}
    whole = [plane for plane in declared if plane.kind is not PlaneKind.RAGGED]
    ranges = {plane.name: stored_range(plane, slots[plane.name], begin, stop) for plane in whole}
    stored = stored_entries(segment, pools, ranges)
    planes: Planes = {}
    for plane in declared:
        if plane.kind is PlaneKind.RAGGED:
            ptr = pools[pool_name(segment, f"{plane.name}_ptr")][begin : stop + 1]
            planes[plane.name] = pools[pool_name(segment, plane.name)][int(ptr[0]) : int(ptr[-1])]
            planes[f"{plane.name}_ptr"] = ptr - ptr[0]
            continue
        entries = stored[plane.name]
        if plane.kind is not PlaneKind.TILE:
            read = slots[plane.name][begin:stop] - ranges[plane.name][0]
            entries = entries[torch.from_numpy(read).to(entries.device)]
        planes[plane.name] = entries
    return planes
