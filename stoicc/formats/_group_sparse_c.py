"""C code of group-sparse int4: kept groups to the lanes of their rows, in the first-level cache, then the C of int4."""

import re
import textwrap
from dataclasses import replace
from string import Template

import torch

from stoicc.codegen.cpu.lanes import LANES
from stoicc.formats import _affine_c
from stoicc.formats._affine import unpack_nibbles
from stoicc.formats._lane_order import bf16_words
from stoicc.ir.format import NEVER, Tile, TileMac, TilePairs

_ARGUMENTS = """\
const int16_t *masks, const int32_t *codes, const int64_t words, const $T *scales, const int64_t kept"""
_ZERO_ARGUMENTS = ", const uint8_t *zeros, const int64_t again"

_FEW_KEPT = 0.75
"""Share of the groups up to which a product of those that are kept alone pays at a large batch too."""

_ROWS = Template("""\
/* Rows that keep a group of the same columns are neighbours in lanes, whatever rows they are, so that what is dropped
 * takes no time; their sums go to the lanes of the rows afterwards, those of a few columns of groups at once. */
INLINE void {name}(
    $arguments, const $x *x, float *acc, const int nb)
{
    enum { GROUPS = BK / $size, FEW = $few, WORDS = $size / 8, ROOM = BM + LANES };
    float sums[FEW * ROOM * WIDE] __attribute__((aligned(64)));
$begin    for (int first = 0; first < GROUPS; first += FEW, masks += FEW * STRIPS) {
        int count[FEW + 1], vectors = 0; /* of rows; of lanes, and one where no row keeps a group */
        for (int i = 0; i < FEW; i++) {
            count[i] = kept_rows(masks + i * STRIPS);
            vectors += (count[i] + LANES - (count[i] > 0)) / LANES;
        }
        for (int i = 0, column = 0, row = 0; i < vectors; i++) {
            const int group = first + column, all = count[column], rows = all - row;
            const int32_t *own = codes + row; /* words of a row are so many apart as rows keep the group */
            const vfloat scale = vf_load_first_$T(scales + row, rows);
            float *to = sums + column * ROOM * nb + row;
            ahead(own, WORDS * 64);
$own_zeros$multiply
            row += LANES;
            const int over = -(row >= all); /* no branch: nobody could foretell it */
            codes += over & all * WORDS;
            scales += over & all;
$next            column -= over;
            row &= ~over;
        }
        add_kept_rows(sums, ROOM, masks, FEW, acc, nb);
    }
}
""")

_OF_FLOATS = Template("""\
            const float *xg = x + group * $size * nb;
            vfloat sum[8];
            clear_sums(sum, nb);
            #pragma GCC unroll 2
            for (int k = 0; k < $size; k += 8, own += all) {
                vint eight = vi_load_first(own, rows);
                #pragma GCC unroll 8
                for (int j = 0; j < 8; j++)
                    multiply_add($weight, xg + (k + j / 4 * 4) * nb + j % 4, sum, j, nb);
            }
            #pragma GCC unroll 8
            for (int n = 0; n < nb; n++)
                vf_store_f32(to + n * ROOM, vf_mul(scale, total(sum, n, nb)));""")

_DIGITS_BEGIN = Template("""\
    const int few = few_digits(nb); /* entries whose sums the registers hold */
    int32_t below[GROUPS * 3 * WIDE]; /* what zero points take from the sums of a group */
    for (int group = 0; group < GROUPS; group++)
        total_digits(digit_sums(x, nb) + group * ($size / 16 * 3) * nb, $size, -$half, below + 3 * nb * group, nb);
""")

_OF_DIGITS = Template("""\
            for (int n = 0; n < nb; n += few) {
                const int8_t *xg = x + (group * $size * nb + 16 * n) * 3;
                vint sum[12];
                start_digit_sets(sum, below + 3 * (nb * group + n), $digit_zero, few);
                #pragma GCC unroll 2
                for (int k = 0; k < $size; k += 16, xg += 48 * nb) {
                    vint four[4];
                    #pragma GCC unroll 2
                    for (int i = 0; i < 2; i++) {
                        vint eight = vi_load_first(own + (k / 8 + i) * all, rows);
                        four[2 * i] = vi_and(eight, 0x0f0f0f0f);
                        four[2 * i + 1] = vi_and(vi_shift_right(eight, 4), 0x0f0f0f0f);
                    }
                    multiply_add_digits(four, xg, sum, few);
                }
                join_digit_sets(sum, few);
                #pragma GCC unroll 4
                for (int i = 0; i < few; i++) {
                    vfloat all_digits = joined_digits(sum + 3 * i, digit_units(x, nb)[n + i], $fits);
                    vf_store_f32(to + (n + i) * ROOM, vf_mul(all_digits, scale));
                }
            }""")

_OF_PAIRS = Template("""\
            static const bf16 value[32] __attribute__((aligned(64))) = {
                $values};
            vfloat sum[8];
            clear_dots(sum, nb);
            #pragma GCC unroll 2
            for (int k = 0; k < $size; k += 16) {
                bf16 pairs[16 * LANES] __attribute__((aligned(64)));
                #pragma GCC unroll 2
                for (int w = 0; w < 16; w += 8, own += all) {
                    vint eight = vi_load_first(own, rows);
                    #pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) /* columns 0 and 2, 4 and 6, 1 and 3, 5 and 7 */
                        vp_store(pairs + (w + j % 2 * 4 + j / 2 * 2) * LANES, $dots_pair);
                }
                add_dots(sum, pairs, 16, x + (group * $size + k) * nb, nb);
            }
            #pragma GCC unroll 8
            for (int n = 0; n < nb; n++)
                vf_store_f32(to + n * ROOM, vf_mul(scale, total_dots(sum, n, nb)));""")

_SPREAD = Template("""\
/* A group of a strip from where it is kept, its words so many apart: codes, scales$and_zeros of sixteen rows. */
INLINE void {name}_spread(
    const uint32_t mask, const int apart, const int32_t *codes, const $T *scales,$zeros_in
    int32_t *codes_to, $T *scales_to$zeros_out)
{
    #pragma GCC unroll 8
    for (int w = 0; w < $size / 8; w++)
        spread_words(mask, codes + w * apart, 0x88888888, codes_to + w * LANES);
    spread_$T(mask, scales, scales_to);
$zero_step}
""")

_UNIT = Template("""\
INLINE vfloat {name}(
    $arguments, const int unit, $element *to)
{
    enum { GROUPS = BK / $size, PER = $size / $columns }; /* units of a group */
    const int at = unit / PER, strip = at / GROUPS, group = at % GROUPS;
    int32_t whole[BM * BK / 8] __attribute__((aligned(64)));
    $T factor[STRIPS * GROUPS * LANES] __attribute__((aligned(64)));
$zero_array    const int16_t *own = masks + group * STRIPS;
    const int before = kept_before(masks, 0, group * STRIPS), first = before + kept_before(own, 0, strip);
    {name}_spread(
        (uint16_t)own[strip], kept_rows(own), codes + before * ($size / 8) + first - before, scales + first,$zero_from
        whole + at * ($size / 8) * LANES, factor + at * LANES$unit_zero_to);
    return {name}_values(whole, factor,$zero_given unit, to);
}
""")

_STRIP = Template("""\
INLINE void {name}(
    $arguments, const int unit, bf16 *pairs)
{
    enum { GROUPS = BK / $size };
    for (int group = 0; group < GROUPS; group++, masks += STRIPS, pairs += $size * LANES) {
        int32_t word[$size / 8 * LANES] __attribute__((aligned(64)));
        bf16 factor[LANES] __attribute__((aligned(64)));
$strip_zero        const int all = kept_rows(masks), first = kept_before(masks, 0, unit);
        {name}_spread(
            (uint16_t)masks[unit], all, codes + first, scales + first,$zero_from
            word, factor$strip_zero_to);
        codes += all * ($size / 8);
        scales += all;
$strip_next        #pragma GCC unroll 8
        for (int k = 0; k < $size; k += 2)
            vp_store(pairs + k * LANES, $pair);
        vp_scale(pairs, $size, vf_load_bf16(factor));
    }
}
""")

_DECODE = Template("""\
static void {name}(
    $arguments, $T *out, const int64_t stride)
{
    for (int row = 0; row < BM; row++)
        memset(out + row * stride, 0, BK * sizeof *out);
    for (int group = 0; group < BK / $size; group++, masks += BM / 16) {
        int all = 0;
        for (int strip = 0; strip < BM / 16; strip++)
            all += __builtin_popcount((uint16_t)masks[strip]);
        for (int strip = 0; strip < BM / 16; strip++)
            for (uint32_t mask = (uint16_t)masks[strip]; mask; mask &= mask - 1, codes++) {
                const float scale = ${T}_to_float(*scales++), zero = $zero;
                $T *to = out + (strip * 16 + __builtin_ctz(mask)) * stride + group * $size;
                for (int k = 0; k < $size; k++) {
                    const uint32_t word = (uint32_t)codes[k / 8 * all];
                    to[k] = float_to_$T(((word >> (k % 4 * 8 + k % 8 / 4 * 4) & 15) - zero) * scale);
                }
            }
        codes += ($size / 8 - 1) * all;
    }
}
""")


def group_sparse_mac(tile: Tile, dtype: str, size: int, zeros: bool, share: float) -> TileMac | None:
    """The C for groups of `size` columns, of which about a share is kept."""
    code = _affine_c.int4_mac(dtype, tile[1] // size, size, zeros, unpack_nibbles)
    if code is None:
        return None
    names = _names(dtype, size, zeros) | {"few": str(_few(tile, size))}

    def rows(multiply: Template, x: str, begin: str = "") -> str:
        return _ROWS.substitute(names, x=x, begin=begin, multiply=multiply.substitute(names))

    def function(template: Template, inner: str, **more: str) -> str:
        own = re.sub(r" *ahead\(codes\b[^;]*;\n", "", inner).replace("{name}", "{name}_values")
        return f"{own}\n{_SPREAD.substitute(names)}\n{template.substitute({**names, **more})}"

    pairs, octets = code.pairs, code.octets
    if pairs is not None:
        pairs = replace(pairs.in_units(pairs.columns), least_blocked=NEVER if share <= _FEW_KEPT else 64)
        pairs = replace(pairs, source=function(_UNIT, pairs.source, element="bf16", columns=str(pairs.columns)))
    elif dtype == "bf16" and tile[1] % 32 == 0:
        # too few columns under a scale for a tile product: they are scaled first
        pairs = TilePairs(f"{_SPREAD.substitute(names)}\n{_STRIP.substitute(names)}", tile[1], least=8)
        pairs = replace(pairs, least_blocked=16 if size % 16 else 96 if share <= _FEW_KEPT else 48)
    dots = None
    if dtype == "bf16" and size % 16 == 0 and tile[1] % 32 == 0:
        dots = TilePairs(rows(_OF_PAIRS, "bf16"), tile[1], least_in_vectors=1, crossed=True, whole=True)
    if octets is not None:
        octets = replace(octets, source=function(_UNIT, octets.source, element="int8_t", columns=str(octets.columns)))
    return TileMac(
        rows(_OF_FLOATS, "float"),
        decode=_DECODE.substitute(names),
        digits=rows(_OF_DIGITS, "int8_t", _DIGITS_BEGIN.substitute(names)) if size % 16 == 0 else "",
        pairs=pairs,
        octets=octets,
        unpack=lambda packed, tile: packed,
        dots=dots,
        code_bits=code.code_bits,
    )


def _few(tile: Tile, size: int) -> int:
    """Columns of groups, a divisor of a tile's, whose sums of 8 batch entries take at most 32 KB."""
    groups = tile[1] // size
    able = [n for n in range(1, groups + 1) if groups % n == 0 and n * (tile[0] + LANES) * 8 * 4 <= 32768]
    return max(able, default=1)


def _names(dtype: str, size: int, zeros: bool) -> dict[str, str]:
    """What the templates need."""
    arguments = _ARGUMENTS + _ZERO_ARGUMENTS * zeros
    nibble = "vf_nibble_less_8(eight, j % 4 * 2 + j / 4)"
    return {
        "T": dtype,
        "size": str(size),
        "half": "1" if zeros else "8",
        "fits": str(int(257 * 128 * 16 * size < 1 << 31)),  # 257 times a sum of digits
        "arguments": arguments.replace("$T", dtype),
        "own_zeros": "            int8_t zero[LANES] __attribute__((aligned(16)));\n"
        "            bytes_less(zeros + row, rows, 8, zero);\n" * zeros,
        "next": "            zeros += over & all;\n" * zeros,
        "weight": f"vf_sub({nibble}, vf_load_i8(zero))" if zeros else nibble,
        "digit_zero": "vi_zero_points(zero, 8)" if zeros else "vi_set1(1)",
        "values": textwrap.fill(bf16_words(torch.arange(32) % 16 - 8), 110, subsequent_indent=" " * 16),
        "dots_pair": "vp_codes_less(vi_shift_right(eight, 4 * j), 15, vp_zero(zero))"
        if zeros
        else "vp_look_up(value, vi_shift_right(eight, 4 * j))",
        "and_zeros": ", zeros" * zeros,
        "zeros_in": " const uint8_t *zeros," * zeros,
        "zeros_out": ", int8_t *zeros_to" * zeros,
        "zero_step": "    spread_bytes(mask, zeros, 8, zeros_to);\n" * zeros,
        "zero_array": "    int8_t zero[STRIPS * GROUPS * LANES] __attribute__((aligned(64)));\n" * zeros,
        "zero_from": " zeros + first," * zeros,
        "unit_zero_to": ", zero + at * LANES" * zeros,
        "zero_given": " zero," * zeros,
        "zero": "*zeros++" if zeros else "8.0f",
        "strip_zero": "        int8_t zero[LANES] __attribute__((aligned(16)));\n" * zeros,
        "strip_zero_to": ", zero" * zeros,
        "strip_next": "        zeros += all;\n" * zeros,
        "pair": "vp_nibble_less(vp_step(vi_load(word + k / 8 * LANES), k % 8 / 2), vp_zero(zero))"
        if zeros
        else "vp_nibble(vp_step(vi_load(word + k / 8 * LANES), k % 8 / 2))",
    }
