"""The fixed text of a CPU kernel, as templates; `emit.py` puts in what the kernel's class needs.

Entries are batch entries (rows of x). `forms.py` has the layouts of x and of the sums.
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
    CHUNK = $chunk, /* batch entries whose sums stay near */
$more};
""")

DIGIT_CONSTANTS = Template("""\
    DIGIT_BYTES = $bytes, /* of one entry of a tile column in digits */
    MOST_DIGITS = $most, /* entries that digits are faster for */
""")

OCTET_CONSTANTS = Template("""\
    LEAST_OCTETS = $least, /* entries from which integer matrix units are faster, */
    MOST_OCTETS = $most, /* and up to which */
""")

PAIR_CONSTANTS = Template("""\
    LEAST_PAIRS = $least, /* entries from which matrix units are faster */
""")

CALL = Template("""\
/* One call: x in the form that tiles read (others are 0), and what is kept between its steps. */
struct call {
    int64_t batch;
$members};
""")

WHOLE_BLOCKS = """\
/* Batch entries in x as pairs: one, two or four blocks of 16 in the last 64. */
static inline int64_t whole_blocks(int64_t batch)
{
    int64_t tail = batch % 64;
    return batch - tail + (tail > 32 ? 64 : tail > 16 ? 32 : tail > 0 ? 16 : 0);
}
"""

PADDED = """\
/* Batch entries in x as floats or digits: the last block of WIDE is rounded up to a power of two. */
static inline int64_t padded(int64_t batch)
{
    int64_t tail = batch % WIDE, width = tail;
    while (width & (width - 1))
        width++;
    return batch - tail + width;
}
"""

FINISH = Template("""\
/* From the sums of a tile row to y, for batch entries first .. first + count; blocks of sums are `wide` entries. */
static void finish(
    const struct weight *w, const struct call *call, int row, int64_t first, int count, const float *acc, $out *y)
{
    const int wide = $wide;
    int width = (int)$width;
    for (int entry = 0; entry < count; entry++) {
        int block = entry / wide * wide, n = entry - block, nb = width - block < wide ? width - block : wide;
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

LOW_RANK_INDEX = """\
            const float *term = call->term + (first + entry) * w->term_rows + m;
"""

ADD_LOW_RANK = """\
            v = vf_add(v, vf_load_f32(term));
"""

ADD_LOW_THIRDS = Template("""\
            if (call->batch >= $least) /* R x came as three bf16 numbers */
                for (int part = 1; part < 3; part++)
                    v = vf_add(v, vf_load_f32(term + part * call->batch * w->term_rows));
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
static void run_item(const struct weight *w, const struct call *call, const struct item *item, $out *y)
{
    float sums[CHUNK * SUMS] __attribute__((aligned(64)));
    for (int64_t first = 0; first < call->batch; first += CHUNK) {
        int count = call->batch - first < CHUNK ? (int)(call->batch - first) : CHUNK, width = (int)$width;
        float *acc = $acc;
        memset(acc, 0, sizeof(float) * width * SUMS);
$adds        ${condition}finish(w, call, item->row, first, count, acc, y);
    }
}
""")

JOIN_PARTS = Template("""\
/* A tile row that was cut in parts: their sums, added in order, then finished. */
static void join_parts(const struct weight *w, const struct call *call, const struct split *split, $out *y)
{
    const int64_t entries = $entries;
    for (int64_t first = 0; first < call->batch; first += CHUNK) {
        int count = call->batch - first < CHUNK ? (int)(call->batch - first) : CHUNK, width = (int)$width;
        float *acc = call->partials + (split->partial * entries + first) * SUMS;
        for (int part = 1; part < split->parts; part++) {
            const float *other = acc + part * entries * SUMS;
            for (int i = 0; i < width * SUMS; i++)
                acc[i] += other[i];
        }
        finish(w, call, split->row, first, count, acc, y);
    }
}
""")

RUN = Template("""\
/* y [batch][rows] from x [batch][columns]. The same bits for any number of threads: threads take whole
 * bins, and nothing is added up across threads but in the order of parts. Where bins cost about the same, a thread
 * takes several neighbours at a time, so that it reads long streams. */
void stoicc_run(const struct weight *w, const $x *x, $out *y, void *workspace, int64_t batch, int threads)
{
    struct call call = {.batch = batch};
    const int grain = w->even && w->bins > 16 * threads ? (int)w->bins / (16 * threads) : 1;
$areas    #pragma omp parallel num_threads(threads)
    {
$pack$begin        #pragma omp for schedule(dynamic, grain)
        for (int64_t bin = 0; bin < w->bins; bin++)
            for (int i = w->bin_ptr[bin]; i < w->bin_ptr[bin + 1]; i++)
                run_item(w, &call, w->items + i, y);
$end$join    }
}
""")

PACK_FLOATS = """\
        #pragma omp for collapse(2) schedule(static)
        for (int64_t first = 0; first < batch; first += CHUNK)
            for (int c = 0; c < (int)w->tile_columns; c++)
                pack_chunk(w, x, first, batch - first < CHUNK ? (int)(batch - first) : CHUNK, c, call.floats);
"""

PACK_PAIR_CHUNKS = Template("""\
        if (call.pairs$unless) {
            #pragma omp for collapse(2) schedule(static)
            for (int64_t first = 0; first < batch; first += CHUNK)
                for (int c = 0; c < (int)w->tile_columns; c++)
                    pack_pair_chunk(
                        w, x, first, batch - first < CHUNK ? (int)(batch - first) : CHUNK, c, call.pairs);
        }
""")

PACK_PAIRS = Template("""\
        if (call.pairs$unless) {
            #pragma omp for schedule(static)
            for (int c = 0; c < (int)w->tile_columns; c++)
                pack_pairs(w, x, batch, c, call.pairs);
        }
""")

PACK_OCTETS = """\
        if (call.octets) {
            #pragma omp for schedule(static) reduction(|: without)
            for (int c = 0; c < (int)w->tile_columns; c++)
                without |= pack_octets(w, x, batch, c, call.octets);
            #pragma omp single
            call.octets = without ? 0 : call.octets;
        }
"""

PACK_DIGITS = """\
        if (call.digits) {
            #pragma omp for collapse(2) schedule(static) reduction(|: without)
            for (int64_t first = 0; first < batch; first += CHUNK)
                for (int c = 0; c < (int)w->tile_columns; c++)
                    without |= pack_digits(
                        w, x, first, batch - first < CHUNK ? (int)(batch - first) : CHUNK, c, call.digits);
            #pragma omp single
            call.digits = without ? 0 : call.digits;
        }
"""

TILES_BEGIN = Template("""\
        tile_shapes before;
        if ($used)
            tiles_begin(&before);
""")

TILES_END = Template("""\
        if ($used)
            tiles_end(&before);
""")

RUN_JOIN = """\
        #pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < w->split_rows; i++)
            join_parts(w, &call, w->splits + i, y);
"""
