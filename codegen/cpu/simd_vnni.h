/* Products of 8-bit codes with x in three 8-bit digits, four bytes at a time. Needs AVX512-VNNI beside what simd_avx512.h
 * needs. */

/* As in simd_digits.h, by vectors. */
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

/* Two's complement nibbles as signed bytes times 16, the low or the high ones of all bytes. */
static inline vint vi_high_codes(vint word, const int high)
{
    return _mm512_and_si512(high ? word : _mm512_slli_epi32(word, 4), _mm512_set1_epi8((char)0xf0));
}

/* Sets of sums of digits. A single entry has two, as products of one set would wait for each other. */
INLINE int digit_sets(const int nb)
{
    return nb == 1 ? 2 : 1;
}

/* sum + four unsigned bytes of each lane times the four signed bytes at x. In assembly because compilers lift the
 * broadcast out of the loop over strips and spill it: the load is free inside the instruction, the spill is not. */
static inline vint vi_dot_four(vint sum, vint bytes, const int8_t *x)
{
    const struct { int8_t byte[4]; } *four = (const void *)x;
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(bytes), "m"(*four));
    return sum;
}

/* sum[n][digit] += sixteen unsigned codes of a lane times the sixteen digits at x, over nb entries. */
INLINE void multiply_add_digits(const vint *codes, const int8_t *x, vint *sum, const int nb)
{
    #pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        #pragma GCC unroll 4
        for (int n = 0; n < nb; n++)
            #pragma GCC unroll 3
            for (int digit = 0; digit < 3; digit++) {
                vint *own = digit_set(sum, i, nb) + 3 * n + digit;
                *own = vi_dot_four(*own, codes[i], x + 48 * n + 16 * digit + 4 * i);
            }
}

/* The same where every lane has its own columns of the 16 of `wide`, `quads` times four of each strip, and codes are
 * signed: less 128 times the sum of the codes, as digits have to be unsigned here. Strips have sums behind each other. */
INLINE void multiply_add_picked_digits(
    const vint *codes, const vint *places, const uint8_t *wide, vint *sum, const int quads, const int strips,
    const int nb)
{
    #pragma GCC unroll 4
    for (int n = 0; n < nb; n++)
        #pragma GCC unroll 3
        for (int digit = 0; digit < 3; digit++) {
            __m512i all = _mm512_load_si512(wide + 192 * n + 64 * digit);
            __asm__("" : "+v"(all)); /* or GCC 12 loads it for each product */
            #pragma GCC unroll 4
            for (int i = 0; i < quads * strips; i++) {
                vint *own = sum + 3 * (i / quads * nb + n) + digit;
                *own = _mm512_dpbusd_epi32(*own, _mm512_shuffle_epi8(all, places[i]), codes[i]);
            }
        }
}

/* sum + the four signed bytes of each lane. */
static inline vint vi_add_bytes(vint sum, vint bytes)
{
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), bytes);
}

/* Strips that share what is read of x where lanes pick. */
INLINE int digit_strips(const int nb)
{
    return nb > 2 ? 1 : 2;
}

/* As in simd_digits.h, without an instruction for each half: times 16. */
static inline vint vi_signed_codes(vint word, const int high)
{
    return vi_high_codes(word, high);
}

static inline int signed_codes_power(void)
{
    return 4;
}
