/* Sixteen lanes in one AVX-512 register. Needs AVX512F, BW, DQ and VL; F16C is part of AVX512F. */
#include <immintrin.h>

/* Sixteen floats. */
typedef __m512 vfloat;

/* Sixteen 32-bit integers. */
typedef __m512i vint;

static inline vfloat vf_zero(void)
{
    return _mm512_setzero_ps();
}

static inline vfloat vf_set1(float value)
{
    return _mm512_set1_ps(value);
}

static inline vfloat vf_load_f32(const float *p)
{
    return _mm512_loadu_ps(p);
}

static inline vfloat vf_load_f16(const f16 *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

static inline vfloat vf_load_bf16(const bf16 *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline vfloat vf_load_i8(const int8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

/* Two vectors that stand one after the other. */
static inline void vf_pair_f32(const float *p, vfloat *first, vfloat *second)
{
    *first = vf_load_f32(p);
    *second = vf_load_f32(p + 16);
}

/* Two vectors that stand one after the other. */
static inline void vf_pair_f16(const f16 *p, vfloat *first, vfloat *second)
{
    *first = vf_load_f16(p);
    *second = vf_load_f16(p + 16);
}

/* Two interleaved vectors: lane i of both is one 32-bit word, the first in its low half. */
static inline void vf_pair_bf16(const bf16 *p, vfloat *first, vfloat *second)
{
    __m512i both = _mm512_loadu_si512(p);
    *first = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    *second = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
}

static inline void vf_store_f32(float *p, vfloat v)
{
    _mm512_storeu_ps(p, v);
}

static inline void vf_store_f16(f16 *p, vfloat v)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* Round to nearest even; a NaN stays a (quiet) NaN. */
static inline void vf_store_bf16(bf16 *p, vfloat v)
{
    __m512i word = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(word, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, word, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

static inline vfloat vf_add(vfloat a, vfloat b)
{
    return _mm512_add_ps(a, b);
}

static inline vfloat vf_sub(vfloat a, vfloat b)
{
    return _mm512_sub_ps(a, b);
}

static inline vfloat vf_mul(vfloat a, vfloat b)
{
    return _mm512_mul_ps(a, b);
}

/* a * b + c */
static inline vfloat vf_fma(vfloat a, vfloat b, vfloat c)
{
    return _mm512_fmadd_ps(a, b, c);
}

/* Sum of the lanes, in one fixed order. */
static inline float vf_sum(vfloat v)
{
    return _mm512_reduce_add_ps(v);
}

/* Four floats, four times over. */
static inline vfloat vf_broadcast4(const float *p)
{
    return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
}

/* Each lane takes one of four broadcast floats, by the low two bits of its index. */
static inline vfloat vf_pick4(vfloat four, vint index)
{
    return _mm512_permutevar_ps(four, index);
}

/* For each lane the float that the low four bits of `place` count from x[group] on: one of `size`, 4, 8 or 16, which do
 * not reach past the sixteen that they begin among. */
static inline vfloat vf_pick_of(const float *x, vint place, const int group, const int size)
{
    const __m512i first = _mm512_set1_epi32(group % 16);
    const __m512i index = _mm512_ternarylogic_epi32(place, _mm512_set1_epi32(size - 1), first, 0xea); /* and, or */
    return _mm512_permutexvar_ps(index, _mm512_loadu_ps(x + group / 16 * 16));
}

/* Four columns from the two that are kept of them: each lane has its own places, the first in the low two bits of
 * `place`, the second in the next two. */
static inline void vf_spread4(float *to, const vfloat *kept, vint place)
{
    __m512i first = _mm512_and_si512(place, _mm512_set1_epi32(3)), second = _mm512_and_si512(place, _mm512_set1_epi32(12));
    #pragma GCC unroll 4
    for (int column = 0; column < 4; column++) {
        vfloat v = _mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask(first, _mm512_set1_epi32(column)), kept[0]);
        v = _mm512_mask_mov_ps(v, _mm512_cmpeq_epi32_mask(second, _mm512_set1_epi32(4 * column)), kept[1]);
        _mm512_storeu_ps(to + 16 * column, v);
    }
}

static inline vint vi_load(const int32_t *p)
{
    return _mm512_loadu_si512(p);
}

/* Every lane's bits moved down by the same number of places. */
static inline vint vi_shift_right(vint word, const int places)
{
    return _mm512_srli_epi32(word, places);
}

/* Byte j of each lane, a two's complement number. */
static inline vfloat vf_byte(vint word, const int j)
{
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(word, 24 - 8 * j), 24));
}

/* Nibble j of each lane, a two's complement number of 4 bits: one shift and one table look-up. */
static inline vfloat vf_nibble(vint word, const int j)
{
    const __m512 value = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(word, 4 * j), value);
}

/* Every lane's bits moved down, or up where places are negative. */
static inline vint vi_shift(vint word, const int places)
{
    return places < 0 ? _mm512_slli_epi32(word, -places) : _mm512_srli_epi32(word, places);
}

static inline vint vi_and(vint word, const uint32_t mask)
{
    return _mm512_and_si512(word, _mm512_set1_epi32((int)mask));
}

/* The bits of a that are in the mask, and the other bits of b. */
static inline vint vi_select(vint a, vint b, const uint32_t mask)
{
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi32((int)mask), 0xe4);
}

/* One of sixteen floats for each lane, by its low four bits. */
static inline vfloat vf_look_up(const float *table, vint index)
{
    return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
}

/* Two columns of sixteen rows of which only some are stored, from p; zeros in the other lanes. Bits 0-15 of the mask
 * say which rows the first column keeps, bits 16-31 the second, whose values follow. */
static inline void vf_expand_f32(const float *p, const float *end, const int32_t *of, vfloat *first, vfloat *second)
{
    uint32_t mask = (uint32_t)*of;
    *first = _mm512_maskz_expandloadu_ps((__mmask16)mask, p);
    *second = _mm512_maskz_expandloadu_ps((__mmask16)(mask >> 16), p + __builtin_popcount(mask & 0xffff));
}

/* The same with halves. No byte is read after the last that is stored. */
static inline void vf_expand_f16(const f16 *p, const f16 *end, const int32_t *of, vfloat *first, vfloat *second)
{
    uint32_t mask = (uint32_t)*of;
    const int before = __builtin_popcount(mask & 0xffff), then = __builtin_popcount(mask >> 16);
    __m256i low = _mm256_maskz_loadu_epi16((__mmask16)((1u << before) - 1), p);
    __m256i high = _mm256_maskz_loadu_epi16((__mmask16)((1u << then) - 1), p + before);
    *first = _mm512_maskz_expand_ps((__mmask16)mask, _mm512_cvtph_ps(low));
    *second = _mm512_maskz_expand_ps((__mmask16)(mask >> 16), _mm512_cvtph_ps(high));
}

/* The same with bf16, where bit 2r + c of the mask is row r of column c, and values stand in that order. */
static inline void vf_expand_bf16(const bf16 *p, const bf16 *end, const int32_t *of, vfloat *first, vfloat *second)
{
    uint32_t mask = (uint32_t)*of;
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const int before = __builtin_popcount(mask & 0xffff), then = __builtin_popcount(mask >> 16);
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((__mmask16)((1u << before) - 1), p));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((__mmask16)((1u << then) - 1), p + before));
    low = _mm512_maskz_expand_epi32((__mmask16)mask, low);
    high = _mm512_maskz_expand_epi32((__mmask16)(mask >> 16), high);
    *first = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_permutex2var_epi32(low, even, high), 16));
    *second = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_permutex2var_epi32(low, odd, high), 16));
}

/* Halves in the low 16 bits of lanes, nothing above. */
static inline vfloat vf_of_halves(vint v)
{
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
}

/* Sixteen bytes and sixteen more as 8-bit floats of kind e4m3: 1/256 of what they mean. */
static inline void vf_pair_e4m3(const uint8_t *p, vfloat *first, vfloat *second)
{
    __m512i half = _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p)), 7);
    half = _mm512_and_si512(half, _mm512_set1_epi16((short)0xbfff)); /* the sign stands twice */
    *first = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    *second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
}

/* The same of kind e5m2, as they are. */
static inline void vf_pair_e5m2(const uint8_t *p, vfloat *first, vfloat *second)
{
    __m512i half = _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p)), 8);
    *first = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    *second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
}

/* Sixteen scales of kind e4m3. */
static inline vfloat vf_load_e4m3(const uint8_t *p)
{
    __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)), 7);
    half = _mm256_and_si256(half, _mm256_set1_epi16((short)0xbfff));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256));
}

/* Sixteen scales of kind e8m0: powers of two. */
static inline vfloat vf_load_e8m0(const uint8_t *p)
{
    __m512i word = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)), 23);
    return _mm512_castsi512_ps(_mm512_max_epu32(word, _mm512_set1_epi32(1 << 22))); /* the least is subnormal */
}

static inline float f16_to_float(f16 value)
{
    return _cvtsh_ss(value);
}

static inline f16 float_to_f16(float value)
{
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
}
