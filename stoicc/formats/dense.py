"""Dense tiles: every weight as it is."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from stoicc.codegen.cpu.lanes import from_paired_lanes, to_lanes, to_pairs
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.format import Fragment, Plane, Planes, Tile, TileFloats, TileFormat, TileMac, TilePairs, TritonDecode
from stoicc.ir.fragment import Operands
from stoicc.ir.lattice import Lattice
from stoicc.ir.registry import register_format


@triton.jit
def decode_dense(values, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    """The tile as it is stored."""
    return tl.load(values + tl.arange(0, BM)[:, None] * BK + tl.arange(0, BK)[None, :])


_MAC = """\
INLINE void {name}(const $T *values, const float *x, float *acc, const int nb)
{
    for (int strip = 0; strip < STRIPS; strip++, acc += LANES * nb) {
        vfloat sum[8];
        clear_sums(sum, nb);
        for (int k = 0; k < COLUMNS; k += 4, values += 4 * LANES) {
            vfloat w[4];
            ahead(values, 4 * LANES * sizeof *values);
            vf_pair_$T(values, &w[0], &w[1]);
            vf_pair_$T(values + 2 * LANES, &w[2], &w[3]);
            #pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                multiply_add(w[i], x + k * nb + i, sum, i, nb);
        }
        add_sums(acc, sum, nb);
    }
}
"""

_PAIRS = """\
INLINE void {name}(const bf16 *values, const int unit, bf16 *pairs)
{
    values += unit * {columns} * LANES;
    for (int k = 0; k < {columns}; k += 2, values += 2 * LANES) {
        ahead(values, 64);
        vp_store(pairs + k * LANES, vp_load(values));
    }
}
"""

_FLOATS = """\
INLINE void {name}(const $T *values, const int strip, float *weights)
{
    values += strip * COLUMNS * LANES;
    for (int k = 0; k < COLUMNS; k += 2, values += 2 * LANES, weights += 2 * LANES) {
        vfloat first, second;
        ahead(values, 2 * LANES * sizeof *values);
        vf_pair_$T(values, &first, &second);
        vf_store_f32(weights, first);
        vf_store_f32(weights + LANES, second);
    }
}
"""

_DECODE = """\
static void {name}(const $T *values, $T *out, const int64_t stride)
{
    for (int row = 0; row < BM; row++)
        memcpy(out + row * stride, values + row * BK, BK * sizeof *out);
}
"""


_DECODE_PACKED = """\
static void {name}(const $T *values, $T *out, const int64_t stride)
{
    enum { COLUMNS = (BK + 3) / 4 * 4 };
    for (int row = 0; row < BM; row += 16, values += COLUMNS * 16)
        strip_rows_$T(values, out + row * stride, stride, BM - row < 16 ? BM - row : 16, BK);
}
"""


@dataclass(frozen=True)
class Dense(TileFormat):
    """Values `[BM, BK]` in the weight's dtype; holds any tile."""

    name: ClassVar[str] = "dense"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return (Plane("values", dtype, tile),)

    def encode(self, tiles: Tensor) -> Planes:
        return {"values": tiles}

    def lattice(self, tile: Tile) -> Lattice:
        return Lattice()

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        return planes["values"]

    def reject(self, tiles: Tensor) -> Tensor:
        return torch.zeros(tiles.shape[0], dtype=torch.bool)

    def trainable(self, tile: Tile, dtype: str) -> tuple[str, ...]:
        return ("values",)

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode:
        return TritonDecode(decode_dense)

    def fragment(self, tile: Tile, dtype: str) -> Fragment | None:
        if dtype not in ("f16", "bf16"):
            return None
        return Fragment(
            16,
            lambda planes, tile: Operands(planes["values"].view(torch.int16)),
            lambda operands, tile: {"values": operands.values.view(TORCH_DTYPES[dtype])},
        )

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        columns = -(-tile[1] // 4) * 4
        pairs = TilePairs(_PAIRS, tile[1], least_in_vectors=1, least_blocked=96)
        return TileMac(
            _MAC.replace("$T", dtype),
            lambda planes: {"values": to_pairs(to_lanes(planes["values"], columns))},
            _DECODE.replace("$T", dtype),
            pairs=pairs if dtype == "bf16" and tile[1] % 32 == 0 else None,
            unpack=lambda packed, tile: {"values": from_paired_lanes(packed["values"], *tile)},
            decode_packed=_DECODE_PACKED.replace("$T", dtype),
            floats=TileFloats(_FLOATS.replace("$T", dtype)),
        )


register_format(Dense())
