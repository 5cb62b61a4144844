"""Planes as C code sees them: the types of their elements, and how many of them an entry has once it is packed."""

from dataclasses import dataclass

import torch

from stoicc.ir.dtypes import DTYPE_NAMES, TORCH_DTYPES, itemsize
from stoicc.ir.format import PlaneKind, Tile, TileFormat, TileMac

C_TYPES = {
    "f32": "float",
    "f16": "f16",
    "bf16": "bf16",
    "u8": "uint8_t",
    "i8": "int8_t",
    "i16": "int16_t",
    "i32": "int32_t",
    "i64": "int64_t",
}


@dataclass(frozen=True)
class PackedPlane:
    """A plane as the C code sees it: element dtype and count of one packed entry."""

    name: str
    dtype: str
    elements: int
    kind: PlaneKind

    @property
    def bytes(self) -> int:
        """Bytes of one packed entry."""
        return self.elements * itemsize(self.dtype)


def packed_planes(fmt: TileFormat, code: TileMac, tile: Tile, dtype: str) -> tuple[PackedPlane, ...]:
    """Dtype and size of a packed entry of each plane, found by packing one entry of zeros."""
    planes = fmt.planes(tile, dtype)
    zeros = {p.name: torch.zeros(1, *p.shape, dtype=TORCH_DTYPES[p.dtype]) for p in planes}
    for plane in planes:
        if plane.kind is PlaneKind.RAGGED:
            zeros[plane.name] = zeros[plane.name][:0]
            zeros[f"{plane.name}_ptr"] = torch.zeros(2, dtype=torch.int64)
    packed = code.pack(zeros)
    result = []
    for plane in planes:
        values = packed[plane.name]
        elements = plane.entry_elements if plane.kind is PlaneKind.RAGGED else values.numel()
        result.append(PackedPlane(plane.name, DTYPE_NAMES[values.dtype], elements, plane.kind))
    return tuple(result)
