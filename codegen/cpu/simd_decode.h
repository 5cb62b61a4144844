/* What writes decoded tiles row by row, in AVX-512. */

/* 4-bit codes, the first of a byte in its low bits, to what a table has for them. */
INLINE void look_up_nibbles_f32(const uint8_t *codes, const f32 *table, f32 *to, const int count)
{
    const __m512 values = _mm512_loadu_ps(table);
    int k = 0;
    for (; k + 16 <= count; k += 16, codes += 8) {
        __m128i bytes = _mm_loadl_epi64((const __m128i *)codes);
        __m128i both = _mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4)); /* the look-up reads four bits of each */
        _mm512_storeu_ps(to + k, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(both), values));
    }
    for (; k < count; k += 2, codes++) {
        to[k] = table[*codes & 15];
        to[k + 1] = table[*codes >> 4];
    }
}

INLINE void look_up_nibbles_bf16(const uint8_t *codes, const bf16 *table, bf16 *to, const int count)
{
    const __m512i values = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)table));
    int k = 0;
    for (; k + 32 <= count; k += 32, codes += 16) { /* of five bits that are read, the fifth does not matter */
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
        __m512i both = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
        _mm512_storeu_si512(to + k, _mm512_permutexvar_epi16(both, values));
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
    const int before = __builtin_popcount(mask & 0xffff), then = __builtin_popcount(mask >> 16);
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((__mmask16)((1u << before) - 1), p));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((__mmask16)((1u << then) - 1), p + before));
    low = _mm512_maskz_expand_epi32((__mmask16)mask, low);
    high = _mm512_maskz_expand_epi32((__mmask16)(mask >> 16), high);
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(low));
    _mm256_storeu_si256((__m256i *)(to + 16), _mm512_cvtepi32_epi16(high));
}

/* Sixteen columns of sixteen words to sixteen rows, `stride` bytes apart. */
static inline void columns_to_rows(const uint32_t *words, void *to, const int64_t stride)
{
    __m512i each[16], quads[16];
    #pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        each[i] = _mm512_loadu_si512(words + 16 * i);
    #pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) { /* pairs of columns, of two rows in four */
        quads[i] = _mm512_unpacklo_epi32(each[i], each[i + 1]);
        quads[i + 1] = _mm512_unpackhi_epi32(each[i], each[i + 1]);
    }
    #pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) { /* four columns, in each 128 bits one row */
        each[i] = _mm512_unpacklo_epi64(quads[i], quads[i + 2]);
        each[i + 1] = _mm512_unpackhi_epi64(quads[i], quads[i + 2]);
        each[i + 2] = _mm512_unpacklo_epi64(quads[i + 1], quads[i + 3]);
        each[i + 3] = _mm512_unpackhi_epi64(quads[i + 1], quads[i + 3]);
    }
    #pragma GCC unroll 4
    for (int row = 0; row < 4; row++) { /* 128 bits of rows row, row + 4, row + 8, row + 12 */
        __m512i low = _mm512_shuffle_i32x4(each[row], each[row + 4], 0x88);
        __m512i high = _mm512_shuffle_i32x4(each[row + 8], each[row + 12], 0x88);
        __m512i odd_low = _mm512_shuffle_i32x4(each[row], each[row + 4], 0xdd);
        __m512i odd_high = _mm512_shuffle_i32x4(each[row + 8], each[row + 12], 0xdd);
        _mm512_storeu_si512((char *)to + row * stride, _mm512_shuffle_i32x4(low, high, 0x88));
        _mm512_storeu_si512((char *)to + (row + 8) * stride, _mm512_shuffle_i32x4(low, high, 0xdd));
        _mm512_storeu_si512((char *)to + (row + 4) * stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
        _mm512_storeu_si512((char *)to + (row + 12) * stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
    }
}
