"""8-bit floats, e4m3 or e5m2, with a scale per group along K or per row.

Source: OCP 8-bit Floating Point Specification (OFP8) 1.0, tables 1 and 2; Micikevicius et al. 2022 (arXiv 2209.05433).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from stoicc.formats import _float_c
from stoicc.formats._affine import GroupGrid, finite_scale, share
from stoicc.formats._block_float import BlockFloat, block_amax, scaled
from stoicc.formats._device import load_groups, scale_codes
from stoicc.formats._float_device import e4m3, e5m2
from stoicc.formats._kept_device import e4m3_values, e5m2_values
from stoicc.formats._table import FP8_MAX, SMALL_FLOATS, exact_power, fp8_codes, fp8_values
from stoicc.ir.dtypes import bits
from stoicc.ir.format import Elements, Plane, PlaneKind, Planes, Tile, TileMac, TritonDecode
from stoicc.ir.lattice import Lattice
from stoicc.ir.registry import register_format


@triton.jit
def decode_e4m3(codes, scales, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr):
    """`code * scale`, a byte a code."""
    values = e4m3(tl.load(codes + tl.arange(0, BM)[:, None] * BK + tl.arange(0, BK)[None, :]))
    return scale_codes(values, load_groups(scales, BM, GROUPS), GROUPS, DTYPE)


@triton.jit
def decode_e5m2(codes, scales, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr):
    """`code * scale`, a byte a code."""
    values = e5m2(tl.load(codes + tl.arange(0, BM)[:, None] * BK + tl.arange(0, BK)[None, :]))
    return scale_codes(values, load_groups(scales, BM, GROUPS), GROUPS, DTYPE)


@dataclass(frozen=True)
class Fp8(BlockFloat):
    """Codes u8 `[BM, BK]`, scales in the weight's dtype; a weight is code * scale in fp32, rounded once.

    Attributes:
        kind: e4m3 (largest magnitude 448, no infinities) or e5m2 (57344).
        group_size: weights along K that share a scale; 0 for the whole row.
    """

    name: ClassVar[str] = "fp8"
    kind: Literal["e4m3", "e5m2"] = "e4m3"
    group_size: int = 0

    def grid(self, columns: int) -> GroupGrid:
        return GroupGrid.of(self.group_size, columns, self.name)

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        grid = self.grid(tile[1])
        return (Plane("codes", "u8", tile), Plane("scales", dtype, (tile[0], grid.per_tile), grid.kind, grid.span))

    def lattice(self, tile: Tile) -> Lattice | None:
        if self.grid(tile[1]).kind is not PlaneKind.TILE:  # a scale that tiles share is not the tile's own choice
            return None
        return Lattice(group_size=self.group_size, floats=SMALL_FLOATS[self.kind])

    def values(self, planes: Planes) -> tuple[Tensor, Tensor]:
        return fp8_values(planes["codes"], self.kind), planes["scales"].float()

    def nearest(self, tiles: Tensor, slots: Tensor) -> Planes:
        most = FP8_MAX[self.kind]
        top = block_amax(tiles, slots, self.grid(tiles.shape[2]))
        return self._with(tiles, finite_scale(top / most, tiles.dtype, int(most)))

    def exact(self, tiles: Tensor, slots: Tensor) -> Planes:
        """A power of two holds what any power of two does, short of the smallest; else the scale of `nearest`."""
        grid = self.grid(tiles.shape[2])
        top = block_amax(tiles, slots, grid)
        power = self._with(tiles, exact_power(top, FP8_MAX[self.kind]).to(tiles.dtype))
        other = self.nearest(tiles, slots)
        wrong = (bits(self.product(power)) != bits(tiles.float())).unflatten(2, (grid.per_tile, -1)).any(3)
        wrong = share(wrong.to(torch.uint8), slots, grid, "amax").bool()
        return self._with(tiles, torch.where(wrong, other["scales"], power["scales"]))

    def _with(self, tiles: Tensor, scales: Tensor) -> Planes:
        return {"codes": fp8_codes(scaled(tiles, scales.float()), self.kind), "scales": scales}

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode:
        function = decode_e4m3 if self.kind == "e4m3" else decode_e5m2
        return TritonDecode(function, {"GROUPS": self.grid(tile[1]).per_tile})

    def elements(self, tile: Tile, dtype: str) -> Elements:
        values = TritonDecode(e4m3_values if self.kind == "e4m3" else e5m2_values)
        return Elements("codes", 8, values, self.grid(tile[1]).per_tile, lanes="columns", in_lanes=True)

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        groups = self.grid(tile[1]).per_tile
        return _float_c.fp8_mac(dtype, groups, tile[1] // groups, self.kind)


register_format(Fp8())
