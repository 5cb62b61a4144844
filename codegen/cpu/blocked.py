"""The loop nest of a large batch on matrix units: a GEMM whose second operand is unpacked as it goes.

Tile by tile, sums would be loaded and stored for every 64 columns and x would be read from memory
for every tile row. Here a thread takes several tile rows and up to 512 batch entries at a time, walks K
in steps of about 256 columns, unpacks the tiles of one row and step to bf16 (codes times scale, rounded as
`to_dense` rounds), and multiplies them with sums in registers. What is unpacked stays in the first
level of the cache, x and sums in the second; tiles that are not there cost nothing.
"""

from string import Template

from stoicc.codegen.cpu.plan import BLOCKED_ENTRIES, C_TYPES, FormatPart, KernelClass

CONSTANTS = Template("""\
    LEAST_BLOCKED = $least, /* entries from which rows are multiplied several at a time */
    MANY = $many, /* entries, */
    TALL = $tall, /* tile rows, */
    DEEP = $deep, /* and tile columns that are worked on together */
""")

_UNPACK_TILE = Template("""\
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

_RUN = Template("""\
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
    const bf16 *pairs, const int *present, int tiles, const bf16 *x, int width, float *acc)
{
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

/* Work items begin .. end, for all batch entries. */
static void run_blocked(
    const struct weight *w, const struct call *call, int begin, int end, float *sums, bf16 *pairs, $out *y)
{
    for (int64_t first = 0; first < call->batch; first += MANY) {
        int count = call->batch - first < MANY ? (int)(call->batch - first) : MANY, width = (int)whole_blocks(count);
        const bf16 *x = call->pairs + first * w->tile_columns * BK;
        float *acc[TALL];
        int next[TALL][$formats];
        for (int i = begin; i < end; i++) {
            const struct item *item = w->items + i;
            acc[i - begin] = $acc;
            memset(acc[i - begin], 0, sizeof(float) * width * SUMS);
$starts        }
        for (int column = 0; column < (int)w->tile_columns; column += DEEP)
            for (int i = begin; i < end; i++) {
                const struct item *item = w->items + i;
                int present[DEEP], tiles = 0, *at = next[i - begin];
$unpacks                multiply_panels(pairs, present, tiles, x, width, acc[i - begin]);
            }
        for (int i = begin; i < end; i++)
            ${condition}finish(w, call, w->items[i].row, first, count, acc[i - begin], y);
    }
}
""")

_UNPACKS = Template("""\
                for (int t = at[$index]; t < item->${name}_end && w->${name}_tile_column[t] < column + DEEP; t++) {
                    unpack_${name}_tile(w, t, pairs + tiles * BK * LANES);
                    present[tiles++] = w->${name}_tile_column[t];
                    at[$index] = t + 1;
                }
""")

LOOP = """\
        if (batch >= LEAST_BLOCKED) {
            float *sums = (float *)(area + omp_get_thread_num() * BLOCKED_BYTES);
            bf16 *pairs = (bf16 *)(sums + TALL * MANY * SUMS);
            #pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < items; i += tall)
                run_blocked(w, &call, i, i + tall < items ? i + tall : items, sums, pairs, y);
        } else
"""

PREPARE = (
    "int items = w->bin_ptr[w->bins], tall = items / (2 * threads);",
    "tall = tall < 1 ? 1 : tall < TALL ? tall : TALL;",
)


def constants(kernel: KernelClass) -> str:
    """Enumerators of the blocked loop nest."""
    return (
        CONSTANTS.substitute(least=kernel.least_blocked, many=BLOCKED_ENTRIES, tall=kernel.tall, deep=kernel.deep)
        + f"    BLOCKED_BYTES = {kernel.blocked_bytes}, /* scratch of a thread */\n"
    )


def functions(kernel: KernelClass) -> str:
    """C of the blocked loop nest."""
    tiles = "\n".join(
        _UNPACK_TILE.substitute(name=p.name, columns=_columns(p), unpack=_unpack(p)) for p in kernel.parts
    )
    partial, condition = "sums + (i - begin) * MANY * SUMS", ""
    if kernel.split:
        own = "call->partials + (item->partial * whole_blocks(call->batch) + first) * SUMS"
        partial = f"item->partial < 0 ? {partial} : {own}"
        condition = "if (w->items[i].partial < 0)\n                "
    starts = "".join(
        f"            next[i - begin][{index}] = item->{part.name}_begin;\n" for index, part in enumerate(kernel.parts)
    )
    unpacks = "".join(_UNPACKS.substitute(name=part.name, index=index) for index, part in enumerate(kernel.parts))
    run = _RUN.substitute(
        out=C_TYPES[kernel.out_dtype],
        formats=len(kernel.parts),
        acc=partial,
        starts=starts,
        unpacks=unpacks,
        condition=condition,
    )
    return f"{tiles}\n{run}"


def _columns(part: FormatPart) -> int:
    assert part.code.pairs is not None
    return part.code.pairs.columns


def _unpack(part: FormatPart) -> str:
    assert part.code.pairs is not None
    unpack = f"unpack_{part.name}_pairs(w, t, unit, to)"
    return f"vp_scale(to, SIZE, {unpack});" if part.code.pairs.scaled else f"{unpack};"
