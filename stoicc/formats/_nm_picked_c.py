"""C code of n:m tiles for processors without matrix units: lanes pick the columns of x that their rows keep.

A product is of kept weights alone, where tiles that are spread multiply zeros as well. That asks for another order of
planes: the kept weights of a row two by two, and for each 32 columns a word that says where they stand, which is as
long as the mask that it replaces.
"""

from string import Template

import torch
from torch import Tensor

from stoicc.codegen.cpu.lanes import from_lanes, from_paired_lanes, to_lanes, to_pairs
from stoicc.formats import _mask
from stoicc.ir.errors import FormatError
from stoicc.ir.format import Planes, Tile, TileMac, TilePairs

UNIT = 32
"""Columns of a word of positions."""
PLACES = 8
"""Positions that fit a word, four bits each: firsts of pairs in its low half, seconds in its high half."""
_MAC = Template("""\
INLINE void {name}(const int32_t *masks, const $T *values, const float *x, float *acc, const int nb)
{
    float room[BK * WIDE] __attribute__((aligned(64)));
    const float *entries = entries_one_by_one(x, room, nb);
    for (int strip = 0; strip < STRIPS; strip++, acc += LANES * nb) {
        vfloat sum[8];
        clear_sums(sum, nb);
        for (int k = 0; k < BK; k += 32, masks += LANES) {
            vint places = vi_load(masks);
            ahead(masks, 64);
            #pragma GCC unroll 4
            for (int i = 0; i < $pairs; i++, values += 2 * LANES) {
                vfloat kept[2];
                ahead(values, 2 * LANES * sizeof *values);
                vf_pair_$T(values, &kept[0], &kept[1]);
                #pragma GCC unroll 2
                for (int j = 0; j < 2; j++) {
                    const int group = (2 * i + j) / $n * $m;
                    vint place = vi_shift_right(places, 4 * i + 16 * j);
                    multiply_add_of_columns(kept[j], place, entries + k, group, $m, sum, 2 * i + j, nb);
                }
            }
        }
        add_sums(acc, sum, nb);
    }
}
""")

_PAIRS = Template("""\
INLINE void {name}(const int32_t *masks, const bf16 *values, const int unit, bf16 *kept)
{
    vint places = vi_load(masks + unit * LANES);
    values += unit * $kept * LANES;
    #pragma GCC unroll 4
    for (int i = 0; i < $pairs; i++) {
        vp_store(kept + 2 * i * LANES, vp_load(values + 2 * i * LANES));
        vp_store(
            kept + ($kept + 2 * i) * LANES, vp_places(places, 4 * i, 16, 2 * i / $n * $m, (2 * i + 1) / $n * $m));
    }
}
""")

_DECODE = Template("""\
static void {name}(const int32_t *masks, const $T *values, $T *out, const int64_t stride)
{
    for (int strip = 0; strip < BM / 16; strip++, out += 16 * stride)
        for (int k = 0; k < BK; k += 32, masks += 16, values += $kept * 16)
            for (int row = 0; row < 16; row++) {
                $T *to = out + row * stride + k;
                memset(to, 0, 32 * sizeof *to);
                #pragma GCC unroll 8
                for (int i = 0; i < $kept; i++)
                    to[i / $n * $m + (masks[row] >> (i / 2 * 4 + i % 2 * 16) & 15)] = values[$place];
            }
}
""")


def can_pick(n: int, m: int, columns: int) -> bool:
    """Whether positions fit a word, and weights of 32 columns come two by two."""
    return m in (4, 8, 16) and n * UNIT // m in range(2, PLACES + 1, 2) and columns % UNIT == 0


def picked_mac(n: int, m: int, tile: Tile, dtype: str, decode: str) -> TileMac | None:
    """The C of n:m tiles whose lanes pick, or None where positions do not fit. `decode` is of the canonical planes."""
    if not can_pick(n, m, tile[1]):
        return None
    kept = n * UNIT // m
    place = "i / 2 * 32 + 2 * row + i % 2" if dtype == "bf16" else "16 * i + row"
    names = {"T": dtype, "n": str(n), "m": str(m), "kept": str(kept), "pairs": str(kept // 2), "place": place}
    pairs = TilePairs(_PAIRS.substitute(names), UNIT, least_in_vectors=1, picked=kept) if dtype == "bf16" else None

    def pack(planes: Planes) -> Planes:
        return _pack(planes, n, m, tile)

    def unpack(packed: Planes, tile: Tile) -> Planes:
        return _unpack(packed, n, m, tile)

    return TileMac(
        _MAC.substitute(names),
        pack,
        decode,
        pairs=pairs,
        unpack=unpack,
        decode_packed=_DECODE.substitute(names),
    )


def _pack(planes: Planes, n: int, m: int, tile: Tile) -> Planes:
    """Masks and values in the order of bits -> words of positions and pairs of values, in lanes."""
    masks, values = planes["masks"], planes["values"]
    paired, bits = values.dtype == torch.bfloat16, _mask.unpack_bits(masks)
    if not bool(masks.any() | values.any()):  # planes of zeros, of which only the size is asked
        bits = _mask.in_order((torch.arange(tile[1]) % m < n).expand(masks.shape[0], *tile), paired)
    kept = _mask.as_tiles(bits, paired)
    if not bool(kept.unflatten(2, (-1, m)).sum(3, dtype=torch.uint8).eq(n).all()):
        raise FormatError(
            f"format nm: expected masks that keep {n} of each {m}, found a group of another number; encode them again"
        )
    ordered = values.new_zeros(bits.numel()).index_copy_(0, _mask.places(bits), values.flatten()).view(bits.shape)
    own, stored = _mask.places(kept), (*kept.shape[:2], tile[1] * n // m)
    positions = (own % m).to(torch.uint8).view(stored).unflatten(2, (-1, n * UNIT // m))
    whole = _mask.as_tiles(ordered, paired).flatten().index_select(0, own).view(stored)
    return {"masks": to_lanes(_words(positions)), "values": to_pairs(to_lanes(whole))}


def _words(places: Tensor) -> Tensor:
    """Positions u8 `[T, BM, words, C]` in their groups -> int32 `[T, BM, words]`."""
    words = torch.zeros(places.shape[:3], dtype=torch.int32)
    for index, shift in enumerate(_shifts(places.shape[3])):
        words |= places[..., index].int() << shift
    return words


def _shifts(kept: int) -> list[int]:
    """Of each kept weight of 32 columns, where its position stands in a word."""
    return [index // 2 * 4 + index % 2 * 16 for index in range(kept)]


def _unpack(packed: Planes, n: int, m: int, tile: Tile) -> Planes:
    """The inverse of `_pack`."""
    words = from_lanes(packed["masks"], tile[0])
    values = from_paired_lanes(packed["values"], tile[0], tile[1] * n // m)
    places = torch.stack([words >> shift & 15 for shift in _shifts(n * UNIT // m)], -1)
    columns = places.flatten(2).unflatten(2, (-1, n)).long()
    groups = (words.shape[0], tile[0], tile[1] // m, m)
    kept = torch.zeros(groups, dtype=torch.bool).scatter_(3, columns, True).flatten(2)
    whole = values.new_zeros(groups).scatter_(3, columns, values.view(columns.shape)).flatten(2)
    paired = values.dtype == torch.bfloat16
    bits = _mask.in_order(kept, paired)
    stored = tile[0] * tile[1] * n // m
    return {"masks": _mask.pack_bits(bits), "values": _mask.taken(_mask.in_order(whole, paired), bits).view(-1, stored)}
