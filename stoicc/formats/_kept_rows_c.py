"""C of composed formats whose rows keep as many codes each: lanes pick the columns of x that their rows keep.

A product is of kept weights alone. Sixteen columns of a row keep four or eight, which are one or two *quads* of four
bytes in a lane. Codes of less than a byte share a word: quad i of a group of scales has bits i % (8 / bits) * bits of
each byte of word i // (8 / bits). Positions of 32 columns are a word: byte b of it has in bits 4 h those of the weights
that are byte b of the quads of half h; four bits, or for 2:4, where byte b is of group b of four columns, two and two.
"""

from dataclasses import replace
from string import Template
from typing import Any

import torch

from stoicc.codegen.cpu.lanes import from_lanes, to_lanes
from stoicc.formats import _kept, _mask
from stoicc.formats import _kept_rows_units as _units
from stoicc.formats._beside import Beside
from stoicc.formats._kept_rows import SIXTEEN, KeptRows
from stoicc.ir.errors import FormatError
from stoicc.ir.format import Elements, LaneCodes, Planes, Tile, TileFormat, TileMac, TileOctets, TilePairs

UNIT = 32
"""Columns of a word of positions."""

_FLOATS = Template("""\
INLINE void {name}($arguments, const float *x, float *acc, const int nb)
{
    float room[BK * WIDE] __attribute__((aligned(64)));
    const float *entries = entries_one_by_one(x, room, nb);
    for (int strip = 0; strip < STRIPS; strip++, acc += LANES * nb) {
        for (int group = 0; group < $groups; group++) {
            const int at = strip * $groups + group;
            vfloat sum[8];
            clear_sums(sum, nb);
            $start
            for (int k = group * $size; k < (group + 1) * $size; k += $step, codes += $step_words * LANES) {
                #pragma GCC unroll 4
                for (int half = 0; half < $halves; half++) {
                    vint place = vi_load(masks);
                    ahead(masks, LANES * sizeof *masks);
                    masks += half % 2 * LANES;
                    #pragma GCC unroll 2
                    for (int q = 0; q < $quads; q++) {
                        const int quad = half * $quads + q;
                        vint code = $code;
                        ahead(codes + quad / $quads_of_word * LANES, LANES * sizeof *codes);
$signs                        #pragma GCC unroll 4
                        for (int j = 0; j < 4; j++)
                            multiply_add_of_columns(
                                $floats, $place, entries + k, 16 * half + $first, $m, sum, j, nb);
                    }
                }
            }
            add_scaled_sums(acc, $scale, sum, nb);
        }
    }
}
""")

_DIGITS = Template("""\
/* Sums of a group of columns times `few` entries of x in digits, of two strips where they share what is read of x. */
INLINE void {name}_group(
    $arguments, const uint8_t *x, const int first, vint *sum, vint *of_codes, const int beside, const int few,
    const int nb)
{
    enum { MASKS = BK / 32 * LANES, CODES = $row_words * LANES }; /* of a strip */
    clear_picked_digits(sum, of_codes, beside, few);
    #pragma GCC unroll 2
    for (int k = 0; k < $size; k += $step, masks += $step / 32 * LANES, codes += $step_words * LANES) {
        #pragma GCC unroll 4
        for (int half = 0; half < $halves; half++, x += 192 * nb) {
            vint kept[4], places[4]; /* the quads of each strip */
            #pragma GCC unroll 2
            for (int s = 0; s < beside; s++) {
                const int at = first + s * $groups;
                const vint place = vi_load(masks + s * MASKS + half / 2 * LANES);
                if (half % 2)
                    ahead_beside(masks + s * MASKS + half / 2 * LANES, LANES * sizeof *masks);
                $start
                #pragma GCC unroll 2
                for (int q = 0; q < $quads; q++) {
                    const int quad = half * $quads + q;
                    const vint code = $code_beside;
                    if (quad % $quads_of_word == 0)
                        ahead_beside(codes + s * CODES + quad / $quads_of_word * LANES, LANES * sizeof *codes);
                    kept[$quads * s + q] = $signed;
                    places[$quads * s + q] = $places;
                    of_codes[s] = vi_add_bytes(of_codes[s], kept[$quads * s + q]);
                }
            }
            multiply_add_picked_digits(kept, places, x, sum, $quads, beside, few);
        }
    }
}

INLINE void {name}($arguments, const int8_t *x, float *acc, const int nb)
{
    const int beside = STRIPS % 2 ? 1 : digit_strips(nb), few = few_digits(nb);
    uint8_t wide[BK * 12 * WIDE] __attribute__((aligned(64)));
    widen_digits(x, wide, nb);
    for (int strip = 0; strip < STRIPS; strip += beside, acc += beside * LANES * nb) {
        for (int group = 0; group < $groups; group++) {
            const int first = strip * $groups + group;
            const int32_t *own_masks = masks + (strip * (BK / 32) + group * ($size / 32)) * LANES;
            const int32_t *own_codes = codes + (strip * $row_words + group * $group_words) * LANES;
            for (int n = 0; n < nb; n += few) {
                vint sum[12], of_codes[2];
                const uint8_t *xg = wide + group * $size * 12 * nb + 192 * n;
                {name}_group(own_masks, own_codes, $beside, xg, first, sum, of_codes, beside, few, nb);
                #pragma GCC unroll 2
                for (int s = 0; s < beside; s++) {
                    const int at = first + s * $groups;
                    float *to = acc + (s * nb + n) * LANES;
                    add_picked_digits(to, sum + s * 3 * few, of_codes[s], 0, $scale, digit_units(x, nb) + n, few);
                }
            }
        }
    }
}
""")

_DECODE = Template("""\
static void {name}($arguments, $T *out, const int64_t stride)
{
    uint8_t whole[BM * BK * $bits / 8];
    memset(whole, 0, sizeof whole);
    for (int i = 0, place = 0; i < BM * BK / 8; i++)
        for (int mask = masks[i]; mask; mask &= mask - 1, place += $bits) {
            const int at = (8 * i + __builtin_ctz(mask)) * $bits;
            whole[at / 8] |= (uint8_t)((codes[place / 8] >> place % 8 & $most) << at % 8);
        }
    {name}_values($given, out, stride);
    for (int row = 0; row < BM; row++, out += stride, masks += BK / 8)
        for (int k = 0; k < BK; k++)
            out[k] = masks[k / 8] >> k % 8 & 1 ? out[k] : 0;
}
""")


_OF_SIXTEEN = {
    "places": "vi_and(vi_shift_right(place, half % 2 * 4), 0x0f0f0f0f)",
    "place": "vi_shift_right(place, 8 * j + half % 2 * 4)",
    "range": "16",
    "first_pick": "0",
    "second_pick": "0",
}
"""C of columns among the 16 of a half, in four bytes, and of byte j; and for pairs of bytes j and j + 2."""
_OF_FOUR = {
    "places": "vi_places(place, half % 2 * 2 + q)",
    "place": "vi_and(vi_shift_right(place, 8 * j + half % 2 * 4 + 2 * q), 3)",
    "range": "4",
    "first_pick": "4 * j",
    "second_pick": "4 * j + 8",
    "first": "4 * j",
}
"""The same for 2:4, and where the group of byte j begins."""


def picked_mac(values: TileFormat, elements: Elements, rows: KeptRows, tile: Tile, dtype: str) -> TileMac | None:
    """The C of a format of values for tiles whose rows keep as many codes each; None where it has none that serves."""
    code = values.tile_mac(tile, dtype)
    if code is None or code.in_lanes is None:
        return None
    beside, meant = Beside.of(values, elements.plane, code, tile, dtype), code.in_lanes
    signs = f"        code = {meant.signed};\n" * bool(meant.signed)
    names = _names(rows, elements, tile) | {
        "start": meant.start,
        "signed": meant.signed,
        "signs": signs,
        "floats": meant.floats or "vf_byte(code, j)",
        "scale": meant.scale,
        "arguments": ", ".join(("const int32_t *masks", "const int32_t *codes", *beside.parameters)),
        "beside": ", ".join(beside.names),
    }
    decode = ""
    if code.decode:
        canonical = ("const uint8_t *masks", "const uint8_t *codes", *beside.canonical_parameters)
        own = {"T": dtype, "most": str((1 << rows.bits) - 1), "given": beside.arguments("whole")}
        text = _DECODE.substitute(names, **own | {"arguments": ", ".join(canonical)})
        decode = f"{code.decode.replace('{name}', '{name}_values')}\n{text}"

    def pack(planes: Planes) -> Planes:
        return {**_lanes(planes, rows, tile), **beside.pack(planes)}

    def unpack(packed: Planes, tile: Tile) -> Planes:
        return {**_canonical(packed, rows, tile), **beside.unpack(packed)}

    inverse = unpack if code.unpack is not None else None
    digits, octets = _DIGITS.substitute(names) if meant.signed else "", None
    if meant.signed and names["size"] % 64 == 0:
        most = 16 if rows.bits == 8 else 8
        octets = TileOctets(_units.OCTETS.substitute(names), 64, most=most, group=names["size"] // 64)
    floats = _FLOATS.substitute(names)
    mac = TileMac(floats, pack, decode, digits, None, octets, unpack=inverse, code_bits=code.code_bits)
    if dtype == "bf16" and (meant.signed or code.pairs_of):
        return _with_pairs(mac, names | _pairs(code, meant, beside.flip(rows.bits)))
    return mac


def _with_pairs(code: TileMac, names: dict[str, Any]) -> TileMac:
    """The same with products of bf16: spread for matrix units, in vectors by lanes that pick."""

    def pairs(template: Template, least: int = 2, picked: int = 0) -> TilePairs:
        group = names["size"] // UNIT
        text = template.substitute(names)
        return TilePairs(text, UNIT, True, group, least_in_vectors=least, least_blocked=48, picked=picked)

    spread = pairs(_units.SPREAD)
    picked = pairs(_units.PICKS, 2 if code.digits else 1, 8 * names["quads"])
    if names["quads"] == 2:
        return replace(code, pairs=spread, picks=pairs(_units.PICKS_OF_FOUR), dots=picked)
    own = replace(code, pairs=picked, octets=None) if code.unpack is not None else None
    return replace(code, pairs=spread, in_vectors=own)


def _pairs(code: TileMac, meant: LaneCodes, flip: int) -> dict[str, str]:
    """C of pairs of bf16, by a look-up where the values have one; `flip`: what their packed codes differ by."""
    if code.pairs_of is None:
        made = "\n        ".join(
            (f"code = {meant.signed};", "pair[0] = vp_of_bytes(code, 0);", "pair[1] = vp_of_bytes(code, 1);")
        )
        return {"pairs": made, "pairs_start": f"    {meant.start}\n", "pairs_scale": meant.scale}
    turn = f"code = vi_turn(code, {flip});\n        " if flip else ""
    texts = {
        "pairs": turn + code.pairs_of.pairs,
        "pairs_start": code.pairs_of.start,
        "pairs_scale": code.pairs_of.scale,
    }
    return {name: text.replace("unit / GROUP", "at") for name, text in texts.items()}


def _names(rows: KeptRows, elements: Elements, tile: Tile) -> dict[str, Any]:
    """Sizes, and C for the codes of a quad and where they stand."""
    quads, per, size = rows.quads, 8 // rows.bits, tile[1] // elements.groups
    step = max(UNIT, per * SIXTEEN // quads)
    word = "vi_load(codes{} + quad / $per * LANES)"
    code = word if per == 1 else f"vi_and(vi_shift_right({word}, quad % $per * $bits), $fields)"
    fields = f"{((1 << rows.bits) - 1) * 0x01010101:#010x}"
    code = Template(code).substitute(per=per, bits=rows.bits, fields=fields)
    names: dict[str, Any] = {
        "n": rows.n,
        "m": rows.m,
        "bits": rows.bits,
        "quads": quads,
        "quads_of_word": per,
        "groups": elements.groups,
        "size": size,
        "step": step,
        "halves": step // SIXTEEN,
        "step_words": step // SIXTEEN * quads // per,
        "group_words": size // SIXTEEN * quads // per,
        "row_words": tile[1] // SIXTEEN * quads // per,
        "code": code.format(""),
        "code_beside": code.format(" + s * CODES"),
    }
    return names | (_OF_FOUR if quads == 2 else {**_OF_SIXTEEN, "first": f"j / {rows.n} * {rows.m}"})


def _lanes(planes: Planes, rows: KeptRows, tile: Tile) -> Planes:
    """Masks and codes in the order of columns -> words of positions and of quads, in lanes."""
    kept, quads = _kept.unpack_rows(planes["masks"], 1).bool(), rows.quads
    if not bool(planes["masks"].any()):  # planes of zeros, of which only the size is asked
        kept = (torch.arange(tile[1]) % rows.m < rows.n).expand(kept.shape)
    if not bool(kept.unflatten(2, (-1, rows.m)).sum(3, dtype=torch.uint8).eq(rows.n).all()):
        raise FormatError(
            f"format masked: expected masks that keep {rows.n} of each {rows.m}, found a group of another number; "
            "encode them again"
        )
    stored = (*kept.shape[:2], tile[1] // SIXTEEN, 4, quads)
    codes = _kept.unpack_rows(planes["codes"], rows.bits).view(stored).transpose(3, 4).flatten(2, 3)
    places = (_mask.places(kept) % SIXTEEN).to(torch.uint8).view(stored).transpose(3, 4)
    if quads == 2:  # of which bytes say the group already
        places = (places[..., 0, :] & 3) | (places[..., 1, :] & 3) << 2
    places = places.reshape(*kept.shape[:2], tile[1] // UNIT, 2, 4)
    words = {"masks": places[..., 0, :] | places[..., 1, :] << 4, "codes": _kept.join_fields(codes, rows.bits, 2)}
    return {name: to_lanes(word.contiguous().view(torch.int32).squeeze(-1)) for name, word in words.items()}


def _canonical(packed: Planes, rows: KeptRows, tile: Tile) -> Planes:
    """The inverse of `_lanes`."""
    words = {name: from_lanes(packed[name], tile[0]).unsqueeze(-1).view(torch.uint8) for name in ("masks", "codes")}
    places = torch.stack((words["masks"] & 15, words["masks"] >> 4), 3)  # [T, BM, words, half, byte]
    if rows.quads == 2:
        groups = 4 * torch.arange(4, dtype=torch.uint8)
        places = torch.stack((places & 3, places >> 2), -1) + groups[:, None]  # of each byte, the first and the second
    columns = places.flatten(2).view(*places.shape[:2], tile[1] // SIXTEEN, 4 * rows.quads)
    columns = columns.long() + SIXTEEN * torch.arange(tile[1] // SIXTEEN)[:, None]
    kept = torch.zeros(*columns.shape[:2], tile[1], dtype=torch.uint8).scatter_(2, columns.flatten(2), 1)
    fields = [words["codes"] >> rows.bits * i & (1 << rows.bits) - 1 for i in range(8 // rows.bits)]
    codes = torch.stack(fields, 3).view(*columns.shape[:3], rows.quads, 4).transpose(3, 4).flatten(2)
    return {"masks": _kept.pack_rows(kept, 1), "codes": _kept.pack_rows(codes, rows.bits)}
