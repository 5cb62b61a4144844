"""C code of group-sparse int4: kept groups to the lanes of their rows, in the first-level cache, then the C of int4."""

import re
import textwrap
from dataclasses import replace
from string import Template

import torch

from stoicc.formats import _affine_c
from stoicc.formats._affine import unpack_nibbles
from stoicc.formats._lane_order import bf16_words
from stoicc.ir.format import Planes, Tile, TileMac, TilePairs

_ARGUMENTS = """\
const int16_t *masks, const int32_t *starts, const int32_t *codes, const int64_t words,
    const $T *scales, const int64_t kept"""
_ZERO_ARGUMENTS = ", const $byte *zeros, const int64_t again"

_SPREAD = Template("""\
/* Group `at` of a tile (of groups x strips) from where it is kept: codes, scales$and_zeros of sixteen rows. */
INLINE void {name}_spread(
    const uint32_t mask, const int32_t *codes, const $T *scales,$zeros_in
    int32_t *codes_to, $T *scales_to$zeros_out)
{
    const int count = __builtin_popcount(mask);
    ahead(codes, $size * 8);
    #pragma GCC unroll 8
    for (int w = 0; w < $size / 8; w++)
        spread_words(mask, codes + w * count, 0x88888888, codes_to + w * LANES);
    spread_$T(mask, scales, scales_to);
$zero_step}
""")

_TILE = Template("""\
INLINE void {name}(
    $arguments, const $x *x, float *acc, const int nb)
{
    enum { GROUPS = BK / $size };
    int32_t whole[BM * BK / 8] __attribute__((aligned(64)));
    $T factor[STRIPS * GROUPS * LANES] __attribute__((aligned(64)));
$zero_array    int first = 0; /* groups kept before */
    #pragma GCC unroll 2
    for (int i = 0; i < STRIPS * GROUPS; i++) {
        const uint32_t mask = (uint16_t)masks[i];
        {name}_spread(
            mask, codes + first * ($size / 8), scales + first,$zero_from
            whole + i * ($size / 8) * LANES, factor + i * LANES$zero_to);
        first += __builtin_popcount(mask);
    }
    {name}_values(whole, factor,$zero_given x, acc, nb);
}
""")

_UNIT = Template("""\
INLINE vfloat {name}(
    $arguments, const int unit, $element *to)
{
    enum { GROUPS = BK / $size, PER = $size / $columns }; /* units of a group */
    const int at = unit / PER;
    int32_t whole[BM * BK / 8] __attribute__((aligned(64)));
    $T factor[STRIPS * GROUPS * LANES] __attribute__((aligned(64)));
$zero_array    int first = starts[at / GROUPS];
    for (int i = at / GROUPS * GROUPS; i < at; i++)
        first += __builtin_popcount((uint16_t)masks[i]);
    {name}_spread(
        (uint16_t)masks[at], codes + first * ($size / 8), scales + first,$zero_from
        whole + at * ($size / 8) * LANES, factor + at * LANES$unit_zero_to);
    return {name}_values(whole, factor,$zero_given unit, to);
}
""")

_STRIP = Template("""\
INLINE void {name}(
    $arguments, const int unit, bf16 *pairs)
{
    enum { GROUPS = BK / $size };
    masks += unit * GROUPS;
    int first = starts[unit];
    for (int group = 0; group < GROUPS; group++, pairs += $size * LANES) {
        int32_t word[$size / 8 * LANES] __attribute__((aligned(64)));
        bf16 factor[LANES] __attribute__((aligned(64)));
$strip_zero        const uint32_t mask = (uint16_t)masks[group];
        {name}_spread(
            mask, codes + first * ($size / 8), scales + first,$zero_from
            word, factor$strip_zero_to);
        first += __builtin_popcount(mask);
        #pragma GCC unroll 8
        for (int k = 0; k < $size; k += 2)
            vp_store(pairs + k * LANES, $pair);
        vp_scale(pairs, $size, vf_load_bf16(factor));
    }
}
""")

_DOTS = Template("""\
INLINE vfloat {name}(
    $arguments, const int unit, bf16 *pairs, int64_t *place)
{
    enum { SIZE = $columns, PER = $size / SIZE }; /* units of a group */
    static const bf16 value[32] __attribute__((aligned(64))) = {
        $values};
    const uint32_t mask = (uint16_t)masks[unit / PER];
    const int count = __builtin_popcount(mask);
    codes += *place * ($size / 8) + unit % PER * (SIZE / 8) * count;
    scales += *place;
$dots_zero    #pragma GCC unroll 4
    for (int k = 0; k < SIZE; k += 8, codes += count) {
        vint eight = vi_kept_words(mask, codes, (int)0x88888888);
        #pragma GCC unroll 4
        for (int j = 0; j < 4; j++) /* columns 0 and 2, 4 and 6, 1 and 3, 5 and 7 */
            vp_store(pairs + (k + j % 2 * 4 + j / 2 * 2) * LANES, $dots_pair);
    }
    if (unit % PER == PER - 1)
        *place += count;
    return vf_kept_bf16(mask, scales);
}
""")

_DECODE = Template("""\
static void {name}(
    $arguments, $T *out, const int64_t stride)
{
    for (int row = 0; row < BM; row++)
        memset(out + row * stride, 0, BK * sizeof *out);
    for (int strip = 0; strip < BM / 16; strip++, out += 16 * stride)
        for (int group = 0; group < BK / $size; group++) {
            const uint32_t all = (uint16_t)*masks++;
            const int count = __builtin_popcount(all);
            for (uint32_t mask = all; mask; mask &= mask - 1, codes++) {
                const float scale = ${T}_to_float(*scales++), zero = $zero;
                $T *to = out + __builtin_ctz(mask) * stride + group * $size;
                for (int k = 0; k < $size; k++) {
                    const uint32_t word = (uint32_t)codes[k / 8 * count];
                    to[k] = float_to_$T(((word >> (k % 4 * 8 + k % 8 / 4 * 4) & 15) - zero) * scale);
                }
            }
            codes += ($size / 8 - 1) * count;
        }
}
""")


def group_sparse_mac(tile: Tile, dtype: str, size: int, zeros: bool) -> TileMac | None:
    """The C for groups of `size` columns; zero points come as int4 packs them, less 8."""
    groups = tile[1] // size
    code = _affine_c.int4_mac(dtype, groups, size, zeros, unpack_nibbles)
    if code is None:
        return None
    arguments = _ARGUMENTS + _ZERO_ARGUMENTS * zeros
    names = {
        "T": dtype,
        "size": str(size),
        "and_zeros": ", zeros" * zeros,
        "zeros_in": " const uint8_t *zeros," * zeros,
        "zeros_out": ", int8_t *zeros_to" * zeros,
        "zero_step": "    spread_bytes(mask, zeros, 8, zeros_to);\n" * zeros,
        "zero_array": "    int8_t zero[STRIPS * GROUPS * LANES] __attribute__((aligned(64)));\n" * zeros,
        "zero_from": " zeros + first," * zeros,
        "zero_to": ", zero + i * LANES" * zeros,
        "unit_zero_to": ", zero + at * LANES" * zeros,
        "zero_given": " zero," * zeros,
        "arguments": arguments.replace("$T", dtype).replace("$byte", "uint8_t"),
        "zero": "*zeros++" if zeros else "8.0f",
        "strip_zero": "        int8_t zero[LANES] __attribute__((aligned(16)));\n" * zeros,
        "strip_zero_to": ", zero" * zeros,
        "pair": "vp_nibble_less(vp_step(vi_load(word + k / 8 * LANES), k % 8 / 2), vp_zero(zero))"
        if zeros
        else "vp_nibble(vp_step(vi_load(word + k / 8 * LANES), k % 8 / 2))",
        "values": textwrap.fill(bf16_words(torch.arange(32) % 16 - 8), 110, subsequent_indent=" " * 8),
        "dots_zero": "    const vint zero = vp_kept_zeros(mask, zeros + *place);\n" * zeros,
        "dots_pair": "vp_codes_less(vi_shift_right(eight, 4 * j), 15, zero)"
        if zeros
        else "vp_look_up(value, vi_shift_right(eight, 4 * j))",
    }

    def function(template: Template, inner: str, **more: str) -> str:
        own = re.sub(r" *ahead\(codes\b[^;]*;\n", "", inner).replace("{name}", "{name}_values")
        return f"{own}\n{_SPREAD.substitute(names)}\n{template.substitute({**names, **more})}"

    def pack(planes: Planes) -> Planes:
        return planes

    pairs, octets = code.pairs, code.octets
    if pairs is not None:
        pairs = replace(pairs.in_units(pairs.columns), least_in_vectors=5, least_blocked=16)
        pairs = replace(pairs, source=function(_UNIT, pairs.source, element="bf16", columns=str(pairs.columns)))
    elif (
        dtype == "bf16" and tile[1] % 32 == 0
    ):  # too few columns under a scale for a tile product: they are scaled first
        pairs = TilePairs(f"{_SPREAD.substitute(names)}\n{_STRIP.substitute(names)}", tile[1], least=8)
    dots = None
    if dtype == "bf16" and size % 16 == 0 and tile[1] % 32 == 0:
        columns = 32 if size % 32 == 0 else 16
        dots = TilePairs(_DOTS.substitute(names, columns=columns), columns, scaled=True, group=size // columns)
        dots = replace(dots, least_in_vectors=1, crossed=True, ordered=True)
    if octets is not None:
        octets = replace(octets, source=function(_UNIT, octets.source, element="int8_t", columns=str(octets.columns)))
    return TileMac(
        function(_TILE, code.source, x="float"),
        pack,
        _DECODE.substitute(names),
        function(_TILE, code.digits, x="int8_t") if code.digits else "",
        pairs,
        octets,
        lambda packed, tile: packed,
        dots=dots,
        code_bits=code.code_bits,
    )
