"""4-bit affine codes with a scale (and optionally a zero point) per group along K."""

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl
from torch import Tensor

from stoicc.formats import _affine_c, _lane_order
from stoicc.formats._affine import Affine, pack_nibbles, unpack_nibbles
from stoicc.formats._device import load_groups, load_words, nibbles, scale_codes, shift_codes, spread_groups
from stoicc.formats._fragments import affine_fragment
from stoicc.formats._halves import add_halves, both_halves, minus_power, nibble_halves, packs_halves, scale_halves
from stoicc.ir.format import Fragment, Plane, Planes, Tile, TileCodes, TileMac, TritonDecode
from stoicc.ir.registry import register_format


@triton.jit
def decode_int4(codes, scales, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr):
    """`(code - 8) * scale`, 8 codes a word."""
    words, factors = load_words(codes, BM, BK // 8), load_groups(scales, BM, GROUPS)
    if packs_halves(DTYPE):
        values = add_halves(nibble_halves(words, DTYPE), minus_power(DTYPE) + 0x00080008, DTYPE)
        tile = scale_halves(values, factors, GROUPS, DTYPE)
    else:
        tile = scale_codes(nibbles(words, 8), factors, GROUPS, DTYPE)
    return tile


@triton.jit
def decode_int4_zeros(
    codes, scales, zeros, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr
):
    """`(code - zero) * scale`, 8 codes a word."""
    words, factors = load_words(codes, BM, BK // 8), load_groups(scales, BM, GROUPS)
    points = load_groups(zeros, BM, GROUPS)
    if packs_halves(DTYPE):
        minus = spread_groups(both_halves(points) + minus_power(DTYPE), BK // 2, GROUPS)
        tile = scale_halves(add_halves(nibble_halves(words, DTYPE), minus, DTYPE), factors, GROUPS, DTYPE)
    else:
        tile = scale_codes(shift_codes(nibbles(words, 0), points, GROUPS), factors, GROUPS, DTYPE)
    return tile


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

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode:
        function = decode_int4_zeros if self.zero_points else decode_int4
        return TritonDecode(function, {"GROUPS": self.grid(tile[1]).per_tile})

    def fragment(self, tile: Tile, dtype: str) -> Fragment | None:
        return affine_fragment(4, tile, dtype, self.grid(tile[1]).per_tile, self.zero_points)

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        groups = self.grid(tile[1]).per_tile
        code = _affine_c.int4_mac(dtype, groups, tile[1] // groups, self.zero_points, unpack_nibbles)
        return _lane_order.with_unpack(code, _lane_order.nibble_codes, groups, self.bits)


register_format(Int4())
