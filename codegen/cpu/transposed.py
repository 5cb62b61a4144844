"""h W on a CPU, by an emitted C kernel that walks tile columns (`transposed_text.py`) over the canonical planes.

Nothing is kept beside the planes but indices: a tile is decoded by its format's own C as it is met. Rows of h
are floats on any instruction set, or bf16 on matrix units where the weight is bf16 too.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stoicc.codegen.cpu import simd
from stoicc.codegen.cpu import transposed_text as text
from stoicc.codegen.cpu.build import instruction_set, load
from stoicc.codegen.cpu.plan import c_name, member
from stoicc.codegen.cpu.plane_types import C_TYPES
from stoicc.codegen.executor import Executor, Pools
from stoicc.ir.dtypes import DTYPE_NAMES, TORCH_DTYPES, itemsize
from stoicc.ir.format import Plane, PlaneKind
from stoicc.ir.planes import PlaneSource, plane_slots, pool_name, tile_coordinates
from stoicc.ir.schedule import TileCsc
from stoicc.ir.types import Module

_ALIGNMENT = 64
SLAB_BYTES = 1 << 19
"""Decoded tiles that a thread holds: a quarter of a second-level cache of today, beside the rows of h."""
CHUNK = 512
"""Rows of h that one decoding of a tile serves."""
_SUMS = {"avx2": (2, 2), "portable": (1, 2)}
"""Sums in registers, vectors of columns by rows of h, where there are few registers."""


class TransposedExecutor(Executor):
    """The product of the tiles alone: x is h `[N, M]` in the order of tile rows, out `[N, K]` of the same dtype."""

    def __init__(self, module: Module, pools: Pools) -> None:
        schedule = module.schedule
        assert schedule is not None
        assert schedule.transposed is not None
        self._module, self._pools, self._isa = module, pools, instruction_set()
        self._transposed = schedule.transposed
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._fields, self._loops, self._decoders = "", "", ""
        self._numbers: list[int] = []
        self._pointers: list[tuple[int, str]] = []  # place in the struct, and the pool that it points to
        self._functions: dict[tuple[bool, torch.dtype], Any] = {}
        bin_ptr = np.asarray(self._transposed.bin_ptr, dtype=np.int32)
        order = np.asarray(self._transposed.column_order, dtype=np.int32)
        self._arrays += [bin_ptr, order]
        self._numbers += [0, 0, 0, bin_ptr.size - 1, int(bin_ptr.ctypes.data), int(order.ctypes.data)]
        for index, csc in enumerate(self._transposed.cscs):
            self._bind(index, csc)
        dtype = TORCH_DTYPES[module.tiles.dtype]
        self.source = self._text(self._on_matrix_units(dtype), dtype)

    def run(self, x: Tensor, out: Tensor, workspace: Tensor) -> None:
        (rows, columns), batch = self._module.tiles.shape, x.shape[0]
        pairs, threads = self._on_matrix_units(x.dtype), self._threads()
        function = self._function(pairs, out.dtype)
        begin = -workspace.data_ptr() % _ALIGNMENT
        h, taken = self._rows_of(x, workspace[begin:], pairs)
        pools = self._pools.whole() if isinstance(self._pools, PlaneSource) else self._pools
        held = {name: pools[name].contiguous() for _, name in self._pointers}
        struct = np.array(self._numbers, dtype=np.int64)
        struct[:3] = rows, columns, h.stride(0)
        for place, name in self._pointers:
            struct[place] = held[name].data_ptr()
        desks = workspace.data_ptr() + begin + taken
        function(struct.ctypes.data, h.data_ptr(), out.data_ptr(), desks, batch, threads)
        del held  # what the struct points to is alive until here

    def workspace_bytes(self, batch: int, x_dtype: torch.dtype) -> int:
        pairs = self._on_matrix_units(x_dtype)
        shape, dtype = self._padded(batch, pairs)
        copied = 0 if (shape, dtype) == ((batch, self._module.tiles.shape[0]), x_dtype) else shape[0] * shape[1]
        return _ALIGNMENT + _whole(copied * dtype.itemsize) + self._threads() * self._desk_bytes(pairs)

    @property
    def resident_bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    @property
    def transient_bytes(self) -> int:
        """Planes that are unpacked for a call, where they were let go."""
        return self._pools.unpacked_bytes if isinstance(self._pools, PlaneSource) else 0

    # -- inputs ----------------------------------------------------------------------------

    def _on_matrix_units(self, x_dtype: torch.dtype) -> bool:
        bf16 = self._module.tiles.dtype == "bf16" and x_dtype == torch.bfloat16
        return bf16 and self._isa == "amx" and min(self._module.tiles.tile) >= 32

    def _padded(self, batch: int, pairs: bool) -> tuple[tuple[int, int], torch.dtype]:
        """Shape and dtype that rows of h need: whole tiles of 32 rows by 32 columns on matrix units."""
        rows, height = self._module.tiles.shape[0], self._module.tiles.tile[0]
        if not pairs:
            return (batch, rows), torch.float32
        return (-(-batch // 32) * 32, -(-rows // height) * height), torch.bfloat16

    def _rows_of(self, x: Tensor, workspace: Tensor, pairs: bool) -> tuple[Tensor, int]:
        """x as the kernel reads it, in the workspace where it is no such already, and the bytes that it took there."""
        shape, dtype = self._padded(x.shape[0], pairs)
        if (tuple(x.shape), x.dtype) == (shape, dtype):
            return x, 0
        size = shape[0] * shape[1] * dtype.itemsize
        h = workspace[:size].view(dtype).view(shape)
        h[: x.shape[0], : x.shape[1]] = x
        h[:, x.shape[1] :] = 0  # rows past the batch may be anything: their sums are not stored
        return h, _whole(size)

    def _threads(self) -> int:
        return min(torch.get_num_threads(), len(self._transposed.bin_ptr) - 1)

    # -- text ------------------------------------------------------------------------------

    def _bind(self, index: int, csc: TileCsc) -> None:
        """A format's decode, its members of the struct, and its loop."""
        program = self._module.tiles
        fmt = program.segments[csc.segment].resolve()
        planes = fmt.planes(program.tile, program.dtype)
        if not planes:
            return
        name, code = f"decode_{c_name(fmt.name)}_{index}", fmt.tile_mac(program.tile, program.dtype)
        assert code is not None
        self._decoders += code.decode.replace("{name}", name) + "\n"
        for end, values in (("first", csc.col_ptr), ("row", csc.row_idx), ("tile", csc.tiles)):
            self._add("const int32_t *", f"{name}_{end}", np.asarray(values, dtype=np.int32))
        arguments = [part for plane in planes for part in self._plane(name, csc.segment, plane)]
        self._loops += text.LOOP.substitute(name=name, arguments=", ".join(arguments))

    def _plane(self, name: str, segment: int, plane: Plane) -> list[str]:
        """Members of the struct for a plane, and what the decode of tile t is given."""
        values, entry = member(name, plane.name), "t"
        self._point(f"const {C_TYPES[plane.dtype]} *", values, pool_name(segment, plane.name))
        if plane.kind is PlaneKind.RAGGED:
            ptr = member(name, plane.name, "ptr")
            self._point("const int64_t *", ptr, pool_name(segment, f"{plane.name}_ptr"))
            return [f"w->{values} + w->{ptr}[t] * {plane.entry_elements}", f"w->{ptr}[t + 1] - w->{ptr}[t]"]
        if plane.kind is PlaneKind.MATRIX:
            return [f"w->{values}"]
        if plane.kind is PlaneKind.GROUP:
            entry = f"w->{member(name, plane.name, 'entry')}[t]"
            slots = plane_slots(plane, *tile_coordinates(self._module.tiles, segment))
            self._add("const int32_t *", member(name, plane.name, "entry"), slots.astype(np.int32))
        return [f"w->{values} + (int64_t){entry} * {plane.entry_elements}"]

    def _add(self, declaration: str, name: str, array: "np.ndarray[Any, Any]") -> None:
        self._arrays.append(array)
        self._fields += f"    {declaration}{name};\n"
        self._numbers.append(int(array.ctypes.data))

    def _point(self, declaration: str, name: str, pool: str) -> None:
        self._pointers.append((len(self._numbers), pool))
        self._fields += f"    {declaration}{name};\n"
        self._numbers.append(0)

    def _run(self, pairs: bool) -> int:
        """Tiles of a slab."""
        height, width = self._module.tiles.tile
        return max(1, SLAB_BYTES // (height * width * (2 if pairs else 4)))

    def _desk_bytes(self, pairs: bool) -> int:
        """Of `struct desk`, as a compiler lays it out."""
        (height, width), run = self._module.tiles.tile, self._run(pairs)
        tile = _whole(height * width * itemsize(self._module.tiles.dtype))
        return tile + run * height * width * (2 if pairs else 4) + CHUNK * width * 4 + _whole(run * 4 + 4)

    def _text(self, pairs: bool, out_dtype: torch.dtype) -> str:
        program, out = self._module.tiles, DTYPE_NAMES[out_dtype]
        height, width = program.tile
        vectors, at_once = _SUMS.get(self._isa, (4, 6))
        vectors = min(vectors, width // 16)
        given = {"type": C_TYPES[program.dtype], "dtype": program.dtype}
        product = text.PAIR_PRODUCT if pairs else text.FLOAT_PRODUCT.substitute(given)
        parts = {
            "decoders": self._decoders, "product": product, "loops": self._loops, "fields": self._fields,
            "begin": text.TILES_BEGIN if pairs else "", "end": text.TILES_END if pairs else "",
        }  # fmt: skip
        named = f"{' '.join(parts.values())} {program.dtype} {out} vf_load_f32 vf_store_{out}"
        return text.FILE.substitute(
            given,
            **parts,
            rows=height,
            columns=width,
            run=self._run(pairs),
            chunk=CHUNK,
            h="bf16" if pairs else "float",
            h_name="bf16" if pairs else "f32",
            slab="bf16" if pairs else "float",
            out=C_TYPES[out],
            out_name=out,
            constants="" if pairs else text.FLOAT_CONSTANTS.substitute(vectors=vectors, at_once=at_once),
            includes="\n".join(simd.includes(self._isa)),
            vocabulary=simd.definitions(self._isa, named),
        )

    def _function(self, pairs: bool, out_dtype: torch.dtype) -> Any:
        if (pairs, out_dtype) not in self._functions:
            program = self._module.tiles
            label = f"{program.dtype}_{program.tile[0]}x{program.tile[1]}_transposed_{self._isa}"
            library = load(self._text(pairs, out_dtype), label, self._isa)
            library.stoicc_desk_bytes.restype = ctypes.c_int64
            assert library.stoicc_desk_bytes() == self._desk_bytes(pairs)
            function, pointer = library.stoicc_transposed, ctypes.c_void_p
            function.argtypes = (pointer, pointer, pointer, pointer, ctypes.c_int64, ctypes.c_int)
            function.restype = None
            self._functions[pairs, out_dtype] = function
        return self._functions[pairs, out_dtype]


def _whole(size: int) -> int:
    """Bytes, up to a multiple of the alignment."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
