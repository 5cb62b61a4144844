/* Codes as bytes and whole numbers in lanes, and their products with x in three 8-bit digits, from what AVX-512 with
 * bytes and words has. */

/* Unsigned low nibbles of 64 two's complement numbers of 4 bits, 8 added to each. */
static inline vint vi_low_nibbles(vint word)
{
    const __m512i eight = _mm512_set1_epi8(8), mask = _mm512_set1_epi8(15);
    return _mm512_ternarylogic_epi32(word, eight, mask, 0x28); /* (word ^ eight) & mask */
}

/* The same of the high nibbles. */
static inline vint vi_high_nibbles(vint word)
{
    return vi_low_nibbles(_mm512_srli_epi16(word, 4));
}

/* 64 two's complement bytes, 128 added to each. */
static inline vint vi_unsigned_bytes(vint word)
{
    return _mm512_xor_si512(word, _mm512_set1_epi32((int)0x80808080));
}

/* Twice the value of 64 4-bit floats in low nibbles, 12 added to each: whole numbers from 0 to 24. */
static inline vint vi_twice_e2m1(vint word)
{
    const __m512i value = _mm512_set4_epi32(0x00040608, 0x090a0b0c, 0x18141210, 0x0f0e0d0c);
    return _mm512_shuffle_epi8(value, _mm512_and_si512(word, _mm512_set1_epi8(15)));
}

/* Places of kept columns among 16 digits, for step j of a word of positions of 32
 * columns: first and second kept of groups 0 to 3, then of groups 4 to 7. */
static inline vint vi_places(vint positions, const int j)
{
    const __m512i mask = _mm512_set1_epi8(3), base = _mm512_set1_epi32(0x0c080400);
    __m512i shifted = j ? _mm512_srli_epi32(positions, 2 * j) : positions;
    return _mm512_ternarylogic_epi32(shifted, mask, base, 0xea); /* shifted & mask | base */
}

/* x in digits, unsigned, each 16 bytes four times: what lanes pick from is then a load, where a broadcast of 16 bytes takes
 * one of the two ports that shuffle (Zen 4). */
INLINE void widen_digits(const int8_t *x, uint8_t *wide, const int nb)
{
    #pragma GCC unroll 4
    for (int i = 0; i < (BK + 15) / 16 * 3 * nb; i++)
        _mm512_store_si512(
            wide + 64 * i, vi_unsigned_bytes(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)x + i))));
}

/* The bytes of four lanes each. */
static inline vint vi_of_quarters(__m128i a, __m128i b, __m128i c, __m128i d)
{
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(b, a)), _mm256_set_m128i(d, c), 1);
}

/* Those of lanes 4 i to 4 i + 3. */
static inline __m128i vi_quarter(vint all, const int i)
{
    const __m256i half = i < 2 ? _mm512_castsi512_si256(all) : _mm512_extracti64x4_epi64(all, 1);
    return i % 2 ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half);
}

/* Bytes less bytes. */
static inline vint vi_sub_bytes(vint a, vint b)
{
    return _mm512_sub_epi8(a, b);
}

/* Zero points of 16 rows, as they are stored (less half the range), as whole numbers: `half` added. */
static inline vint vi_zero_points(const int8_t *p, const int half)
{
    return _mm512_add_epi32(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)), _mm512_set1_epi32(half));
}

/* Zero points of 16 rows (two's complement, less 8) as four unsigned bytes a lane. */
static inline vint vi_zero_bytes(const int8_t *p)
{
    return _mm512_mullo_epi32(vi_zero_points(p, 8), _mm512_set1_epi32(0x01010101));
}

/* The same byte everywhere. */
static inline vint vi_set_bytes(const int byte)
{
    return _mm512_set1_epi8((char)byte);
}

/* A whole number in every lane. */
static inline vint vi_set1(const int32_t value)
{
    return _mm512_set1_epi32(value);
}

static inline vint vi_add(vint a, vint b)
{
    return _mm512_add_epi32(a, b);
}

static inline vint vi_sub(vint a, vint b)
{
    return _mm512_sub_epi32(a, b);
}

static inline vint vi_mul(vint a, vint b)
{
    return _mm512_mullo_epi32(a, b);
}

/* Times a power of two. */
static inline vint vi_times_power(vint a, const int bits)
{
    return _mm512_slli_epi32(a, bits);
}

/* Over a power of two, rounded down. */
static inline vint vi_over_power(vint a, const int bits)
{
    return bits ? _mm512_srai_epi32(a, bits) : a;
}

static inline vfloat vf_whole(vint a)
{
    return _mm512_cvtepi32_ps(a);
}

/* sum + the sixteen unsigned codes of each lane, four of each vector, times the sixteen signed digits at x. Sums of 16
 * bits hold eight products of codes below 32. */
static inline vint vi_dot_sixteen(vint sum, const vint *codes, const int8_t *x)
{
    __m512i all = _mm512_setzero_si512();
    #pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        int32_t four;
        memcpy(&four, x + 4 * i, 4);
        all = _mm512_add_epi16(all, _mm512_maddubs_epi16(codes[i], _mm512_set1_epi32(four)));
    }
    return _mm512_add_epi32(sum, _mm512_madd_epi16(all, _mm512_set1_epi16(1)));
}

/* sum + one or two `quads` of four signed codes of each lane times the digits that it picks of the sixteen at `wide`. */
static inline vint vi_dot_picked(
    vint sum, const vint *codes, const vint *places, const uint8_t *wide, const int quads)
{
    const __m512i x = _mm512_load_si512(wide);
    __m512i all = _mm512_maddubs_epi16(_mm512_shuffle_epi8(x, places[0]), codes[0]);
    if (quads == 2)
        all = _mm512_add_epi16(all, _mm512_maddubs_epi16(_mm512_shuffle_epi8(x, places[1]), codes[1]));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(all, _mm512_set1_epi16(1)));
}

/* sum + the four signed bytes of each lane. */
static inline vint vi_add_bytes(vint sum, vint bytes)
{
    __m512i twos = _mm512_maddubs_epi16(_mm512_set1_epi8(1), bytes);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(twos, _mm512_set1_epi16(1)));
}
