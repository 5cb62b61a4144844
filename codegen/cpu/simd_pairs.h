/* Tiles unpacked to pairs of bf16: two neighbouring columns of a row, one 32-bit lane. Needs AVX512-VBMI and AVX512-BF16
 * beside what simd_vnni.h needs. */

/* bf16 of a 5-bit two's complement number in the low bits of each 16-bit word; higher bits are ignored. */
static inline vint vp_small(vint words)
{
    const __m512i value = _mm512_set_epi16( /* -1 .. -16, then 15 .. 0 */
        (short)0xbf80, (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0a0, (short)0xc0c0, (short)0xc0e0,
        (short)0xc100, (short)0xc110, (short)0xc120, (short)0xc130, (short)0xc140, (short)0xc150, (short)0xc160,
        (short)0xc170, (short)0xc180, 0x4170, 0x4160, 0x4150, 0x4140, 0x4130, 0x4120, 0x4110, 0x4100, 0x40e0, 0x40c0,
        0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0);
    return _mm512_permutexvar_epi16(words, value);
}

/* bf16 of a 4-bit two's complement number in the low bits of each 16-bit word; higher bits are ignored. */
static inline vint vp_nibble(vint words)
{
    const __m512i value = _mm512_set_epi16( /* -1 .. -8, then 7 .. 0; twice, as the look-up reads a fifth bit */
        (short)0xbf80, (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0a0, (short)0xc0c0, (short)0xc0e0,
        (short)0xc100, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0,
        (short)0xbf80, (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0a0, (short)0xc0c0, (short)0xc0e0,
        (short)0xc100, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0);
    return _mm512_permutexvar_epi16(words, value);
}

/* The same less a zero point; zero is that of `vp_zero`. */
static inline vint vp_nibble_less(vint words, vint zero)
{
    __m512i code = _mm512_ternarylogic_epi32(words, _mm512_set1_epi16(8), _mm512_set1_epi16(15), 0x28);
    return vp_small(_mm512_sub_epi16(code, zero)); /* (words ^ 8) & 15, less zero */
}

/* Zero points of 16 rows (two's complement, less 8) as `vp_nibble_less` takes them. */
static inline vint vp_zero(const int8_t *p)
{
    __m512i zero = _mm512_add_epi32(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)), _mm512_set1_epi32(8));
    return _mm512_or_si512(zero, _mm512_slli_epi32(zero, 16));
}

/* Of a lane's eight nibbles (columns 0 and 4 in its lowest byte, 3 and 7 in its highest), those of columns 2 * j
 * and 2 * j + 1, in the low bits of its 16-bit words. */
static inline vint vp_step(vint word, const int j)
{
    const __m512i lane = _mm512_set4_epi32(0x800d800c, 0x80098008, 0x80058004, (int)0x80018000);
    __m512i two = _mm512_shuffle_epi8(word, _mm512_add_epi32(lane, _mm512_set1_epi32(j % 2 * 0x00020002)));
    return j / 2 ? _mm512_srli_epi16(two, 4) : two;
}

/* Of a word of two nibbles each of four groups (a lane's lowest byte is group 0, its low nibble the first), the nibbles
 * of groups j and j + 2 in the low bits of bytes: first and second of j, then of j + 2. High bits are anything. */
static inline vint vp_twins(vint word, const int j)
{
    const __m512i first_bits = _mm512_set1_epi64(j ? 0x3c382c281c180c08 : 0x3430242014100400); /* in two lanes */
    return _mm512_multishift_epi64_epi8(first_bits, word);
}

/* Two kept 4-bit codes of four columns as two pairs: their bytes 2 * half and 2 * half + 1 of each lane hold them in
 * the low bits; the group's positions are the low four bits of `place`. Bytes are put at columns 0, 2, 1, 3, so that
 * both pairs begin in the low bits of the lane's words, now or eight bits on. */
INLINE void vp_spread_codes(vint pair[2], vint kept, const int half, vint place)
{
    const __m512i picks = _mm512_setr_epi32( /* bytes for columns 0, 2, 1, 3, by both positions; 0x80: none */
        0, 0, 0, 0, (int)0x80018000, 0, 0, 0, (int)0x80800100, (int)0x80000180, 0, 0, 0x01808000, 0x01008080,
        0x01800080, 0);
    const __m512i lane = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    const __m512i base = _mm512_or_si512(lane, _mm512_set1_epi8((char)(2 * half)));
    pair[0] = _mm512_shuffle_epi8(kept, _mm512_or_si512(_mm512_permutexvar_epi32(place, picks), base));
    pair[1] = _mm512_srli_epi16(pair[0], 8);
}

/* Two bytes of each lane, in the low bits of its 16-bit words. */
static inline vint vp_bytes(vint word, const int even, const int odd)
{
    const __m512i lane = _mm512_set4_epi32((int)0x800c800c, (int)0x80088008, (int)0x80048004, (int)0x80008000);
    return _mm512_shuffle_epi8(word, _mm512_add_epi32(lane, _mm512_set1_epi32(even | odd << 16)));
}

/* The low (0) or the high (1) 16 bits of each lane, twice. */
static inline vint vp_half(vint word, const int high)
{
    const __m512i lane = _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100);
    return _mm512_shuffle_epi8(word, high ? _mm512_add_epi8(lane, _mm512_set1_epi8(2)) : lane);
}

/* Bytes j and j + 2 of each lane, two's complement numbers, as bf16. */
static inline vint vp_of_bytes(vint bytes, const int j)
{
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    __m512i even = _mm512_castps_si512(vf_byte(bytes, j)), odd = _mm512_castps_si512(vf_byte(bytes, j + 2));
    return _mm512_ternarylogic_epi32(high, odd, _mm512_srli_epi32(even, 16), 0xca); /* high ? odd : even */
}

/* The columns first .. first + columns - 1 of a group that keeps `count` of them, as pairs: numbers and their columns, both
 * in both words of each lane; zeros between. */
INLINE void vp_spread_group(
    bf16 *pairs, const vint *kept, const vint *column, const int count, const int first, const int columns)
{
    #pragma GCC unroll 8
    for (int k = 0; k < columns; k += 2) {
        const __m512i own = _mm512_set1_epi32((first + k) | (first + k + 1) << 16);
        __m512i pair = _mm512_setzero_si512();
        #pragma GCC unroll 4
        for (int i = 0; i < count; i++)
            pair = _mm512_mask_mov_epi16(pair, _mm512_cmpeq_epi16_mask(column[i], own), kept[i]);
        vp_store(pairs + k * LANES, pair);
    }
}

/* One of 32 values for each 16-bit word, by its low five bits. */
static inline vint vp_look_up(const bf16 *table, vint words)
{
    return _mm512_permutexvar_epi16(words, _mm512_loadu_si512(table));
}

/* What two tables of 128 bytes have for the low seven bits of each code: the low and the high bytes of bf16 numbers,
 * whose sign is the eighth bit. */
static inline void vp_halves(vint code, const uint8_t *low, const uint8_t *high, vint *lower, vint *upper)
{
    *lower = _mm512_permutex2var_epi8(_mm512_loadu_si512(low), code, _mm512_loadu_si512(low + 64));
    *upper = _mm512_permutex2var_epi8(_mm512_loadu_si512(high), code, _mm512_loadu_si512(high + 64));
    *upper = _mm512_ternarylogic_epi32(*upper, code, _mm512_set1_epi8((char)0x80), 0xf8); /* upper | code & 0x80 */
}

/* Four columns in the bytes of each lane as pairs: columns 0 and 2, then 1 and 3. */
static inline void vp_look_up_crossed(vint *pair, vint code, const uint8_t *low, const uint8_t *high)
{
    const __m512i even = _mm512_set1_epi16(0xff);
    vint lower, upper;
    vp_halves(code, low, high, &lower, &upper);
    pair[0] = _mm512_ternarylogic_epi32(lower, _mm512_slli_epi16(upper, 8), even, 0xe4); /* even bytes of the first */
    pair[1] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(lower, 8), upper, even, 0xe4);
}

/* Four columns of sixteen bytes as two pairs. */
static inline void vp_look_up_bytes(bf16 *pairs, const uint8_t *bytes, const uint8_t *low, const uint8_t *high)
{
    const __m512i rows = _mm512_set_epi32( /* to lanes of 16 bytes with four rows of two columns, then of the others */
        0x3f2f3e2e, 0x3d2d3c2c, 0x1f0f1e0e, 0x1d0d1c0c, 0x3b2b3a2a, 0x39293828, 0x1b0b1a0a, 0x19091808,
        0x37273626, 0x35253424, 0x17071606, 0x15051404, 0x33233222, 0x31213020, 0x13031202, 0x11011000);
    __m512i code = _mm512_permutexvar_epi8(rows, _mm512_loadu_si512(bytes));
    vint lower, upper;
    vp_halves(code, low, high, &lower, &upper);
    _mm512_store_si512(pairs, _mm512_unpacklo_epi8(lower, upper));
    _mm512_store_si512(pairs + 32, _mm512_unpackhi_epi8(lower, upper));
}

/* Codes of a few bits less a zero point, as bf16; zero is that of `vp_zero`. */
static inline vint vp_codes_less(vint words, const int mask, vint zero)
{
    return vp_small(_mm512_sub_epi16(_mm512_and_si512(words, _mm512_set1_epi16((short)mask)), zero));
}

/* Two vectors of floats that bf16 holds exactly, as pairs. */
static inline vint vp_join(vfloat first, vfloat second)
{
    __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    return _mm512_ternarylogic_epi32(low, _mm512_castps_si512(second), high, 0xf8); /* low | second & high */
}

static inline vint vp_load(const bf16 *pairs)
{
    return _mm512_loadu_si512(pairs);
}

static inline void vp_store(bf16 *pairs, vint pair)
{
    _mm512_store_si512(pairs, pair);
}

/* Two kept weights of four columns at their places, zeros between: two pairs. The group's positions are
 * the low four bits of `place`. */
static inline void vp_spread(bf16 *pairs, vint kept, vint place)
{
    const __m512i first = _mm512_setr_epi32( /* bytes of columns 0 and 1, by both positions; 0x80: none */
        0, 0, 0, 0, 0x03020100, 0, 0, 0, (int)0x80800100, 0x01008080, 0, 0, (int)0x80800100, 0x01008080,
        (int)0x80808080, 0);
    const __m512i second = _mm512_setr_epi32( /* of columns 2 and 3 */
        0, 0, 0, 0, (int)0x80808080, 0, 0, 0, (int)0x80800302, (int)0x80800302, 0, 0, 0x03028080, 0x03028080,
        0x03020100, 0);
    const __m512i lane = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    vp_store(pairs, _mm512_shuffle_epi8(kept, _mm512_or_si512(_mm512_permutexvar_epi32(place, first), lane)));
    vp_store(pairs + 32, _mm512_shuffle_epi8(kept, _mm512_or_si512(_mm512_permutexvar_epi32(place, second), lane)));
}

/* The nibble of group g, of the eight in a word of positions, in the low bits. */
static inline vint vp_place(vint positions, const int g)
{
    return g ? _mm512_srli_epi32(positions, g % 4 * 8 + g / 4 * 4) : positions;
}

/* Pairs times the scale of each row, rounded to bf16. */
static inline void vp_scale(bf16 *pairs, const int columns, vfloat scale)
{
    static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_loadu_si512(order);
    for (int k = 0; k < columns; k += 2, pairs += 32) {
        vfloat first, second;
        vf_pair_bf16(pairs, &first, &second);
        __m512bh both = _mm512_cvtne2ps_pbh(vf_mul(second, scale), vf_mul(first, scale));
        vp_store(pairs, _mm512_permutexvar_epi16(interleave, (__m512i)both));
    }
}
