"""The forms of x that meet unpacked tiles, PAIRS and OCTETS of `forms.py`, with the C that packs them and walks tiles.

A *unit* is a strip of a tile by the columns that a format unpacks at a time; a *group* of units has its sums scaled
once. A *block* of units waits unpacked in the first-level cache: each of them is multiplied, then what comes a block
later is unpacked in its place. Unpacking, the matrix units, and the scaling of sums thus overlap within the few
hundred instructions that a core looks ahead, and no tile is loaded while its bytes are still on their way to the
cache. Without matrix units, pairs meet x in vectors, eight sums in registers.
"""

import textwrap
from string import Template

from stoicc.codegen.cpu.lanes import LANES
from stoicc.codegen.cpu.plan import FormatPart, KernelClass
from stoicc.ir.format import TileOctets, TilePairs

_AHEAD = {"pairs": 4096, "octets": 8192}
"""Bytes that are unpacked ahead: what is multiplied should have left the store buffer, or its tiles wait for it."""


def pack(kernel: KernelClass) -> list[Template]:
    """C that packs x in the forms for matrix units; of octets after `whole_numbers`."""
    return [_OCTET_BYTES, _PACK_OCTETS] * kernel.octets + [_PACK_PAIRS] * kernel.tiled_pairs


def add_tiles(part: FormatPart, kernel: KernelClass, names: dict[str, str], form: str) -> str:
    """C that unpacks the units of a format's tiles, a block ahead, and multiplies them on matrix units."""
    code = kernel.pairs_of(part) if form == "pairs" else part.code.octets
    assert code is not None
    scaled = isinstance(code, TileOctets) or code.scaled
    sums, add = (_SCALED_SUMS if scaled else _PLAIN_SUMS), (_ADD_PAIRS if form == "pairs" else _ADD_OCTETS)
    names = {**names, "group": str(code.group), "block": str(_block(code, form, kernel)), "columns": str(code.columns)}
    steps = {key: Template(text).substitute(names) for key, text in sums.items()}
    return unpack(code, names, form) + add.substitute({**names, **steps})


def unpack(code: TilePairs | TileOctets, names: dict[str, str], form: str) -> str:
    """C that unpacks a unit of a tile, and asks for what tiles to come need."""
    scaled = isinstance(code, TileOctets) or code.scaled
    pointers = names["pointers"].replace("if (w->streamed)", "if (w->streamed && unit == 0)")
    return _UNPACK.substitute(
        names,
        columns=code.columns,
        form=form,
        element="bf16" if form == "pairs" else "int8_t",
        pointers=textwrap.indent(textwrap.dedent(pointers), "    "),
        returns="vfloat" if scaled else "void",
        give="return " if scaled else "",
        and_scale="; returns the scale of each row" if scaled else "",
    )


def _block(code: TilePairs | TileOctets, form: str, kernel: KernelClass) -> int:
    """Units that are unpacked ahead: whole groups, a divisor of a tile's, of `_AHEAD` bytes where there are as many."""
    units, block = kernel.strips * kernel.tile[1] // code.columns, code.group
    unit_bytes = code.columns * LANES * (2 if form == "pairs" else 1)
    while block * unit_bytes < _AHEAD[form] and units % (2 * block) == 0:
        block *= 2
    return block


_OCTET_BYTES = Template("""\
/* Bytes of one tile column of x in octets, at most CHUNK entries: rows of digits, then the units. */
static inline int64_t octet_bytes(int64_t entries)
{
    return (entries / 16 * 48 + digit_rows(entries % 16)) * BK + (entries * 4 + 63) / 64 * 64;
}
""")

_PACK_OCTETS = Template("""\
/* A digit of a whole number, signed, and what is left for the digits above it. */
static inline int8_t lowest_digit(int32_t whole)
{
    return (int8_t)whole;
}

static inline int32_t higher_digits(int32_t whole)
{
    return (whole + 128) >> 8;
}

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
            for (int block = 0; block + 32 <= known; block += 32)
                for (int k = block; k < block + 32; k++)
                    to[block * 16 + k - block] = $source;
            for (int k = known / 32 * 32; k < BK; k++)
                to[k / 32 * 512 + k % 32] = k < known ? $source : 0;
        }
    }
}
""")

_UNPACK = Template("""\
/* One unit of tile t (a strip and ${columns} of its columns) as $form$and_scale. */
INLINE $returns unpack_${name}_$form(const struct weight *w, int t, int unit, $element *to)
{
$pointers
    $give${name}_$form($arguments, unit, to);
}

""")

_ADD_PAIRS = Template("""\
/* The same with x in pairs: `count` entries, 32 of them at a time. */
static void add_${name}_pairs(const struct weight *w, int begin, int end, const bf16 *x, int count, float *acc)
{
    enum { SIZE = $columns, GROUP = $group, BLOCK = $block, UNITS = STRIPS * BK / SIZE };
    const int64_t width = whole_blocks(count);
    bf16 pairs[BLOCK][SIZE * LANES] __attribute__((aligned(64)));
$declarations    int step = 0;
    if (begin == end)
        return;
    #pragma GCC unroll 16
    for (int i = 0; i < BLOCK; i++)
        ${keep_first}unpack_${name}_pairs(w, begin, i, pairs[i]);
    for (int t = begin, unit = 0; t < end;) {
        const bf16 *panel = x + w->${name}_tile_column[t] * width * BK;
        const int first = unit;
        unit = unit + BLOCK < UNITS ? unit + BLOCK : 0;
        t += unit == 0;
        for (int n = 0; n < count; n += 32) {
            const int entries = count - n, more = n + 32 >= count && t < end;
            #pragma GCC unroll 16
            for (int i = 0; i < BLOCK; i++) {
                const int column = (first + i) * SIZE % BK, strip = (first + i) * SIZE / BK;
                float *sums = acc + n * SUMS + strip * (16 * LANES);
                if (i % GROUP == 0)
                    $start;
                sums_add_product(step % 2, pairs[i], SIZE, panel + n * BK + column * 16, entries);
                if (i % GROUP == GROUP - 1) {
$finish                    step++;
                }
$next            }
        }
    }
$end}
""")

_ADD_OCTETS = Template("""\
/* The same with x in octets: `count` entries, whose sums are in blocks of `wide`, `width` in all. */
static void add_${name}_octets(
    const struct weight *w, int begin, int end, const int8_t *x, int count, int wide, int width, float *acc)
{
    enum { SIZE = $columns, GROUP = $group, BLOCK = $block, UNITS = STRIPS * BK / SIZE };
    const int64_t size = octet_bytes(count), x_units = size - (count * 4 + 63) / 64 * 64;
    int8_t octets[BLOCK][SIZE * LANES] __attribute__((aligned(64)));
    int32_t parts[2][3 * 256] __attribute__((aligned(64))); /* sums before they are joined */
    waiting_digits now = {0}, before = {0}; /* on the matrix units, in tiles 0 .. 2 or 3 .. 5 by turns; in a part */
    vfloat scale[BLOCK / GROUP];
    int step = 0;
    if (begin == end)
        return;
    #pragma GCC unroll 16
    for (int i = 0; i < BLOCK; i++)
        scale[i / GROUP] = unpack_${name}_octets(w, begin, i, octets[i]);
    for (int t = begin, unit = 0; t < end;) {
        const int8_t *panel = x + w->${name}_tile_column[t] * size;
        const int first = unit;
        unit = unit + BLOCK < UNITS ? unit + BLOCK : 0;
        t += unit == 0;
        for (int n = 0; n < count; n += 16) {
            const int entries = count - n < 16 ? count - n : 16, rows = digit_rows(entries);
            const int more = n + 16 >= count && t < end;
            #pragma GCC unroll 16
            for (int i = 0; i < BLOCK; i++) {
                const int column = (first + i) * SIZE % BK, strip = (first + i) * SIZE / BK;
                digits_multiply(step % 2, i % GROUP == 0, octets[i], SIZE, panel + (n * 3 * BK + column * rows), rows);
                if (i % GROUP == GROUP - 1) {
                    digits_join(&before, parts[step % 2], wide, width);
                    digits_store((step + 1) % 2, parts[(step + 1) % 2], now.rows);
                    before = now;
                    now = (waiting_digits){
                        acc, (const float *)(panel + x_units) + n, n, entries, strip, rows, scale[i / GROUP]};
                    step++;
                }
                if (more) {
                    vfloat own = unpack_${name}_octets(w, t, unit + i, octets[i]);
                    if (i % GROUP == GROUP - 1)
                        scale[i / GROUP] = own;
                }
            }
        }
    }
    digits_join(&before, parts[step % 2], wide, width);
    digits_store((step + 1) % 2, parts[(step + 1) % 2], now.rows);
    digits_join(&now, parts[(step + 1) % 2], wide, width);
}
""")

_PLAIN_SUMS = {
    "declarations": "",
    "keep_first": "",
    "next": """\
                if (more)
                    unpack_${name}_pairs(w, t, unit + i, pairs[i]);
""",
    "start": "sums_load(step % 2, sums, 16 * SUMS, entries)",
    "finish": "                    sums_store(step % 2, sums, 16 * SUMS, entries);\n",
    "end": "",
}

_SCALED_SUMS = {
    "declarations": """\
    float parts[2][2 * 256] __attribute__((aligned(64))); /* sums before they are scaled */
    waiting_sums now = {0}, before = {0}; /* in tiles; in a part */
    vfloat scale[BLOCK / GROUP];
""",
    "keep_first": "scale[i / GROUP] = ",
    "next": """\
                if (more) {
                    vfloat own = unpack_${name}_pairs(w, t, unit + i, pairs[i]);
                    if (i % GROUP == GROUP - 1)
                        scale[i / GROUP] = own;
                }
""",
    "start": "sums_clear(step % 2, entries)",
    "finish": """\
                    sums_add_scaled(&before, parts[step % 2], 16 * SUMS);
                    sums_store((step + 1) % 2, parts[(step + 1) % 2], 256, now.entries);
                    before = now;
                    now = (waiting_sums){sums, entries, scale[i / GROUP]};
""",
    "end": """\
    sums_add_scaled(&before, parts[step % 2], 16 * SUMS);
    sums_store((step + 1) % 2, parts[(step + 1) % 2], 256, now.entries);
    sums_add_scaled(&now, parts[(step + 1) % 2], 16 * SUMS);
""",
}
