"""8-bit affine codes with a scale (and optionally a zero point) per group along K."""

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl
from torch import Tensor

from stoicc.formats import _affine_c, _lane_order
from stoicc.formats._affine import Affine
from stoicc.formats._device import load_groups, load_words, octets, scale_codes, shift_codes, spread_groups
from stoicc.formats._fragments import affine_fragment
from stoicc.formats._halves import add_halves, both_halves, octet_halves, packs_halves, scale_halves
from stoicc.ir.format import Fragment, Plane, Planes, Tile, TileCodes, TileMac, TritonDecode
from stoicc.ir.registry import register_format


@triton.jit
def decode_int8(codes, scales, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr):
    """`(code - 128) * scale`, 4 codes a word."""
    words, factors = load_words(codes, BM, BK // 4), load_groups(scales, BM, GROUPS)
    if packs_halves(DTYPE):
        tile = scale_halves(octet_halves(words, DTYPE), factors, GROUPS, DTYPE)
    else:
        tile = scale_codes(octets(words, 128), factors, GROUPS, DTYPE)
    return tile


@triton.jit
def decode_int8_zeros(
    codes, scales, zeros, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr
):
    """`(code - zero) * scale`, 4 codes a word."""
    words, factors = load_words(codes, BM, BK // 4), load_groups(scales, BM, GROUPS)
    points = load_groups(zeros, BM, GROUPS)
    if packs_halves(DTYPE):
        minus = both_halves((128.0 - points.to(tl.float32)).to(DTYPE).to(tl.uint16, bitcast=True))
        minus = spread_groups(minus, BK // 2, GROUPS)
        tile = scale_halves(add_halves(octet_halves(words, DTYPE), minus, DTYPE), factors, GROUPS, DTYPE)
    else:
        tile = scale_codes(shift_codes(octets(words, 0), points, GROUPS), factors, GROUPS, DTYPE)
    return tile


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

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode:
        function = decode_int8_zeros if self.zero_points else decode_int8
        return TritonDecode(function, {"GROUPS": self.grid(tile[1]).per_tile})

    def fragment(self, tile: Tile, dtype: str) -> Fragment | None:
        return affine_fragment(8, tile, dtype, self.grid(tile[1]).per_tile, self.zero_points)

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        groups = self.grid(tile[1]).per_tile
        code = _affine_c.int8_mac(dtype, groups, tile[1] // groups, self.zero_points)
        return _lane_order.with_unpack(code, _lane_order.byte_codes, groups, self.bits)


register_format(Int8())
