"""The C of h W: tiles by tile column, each decoded to a slab that stays in cache, then multiplied by rows of h."""

from string import Template

FILE = Template("""\
/* y = h W, a tile column at a time: tiles of $rows x $columns in $dtype, h in $h_name. */

$includes
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

$vocabulary

enum {
    BM = $rows, BK = $columns, /* a tile */
    LANES = 16,
    RUN = $run, /* tiles that are decoded before they are multiplied */
    CHUNK = $chunk, /* rows of h whose sums stay near */
$constants};

$decoders
struct weight {
    int64_t rows, columns, stride, bins; /* stride: of the rows of h */
    const int32_t *bin_ptr;
    const int32_t *column_order;
$fields};

/* What a thread works with. */
struct desk {
    $type tile[BM * BK] __attribute__((aligned(64)));
    $slab slab[RUN * BM * BK] __attribute__((aligned(64)));
    float sums[CHUNK * BK] __attribute__((aligned(64)));
    int32_t row[RUN]; /* the tile row of each tile in the slab */
    int tiles;
};

$product
/* Take the tile that was decoded just now; a full slab is multiplied. */
static void take(const struct weight *w, struct desk *d, int32_t row, const $h *h, int count)
{
    place(d->tile, d->slab + d->tiles * BM * BK);
    d->row[d->tiles++] = row;
    if (d->tiles == RUN) {
        multiply(w, d, h, count);
        d->tiles = 0;
    }
}

/* The sums of `count` rows of one tile column to y. */
static void store(const struct weight *w, const struct desk *d, int column, int count, $out *y)
{
    y += (int64_t)column * BK;
    for (int n = 0; n < count; n++, y += w->columns)
        for (int k = 0; k < BK; k += LANES) {
            vfloat v = vf_load_f32(d->sums + n * BK + k);
            const int64_t left = w->columns - (int64_t)column * BK - k;
            if (left >= LANES) {
                vf_store_$out_name(y + k, v);
                continue;
            }
            $out lane[LANES];
            vf_store_$out_name(lane, v);
            for (int i = 0; i < left; i++)
                y[k + i] = lane[i];
        }
}

static void run_column(const struct weight *w, struct desk *d, int column, const $h *h, int64_t batch, $out *y)
{
    for (int64_t first = 0; first < batch; first += CHUNK) {
        const int count = batch - first < CHUNK ? (int)(batch - first) : CHUNK;
        const $h *rows = h + first * w->stride;
        memset(d->sums, 0, sizeof(float) * BK * ((count + 31) / 32 * 32));
        d->tiles = 0;
$loops        multiply(w, d, rows, count);
        store(w, d, column, count, y + first * w->columns);
    }
}

/* y [batch][columns] from h [batch][stride]. The same bits for any number of threads: a column is one thread's, and its
 * tiles are added in one order. */
void stoicc_transposed(const struct weight *w, const $h *h, $out *y, void *workspace, int64_t batch, int threads)
{
    int taken = 0;
    #pragma omp parallel num_threads(threads)
    {
        int own;
        #pragma omp atomic capture
        own = taken++;
        struct desk *d = (struct desk *)workspace + own;
$begin        #pragma omp for schedule(dynamic, 1)
        for (int64_t bin = 0; bin < w->bins; bin++)
            for (int i = w->bin_ptr[bin]; i < w->bin_ptr[bin + 1]; i++)
                run_column(w, d, w->column_order[i], h, batch, y);
$end    }
}

int64_t stoicc_desk_bytes(void)
{
    return sizeof(struct desk);
}
""")

LOOP = Template("""\
        for (int e = w->${name}_first[column]; e < w->${name}_first[column + 1]; e++) {
            const int64_t t = w->${name}_tile[e];
            $name($arguments, d->tile, BK);
            take(w, d, w->${name}_row[e], rows, count);
        }
""")

FLOAT_CONSTANTS = Template("""\
    VECTORS = $vectors, ROWS = $at_once, /* sums in registers: of so many vectors of columns and rows of h */
""")

FLOAT_PRODUCT = Template("""\
/* A tile in fp32. */
static void place(const $type *tile, float *slab)
{
    for (int i = 0; i < BM * BK; i += LANES)
        vf_store_f32(slab + i, vf_load_$dtype(tile + i));
}

/* `n` rows of h times the slab, from column k of its tiles. */
INLINE void multiply_rows(
    const struct weight *w, const struct desk *d, const float *h, float *sums, const int k, const int n)
{
    vfloat sum[ROWS][VECTORS];
    #pragma GCC unroll 8
    for (int i = 0; i < n; i++)
        #pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sum[i][v] = vf_load_f32(sums + i * BK + k + v * LANES);
    for (int t = 0; t < d->tiles; t++) {
        const float *tile = d->slab + t * BM * BK + k, *x = h + (int64_t)d->row[t] * BM;
        const int64_t left = w->rows - (int64_t)d->row[t] * BM;
        for (int m = 0; m < BM && m < left; m++, tile += BK) {
            vfloat weight[VECTORS];
            #pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                weight[v] = vf_load_f32(tile + v * LANES);
            #pragma GCC unroll 8
            for (int i = 0; i < n; i++) {
                const vfloat each = vf_set1(x[i * w->stride + m]);
                #pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    sum[i][v] = vf_fma(each, weight[v], sum[i][v]);
            }
        }
    }
    #pragma GCC unroll 8
    for (int i = 0; i < n; i++)
        #pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            vf_store_f32(sums + i * BK + k + v * LANES, sum[i][v]);
}

/* The sums of `count` rows += those rows of h times the tiles in the slab. */
static void multiply(const struct weight *w, struct desk *d, const float *h, int count)
{
    for (int k = 0; k < BK; k += VECTORS * LANES) {
        int n = 0;
        for (; n + ROWS <= count; n += ROWS)
            multiply_rows(w, d, h + n * w->stride, d->sums + n * BK, k, ROWS);
        for (; n < count; n++)
            multiply_rows(w, d, h + n * w->stride, d->sums + n * BK, k, 1);
    }
}
""")

PAIR_PRODUCT = """\
/* A tile in pairs of rows, sixteen columns after sixteen. */
static void place(const bf16 *tile, bf16 *slab)
{
    for (int k = 0; k < BK; k += LANES)
        for (int m = 0; m < BM; m += 2, slab += 2 * LANES)
            vp_store(slab, vp_rows(tile + m * BK + k, tile + (m + 1) * BK + k));
}

/* The sums of `count` rows, up to a multiple of 32, += those rows of h times the tiles in the slab. */
static void multiply(const struct weight *w, struct desk *d, const bf16 *h, int count)
{
    for (int n = 0; n < count; n += 32)
        for (int k = 0; k < BK; k += 32) {
            square_load(d->sums + n * BK + k, BK);
            for (int t = 0; t < d->tiles; t++)
                square_add(h + n * w->stride + (int64_t)d->row[t] * BM, w->stride, d->slab + t * BM * BK + k * BM, BM);
            square_store(d->sums + n * BK + k, BK);
        }
}
"""

TILES_BEGIN = """\
        tile_shapes before;
        tiles_begin(&before);
"""

TILES_END = """\
        tiles_end(&before);
"""
