"""The forms in which tiles read x, each with the C that packs it and walks tiles with it.

    FLOATS  fp32 [chunk][tile column][block of WIDE entries][column / 4][entry][column % 4]
    DIGITS  three 8-bit digits of a fixed-point number per tile column and entry, for integer units
    PAIRS   bf16 [chunk][tile column][block of 16 entries][column / 32][entry][column % 32], for matrix units

A call packs x in one of them, or in the first two where formats differ. Sums are
`[block of entries][strip][entry][lane]`; blocks are WIDE entries wide, 16 for PAIRS, and the last one
is as wide as the batch leaves it, rounded up.
"""

import textwrap
from string import Template

from stoicc.codegen.cpu.plan import C_TYPES, DIGIT_BATCHES, FormatPart, KernelClass, member
from stoicc.ir.format import PlaneKind

_INDEX_AHEAD = 64
"""Tiles ahead that indices are asked for: four cache lines of them."""
_LEAST_FETCH, _MOST_FETCH = 64, 1024
"""Bytes of a plane's entry that are asked for tile by tile; of larger ones the format's code asks for its own."""


def pack(kernel: KernelClass) -> str:
    """C that packs x in every form that the kernel uses."""
    permuted = kernel.has("column_permutation") is not None
    source = "from[w->input_column[column + k]]" if permuted else "from[k]"
    scale = " * w->input_scale[column + k]" if kernel.has("input_scale") is not None else ""
    names = {
        "x": C_TYPES[kernel.x_dtype],
        "source": source,
        "value": f"{kernel.x_dtype}_to_float({source}){scale}",
        "offset": "" if permuted else " + column",
    }
    texts = [_PACK_FLOATS]
    if kernel.digits:
        texts.append(_PACK_DIGITS)
    if kernel.pairs:
        texts.append(_PACK_PAIRS)
    return "\n".join(text.substitute(names) for text in texts)


def add_tiles(part: FormatPart, kernel: KernelClass) -> str:
    """C that adds a range of a format's tiles to the sums of their tile row, for every form it takes x in."""
    pointers, arguments = _planes(part)
    names = {
        "name": part.name,
        "format": str(part.format),
        "pointers": "\n".join(pointers),
        "arguments": ", ".join(arguments),
    }
    text = _ADD_FLOATS.substitute(names, tails=_tails(names, "tile", kernel.wide))
    if kernel.digits and part.code.digits:
        text += "\n" + _ADD_DIGITS.substitute(names, tails=_tails(names, "digits", 2 * max(DIGIT_BATCHES)))
    if kernel.pairs:
        text += "\n" + _add_pairs(part, names)
    return text


def _add_pairs(part: FormatPart, names: dict[str, str]) -> str:
    """C that unpacks the units of a format's tiles, one ahead, and multiplies them on matrix units."""
    code = part.code.pairs
    assert code is not None
    sums = _SCALED_SUMS if code.scaled else _PLAIN_SUMS
    names = {**names, "columns": str(code.columns)}
    pointers = names["pointers"].replace("if (w->streamed)", "if (w->streamed && unit == 0)")
    steps = {key: Template(text).substitute(names) for key, text in sums.items()}
    unpack = _UNPACK.substitute({**names, **steps, "pointers": textwrap.indent(textwrap.dedent(pointers), "    ")})
    return unpack + _ADD_PAIRS.substitute({**names, **steps})


def _tails(names: dict[str, str], kind: str, wide: int) -> str:
    if kind == "digits":
        cases = [_DIGITS_CASE.substitute(names, nb=nb) for nb in DIGIT_BATCHES]
    else:
        cases = [_TAIL.substitute(names, nb=nb) for nb in (4, 2, 1) if nb < wide]
    return "        " + "        else ".join(cases)


def _planes(part: FormatPart) -> tuple[list[str], list[str]]:
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
        if plane.kind is not PlaneKind.MATRIX and _LEAST_FETCH <= plane.bytes <= _MOST_FETCH:
            tiles = max(2, _MOST_FETCH // plane.bytes)
            fetches.append(f"            fetch({local} + {tiles * plane.elements}, {plane.bytes});")
        if plane.kind is PlaneKind.GROUP:
            fetches.append(f"            fetch(w->{member(part.name, plane.name, 'entry')} + t + {_INDEX_AHEAD}, 4);")
    pointers.append(
        "        if (w->streamed) { /* what tiles to come need: a miss here would hold up all that follows */"
    )
    pointers += [*fetches, "        }"]
    return pointers, arguments


_PACK_FLOATS = Template("""\
/* Batch entries first .. first + count of one tile column of x, as floats. */
static void pack_chunk(const struct weight *w, const $x *x, int64_t first, int count, int tile_column, float *packed)
{
    int width = (int)padded(count);
    int64_t column = (int64_t)tile_column * BK;
    int present = w->columns - column < BK ? (int)(w->columns - column) : BK;
    float *panel = packed + (first * w->tile_columns + (int64_t)tile_column * width) * COLUMNS;
    for (int entry = 0; entry < width; entry++) {
        int block = entry / WIDE * WIDE, n = entry - block, nb = width - block < WIDE ? width - block : WIDE;
        float *to = panel + block * COLUMNS + 4 * n;
        const $x *from = x + (first + entry) * w->columns$offset;
        int known = entry < count ? present : 0;
        for (int k = 0; k < known; k++)
            to[k / 4 * 4 * nb + k % 4] = $value;
        for (int k = known; k < COLUMNS; k++)
            to[k / 4 * 4 * nb + k % 4] = 0;
    }
}

static void pack_floats(const struct weight *w, const $x *x, int64_t batch, int tile_column, float *packed)
{
    for (int64_t first = 0; first < batch; first += CHUNK)
        pack_chunk(w, x, first, batch - first < CHUNK ? (int)(batch - first) : CHUNK, tile_column, packed);
}
""")

_PACK_DIGITS = Template("""\
/* One tile column of x as whole numbers of 22 bits and a sign, in units of a power of two for each entry: each is off
 * by at most 2**-22 of the largest, as a sum in fp32 is. Returns 1 where x has no such form: where it is not
 * finite, or so small that units would be no normal numbers. */
static int pack_digits(const struct weight *w, const $x *x, int64_t batch, int tile_column, int8_t *packed)
{
    enum { SMALLEST = 37 }; /* exponent of 2**-90 */
    const int nb = (int)padded(batch);
    int64_t column = (int64_t)tile_column * BK;
    int present = w->columns - column < BK ? (int)(w->columns - column) : BK;
    int8_t *panel = packed + (int64_t)tile_column * nb * DIGIT_BYTES;
    int32_t *sums = (int32_t *)(panel + 3 * BK * nb);
    float *unit = (float *)(sums + 3 * (BK / 16) * nb);
    memset(panel, 0, nb * DIGIT_BYTES);
    for (int n = 0; n < batch; n++) {
        const $x *from = x + n * w->columns$offset;
        float value[BK] = {0};
        uint32_t largest = 0;
        for (int k = 0; k < present; k++) {
            union { float value; uint32_t word; } both = {$value};
            value[k] = both.value;
            largest = (both.word & 0x7fffffff) > largest ? both.word & 0x7fffffff : largest;
        }
        if (largest >= 0x7f800000 || (largest > 0 && largest >> 23 < SMALLEST))
            return 1;
        uint32_t exponent = largest ? largest >> 23 : 127; /* as a float has it: 127 more */
        union { uint32_t word; float value; } up = {(275 - exponent) << 23}, down = {(exponent - 21) << 23};
        unit[n] = down.value;
        for (int k = 0; k < BK; k++) {
            static const int place[8] = {0, 2, 4, 6, 1, 3, 5, 7}; /* of a column among its eight */
            int whole = (int)__builtin_rintf(value[k] * up.value), high = (whole + 128) >> 8, top = (high + 128) >> 8;
            int8_t *to = panel + (k / 16 * nb + n) * 48 + k / 8 % 2 * 8 + place[k % 8];
            int digit[3] = {whole - (high << 8), high - (top << 8), top};
            for (int i = 0; i < 3; i++) {
                to[16 * i] = (int8_t)digit[i];
                sums[(k / 16 * nb + n) * 3 + i] += digit[i];
            }
        }
    }
    return 0;
}
""")

_PACK_PAIRS = Template("""\
/* One tile column of x as bf16, in blocks of 16 entries by 32 columns. */
static void pack_pairs(const struct weight *w, const $x *x, int64_t batch, int tile_column, bf16 *packed)
{
    int64_t column = (int64_t)tile_column * BK;
    int present = w->columns - column < BK ? (int)(w->columns - column) : BK;
    const int chunk = batch < LEAST_BLOCKED ? CHUNK : MANY;
    for (int64_t first = 0; first < batch; first += chunk) {
        int count = batch - first < chunk ? (int)(batch - first) : chunk, width = (int)whole_blocks(count);
        bf16 *panel = packed + (first * w->tile_columns + (int64_t)tile_column * width) * BK;
        for (int entry = 0; entry < width; entry++) {
            bf16 *to = panel + entry / 16 * 16 * BK + entry % 16 * 32;
            const $x *from = x + (first + entry) * w->columns$offset;
            int known = entry < count ? present : 0;
            for (int k = 0; k < known; k++)
                to[k / 32 * 512 + k % 32] = $source;
            for (int k = known; k < BK; k++)
                to[k / 32 * 512 + k % 32] = 0;
        }
    }
}
""")

_ADD_FLOATS = Template("""\
/* Tiles begin .. end of format $format, added to the sums of their tile row. */
static void add_${name}_tiles(const struct weight *w, int begin, int end, const float *x, int width, float *acc)
{
    for (int t = begin; t < end; t++) {
        const float *panel = x + (int64_t)w->${name}_tile_column[t] * width * COLUMNS;
$pointers
        int n = 0;
        for (; n + WIDE <= width; n += WIDE)
            ${name}_tile($arguments, panel + n * COLUMNS, acc + n * SUMS, WIDE);
$tails    }
}
""")

_TAIL = Template("""\
if (width - n == $nb)
            ${name}_tile($arguments, panel + n * COLUMNS, acc + n * SUMS, $nb);
""")

_ADD_DIGITS = Template("""\
/* The same with x in digits. */
static void add_${name}_digits(const struct weight *w, int begin, int end, const int8_t *x, int width, float *acc)
{
    for (int t = begin; t < end; t++) {
        const int8_t *panel = x + (int64_t)w->${name}_tile_column[t] * width * DIGIT_BYTES;
$pointers
$tails    }
}
""")

_DIGITS_CASE = Template("""\
if (width == $nb)
            ${name}_digits($arguments, panel, acc, $nb);
""")

_UNPACK = Template("""\
/* One unit of tile t (a strip and ${columns} of its columns) as pairs$and_scale. */
static $returns unpack_$name(const struct weight *w, int t, int unit, bf16 *pairs)
{
$pointers
    $give${name}_pairs($arguments, unit, pairs);
}

""")

_ADD_PAIRS = Template("""\
/* The same with x in pairs. While a unit is on the matrix units, the next one is unpacked. */
static void add_${name}_pairs(const struct weight *w, int begin, int end, const bf16 *x, int count, float *acc)
{
    enum { SIZE = $columns, GROUPS = BK / SIZE, UNITS = STRIPS * GROUPS };
    const int64_t width = whole_blocks(count);
    const int last = (end - begin) * UNITS - 1;
    bf16 pairs[2][SIZE * LANES] __attribute__((aligned(64)));
$declarations    if (last >= 0)
        $first;
    for (int i = 0, t = begin, unit = 0; i <= last; i++) {
        const bf16 *panel = x + w->${name}_tile_column[t] * width * BK + unit % GROUPS * SIZE * 16;
        float *sums = acc + unit / GROUPS * (16 * LANES);
$now        unit = unit + 1 < UNITS ? unit + 1 : 0;
        t += unit == 0;
        for (int n = 0; n < count; n += 64) {
            $start;
            sums_add_product(pairs[i % 2], SIZE, panel + n * BK, count - n);
            if (n == 0 && i < last)
                $next;
$finish        }
    }
$end}
""")

_PLAIN_SUMS = {
    "returns": "void",
    "give": "",
    "and_scale": "",
    "declarations": "",
    "first": "unpack_$name(w, begin, 0, pairs[0])",
    "now": "",
    "start": "sums_load(sums + n * SUMS, 16 * SUMS, count - n)",
    "next": "unpack_$name(w, t, unit, pairs[(i + 1) % 2])",
    "finish": "            sums_store(sums + n * SUMS, 16 * SUMS, count - n);\n",
    "end": "",
}

_SCALED_SUMS = {
    "returns": "vfloat",
    "give": "return ",
    "and_scale": "; returns the scale of each row",
    "declarations": """\
    float parts[2][4 * 256] __attribute__((aligned(64))); /* sums before they are scaled */
    waiting_sums waiting = {0};
    vfloat scale = vf_zero();
    int step = 0;
""",
    "first": "scale = unpack_$name(w, begin, 0, pairs[0])",
    "now": "        vfloat own = scale;\n",
    "start": "sums_clear(count - n)",
    "next": "scale = unpack_$name(w, t, unit, pairs[(i + 1) % 2])",
    "finish": """\
            sums_add_scaled(&waiting, parts[(step + 1) % 2], 16 * SUMS);
            sums_store(parts[step % 2], 256, count - n);
            waiting = (waiting_sums){sums + n * SUMS, count - n, own};
            step++;
""",
    "end": "    sums_add_scaled(&waiting, parts[(step + 1) % 2], 16 * SUMS);\n",
}
