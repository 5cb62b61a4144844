/* Products of 8-bit codes with x in three 8-bit digits. Needs AVX512-VNNI beside what simd_avx512.h needs. */

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

/* Two's complement nibbles as signed bytes times 16, the low or the high ones of all bytes. */
static inline vint vi_high_codes(vint word, const int high)
{
    return _mm512_and_si512(high ? word : _mm512_slli_epi32(word, 4), _mm512_set1_epi8((char)0xf0));
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

/* The digits of sixteen whole numbers, lowest first, and the sum of each sixteen. */
static inline void store_digits(const int32_t *whole, int8_t *to, int32_t *sums)
{
    __m512i left = _mm512_loadu_si512(whole);
    __m128i sum[3];
    #pragma GCC unroll 3
    for (int digit = 0; digit < 3; digit++) {
        __m128i bytes = _mm512_cvtepi32_epi8(left);
        _mm_storeu_si128((void *)(to + 16 * digit), bytes);
        sum[digit] = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), bytes);
        left = _mm512_srai_epi32(_mm512_add_epi32(left, _mm512_set1_epi32(128)), 8);
    }
    sum[0] = _mm_hadd_epi32(_mm_hadd_epi32(sum[0], sum[1]), _mm_hadd_epi32(sum[2], sum[2]));
    _mm_storel_epi64((void *)sums, sum[0]);
    sums[2] = _mm_extract_epi32(sum[0], 2);
}

/* Batch entries whose sums of digits the registers hold. */
INLINE int few_digits(const int nb)
{
    return nb < 4 ? nb : 4;
}

INLINE void clear_digits(vint *sum, const int nb)
{
    #pragma GCC unroll 12
    for (int i = 0; i < 3 * nb; i++)
        sum[i] = _mm512_setzero_si512();
}

/* Sets of sums of digits. A single entry has two, as products of one set would wait for each other. */
INLINE int digit_sets(const int nb)
{
    return nb == 1 ? 2 : 1;
}

/* The set for products of an even or an odd turn. */
INLINE vint *digit_set(vint *sum, const int turn, const int nb)
{
    return sum + turn % digit_sets(nb) * (3 * nb);
}

/* Sums of digits begin with `below` [nb][3], `times` that. */
INLINE void start_digit_sets(vint *sum, const int32_t *below, vint times, const int nb)
{
    #pragma GCC unroll 12
    for (int i = 0; i < 3 * nb; i++)
        sum[i] = _mm512_mullo_epi32(_mm512_set1_epi32(below[i]), times);
    for (int set = 1; set < digit_sets(nb); set++)
        clear_digits(digit_set(sum, set, nb), nb);
}

/* The first set becomes the sum of all. */
INLINE void join_digit_sets(vint *sum, const int nb)
{
    #pragma GCC unroll 3
    for (int i = 0; i < 3 * (digit_sets(nb) - 1); i++)
        sum[i] = _mm512_add_epi32(sum[i], sum[3 * nb + i]);
}

/* sum + four unsigned bytes of each lane times the four signed bytes at x. In assembly because compilers lift the
 * broadcast out of the loop over strips and spill it: the load is free inside the instruction, the spill is not. */
static inline vint vi_dot_four(vint sum, vint bytes, const int8_t *x)
{
    const struct { int8_t byte[4]; } *four = (const void *)x;
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(bytes), "m"(*four));
    return sum;
}

/* sum[n][digit] += four unsigned codes of a lane times the four digits at x, over nb entries. */
INLINE void multiply_add_digits(vint codes, const int8_t *x, vint *sum, const int nb)
{
    #pragma GCC unroll 4
    for (int n = 0; n < nb; n++)
        #pragma GCC unroll 3
        for (int digit = 0; digit < 3; digit++)
            sum[3 * n + digit] = vi_dot_four(sum[3 * n + digit], codes, x + 48 * n + 16 * digit);
}

INLINE void clear_picked_digits(vint *sum, vint *of_codes, const int strips, const int nb)
{
    clear_digits(sum, strips * nb);
    #pragma GCC unroll 2
    for (int s = 0; s < strips; s++)
        of_codes[s] = _mm512_setzero_si512();
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

/* The same where every lane has its own columns of the 16 of `wide`, two times four of each strip, and codes are signed:
 * less 128 times the sum of the codes, as digits have to be unsigned here. Strips have sums behind each other. */
INLINE void multiply_add_picked_digits(
    const vint *codes, const vint *places, const uint8_t *wide, vint *sum, const int strips, const int nb)
{
    #pragma GCC unroll 4
    for (int n = 0; n < nb; n++)
        #pragma GCC unroll 3
        for (int digit = 0; digit < 3; digit++) {
            __m512i all = _mm512_load_si512(wide + 192 * n + 64 * digit);
            #pragma GCC unroll 4
            for (int i = 0; i < 2 * strips; i++) {
                vint *own = sum + 3 * (i / 2 * nb + n) + digit;
                *own = _mm512_dpbusd_epi32(*own, _mm512_shuffle_epi8(all, places[i]), codes[i]);
            }
        }
}

/* sum + the four signed bytes of each lane. */
static inline vint vi_add_bytes(vint sum, vint bytes)
{
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), bytes);
}

/* Bytes less bytes. */
static inline vint vi_sub_bytes(vint a, vint b)
{
    return _mm512_sub_epi8(a, b);
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

/* One in every lane. */
static inline vint vi_one(void)
{
    return _mm512_set1_epi32(1);
}

/* Zero points of 16 rows, as they are stored (less half the range), as whole numbers: `half` added. */
static inline vint vi_zero_points(const int8_t *p, const int half)
{
    return _mm512_add_epi32(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)), _mm512_set1_epi32(half));
}

static inline vint vi_zero(void)
{
    return _mm512_setzero_si512();
}

/* Where a panel of x in digits keeps the sums of each 16 columns. */
static inline const int32_t *digit_sums(const int8_t *x, const int nb)
{
    return (const int32_t *)(x + 3 * BK * nb);
}

/* Where it keeps the unit of each entry. */
static inline const float *digit_units(const int8_t *x, const int nb)
{
    return (const float *)(digit_sums(x, nb) + 3 * (BK / 16) * nb);
}

/* `times` the sums of the digits of `columns` columns: total[n][digit]. `sums` is where x has those of 16 columns. */
INLINE void total_digits(const int32_t *sums, const int columns, const int times, int32_t *total, const int nb)
{
    for (int i = 0; i < 3 * nb; i++) {
        int32_t all = 0;
        for (int k = 0; k < columns / 16; k++)
            all += sums[3 * nb * k + i];
        total[i] = times * all;
    }
}

/* acc += scale * (a number of three digits). */
INLINE void add_joined_digits(float *acc, const vfloat *digit, vfloat scale)
{
    vfloat all = vf_fma(vf_fma(digit[2], vf_set1(256), digit[1]), vf_set1(256), digit[0]);
    vf_store_f32(acc, vf_fma(all, scale, vf_load_f32(acc)));
}

/* acc[n] += scale * unit[n] * (digits of sum[n]), over nb entries of acc [nb][LANES]. Two digits are joined as whole
 * numbers where 257 times a sum fits 32 bits: additions have ports that products leave free. */
INLINE void add_digits(float *acc, const vint *sum, vfloat scale, const float *unit, const int fits, const int nb)
{
    #pragma GCC unroll 4
    for (int n = 0; n < nb; n++, acc += 16, sum += 3) {
        vfloat high = _mm512_cvtepi32_ps(sum[2]), factor = vf_mul(scale, vf_set1(unit[n])), all;
        if (fits)
            all = _mm512_cvtepi32_ps(_mm512_add_epi32(sum[0], _mm512_slli_epi32(sum[1], 8)));
        else
            all = vf_fma(_mm512_cvtepi32_ps(sum[1]), vf_set1(256), _mm512_cvtepi32_ps(sum[0]));
        vf_store_f32(acc, vf_fma(vf_fma(high, vf_set1(65536), all), factor, vf_load_f32(acc)));
    }
}

/* The same after `multiply_add_picked_digits`: `of_codes` are the sums of the codes, which were 1 << up times too large. */
INLINE void add_picked_digits(
    float *acc, const vint *sum, vint of_codes, const int up, vfloat scale, const float *unit, const int nb)
{
    const __m512i bias = _mm512_slli_epi32(of_codes, 7);
    #pragma GCC unroll 4
    for (int n = 0; n < nb; n++) {
        vfloat digit[3];
        #pragma GCC unroll 3
        for (int i = 0; i < 3; i++)
            digit[i] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sub_epi32(sum[3 * n + i], bias), up));
        add_joined_digits(acc + 16 * n, digit, vf_mul(scale, vf_set1(unit[n])));
    }
}
