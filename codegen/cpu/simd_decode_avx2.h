/* What writes decoded tiles row by row, in AVX2. */

/* 4-bit codes, the first of a byte in its low bits, to what a table has for them. */
INLINE void look_up_nibbles_bf16(const uint8_t *codes, const bf16 *table, bf16 *to, const int count)
{
    const __m128i first = _mm_loadu_si128((const __m128i *)table), second = _mm_loadu_si128((const __m128i *)table + 1);
    const __m128i byte = _mm_set1_epi16(255), nibble = _mm_set1_epi8(15);
    const __m128i low = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
    const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    int k = 0;
    for (; k + 32 <= count; k += 32, codes += 16) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)codes);
        __m128i even = _mm_and_si128(bytes, nibble), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
        __m128i each[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
        for (int i = 0; i < 2; i++) {
            __m128i a = _mm_shuffle_epi8(low, each[i]), b = _mm_shuffle_epi8(high, each[i]);
            _mm_storeu_si128((__m128i *)(to + k + 16 * i), _mm_unpacklo_epi8(a, b));
            _mm_storeu_si128((__m128i *)(to + k + 16 * i + 8), _mm_unpackhi_epi8(a, b));
        }
    }
    for (; k < count; k += 2, codes++) {
        to[k] = table[*codes & 15];
        to[k + 1] = table[*codes >> 4];
    }
}

/* Two columns of sixteen rows of which only some are stored, from p to before end: [16][2], zeros between. Bit 2r + c of
 * the mask is row r of column c. */
static inline void pair_of_kept(const bf16 *p, const bf16 *end, uint32_t mask, bf16 *to)
{
    expand_pair(p, end, mask, (__m128i *)to);
}
