/* Kept 16-bit values to their lanes in one instruction. Needs AVX512-VBMI2, which CPUs with bf16 products have. */

/* A mask straight from memory: compilers take it through a register, which costs one more of what is scarce here. */
static inline __mmask32 mask_32(const int32_t *p)
{
    __mmask32 mask;
    __asm__("kmovd %1, %0" : "=k"(mask) : "m"(*p));
    return mask;
}

/* 16-bit words from p on to the places that the mask names, zeros between. */
static inline vint vi_expand_words(__mmask32 mask, const void *p)
{
    return _mm512_maskz_expandloadu_epi16(mask, p);
}

/* The first bytes to the places that the mask names, those of `none` between. */
static inline vint vi_expand_bytes(vint none, __mmask64 mask, vint bytes)
{
    return _mm512_mask_expand_epi8(none, mask, bytes);
}

/* Both columns of sixteen rows as pairs, where bit 2r + c of the mask says whether row r of column c is stored. */
static inline vint vp_expand(const bf16 *p, const int32_t *mask)
{
    return vi_expand_words(mask_32(mask), p);
}

/* Two columns of sixteen rows of which only some are stored, from p; zeros in the other lanes. Bits 0-15 of the mask
 * say which rows the first column keeps, bits 16-31 the second, whose values follow. Nothing is read from
 * `end` on. */
static inline void vf_expand_f32(const float *p, const float *end, const int32_t *mask, vfloat *first, vfloat *second)
{
    const uint32_t kept = (uint32_t)*mask;
    const float *then = p + __builtin_popcount(kept & 0xffff);
    if (then + 16 <= end) { /* an expand of what is loaded takes half the steps of one from memory */
        *first = _mm512_castsi512_ps(vi_expand_lanes((__mmask16)kept, _mm512_loadu_si512(p)));
        *second = _mm512_castsi512_ps(vi_expand_lanes((__mmask16)(kept >> 16), _mm512_loadu_si512(then)));
    } else {
        *first = _mm512_maskz_expandloadu_ps((__mmask16)kept, p);
        *second = _mm512_maskz_expandloadu_ps((__mmask16)(kept >> 16), then);
    }
}

/* The same with halves. */
static inline void vf_expand_f16(const f16 *p, const f16 *end, const int32_t *mask, vfloat *first, vfloat *second)
{
    __m512i both = vi_expand_words(mask_32(mask), p);
    *first = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
    *second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
}

/* The same with bf16, where bit 2r + c of the mask is row r of column c, and values stand in that order. */
static inline void vf_expand_bf16(const bf16 *p, const bf16 *end, const int32_t *mask, vfloat *first, vfloat *second)
{
    __m512i both = vi_expand_words(mask_32(mask), p);
    *first = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    *second = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
}

/* Both columns as they stand in memory: [16][2], zeros between. */
static inline void pair_of_kept(const bf16 *p, const bf16 *end, uint32_t mask, bf16 *to)
{
    _mm512_storeu_si512(to, vi_expand_words(mask, p));
}

/* Those of 64 bytes that the codes of a block take. */
static inline __mmask64 bytes_there(uint64_t mask, const int bits)
{
    const int bytes = block_bytes(mask, bits);
    return bytes < 64 ? ((uint64_t)1 << bytes) - 1 : ~(uint64_t)0;
}

/* The kept codes of one block from p on, a byte each, row by row; `none` where none is kept. */
INLINE vint vi_kept(uint64_t mask, const uint8_t *p, const uint8_t *end, vint none, const int bits)
{
    const int inside = __builtin_expect(p + 8 * bits <= end, 1); /* so many bytes if all are kept */
    __m512i each;
    if (bits == 8) {
        each = inside ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(bytes_there(mask, bits), p);
    } else if (bits == 4) {
        __m256i two = inside ? _mm256_loadu_si256((const void *)p)
                             : _mm256_maskz_loadu_epi8((__mmask32)bytes_there(mask, bits), p);
        __m512i wide = _mm512_cvtepu8_epi16(two);
        each = _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), _mm512_set1_epi8(15));
    } else {
        __m128i four = inside ? _mm_loadu_si128((const void *)p)
                              : _mm_maskz_loadu_epi8((__mmask16)bytes_there(mask, bits), p);
        __m512i wide = _mm512_cvtepu8_epi32(four);
        wide = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 6));
        each = _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi32(wide, 12)), _mm512_set1_epi8(3));
    }
    return vi_expand_bytes(none, mask, each);
}

/* Bytes of which the bits of `flip` are turned. */
static inline vint vi_turn(vint bytes, const int flip)
{
    return _mm512_xor_si512(bytes, _mm512_set1_epi8((char)flip));
}

/* Whether codes for several products are spread in memory: they are not, as the expand takes so little. */
static inline int spread_once(void)
{
    return 0;
}

/* What stands where no code is kept, as `vi_kept` takes it. */
INLINE vint vi_none(const int8_t *rows, const int otherwise, const int bits)
{
    const __m512i most = _mm512_set1_epi8((char)((1 << bits) - 1));
    if (!rows)
        return _mm512_and_si512(_mm512_set1_epi8((char)otherwise), most);
    __m512i row = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)rows));
    row = _mm512_mullo_epi32(row, _mm512_set1_epi32(0x01010101));
    return _mm512_and_si512(_mm512_add_epi8(row, _mm512_set1_epi8((char)otherwise)), most);
}

/* As many blocks as codes fit a byte, each code in its field: a word of 16 rows. The bits of a code
 * that are set in `flip` are turned. No byte is read from `end` on. */
INLINE const uint8_t *spread_word(
    const int64_t *masks, const uint8_t *codes, const uint8_t *end, const int8_t *rows, const int otherwise,
    const int flip, const int bits, uint8_t *to)
{
    const __m512i none = vi_none(rows, otherwise, bits);
    __m512i word = vi_kept((uint64_t)masks[0], codes, end, none, bits);
    #pragma GCC unroll 4
    for (int field = 1; field < 8 / bits; field++) {
        codes += block_bytes((uint64_t)masks[field - 1], bits);
        __m512i next = vi_kept((uint64_t)masks[field], codes, end, none, bits);
        word = _mm512_or_si512(word, _mm512_slli_epi32(next, bits * field));
    }
    _mm512_storeu_si512(to, _mm512_xor_si512(word, _mm512_set1_epi8((char)(flip * (255 / ((1 << bits) - 1))))));
    return codes + block_bytes((uint64_t)masks[8 / bits - 1], bits);
}

/* One block of bytes, column by column. */
INLINE const uint8_t *spread_columns(
    const int64_t *masks, const uint8_t *codes, const uint8_t *end, const int8_t *rows, const int otherwise,
    const int flip, const int bits, uint8_t *to)
{
    const __m512i fours = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    const __m512i columns = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i block = vi_kept((uint64_t)masks[0], codes, end, vi_none(rows, otherwise, bits), bits);
    block = _mm512_permutexvar_epi32(columns, _mm512_shuffle_epi8(block, fours));
    _mm512_storeu_si512(to, _mm512_xor_si512(block, _mm512_set1_epi8((char)flip)));
    return codes + block_bytes((uint64_t)masks[0], bits);
}

/* 16-bit words of those of sixteen rows that the mask names, to the places of their rows; zeros at others. */
static inline void spread_bf16(uint32_t mask, const bf16 *p, bf16 *to)
{
    const __mmask16 there = (__mmask16)((1u << __builtin_popcount(mask)) - 1);
    __m256i values = _mm256_maskz_expand_epi16((__mmask16)mask, _mm256_maskz_loadu_epi16(there, p));
    _mm256_storeu_si256((__m256i *)to, values);
}

/* Bytes, of which some number is taken. */
static inline void spread_bytes(uint32_t mask, const uint8_t *p, const int less, int8_t *to)
{
    const __mmask16 there = (__mmask16)((1u << __builtin_popcount(mask)) - 1);
    __m128i bytes = _mm_sub_epi8(_mm_maskz_loadu_epi8(there, p), _mm_set1_epi8((char)less));
    _mm_storeu_si128((__m128i *)to, _mm_maskz_expand_epi8((__mmask16)mask, bytes));
}
