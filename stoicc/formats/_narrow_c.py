"""C code and lane order of 2- and 3-bit codes, for the CPU backend; see `_affine_c` for what they share.

A 32-bit lane holds the lower two bits of 16 columns of a row. Field i (two bits) of byte b is column 4 i + b, so
that the four bytes of a lane meet four neighbouring digits of x. A second word holds the highest bit of 32
columns: bit 4 h + i of byte b is that of half h.
"""

from dataclasses import replace
from string import Template

import torch
from torch import Tensor
from torch.nn.functional import pad

from stoicc.codegen.cpu.lanes import from_lanes, to_lanes
from stoicc.formats import _affine_c, _affine_digits
from stoicc.formats._lane_order import bf16_words, scale_lanes
from stoicc.formats._narrow import pack_bits, pack_crumbs, unpack_bits, unpack_crumbs
from stoicc.ir.format import Planes, Tile, TileMac

ZEROS_AS = 4
"""Zero points are packed as those of 4-bit codes are: less 8."""
_FIELDS = [4 * i + b for b in range(4) for i in range(4)]
"""The column of each field of a word, from the lowest bits."""
_PLACES = sorted(range(16), key=_FIELDS.__getitem__)
"""The field of each column."""
_PAIR_OF_BYTES = {"even": "(j / 4 * 2)", "odd": "(j / 4 * 2 + 1)"}
"""Of step j of 8, the bytes of an even column and of the one beside it, which are the same field of both."""
_INT3_CODE = "vi_select(vi_shift_right(word, 2 * f), vi_shift(top, 8 * (f / 4) + 4 * half + f % 4 - 2), 3)"
"""Bits above the third do not matter."""

_INT2 = Template("""\
            static const float value[16] = {$values};
            for (int k = 0; k < $size; k += 16, codes += LANES) {
                static const int column[16] = {$fields};
                vint word = vi_load(codes);
                ahead(codes, LANES * sizeof *codes);
                #pragma GCC unroll 16
                for (int f = 0; f < 16; f++) {
                    vint code = $code;
                    multiply_add($less, xg + (k + column[f] / 4 * 4) * nb + column[f] % 4, sum, f, nb);
                }
            }""")

_INT3 = Template("""\
            static const float value[16] = {$values};
            for (int k = 0; k < $size; k += 32, high += LANES) {
                static const int column[16] = {$fields};
                vint top = vi_load(high);
                ahead(high, LANES * sizeof *high);
                #pragma GCC unroll 2
                for (int half = 0; half < $halves; half++, codes += LANES) {
                    const float *xh = xg + (k + 16 * half) * nb;
                    vint word = vi_load(codes);
                    ahead(codes, LANES * sizeof *codes);
                    #pragma GCC unroll 16
                    for (int f = 0; f < 16; f++) {
                        vint code = $code;
                        multiply_add($less, xh + column[f] / 4 * 4 * nb + column[f] % 4, sum, f, nb);
                    }
                }
            }""")

_INT2_SIXTEEN = """\
                        const vint word = vi_load(codes);
                        ahead(codes, LANES * sizeof *codes);
                        #pragma GCC unroll 4
                        for (int i = 0; i < 4; i++)
                            four[i] = vi_and(vi_shift_right(word, 2 * i), 0x03030303);
                        codes += LANES;"""

_INT3_SIXTEEN = Template("""\
                        const int32_t *tops = high + ((strip * $groups + group) * $words + k / 32) * LANES;
                        const vint word = vi_load(codes), top = vi_load(tops);
                        ahead(codes, LANES * sizeof *codes);
                        if (k % 32 == 0)
                            ahead(tops, LANES * sizeof *tops);
                        #pragma GCC unroll 4
                        for (int i = 0; i < 4; i++) {
                            vint third = vi_shift(top, k % 32 / 4 + i - 2);
                            four[i] = vi_and(vi_select(vi_shift_right(word, 2 * i), third, 0x03030303), 0x07070707);
                        }
                        codes += LANES;""")

_INT2_PAIRS = Template("""\
        static const int column[16] = {$fields};
        vint word = vi_load(codes);
        ahead(codes, LANES * sizeof *codes);
        codes += LANES;
        #pragma GCC unroll 8
        for (int j = 0; j < 8; j++) { /* the same field of two bytes */
            vint code = vi_shift_right(vp_bytes(word, $even, $odd), 2 * (j % 4));
            vp_store(pairs + (k + column[4 * $even + j % 4]) * LANES, $pair);
        }""")

_INT3_PAIRS = Template("""\
        static const int column[16] = {$fields};
        vint top = vi_load(high);
        ahead(high, LANES * sizeof *high);
        high += LANES;
        #pragma GCC unroll 2
        for (int half = 0; half < 2; half++, codes += LANES) {
            vint word = vi_load(codes);
            ahead(codes, LANES * sizeof *codes);
            #pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                vint low = vi_shift_right(vp_bytes(word, $even, $odd), 2 * (j % 4));
                vint code = vi_select(low, vi_shift(vp_bytes(top, $even, $odd), 4 * half + j % 4 - 2), 0x00030003);
                vp_store(pairs + (k + 16 * half + column[4 * $even + j % 4]) * LANES, $pair);
            }
        }""")

_INT2_DOTS = Template("""\
        vint word = vi_load(codes);
        ahead(codes, LANES * sizeof *codes);
        codes += LANES;
        #pragma GCC unroll 8
        for (int j = 0; j < 8; j++) { /* a field of bytes 0 and 2, then of 1 and 3 */
            vint code = vi_shift_right(word, j / 4 * 8 + j % 4 * 2);
            vp_store(pairs + (k + j % 4 * 4 + j / 4 * 2) * LANES, $pair);
        }""")

_INT2_OCTETS = """\
        vint word = vi_load(codes);
        ahead(codes, LANES * sizeof *codes);
        codes += LANES;
        #pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            vo_store(octets + (k + 4 * i) * LANES, $code);"""

_INT3_OCTETS = """\
        vint top = vi_load(high);
        ahead(high, LANES * sizeof *high);
        high += LANES;
        #pragma GCC unroll 2
        for (int half = 0; half < 2; half++, codes += LANES) {
            vint word = vi_load(codes);
            ahead(codes, LANES * sizeof *codes);
            #pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                vo_store(octets + (k + 16 * half + 4 * i) * LANES, $code);
        }"""

_INT2_DECODE = Template("""\
            $T value[4];
            for (int code = 0; code < 4; code++)
                value[code] = float_to_$T((code - zero) * scale);
            for (int k = 0; k < $size; k += 4, codes++)
                for (int i = 0; i < 4; i++)
                    to[k + i] = value[*codes >> 2 * i & 3];""")

_INT3_DECODE = Template("""\
            $T value[8];
            for (int code = 0; code < 8; code++)
                value[code] = float_to_$T((code - zero) * scale);
            for (int k = 0; k < $size; k += 8, codes += 2, high++)
                for (int i = 0; i < 8; i++)
                    to[k + i] = value[(codes[i / 4] >> 2 * (i % 4) & 3) | (*high >> i & 1) << 2];""")


def int2_mac(dtype: str, groups: int, size: int, zeros: bool) -> TileMac | None:
    """The C of 2-bit codes, `groups` groups of `size` columns to a tile; None where size % 16 != 0."""
    if size % 16:
        return None
    grid, names = _affine_c._Groups(dtype, groups, size, zeros), _names(2, zeros)
    source = grid.fill(_affine_c._TILE, _INT2, **names, code="vi_shift_right(word, 2 * f)")
    digits = grid.digits(ZEROS_AS if zeros else 2)
    pairs = grid.pairs(_INT2_PAIRS, 16, 16, **{**names, "start": names["pair_zero"]})
    pairs = pairs and replace(pairs, least_blocked=96)
    dots = grid.dots(_INT2_DOTS, 16, 16, **{**names, "start": names["pair_zero"]})
    code = "vi_and(vi_shift_right(word, 2 * i), 0x03030303)" if zeros else "vi_shift(word, 2 * i - 6)"
    octets = grid.octets(_INT2_OCTETS, 16, 16, 2, code=code)

    def pack(planes: Planes) -> Planes:
        codes = to_lanes(_words(unpack_crumbs(planes["codes"]), groups))
        return {"codes": codes, **scale_lanes(planes, ZEROS_AS)}

    decode = _affine_c._decode(_INT2_DECODE, dtype, groups, size, zeros, 2)
    text = _affine_digits.of_words(digits, _INT2_SIXTEEN)
    of_kept, looked_up = digits.text if digits else None, grid.looked_up(names["pair_zero"], names["pair"])
    return TileMac(
        source, pack, decode, text, pairs, octets,
        dots=dots, code_bits=2, digits_of=of_kept, pairs_of=looked_up, in_lanes=grid.in_lanes(2),
    )  # fmt: skip


def int3_mac(dtype: str, groups: int, size: int, zeros: bool) -> TileMac | None:
    """The C of 3-bit codes; None where size % 16 != 0."""
    if size % 16:
        return None
    grid, names = _affine_c._Groups(dtype, groups, size, zeros), _names(3, zeros)
    names |= {"positions": " const int32_t *high,", "halves": "2" if size % 32 == 0 else f"(k + 16 < {size} ? 2 : 1)"}
    source = grid.fill(_affine_c._TILE, _INT3, **names, code=_INT3_CODE)
    sixteen = _INT3_SIXTEEN.substitute(groups=groups, words=-(-size // 32))
    digits = grid.digits(ZEROS_AS if zeros else 3)
    text = _affine_digits.of_words(digits, sixteen, also=", const int32_t *high", step=32)
    start = "    high += unit * LANES;\n" + names["pair_zero"]
    pairs = grid.pairs(_INT3_PAIRS, 16, 32, **{**names, "start": start})
    pairs = pairs and replace(pairs, least_in_vectors=3, least_blocked=64)
    code = "vi_select(vi_shift(word, 2 * i - 5), vi_shift(top, 4 * half + i - 7), 0x60606060)"
    if zeros:
        code = "vi_select(vi_shift_right(word, 2 * i), vi_shift(top, 4 * half + i - 2), 0x03030303)"
        code = f"vi_and({code}, 0x07070707)"
    names = {"code": code, "start": "    high += unit * 2 * LANES;\n", "positions": names["positions"]}
    octets = grid.octets(_INT3_OCTETS, 16, 32, 3, **names)

    def pack(planes: Planes) -> Planes:
        codes = to_lanes(_words(unpack_crumbs(planes["codes"]), groups))
        high = to_lanes(_high_words(unpack_bits(planes["high"]), groups))
        return {"codes": codes, "high": high, **scale_lanes(planes, ZEROS_AS)}

    decode = _affine_c._decode(_INT3_DECODE, dtype, groups, size, zeros, 3, positions=" const uint8_t *high,")
    return TileMac(source, pack, decode, text, pairs, octets, code_bits=3)


def _names(bits: int, zeros: bool) -> dict[str, str]:
    """What the templates of a width need: tables of its codes, and how a zero point is taken from them.

    Tables are as long as look-ups read bits, so that bits above a code do not matter.
    """
    less = 1 << (ZEROS_AS - 1) if zeros else 1 << (bits - 1)
    steps = [code % (1 << bits) - less for code in range(32)]
    pair = f"vp_codes_less(code, {(1 << bits) - 1}, zero)" if zeros else "vp_look_up(value, code)"
    table = f"    static const bf16 value[32] __attribute__((aligned(64))) = {{{bf16_words(torch.tensor(steps))}}};\n"
    return {
        "values": ", ".join(map(str, steps[:16])),
        "fields": ", ".join(map(str, _FIELDS)),
        "start": _affine_c._LOAD_ZEROS if zeros else "",
        "less": "vf_sub(vf_look_up(value, code), zero)" if zeros else "vf_look_up(value, code)",
        "pair": pair,
        "pair_zero": "    vint zero = vp_zero(zeros + unit / $group * LANES);\n" if zeros else table,
        **_PAIR_OF_BYTES,
    }


def _grouped(codes: Tensor, groups: int, columns: int) -> Tensor:
    """`[entries, BM, C]` -> `[entries, BM, words, columns]`: each group padded to whole words."""
    grouped = codes.unflatten(2, (groups, -1))
    return pad(grouped, (0, -grouped.shape[3] % columns)).flatten(2).unflatten(2, (-1, columns))


def _words(codes: Tensor, groups: int) -> Tensor:
    """Two bits a code u8 `[entries, BM, C]` -> int32 `[entries, BM, C / 16]`, fields in lane order."""
    return pack_crumbs(_grouped(codes, groups, 16)[..., _FIELDS]).contiguous().view(torch.int32).flatten(2)


def _high_words(high: Tensor, groups: int) -> Tensor:
    """One bit a code u8 `[entries, BM, C]` -> int32 `[entries, BM, words]`, 32 columns a word."""
    halves = _grouped(high, groups, 32).unflatten(3, (2, 16))[..., _FIELDS].unflatten(4, (4, 4))
    return pack_bits(halves.transpose(3, 4).flatten(3).contiguous()).view(torch.int32).flatten(2)


def int2_codes(packed: Planes, tile: Tile, groups: int) -> Planes:
    """Planes in lane order back: the codes of int2, and the lower bits of int3."""
    fields = unpack_crumbs(from_lanes(packed["codes"], tile[0]).view(torch.uint8)).unflatten(2, (-1, 16))
    return {"codes": pack_crumbs(fields[..., _PLACES].flatten(2))}


def int3_codes(packed: Planes, tile: Tile, groups: int) -> Planes:
    """Planes in lane order back, both of them."""
    bits = unpack_bits(from_lanes(packed["high"], tile[0]).view(torch.uint8)).unflatten(2, (-1, 4, 2, 4))
    columns = bits.transpose(3, 4).flatten(4)[..., _PLACES].flatten(3)  # entries, row, word, 32 columns
    size = tile[1] // groups
    present = columns.flatten(2).unflatten(2, (groups, -1))[..., :size].flatten(2)
    return {**int2_codes(packed, tile, groups), "high": pack_bits(present)}
