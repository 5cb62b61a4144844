"""The forms of x for matrix units, PAIRS and OCTETS of `forms.py`, with the C that packs them and walks tiles.

A *unit* is a strip of a tile by the columns that a format unpacks at a time, in the first-level cache. While
one unit is on the matrix units, the next is unpacked, and the sums of the one before are scaled.
"""

import textwrap
from string import Template

from stoicc.codegen.cpu.plan import FormatPart, KernelClass
from stoicc.ir.format import TileOctets


def pack(kernel: KernelClass) -> list[Template]:
    """C that packs x in the forms for matrix units; of octets after `whole_numbers`."""
    return [_OCTET_BYTES, _PACK_OCTETS] * kernel.octets + [_PACK_PAIRS] * kernel.pairs


def add_tiles(part: FormatPart, names: dict[str, str], form: str) -> str:
    """C that unpacks the units of a format's tiles, one ahead, and multiplies them on matrix units."""
    code = part.code.pairs if form == "pairs" else part.code.octets
    assert code is not None
    scaled = isinstance(code, TileOctets) or code.scaled
    sums, add = (_SCALED_SUMS if scaled else _PLAIN_SUMS), (_ADD_PAIRS if form == "pairs" else _ADD_OCTETS)
    names = {**names, "columns": str(code.columns), "form": form, "element": "bf16" if form == "pairs" else "int8_t"}
    pointers = names["pointers"].replace("if (w->streamed)", "if (w->streamed && unit == 0)")
    steps = {key: Template(text).substitute(names) for key, text in sums.items()}
    unpack = _UNPACK.substitute({**names, **steps, "pointers": textwrap.indent(textwrap.dedent(pointers), "    ")})
    return unpack + add.substitute({**names, **steps})


_OCTET_BYTES = Template("""\
/* Bytes of one tile column of x in octets, at most CHUNK entries: rows of digits, then the units. */
static inline int64_t octet_bytes(int64_t entries)
{
    return (entries / 16 * 48 + digit_rows(entries % 16)) * BK + (entries * 4 + 63) / 64 * 64;
}
""")

_PACK_OCTETS = Template("""\
/* One tile column of x in octets. Returns 1 where x has no such form. */
static int pack_octets(const struct weight *w, const $x *x, int64_t batch, int tile_column, int8_t *packed)
{
    for (int64_t first = 0; first < batch; first += CHUNK) {
        const int count = batch - first < CHUNK ? (int)(batch - first) : CHUNK;
        const int64_t size = octet_bytes(count);
        int8_t *panel = packed + first / CHUNK * w->tile_columns * octet_bytes(CHUNK) + tile_column * size;
        float *unit = (float *)(panel + size - (count * 4 + 63) / 64 * 64);
        for (int n = 0; n < count; n++) {
            const int block = n / 16 * 16, nb = count - block < 16 ? count - block : 16, rows = digit_rows(nb);
            int32_t whole[BK];
            if (whole_numbers(w, x, first + n, (int64_t)tile_column * BK, whole, unit + n))
                return 1;
            for (int k = 0; k < BK; k += 64)
                for (int digit = 0; digit < 3; digit++) {
                    int8_t *to = panel + block * 3 * BK + (k / 64 * rows + digit * nb + n - block) * 64;
                    for (int i = 0; i < 64; i++) {
                        to[i] = lowest_digit(whole[k + i]);
                        whole[k + i] = higher_digits(whole[k + i]);
                    }
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

_UNPACK = Template("""\
/* One unit of tile t (a strip and ${columns} of its columns) as $form$and_scale. */
static $returns unpack_${name}_$form(const struct weight *w, int t, int unit, $element *to)
{
$pointers
    $give${name}_$form($arguments, unit, to);
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

_ADD_OCTETS = Template("""\
/* The same with x in octets: `count` entries, whose sums are in blocks of `wide`, `width` in all. */
static void add_${name}_octets(
    const struct weight *w, int begin, int end, const int8_t *x, int count, int wide, int width, float *acc)
{
    enum { SIZE = $columns, GROUPS = BK / SIZE, UNITS = STRIPS * GROUPS };
    const int64_t size = octet_bytes(count), units = size - (count * 4 + 63) / 64 * 64;
    const int last = (end - begin) * UNITS - 1;
    int8_t octets[2][SIZE * LANES] __attribute__((aligned(64)));
    int32_t parts[2][3 * 256] __attribute__((aligned(64))); /* sums before they are joined */
    waiting_digits now = {0}, before = {0}; /* on the matrix units, in tiles 0 .. 2 or 3 .. 5 by turns; in a part */
    vfloat scale = vf_zero();
    int step = 0;
    if (last >= 0)
        $first;
    for (int i = 0, t = begin, unit = 0; i <= last; i++) {
        const int8_t *panel = x + w->${name}_tile_column[t] * size;
        const float *x_unit = (const float *)(panel + units);
        const int strip = unit / GROUPS, group = unit % GROUPS;
$now        unit = unit + 1 < UNITS ? unit + 1 : 0;
        t += unit == 0;
        for (int n = 0; n < count; n += 16, step++) {
            const int entries = count - n < 16 ? count - n : 16, rows = digit_rows(entries);
            const int8_t *digits = panel + n * 3 * BK + group * SIZE * rows;
            if (step % 2)
                digits_multiply(3, octets[i % 2], SIZE, digits, rows);
            else
                digits_multiply(0, octets[i % 2], SIZE, digits, rows);
            if (n == 0 && i < last)
                $next;
            digits_join(&before, parts[step % 2], wide, width);
            if (step % 2)
                digits_store(0, parts[(step + 1) % 2], now.rows);
            else
                digits_store(3, parts[(step + 1) % 2], now.rows);
            before = now;
            now = (waiting_digits){acc, x_unit + n, n, entries, strip, rows, own};
        }
    }
    digits_join(&before, parts[step % 2], wide, width);
    if (step % 2)
        digits_store(0, parts[(step + 1) % 2], now.rows);
    else
        digits_store(3, parts[(step + 1) % 2], now.rows);
    digits_join(&now, parts[(step + 1) % 2], wide, width);
}
""")

_PLAIN_SUMS = {
    "returns": "void",
    "give": "",
    "and_scale": "",
    "declarations": "",
    "first": "unpack_${name}_$form(w, begin, 0, $form[0])",
    "now": "",
    "start": "sums_load(sums + n * SUMS, 16 * SUMS, count - n)",
    "next": "unpack_${name}_$form(w, t, unit, $form[(i + 1) % 2])",
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
    "first": "scale = unpack_${name}_$form(w, begin, 0, $form[0])",
    "now": "        vfloat own = scale;\n",
    "start": "sums_clear(count - n)",
    "next": "scale = unpack_${name}_$form(w, t, unit, $form[(i + 1) % 2])",
    "finish": """\
            sums_add_scaled(&waiting, parts[(step + 1) % 2], 16 * SUMS);
            sums_store(parts[step % 2], 256, count - n);
            waiting = (waiting_sums){sums + n * SUMS, count - n, own};
            step++;
""",
    "end": "    sums_add_scaled(&waiting, parts[(step + 1) % 2], 16 * SUMS);\n",
}
