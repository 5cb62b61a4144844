"""8-bit affine codes with a scale (and optionally a zero point) per group along K."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stoicc.formats._affine import Affine
from stoicc.ir.format import Plane, Planes, Tile, TileCodes
from stoicc.ir.registry import register_format


@dataclass(frozen=True)
class Int8(Affine):
    """Codes u8 `[BM, BK]`, scales `[BM, BK / group_size]`, zeros u8 alike."""

    name: ClassVar[str] = "int8"

    @property
    def bits(self) -> int:
        return 8

    def code_planes(self, tile: Tile) -> tuple[Plane, ...]:
        return (Plane("codes", "u8", tile),)

    def pack(self, codes: TileCodes) -> Planes:
        return {"codes": codes.codes}

    def unpack(self, planes: Planes, tile: Tile) -> Tensor:
        return planes["codes"]


register_format(Int8())
