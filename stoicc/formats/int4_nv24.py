"""4-bit codes on 2:4 structure: codes of the two kept weights of each four, and their columns."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from stoicc.formats import _affine_c, _lane_order, _nm
from stoicc.formats._affine import Affine, pack_nibbles, unpack_nibbles
from stoicc.formats._device import load_groups, load_words, quads, scale_codes, shift_codes, spread_codes, spread_groups
from stoicc.formats._fragments import affine_fragment
from stoicc.formats._halves import (
    add_halves,
    both_halves,
    minus_power,
    nibble_halves,
    packs_halves,
    power,
    scale_halves,
    spread_pairs,
)
from stoicc.ir.format import Fragment, Plane, Planes, Tile, TileCodes, TileMac, TritonDecode, nonzero_codes
from stoicc.ir.lattice import Lattice
from stoicc.ir.registry import register_format


@triton.jit
def decode_int4_nv24(
    codes, positions, scales, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr
):
    """`(code - 8) * scale` of the two kept weights of each four, at their columns; 8 is dropped."""
    factors = load_groups(scales, BM, GROUPS)
    if packs_halves(DTYPE) and BK >= 32:
        pairs = nibble_halves(load_words(codes, BM, BK // 16), DTYPE)
        pairs = spread_pairs(pairs, power(DTYPE) + 0x00080008, positions, BM, BK)
        values = add_halves(pairs, minus_power(DTYPE) + 0x00080008, DTYPE)
        tile = scale_halves(values, factors, GROUPS, DTYPE)
    else:
        tile = scale_codes(quads(spread_codes(codes, positions, 8, BM, BK), 8), factors, GROUPS, DTYPE)
    return tile


@triton.jit
def decode_int4_nv24_zeros(
    codes, positions, scales, zeros, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr
):
    """`(code - zero) * scale` of the two kept weights of each four, at their columns."""
    factors, points = load_groups(scales, BM, GROUPS), load_groups(zeros, BM, GROUPS)
    fill = spread_groups(points, BK // 4, GROUPS)
    if packs_halves(DTYPE) and BK >= 32:
        pairs = nibble_halves(load_words(codes, BM, BK // 16), DTYPE)
        pairs = spread_pairs(pairs, fill + power(DTYPE), positions, BM, BK)
        minus = spread_groups(both_halves(points) + minus_power(DTYPE), BK // 2, GROUPS)
        tile = scale_halves(add_halves(pairs, minus, DTYPE), factors, GROUPS, DTYPE)
    else:
        values = quads(spread_codes(codes, positions, fill, BM, BK), 0)
        tile = scale_codes(shift_codes(values, points, GROUPS), factors, GROUPS, DTYPE)
    return tile


@dataclass(frozen=True)
class Int4Nv24(Affine):
    """Codes u8 `[BM, BK / 4]` (one group of four a byte), positions u8 `[BM, BK / 8]`, scales, zeros.

    A dropped weight is exactly zero; a kept one whose code is the zero point is zero as well.
    """

    name: ClassVar[str] = "int4_nv24"

    @property
    def bits(self) -> int:
        return 4

    def code_planes(self, tile: Tile) -> tuple[Plane, ...]:
        rows, columns = tile
        return (
            Plane("codes", "u8", (rows, columns // 4)),
            Plane("positions", "u8", (rows, columns // 8)),
        )

    def lattice(self, tile: Tile) -> Lattice | None:
        found = super().lattice(tile)
        return None if found is None else replace(found, keep=(2, 4))

    def keeps(self, codes: TileCodes) -> Tensor:
        return ~_nm.overfull(nonzero_codes(codes))

    def pack(self, codes: TileCodes) -> Planes:
        kept, positions = _nm.compress(codes.codes, _nm.group_masks(nonzero_codes(codes)))
        return {"codes": pack_nibbles(kept), "positions": positions}

    def unpack(self, planes: Planes, tile: Tile) -> Tensor:
        fill = torch.full((planes["codes"].shape[0], *tile), 1 << (self.bits - 1), dtype=torch.uint8)
        if self.zero_points:
            fill = planes["zeros"].repeat_interleave(tile[1] // planes["zeros"].shape[2], 2)
        return _nm.expand(unpack_nibbles(planes["codes"]), planes["positions"], fill.to(planes["codes"].device))

    def prune(self, tiles: Tensor, statistics: Tensor | None) -> Tensor:
        magnitude = tiles.float().abs()
        return tiles.where(_nm.top2(magnitude if statistics is None else magnitude * statistics[:, None].sqrt()), 0)

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode | None:
        if self.grid(tile[1]).per_tile > tile[1] // 4:  # a scale for less than a group of four
            return None
        function = decode_int4_nv24_zeros if self.zero_points else decode_int4_nv24
        return TritonDecode(function, {"GROUPS": self.grid(tile[1]).per_tile})

    def fragment(self, tile: Tile, dtype: str) -> Fragment | None:
        return affine_fragment(4, tile, dtype, self.grid(tile[1]).per_tile, self.zero_points, sparse=True)

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        groups = self.grid(tile[1]).per_tile
        code = _affine_c.int4_nv24_mac(dtype, groups, tile[1] // groups, self.zero_points, unpack_nibbles)
        return _lane_order.with_unpack(code, _lane_order.kept_codes, groups, self.bits)


register_format(Int4Nv24())
