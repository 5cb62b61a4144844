"""From pools to the arrays that a CPU kernel reads: packed planes, work items, vectors in lane order."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from stoicc.codegen.cpu.emit import fields
from stoicc.codegen.cpu.lanes import to_lanes
from stoicc.codegen.cpu.packed import PackedSegment, UnpackedOnDemand, address_of_storage, can_unpack
from stoicc.codegen.cpu.pages import collapse, on_huge_pages
from stoicc.codegen.cpu.plan import FormatPart, KernelClass, member
from stoicc.ir.format import PlaneKind, Planes
from stoicc.ir.planes import plane_slots, pool_name, tile_coordinates, tile_planes
from stoicc.ir.schedule import Schedule
from stoicc.ir.types import Module, TileProgram

Pools = Mapping[str, Tensor]
CACHE_BYTES = 4 << 20
"""Above this a weight is read from memory on each call, and its kernel asks for tiles ahead."""


class Binding:
    """The `struct weight` of one weight, and all that its pointers point to.

    Attributes:
        address: of the struct.
        bytes: of everything it holds.
        even: whether bins cost about the same, so that a thread may take several at a time.
        own_bytes: the same without what it shares with the pools.
        packed: the planes, for those who need them in canonical order again.
        output_row: i32 `[M]`, the row of y of each row of W, or None where they are the same.
        partials: partial sums of split rows, in tile rows.
    """

    def __init__(self, kernel: KernelClass, module: Module, pools: Pools) -> None:
        program, schedule = module.tiles, module.schedule
        assert schedule is not None
        self.even = _even(kernel, schedule)
        numbers = {
            "rows": program.shape[0],
            "columns": program.shape[1],
            "tile_columns": program.grid[1],
            "bins": len(_bins(schedule)) - 1,
            "even": int(self.even),
        }
        items, splits = _items(kernel, schedule)
        arrays = {"items": items, "splits": splits, "bin_ptr": _int32(_bins(schedule))}
        members: dict[int, dict[str, str]] = {}
        for index, part in enumerate(kernel.parts):
            planes = part.code.pack(_entries(part, program, schedule.csrs[part.csr].segment, pools))
            members[index] = _members(part, program, planes)
            arrays |= {member: planes.pop(name).contiguous() for name, member in members[index].items()}
            arrays |= _indices(part, module)
        arrays |= _beside_arrays(program, pools)
        known = {address_of_storage(pool) for pool in pools.values()}
        own = {name: arrays.pop(name) for name in list(arrays) if address_of_storage(arrays[name]) not in known}
        self.own_bytes = sum(array.nbytes for array in own.values())
        for shared in arrays.values():
            collapse(shared)
        self._arrays = arrays | on_huge_pages(own)  # what the pools share stays: elsewhere it would be there twice
        packed = {
            schedule.csrs[part.csr].segment: PackedSegment(
                {name: self._arrays[member] for name, member in members[index].items()}, part.code.unpack
            )
            for index, part in enumerate(kernel.parts)
            if part.code.unpack is not None and can_unpack(part)
        }
        self.packed = UnpackedOnDemand(program.tile, packed, pools, kernel.isa)
        self.output_row = self._arrays.get("output_row")
        self.partials = int(splits[:, 2].sum())
        self.bins = numbers["bins"]
        self.bytes = sum(array.nbytes for array in self._arrays.values())
        numbers["streamed"] = int(self.bytes > CACHE_BYTES)
        numbers |= {
            "split_rows": len(splits),
            "partials": self.partials,
            "term_rows": program.grid[0] * program.tile[0],
        }
        values = [numbers[name] if name in numbers else self._arrays[name].data_ptr() for _, name in fields(kernel)]
        self._struct = np.array(values, dtype=np.int64)
        self.address = int(self._struct.ctypes.data)


def _even(kernel: KernelClass, schedule: Schedule) -> bool:
    """Whether no bin has a quarter more bytes than the mean."""
    tile = [sum(plane.bytes for plane in part.planes) for part in kernel.parts]
    items = [
        sum(
            (item.ranges[part.csr][1] - item.ranges[part.csr][0]) * each
            for part, each in zip(kernel.parts, tile, strict=True)
        )
        for item in schedule.items
    ]
    bounds = _bins(schedule)
    bins = [sum(items[begin:end]) for begin, end in itertools.pairwise(bounds)]
    return bool(bins) and max(bins) * len(bins) <= 1.25 * sum(bins)


def _bins(schedule: Schedule) -> tuple[int, ...]:
    return schedule.bin_ptr or tuple(range(len(schedule.items) + 1))


def _items(kernel: KernelClass, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Rows of `struct item` and of `struct split`."""
    first: dict[int, int] = {}
    splits, used = [], 0
    for item in schedule.items:
        if item.parts > 1 and item.row not in first:
            first[item.row] = used
            splits.append((item.row, used, item.parts))
            used += item.parts
    rows = []
    for item in schedule.items:
        partial = (first[item.row] + item.part if item.parts > 1 else -1,) if kernel.split else ()
        ranges = (bound for part in kernel.parts for bound in item.ranges[part.csr])
        rows.append((item.row, *partial, *ranges))
    width = 1 + kernel.split + 2 * len(kernel.parts)
    return _int32(rows).reshape(-1, width), _int32(splits).reshape(-1, 3)


def _members(part: FormatPart, program: TileProgram, packed: Planes) -> dict[str, str]:
    """Members of `struct weight` for packed planes and the offsets of those that are ragged, by name."""
    planes = part.format.planes(program.tile, program.dtype)
    offsets = {f"{plane.name}_ptr" for plane in planes if plane.kind is PlaneKind.RAGGED}
    return {
        name: member(part.name, name[:-4], "ptr") if name in offsets else member(part.name, name) for name in packed
    }


def _indices(part: FormatPart, module: Module) -> dict[str, Tensor]:
    """The tile column of each tile, and its entry in planes that tiles share."""
    program, schedule = module.tiles, module.schedule
    assert schedule is not None
    csr = schedule.csrs[part.csr]
    arrays = {f"{part.name}_tile_column": _int32(csr.col_idx)}
    rows, columns = tile_coordinates(program, csr.segment)
    for plane in part.format.planes(program.tile, program.dtype):
        if plane.kind is PlaneKind.GROUP:
            arrays[member(part.name, plane.name, "entry")] = _int32(plane_slots(plane, rows, columns))
    return arrays


def _int32(values: Sequence[int] | Sequence[Sequence[int]] | NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int32))


def _entries(part: FormatPart, program: TileProgram, segment: int, pools: Pools) -> Planes:
    """The canonical planes of a part, one row per entry; decoded to dense where it has no code."""
    original = program.segments[segment].resolve()
    if part.materialised:
        planes = tile_planes(program, segment, pools)
        return part.format.encode(original.decode(planes, program.tile, program.dtype))
    planes = {}
    for plane in original.planes(program.tile, program.dtype):
        planes[plane.name] = pools[pool_name(segment, plane.name)]
        if plane.kind is PlaneKind.RAGGED:
            planes[f"{plane.name}_ptr"] = pools[pool_name(segment, f"{plane.name}_ptr")]
    return planes


def _beside_arrays(program: TileProgram, pools: Pools) -> dict[str, Tensor]:
    """What stands beside the tiles, in the order of W: output vectors by lane, input vectors by column."""
    beside = program.beside
    arrays: dict[str, Tensor] = {}
    output = None if beside.row_permutation is None else pools[beside.row_permutation.name].long()
    column = None if beside.column_permutation is None else pools[beside.column_permutation.name].long()
    if output is not None:
        arrays["output_row"] = output.int()
    if column is not None:
        arrays["input_column"] = column.int()
    if beside.input_scale is not None:
        scale = pools[beside.input_scale.name].float()
        arrays["input_scale"] = (scale if column is None else scale[column]).contiguous()
    for name, entry in (("output_scale", beside.output_scale), ("bias", beside.bias)):
        if entry is not None:
            arrays[name] = _by_lane(pools[entry.name].float()[:, None], output, program)
    return arrays


def _by_lane(rows: Tensor, output: Tensor | None, program: TileProgram) -> Tensor:
    """`[M, C]` in the order of y -> `[tile rows, strips, C, 16]` in the order of W."""
    ordered = rows if output is None else rows[output]
    tile_rows, height = program.grid[0], program.tile[0]
    padded = pad(ordered, (0, 0, 0, tile_rows * height - ordered.shape[0]))
    return to_lanes(padded.contiguous().view(tile_rows, height, -1))
