"""Unstructured zeros: one bit for each weight, and the weights that are not zero.

At a density d a tile takes 1 + 16 d bits per 16-bit weight: less than dense below 93%, and at 50% as
much as 2:4, with the zeros anywhere.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from stoicc.formats import _mask
from stoicc.formats._mask import ranks, woven
from stoicc.ir.dtypes import TORCH_DTYPES, bits
from stoicc.ir.format import Plane, PlaneKind, Planes, Tile, TileFloats, TileFormat, TileMac, TilePairs, TritonDecode
from stoicc.ir.lattice import Lattice
from stoicc.ir.registry import register_format


@triton.jit
def decode_bitmap(
    masks, starts, values, count, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, PAIRED: tl.constexpr
):
    """Each kept weight from its place in the tile's run, zeros between."""
    first, second, place, then = ranks(masks, tl.load(starts + tl.arange(0, BM // 16)[:, None]), BM, BK, PAIRED)
    even = tl.load(values + place, mask=first != 0, other=0.0)
    odd = tl.load(values + then, mask=second != 0, other=0.0)
    return woven(even, odd, BM, BK, DTYPE)


_MAC = """\
INLINE void {name}($arguments, const float *x, float *acc, const int nb)
{
    const $T *end = values + $count; /* of the strips, which follow one another */
    for (int strip = 0; strip < STRIPS; strip++, acc += LANES * nb) {
        vfloat sum[8];
        clear_sums(sum, nb);
        #pragma GCC unroll 4
        for (int k = 0; k < BK; k += 4, masks += 2) {
            const $T *then = values + __builtin_popcount((uint32_t)masks[0]);
            vfloat w[4];
            ahead(values, 32 * sizeof *values); /* about what four columns keep */
            vf_expand_$T(values, end, masks, &w[0], &w[1]);
            vf_expand_$T(then, end, masks + 1, &w[2], &w[3]);
            values = then + __builtin_popcount((uint32_t)masks[1]);
            #pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                multiply_add(w[i], x + k * nb + i, sum, i, nb);
        }
        add_sums(acc, sum, nb);
    }
}
"""

_PAIRS = """\
INLINE void {name}($arguments, const int unit, bf16 *pairs)
{
    const int strip = unit / (BK / {columns}), before = unit % (BK / {columns}) * ({columns} / 2);
    masks += strip * (BK / 2);
    values += $start;
    for (int i = 0; i < before; i++, masks++)
        values += __builtin_popcount((uint32_t)*masks);
    #pragma GCC unroll 16
    for (int k = 0; k < {columns}; k += 2, masks++, pairs += 2 * LANES) {
        ahead(values, 64);
        vp_store(pairs, vp_expand(values, masks));
        values += __builtin_popcount((uint32_t)*masks);
    }
}
"""

_DOTS = """\
INLINE void {name}($arguments, const int unit, bf16 *pairs, int64_t *place)
{
    const bf16 *from = values + *place;
    masks += unit * 8;
    #pragma GCC unroll 8
    for (int k = 0; k < 16; k += 2, masks++, pairs += 2 * LANES) {
        vp_store(pairs, vp_expand(from, masks));
        from += __builtin_popcount((uint32_t)*masks);
    }
    *place = from - values;
}
"""

_FLOATS = """\
INLINE void {name}($arguments, const int strip, float *weights)
{
    const $T *end = values + count;
    masks += strip * (BK / 2);
    values += starts[strip];
    #pragma GCC unroll 4
    for (int k = 0; k < BK; k += 2, masks++, weights += 2 * LANES) {
        vfloat first, second;
        ahead(values, 64);
        vf_expand_$T(values, end, masks, &first, &second);
        vf_store_f32(weights, first);
        vf_store_f32(weights + LANES, second);
        values += __builtin_popcount((uint32_t)*masks);
    }
    memset(weights, 0, (COLUMNS - BK) * LANES * sizeof *weights);
}
"""

_DECODE = """\
static void {name}($arguments, $T *out, const int64_t stride)
{
    for (int row = 0; row < BM; row++)
        memset(out + row * stride, 0, BK * sizeof *out);
    for (int strip = 0; strip < BM / 16; strip++, out += 16 * stride)
        for (int k = 0; k < BK; k += 2)
            for (uint32_t mask = (uint32_t)*masks++; mask; mask &= mask - 1) {
                const int bit = __builtin_ctz(mask);
                out[$place] = *values++;
            }
}
"""

_ROWS_BF16 = """\
static void {name}($arguments, bf16 *out, const int64_t stride)
{
    const bf16 *end = values + $count;
    for (int strip = 0; strip < BM / 16; strip++, out += 16 * stride)
        for (int k = 0; k < BK; k += 32) {
            uint32_t pairs[16][16] __attribute__((aligned(64)));
            for (int i = 0; i < 16; i++) {
                const uint32_t mask = (uint32_t)*masks++;
                pair_of_kept(values, end, mask, (bf16 *)pairs[i]);
                values += __builtin_popcount(mask);
            }
            columns_to_rows(*pairs, out + k, stride * sizeof *out);
        }
}
"""

_ROWS_F32 = """\
static void {name}($arguments, float *out, const int64_t stride)
{
    const float *end = values + $count;
    for (int strip = 0; strip < BM / 16; strip++, out += 16 * stride)
        for (int k = 0; k < BK; k += 16) {
            float columns[16][16] __attribute__((aligned(64)));
            for (int i = 0; i < 16; i += 2) {
                vfloat first, second;
                vf_expand_f32(values, end, masks, &first, &second);
                vf_store_f32(columns[i], first);
                vf_store_f32(columns[i + 1], second);
                values += __builtin_popcount((uint32_t)*masks++);
            }
            columns_to_rows((const uint32_t *)*columns, out + k, stride * sizeof *out);
        }
}
"""


def kept_mac(arguments: str, count: str, dtype: str) -> str:
    """C that multiplies tiles of masks and kept values, `count` of them in a tile."""
    return _MAC.replace("$arguments", arguments).replace("$count", count).replace("$T", dtype)


def kept_pairs(arguments: str, start: str, tile: Tile) -> TilePairs | None:
    """C that unpacks bf16 columns of a strip as pairs; the strip's values begin at `start`, C in terms of `strip`."""
    source = _PAIRS.replace("$arguments", arguments).replace("$start", start)
    return TilePairs(source, tile[1], least_in_vectors=1, least_blocked=32) if tile[1] % 32 == 0 else None


def kept_dots(arguments: str, tile: Tile) -> TilePairs | None:
    """The code of kept bf16 values for a batch of few, unit by unit: where each begins is known from those before."""
    source = _DOTS.replace("$arguments", arguments)
    return TilePairs(source, 16, least_in_vectors=1, ordered=True) if tile[1] % 32 == 0 else None


def kept_decode(arguments: str, count: str, dtype: str, tile: Tile) -> str:
    """C that writes a whole tile of `count` kept values: columns of a strip in their lanes, then turned to rows."""
    rows = {"bf16": (_ROWS_BF16, 32), "f32": (_ROWS_F32, 16)}
    if dtype in rows and tile[1] % rows[dtype][1] == 0:
        return rows[dtype][0].replace("$arguments", arguments).replace("$count", count)
    place = "(bit >> 1) * stride + k + (bit & 1)" if dtype == "bf16" else "(bit & 15) * stride + k + (bit >> 4)"
    return _DECODE.replace("$arguments", arguments).replace("$T", dtype).replace("$place", place)


@dataclass(frozen=True)
class Bitmap(TileFormat):
    """Masks i32 `[BM / 16, BK / 2]`, where each strip's run starts, and the kept values.

    `stoicc/formats/_mask.py` has the order of bits and values. A -0.0 is kept: it is no zero bit pattern.
    """

    name: ClassVar[str] = "bitmap"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        _mask.check_tile(self.name, tile)
        strips = tile[0] // _mask.ROWS
        return (
            Plane("masks", "i32", (strips, tile[1] // 2)),
            Plane("starts", "i32", (strips,)),
            Plane("values", dtype, (), PlaneKind.RAGGED),
        )

    def encode(self, tiles: Tensor) -> Planes:
        ordered = _mask.in_order(tiles, tiles.dtype == torch.bfloat16)
        kept = bits(ordered).ne(0)
        strips = kept.flatten(2).sum(2)
        return {
            "masks": _mask.pack_bits(kept),
            "starts": _mask.starts(strips),
            "values": _mask.taken(ordered, kept),
            "values_ptr": _mask.offsets(strips.sum(1)),
        }

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        kept = _mask.unpack_bits(planes["masks"])
        values = planes["values"]
        ordered = values.new_zeros(kept.shape).masked_scatter_(kept, values)
        return _mask.as_tiles(ordered, values.dtype == torch.bfloat16)

    def reject(self, tiles: Tensor) -> Tensor:
        return torch.zeros(tiles.shape[0], dtype=torch.bool)

    def keep(self, importance: Tensor) -> Tensor:
        return importance > 0

    def tile_bytes(self, tiles: Tensor, dtype: str) -> Tensor:
        kept = bits(tiles).ne(0).flatten(1).sum(1)
        return kept.double() * TORCH_DTYPES[dtype].itemsize + super().tile_bytes(tiles, dtype)

    def lattice(self, tile: Tile) -> Lattice:
        """As dense: a sweep leaves weights that were pruned before at zero."""
        return Lattice()

    def trainable(self, tile: Tile, dtype: str) -> tuple[str, ...]:
        return ("values",)

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode:
        return TritonDecode(decode_bitmap, {"PAIRED": dtype == "bf16"})

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        arguments = f"const int32_t *masks, const int32_t *starts, const {dtype} *values, const int64_t count"
        return TileMac(
            kept_mac(arguments, "count", dtype),
            decode=kept_decode(arguments, "count", dtype, tile),
            pairs=kept_pairs(arguments, "starts[strip]", tile) if dtype == "bf16" else None,
            dots=kept_dots(arguments, tile) if dtype == "bf16" else None,
            floats=TileFloats(_FLOATS.replace("$arguments", arguments).replace("$T", dtype)),
        )


register_format(Bitmap())
