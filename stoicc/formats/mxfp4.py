"""4-bit floats in blocks of 32 with a power of two as scale: OCP microscaling.

Source: OCP Microscaling Formats (MX) Specification 1.0: e2m1 (5.3.3), e8m0 (5.4.1), conversion (6.3).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from stoicc.formats import _float_c
from stoicc.formats._affine import GroupGrid, pack_nibbles, unpack_nibbles
from stoicc.formats._block_float import BlockFloat, block_amax, scaled, whole_blocks
from stoicc.formats._device import load_groups, load_words, scale_codes
from stoicc.formats._float_device import e2m1, e8m0
from stoicc.formats._kept_device import mxfp4_values
from stoicc.formats._table import SMALL_FLOATS, e8m0_values, floor_exponent, fp4_codes, fp4_values
from stoicc.ir.format import Elements, Plane, Planes, Tile, TileMac, TritonDecode
from stoicc.ir.lattice import Lattice
from stoicc.ir.registry import register_format

BLOCK = 32
_LARGEST_EXPONENT = 2
"""Of e2m1: 6 is 1.5 * 2**2."""


@triton.jit
def decode_mxfp4(codes, scales, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    """`code * 2**exponent`, 8 codes a word."""
    values = e2m1(load_words(codes, BM, BK // 8))
    return scale_codes(values, e8m0(load_groups(scales, BM, BK // 32)), BK // 32, DTYPE)


@dataclass(frozen=True)
class Mxfp4(BlockFloat):
    """Codes u8 `[BM, BK / 2]` (even column in the low nibble), exponents u8 `[BM, BK / 32]` (e8m0)."""

    name: ClassVar[str] = "mxfp4"

    def grid(self, columns: int) -> GroupGrid:
        return whole_blocks(self.name, columns, BLOCK)

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        blocks = self.grid(tile[1]).per_tile
        return (Plane("codes", "u8", (tile[0], tile[1] // 2)), Plane("scales", "u8", (tile[0], blocks)))

    def lattice(self, tile: Tile) -> Lattice:
        return Lattice(group_size=BLOCK, floats=SMALL_FLOATS["e2m1"])

    def values(self, planes: Planes) -> tuple[Tensor, Tensor]:
        return fp4_values(unpack_nibbles(planes["codes"])), e8m0_values(planes["scales"])

    def nearest(self, tiles: Tensor, slots: Tensor) -> Planes:
        """Exponent floor(log2(amax)) - 2; what is above 6 of it becomes 6, as the specification has it."""
        top = block_amax(tiles, slots, self.grid(tiles.shape[2]))
        exponents = (floor_exponent(top) - _LARGEST_EXPONENT + 127).clamp(0, 254).to(torch.uint8)
        return {"codes": pack_nibbles(fp4_codes(scaled(tiles, e8m0_values(exponents)))), "scales": exponents}

    def exact(self, tiles: Tensor, slots: Tensor) -> Planes:
        """That exponent holds what any does: larger ones have a coarser grid."""
        return self.nearest(tiles, slots)

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode:
        return TritonDecode(decode_mxfp4)

    def elements(self, tile: Tile, dtype: str) -> Elements:
        return Elements("codes", 4, TritonDecode(mxfp4_values), tile[1] // BLOCK, lanes="words", in_lanes=True)

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        return _float_c.fp4_mac(dtype, tile[1] // BLOCK, BLOCK, "e8m0")


register_format(Mxfp4())
