/* Codes of which some are kept, in AVX2; AVX-512 without VBMI2 takes them as well. Eight codes at a time come to their
 * places by a table of where each of eight bytes comes from. */

/* Where each of eight bytes comes from among those kept, by the mask of which are: for `pshufb`. */
static inline __m128i byte_control(const int mask)
{
    return _mm_loadl_epi64((const __m128i *)places_of_kept(mask));
}

/* The eight codes that begin `place` bits from p on, a byte each. Reads eight bytes. */
INLINE __m128i eight_bytes(const uint8_t *p, const int place, const int bits)
{
    if (bits != 4)
        return _mm_cvtsi64_si128((long long)eight_codes(p, place, bits));
    uint64_t word;
    memcpy(&word, p + place / 8, sizeof word);
    __m128i two = _mm_cvtsi64_si128((long long)(word >> place % 8));
    return _mm_and_si128(_mm_unpacklo_epi8(two, _mm_srli_epi16(two, 4)), _mm_set1_epi8(15));
}

/* The next two rows of a block, eight codes, from `place` bits after p on, which moves behind them; `none` where the mask
 * has none. */
INLINE __m128i two_rows(const int mask, const uint8_t *p, int *place, __m128i none, const int bits)
{
    __m128i control = byte_control(mask), kept = _mm_shuffle_epi8(eight_bytes(p, *place, bits), control);
    *place += bits * __builtin_popcount((unsigned)mask);
    return _mm_or_si128(kept, _mm_and_si128(none, _mm_cmpgt_epi8(_mm_setzero_si128(), control)));
}

/* What stands in rows 2 i and 2 i + 1 where no code is kept. */
INLINE __m128i none_of_rows(const int8_t *rows, const int i, const int otherwise, const int bits)
{
    const int most = (1 << bits) - 1;
    uint64_t first = (uint64_t)((otherwise + (rows ? rows[2 * i] : 0)) & most);
    uint64_t second = (uint64_t)((otherwise + (rows ? rows[2 * i + 1] : 0)) & most);
    return _mm_cvtsi64_si128((long long)((first | second << 32) * 0x01010101));
}

/* Codes of `blocks` blocks where eight bytes may be read from any of them on: p, or a copy where they end too near. */
INLINE const uint8_t *readable_codes(
    const uint8_t *p, const uint8_t *end, const int64_t *masks, const int blocks, const int bits, uint8_t *copy)
{
    if (__builtin_expect(end - p >= 8 * bits * blocks + 8, 1))
        return p;
    return memcpy(copy, p, (size_t)kept_bytes(masks, blocks, bits));
}

/* Whether codes for several products are spread in memory. */
static inline int spread_once(void)
{
    return 1;
}

/* What stands where no code is kept, as `vi_kept` takes it. */
INLINE vint vi_none(const int8_t *rows, const int otherwise, const int bits)
{
    __m128i none[4];
    #pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        none[i] = _mm_unpacklo_epi64(
            none_of_rows(rows, 2 * i, otherwise, bits), none_of_rows(rows, 2 * i + 1, otherwise, bits));
    return vi_of_quarters(none[0], none[1], none[2], none[3]);
}

/* The kept codes of one block from p on, a byte each, row by row; `none` where none is kept. */
INLINE vint vi_kept(uint64_t mask, const uint8_t *p, const uint8_t *end, vint none, const int bits)
{
    uint8_t copy[72];
    const int64_t all = (int64_t)mask;
    __m128i fours[4];
    int place = 0;
    p = readable_codes(p, end, &all, 1, bits, copy);
    #pragma GCC unroll 4
    for (int i = 0; i < 4; i++, mask >>= 16) {
        __m128i four = vi_quarter(none, i);
        __m128i first = two_rows(mask & 255, p, &place, four, bits);
        __m128i second = two_rows(mask >> 8 & 255, p, &place, _mm_unpackhi_epi64(four, four), bits);
        fours[i] = _mm_unpacklo_epi64(first, second);
    }
    return vi_of_quarters(fours[0], fours[1], fours[2], fours[3]);
}

/* As many blocks as codes fit a byte, each code in its field: a word of 16 rows. The bits of a code
 * that are set in `flip` are turned. No byte is read from `end` on. */
INLINE const uint8_t *spread_word(
    const int64_t *masks, const uint8_t *codes, const uint8_t *end, const int8_t *rows, const int otherwise,
    const int flip, const int bits, uint8_t *to)
{
    const __m128i turned = _mm_set1_epi8((char)(flip * (255 / ((1 << bits) - 1))));
    uint8_t copy[72];
    const uint8_t *p = readable_codes(codes, end, masks, 8 / bits, bits, copy);
    int place[4] = {0};
    #pragma GCC unroll 4
    for (int field = 1; field < 8 / bits; field++)
        place[field] = place[field - 1] + 8 * block_bytes((uint64_t)masks[field - 1], bits);
    #pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const __m128i none = none_of_rows(rows, i, otherwise, bits);
        __m128i word = turned;
        #pragma GCC unroll 4
        for (int field = 0; field < 8 / bits; field++) {
            __m128i own = two_rows(((const uint8_t *)(masks + field))[i], p, place + field, none, bits);
            word = _mm_xor_si128(word, _mm_slli_epi16(own, bits * field));
        }
        _mm_storel_epi64((__m128i *)(to + 8 * i), word);
    }
    return codes + (place[8 / bits - 1] + 7) / 8;
}

/* One block of bytes, column by column. */
INLINE const uint8_t *spread_columns(
    const int64_t *masks, const uint8_t *codes, const uint8_t *end, const int8_t *rows, const int otherwise,
    const int flip, const int bits, uint8_t *to)
{
    const __m128i by_column = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    uint8_t copy[72];
    const uint8_t *p = readable_codes(codes, end, masks, 1, bits, copy);
    __m128i fours[4];
    int place = 0;
    #pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* four rows: their first columns, seconds, .. */
        const uint8_t *mask = (const uint8_t *)masks + 2 * i;
        __m128i first = two_rows(mask[0], p, &place, none_of_rows(rows, 2 * i, otherwise, bits), bits);
        __m128i second = two_rows(mask[1], p, &place, none_of_rows(rows, 2 * i + 1, otherwise, bits), bits);
        fours[i] = _mm_shuffle_epi8(_mm_unpacklo_epi64(first, second), by_column);
    }
    const __m128i turned = _mm_set1_epi8((char)flip);
    __m128i low = _mm_unpacklo_epi32(fours[0], fours[1]), next_low = _mm_unpacklo_epi32(fours[2], fours[3]);
    __m128i high = _mm_unpackhi_epi32(fours[0], fours[1]), next_high = _mm_unpackhi_epi32(fours[2], fours[3]);
    _mm_storeu_si128((__m128i *)to, _mm_xor_si128(_mm_unpacklo_epi64(low, next_low), turned));
    _mm_storeu_si128((__m128i *)to + 1, _mm_xor_si128(_mm_unpackhi_epi64(low, next_low), turned));
    _mm_storeu_si128((__m128i *)to + 2, _mm_xor_si128(_mm_unpacklo_epi64(high, next_high), turned));
    _mm_storeu_si128((__m128i *)to + 3, _mm_xor_si128(_mm_unpackhi_epi64(high, next_high), turned));
    return codes + (place + 7) / 8;
}

/* Bytes, of which some number is taken. */
static inline void spread_bytes(uint32_t mask, const uint8_t *p, const int less, int8_t *to)
{
    const __m128i taken = _mm_set1_epi8((char)less);
    uint8_t kept[16];
    memcpy(kept, p, (size_t)__builtin_popcount(mask));
    for (int i = 0, place = 0; i < 2; i++, mask >>= 8) {
        __m128i control = byte_control(mask & 255);
        __m128i bytes = _mm_sub_epi8(_mm_loadl_epi64((const __m128i *)(kept + place)), taken);
        _mm_storel_epi64((__m128i *)(to + 8 * i), _mm_shuffle_epi8(bytes, control));
        place += __builtin_popcount(mask & 255);
    }
}

/* The first n of eight words at p; nothing is read after them. */
static inline __m256i first_words(const int32_t *p, const int n)
{
    static const int32_t there[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_maskload_epi32(p, _mm256_loadu_si256((const __m256i *)(there + 8 - n)));
}

/* The same with 16-bit words: two at a time, and the last of an odd number. */
static inline __m128i first_halves(const uint16_t *p, const int n)
{
    static const uint16_t nothing = 0;
    const uint16_t *last = n ? p + n - 1 : &nothing;
    __m128i place = _mm_cmpeq_epi16(_mm_set1_epi16((short)(n - 1)), _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7));
    __m128i words = _mm256_castsi256_si128(first_words((const int32_t *)p, n / 2));
    return _mm_blendv_epi8(words, _mm_set1_epi16((short)*last), place);
}

/* Words of those of sixteen rows that the mask names, to the places of their rows; zeros at others. The bits of a word
 * that are set in `flip` are turned. No word is read after the last that is stored. */
static inline void spread_words(uint32_t mask, const int32_t *p, const uint32_t flip, int32_t *to)
{
    const __m256i turned = _mm256_set1_epi32((int)flip);
    #pragma GCC unroll 2
    for (int i = 0; i < 2; i++, mask >>= 8) {
        const int n = __builtin_popcount(mask & 255);
        __m256i control = _mm256_cvtepi8_epi32(byte_control(mask & 255)); /* below 0: not kept */
        __m256i kept = _mm256_permutevar8x32_epi32(_mm256_xor_si256(first_words(p, n), turned), control);
        kept = _mm256_andnot_si256(_mm256_srai_epi32(control, 31), kept);
        _mm256_storeu_si256((__m256i *)(to + 8 * i), kept);
        p += n;
    }
}

/* The same with 16-bit words. */
static inline void spread_bf16(uint32_t mask, const bf16 *p, bf16 *to)
{
    #pragma GCC unroll 2
    for (int i = 0; i < 2; i++, mask >>= 8) {
        const int n = __builtin_popcount(mask & 255);
        __m128i control = byte_control(mask & 255), dropped = _mm_cmpgt_epi8(_mm_setzero_si128(), control);
        control = _mm_add_epi8(control, control);
        control = _mm_or_si128(_mm_unpacklo_epi8(control, control), _mm_set1_epi16(0x0100)); /* both bytes of a word */
        __m128i kept = _mm_shuffle_epi8(first_halves((const uint16_t *)p, n), control);
        _mm_storeu_si128((__m128i *)(to + 8 * i), _mm_andnot_si128(_mm_unpacklo_epi8(dropped, dropped), kept));
        p += n;
    }
}

/* Sixteen words of which n are at p; zeros for the others. */
static inline vint vi_load_first(const int32_t *p, const int n)
{
    return (vint){first_words(p, n < 8 ? n : 8), first_words(p + 8, n < 8 ? 0 : n < 16 ? n - 8 : 8)};
}

/* Those of sixteen rows that count more than `less`. */
static inline uint32_t rows_above(const uint8_t *counts, int less)
{
    __m128i more = _mm_subs_epu8(_mm_loadu_si128((const __m128i *)counts), _mm_set1_epi8((char)less));
    return 0xffff & ~(uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(more, _mm_setzero_si128()));
}

/* x in digits as floats, in their order. */
INLINE void digit_floats(const int8_t *x, const int nb, float *to)
{
    #pragma GCC unroll 2
    for (int k = 0; k < BK; k += 16)
        for (int n = 0; n < nb; n++, x += 48) {
            const __m256 unit = _mm256_set1_ps(digit_units(x - (k / 16 * nb + n) * 48, nb)[n]);
            #pragma GCC unroll 2
            for (int i = 0; i < 16; i += 8) {
                __m256i low = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(x + i)));
                __m256i middle = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(x + i + 16)));
                __m256i high = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(x + i + 32)));
                middle = _mm256_add_epi32(middle, _mm256_slli_epi32(high, 8));
                __m256i whole = _mm256_add_epi32(low, _mm256_slli_epi32(middle, 8));
                __m256 all = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), unit);
                float *entry = to + (k + i) * nb + 4 * n;
                _mm_storeu_ps(entry, _mm256_castps256_ps128(all));
                _mm_storeu_ps(entry + 4 * nb, _mm256_extractf128_ps(all, 1));
            }
        }
}
