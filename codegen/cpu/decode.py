"""C that writes panels of tile rows as a row-major matrix, for the decode-once executor."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stoicc.codegen.cpu import simd
from stoicc.codegen.cpu.build import instruction_set, load, missing_compiler
from stoicc.codegen.cpu.checks import tile_code
from stoicc.codegen.cpu.plan import c_name, member
from stoicc.codegen.cpu.plane_types import C_TYPES, PackedPlane, packed_planes
from stoicc.ir.format import Plane, PlaneKind, Planes, TileFormat
from stoicc.ir.planes import PlaneSource, plane_slots, pool_name, stored_entries, stored_range, tile_coordinates
from stoicc.ir.schedule import TileCsr
from stoicc.ir.types import Module, TileProgram

Pools = Mapping[str, Tensor]

_FILE = Template("""\
/* Panels of tile rows, decoded to row-major $dtype: tiles of $rows x $columns. */

$includes
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

$vocabulary

enum { BM = $rows, BK = $columns };

$functions
struct weight {
    int64_t tile_columns;
$fields};

/* Tile rows begin .. end to panel [(end - begin) * BM][stride]; what no tile holds is zero. */
void stoicc_decode(
    const struct weight *w, int64_t begin, int64_t end, $type *panel, int64_t stride, int threads)
{
    #pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t row = begin; row < end; row++) {
        $type *out = panel + (row - begin) * BM * stride;
        if (!w->full[row])
            memset(out, 0, BM * stride * sizeof *out);
$loops    }
}
""")

_LOOP = Template("""\
        for (int t = w->${name}_tile_row[row]; t < w->${name}_tile_row[row + 1]; t++)
            $name($arguments, out + (int64_t)w->${name}_tile_column[t] * BK, stride);
""")


@dataclass(frozen=True, eq=False)
class _StoredPlanes:
    """Planes of one format as the C function reads them.

    Attributes:
        members: place in the struct, plane, and the entry of each tile `[tiles]`, or the offsets
            `[tiles + 1]` of a RAGGED plane.
        packed: whether they are read in the order in which the tiles executor holds them, where they are.
    """

    csr: TileCsr
    members: tuple[tuple[int, Plane, NDArray[np.int64]], ...]
    packed: bool

    def point(self, struct: NDArray[np.int64], pools: Pools, begin: int, end: int) -> Planes:
        """Let a struct point at the entries that tile rows begin .. end read; they are returned to be kept.

        The C code counts from the first entry of a plane. Where only a run of entries is there, it is
        given the address at which that first entry would be.
        """
        if self.packed:
            held = held_packed(self.csr.segment, pools)
            assert held is not None  # a decoder serves while it `fits`
            for place, plane, _ in self.members:
                struct[place] = held[plane.name].data_ptr()
            return held
        ranges = self._ranges(begin, end)
        stored = stored_entries(self.csr.segment, pools, ranges) if ranges else {}
        kept = {name: entries.contiguous() for name, entries in stored.items()}
        for place, plane, _ in self.members if kept else ():
            struct[place] = kept[plane.name].data_ptr() - ranges[plane.name][0] * plane.entry_bytes
        return kept

    def nbytes(self, begin: int, end: int) -> int:
        if self.packed:
            return 0
        ranges = self._ranges(begin, end)
        return sum(
            (ranges[plane.name][1] - ranges[plane.name][0]) * plane.entry_bytes
            for _, plane, _ in self.members
            if ranges
        )

    def _ranges(self, begin: int, end: int) -> dict[str, tuple[int, int]]:
        first, last = self.csr.row_ptr[begin], self.csr.row_ptr[end]
        if first == last:
            return {}
        return {plane.name: _stored(plane, slots, first, last) for _, plane, slots in self.members}


def _stored(plane: Plane, slots: NDArray[np.int64], first: int, last: int) -> tuple[int, int]:
    """The entries (of a RAGGED plane: elements) that tiles [first, last) read."""
    if plane.kind is PlaneKind.RAGGED:
        return int(slots[first]), int(slots[last])
    return stored_range(plane, slots, first, last)


def held_packed(segment: int, pools: Pools) -> Planes | None:
    """Packed planes of a segment, of a source that has them so."""
    return pools.packed(segment) if isinstance(pools, PlaneSource) else None


class CompiledDecoder:
    """The C function that decodes panels of one weight, and the arrays that it reads.

    It reads planes as they are held when it is made, packed where the format's code can; `fits` tells whether they
    still are.
    """

    def __init__(self, module: Module, pools: Pools) -> None:
        program, schedule = module.tiles, module.schedule
        assert schedule is not None
        self._pools = pools
        self._readable = _readable_packed(module)
        self._packed = self._held()
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._fields, self._values = "", [program.grid[1]]
        self._planes: list[_StoredPlanes] = []
        functions, loops = [], []
        for index, csr in enumerate(schedule.csrs):
            fmt = program.segments[csr.segment].resolve()
            planes = fmt.planes(program.tile, program.dtype)
            if not planes:
                continue
            name = f"decode_{c_name(fmt.name)}_{index}"
            code = tile_code(fmt, program.tile, program.dtype, instruction_set())
            assert code is not None
            packed = csr.segment in self._packed
            functions.append((code.decode_packed if packed else code.decode).replace("{name}", name))
            entries = packed_planes(fmt, code, program.tile, program.dtype) if packed else planes
            loops.append(_LOOP.substitute(name=name, arguments=self._bind(name, program, csr, planes, entries)))
        stored = [
            csr for csr in schedule.csrs if program.segments[csr.segment].resolve().planes(program.tile, program.dtype)
        ]
        tiles = sum((np.diff(csr.row_ptr) for csr in stored), np.zeros(program.grid[0], dtype=np.int64))
        self._add("const int32_t *", "full", (tiles == program.grid[1]).astype(np.int32))
        self.source = self._text(program, "\n".join(functions), "".join(loops))
        label = f"{program.dtype}_{program.tile[0]}x{program.tile[1]}_decode_{instruction_set()}"
        self._function = load(self.source, label, instruction_set()).stoicc_decode
        size = ctypes.c_int64
        self._function.argtypes = (ctypes.c_void_p, size, size, ctypes.c_void_p, size, ctypes.c_int)
        self._function.restype = None

    def __call__(self, begin: int, end: int, panel: Tensor) -> None:
        """Write tile rows begin .. end to the first columns of `panel` `[rows, stride]`, in the weight's dtype."""
        struct = np.array(self._values, dtype=np.int64)
        read = [planes.point(struct, self._pools, begin, end) for planes in self._planes]
        threads = torch.get_num_threads()
        self._function(struct.ctypes.data, begin, end, panel.data_ptr(), panel.stride(0), threads)
        del read  # what the struct points to is alive until here

    def fits(self) -> bool:
        """Whether planes are still packed where they were, and only there."""
        return self._held() == self._packed

    def _held(self) -> frozenset[int]:
        """Segments whose planes are packed now, and are read so."""
        return frozenset(segment for segment in self._readable if held_packed(segment, self._pools) is not None)

    def unpacked_bytes(self, begin: int, end: int) -> int:
        """Bytes of canonical planes that tile rows begin .. end read."""
        return sum(planes.nbytes(begin, end) for planes in self._planes)

    def _bind(
        self,
        name: str,
        program: TileProgram,
        csr: TileCsr,
        planes: tuple[Plane, ...],
        entries: Sequence[Plane | PackedPlane],
    ) -> str:
        """Add a format's members to the struct; its arguments as C text. Planes are read as `entries` says."""
        self._add("const int32_t *", f"{name}_tile_row", np.asarray(csr.row_ptr, dtype=np.int32))
        self._add("const int32_t *", f"{name}_tile_column", np.asarray(csr.col_idx, dtype=np.int32))
        arguments, members = [], []
        coordinates = tile_coordinates(program, csr.segment)
        for plane, stored in zip(planes, entries, strict=True):
            values, entry, slots = member(name, plane.name), "t", plane_slots(plane, *coordinates)
            if plane.kind is PlaneKind.RAGGED:
                slots = self._pools[pool_name(csr.segment, f"{plane.name}_ptr")].numpy()
            members.append((len(self._values), plane, slots))
            self._declare(f"const {C_TYPES[stored.dtype]} *", values, 0)
            if plane.kind is PlaneKind.RAGGED:
                ptr = member(name, plane.name, "ptr")
                self._add("const int64_t *", ptr, slots)
                arguments += [f"w->{values} + w->{ptr}[t] * {plane.entry_elements}", f"w->{ptr}[t + 1] - w->{ptr}[t]"]
                continue
            if plane.kind is PlaneKind.GROUP:
                own = member(name, plane.name, "entry")
                entry = f"w->{own}[t]"
                self._add("const int32_t *", own, slots.astype(np.int32))
            elements = stored.entry_elements if isinstance(stored, Plane) else stored.elements
            offset = f" + (int64_t){entry} * {elements}" if plane.kind is not PlaneKind.MATRIX else ""
            arguments.append(f"w->{values}{offset}")
        self._planes.append(_StoredPlanes(csr, tuple(members), csr.segment in self._packed))
        return ", ".join(arguments)

    def _add(self, declaration: str, name: str, array: "np.ndarray[Any, Any]") -> None:
        self._arrays.append(array)
        self._declare(declaration, name, int(array.ctypes.data))

    def _declare(self, declaration: str, name: str, value: int) -> None:
        self._fields += f"    {declaration}{name};\n"
        self._values.append(value)

    def _text(self, program: TileProgram, functions: str, loops: str) -> str:
        isa, type_ = instruction_set(), C_TYPES[program.dtype]
        return _FILE.substitute(
            dtype=program.dtype,
            type=type_,
            rows=program.tile[0],
            columns=program.tile[1],
            includes="\n".join(simd.includes(isa)),
            vocabulary=simd.definitions(isa, f"{functions} {type_} {self._fields}"),
            functions=functions,
            fields=self._fields,
            loops=loops,
        )


def _readable_packed(module: Module) -> tuple[int, ...]:
    """Segments whose code reads packed planes."""
    program = module.tiles
    assert module.schedule is not None
    segments = [csr.segment for csr in module.schedule.csrs]
    code = {
        index: tile_code(program.segments[index].resolve(), program.tile, program.dtype, instruction_set())
        for index in segments
    }
    return tuple(index for index, mac in code.items() if mac is not None and mac.decode_packed)


def can_decode(module: Module) -> bool:
    """True where every format of a module has C that decodes it, and there is a compiler."""
    program = module.tiles
    assert module.schedule is not None
    formats = (program.segments[csr.segment].resolve() for csr in module.schedule.csrs)
    return missing_compiler() is None and all(_has_code(fmt, program) for fmt in formats)


def _has_code(fmt: TileFormat, program: TileProgram) -> bool:
    planes = fmt.planes(program.tile, program.dtype)
    code = tile_code(fmt, program.tile, program.dtype, instruction_set())
    return not planes or (code is not None and bool(code.decode))
