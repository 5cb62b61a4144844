/* Products h W of tiles as they are stored, row by row, on matrix units. Needs what simd_amx.h needs. */

/* Two rows of a tile, sixteen columns of each, as pairs: one column is a 32-bit lane, the first row below. */
static inline vint vp_rows(const bf16 *first, const bf16 *second)
{
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)first));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* Sums of 32 rows of h and 32 columns, in tiles 0 .. 3; their rows lie `step` floats apart. */
static inline void square_load(const float *sums, const int step)
{
    tiles_fence();
    _tile_loadd(0, sums, 4 * step);
    _tile_loadd(1, sums + 16, 4 * step);
    _tile_loadd(2, sums + 16 * step, 4 * step);
    _tile_loadd(3, sums + 16 * step + 16, 4 * step);
}

static inline void square_store(float *sums, const int step)
{
    _tile_stored(0, sums, 4 * step);
    _tile_stored(1, sums + 16, 4 * step);
    _tile_stored(2, sums + 16 * step, 4 * step);
    _tile_stored(3, sums + 16 * step + 16, 4 * step);
    tiles_fence();
}

/* The sums += 32 rows of h, `stride` apart, times `rows` rows of a tile in pairs [columns / 16][rows / 2][16][2]. */
INLINE void square_add(const bf16 *h, int64_t stride, const bf16 *pairs, const int rows)
{
    for (int m = 0; m < rows; m += 32, pairs += 512) {
        _tile_loadd(4, h + m, 2 * stride);
        _tile_loadd(6, pairs, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, pairs + 16 * rows, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, h + m + 16 * stride, 2 * stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}
