"""4-bit affine codes with a scale (and optionally a zero point) per group along K."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stoicc.formats._affine import Affine, pack_nibbles, unpack_nibbles
from stoicc.ir.format import Plane, Planes, Tile, TileCodes
from stoicc.ir.registry import register_format


@dataclass(frozen=True)
class Int4(Affine):
    """Codes u8 `[BM, BK / 2]` (even column in the low nibble), scales, zeros."""

    name: ClassVar[str] = "int4"

    @property
    def bits(self) -> int:
        return 4

    def code_planes(self, tile: Tile) -> tuple[Plane, ...]:
        return (Plane("codes", "u8", (tile[0], tile[1] // 2)),)

    def pack(self, codes: TileCodes) -> Planes:
        return {"codes": pack_nibbles(codes.codes)}

    def unpack(self, planes: Planes, tile: Tile) -> Tensor:
        return unpack_nibbles(planes["codes"])


register_format(Int4())
