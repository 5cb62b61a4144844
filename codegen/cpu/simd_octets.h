/* Products of codes on integer matrix units: codes are signed bytes, x is three digits (`forms.py`). Beside simd_amx.h.
 *
 * An octet is four neighbouring columns of a row, one 32-bit lane; sixteen octets of sixteen rows are the second
 * operand of a tile product, rows of digits by 64 columns of x the first. */

static inline void vo_store(int8_t *octets, vint four)
{
    _mm512_store_si512(octets, four);
}

/* Unsigned codes in the high bits of bytes, less half their range, as signed bytes: times 1 << (8 - bits). */
static inline vint vo_less_half(vint bytes, const int bits)
{
    const __m512i code = _mm512_set1_epi8((char)(0xff << (8 - bits)));
    return _mm512_ternarylogic_epi32(bytes, code, _mm512_set1_epi8((char)0x80), 0x6a); /* bytes & code ^ 0x80 */
}

/* The nibbles of `vp_twins` as signed bytes times 16. */
static inline vint vo_twins(vint word, const int j)
{
    const __m512i first_bits = _mm512_set1_epi64(j ? 0x3834282418140804 : 0x302c201c100c003c); /* four lower, in two lanes */
    return vi_high_codes(_mm512_multishift_epi64_epi8(first_bits, word), 1);
}

/* Two kept codes of four columns at their places, zeros between: four signed bytes. The codes are bytes 2 * half and
 * 2 * half + 1 of a lane of `kept`; the group's positions are the low four bits of `place`. */
static inline void vo_spread(int8_t *octets, vint kept, const int half, vint place)
{
    const __m512i picks = _mm512_setr_epi32( /* bytes for columns 0 .. 3, by both positions; 0x80: none */
        0, 0, 0, 0, (int)0x80800100, 0, 0, 0, (int)0x80018000, (int)0x80010080, 0, 0, 0x01808000, 0x01800080,
        0x01008080, 0);
    const __m512i lane = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    const __m512i base = _mm512_or_si512(lane, _mm512_set1_epi8((char)(2 * half)));
    vo_store(octets, _mm512_shuffle_epi8(kept, _mm512_or_si512(_mm512_permutexvar_epi32(place, picks), base)));
}

/* Byte j of each lane in all four. */
static inline vint vo_byte(vint word, const int j)
{
    const __m512i lane = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    return _mm512_shuffle_epi8(word, _mm512_add_epi8(lane, _mm512_set1_epi8((char)j)));
}

/* As `vp_spread_group`, of signed bytes, in all four bytes of each lane. */
INLINE void vo_spread_group(
    int8_t *octets, const vint *kept, const vint *column, const int count, const int first, const int columns)
{
    #pragma GCC unroll 4
    for (int k = 0; k < columns; k += 4) {
        const __m512i own = _mm512_set1_epi32(0x03020100 + 0x01010101 * (first + k));
        __m512i four = _mm512_setzero_si512();
        #pragma GCC unroll 4
        for (int i = 0; i < count; i++)
            four = _mm512_mask_mov_epi8(four, _mm512_cmpeq_epi8_mask(column[i], own), kept[i]);
        vo_store(octets + k * LANES, four);
    }
}

/* Rows of x in octets of up to 16 batch entries, three digits each, in whole tiles of 16. */
static inline int digit_rows(int entries)
{
    return entries < 16 ? (3 * entries + 15) / 16 * 16 : 48;
}

INLINE void tile_clear(const int tile)
{
    switch (tile) { /* intrinsics take literals only */
    case 0: _tile_zero(0); break;
    case 1: _tile_zero(1); break;
    case 2: _tile_zero(2); break;
    case 3: _tile_zero(3); break;
    case 4: _tile_zero(4); break;
    case 5: _tile_zero(5); break;
    }
}

/* A tile += rows of digits in tile 7 times octets in tile 6. */
INLINE void tile_add_product(const int tile)
{
    switch (tile) { /* intrinsics take literals only */
    case 0: _tile_dpbssd(0, 7, 6); break;
    case 1: _tile_dpbssd(1, 7, 6); break;
    case 2: _tile_dpbssd(2, 7, 6); break;
    case 3: _tile_dpbssd(3, 7, 6); break;
    case 4: _tile_dpbssd(4, 7, 6); break;
    case 5: _tile_dpbssd(5, 7, 6); break;
    }
}

INLINE void tile_store(const int tile, int32_t *to)
{
    switch (tile) { /* intrinsics take literals only */
    case 0: _tile_stored(0, to, 64); break;
    case 1: _tile_stored(1, to, 64); break;
    case 2: _tile_stored(2, to, 64); break;
    case 3: _tile_stored(3, to, 64); break;
    case 4: _tile_stored(4, to, 64); break;
    case 5: _tile_stored(5, to, 64); break;
    }
}

/* Three tiles from `first` on += octets [columns / 4][LANES][4] times x [columns / 64][rows][64], from 0 if `clear`. */
INLINE void tiles_multiply(const int first, int clear, const int8_t *octets, const int columns, const int8_t *x, int rows)
{
    if (clear) {
        tile_clear(first);
        if (rows > 16)
            tile_clear(first + 1);
        if (rows > 32)
            tile_clear(first + 2);
    }
    for (int k = 0; k < columns; k += 64, octets += 1024, x += 64 * rows) {
        _tile_loadd(6, octets, 64);
        _tile_loadd(7, x, 64);
        tile_add_product(first);
        if (rows > 16) {
            _tile_loadd(7, x + 1024, 64);
            tile_add_product(first + 1);
        }
        if (rows > 32) {
            _tile_loadd(7, x + 2048, 64);
            tile_add_product(first + 2);
        }
    }
}

/* The same in tiles 0 .. 2 or, with `second`, 3 .. 5. */
INLINE void digits_multiply(int second, int clear, const int8_t *octets, const int columns, const int8_t *x, int rows)
{
    tiles_fence();
    if (second)
        tiles_multiply(3, clear, octets, columns, x, rows);
    else
        tiles_multiply(0, clear, octets, columns, x, rows);
}

INLINE void tiles_store(const int first, int32_t *part, int rows)
{
    tile_store(first, part);
    if (rows > 16)
        tile_store(first + 1, part + 256);
    if (rows > 32)
        tile_store(first + 2, part + 512);
}

/* They are stored to part [rows][LANES]. */
INLINE void digits_store(int second, int32_t *part, int rows)
{
    if (second)
        tiles_store(3, part, rows);
    else
        tiles_store(0, part, rows);
    tiles_fence();
}

/* Sums of the three digits of `entries` batch entries that wait to be joined, scaled and added to the sums of a strip.
 * Those are in blocks of `wide` entries, as all sums are; the last block has what is left of `width`. */
typedef struct {
    float *acc;
    const float *unit;
    int first, entries, strip, rows;
    vfloat scale;
} waiting_digits;

static inline void digits_join(const waiting_digits *waiting, const int32_t *part, int wide, int width)
{
    const int digit = 16 * waiting->entries, end = waiting->first + waiting->entries;
    const float *unit = waiting->unit;
    for (int n = waiting->first; n < end;) {
        const int block = n & -wide, nb = width - block < wide ? width - block : wide;
        const int stop = end < block + nb ? end : block + nb;
        float *acc = waiting->acc + block * SUMS + (waiting->strip * nb + n - block) * LANES;
        #pragma GCC unroll 4
        for (; n < stop; n++, part += 16, acc += 16, unit++) {
            vfloat digits[3];
            for (int i = 0; i < 3; i++)
                digits[i] = _mm512_cvtepi32_ps(_mm512_loadu_si512(part + i * digit));
            add_joined_digits(acc, digits, *unit, waiting->scale);
        }
    }
}
