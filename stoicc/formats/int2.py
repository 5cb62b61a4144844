"""2-bit affine codes with a scale (and optionally a zero point) per group along K.

Symmetric codes made by AbsMax are ternary: -1, 0 and 1 times the scale.
"""

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl
from torch import Tensor

from stoicc.formats import _lane_order, _narrow_c
from stoicc.formats._affine import Affine
from stoicc.formats._device import load_groups, load_words, scale_codes, shift_codes
from stoicc.formats._narrow import crumbs, pack_crumbs, unpack_crumbs
from stoicc.ir.format import Plane, Planes, Tile, TileCodes, TileMac, TritonDecode
from stoicc.ir.registry import register_format


@triton.jit
def decode_int2(codes, scales, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr):
    """`(code - 2) * scale`, 16 codes a word."""
    values = crumbs(load_words(codes, BM, BK // 16), 2)
    return scale_codes(values, load_groups(scales, BM, GROUPS), GROUPS, DTYPE)


@triton.jit
def decode_int2_zeros(
    codes, scales, zeros, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr
):
    """`(code - zero) * scale`, 16 codes a word."""
    values = crumbs(load_words(codes, BM, BK // 16), 0)
    values = shift_codes(values, load_groups(zeros, BM, GROUPS), GROUPS)
    return scale_codes(values, load_groups(scales, BM, GROUPS), GROUPS, DTYPE)


@dataclass(frozen=True)
class Int2(Affine):
    """Codes u8 `[BM, BK / 4]` (the first of four columns in the lowest bits), scales, zeros."""

    name: ClassVar[str] = "int2"

    @property
    def bits(self) -> int:
        return 2

    def code_planes(self, tile: Tile) -> tuple[Plane, ...]:
        return (Plane("codes", "u8", (tile[0], tile[1] // 4)),)

    def pack(self, codes: TileCodes) -> Planes:
        return {"codes": pack_crumbs(codes.codes)}

    def unpack(self, planes: Planes, tile: Tile) -> Tensor:
        return unpack_crumbs(planes["codes"])

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode:
        function = decode_int2_zeros if self.zero_points else decode_int2
        return TritonDecode(function, {"GROUPS": self.grid(tile[1]).per_tile})

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        groups = self.grid(tile[1]).per_tile
        code = _narrow_c.int2_mac(dtype, groups, tile[1] // groups, self.zero_points)
        return _lane_order.with_unpack(code, _narrow_c.int2_codes, groups, _narrow_c.ZEROS_AS)


register_format(Int2())
