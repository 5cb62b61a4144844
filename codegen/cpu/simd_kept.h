/* Codes of which only some are stored. A block is 16 rows by 4 columns: its mask has bit 4 r + c for row r of
 * column c, its codes follow each other from a byte of their own. */

/* Bytes that the codes of a block take. */
static inline int block_bytes(uint64_t mask, const int bits)
{
    return (__builtin_popcountll(mask) * bits + 7) / 8;
}

/* Bytes that the codes of n blocks take. */
static inline int kept_bytes(const int64_t *masks, int n, const int bits)
{
    int bytes = 0;
    for (int i = 0; i < n; i++)
        bytes += block_bytes((uint64_t)masks[i], bits);
    return bytes;
}

/* Where each of eight comes from among those kept, by the mask of which are; 0x88 where none is. */
static inline const uint8_t *places_of_kept(const int mask)
{
#define PLACE(m, i) ((m) >> (i) & 1 ? __builtin_popcount((m) & ((1 << (i)) - 1)) : 0x88)
#define EIGHT(m) \
    {PLACE(m, 0), PLACE(m, 1), PLACE(m, 2), PLACE(m, 3), PLACE(m, 4), PLACE(m, 5), PLACE(m, 6), PLACE(m, 7)}
#define MASKS4(m) EIGHT(m), EIGHT((m) + 1), EIGHT((m) + 2), EIGHT((m) + 3)
#define MASKS16(m) MASKS4(m), MASKS4((m) + 4), MASKS4((m) + 8), MASKS4((m) + 12)
#define MASKS64(m) MASKS16(m), MASKS16((m) + 16), MASKS16((m) + 32), MASKS16((m) + 48)
    static const uint8_t places[256][8] __attribute__((aligned(64))) = {
        MASKS64(0), MASKS64(64), MASKS64(128), MASKS64(192)};
#undef PLACE
#undef EIGHT
#undef MASKS4
#undef MASKS16
#undef MASKS64
    return places[mask];
}

/* The eight codes that begin `place` bits from p on, the first in the lowest byte. Reads eight bytes. */
INLINE uint64_t eight_codes(const uint8_t *p, const int place, const int bits)
{
    uint64_t word;
    memcpy(&word, p + place / 8, sizeof word);
    word >>= place % 8;
    if (bits == 4) {
        word = (word & 0xffff) | (word & 0xffff0000) << 16;
        word = (word | word << 8) & 0x00ff00ff00ff00ff;
        word = (word | word << 4) & 0x0f0f0f0f0f0f0f0f;
    } else if (bits == 2) {
        word = (word & 0xff) | (word & 0xff00) << 24;
        word = (word | word << 12) & 0x000f000f000f000f;
        word = (word | word << 6) & 0x0303030303030303;
    }
    return word;
}

/* Codes of one block to 64 bytes, row by row; where none is kept, `otherwise` and what its row has in `rows`, if any.
 * Returns where the next block's codes are. */
INLINE const uint8_t *spread_block(
    uint64_t mask, const uint8_t *codes, const int8_t *rows, const int otherwise, const int bits, uint8_t *to)
{
    const int most = (1 << bits) - 1, bytes = block_bytes(mask, bits);
    uint8_t run[72], kept[9]; /* and what stands where none is */
    memcpy(run, codes, (size_t)bytes);
    for (int i = 0, place = 0; i < 16; mask >>= 8) { /* two rows at a time */
        const uint8_t *from = places_of_kept(mask & 255);
        const uint64_t eight = eight_codes(run, place, bits);
        memcpy(kept, &eight, sizeof eight);
        place += bits * __builtin_popcount(mask & 255);
        for (int next = i + 2; i < next; i++, from += 4, to += 4) {
            kept[8] = (uint8_t)((otherwise + (rows ? rows[i] : 0)) & most);
            for (int k = 0; k < 4; k++)
                to[k] = kept[from[k] & 15];
        }
    }
    return codes + bytes;
}

/* As many blocks as codes fit a byte, each code in its field: a word of 16 rows. The bits of a code
 * that are set in `flip` are turned. No byte is read from `end` on. */
INLINE const uint8_t *spread_word(
    const int64_t *masks, const uint8_t *codes, const uint8_t *end, const int8_t *rows, const int otherwise,
    const int flip, const int bits, uint8_t *to)
{
    uint8_t block[64];
    codes = spread_block((uint64_t)masks[0], codes, rows, otherwise, bits, to);
    for (int field = 1; field < 8 / bits; field++) {
        codes = spread_block((uint64_t)masks[field], codes, rows, otherwise, bits, block);
        for (int i = 0; i < 64; i++)
            to[i] |= (uint8_t)(block[i] << bits * field);
    }
    for (int i = 0; i < 64; i++)
        to[i] ^= (uint8_t)(flip * (255 / ((1 << bits) - 1)));
    return codes;
}

/* One block of bytes, column by column. */
INLINE const uint8_t *spread_columns(
    const int64_t *masks, const uint8_t *codes, const uint8_t *end, const int8_t *rows, const int otherwise,
    const int flip, const int bits, uint8_t *to)
{
    uint8_t block[64];
    codes = spread_block((uint64_t)masks[0], codes, rows, otherwise, bits, block);
    for (int i = 0; i < 64; i++)
        to[i % 4 * 16 + i / 4] = (uint8_t)(block[i] ^ flip);
    return codes;
}

/* Words of those of sixteen rows that the mask names, to the places of their rows; zeros at others. The bits of a word
 * that are set in `flip` are turned. No word is read after the last that is stored. */
static inline void spread_words(uint32_t mask, const int32_t *p, const uint32_t flip, int32_t *to)
{
    for (int row = 0; row < 16; row++)
        to[row] = mask >> row & 1 ? (int32_t)((uint32_t)*p++ ^ flip) : 0;
}

static inline void spread_f32(uint32_t mask, const f32 *p, f32 *to)
{
    spread_words(mask, (const int32_t *)p, 0, (int32_t *)to);
}

static inline void spread_bf16(uint32_t mask, const bf16 *p, bf16 *to)
{
    for (int row = 0; row < 16; row++)
        to[row] = mask >> row & 1 ? *p++ : 0;
}

static inline void spread_f16(uint32_t mask, const f16 *p, f16 *to)
{
    spread_bf16(mask, p, to);
}

/* Bytes, of which some number is taken. */
static inline void spread_bytes(uint32_t mask, const uint8_t *p, const int less, int8_t *to)
{
    for (int row = 0; row < 16; row++)
        to[row] = mask >> row & 1 ? (int8_t)(*p++ - less) : 0;
}

/* What the masks from one on, and before another, keep. */
INLINE int kept_before(const int16_t *masks, int first, const int end)
{
    int kept = 0;
    for (; first % 4 == 0 && first + 4 <= end; first += 4) {
        uint64_t four;
        memcpy(&four, masks + first, sizeof four);
        kept += __builtin_popcountll(four);
    }
    for (; first < end; first++)
        kept += __builtin_popcount((uint16_t)masks[first]);
    return kept;
}

/* Rows of a tile that keep a group of columns, by the masks of its strips. */
INLINE int kept_rows(const int16_t *masks)
{
    return kept_before(masks, 0, STRIPS);
}

/* Nibble j of each lane, an unsigned number, less 8. */
static inline vfloat vf_nibble_less_8(vint word, const int j)
{
    static const float value[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return vf_look_up(value, vi_shift_right(word, 4 * j));
}

/* Sixteen numbers of so many bytes, of which n are at p; zeros for the others. */
static inline void first_of_sixteen(const void *p, const int n, const int bytes, void *to)
{
    memset(to, 0, (size_t)(16 * bytes));
    memcpy(to, p, (size_t)((n < 16 ? n : 16) * bytes));
}

/* The same words or numbers in lanes. */
static inline vint vi_load_first(const int32_t *p, const int n)
{
    int32_t all[16];
    first_of_sixteen(p, n, sizeof *p, all);
    return vi_load(all);
}

static inline vfloat vf_load_first_f32(const f32 *p, const int n)
{
    f32 all[16];
    first_of_sixteen(p, n, sizeof *p, all);
    return vf_load_f32(all);
}

static inline vfloat vf_load_first_bf16(const bf16 *p, const int n)
{
    bf16 all[16];
    first_of_sixteen(p, n, sizeof *p, all);
    return vf_load_bf16(all);
}

static inline vfloat vf_load_first_f16(const f16 *p, const int n)
{
    f16 all[16];
    first_of_sixteen(p, n, sizeof *p, all);
    return vf_load_f16(all);
}

/* Bytes, of which some number is taken. */
static inline void bytes_less(const uint8_t *p, const int n, const int less, int8_t *to)
{
    uint8_t all[16];
    first_of_sixteen(p, n, sizeof *p, all);
    for (int row = 0; row < 16; row++)
        to[row] = (int8_t)(all[row] - less);
}

/* To acc [STRIPS][nb][LANES] the sums of rows that keep a group, [groups][nb][room], at the lanes of those rows. */
INLINE void add_kept_rows(
    const float *sums, const int room, const int16_t *masks, const int groups, float *acc, const int nb)
{
    for (int group = 0; group < groups; group++, masks += STRIPS, sums += room * nb) {
        const float *from = sums;
        for (int strip = 0; strip < STRIPS; strip++) {
            const uint32_t mask = (uint16_t)masks[strip];
            #pragma GCC unroll 8
            for (int n = 0; n < nb; n++) {
                float row[16], *to = acc + (strip * nb + n) * LANES;
                spread_f32(mask, from + n * room, row);
                vf_store_f32(to, vf_add(vf_load_f32(to), vf_load_f32(row)));
            }
            from += __builtin_popcount(mask);
        }
    }
}

/* x in digits as floats, in their order. */
INLINE void digit_floats(const int8_t *x, const int nb, float *to)
{
    for (int n = 0; n < nb; n++)
        for (int k = 0; k < BK; k++) {
            const int8_t *p = x + (k / 16 * nb + n) * 48 + k % 16;
            to[(k / 4 * nb + n) * 4 + k % 4] = (float)(p[0] + 256 * (p[16] + 256 * p[32])) * digit_units(x, nb)[n];
        }
}

/* Those of sixteen rows that count more than `less`. */
static inline uint32_t rows_above(const uint8_t *counts, int less)
{
    uint32_t rows = 0;
    for (int row = 0; row < 16; row++)
        rows |= (uint32_t)(counts[row] > less) << row;
    return rows;
}

/* Add one weight of each of these rows times its own column of x. */
INLINE void multiply_add_apart(
    vfloat weights, uint32_t rows, const uint8_t *columns, const float *x, float *acc, const int nb)
{
    float weight[16];
    vf_store_f32(weight, weights);
    for (; rows; rows &= rows - 1, columns++) {
        const int row = __builtin_ctz(rows);
        for (int n = 0; n < nb; n++)
            acc[16 * n + row] += weight[row] * x[(*columns / 4 * nb + n) * 4 + *columns % 4];
    }
}

/* Byte j of each lane as an 8-bit float of kind e4m3: 1/256 of what it means. */
static inline vfloat vf_e4m3(vint codes, const int j)
{
    vint sign = vi_and(vi_shift(codes, 8 * j - 8), 0x8000), size = vi_and(vi_shift(codes, 8 * j - 7), 0x3f80);
    return vf_of_halves(vi_select(sign, size, 0x8000));
}

/* The same of kind e5m2, as it is. */
static inline vfloat vf_e5m2(vint codes, const int j)
{
    return vf_of_halves(vi_and(vi_shift(codes, 8 * j - 8), 0xff00));
}
