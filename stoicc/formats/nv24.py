"""2:4 tiles: at most two of every four consecutive weights along K are not zero.

Source: the structured sparsity of NVIDIA's sparse tensor cores (Mishra et al. 2021,
arXiv 2104.08378, section 3).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from stoicc.codegen.cpu.lanes import from_paired_lanes, to_lanes, to_pairs
from stoicc.formats import _lane_order, _nm
from stoicc.formats._device import load_words, spread_values
from stoicc.formats._halves import packs_halves, spread_pairs, two_columns
from stoicc.formats._nm_c import position_words
from stoicc.ir.dtypes import TORCH_DTYPES, bits
from stoicc.ir.format import (
    Approximation,
    Fragment,
    Plane,
    Planes,
    Tile,
    TileFloats,
    TileFormat,
    TileMac,
    TilePairs,
    TritonDecode,
    squared_error,
)
from stoicc.ir.fragment import Operands
from stoicc.ir.lattice import Lattice
from stoicc.ir.registry import register_format


@triton.jit
def decode_nv24(values, positions, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    """Two kept values of each four at their columns, zeros between them."""
    if packs_halves(DTYPE) and BK >= 32:
        pairs = load_words(values, BM, BK // 4)
        tile = two_columns(spread_pairs(pairs, 0, positions, BM, BK), DTYPE)
    else:
        kept = tl.load(values + tl.arange(0, BM)[:, None] * (BK // 2) + tl.arange(0, BK // 2)[None, :])
        tile = spread_values(kept, positions, BM, BK)
    return tile


_MAC = """\
INLINE void {name}(
    const $T *values, const int32_t *positions, const float *x, float *acc, const int nb)
{
    float room[COLUMNS * WIDE] __attribute__((aligned(64)));
    x = columns_to_pick(x, room, nb);
    for (int strip = 0; strip < STRIPS; strip++, acc += LANES * nb) {
        vfloat sum[8];
        clear_sums(sum, nb);
        for (int k = 0; k < BK; k += 32, positions += LANES) {
            vint place = vi_load(positions); /* of groups k / 4 .. k / 4 + 7 of each row */
            ahead(positions, 64);
            #pragma GCC unroll 8
            for (int g = 0; g < $groups; g++, values += 2 * LANES) {
                vfloat kept[2];
                ahead(values, 2 * LANES * sizeof *values);
                vf_pair_$T(values, &kept[0], &kept[1]);
                #pragma GCC unroll 2
                for (int i = 0; i < 2; i++)
                    multiply_add_picked(
                        kept[i], vi_shift_right(place, place_shift(g, i)), x, k + 4 * g, sum, 2 * g + i, nb);
            }
        }
        add_sums(acc, sum, nb);
    }
}
"""

_PAIRS = """\
INLINE void {name}(const bf16 *values, const int32_t *positions, const int unit, bf16 *pairs)
{
    values += unit * {columns} / 2 * LANES;
    positions += unit * ({columns} / 32) * LANES;
    for (int k = 0; k < {columns}; k += 32, positions += LANES) {
        vint place = vi_load(positions);
        ahead(positions, 64);
        #pragma GCC unroll 8
        for (int g = 0; g < 8; g++, values += 2 * LANES) {
            ahead(values, 64);
            vp_spread(pairs + (k + 4 * g) * LANES, vp_load(values), vp_place(place, g));
        }
    }
}
"""

_PICKS = """\
INLINE void {name}(const bf16 *values, const int32_t *positions, const int unit, bf16 *kept)
{
    vint place = vi_load(positions + unit * LANES);
    ahead(positions + unit * LANES, 64);
    values += unit * 16 * LANES;
    #pragma GCC unroll 8
    for (int g = 0; g < 8; g++, values += 2 * LANES) {
        ahead(values, 64);
        vp_store(kept + g * 2 * LANES, vp_load(values));
        vp_store(kept + (8 + g) * 2 * LANES, vp_columns(place, g));
    }
}
"""

_FLOATS = """\
INLINE void {name}(const $T *values, const int32_t *positions, const int strip, float *weights)
{
    values += strip * (BK / 2) * LANES;
    positions += strip * ((BK + 31) / 32) * LANES;
    for (int k = 0; k < BK; k += 32, positions += LANES) {
        vint place = vi_load(positions);
        ahead(positions, 64);
        #pragma GCC unroll 8
        for (int g = 0; g < $groups; g++, values += 2 * LANES, weights += 4 * LANES) {
            vfloat kept[2];
            ahead(values, 2 * LANES * sizeof *values);
            vf_pair_$T(values, &kept[0], &kept[1]);
            vf_spread4(weights, kept, vi_shift_right(place, place_shift(g, 0)));
        }
    }
}
"""

_DECODE = """\
static void {name}(const $T *values, const uint8_t *positions, $T *out, const int64_t stride)
{
    for (int row = 0; row < BM; row++, out += stride) {
        memset(out, 0, BK * sizeof *out);
        for (int k = 0; k < BK; k += 8, values += 4) { /* a byte places four of eight columns */
            int place = *positions++;
            out[k + (place & 3)] = values[0];
            out[k + (place >> 2 & 3)] = values[1];
            out[k + 4 + (place >> 4 & 3)] = values[2];
            out[k + 4 + (place >> 6)] = values[3];
        }
    }
}
"""


@dataclass(frozen=True)
class Nv24(TileFormat):
    """Two kept values of each group of four, and their columns in a nibble.

    A -0.0 counts as a weight that must be kept: dropping it would change its sign.
    """

    name: ClassVar[str] = "nv24"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        rows, columns = tile
        return (
            Plane("values", dtype, (rows, columns // 2)),
            Plane("positions", "u8", (rows, columns // 8)),
        )

    def encode(self, tiles: Tensor) -> Planes:
        values, positions = _nm.compress(tiles, _nm.group_masks(bits(tiles).ne(0)))
        return {"values": values, "positions": positions}

    def lattice(self, tile: Tile) -> Lattice:
        return Lattice(keep=(2, 4))

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        values = planes["values"]
        return _nm.expand(values, planes["positions"], values.new_zeros(values.shape[0], *tile))

    def reject(self, tiles: Tensor) -> Tensor:
        return _nm.overfull(bits(tiles).ne(0))

    def why(self, tile: Tensor) -> str:
        return f"{_nm.first_overfull(tile)}; prune first or add 'dense' to formats"

    def approximate(self, tiles: Tensor, slots: Tensor, statistics: Tensor | None = None) -> Approximation:
        magnitude = tiles.float().abs()
        kept = _nm.top2(magnitude if statistics is None else magnitude * statistics[:, None, :].sqrt())
        planes = self.encode(tiles.where(kept, 0))
        return Approximation(planes, squared_error(tiles, tiles.where(kept, 0), statistics))

    def keep(self, importance: Tensor) -> Tensor:
        return _nm.top2(importance)

    def trainable(self, tile: Tile, dtype: str) -> tuple[str, ...]:
        return ("values",)

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode:
        return TritonDecode(decode_nv24)

    def fragment(self, tile: Tile, dtype: str) -> Fragment | None:
        if dtype not in ("f16", "bf16"):
            return None

        def planes(operands: Operands, tile: Tile) -> Planes:
            assert operands.positions is not None
            return {"values": operands.values.view(TORCH_DTYPES[dtype]), "positions": operands.positions}

        return Fragment(
            16,
            lambda planes, tile: Operands(planes["values"].view(torch.int16), planes["positions"]),
            planes,
            sparse=True,
        )

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        def pack(planes: Planes) -> Planes:
            values = to_pairs(to_lanes(planes["values"]))
            return {"values": values, "positions": position_words(planes["positions"], 1)}

        def unpack(packed: Planes, tile: Tile) -> Planes:
            values = from_paired_lanes(packed["values"], tile[0], tile[1] // 2)
            return {"values": values, "positions": _lane_order.positions(packed["positions"], tile, 1)}

        whole = tile[1] % 32 == 0
        groups = "8" if whole else "(BK - k < 32 ? (BK - k) / 4 : 8)"
        source, floats = (text.replace("$T", dtype).replace("$groups", groups) for text in (_MAC, _FLOATS))
        pairs = TilePairs(_PAIRS, tile[1]) if dtype == "bf16" and whole else None
        return TileMac(
            source,
            pack,
            _DECODE.replace("$T", dtype),
            pairs=pairs,
            unpack=unpack,
            floats=TileFloats(floats, least=192),
            picks=TilePairs(_PICKS, 32, least_in_vectors=1, least_blocked=192) if pairs else None,
        )


register_format(Nv24())
