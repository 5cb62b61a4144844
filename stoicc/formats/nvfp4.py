"""4-bit floats in blocks of 16 with fp8 scales, and a scale in fp32 over them.

Source: NVIDIA, Introducing NVFP4 for efficient and accurate low-precision inference (2025): e2m1 codes, e4m3
block scales, tensor scale amax / (6 * 448). A checkpoint's one tensor scale is an entry for each tile row here.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from stoicc.formats import _float_c
from stoicc.formats._affine import GroupGrid, pack_nibbles, share, unpack_nibbles
from stoicc.formats._block_float import BlockFloat, block_amax, scaled, whole_blocks
from stoicc.formats._device import load_groups, load_words, scale_codes
from stoicc.formats._float_device import e2m1, e4m3
from stoicc.formats._kept_device import nvfp4_values
from stoicc.formats._table import E2M1_MAX, FP8_MAX, exact_power, fp4_codes, fp4_values, fp8_codes, fp8_values
from stoicc.ir.dtypes import bits
from stoicc.ir.format import Elements, Plane, PlaneKind, Planes, Tile, TileMac, TritonDecode
from stoicc.ir.registry import register_format

BLOCK = 16
_MOST = E2M1_MAX * FP8_MAX["e4m3"]
_LARGEST_EXACT = 1023.0
"""So that four times a block scale, and six times one, reach any weight with room to spare."""


@triton.jit
def decode_nvfp4(codes, scales, tensor_scale, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    """`code * (block scale * tensor scale)`, 8 codes a word."""
    values = e2m1(load_words(codes, BM, BK // 8))
    scale = e4m3(load_groups(scales, BM, BK // 16)) * tl.load(tensor_scale)
    return scale_codes(values, scale, BK // 16, DTYPE)


@dataclass(frozen=True)
class Nvfp4(BlockFloat):
    """Codes u8 `[BM, BK / 2]` (even column in the low nibble), scales u8 `[BM, BK / 16]` (e4m3), tensor scale f32."""

    name: ClassVar[str] = "nvfp4"

    def grid(self, columns: int) -> GroupGrid:
        return whole_blocks(self.name, columns, BLOCK)

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        blocks = self.grid(tile[1]).per_tile
        return (
            Plane("codes", "u8", (tile[0], tile[1] // 2)),
            Plane("scales", "u8", (tile[0], blocks)),
            Plane("tensor_scale", "f32", (1,), PlaneKind.GROUP, 0),
        )

    def values(self, planes: Planes) -> tuple[Tensor, Tensor]:
        scales = fp8_values(planes["scales"], "e4m3") * planes["tensor_scale"][:, :, None]
        return fp4_values(unpack_nibbles(planes["codes"])), scales

    def nearest(self, tiles: Tensor, slots: Tensor) -> Planes:
        tensor = _shared_amax(tiles, slots) / _MOST
        return self._with(tiles, tensor, block_amax(tiles, slots, self.grid(tiles.shape[2])) / E2M1_MAX)

    def exact(self, tiles: Tensor, slots: Tensor) -> Planes:
        """A power of two as tensor scale, under which the largest weight of a block is code 6, or else code 4.

        A block whose largest code is another has one of these with a scale that is smaller by a power of two.
        """
        tensor = exact_power(_shared_amax(tiles, slots), _LARGEST_EXACT)
        top = block_amax(tiles, slots, self.grid(tiles.shape[2]))
        six, four = (self._with(tiles, tensor, top / code) for code in (6.0, 4.0))
        wrong = (bits(self.product(six)) != bits(tiles.float())).unflatten(2, (-1, BLOCK)).any(3)
        return self._with_codes(tiles, tensor, torch.where(wrong, four["scales"], six["scales"]))

    def _with(self, tiles: Tensor, tensor: Tensor, wanted: Tensor) -> Planes:
        """Planes with the nearest block scales to `wanted [T, BM, blocks]`, given tensor scales `[T]`."""
        step = tensor[:, None, None]
        return self._with_codes(tiles, tensor, fp8_codes(torch.where(step != 0, wanted / step, 0.0), "e4m3"))

    def _with_codes(self, tiles: Tensor, tensor: Tensor, scales: Tensor) -> Planes:
        steps = fp8_values(scales, "e4m3") * tensor[:, None, None]
        return {
            "codes": pack_nibbles(fp4_codes(scaled(tiles, steps))),
            "scales": scales,
            "tensor_scale": tensor[:, None],
        }

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode:
        return TritonDecode(decode_nvfp4)

    def elements(self, tile: Tile, dtype: str) -> Elements:
        return Elements("codes", 4, TritonDecode(nvfp4_values), tile[1] // BLOCK, lanes="words")

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        return _float_c.fp4_mac(dtype, tile[1] // BLOCK, BLOCK, "e4m3")


def _shared_amax(tiles: Tensor, slots: Tensor) -> Tensor:
    """The largest magnitude of the tiles that share a slot, fp32 `[T]`."""
    grid = GroupGrid.of(0, tiles.shape[2], "nvfp4")
    return share(tiles.float().abs().amax((1, 2)).view(-1, 1, 1), slots, grid, "amax").flatten()


register_format(Nvfp4())
