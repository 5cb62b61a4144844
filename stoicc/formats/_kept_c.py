"""C code of composed formats: kept codes to their places in the first-level cache, then the C of the format of values.

Whatever that has - floats, digits, matrix units - it multiplies words that are spread just before, so that a format
composes with another without C of its own. What is not kept is the code of zero.
"""

import re
from dataclasses import replace
from string import Template

from stoicc.formats._beside import Beside
from stoicc.formats._kept import COLUMNS
from stoicc.ir.format import Elements, PlaneKind, Planes, Tile, TileFormat, TileMac, TilePairs

_SPREAD = Template("""\
/* Codes of some columns of a strip, of which some are kept, in the order of $values. */
INLINE const uint8_t *{name}_spread(
    const int64_t *masks, const uint8_t *codes, const uint8_t *end,$zeros uint8_t *to, const int columns)
{
    #pragma GCC unroll 2
    for (int k = 0; k < columns; k += $step, masks += $step / 4, to += 64) {
        ahead(codes, 64);
        codes = $spread(masks, codes, end, $rows, $otherwise, $flip, $bits, to);
    }
    return codes;
}
""")

_TILE = Template("""\
INLINE void {name}($arguments, const $x *x, float *acc, const int nb)
{
    uint8_t whole[BM * BK * $bits / 8] __attribute__((aligned(64)));
    const uint8_t *from = codes;
    for (int strip = 0; strip < STRIPS; strip++)
        from = {name}_spread(
            masks + strip * (BK / 4), from, codes + count,$strip_zeros whole + strip * (BK * $bits * 2), BK);
    {name}_values($given, x, acc, nb);
}
""")

_SIXTEEN = Template("""\
                        ahead(codes, 64);
                        #pragma GCC unroll 4
                        for (int i = 0; i < 4; i++) {
                            const uint64_t mask = (uint64_t)masks[(strip * BK + group * $size + k) / 4 + i];
                            four[i] = vi_kept(mask, codes, end, vi_none($here, $otherwise, $bits), $bits);
                            codes += block_bytes(mask, $bits);
                        }""")

_END = "    const uint8_t *const end = codes + count;\n"

_DIGITS = Template("""\
$met
INLINE void {name}($arguments, const int8_t *x, float *acc, const int nb)
{
    if (nb > few_digits(nb) && spread_once()) /* for several products */
        {name}_spread_first($names, x, acc, nb);
    else
        {name}_met($names, x, acc, nb);
}
""")

_UNIT = Template("""\
INLINE $returns {name}($arguments, const int unit, $element *to)
{
    enum { SIZE = $columns, UNITS = BK / SIZE };
    uint8_t whole[BM * BK * $bits / 8] __attribute__((aligned(64)));
    const int64_t *strip = masks + unit / UNITS * (BK / 4);
    const int before = unit % UNITS * (SIZE / 4); /* blocks of the strip that come first */
    const uint8_t *from = codes + starts[unit / UNITS] + kept_bytes(strip, before, $bits);
    {name}_spread(strip + before, from, codes + count,$unit_zeros whole + unit * (SIZE * $bits * 2), SIZE);
    $give{name}_values($given, unit, to);
}
""")

_ORDERED = Template("""\
INLINE $returns {name}($arguments, const int unit, bf16 *to, int64_t *place)
{
    enum { SIZE = $columns, UNITS = BK / SIZE };
    uint8_t whole[BM * BK * $bits / 8] __attribute__((aligned(64)));
    const uint8_t *from = {name}_spread(
        masks + unit * (SIZE / 4), codes + *place, codes + count,$unit_zeros whole + unit * (SIZE * $bits * 2), SIZE);
    *place = from - codes;
    $give{name}_values($given, unit, to);
}
""")

_LOOKED_UP = Template("""\
INLINE vfloat {name}($arguments, const int unit, bf16 *pairs, int64_t *place)
{
    enum { SIZE = $columns, GROUP = $size / SIZE };
    const uint8_t *from = codes + *place;
    masks += unit * (SIZE / 4);
$start    #pragma GCC unroll 8
    for (int k = 0; k < SIZE; k += 4, masks++) { /* columns 0 and 2, then 1 and 3 */
        const uint64_t mask = (uint64_t)*masks;
        vint pair[2], code = vi_kept(mask, from, codes + count, vi_none($here, $otherwise, $bits), $bits);
        from += block_bytes(mask, $bits);
$turn        $pairs
        vp_store(pairs + k * LANES, pair[0]);
        vp_store(pairs + (k + 2) * LANES, pair[1]);
    }
    ahead(from, 64);
    *place = from - codes;
    return $scale;
}
""")

_DECODE = Template("""\
static void {name}($arguments, $T *out, const int64_t stride)
{
    uint8_t whole[BM * BK * $bits / 8];
    memset(whole, 0, sizeof whole);
    for (int strip = 0; strip < BM / 16; strip++)
        for (int k = 0; k < BK; k += 4) {
            int place = 0;
            for (uint64_t mask = (uint64_t)masks[strip * (BK / 4) + k / 4]; mask; mask &= mask - 1, place += $bits) {
                const int bit = __builtin_ctzll(mask), at = ((strip * 16 + bit / 4) * BK + k + bit % 4) * $bits;
                whole[at / 8] |= (uint8_t)((codes[place / 8] >> place % 8 & $most) << at % 8);
            }
            codes += (place + 7) / 8;
        }
    {name}_values($given, out, stride);
    for (int row = 0; row < BM; row++)
        for (int k = 0; k < BK; k++)
            if (!((uint64_t)masks[row / 16 * (BK / 4) + k / 4] >> (row % 16 * 4 + k % 4) & 1))
                out[row * stride + k] = 0;
}
""")


def masked_mac(values: TileFormat, elements: Elements, tile: Tile, dtype: str) -> TileMac | None:
    """The C of a format of values for tiles of which it holds the codes of some; None where it has none that serves."""
    code, planes = values.tile_mac(tile, dtype), values.planes(tile, dtype)
    step = COLUMNS * (8 // elements.bits) if elements.lanes == "words" else COLUMNS
    ragged = any(plane.kind is PlaneKind.RAGGED for plane in planes)
    if code is None or elements.lanes is None or ragged or tile[1] // elements.groups % step:
        return None
    beside, most = Beside.of(values, elements.plane, code, tile, dtype), (1 << elements.bits) - 1
    code_of_zero = int(beside.zeros[elements.plane].flatten()[0]) & most
    zeros = elements.zeros
    point = 0 if zeros is None else int(beside.packed[zeros].flatten()[0])  # as C reads it
    names = {
        "values": str(values),
        "bits": str(elements.bits),
        "most": str(most),
        "T": dtype,
        "step": str(step),
        "spread": "spread_word" if elements.lanes == "words" else "spread_columns",
        "arguments": ", ".join((*_OWN, *beside.parameters)),
        "given": beside.arguments("(const void *)whole"),
        "zeros": f" const int8_t *{zeros}," if zeros else "",
        "rows": f"{zeros} + k / {tile[1] // elements.groups} * 16" if zeros else "0",
        "otherwise": str((code_of_zero - point) & most),
        "flip": str(beside.flip(elements.bits)),
        "strip_zeros": f" {zeros} + strip * {elements.groups * 16}," if zeros else "",
    }
    spread = _SPREAD.substitute(names)

    def function(template: Template, inner: str, **more: str) -> str:
        own = re.sub(rf" *ahead\({elements.plane}\b[^;]*;\n", "", inner)  # they are in the cache by now
        own = own.replace("{name}", "{name}_values")
        return f"{own}\n{spread if template is not _DECODE else ''}\n{template.substitute({**names, **more})}"

    def unit(inner: str, columns: int, element: str, returns: str, template: Template = _UNIT) -> str:
        give = "return " if returns == "vfloat" else ""
        first = f"unit / UNITS * {elements.groups * 16} + unit % UNITS * SIZE / {tile[1] // elements.groups} * 16"
        unit_zeros = f" {zeros} + {first}," if zeros else ""
        more = {"columns": str(columns), "element": element, "returns": returns, "give": give}
        return function(template, inner, **more, unit_zeros=unit_zeros)

    def pack(planes: Planes) -> Planes:
        own: Planes = {name: planes[name] for name in ("masks", "starts", "codes", "codes_ptr")}
        return {**own, **beside.pack(planes)}

    def unpack(packed: Planes, tile: Tile) -> Planes:
        own = {name: plane for name, plane in packed.items() if name not in beside.names}
        return {**own, **beside.unpack(packed)}

    def digits() -> str:
        if code.digits_of is None:
            return function(_TILE, code.digits, x="int8_t") if code.digits else ""
        size = str(tile[1] // elements.groups)
        sixteen = _SIXTEEN.substitute(names, size=size, here=zeros or "0")
        met = code.digits_of(", ".join(_OWN), "uint8_t", sixteen, _END).replace("{name}", "{name}_met")
        spread_first = function(_TILE, code.digits, x="int8_t").replace("void {name}(", "void {name}_spread_first(")
        given = ", ".join((*(text.split("*")[-1].split()[-1] for text in _OWN), *beside.names))
        return f"{spread_first}\n{_DIGITS.substitute(names, met=met, names=given)}"

    canonical = ", ".join((*_OWN, *beside.canonical_parameters))
    pairs, octets = code.pairs, code.octets
    if pairs is not None:
        least = 1 if pairs.least_in_vectors == 1 else 5  # floats take longer than a look-up; digits do not
        pairs = replace(pairs.in_units(pairs.columns), least_in_vectors=least, least_blocked=16)
        returns = "vfloat" if pairs.scaled else "void"
        pairs = replace(pairs, source=unit(pairs.source, pairs.columns, "bf16", returns))
    dots = code.units
    looked_up = code.pairs_of
    if dots is not None and looked_up is not None and tile[1] % 32 == 0:
        columns = 32 if looked_up.size % 32 == 0 else 16
        more = {"columns": columns, "size": looked_up.size, "start": looked_up.start, "pairs": looked_up.pairs}
        here = f"{zeros} + unit / GROUP * LANES" if zeros else "0"
        turn = f"        code = vi_turn(code, {names['flip']});\n" if names["flip"] != "0" else ""
        text = _LOOKED_UP.substitute(names, **more, scale=looked_up.scale, here=here, turn=turn)
        least = 1 if dots.least_in_vectors == 1 else 3  # digits take less
        dots = TilePairs(text, columns, scaled=True, group=looked_up.size // columns, crossed=True, ordered=True)
        dots = replace(dots, least_in_vectors=least)
    elif dots is not None:
        text = unit(dots.source, dots.columns, "bf16", "vfloat" if dots.scaled else "void", _ORDERED)
        least = 1 if dots.least_in_vectors == 1 else 5  # digits take less than look-ups
        dots = replace(dots, source=text, least_in_vectors=least, ordered=True)
    if octets is not None:
        octets = replace(octets, source=unit(octets.source, octets.columns, "int8_t", "vfloat"))
    return TileMac(
        function(_TILE, code.source, x="float"),
        pack,
        function(_DECODE, code.decode, arguments=canonical) if code.decode else "",
        digits(),
        pairs,
        octets,
        unpack if code.unpack is not None else None,
        dots=dots,
        code_bits=code.code_bits,
    )


_OWN = ("const int64_t *masks", "const int32_t *starts", "const uint8_t *codes", "const int64_t count")
