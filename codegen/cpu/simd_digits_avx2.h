/* Codes as bytes and whole numbers in lanes, and their products with x in three 8-bit digits. */

/* Unsigned low nibbles of 64 two's complement numbers of 4 bits, 8 added to each. */
static inline vint vi_low_nibbles(vint word)
{
    const __m256i eight = _mm256_set1_epi8(8), mask = _mm256_set1_epi8(15);
    return (vint){
        _mm256_and_si256(_mm256_xor_si256(word.lo, eight), mask),
        _mm256_and_si256(_mm256_xor_si256(word.hi, eight), mask)};
}

/* The same of the high nibbles. */
static inline vint vi_high_nibbles(vint word)
{
    return vi_low_nibbles((vint){_mm256_srli_epi16(word.lo, 4), _mm256_srli_epi16(word.hi, 4)});
}

/* 64 two's complement bytes, 128 added to each. */
static inline vint vi_unsigned_bytes(vint word)
{
    const __m256i high = _mm256_set1_epi8((char)0x80);
    return (vint){_mm256_xor_si256(word.lo, high), _mm256_xor_si256(word.hi, high)};
}

/* Twice the value of 64 4-bit floats in low nibbles, 12 added to each: whole numbers from 0 to 24. */
static inline vint vi_twice_e2m1(vint word)
{
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i value = _mm256_set_epi32(
        0x00040608, 0x090a0b0c, 0x18141210, 0x0f0e0d0c, 0x00040608, 0x090a0b0c, 0x18141210, 0x0f0e0d0c);
    return (vint){
        _mm256_shuffle_epi8(value, _mm256_and_si256(word.lo, mask)),
        _mm256_shuffle_epi8(value, _mm256_and_si256(word.hi, mask))};
}

static inline __m256i eight_places(__m256i positions, const int j)
{
    const __m256i mask = _mm256_set1_epi8(3), base = _mm256_set1_epi32(0x0c080400);
    return _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(positions, 2 * j), mask), base);
}

/* Places of kept columns among 16 digits, for step j of a word of positions of 32
 * columns: first and second kept of groups 0 to 3, then of groups 4 to 7. */
static inline vint vi_places(vint positions, const int j)
{
    return (vint){eight_places(positions.lo, j), eight_places(positions.hi, j)};
}

/* x in digits, unsigned, each 16 bytes twice, as what lanes pick from. */
INLINE void widen_digits(const int8_t *x, uint8_t *wide, const int nb)
{
    for (int i = 0; i < (BK + 15) / 16 * 3 * nb; i++) {
        __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)x + i));
        _mm256_store_si256((__m256i *)(wide + 64 * i), _mm256_xor_si256(twice, _mm256_set1_epi8((char)0x80)));
    }
}

/* The bytes of four lanes each. */
static inline vint vi_of_quarters(__m128i a, __m128i b, __m128i c, __m128i d)
{
    return (vint){_mm256_set_m128i(b, a), _mm256_set_m128i(d, c)};
}

/* Those of lanes 4 i to 4 i + 3. */
static inline __m128i vi_quarter(vint all, const int i)
{
    const __m256i half = i < 2 ? all.lo : all.hi;
    return i % 2 ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half);
}

/* Bytes less bytes. */
static inline vint vi_sub_bytes(vint a, vint b)
{
    return (vint){_mm256_sub_epi8(a.lo, b.lo), _mm256_sub_epi8(a.hi, b.hi)};
}

/* The same byte everywhere. */
static inline vint vi_set_bytes(const int byte)
{
    return (vint){_mm256_set1_epi8((char)byte), _mm256_set1_epi8((char)byte)};
}

/* A whole number in every lane. */
static inline vint vi_set1(const int32_t value)
{
    return (vint){_mm256_set1_epi32(value), _mm256_set1_epi32(value)};
}

static inline vint vi_add(vint a, vint b)
{
    return (vint){_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}

static inline vint vi_sub(vint a, vint b)
{
    return (vint){_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}

static inline vint vi_mul(vint a, vint b)
{
    return (vint){_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}

/* Times a power of two. */
static inline vint vi_times_power(vint a, const int bits)
{
    return (vint){_mm256_slli_epi32(a.lo, bits), _mm256_slli_epi32(a.hi, bits)};
}

/* Over a power of two, rounded down. */
static inline vint vi_over_power(vint a, const int bits)
{
    return bits ? (vint){_mm256_srai_epi32(a.lo, bits), _mm256_srai_epi32(a.hi, bits)} : a;
}

static inline vfloat vf_whole(vint a)
{
    return (vfloat){_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
}

/* Zero points of 16 rows, as they are stored (less half the range), as whole numbers: `half` added. */
static inline vint vi_zero_points(const int8_t *p, const int half)
{
    __m256i lo = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
    __m256i hi = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)));
    return vi_add((vint){lo, hi}, vi_set1(half));
}

/* Zero points of 16 rows (two's complement, less 8) as four unsigned bytes a lane. */
static inline vint vi_zero_bytes(const int8_t *p)
{
    return vi_mul(vi_zero_points(p, 8), vi_set1(0x01010101));
}

/* As in simd_digits.h: there are half as many registers, of half the size. */
INLINE int few_digits(const int nb)
{
    (void)nb;
    return 1;
}

/* sum + sums of 16 bits, two to a lane. */
static inline __m256i add_twos(__m256i sum, __m256i twos)
{
    return _mm256_add_epi32(sum, _mm256_madd_epi16(twos, _mm256_set1_epi16(1)));
}

/* sum + the sixteen unsigned codes of each lane, four of each vector, times the sixteen signed digits at x. Sums of 16
 * bits hold eight products of codes below 32. */
static inline vint vi_dot_sixteen(vint sum, const vint *codes, const int8_t *x)
{
    __m256i lo = _mm256_setzero_si256(), hi = _mm256_setzero_si256();
    #pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        int32_t four;
        memcpy(&four, x + 4 * i, 4);
        __m256i digits = _mm256_set1_epi32(four);
        lo = _mm256_add_epi16(lo, _mm256_maddubs_epi16(codes[i].lo, digits));
        hi = _mm256_add_epi16(hi, _mm256_maddubs_epi16(codes[i].hi, digits));
    }
    return (vint){add_twos(sum.lo, lo), add_twos(sum.hi, hi)};
}

static inline __m256i picked(__m256i x, __m256i place, __m256i code)
{
    return _mm256_maddubs_epi16(_mm256_shuffle_epi8(x, place), code);
}

/* sum + one or two `quads` of four signed codes of each lane times the digits that it picks of the sixteen at `wide`. */
static inline vint vi_dot_picked(
    vint sum, const vint *codes, const vint *places, const uint8_t *wide, const int quads)
{
    const __m256i x = _mm256_load_si256((const __m256i *)wide);
    __m256i lo = picked(x, places[0].lo, codes[0].lo), hi = picked(x, places[0].hi, codes[0].hi);
    if (quads == 2) {
        lo = _mm256_add_epi16(lo, picked(x, places[1].lo, codes[1].lo));
        hi = _mm256_add_epi16(hi, picked(x, places[1].hi, codes[1].hi));
    }
    return (vint){add_twos(sum.lo, lo), add_twos(sum.hi, hi)};
}

/* sum + the four signed bytes of each lane. */
static inline vint vi_add_bytes(vint sum, vint bytes)
{
    const __m256i one = _mm256_set1_epi8(1);
    return (vint){
        add_twos(sum.lo, _mm256_maddubs_epi16(one, bytes.lo)), add_twos(sum.hi, _mm256_maddubs_epi16(one, bytes.hi))};
}

/* Nibble j of each lane, an unsigned number, less 8: a look-up takes twice as many instructions here. */
static inline vfloat vf_nibble_less_8(vint word, const int j)
{
    const __m256i eights = _mm256_set1_epi32((int)0x88888888);
    return vf_nibble((vint){_mm256_xor_si256(word.lo, eights), _mm256_xor_si256(word.hi, eights)}, j);
}
