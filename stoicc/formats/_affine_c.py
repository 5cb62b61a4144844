"""C code and lane order of the affine formats, for the CPU backend.

Codes are multiplied in fp32 and the sum of a group is scaled once; no weight is ever rounded to
the weight's dtype. Symmetric codes are stored signed. A zero point is taken from each code: taken
once from the sum of a group, as zero * sum(x), an infinite x would give infinity - infinity.
"""

from collections.abc import Callable
from string import Template

import torch
from torch import Tensor

from stoicc.codegen.cpu.lanes import to_lanes
from stoicc.formats._nm_c import position_words
from stoicc.ir.format import Planes, TileMac

Unpack = Callable[[Tensor], Tensor]
"""Packed nibbles u8 `[..., n / 2]` -> codes u8 `[..., n]`."""

_TILE = Template("""\
INLINE void {name}(
    const $code *codes,$positions const $T *scales,$zeros
    const float *x, float *acc, const int nb)
{
    for (int strip = 0; strip < STRIPS; strip++, acc += LANES * nb) {
        for (int group = 0; group < $groups; group++) {
            const float *xg = x + group * $size * nb;
            vfloat sum[8];
            clear_sums(sum, nb);
$start$body
            add_scaled_sums(acc, vf_load_$T(scales), sum, nb);
            scales += LANES;
        }
    }
}
""")

_INT8 = Template("""\
            for (int k = 0; k < $size; k += 4, codes += 4 * LANES)
                #pragma GCC unroll 4
                for (int i = 0; i < 4; i++)
                    multiply_add($weight, xg + k * nb + i, sum, i, nb);""")

_INT4 = Template("""\
            for (int k = 0; k < $size; k += 8, codes += LANES) {
                vint eight = vi_load(codes); /* columns k .. k + 7 of each row */
                #pragma GCC unroll 8
                for (int j = 0; j < $present; j++)
                    multiply_add($weight, xg + (k + j / 4 * 4) * nb + j % 4, sum, j, nb);
            }""")

_INT4_NV24 = Template("""\
            for (int k = 0; k < $size; k += 16, codes += LANES) {
                vint eight = vi_load(codes); /* two codes of each of four groups of four columns */
                #pragma GCC unroll 8
                for (int j = 0; j < $present; j++)
                    multiply_add_picked($weight, vi_spread2(*positions++), xg + (k + j / 2 * 4) * nb, sum, j, nb);
            }""")

_LOAD_ZEROS = """\
            vfloat zero = vf_load_i8(zeros);
            zeros += LANES;
"""

_DECODE = Template("""\
static void {name}(
    const uint8_t *codes,$positions const $T *scales,$zeros $T *out, const int64_t stride)
{
    for (int row = 0; row < BM; row++, out += stride)
        for (int group = 0; group < $groups; group++) {
            const float scale = ${T}_to_float(*scales++), zero = $zero;
            $T *to = out + group * $size;
$body
        }
}
""")

_INT8_DECODE = Template("""\
            for (int k = 0; k < $size; k++)
                to[k] = float_to_$T((codes[k] - zero) * scale);
            codes += $size;""")

_INT4_DECODE = Template("""\
            $T value[16];
            for (int code = 0; code < 16; code++)
                value[code] = float_to_$T((code - zero) * scale);
            for (int k = 0; k < $size; k += 2, codes++) {
                to[k] = value[*codes & 15];
                to[k + 1] = value[*codes >> 4];
            }""")

_INT4_NV24_DECODE = Template("""\
            $T value[16];
            for (int code = 0; code < 16; code++)
                value[code] = float_to_$T((code - zero) * scale);
            for (int k = 0; k < $size; k++)
                to[k] = float_to_$T(0.0f * scale);
            for (int k = group * $size; k < (group + 1) * $size; k += 4) {
                int place = positions[(row * BK + k) / 8] >> k % 8; /* a nibble places two of four columns */
                out[k + (place & 3)] = value[*codes & 15];
                out[k + (place >> 2 & 3)] = value[*codes++ >> 4];
            }""")


def _decode(body: Template, dtype: str, groups: int, size: int, zeros: bool, bits: int, **names: str) -> str:
    names = {"T": dtype, "groups": str(groups), "size": str(size), "positions": ""} | names
    names["zeros"] = " const uint8_t *zeros," if zeros else ""
    names["zero"] = "*zeros++" if zeros else f"{1 << (bits - 1)}.0f"
    return _DECODE.substitute(names, body=body.substitute(names))


def _fill(body: Template, dtype: str, groups: int, size: int, zeros: bool, **names: str) -> str:
    names = {
        "T": dtype,
        "groups": str(groups),
        "size": str(size),
        "positions": "",
        "start": _LOAD_ZEROS if zeros else "",
    } | names
    names["zeros"] = " const int8_t *zeros," if zeros else ""
    return _TILE.substitute(names, body=body.substitute(names))


def _less_zero(code: str, zeros: bool) -> str:
    return f"vf_sub({code}, zero)" if zeros else code


def int8_mac(dtype: str, groups: int, size: int, zeros: bool) -> TileMac | None:
    """The C of 8-bit codes, `groups` groups of `size` columns to a tile; None where size % 4 != 0."""
    if size % 4:
        return None
    weight = _less_zero("vf_load_i8(codes + i * LANES)", zeros)
    source = _fill(_INT8, dtype, groups, size, zeros, code="int8_t", weight=weight)

    def pack(planes: Planes) -> Planes:
        return {"codes": to_lanes(signed(planes["codes"], 8)), **_scales(planes, 8)}

    return TileMac(source, pack, _decode(_INT8_DECODE, dtype, groups, size, zeros, 8))


def int4_mac(dtype: str, groups: int, size: int, zeros: bool, unpack: Unpack) -> TileMac | None:
    """The C of 4-bit codes: eight columns of a row are one 32-bit lane."""
    if size % 4:
        return None
    present = "8" if size % 8 == 0 else f"(k + 8 <= {size} ? 8 : {size} - k)"
    names = {"code": "int32_t", "present": present, "weight": _less_zero("vf_nibble(eight, j)", zeros)}

    def pack(planes: Planes) -> Planes:
        return {"codes": nibble_lanes(unpack(planes["codes"]), groups), **_scales(planes, 4)}

    source = _fill(_INT4, dtype, groups, size, zeros, **names)
    return TileMac(source, pack, _decode(_INT4_DECODE, dtype, groups, size, zeros, 4))


def int4_nv24_mac(dtype: str, groups: int, size: int, zeros: bool, unpack: Unpack) -> TileMac | None:
    """The C of 4-bit codes on 2:4: four groups of four columns of a row are one 32-bit lane."""
    if size % 4:
        return None
    present = "8" if size % 16 == 0 else f"(k + 16 <= {size} ? 8 : ({size} - k) / 2)"
    weight = _less_zero("vf_nibble(eight, j)", zeros)
    names = {"code": "int32_t", "present": present, "weight": weight, "positions": " const int32_t *positions,"}
    source = _fill(_INT4_NV24, dtype, groups, size, zeros, **names)

    def pack(planes: Planes) -> Planes:
        codes = nibble_lanes(unpack(planes["codes"]), groups)
        return {"codes": codes, "positions": position_words(planes["positions"]), **_scales(planes, 4)}

    positions = " const uint8_t *positions,"
    return TileMac(source, pack, _decode(_INT4_NV24_DECODE, dtype, groups, size, zeros, 4, positions=positions))


def signed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes or zeros u8 as int8, less the symmetric zero 2**(bits - 1)."""
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def nibble_lanes(codes: Tensor, groups: int) -> Tensor:
    """4-bit codes u8 `[entries, BM, C]` -> int32 `[entries, strips, words, 16]`, eight codes a word.

    Codes become two's complement (less 8) and stand in column order, the first in the low
    nibble; a group whose count is not a multiple of eight ends in a word that is not full.
    """
    entries, rows, columns = codes.shape
    grouped = (codes ^ 8).view(entries, rows, groups, columns // groups)
    grouped = torch.nn.functional.pad(grouped, (0, -grouped.shape[3] % 8))
    pairs = grouped[..., 0::2] | grouped[..., 1::2] << 4
    return to_lanes(pairs.contiguous().view(torch.int32).flatten(2))


def _scales(planes: Planes, bits: int) -> Planes:
    packed = {"scales": to_lanes(planes["scales"])}
    return {**packed, "zeros": to_lanes(signed(planes["zeros"], bits))} if "zeros" in planes else packed
