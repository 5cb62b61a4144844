"""3-bit affine codes with a scale (and optionally a zero point) per group along K."""

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl
from torch import Tensor

from stoicc.formats import _lane_order, _narrow_c
from stoicc.formats._affine import Affine
from stoicc.formats._device import load_groups, load_words, scale_codes, shift_codes
from stoicc.formats._narrow import load_halves, pack_bits, pack_crumbs, threes, unpack_bits, unpack_crumbs
from stoicc.ir.format import Plane, Planes, Tile, TileCodes, TileMac, TritonDecode
from stoicc.ir.registry import register_format


@triton.jit
def decode_int3(codes, high, scales, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr):
    """`(code - 4) * scale`, 16 codes a word."""
    values = threes(load_words(codes, BM, BK // 16), load_halves(high, BM, BK // 16), 4)
    return scale_codes(values, load_groups(scales, BM, GROUPS), GROUPS, DTYPE)


@triton.jit
def decode_int3_zeros(
    codes, high, scales, zeros, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr
):
    """`(code - zero) * scale`, 16 codes a word."""
    values = threes(load_words(codes, BM, BK // 16), load_halves(high, BM, BK // 16), 0)
    values = shift_codes(values, load_groups(zeros, BM, GROUPS), GROUPS)
    return scale_codes(values, load_groups(scales, BM, GROUPS), GROUPS, DTYPE)


@dataclass(frozen=True)
class Int3(Affine):
    """The lower two bits of codes u8 `[BM, BK / 4]`, their highest bit u8 `[BM, BK / 8]`, scales, zeros."""

    name: ClassVar[str] = "int3"

    @property
    def bits(self) -> int:
        return 3

    def code_planes(self, tile: Tile) -> tuple[Plane, ...]:
        rows, columns = tile
        return (Plane("codes", "u8", (rows, columns // 4)), Plane("high", "u8", (rows, columns // 8)))

    def pack(self, codes: TileCodes) -> Planes:
        return {"codes": pack_crumbs(codes.codes & 3), "high": pack_bits(codes.codes >> 2)}

    def unpack(self, planes: Planes, tile: Tile) -> Tensor:
        return unpack_crumbs(planes["codes"]) | unpack_bits(planes["high"]) << 2

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode:
        function = decode_int3_zeros if self.zero_points else decode_int3
        return TritonDecode(function, {"GROUPS": self.grid(tile[1]).per_tile})

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        groups = self.grid(tile[1]).per_tile
        code = _narrow_c.int3_mac(dtype, groups, tile[1] // groups, self.zero_points)
        return _lane_order.with_unpack(code, _narrow_c.int3_codes, groups, _narrow_c.ZEROS_AS)


register_format(Int3())
