/* Sixteen lanes in two AVX2 registers. Needs AVX2, FMA and F16C. */
#include <immintrin.h>

/* Sixteen floats: lanes 0-7 and 8-15. */
typedef struct { __m256 lo, hi; } vfloat;

/* Sixteen 32-bit integers: lanes 0-7 and 8-15. */
typedef struct { __m256i lo, hi; } vint;

static inline vfloat vf_zero(void)
{
    return (vfloat){_mm256_setzero_ps(), _mm256_setzero_ps()};
}

static inline vfloat vf_set1(float value)
{
    return (vfloat){_mm256_set1_ps(value), _mm256_set1_ps(value)};
}

static inline vfloat vf_load_f32(const float *p)
{
    return (vfloat){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}

static inline vfloat vf_load_f16(const f16 *p)
{
    __m128i lo = _mm_loadu_si128((const __m128i *)p), hi = _mm_loadu_si128((const __m128i *)(p + 8));
    return (vfloat){_mm256_cvtph_ps(lo), _mm256_cvtph_ps(hi)};
}

static inline vfloat vf_load_bf16(const bf16 *p)
{
    __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8)));
    return (vfloat){_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}

static inline vfloat vf_load_i8(const int8_t *p)
{
    __m256i lo = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
    __m256i hi = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)));
    return (vfloat){_mm256_cvtepi32_ps(lo), _mm256_cvtepi32_ps(hi)};
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
    __m256i lo = _mm256_loadu_si256((const __m256i *)p), hi = _mm256_loadu_si256((const __m256i *)(p + 16));
    __m256i high_half = _mm256_set1_epi32((int)0xffff0000);
    first->lo = _mm256_castsi256_ps(_mm256_slli_epi32(lo, 16));
    first->hi = _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16));
    second->lo = _mm256_castsi256_ps(_mm256_and_si256(lo, high_half));
    second->hi = _mm256_castsi256_ps(_mm256_and_si256(hi, high_half));
}

static inline void vf_store_f32(float *p, vfloat v)
{
    _mm256_storeu_ps(p, v.lo);
    _mm256_storeu_ps(p + 8, v.hi);
}

static inline void vf_store_f16(f16 *p, vfloat v)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
}

static inline void vf_store_bf16(bf16 *p, vfloat v)
{
    float lane[16];
    vf_store_f32(lane, v);
    for (int i = 0; i < 16; i++)
        p[i] = float_to_bf16(lane[i]);
}

static inline vfloat vf_add(vfloat a, vfloat b)
{
    return (vfloat){_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}

static inline vfloat vf_sub(vfloat a, vfloat b)
{
    return (vfloat){_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}

static inline vfloat vf_mul(vfloat a, vfloat b)
{
    return (vfloat){_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}

/* a * b + c */
static inline vfloat vf_fma(vfloat a, vfloat b, vfloat c)
{
    return (vfloat){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}

/* Sum of the lanes, in one fixed order. */
static inline float vf_sum(vfloat v)
{
    float lane[8];
    _mm256_storeu_ps(lane, _mm256_add_ps(v.lo, v.hi));
    return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

/* Four floats, four times over. */
static inline vfloat vf_broadcast4(const float *p)
{
    __m256 twice = _mm256_broadcast_ps((const __m128 *)p);
    return (vfloat){twice, twice};
}

/* Each lane takes one of four broadcast floats, by the low two bits of its index. */
static inline vfloat vf_pick4(vfloat four, vint index)
{
    return (vfloat){_mm256_permutevar_ps(four.lo, index.lo), _mm256_permutevar_ps(four.hi, index.hi)};
}

static inline vint vi_load(const int32_t *p)
{
    return (vint){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 8))};
}

/* Every lane's bits moved down by the same number of places. */
static inline vint vi_shift_right(vint word, const int places)
{
    return (vint){_mm256_srli_epi32(word.lo, places), _mm256_srli_epi32(word.hi, places)};
}

/* Byte j of each lane, a two's complement number. */
static inline vfloat vf_byte(vint word, const int j)
{
    __m256i lo = _mm256_srai_epi32(_mm256_slli_epi32(word.lo, 24 - 8 * j), 24);
    __m256i hi = _mm256_srai_epi32(_mm256_slli_epi32(word.hi, 24 - 8 * j), 24);
    return (vfloat){_mm256_cvtepi32_ps(lo), _mm256_cvtepi32_ps(hi)};
}

/* Nibble j of each lane, a two's complement number of 4 bits. */
static inline vfloat vf_nibble(vint word, const int j)
{
    __m256i lo = _mm256_srai_epi32(_mm256_slli_epi32(word.lo, 28 - 4 * j), 28);
    __m256i hi = _mm256_srai_epi32(_mm256_slli_epi32(word.hi, 28 - 4 * j), 28);
    return (vfloat){_mm256_cvtepi32_ps(lo), _mm256_cvtepi32_ps(hi)};
}

static inline float f16_to_float(f16 value)
{
    return _cvtsh_ss(value);
}

static inline f16 float_to_f16(float value)
{
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
}
