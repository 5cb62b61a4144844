"""The loop nest of a large batch: a GEMM whose second operand is unpacked as it goes.

Tile by tile, sums would be loaded and stored for every 64 columns and x would be read from memory
for every tile row. Here a thread takes several tile rows and up to 512 batch entries at a time, walks K
in steps of a few hundred columns, unpacks the tiles of one row and step, and multiplies them with sums in registers.
What is unpacked stays in the first level of the cache, x and sums in the second; tiles that are not there cost nothing.

Matrix units take bf16 (codes times scale, rounded as `to_dense` rounds), vector units fp32. Tiles whose lanes pick
among more than four columns, or that are multiplied without what they drop, are not unpacked, as that would bring the
zeros back: they are walked as for a small batch.
"""

import textwrap
from collections.abc import Iterator
from string import Template

from stoicc.codegen.cpu.forms import planes_of
from stoicc.codegen.cpu.layouts import BLOCKED_ENTRIES
from stoicc.codegen.cpu.plan import FormatPart, KernelClass
from stoicc.codegen.cpu.plane_types import C_TYPES

CONSTANTS = Template("""\
    LEAST_BLOCKED = $least, /* entries from which rows are multiplied several at a time */
    MANY = $many, /* entries, */
    TALL = $tall, /* tile rows, */
    DEEP = $deep, /* and tile columns that are worked on together */
    BLOCKED_BYTES = $bytes, /* scratch of a thread */
""")

_UNPACK_PAIRS = Template("""\
/* Tile t as bf16 weights: strip by strip, `DEEP * BK` columns apart. */
static void unpack_${name}_tile(const struct weight *w, int t, bf16 *pairs)
{
    enum { SIZE = $columns, GROUPS = BK / SIZE, UNITS = STRIPS * GROUPS };
    for (int unit = 0; unit < UNITS; unit++) {
        bf16 *to = pairs + (unit / GROUPS * DEEP * BK + unit % GROUPS * SIZE) * LANES;
        $unpack
    }
}
""")

_UNPACK_FLOATS = Template("""\
/* Tile t as fp32 weights: strip by strip, `DEEP * COLUMNS` columns apart. */
static void unpack_${name}_tile(const struct weight *w, int t, float *weights)
{
$pointers
    for (int strip = 0; strip < STRIPS; strip++)
        ${name}_floats($arguments, strip, weights + strip * DEEP * COLUMNS * LANES);
}
""")

_MULTIPLY_PAIRS = """\
/* A panel of unpacked tiles, at most DEEP of them, times x: `strips` strips by `blocks` blocks of 16 entries. */
INLINE void multiply_panel(
    const bf16 *pairs, const int *present, int tiles, const bf16 *x, int64_t x_tile, float *acc, const int strips,
    const int blocks)
{
    const int step = 16 * SUMS;
    tiles_fence();
    _tile_loadd(0, acc, 64);
    if (strips > 1)
        _tile_loadd(1, acc + 256, 64);
    if (blocks > 1)
        _tile_loadd(2, acc + step, 64);
    if (strips > 1 && blocks > 1)
        _tile_loadd(3, acc + step + 256, 64);
    for (int t = 0; t < tiles; t++, pairs += BK * LANES) {
        const bf16 *from = x + present[t] * x_tile;
        for (int k = 0; k < BK; k += 32, from += 512) {
            _tile_loadd(4, pairs + k * LANES, 64);
            _tile_loadd(6, from, 64);
            _tile_dpbf16ps(0, 6, 4);
            if (strips > 1) {
                _tile_loadd(5, pairs + (DEEP * BK + k) * LANES, 64);
                _tile_dpbf16ps(1, 6, 5);
            }
            if (blocks > 1) {
                _tile_loadd(7, from + 16 * BK, 64);
                _tile_dpbf16ps(2, 7, 4);
            }
            if (strips > 1 && blocks > 1)
                _tile_dpbf16ps(3, 7, 5);
        }
    }
    _tile_stored(0, acc, 64);
    if (strips > 1)
        _tile_stored(1, acc + 256, 64);
    if (blocks > 1)
        _tile_stored(2, acc + step, 64);
    if (strips > 1 && blocks > 1)
        _tile_stored(3, acc + step + 256, 64);
    tiles_fence();
}

static void multiply_panels(
    const struct weight *w, const struct call *call, int64_t first, int width, const int *present, int tiles,
    const bf16 *pairs, float *acc)
{
    const bf16 *x = call->pairs + first * w->tile_columns * BK;
    const int64_t x_tile = (int64_t)width * BK;
    for (int strip = 0; strip < STRIPS; strip += 2, pairs += 2 * DEEP * BK * LANES) {
        float *sums = acc + strip * 256;
        for (int n = 0; n < width; n += 32) {
            if (strip + 1 < STRIPS && n + 16 < width)
                multiply_panel(pairs, present, tiles, x + n * BK, x_tile, sums + n * SUMS, 2, 2);
            else if (strip + 1 < STRIPS)
                multiply_panel(pairs, present, tiles, x + n * BK, x_tile, sums + n * SUMS, 2, 1);
            else if (n + 16 < width)
                multiply_panel(pairs, present, tiles, x + n * BK, x_tile, sums + n * SUMS, 1, 2);
            else
                multiply_panel(pairs, present, tiles, x + n * BK, x_tile, sums + n * SUMS, 1, 1);
        }
    }
}
"""

_MULTIPLY_VECTORS = Template("""\
/* A panel of unpacked tiles, at most DEEP of them, times x: `strips` strips by nb entries. x of the entries that come
 * next is asked for. */
INLINE void multiply_panel(
    const $element *weights, const int *present,$picked_argument int tiles, const $element *x, int64_t x_tile,
    float *acc, int64_t next, const int strips, const int nb)
{
    vfloat sum[$beside * WIDE];
    #pragma GCC unroll 16
    for (int i = 0; i < strips * nb; i++)
        sum[i] = vf_load_f32(acc + i * LANES);
    for (int t = 0; t < tiles; t++) {
        const $element *from = x + present[t] * x_tile;
$picked        for (int k = 0; k < COLUMNS; k += 4, from += 4 * nb, weights += 4 * LANES) {
$fetch            #pragma GCC unroll 4
            for (int i = 0; i < 4; i += $step) {
                $vector column[$beside];
                #pragma GCC unroll 2
                for (int strip = 0; strip < strips; strip++)
                    column[strip] = $load(weights + (strip * DEEP * COLUMNS + i) * LANES);
                #pragma GCC unroll 8
                for (int n = 0; n < nb; n++) {
                    $vector one = $set;
                    #pragma GCC unroll 2
                    for (int strip = 0; strip < strips; strip++)
                        sum[strip * nb + n] = $multiply_add(column[strip], one, sum[strip * nb + n]);
                }
            }
        }
    }
    #pragma GCC unroll 16
    for (int i = 0; i < strips * nb; i++)
        vf_store_f32(acc + i * LANES, sum[i]);
}

static void multiply_panels(
    const struct weight *w, const struct call *call, int64_t first, int width, const int *present,$picked_argument
    int tiles, const $element *weights, float *acc)
{
    for (int strip = 0; strip < STRIPS; strip += $beside, weights += $beside * DEEP * COLUMNS * LANES)
        for (int n = 0; n < width; n += WIDE) { /* x is in chunks, and a block of entries in one of them */
            const int64_t chunk = (first + n) / CHUNK * CHUNK, left = call->batch - chunk;
            const int64_t x_tile = (left < CHUNK ? padded(left) : CHUNK) * COLUMNS;
            const $element *x = call->$form + chunk * w->tile_columns * COLUMNS + (first + n - chunk) * COLUMNS;
            const int nb = width - n < WIDE ? width - n : WIDE;
            float *sums = acc + n * SUMS + strip * nb * LANES;
            $cases
        }
}
""")

_PICKED = Template("""\
        if (picked[t]) { /* pairs of kept columns, then which of four columns they are */
            for (int k = 0; k < BK; k += 32, weights += 16 * LANES)
                #pragma GCC unroll 2
                for (int g = 0; g < 8; g++, from += 4 * nb, weights += 2 * LANES) {
                    vint kept[$beside], pick[$beside];
                    __builtin_prefetch(from + next);
                    #pragma GCC unroll 2
                    for (int strip = 0; strip < strips; strip++) {
                        kept[strip] = vp_load(weights + strip * DEEP * BK * LANES);
                        pick[strip] = vp_load(weights + (strip * DEEP * BK + 16) * LANES);
                    }
                    #pragma GCC unroll 8
                    for (int n = 0; n < nb; n++) {
                        vint four = vp_four(from + 4 * n);
                        #pragma GCC unroll 2
                        for (int strip = 0; strip < strips; strip++)
                            sum[strip * nb + n] =
                                vp_multiply_add(kept[strip], vp_pick(four, pick[strip]), sum[strip * nb + n]);
                    }
                }
            continue;
        }
""")

_FLOAT_WORDS = {
    "form": "floats",
    "element": "float",
    "vector": "vfloat",
    "step": "1",
    "load": "vf_load_f32",
    "set": "vf_set1(from[4 * n + i])",
    "multiply_add": "vf_fma",
    "fetch": "            __builtin_prefetch(from + next);\n            __builtin_prefetch(from + next + 16);\n",
}
_PAIR_WORDS = {
    "form": "pairs",
    "element": "bf16",
    "vector": "vint",
    "step": "2",
    "load": "vp_load",
    "set": "vp_set(from + 4 * n + i)",
    "multiply_add": "vp_multiply_add",
    "fetch": "            __builtin_prefetch(from + next);\n",
}

_CASE = Template("""\
if ($condition)
                multiply_panel(weights, present,$picked tiles, x, x_tile, sums, $nb * COLUMNS, $strips, $nb);
            """)

_RUN = Template("""\
/* Work items begin .. end, for all batch entries. */
static void run_blocked(
    const struct weight *w, const struct call *call, int begin, int end, float *sums, $element *panel, $out *y)
{
    for (int64_t first = 0; first < call->batch; first += MANY) {
        int count = call->batch - first < MANY ? (int)(call->batch - first) : MANY, width = (int)$width;
        float *acc[TALL];
        int next[TALL][$formats];
        for (int i = begin; i < end; i++) {
            const struct item *item = w->items + i;
            acc[i - begin] = $acc;
            memset(acc[i - begin], 0, sizeof(float) * width * SUMS);
$starts$walks        }
        for (int column = 0; column < (int)w->tile_columns; column += DEEP)
            for (int i = begin; i < end; i++) {
                const struct item *item = w->items + i;
                int present[DEEP],$picked_flags tiles = 0, *at = next[i - begin];
$unpacks                multiply_panels(w, call, first, width, present,$picked tiles, panel, acc[i - begin]);
            }
        for (int i = begin; i < end; i++)
            ${condition}finish(w, call, w->items[i].row, first, count, acc[i - begin], y);
    }
}
""")

_UNPACKS = Template("""\
                for (int t = at[$index]; t < item->${name}_end && w->${name}_tile_column[t] < column + DEEP; t++) {
                    unpack_${name}_tile(w, t, panel + tiles * $columns * LANES);
$flag                    present[tiles++] = w->${name}_tile_column[t];
                    at[$index] = t + 1;
                }
""")

_WALK = Template("""\
            for (int64_t n = first; n < first + count; n += CHUNK) {
                const int64_t left = call->batch - n, entries = left < CHUNK ? padded(left) : CHUNK;
                add_${name}_pairs(
                    w, item->${name}_begin, item->${name}_end, call->pairs + n * w->tile_columns * BK, (int)entries,
                    acc[i - begin] + (n - first) * SUMS);
            }
""")


def constants(kernel: KernelClass) -> str:
    """Enumerators of the blocked loop nest."""
    return CONSTANTS.substitute(
        least=kernel.least_blocked,
        many=BLOCKED_ENTRIES,
        tall=kernel.tall,
        deep=kernel.deep,
        bytes=kernel.blocked_bytes,
    )


def functions(kernel: KernelClass, width: str, entries: str) -> str:
    """C of the blocked loop nest.

    Args:
        width: batch entries of a block's sums with those that fill it up, as a C expression of `count`.
        entries: the same of the whole batch.
    """
    columns = "BK" if kernel.blocked == "pairs" else "COLUMNS"
    partial, condition = "sums + (i - begin) * MANY * SUMS", ""
    if kernel.split:
        partial = f"item->partial < 0 ? {partial} : call->partials + (item->partial * {entries} + first) * SUMS"
        condition = "if (w->items[i].partial < 0)\n                "
    parts = [part for part in kernel.parts if not kernel.walked(part)]
    starts = "".join(
        f"            next[i - begin][{index}] = item->{part.name}_begin;\n" for index, part in enumerate(parts)
    )
    walks = "".join(_WALK.substitute(name=part.name) for part in kernel.parts if kernel.walked(part))
    unpacks = "".join(
        _UNPACKS.substitute(
            name=part.name,
            index=index,
            columns=columns,
            flag=f"                    picked[tiles] = {int(kernel.picks(part))};\n" * _picks(kernel),
        )
        for index, part in enumerate(parts)
    )
    run = _RUN.substitute(
        element=element(kernel),
        out=C_TYPES[kernel.out_dtype],
        formats=len(parts),
        width=width,
        acc=partial,
        starts=starts,
        walks=walks,
        unpacks=unpacks,
        condition=condition,
        picked=" picked," * _picks(kernel),
        picked_flags=" picked[DEEP]," * _picks(kernel),
    )
    return "\n".join([*(_unpack(part, kernel) for part in parts), _multiply(kernel), run])


def _picks(kernel: KernelClass) -> bool:
    return any(kernel.picks(part) for part in kernel.parts)


def element(kernel: KernelClass) -> str:
    return "bf16" if kernel.blocked == "pairs" else "float"


def _multiply(kernel: KernelClass) -> str:
    if kernel.tiled_pairs:
        return _MULTIPLY_PAIRS
    words = _PAIR_WORDS if kernel.blocked == "pairs" else _FLOAT_WORDS
    return _MULTIPLY_VECTORS.substitute(
        words,
        beside=kernel.beside,
        cases="else ".join(_cases(kernel)).rstrip(),
        picked=_PICKED.substitute(beside=kernel.beside) * _picks(kernel),
        picked_argument=" const int *picked," * _picks(kernel),
    )


def _cases(kernel: KernelClass) -> Iterator[str]:
    """Calls with constants, for the strips and the entries that are left."""
    last = kernel.strips % kernel.beside
    for strips in (last, kernel.beside) if last else (kernel.beside,):
        fewer = f"STRIPS - strip == {strips} && " if strips < kernel.beside else ""
        for nb in (8, 4, 2, 1):
            if nb <= kernel.wide:
                yield _CASE.substitute(
                    condition=f"{fewer}nb == {nb}", strips=strips, nb=nb, picked=" picked," * _picks(kernel)
                )


def _unpack(part: FormatPart, kernel: KernelClass) -> str:
    if kernel.blocked == "floats":
        pointers, arguments = planes_of(part)
        return _UNPACK_FLOATS.substitute(
            name=part.name,
            pointers=textwrap.indent(textwrap.dedent("\n".join(pointers)), "    "),
            arguments=", ".join(arguments),
        )
    code = kernel.pairs_of(part)
    unpack = f"unpack_{part.name}_pairs(w, t, unit, to)"
    columns = "SIZE / 2" if kernel.picks(part) else "SIZE"
    unpack = f"vp_scale(to, {columns}, {unpack});" if code.scaled else f"{unpack};"
    return _UNPACK_PAIRS.substitute(name=part.name, columns=code.columns, unpack=unpack)
