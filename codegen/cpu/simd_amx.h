/* Products on matrix units. Needs AMX-TILE, AMX-BF16 and AMX-INT8 beside what simd_pairs.h needs.
 *
 * Pairs of sixteen rows by 32 columns are the second operand of a tile product, x the first: sixteen batch entries by
 * 32 columns. */

/* Where a thread's tiles stand: shapes of eight tiles, as the hardware reads and writes them. */
typedef struct {
    uint8_t palette, start, unused[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes;

/* Keep what this thread had (the BLAS has tiles of its own), and take eight tiles of 16 rows of 64 bytes. */
static inline void tiles_begin(tile_shapes *before)
{
    tile_shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = 64;
        shapes.rows[i] = 16;
    }
    __asm__ volatile("" : : "r"(&shapes) : "memory"); /* intrinsics name 8 of the 64 bytes */
    _tile_storeconfig(before);
    _tile_loadconfig(&shapes);
}

static inline void tiles_end(const tile_shapes *before)
{
    if (before->palette)
        _tile_loadconfig(before);
    else
        _tile_release();
}

/* Compilers do not know which memory tile loads read and tile stores write: keep theirs on their side of this. */
static inline void tiles_fence(void)
{
    __asm__ volatile("" ::: "memory");
}

/* Tiles `first` and `first` + 1 hold the sums of a strip and one or two blocks of 16 batch entries. Sums of
 * neighbouring blocks lie `step` floats apart. Tiles 0 and 1, or 2 and 3, are taken by turns (`second`), so that one
 * pair can be multiplied while the other is stored. */
INLINE void sums_clear(int second, int entries)
{
    if (second) {
        _tile_zero(2);
        if (entries > 16)
            _tile_zero(3);
    } else {
        _tile_zero(0);
        if (entries > 16)
            _tile_zero(1);
    }
}

INLINE void sums_load(int second, const float *acc, const int step, int entries)
{
    tiles_fence();
    if (second) {
        _tile_loadd(2, acc, 64);
        if (entries > 16)
            _tile_loadd(3, acc + step, 64);
    } else {
        _tile_loadd(0, acc, 64);
        if (entries > 16)
            _tile_loadd(1, acc + step, 64);
    }
}

INLINE void sums_store(int second, float *acc, const int step, int entries)
{
    if (second) {
        _tile_stored(2, acc, 64);
        if (entries > 16)
            _tile_stored(3, acc + step, 64);
    } else {
        _tile_stored(0, acc, 64);
        if (entries > 16)
            _tile_stored(1, acc + step, 64);
    }
    tiles_fence();
}

/* The sums += pairs [columns / 2][LANES][2] times x [block][BK / 32][16][32]. */
INLINE void sums_add_product(int second, const bf16 *pairs, const int columns, const bf16 *x, int entries)
{
    tiles_fence();
    for (int k = 0; k < columns; k += 32, pairs += 512, x += 512) {
        _tile_loadd(4, pairs, 64);
        _tile_loadd(5, x, 64);
        if (second)
            _tile_dpbf16ps(2, 5, 4);
        else
            _tile_dpbf16ps(0, 5, 4);
        if (entries > 16) {
            _tile_loadd(6, x + 16 * BK, 64);
            if (second)
                _tile_dpbf16ps(3, 6, 4);
            else
                _tile_dpbf16ps(1, 6, 4);
        }
    }
}

/* Sums of one or two blocks that wait to be scaled by row and added to acc. */
typedef struct {
    float *acc;
    int entries;
    vfloat scale;
} waiting_sums;

static inline void sums_add_scaled(const waiting_sums *waiting, const float *part, const int step)
{
    for (int block = 0; 16 * block < waiting->entries && block < 2; block++) {
        float *acc = waiting->acc + block * step;
        int rows = waiting->entries - 16 * block < 16 ? waiting->entries - 16 * block : 16;
        for (int n = 0; n < rows; n++, part += 16)
            vf_store_f32(acc + 16 * n, vf_fma(waiting->scale, vf_load_f32(part), vf_load_f32(acc + 16 * n)));
    }
}
