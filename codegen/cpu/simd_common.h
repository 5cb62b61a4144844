typedef float f32;

typedef uint16_t f16;

typedef uint16_t bf16;

static inline float f32_to_float(float value)
{
    return value;
}

static inline float bf16_to_float(bf16 value)
{
    union { uint32_t word; float value; } both = {(uint32_t)value << 16};
    return both.value;
}

/* 8-bit floats: fp16 has them as they are, or shifted by a power of two. */
static inline float e4m3_to_float(uint8_t code)
{
    return f16_to_float((f16)((code & 128) << 8 | (code & 127) << 7)) * 256;
}

static inline float e5m2_to_float(uint8_t code)
{
    return f16_to_float((f16)(code << 8));
}

static inline float e8m0_to_float(uint8_t code)
{
    union { uint32_t word; float value; } both = {code ? (uint32_t)code << 23 : 1u << 22};
    return both.value;
}

static inline float float_to_f32(float value)
{
    return value;
}

/* Round to nearest even; a NaN stays a (quiet) NaN. */
static inline bf16 float_to_bf16(float value)
{
    union { float value; uint32_t word; } both = {value};
    uint32_t rounded = both.word + 0x7fff + (both.word >> 16 & 1);
    return (bf16)((value == value ? rounded : both.word | 0x400000) >> 16);
}

/* How many independent sums each of nb outputs has: enough to hide the latency of an fma. */
INLINE int chains(const int nb)
{
    return nb < 4 ? 4 / nb : 1;
}

INLINE void clear_sums(vfloat *sum, const int nb)
{
    #pragma GCC unroll 8
    for (int i = 0; i < nb * chains(nb); i++)
        sum[i] = vf_zero();
}

/* The chains of output n, added up in a fixed order. */
INLINE vfloat total(const vfloat *sum, const int n, const int nb)
{
    vfloat all = sum[n];
    #pragma GCC unroll 4
    for (int chain = 1; chain < chains(nb); chain++)
        all = vf_add(all, sum[chain * nb + n]);
    return all;
}

/* acc[n] += w * x[n] over nb outputs: the chain of column `column`. */
INLINE void multiply_add(vfloat w, const float *x, vfloat *sum, const int column, const int nb)
{
    vfloat *own = sum + column % chains(nb) * nb;
    #pragma GCC unroll 8
    for (int n = 0; n < nb; n++)
        own[n] = vf_fma(w, vf_set1(x[4 * n]), own[n]);
}

/* A tile's columns of x as `multiply_add_picked` takes them: as they are. */
INLINE const float *columns_to_pick(const float *x, float *room, const int nb)
{
    return x;
}

/* The same where every lane has its own column: one of the four from k on, by the low bits of `pick`. */
INLINE void multiply_add_picked(
    vfloat w, vint pick, const float *x, const int k, vfloat *sum, const int column, const int nb)
{
    vfloat *own = sum + column % chains(nb) * nb;
    #pragma GCC unroll 8
    for (int n = 0; n < nb; n++)
        own[n] = vf_fma(w, vf_pick4(vf_broadcast4(x + k * nb + 4 * n), pick), own[n]);
}

/* The same where it is one of `size` at x [nb][BK], from column `group` on. */
INLINE void multiply_add_of_columns(
    vfloat w, vint place, const float *x, const int group, const int size, vfloat *sum, const int column, const int nb)
{
    vfloat *own = sum + column % chains(nb) * nb;
    #pragma GCC unroll 8
    for (int n = 0; n < nb; n++)
        own[n] = vf_fma(w, vf_pick_of(x + n * BK, place, group, size), own[n]);
}

/* A tile's columns of x, an entry after the other. */
INLINE const float *entries_one_by_one(const float *x, float *to, const int nb)
{
    for (int k = 0; nb > 1 && k < BK; k += 4, x += 4 * nb)
        #pragma GCC unroll 8
        for (int n = 0; n < nb; n++)
            memcpy(to + n * BK + k, x + 4 * n, 4 * sizeof *x);
    return nb > 1 ? to : x;
}

/* Where the kept column i of group g stands in a word of positions of eight groups. */
static inline int place_shift(const int g, const int i)
{
    return g % 4 * 8 + g / 4 * 4 + 2 * i;
}

/* Add the sums of one strip to acc [nb][LANES]. */
INLINE void add_sums(float *acc, const vfloat *sum, const int nb)
{
    #pragma GCC unroll 8
    for (int n = 0; n < nb; n++)
        vf_store_f32(acc + 16 * n, vf_add(vf_load_f32(acc + 16 * n), total(sum, n, nb)));
}

/* Add scale times the sums of one strip to acc [nb][LANES]. */
INLINE void add_scaled_sums(float *acc, vfloat scale, const vfloat *sum, const int nb)
{
    #pragma GCC unroll 8
    for (int n = 0; n < nb; n++)
        vf_store_f32(acc + 16 * n, vf_fma(scale, total(sum, n, nb), vf_load_f32(acc + 16 * n)));
}

/* Ask for bytes that are read soon; a hint, so that running past the end does no harm. */
static inline void fetch(const void *p, int bytes)
{
    for (int i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char *)p + i, 0, 2);
}

/* Ask for what a stream that reads `bytes` at p now reads later: 4 KB ahead into the second-level cache, which
 * hides memory, and half a KB ahead into the first. Asked for as it is read, it never keeps the arithmetic waiting. */
INLINE void ahead(const void *p, const int bytes)
{
    for (int i = 0; i < bytes; i += 64) {
        __builtin_prefetch((const char *)p + 4096 + i, 0, 2);
        __builtin_prefetch((const char *)p + 512 + i, 0, 3);
    }
}

/* The same for strips that are read side by side, of which no hardware knows what comes: at any batch. */
INLINE void ahead_beside(const void *p, const int bytes)
{
    ahead(p, bytes);
}

/* 4-bit codes, the first of a byte in its low bits, to what a table has for them. */
INLINE void look_up_nibbles_f32(const uint8_t *codes, const f32 *table, f32 *to, const int count)
{
    for (int k = 0; k < count; k += 2, codes++) {
        to[k] = table[*codes & 15];
        to[k + 1] = table[*codes >> 4];
    }
}

INLINE void look_up_nibbles_bf16(const uint8_t *codes, const bf16 *table, bf16 *to, const int count)
{
    for (int k = 0; k < count; k += 2, codes++) {
        to[k] = table[*codes & 15];
        to[k + 1] = table[*codes >> 4];
    }
}

INLINE void look_up_nibbles_f16(const uint8_t *codes, const f16 *table, f16 *to, const int count)
{
    look_up_nibbles_bf16(codes, table, to, count);
}

/* Two columns of sixteen rows of which only some are stored, from p to before end: [16][2], zeros between. Bit 2r + c of
 * the mask is row r of column c. */
static inline void pair_of_kept(const bf16 *p, const bf16 *end, uint32_t mask, bf16 *to)
{
    memset(to, 0, 32 * sizeof *to);
    for (; mask; mask &= mask - 1)
        to[__builtin_ctz(mask)] = *p++;
}

/* Sixteen columns of sixteen words to sixteen rows, `stride` bytes apart. */
static inline void columns_to_rows(const uint32_t *words, void *to, const int64_t stride)
{
    for (int row = 0; row < 16; row++) {
        uint32_t each[16];
        for (int column = 0; column < 16; column++)
            each[column] = words[16 * column + row];
        memcpy((char *)to + row * stride, each, sizeof each);
    }
}

/* Sixteen rows in lane order, to `rows` of them in a matrix. */
static inline void strip_rows_f32(const float *lanes, float *out, const int64_t stride, const int rows, const int columns)
{
    int k = 0;
    for (; rows == 16 && k + 16 <= columns; k += 16)
        columns_to_rows((const uint32_t *)(const void *)(lanes + k * 16), out + k, stride * 4);
    for (int row = 0; row < rows; row++)
        for (int i = k; i < columns; i++)
            out[row * stride + i] = lanes[i * 16 + row];
}

/* The same of bf16, two columns of a row side by side. */
static inline void strip_rows_bf16(const bf16 *lanes, bf16 *out, const int64_t stride, const int rows, const int columns)
{
    int k = 0;
    for (; rows == 16 && k + 32 <= columns; k += 32)
        columns_to_rows((const uint32_t *)(const void *)(lanes + k * 16), out + k, stride * 2);
    for (int row = 0; row < rows; row++)
        for (int i = k; i < columns; i++)
            out[row * stride + i] = lanes[(i / 2 * 16 + row) * 2 + i % 2];
}

/* The same of halves. */
static inline void strip_rows_f16(const f16 *lanes, f16 *out, const int64_t stride, const int rows, const int columns)
{
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < columns; i++)
            out[row * stride + i] = lanes[i * 16 + row];
}
