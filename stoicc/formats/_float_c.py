"""C code of small floats, for the CPU backend.

Codes are multiplied as they are and the sum of a block is scaled once in fp32. Four-bit floats are halves of
whole numbers from -12 to 12, so that integer units take them too; there 12 is added to each.
"""

import textwrap
from string import Template

import torch

from stoicc.codegen.cpu.lanes import from_lanes, to_lanes
from stoicc.formats import _affine_c, _affine_digits, _lane_order
from stoicc.formats._affine import unpack_nibbles
from stoicc.formats._table import e2m1_values, fp8_values
from stoicc.ir.format import LaneCodes, PairsOfCodes, Planes, Tile, TileMac, TilePairs

_FP8 = Template("""\
INLINE void {name}(const uint8_t *codes, const $T *scales, const float *x, float *acc, const int nb)
{
    for (int strip = 0; strip < STRIPS; strip++, acc += LANES * nb) {
        for (int group = 0; group < $groups; group++, scales += LANES) {
            const float *xg = x + group * $size * nb;
            vfloat sum[8];
            clear_sums(sum, nb);
            #pragma GCC unroll 4
            for (int k = 0; k < $size; k += 4, codes += 4 * LANES) {
                vfloat w[4];
                ahead(codes, 4 * LANES);
                vf_pair_$kind(codes, &w[0], &w[1]);
                vf_pair_$kind(codes + 2 * LANES, &w[2], &w[3]);
                #pragma GCC unroll 4
                for (int i = 0; i < 4; i++)
                    multiply_add(w[i], xg + k * nb + i, sum, i, nb);
            }
            add_scaled_sums(acc, vf_mul(vf_load_$T(scales), vf_set1($unit)), sum, nb);
        }
    }
}
""")

_FP8_TABLES = Template("""\
    static const uint8_t low[128] __attribute__((aligned(64))) = {
        $low};
    static const uint8_t high[128] __attribute__((aligned(64))) = {
        $high};
""")

_FP8_PAIRS = Template("""\
INLINE vfloat {name}(const uint8_t *codes, const bf16 *scales, const int unit, bf16 *pairs)
{
${tables}    codes += unit * 32 * LANES;
    #pragma GCC unroll 8
    for (int k = 0; k < 32; k += 4, codes += 4 * LANES) {
        ahead(codes, 4 * LANES);
        vp_look_up_bytes(pairs + k * LANES, codes, low, high);
    }
    return vf_mul(vf_load_bf16(scales + unit / $group * LANES), vf_set1($unit));
}
""")

_FP8_DECODE = Template("""\
static void {name}(const uint8_t *codes, const $T *scales, $T *out, const int64_t stride)
{
    for (int row = 0; row < BM; row++, out += stride)
        for (int k = 0; k < BK; k++)
            out[k] = float_to_$T(${kind}_to_float(*codes++) * ${T}_to_float(scales[row * $groups + k / $size]));
}
""")

_FP4 = Template("""\
INLINE void {name}(
    const int32_t *codes, const uint8_t *scales,$tensor const float *x, float *acc, const int nb)
{
    static const float value[16] = {$values};
    static const int nibble[8] = {$nibbles}; /* of each column */
    for (int strip = 0; strip < STRIPS; strip++, acc += LANES * nb) {
        for (int group = 0; group < $groups; group++, scales += LANES) {
            const float *xg = x + group * $size * nb;
            vfloat sum[8];
            clear_sums(sum, nb);
            #pragma GCC unroll 4
            for (int k = 0; k < $size; k += 8, codes += LANES) {
                vint eight = vi_load(codes);
                ahead(codes, LANES * sizeof *codes);
                #pragma GCC unroll 8
                for (int j = 0; j < 8; j++) {
                    vfloat w = vf_look_up(value, vi_shift_right(eight, 4 * nibble[j]));
                    multiply_add(w, xg + (k + j / 4 * 4) * nb + j % 4, sum, j, nb);
                }
            }
            add_scaled_sums(acc, $scale, sum, nb);
        }
    }
}
""")

_FP4_SIXTEEN = """\
                        ahead(codes, 2 * LANES * sizeof *codes);
                        #pragma GCC unroll 2
                        for (int i = 0; i < 4; i += 2, codes += LANES) {
                            four[i] = vi_load(codes);
                            four[i + 1] = vi_shift_right(four[i], 4);
                        }"""

_FP4_PAIRS = Template("""\
INLINE void {name}(const int32_t *codes, const uint8_t *scales,$tensor const int unit, bf16 *pairs)
{
    static const bf16 value[32] __attribute__((aligned(64))) = {$bf16};
    codes += unit * (BK / 8) * LANES;
    scales += unit * $groups * LANES;
    for (int group = 0; group < $groups; group++, pairs += $size * LANES, scales += LANES) {
        #pragma GCC unroll 4
        for (int k = 0; k < $size; k += 8, codes += LANES) {
            vint eight = vi_load(codes);
            ahead(codes, LANES * sizeof *codes);
            #pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                vp_store(pairs + (k + 2 * j) * LANES, vp_look_up(value, vp_step(eight, j)));
        }
        vp_scale(pairs, $size, $scale);
    }
}
""")

_FP4_DOTS = Template("""\
INLINE vfloat {name}(const int32_t *codes, const uint8_t *scales,$tensor const int unit, bf16 *pairs)
{
    static const bf16 value[32] __attribute__((aligned(64))) = {$bf16};
    codes += unit * ($size / 8) * LANES;
    scales += unit * LANES;
    #pragma GCC unroll 4
    for (int k = 0; k < $size; k += 8, codes += LANES) {
        vint eight = vi_load(codes);
        ahead(codes, LANES * sizeof *codes);
        #pragma GCC unroll 4
        for (int j = 0; j < 4; j++) /* columns 0 and 2, 4 and 6, 1 and 3, 5 and 7 */
            vp_store(pairs + (k + j % 2 * 4 + j / 2 * 2) * LANES, vp_look_up(value, vi_shift_right(eight, 4 * j)));
    }
    return $scale;
}
""")

_FP4_DECODE = Template("""\
static void {name}(
    const uint8_t *codes, const uint8_t *scales,$tensor $T *out, const int64_t stride)
{
    static const float value[16] = {$values};
    for (int row = 0; row < BM; row++, out += stride)
        for (int group = 0; group < $groups; group++) {
            const float scale = ${kind}_to_float(*scales++)$over;
            for (int k = group * $size; k < (group + 1) * $size; k += 2, codes++) {
                out[k] = float_to_$T(value[*codes & 15] * scale);
                out[k + 1] = float_to_$T(value[*codes >> 4] * scale);
            }
        }
}
""")


def fp8_mac(dtype: str, groups: int, size: int, kind: str) -> TileMac | None:
    """The C of 8-bit floats, `groups` groups of `size` columns to a tile; None where size % 4 != 0."""
    if size % 4:
        return None
    # a code of e4m3, read as fp16, is 1/256 of what it means: 448 times any scale is finite, and so is 256 times
    unit = "256" if kind == "e4m3" else "1"
    names = {"T": dtype, "groups": str(groups), "size": str(size), "kind": kind, "unit": unit}
    pairs = looked_up = None
    scale = f"vf_mul(vf_load_{dtype}(scales + at * LANES), vf_set1({unit}))"
    if dtype == "bf16" and size % 32 == 0:
        pairs, looked_up = _fp8_pairs(size, kind, unit)

    def pack(planes: Planes) -> Planes:
        return {name: to_lanes(plane) for name, plane in planes.items()}

    def unpack(packed: Planes, tile: Tile) -> Planes:
        return {name: from_lanes(plane, tile[0]) for name, plane in packed.items()}

    return TileMac(
        _FP8.substitute(names), pack, _FP8_DECODE.substitute(names),
        pairs=pairs, unpack=unpack, pairs_of=looked_up, in_lanes=LaneCodes(scale, floats=f"vf_{kind}(code, j)"),
    )  # fmt: skip


def _fp8_pairs(size: int, kind: str, unit: str) -> tuple[TilePairs, PairsOfCodes]:
    """The code for pairs: what a magnitude is as bf16, which has every one of them, is looked up by byte.

    Codes count as in fp32: e4m3 as 1/256 of what it means, and its NaN, which no weight has, as the number after 448.
    """
    if kind == "e4m3":
        values = torch.cat((fp8_values(torch.arange(127, dtype=torch.uint8), kind), torch.tensor([480.0])))
    else:
        values = fp8_values(torch.arange(128, dtype=torch.uint8), kind)
    words = (values / int(unit)).bfloat16().view(torch.int16).where(values == values, 0x7FC0)
    halves = {"low": words & 0xFF, "high": words >> 8}
    tables = {name: textwrap.fill(", ".join(map(str, half.tolist())), 110) for name, half in halves.items()}
    indented = {name: textwrap.indent(table, " " * 8).strip() for name, table in tables.items()}
    start = _FP8_TABLES.substitute(indented)
    text = _FP8_PAIRS.substitute(tables=start, group=size // 32, unit=unit)
    pairs = TilePairs(text, 32, scaled=True, group=size // 32, least_in_vectors=1, least_blocked=96)
    scale = f"vf_mul(vf_load_bf16(scales + unit / GROUP * LANES), vf_set1({unit}))"
    return pairs, PairsOfCodes(start, "vp_look_up_crossed(pair, code, low, high);", scale, size)


def fp4_mac(dtype: str, groups: int, size: int, kind: str) -> TileMac:
    """The C of 4-bit floats with scales of a kind: e8m0, or e4m3 and a tensor scale."""
    own = kind == "e4m3"
    values = e2m1_values()
    names = {
        "T": dtype,
        "groups": str(groups),
        "size": str(size),
        "kind": kind,
        "tensor": " const float *tensor_scale," if own else "",
        "over": " * *tensor_scale" if own else "",
        "scale": f"vf_load_{kind}(scales)",
        "values": ", ".join(f"{value:.1f}f" for value in values.tolist()),
        "nibbles": ", ".join(str(_affine_c._INT4_ORDER.index(column)) for column in range(8)),
        "bf16": _lane_order.bf16_words(values.repeat(2)),
    }
    if own:
        names["scale"] = f"vf_mul({names['scale']}, vf_set1(*tensor_scale))"
    digits = _affine_digits.Digits(
        groups, size, half=12, zero="vi_set1(1)", zeros=" const float *tensor_scale," * own, next="",
        scale=f"vf_mul({names['scale']}, vf_set1(0.5f))", scale_type="uint8_t", most=32,
        codes="four[i] = vi_twice_e2m1(four[i]);",
    )  # fmt: skip
    at = names["scale"].replace("(scales)", "(scales + at * LANES)")
    in_lanes = LaneCodes(f"vf_mul({at}, vf_set1(0.5f))", signed="vi_sub_bytes(vi_twice_e2m1(code), vi_set_bytes(12))")
    pairs = dots = looked_up = None
    if dtype == "bf16" and groups * size % 32 == 0:
        pairs = TilePairs(_FP4_PAIRS.substitute(names), groups * size, least_blocked=48 if own else 64)
        dots = TilePairs(_FP4_DOTS.substitute(names), size, scaled=True, least_in_vectors=1, crossed=True)
        table = f"    static const bf16 value[32] __attribute__((aligned(64))) = {{{names['bf16']}}};\n"
        start = f"{table}    scales += unit / GROUP * LANES;\n"
        looked_up = PairsOfCodes(start, _affine_c.by_turns("vp_look_up(value, code)"), names["scale"], size)

    def pack(planes: Planes) -> Planes:
        codes = _lane_order.nibble_lanes(unpack_nibbles(planes["codes"]) ^ 8, groups, _affine_c._INT4_ORDER)
        return {**planes, "codes": codes, "scales": to_lanes(planes["scales"])}

    def unpack(packed: Planes, tile: Tile) -> Planes:
        codes = _lane_order.nibble_codes(packed, tile, groups)["codes"] ^ 0x88
        return {**packed, "codes": codes, "scales": from_lanes(packed["scales"], tile[0])}

    return TileMac(
        _FP4.substitute(names), pack, _FP4_DECODE.substitute(names),
        _affine_digits.of_words(digits, _FP4_SIXTEEN), pairs,
        unpack=unpack, dots=dots, code_bits=5, digits_of=digits.text, pairs_of=looked_up, in_lanes=in_lanes,
    )  # fmt: skip
