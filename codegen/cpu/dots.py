"""C that multiplies bf16 pairs of tiles and of x in vectors, a few batch entries at a time, unit by unit.

A format's pairs are unpacked for each eight entries again, and most of them meet x before they leave the registers;
`blocked.py` unpacks them once for many, but for those whose lanes pick or that leave out what is dropped.
"""

from string import Template

from stoicc.codegen.cpu import units
from stoicc.codegen.cpu.counts import alone, walk
from stoicc.codegen.cpu.layouts import MOST_FETCH
from stoicc.codegen.cpu.plan import FormatPart, KernelClass
from stoicc.ir.format import PlaneKind, TilePairs


def add_dots(part: FormatPart, kernel: KernelClass, names: dict[str, str]) -> str:
    """C that unpacks the units of a format's tiles, and multiplies them and pairs of x in vectors."""
    names = {**names, "form": "pairs", "adds": "pairs", "element": "bf16", "entry": "COLUMNS"}
    names["function"] = f"multiply_{part.name}_tile"
    counts, own = [nb for nb in (8, 4, 2, 1) if nb <= kernel.wide], kernel.dots_of(part)
    ways = {"dots": own, "pairs": kernel.pairs_of(part)} if kernel.has_dots(part) else {"pairs": own}
    text = "" if kernel.walked(part) else units.unpack(kernel.pairs_of(part), names, "pairs")
    for form, code in ways.items():
        mine = [nb for nb in counts if len(ways) == 1 or (nb <= own.most) == (form == "dots")]
        if mine:
            names["inner"] = names["function"] + "_of_many" * (form == "pairs" and min(mine) > 1)
            text += _multiply(part, kernel, names, form, code) + alone(names, mine)
    return text + walk(names, counts, kernel.wide)


def _multiply(part: FormatPart, kernel: KernelClass, names: dict[str, str], form: str, code: TilePairs) -> str:
    """C that multiplies a tile whose units are unpacked in one form: `dots` or `pairs`."""
    if code.whole:
        return _WHOLE.substitute(names, cross=_CROSS * code.crossed)
    add, size, x = "add_dots", "SIZE", "x + unit * SIZE * nb"
    if code.picked:
        add, size, x = "add_dots_of_columns", str(code.picked), "entries + unit * SIZE"
    elif form == "pairs" and kernel.picks(part):
        add = "add_picked_dots"
    apart = f"        {part.name}_apart({names['planes']}, strip, entries, acc, nb, &place);\n"
    start = "    int64_t place = 0;\n" * (code.ordered or bool(code.apart))
    start += _ENTRIES * (code.picked > 0 or bool(code.apart)) + _CROSS * code.crossed
    steps = {
        "form": form,
        "group": str(code.group),
        "columns": str(code.columns),
        "add": add,
        "size": size,
        "from": x,
        "start": start,
        "again": "entries" if code.picked else "x",
        "place": ", &place" * code.ordered,
        "apart": apart * bool(code.apart),
        **_asks(part, kernel, code),
        **(_SCALED if code.scaled else _PLAIN),
    }
    return _MULTIPLY.substitute(names, **steps)


def _asks(part: FormatPart, kernel: KernelClass, code: TilePairs) -> dict[str, str]:
    """C that asks for what a strip's or a unit's place in tiles to come holds, of planes that are streams."""
    units = kernel.strips * kernel.tile[1] // code.columns
    strip, unit = [], []
    for plane in part.planes:
        local = f"plane_{plane.name}"
        if plane.kind is PlaneKind.RAGGED:
            first = f"{local}_count * strip / {kernel.strips}{f' * {plane.elements}' * (plane.elements > 1)}"
            strip.append(f"ahead({local} + {first}, (int){local}_count * {plane.bytes} / {kernel.strips});")
        elif plane.kind is not PlaneKind.MATRIX and plane.bytes > MOST_FETCH:
            unit.append(f"ahead({local} + (strip * UNITS + unit) * {plane.elements // units}, {plane.bytes // units});")
    texts = {}
    for name, lines, indent in (("strip_asks", strip, " " * 8), ("asks", unit, " " * 12)):
        asks = "".join(f"{indent}    {line}\n" for line in lines)
        texts[name] = f"{indent}if (nb >= {kernel.least_ahead(part)}) {{\n{asks}{indent}}}\n" if lines else ""
    return texts


_MULTIPLY = Template("""\
/* One tile times x in pairs, nb entries: the pairs of $columns columns of a strip meet x while they are at hand. */
INLINE void ${inner}($parameters, const bf16 *x, float *acc, const int nb)
{
    enum { SIZE = $columns, GROUP = $group, UNITS = BK / SIZE };
$start    for (int strip = 0; strip < STRIPS; strip++, acc += LANES * nb) {
        vfloat sum[8];
        $again = anew_for_strip($again, strip);
$strip_asks$clear_strip        for (int unit = 0; unit < UNITS; unit++) {
            bf16 pairs[SIZE * LANES] __attribute__((aligned(64)));
$asks$clear_group            $scale${name}_$form($planes, strip * UNITS + unit, pairs$place);
            $add(sum, pairs, $size, $from, nb);
$store_group        }
$store_strip$apart    }
}
""")

_WHOLE = Template("""\
/* One tile times x in pairs, nb entries. */
INLINE void ${inner}($parameters, const bf16 *x, float *acc, const int nb)
{
$cross    ${name}_dots($planes, x, acc, nb);
}
""")

_ENTRIES = """\
    bf16 room[BK * WIDE] __attribute__((aligned(64)));
    const bf16 *entries = entries_apart(x, room, nb);
"""

_CROSS = """\
    bf16 crossed[BK * WIDE] __attribute__((aligned(64)));
    x = cross_columns(x, BK * nb, crossed);
"""

_PLAIN = {
    **dict.fromkeys(("clear_group", "scale", "store_group"), ""),
    "clear_strip": "        clear_dots(sum, nb);\n",
    "store_strip": "        store_dots(acc, sum, nb);\n",
}

_SCALED = {
    **dict.fromkeys(("clear_strip", "store_strip"), ""),
    "clear_group": "            if (unit % GROUP == 0)\n                clear_dots(sum, nb);\n",
    "scale": "vfloat scale = ",
    "store_group": """\
            if (unit % GROUP == GROUP - 1)
                store_scaled_dots(acc, scale, sum, nb);
""",
}
