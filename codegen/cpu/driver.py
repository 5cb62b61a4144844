"""The fixed text of a CPU kernel, as templates; `emit.py` puts in what the kernel's class needs.

Layouts, all fp32:
    packed x    [chunk][tile column][block of WIDE entries][column / 4][entry][column % 4]
    sums        [block of WIDE entries][strip][entry][lane]
where entries are batch entries (rows of x) and the last block is as wide as the batch leaves it,
rounded up to a power of two.
"""

from string import Template

CONSTANTS = Template("""\
enum {
    BM = $rows, BK = $columns, /* a tile */
    COLUMNS = $padded, /* of a tile in packed x: BK rounded up to a multiple of 4 */
    LANES = 16, /* rows of a strip, one a lane */
    STRIPS = $strips, /* of a tile */
    SUMS = STRIPS * LANES, /* of a tile row and one batch entry */
    WIDE = $wide, /* most batch entries that a format's function takes at a time */
    CHUNK = $chunk, /* batch entries whose sums stay in L1 */
};
""")

PADDED = """\
/* Batch entries in packed x: the last block of WIDE is rounded up to a power of two. */
static inline int64_t padded(int64_t batch)
{
    int64_t tail = batch % WIDE, width = tail;
    while (width & (width - 1))
        width++;
    return batch - tail + width;
}
"""

PACK_X = Template("""\
/* Batch entries first .. first + count of one tile column of x, as fp32 in the order that tiles read. */
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

static void pack_x(const struct weight *w, const $x *x, int64_t batch, int tile_column, float *packed)
{
    for (int64_t first = 0; first < batch; first += CHUNK)
        pack_chunk(w, x, first, batch - first < CHUNK ? (int)(batch - first) : CHUNK, tile_column, packed);
}
""")

LOW_RANK = Template("""\
/* inner[entry][r] = row r of the right factor times x. */
static void multiply_right(const struct weight *w, const $x *x, int64_t batch, int64_t r, float *inner)
{
    const $right *row = w->right + r * w->columns;
    for (int64_t n = 0; n < batch; n++, x += w->columns) {
        vfloat sum = vf_zero();
        int64_t k = 0;
        for (; k + LANES <= w->columns; k += LANES)
            sum = vf_fma(vf_load_$right_name(row + k), vf_load_$x_name(x + k), sum);
        float rest = 0;
        for (; k < w->columns; k++)
            rest += ${right_name}_to_float(row[k]) * ${x_name}_to_float(x[k]);
        inner[n * w->rank + r] = vf_sum(sum) + rest;
    }
}
""")

ADD_TILES = Template("""\
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

TAIL = Template("""\
        ${first}if (width - n == $nb)
            ${name}_tile($arguments, panel + n * COLUMNS, acc + n * SUMS, $nb);
""")

FINISH = Template("""\
/* From the sums of a tile row to y, for batch entries first .. first + count. */
static void finish(const struct weight *w, int row, int64_t first, int count, const float *acc$inner, $out *y)
{
    int width = (int)padded(count);
    for (int entry = 0; entry < count; entry++) {
        int block = entry / WIDE * WIDE, n = entry - block, nb = width - block < WIDE ? width - block : WIDE;
        $out *to = y + (first + entry) * w->rows;
        for (int strip = 0; strip < STRIPS; strip++) {
            int64_t m = (int64_t)row * BM + strip * LANES; /* the strip's first row of the matrix */
            int64_t end = (int64_t)(row + 1) * BM < w->rows ? (int64_t)(row + 1) * BM : w->rows;
            vfloat v = vf_load_f32(acc + block * SUMS + (strip * nb + n) * LANES);
$steps$store        }
    }
}
""")

STRIP_INDEX = """\
            int64_t s = (int64_t)row * STRIPS + strip; /* the strip in lane-ordered vectors */
"""

OUTPUT_SCALE = """\
            v = vf_mul(v, vf_load_f32(w->output_scale + s * LANES));
"""

ADD_LOW_RANK = Template("""\
            for (int64_t r = 0; r < w->rank; r++)
                v = vf_fma(vf_load_$left(w->left + (s * w->rank + r) * LANES),
                           vf_set1(inner[(first + entry) * w->rank + r]), v);
""")

BIAS = """\
            v = vf_add(v, vf_load_f32(w->bias + s * LANES));
"""

ACTIVATE = Template("""\
            float each[LANES];
            vf_store_f32(each, v);
            for (int i = 0; i < LANES; i++)
                each[i] = $activation(each[i]);
            v = vf_load_f32(each);
""")

STORE = Template("""\
            if (m + LANES <= end) {
                vf_store_$out_name(to + m, v);
                continue;
            }
            $out lane[LANES];
            vf_store_$out_name(lane, v);
            for (int i = 0; m + i < end; i++)
                to[m + i] = lane[i];
""")

SCATTER = Template("""\
            $out lane[LANES];
            vf_store_$out_name(lane, v);
            for (int i = 0; i < LANES && m + i < end; i++)
                to[w->output_row[m + i]] = lane[i];
""")

ACTIVATIONS = {
    "relu": """\
static inline float relu(float v)
{
    return v < 0 ? 0 : v; /* a NaN stays */
}
""",
    "gelu": """\
static inline float gelu(float v)
{
    return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
}
""",
    "gelu_tanh": """\
static inline float gelu_tanh(float v)
{
    return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
}
""",
    "silu": """\
static inline float silu(float v)
{
    return v / (1.0f + expf(-v));
}
""",
}

RUN_ITEM = Template("""\
/* One work item: its tiles, format by format, then $then. */
static void run_item(
    const struct weight *w, const struct item *item, const float *packed, int64_t batch$parameters, $out *y)
{
    float sums[CHUNK * SUMS];
    for (int64_t first = 0; first < batch; first += CHUNK) {
        int count = batch - first < CHUNK ? (int)(batch - first) : CHUNK, width = (int)padded(count);
        float *acc = $acc;
        memset(acc, 0, sizeof(float) * width * SUMS);
$adds        ${condition}finish(w, item->row, first, count, acc$inner, y);
    }
}
""")

JOIN_PARTS = Template("""\
/* A tile row that was cut in parts: their sums, added in order, then finished. */
static void join_parts(
    const struct weight *w, const struct split *split, float *partials, int64_t batch$parameters, $out *y)
{
    for (int64_t first = 0; first < batch; first += CHUNK) {
        int count = batch - first < CHUNK ? (int)(batch - first) : CHUNK, width = (int)padded(count);
        float *acc = partials + (split->partial * padded(batch) + first) * SUMS;
        for (int part = 1; part < split->parts; part++) {
            const float *other = acc + part * padded(batch) * SUMS;
            for (int i = 0; i < width * SUMS; i++)
                acc[i] += other[i];
        }
        finish(w, split->row, first, count, acc$inner, y);
    }
}
""")

RUN = Template("""\
/* y [batch][rows] from x [batch][columns]. The same bits for any number of threads: threads take whole
 * bins, and nothing is added up across threads but in the order of parts. */
void stoicc_run(const struct weight *w, const $x *x, $out *y, float *workspace, int64_t batch, int threads)
{
    float *packed = workspace;
$areas    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(static)$nowait
        for (int c = 0; c < (int)w->tile_columns; c++)
            pack_x(w, x, batch, c, packed);
$low_rank        #pragma omp for schedule(dynamic, 1)
        for (int64_t bin = 0; bin < w->bins; bin++)
            for (int i = w->bin_ptr[bin]; i < w->bin_ptr[bin + 1]; i++)
                run_item(w, w->items + i, packed, batch$arguments, y);
$join    }
}
""")

RUN_LOW_RANK = """\
        #pragma omp for schedule(static)
        for (int64_t r = 0; r < w->rank; r++)
            multiply_right(w, x, batch, r, inner);
"""

RUN_JOIN = Template("""\
        #pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < w->split_rows; i++)
            join_parts(w, w->splits + i, partials, batch$inner, y);
""")
