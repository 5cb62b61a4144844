/* Codes of which some are kept, and outliers, in AVX-512. */

/* The first lanes to the places that the mask names, zeros between. */
static inline vint vi_expand_lanes(__mmask16 mask, vint lanes)
{
    return _mm512_maskz_expand_epi32(mask, lanes);
}

/* Words of those of sixteen rows that the mask names, to the places of their rows; zeros at others. The bits of a word
 * that are set in `flip` are turned. No word is read after the last that is stored. */
static inline void spread_words(uint32_t mask, const int32_t *p, const uint32_t flip, int32_t *to)
{
    const __mmask16 there = (__mmask16)((1u << __builtin_popcount(mask)) - 1);
    __m512i words = _mm512_xor_si512(_mm512_maskz_loadu_epi32(there, p), _mm512_set1_epi32((int)flip));
    _mm512_storeu_si512(to, vi_expand_lanes((__mmask16)mask, words));
}

static inline void spread_f32(uint32_t mask, const f32 *p, f32 *to)
{
    const __mmask16 there = (__mmask16)((1u << __builtin_popcount(mask)) - 1);
    _mm512_storeu_ps(to, _mm512_maskz_expand_ps((__mmask16)mask, _mm512_maskz_loadu_ps(there, p)));
}

/* The same with 16-bit words. */
static inline void spread_bf16(uint32_t mask, const bf16 *p, bf16 *to)
{
    const __mmask16 there = (__mmask16)((1u << __builtin_popcount(mask)) - 1);
    __m512i words = vi_expand_lanes((__mmask16)mask, _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, p)));
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(words));
}

/* The first n of sixteen lanes; all where there are more. */
static inline __mmask16 first_lanes(const int n)
{
    return (__mmask16)(0xffff >> (16 - (n < 16 ? n : 16)));
}

/* Sixteen words or numbers of which n are at p; zeros for the others. */
static inline vint vi_load_first(const int32_t *p, const int n)
{
    return _mm512_maskz_loadu_epi32(first_lanes(n), p);
}

static inline vfloat vf_load_first_f32(const f32 *p, const int n)
{
    return _mm512_maskz_loadu_ps(first_lanes(n), p);
}

static inline vfloat vf_load_first_bf16(const bf16 *p, const int n)
{
    __m256i words = _mm256_maskz_loadu_epi16(first_lanes(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

static inline vfloat vf_load_first_f16(const f16 *p, const int n)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}

/* To acc [STRIPS][nb][LANES] the sums of rows that keep a group, [groups][nb][room], at the lanes of those rows. A
 * single entry has the sums of few strips in registers, and the groups in the order in which they were stored. */
INLINE void add_kept_rows(
    const float *sums, const int room, const int16_t *masks, const int groups, float *acc, const int nb)
{
    const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    enum { TOGETHER = STRIPS < 8 ? STRIPS : 8 };
    if (nb == 1 && STRIPS == TOGETHER) {
        __m512 all[TOGETHER];
        #pragma GCC unroll 8
        for (int strip = 0; strip < TOGETHER; strip++)
            all[strip] = _mm512_loadu_ps(acc + LANES * strip);
        for (int group = 0; group < groups; group++, masks += STRIPS, sums += room) {
            const float *from = sums;
            #pragma GCC unroll 8
            for (int strip = 0; strip < TOGETHER; strip++) {
                const vint own = vi_expand_lanes((__mmask16)masks[strip], (vint)_mm512_loadu_ps(from));
                all[strip] = _mm512_add_ps(all[strip], (__m512)own);
                from += __builtin_popcount((uint16_t)masks[strip]);
            }
        }
        #pragma GCC unroll 8
        for (int strip = 0; strip < TOGETHER; strip++)
            _mm512_storeu_ps(acc + LANES * strip, all[strip]);
        return;
    }
    int before[BK / 8] = {0}; /* rows of strips that come first */
    for (int strip = 0; strip < STRIPS; strip++, acc += LANES * nb) {
        __m512 all[8];
        #pragma GCC unroll 8
        for (int n = 0; n < nb; n++)
            all[n] = _mm512_loadu_ps(acc + LANES * n);
        for (int group = 0; group < groups; group++) {
            const __mmask16 mask = (__mmask16)masks[group * STRIPS + strip];
            const float *from = sums + group * nb * room + before[group];
            const vint place = vi_expand_lanes(mask, order);
            #pragma GCC unroll 8
            for (int n = 0; n < nb; n++) {
                __m512 own = _mm512_maskz_permutexvar_ps(mask, place, _mm512_loadu_ps(from + n * room));
                all[n] = _mm512_add_ps(all[n], own);
            }
            before[group] += __builtin_popcount((uint16_t)mask);
        }
        #pragma GCC unroll 8
        for (int n = 0; n < nb; n++)
            _mm512_storeu_ps(acc + LANES * n, all[n]);
    }
}

/* x in digits as floats, in their order. */
INLINE void digit_floats(const int8_t *x, const int nb, float *to)
{
    #pragma GCC unroll 4
    for (int k = 0; k < BK; k += 16)
        #pragma GCC unroll 8
        for (int n = 0; n < nb; n++, x += 48) {
            __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)x));
            __m512i middle = _mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(x + 16)));
            __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(x + 32)));
            middle = _mm512_add_epi32(middle, _mm512_slli_epi32(high, 8));
            __m512 all = _mm512_cvtepi32_ps(_mm512_add_epi32(low, _mm512_slli_epi32(middle, 8)));
            all = _mm512_mul_ps(all, _mm512_set1_ps(digit_units(x - (k / 16 * nb + n) * 48, nb)[n]));
            float *entry = to + (k * nb + 4 * n);
            _mm_storeu_ps(entry, _mm512_castps512_ps128(all));
            _mm_storeu_ps(entry + 4 * nb, _mm512_extractf32x4_ps(all, 1));
            _mm_storeu_ps(entry + 8 * nb, _mm512_extractf32x4_ps(all, 2));
            _mm_storeu_ps(entry + 12 * nb, _mm512_extractf32x4_ps(all, 3));
        }
}

/* Those of sixteen rows that count more than `less`. */
static inline uint32_t rows_above(const uint8_t *counts, int less)
{
    return _mm_cmpgt_epu8_mask(_mm_loadu_si128((const void *)counts), _mm_set1_epi8((char)less));
}

/* Add one weight of each of these rows times its own column of x. */
INLINE void multiply_add_apart(
    vfloat weights, uint32_t rows, const uint8_t *columns, const float *x, float *acc, const int nb)
{
    const __mmask16 here = (__mmask16)rows, there = (__mmask16)((1u << __builtin_popcount(rows)) - 1);
    __m512i k = vi_expand_lanes(here, _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, columns)));
    if (nb > 1) {
        __m512i four = _mm512_and_si512(k, _mm512_set1_epi32(~3));
        k = _mm512_add_epi32(_mm512_sub_epi32(k, four), _mm512_mullo_epi32(four, _mm512_set1_epi32(nb)));
    }
    #pragma GCC unroll 8
    for (int n = 0; n < nb; n++) {
        __m512 picked = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), here, k, x + 4 * n, 4);
        _mm512_storeu_ps(acc + 16 * n, _mm512_fmadd_ps(weights, picked, _mm512_loadu_ps(acc + 16 * n)));
    }
}
