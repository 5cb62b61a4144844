"""The forms in which tiles read x, each with the C that packs it and walks tiles with it.

    FLOATS  fp32 [chunk][tile column][block of WIDE entries][column / 4][entry][column % 4]
    DIGITS  three 8-bit digits of a fixed-point number per tile column and entry, for integer units
    PAIRS   bf16 [chunk][tile column][block of 16 entries][column / 32][entry][column % 32], for matrix units;
            in the order of FLOATS for vectors
    OCTETS  the same digits [chunk][tile column][block of 16 entries][column / 64][digit and entry][column % 64],
            for integer matrix units

A call packs x in one of them, or in more where formats differ. Sums are
`[block of entries][strip][entry][lane]`; blocks are WIDE entries wide, 16 for PAIRS, and the last one
is as wide as the batch leaves it, rounded up.
"""

from string import Template

from stoicc.codegen.cpu import dots, units
from stoicc.codegen.cpu.counts import alone, walk
from stoicc.codegen.cpu.layouts import MOST_FETCH
from stoicc.codegen.cpu.plan import FormatPart, KernelClass, member
from stoicc.codegen.cpu.plane_types import C_TYPES
from stoicc.ir.format import PlaneKind

_INDEX_AHEAD = 64
"""Tiles ahead that indices are asked for: four cache lines of them."""
_LEAST_FETCH = 64
"""Bytes of a plane's entry that are asked for tile by tile, at least."""


def pack(kernel: KernelClass) -> str:
    """C that packs x in every form that the kernel uses."""
    permuted = kernel.has("column_permutation") is not None
    source = "from[w->input_column[column + $k]]" if permuted else "from[$k]"
    scale = " * w->input_scale[column + $k]" if kernel.has("input_scale") is not None else ""
    value = f"{kernel.x_dtype}_to_float({source}){scale}"
    names = {
        "x": C_TYPES[kernel.x_dtype],
        "source": source.replace("$k", "k"),
        "value": value.replace("$k", "k"),
        "four": "\n                " + ",\n                ".join(value.replace("$k", f"k + {i}") for i in range(4)),
        "offset": "" if permuted else " + column",
        "bits": {"bf16": "8", "f16": "11", "f32": "14"}[kernel.x_dtype],
    }
    texts = [_PACK_CHUNK.substitute(names, function="pack_chunk", element="float", form="floats")] * kernel.floats
    if kernel.pairs and not kernel.tiled_pairs:
        four = ", ".join(source.replace("$k", f"k + {i}") for i in range(4))
        bits = {**names, "four": four, "value": names["source"]}
        texts.append(_PACK_CHUNK.substitute(bits, function="pack_pair_chunk", element="bf16", form="pairs"))
    later = [_WHOLE_NUMBERS] * (kernel.digits or kernel.octets) + [_PACK_DIGITS] * kernel.digits
    later += units.pack(kernel)
    return "\n".join([*texts, *(text.substitute(names) for text in later)])


def add_tiles(part: FormatPart, kernel: KernelClass) -> str:
    """C that adds a range of a format's tiles to the sums of their tile row, for every form it takes x in."""
    pointers, arguments = planes_of(part)
    names = {
        "name": part.name,
        "format": str(part.format),
        "pointers": "\n".join(pointers),
        "arguments": ", ".join(arguments),
    }
    planes = _parameters(part)
    names |= {"parameters": ", ".join(map("".join, planes)), "planes": ", ".join(name for _, name in planes)}
    counts = [nb for nb in (8, 4, 2, 1) if nb <= kernel.wide]
    text = ""
    if kernel.floats:
        names |= {"form": "floats", "adds": "tiles", "element": "float", "entry": "COLUMNS"}
        names |= dict.fromkeys(("function", "inner"), f"{part.name}_tile")
        text += alone(names, counts) + walk(names, counts, kernel.wide)
    if kernel.takes_digits(part):
        names |= {"form": "digits", "adds": "digits", "element": "int8_t", "entry": "DIGIT_BYTES"}
        names |= dict.fromkeys(("function", "inner"), f"{part.name}_digits")
        few = [nb for nb in counts if nb <= kernel.most_digits]
        text += "\n" + alone(names, few) + walk(names, few, kernel.wide)
    if kernel.tiled_pairs:
        text += "\n" + units.add_tiles(part, kernel, names, "pairs")
    elif kernel.pairs:
        text += "\n" + dots.add_dots(part, kernel, names)
    if kernel.octets and part.code.octets:
        text += "\n" + units.add_tiles(part, kernel, names, "octets")
    return text


def _parameters(part: FormatPart) -> list[tuple[str, str]]:
    """The planes of a tile as parameters of a C function: types and names."""
    parameters = []
    for plane in part.planes:
        parameters.append((f"const {C_TYPES[plane.dtype]} *", f"plane_{plane.name}"))
        if plane.kind is PlaneKind.RAGGED:
            parameters.append(("const int64_t ", f"plane_{plane.name}_count"))
    return parameters


def planes_of(part: FormatPart) -> tuple[list[str], list[str]]:
    """Lines that point at the planes of tile t and ask for later ones, and the arguments for a format's function."""
    pointers, arguments = [], []
    fetches = [f"            fetch(w->{part.name}_tile_column + t + {_INDEX_AHEAD}, 4);"]
    for plane in part.planes:
        base, local = f"w->{member(part.name, plane.name)}", f"plane_{plane.name}"
        declaration = f"        const {C_TYPES[plane.dtype]} *{local} = "
        arguments.append(local)
        if plane.kind is PlaneKind.RAGGED:
            ptr = f"w->{member(part.name, plane.name, 'ptr')}"
            pointers.append(f"{declaration}{base} + {ptr}[t]{f' * {plane.elements}' * (plane.elements > 1)};")
            arguments.append(f"{ptr}[t + 1] - {ptr}[t]")
            fetches.append(f"            fetch({ptr} + t + {_INDEX_AHEAD}, 8);")
            continue
        shared = f"w->{member(part.name, plane.name, 'entry')}[t]"
        entry = {PlaneKind.TILE: "t", PlaneKind.GROUP: shared, PlaneKind.MATRIX: ""}[plane.kind]
        pointers.append(f"{declaration}{base}{f' + (int64_t){entry} * {plane.elements}' if entry else ''};")
        if plane.kind is not PlaneKind.MATRIX and _LEAST_FETCH <= plane.bytes <= MOST_FETCH:
            tiles = max(2, MOST_FETCH // plane.bytes)
            fetches.append(f"            fetch({local} + {tiles * plane.elements}, {plane.bytes});")
        if plane.kind is PlaneKind.GROUP:
            fetches.append(f"            fetch(w->{member(part.name, plane.name, 'entry')} + t + {_INDEX_AHEAD}, 4);")
    pointers.append(
        "        if (w->streamed) { /* what tiles to come need: a miss here would hold up all that follows */"
    )
    pointers += [*fetches, "        }"]
    return pointers, arguments


_PACK_CHUNK = Template("""\
/* Batch entries first .. first + count of one tile column of x, as $form. */
static void $function(const struct weight *w, const $x *x, int64_t first, int count, int tile_column, $element *packed)
{
    int width = (int)padded(count);
    int64_t column = (int64_t)tile_column * BK;
    int present = w->columns - column < BK ? (int)(w->columns - column) : BK;
    $element *panel = packed + (first * w->tile_columns + (int64_t)tile_column * width) * COLUMNS;
    for (int entry = 0; entry < width; entry++) {
        int block = entry / WIDE * WIDE, n = entry - block, nb = width - block < WIDE ? width - block : WIDE;
        $element *to = panel + block * COLUMNS + 4 * n;
        const $x *from = x + (first + entry) * w->columns$offset;
        int known = entry < count ? present : 0;
        fetch(from + BK, BK * (int)sizeof *from); /* the next tile column's */
        for (int k = 0; k < known / 4 * 4; k += 4) {
            const $element four[4] = {$four};
            memcpy(to + k * nb, four, sizeof four);
        }
        for (int k = known / 4 * 4; k < COLUMNS; k++)
            to[k / 4 * 4 * nb + k % 4] = k < known ? $value : 0;
    }
}
""")

_WHOLE_NUMBERS = Template("""\
/* Entry n of one tile column of x as whole numbers of 22 bits and a sign, in units of a power of two: each is off
 * by at most 2**-22 of the largest. Returns 1 where x has no such form: where it is not finite, or so small that
 * units would be no normal numbers, or where most of it has fewer than $bits bits of such a number: a row
 * without a weight where the largest is would show it. */
static inline int whole_numbers(
    const struct weight *w, const $x *x, int64_t n, int64_t column, int32_t *whole, float *unit)
{
    enum { SMALLEST = 37 }; /* exponent of 2**-90 */
    const int present = w->columns - column < BK ? (int)(w->columns - column) : BK;
    const $x *from = x + n * w->columns$offset;
    float value[BK];
    int32_t largest = 0;
    for (int k = 0; k < present; k++)
        value[k] = $value;
    memset(value + present, 0, sizeof(float) * (BK - present));
    for (int k = 0; k < BK; k++) {
        union { float value; int32_t word; } both = {value[k]};
        largest = (both.word & 0x7fffffff) > largest ? both.word & 0x7fffffff : largest;
    }
    if (largest >= 0x7f800000 || (largest > 0 && largest >> 23 < SMALLEST))
        return 1;
    uint32_t exponent = largest ? largest >> 23 : 127; /* as a float has it: 127 more */
    union { uint32_t word; float value; } up = {(275 - exponent) << 23}, down = {(exponent - 21) << 23};
    *unit = down.value;
    int some = 0, small = 0;
    for (int k = 0; k < BK; k++) {
        whole[k] = (int32_t)__builtin_rintf(value[k] * up.value);
        some += value[k] != 0;
        small += value[k] != 0 && whole[k] < 1 << $bits && whole[k] > -(1 << $bits);
    }
    return 2 * small > some;
}
""")

_PACK_DIGITS = Template("""\
/* Batch entries first .. first + count of one tile column of x in digits. Returns 1 where x has no such form. */
static int pack_digits(
    const struct weight *w, const $x *x, int64_t first, int count, int tile_column, int8_t *packed)
{
    const int width = (int)padded(count);
    int8_t *panel = packed + (first * w->tile_columns + (int64_t)tile_column * width) * DIGIT_BYTES;
    for (int block = 0; block < width; block += WIDE, panel += WIDE * DIGIT_BYTES) {
        const int nb = width - block < WIDE ? width - block : WIDE, known = count - block < nb ? count - block : nb;
        int32_t *sums = (int32_t *)(panel + 3 * BK * nb);
        float *unit = (float *)(sums + 3 * (BK / 16) * nb);
        if (known < nb)
            memset(panel, 0, nb * DIGIT_BYTES);
        for (int n = 0; n < known; n++) {
            int32_t whole[BK];
            if (whole_numbers(w, x, first + block + n, (int64_t)tile_column * BK, whole, unit + n))
                return 1;
            for (int k = 0; k < BK; k += 16)
                store_digits(whole + k, panel + (k / 16 * nb + n) * 48, sums + (k / 16 * nb + n) * 3);
        }
    }
    return 0;
}
""")
