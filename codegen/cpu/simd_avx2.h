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

/* Both numbers of each 32-bit word: the one in its low half, and the other. */
static inline void halves_bf16(__m256i lo, __m256i hi, vfloat *first, vfloat *second)
{
    __m256i high_half = _mm256_set1_epi32((int)0xffff0000);
    first->lo = _mm256_castsi256_ps(_mm256_slli_epi32(lo, 16));
    first->hi = _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16));
    second->lo = _mm256_castsi256_ps(_mm256_and_si256(lo, high_half));
    second->hi = _mm256_castsi256_ps(_mm256_and_si256(hi, high_half));
}

/* Two interleaved vectors: lane i of both is one 32-bit word, the first in its low half. */
static inline void vf_pair_bf16(const bf16 *p, vfloat *first, vfloat *second)
{
    __m256i lo = _mm256_loadu_si256((const __m256i *)p), hi = _mm256_loadu_si256((const __m256i *)(p + 16));
    halves_bf16(lo, hi, first, second);
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

/* Eight lanes: one of the eight floats at x, by the low three bits of place; of the next eight where the fourth is set,
 * if `size` is 16. */
static inline __m256 lanes_of(const float *x, __m256i place, const int size)
{
    __m256 lanes = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), place);
    if (size <= 8)
        return lanes;
    __m256 next = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + 8), place);
    return _mm256_blendv_ps(lanes, next, _mm256_castsi256_ps(_mm256_slli_epi32(place, 28)));
}

/* For each lane the float that the low four bits of `place` count from x[group] on: one of `size`, 4, 8 or 16, which do
 * not reach past the sixteen that they begin among. */
static inline vfloat vf_pick_of(const float *x, vint place, const int group, const int size)
{
    if (group % 8) {
        const __m256i first = _mm256_set1_epi32(group % 8);
        place = (vint){_mm256_or_si256(place.lo, first), _mm256_or_si256(place.hi, first)};
    }
    x += group / 8 * 8;
    return (vfloat){lanes_of(x, place.lo, size), lanes_of(x, place.hi, size)};
}

/* The lanes of `v` whose index, `bits` of it, is `value`; 0 in the others. */
static inline __m256 lanes_at(__m256 v, __m256i index, const int bits, const int value)
{
    __m256i at = _mm256_cmpeq_epi32(_mm256_and_si256(index, _mm256_set1_epi32(bits)), _mm256_set1_epi32(value));
    return _mm256_and_ps(v, _mm256_castsi256_ps(at));
}

/* Four columns from the two that are kept of them: each lane has its own places, the first in the low two bits of
 * `place`, the second in the next two. */
static inline void vf_spread4(float *to, const vfloat *kept, vint place)
{
    #pragma GCC unroll 4
    for (int column = 0; column < 4; column++) {
        __m256 lo = lanes_at(kept[0].lo, place.lo, 3, column), hi = lanes_at(kept[0].hi, place.hi, 3, column);
        lo = _mm256_or_ps(lo, lanes_at(kept[1].lo, place.lo, 12, 4 * column));
        hi = _mm256_or_ps(hi, lanes_at(kept[1].hi, place.hi, 12, 4 * column));
        _mm256_storeu_ps(to + 16 * column, lo);
        _mm256_storeu_ps(to + 16 * column + 8, hi);
    }
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

/* Every lane's bits moved down, or up where places are negative. */
static inline vint vi_shift(vint word, const int places)
{
    if (places < 0)
        return (vint){_mm256_slli_epi32(word.lo, -places), _mm256_slli_epi32(word.hi, -places)};
    return (vint){_mm256_srli_epi32(word.lo, places), _mm256_srli_epi32(word.hi, places)};
}

static inline vint vi_and(vint word, const uint32_t mask)
{
    const __m256i all = _mm256_set1_epi32((int)mask);
    return (vint){_mm256_and_si256(word.lo, all), _mm256_and_si256(word.hi, all)};
}

/* The bits of a that are in the mask, and the other bits of b. */
static inline vint vi_select(vint a, vint b, const uint32_t mask)
{
    vint own = vi_and(a, mask), other = vi_and(b, ~mask);
    return (vint){_mm256_or_si256(own.lo, other.lo), _mm256_or_si256(own.hi, other.hi)};
}

static inline __m256 look_up_eight(const float *table, __m256i index)
{
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28))); /* by the fourth bit */
}

/* One of sixteen floats for each lane, by its low four bits. */
static inline vfloat vf_look_up(const float *table, vint index)
{
    return (vfloat){look_up_eight(table, index.lo), look_up_eight(table, index.hi)};
}

/* Where each of eight 16-bit words comes from among those kept, by the mask of which are: for `pshufb`. */
static inline __m128i expand_control(const int mask)
{
#define WORD(m, i) ((m) >> (i) & 1 ? 0x0100 + 0x0202 * __builtin_popcount((m) & ((1 << (i)) - 1)) : 0x8080)
#define EIGHT(m) {WORD(m, 0), WORD(m, 1), WORD(m, 2), WORD(m, 3), WORD(m, 4), WORD(m, 5), WORD(m, 6), WORD(m, 7)}
#define MASKS4(m) EIGHT(m), EIGHT((m) + 1), EIGHT((m) + 2), EIGHT((m) + 3)
#define MASKS16(m) MASKS4(m), MASKS4((m) + 4), MASKS4((m) + 8), MASKS4((m) + 12)
#define MASKS64(m) MASKS16(m), MASKS16((m) + 16), MASKS16((m) + 32), MASKS16((m) + 48)
    static const uint16_t control[256][8] __attribute__((aligned(16))) = {
        MASKS64(0), MASKS64(64), MASKS64(128), MASKS64(192)};
#undef WORD
#undef EIGHT
#undef MASKS4
#undef MASKS16
#undef MASKS64
    return _mm_load_si128((const __m128i *)control[mask]);
}

/* Eight 16-bit words of which only those in the mask are stored; zeros between. Reads 16 bytes at p. */
static inline __m128i expand_words(const uint16_t *p, const int mask)
{
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)p), expand_control(mask));
}

/* The same with 32-bit floats. Reads 32 bytes at p. */
static inline __m256 expand_floats(const float *p, const int mask)
{
    __m256i control = _mm256_cvtepu16_epi32(expand_control(mask)); /* bits 1-3: the place; bit 15: not kept */
    __m256 kept = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), _mm256_srli_epi32(control, 1));
    __m256i dropped = _mm256_srai_epi32(_mm256_slli_epi32(control, 16), 31);
    return _mm256_andnot_ps(_mm256_castsi256_ps(dropped), kept);
}

/* Two columns of sixteen rows of which only some are stored, from p to before end; zeros in the other lanes. Bits
 * 0-15 of the mask say which rows the first column keeps, bits 16-31 the second, whose values follow. */
static inline void vf_expand_f32(const float *p, const float *end, const int32_t *of, vfloat *first, vfloat *second)
{
    uint32_t mask = (uint32_t)*of;
    float last[32];
    if (end - p < 32)
        p = memcpy(last, p, (end - p) * sizeof *p);
    first->lo = expand_floats(p, mask & 255);
    p += __builtin_popcount(mask & 255);
    first->hi = expand_floats(p, mask >> 8 & 255);
    p += __builtin_popcount(mask >> 8 & 255);
    second->lo = expand_floats(p, mask >> 16 & 255);
    p += __builtin_popcount(mask >> 16 & 255);
    second->hi = expand_floats(p, mask >> 24);
}

/* The words of both columns, eight by eight. */
static inline void expand_pair(const uint16_t *p, const uint16_t *end, uint32_t mask, __m128i *eights)
{
    uint16_t last[32];
    if (end - p < 32)
        p = memcpy(last, p, (end - p) * sizeof *p);
    for (int i = 0; i < 4; i++) {
        eights[i] = expand_words(p, mask >> 8 * i & 255);
        p += __builtin_popcount(mask >> 8 * i & 255);
    }
}

/* The same with halves. */
static inline void vf_expand_f16(const f16 *p, const f16 *end, const int32_t *of, vfloat *first, vfloat *second)
{
    uint32_t mask = (uint32_t)*of;
    __m128i eights[4];
    expand_pair(p, end, mask, eights);
    *first = (vfloat){_mm256_cvtph_ps(eights[0]), _mm256_cvtph_ps(eights[1])};
    *second = (vfloat){_mm256_cvtph_ps(eights[2]), _mm256_cvtph_ps(eights[3])};
}

/* The same with bf16, where bit 2r + c of the mask is row r of column c, and values stand in that order. */
static inline void vf_expand_bf16(const bf16 *p, const bf16 *end, const int32_t *of, vfloat *first, vfloat *second)
{
    uint32_t mask = (uint32_t)*of;
    __m128i eights[4];
    expand_pair(p, end, mask, eights);
    halves_bf16(_mm256_set_m128i(eights[1], eights[0]), _mm256_set_m128i(eights[3], eights[2]), first, second);
}

static inline __m256 eight_e4m3(const uint8_t *p)
{
    __m128i half = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)p)), 7);
    return _mm256_cvtph_ps(_mm_and_si128(half, _mm_set1_epi16((short)0xbfff))); /* the sign stands twice */
}

static inline __m256 eight_e5m2(const uint8_t *p)
{
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)p)), 8));
}

static inline __m256 eight_halves(__m256i v)
{
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}

/* Halves in the low 16 bits of lanes, nothing above. */
static inline vfloat vf_of_halves(vint v)
{
    return (vfloat){eight_halves(v.lo), eight_halves(v.hi)};
}

/* Sixteen bytes and sixteen more as 8-bit floats of kind e4m3: 1/256 of what they mean. */
static inline void vf_pair_e4m3(const uint8_t *p, vfloat *first, vfloat *second)
{
    *first = (vfloat){eight_e4m3(p), eight_e4m3(p + 8)};
    *second = (vfloat){eight_e4m3(p + 16), eight_e4m3(p + 24)};
}

/* The same of kind e5m2, as they are. */
static inline void vf_pair_e5m2(const uint8_t *p, vfloat *first, vfloat *second)
{
    *first = (vfloat){eight_e5m2(p), eight_e5m2(p + 8)};
    *second = (vfloat){eight_e5m2(p + 16), eight_e5m2(p + 24)};
}

/* Sixteen scales of kind e4m3. */
static inline vfloat vf_load_e4m3(const uint8_t *p)
{
    return vf_mul((vfloat){eight_e4m3(p), eight_e4m3(p + 8)}, vf_set1(256));
}

static inline __m256 eight_e8m0(const uint8_t *p)
{
    __m256i word = _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)), 23);
    return _mm256_castsi256_ps(_mm256_max_epu32(word, _mm256_set1_epi32(1 << 22))); /* the least is subnormal */
}

/* Sixteen scales of kind e8m0: powers of two. */
static inline vfloat vf_load_e8m0(const uint8_t *p)
{
    return (vfloat){eight_e8m0(p), eight_e8m0(p + 8)};
}

static inline float f16_to_float(f16 value)
{
    return _cvtsh_ss(value);
}

static inline f16 float_to_f16(float value)
{
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
}
