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

/* Codes of one block to 64 bytes, row by row; where none is kept, `otherwise` and what its row has in `rows`, if any.
 * Returns where the next block's codes are. */
static inline const uint8_t *spread_block(
    uint64_t mask, const uint8_t *codes, const int8_t *rows, const int otherwise, const int bits, uint8_t *to)
{
    const int most = (1 << bits) - 1;
    int place = 0;
    for (int i = 0; i < 64; i++, mask >>= 1) {
        const int none = (otherwise + (rows ? rows[i / 4] : 0)) & most;
        to[i] = mask & 1 ? (uint8_t)(codes[place / 8] >> place % 8 & most) : (uint8_t)none;
        place += bits * (int)(mask & 1);
    }
    return codes + (place + 7) / 8;
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
