"""Ternary tiles for stoicc, as docs/formats.md builds them, in one file."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl

import stoicc
from stoicc.codegen.cpu.lanes import from_lanes, to_lanes
from stoicc.ir.format import Approximation, Elements, squared_error

C = """
INLINE void {name}(const int32_t *signs, const $T *scales, const float *x, float *acc, const int nb)
{
    static const float sign[16] = {-1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0}; /* by two of four bits */
    for (int strip = 0; strip < STRIPS; strip++, acc += LANES * nb)
        for (int group = 0; group < BK / $size; group++, scales += LANES) {
            const float *xg = x + group * $size * nb;
            vfloat sum[8];
            clear_sums(sum, nb);
            for (int k = 0; k < $size; k += 16, signs += LANES) {
                vint word = vi_load(signs); /* sixteen columns of each row */
                ahead(signs, LANES * sizeof *signs);
                #pragma GCC unroll 16
                for (int j = 0; j < 16; j++) {
                    vfloat w = vf_look_up(sign, vi_shift_right(word, 2 * j));
                    multiply_add(w, xg + (k + j / 4 * 4) * nb + j % 4, sum, j, nb);
                }
            }
            add_scaled_sums(acc, vf_load_$T(scales), sum, nb);
        }
}
"""


@triton.jit
def decode_ternary(signs, scales, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, BM)[:, None], tl.arange(0, BK)[None, :]
    steps = tl.load(signs + rows * (BK // 4) + columns // 4) >> (columns % 4 * 2).to(tl.uint8)
    scale = tl.load(scales + rows * (BK // SIZE) + columns // SIZE)
    return (((steps & 3).to(tl.float32) - 1.0) * scale.to(tl.float32)).to(DTYPE)


@dataclass(frozen=True)
class Ternary(stoicc.TileFormat):
    """-1, 0 or 1 times a scale per group of weights along K."""

    name: ClassVar[str] = "ternary"
    group_size: int = 32

    def planes(self, tile, dtype):
        rows, columns = tile
        if self.group_size < 16 or self.group_size % 16 or columns % self.group_size:
            raise stoicc.FormatError(
                f"format ternary: expected a group_size of 16, 32, .. that divides {columns} columns, "
                f"found {self.group_size}; change it or the tile"
            )
        return (
            stoicc.Plane("signs", "u8", (rows, columns // 4)),
            stoicc.Plane("scales", dtype, (rows, columns // self.group_size)),
        )

    def encode(self, tiles):
        """Planes of tiles [T, BM, BK] that are ternary already: the largest magnitude of a group is its scale."""
        scales = tiles.unflatten(2, (-1, self.group_size)).abs().amax(3)
        steps = (tiles.sign() + 1).to(torch.uint8).unflatten(2, (-1, 4))
        return {"signs": steps[..., 0] | steps[..., 1] << 2 | steps[..., 2] << 4 | steps[..., 3] << 6, "scales": scales}

    def decode(self, planes, tile, dtype):
        """What the planes mean: every backend gives these tiles, bit for bit."""
        steps = torch.stack([planes["signs"] >> 2 * i & 3 for i in range(4)], -1).flatten(2)
        signs = steps.to(planes["scales"].dtype) - 1
        return (signs.unflatten(2, (-1, self.group_size)) * planes["scales"][..., None]).flatten(2)

    def elements(self, tile, dtype):
        return Elements("signs", 2, groups=tile[1] // self.group_size)

    def approximate(self, tiles, slots, statistics=None):
        """The nearest ternary tiles, for users who ask for a lossy choice; the scale is the mean magnitude."""
        groups = tiles.float().unflatten(2, (-1, self.group_size))
        scales = groups.abs().mean(3, keepdim=True).to(tiles.dtype).float()
        signs = torch.where(scales > 0, groups / scales, 0.0).round().clamp(-1, 1)
        planes = self.encode((signs * scales).flatten(2).to(tiles.dtype))
        back = self.decode(planes, tiles.shape[1:], "")
        return Approximation(planes, squared_error(tiles, back, statistics))

    def tile_mac(self, tile, dtype):
        def pack(planes):
            words = planes["signs"].contiguous().view(torch.int32)  # sixteen weights a word
            return {"signs": to_lanes(words), "scales": to_lanes(planes["scales"])}

        def unpack(packed, tile):  # the inverse, so that a kernel holds its planes once
            signs = from_lanes(packed["signs"], tile[0]).view(torch.uint8)
            return {"signs": signs, "scales": from_lanes(packed["scales"], tile[0])}

        source = C.replace("$T", dtype).replace("$size", str(self.group_size))
        return stoicc.TileMac(source, pack, unpack=unpack)

    def decode_block(self, tile, dtype):
        return stoicc.TritonDecode(decode_ternary, {"SIZE": self.group_size})


TERNARY = Ternary()
