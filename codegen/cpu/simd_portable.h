/* Sixteen lanes as four vectors of the compiler (GCC and Clang): NEON, SSE2 or what the machine has. */

/* Four floats: a vector of the compiler. */
typedef float float4 __attribute__((vector_size(16)));

/* Four 32-bit integers. */
typedef int32_t word4 __attribute__((vector_size(16)));

/* Sixteen floats. */
typedef struct { float4 part[4]; } vfloat;

/* Sixteen 32-bit integers. */
typedef struct { word4 part[4]; } vint;

static inline vfloat vf_set1(float value)
{
    float4 four = {value, value, value, value};
    return (vfloat){{four, four, four, four}};
}

static inline vfloat vf_zero(void)
{
    return vf_set1(0);
}

static inline vfloat vf_load_f32(const float *p)
{
    vfloat v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Halves, one to a word, as floats. */
static inline float4 four_halves(word4 half)
{
    word4 bits = half & 0x7fff, small = bits < 0x400, endless = bits >= 0x7c00;
    word4 normal = (bits << 13) + ((112 + (endless & 112)) << 23); /* the exponent is 112 less in a half */
    float4 steps = __builtin_convertvector(bits, float4) * 0x1p-24f; /* of those below the normal ones */
    return (float4)((small & (word4)steps) | (~small & normal) | ((half & 0x8000) << 16));
}

static inline vfloat vf_load_f16(const f16 *p)
{
    vfloat v;
    for (int i = 0; i < 4; i++, p += 4)
        v.part[i] = four_halves((word4){p[0], p[1], p[2], p[3]});
    return v;
}

static inline vfloat vf_load_bf16(const bf16 *p)
{
    float lane[16];
    for (int i = 0; i < 16; i++)
        lane[i] = bf16_to_float(p[i]);
    return vf_load_f32(lane);
}

static inline vfloat vf_load_i8(const int8_t *p)
{
    vfloat v;
    for (int i = 0; i < 4; i++)
        v.part[i] = (float4){p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]};
    return v;
}

/* Halves in the low 16 bits of lanes, nothing above. */
static inline vfloat vf_of_halves(vint v)
{
    return (vfloat){{four_halves(v.part[0]), four_halves(v.part[1]), four_halves(v.part[2]), four_halves(v.part[3])}};
}

/* Two vectors that stand one after the other. */
static inline void vf_pair_f32(const float *p, vfloat *first, vfloat *second)
{
    *first = vf_load_f32(p);
    *second = vf_load_f32(p + 16);
}

/* Two vectors that stand one after the other. */
static inline void vf_pair_f16(const f16 *p, vfloat *first, vfloat *second)
{
    *first = vf_load_f16(p);
    *second = vf_load_f16(p + 16);
}

/* Two interleaved vectors: bf16 values 2i and 2i + 1 belong to lane i. */
static inline void vf_pair_bf16(const bf16 *p, vfloat *first, vfloat *second)
{
    for (int i = 0; i < 4; i++, p += 8) {
        first->part[i] = (float4){bf16_to_float(p[0]), bf16_to_float(p[2]), bf16_to_float(p[4]), bf16_to_float(p[6])};
        second->part[i] = (float4){bf16_to_float(p[1]), bf16_to_float(p[3]), bf16_to_float(p[5]), bf16_to_float(p[7])};
    }
}

static inline void vf_store_f32(float *p, vfloat v)
{
    memcpy(p, &v, sizeof v);
}

static inline void vf_store_f16(f16 *p, vfloat v)
{
    for (int i = 0; i < 16; i++)
        p[i] = float_to_f16(v.part[i / 4][i % 4]);
}

static inline void vf_store_bf16(bf16 *p, vfloat v)
{
    for (int i = 0; i < 16; i++)
        p[i] = float_to_bf16(v.part[i / 4][i % 4]);
}

static inline vfloat vf_add(vfloat a, vfloat b)
{
    for (int i = 0; i < 4; i++)
        a.part[i] += b.part[i];
    return a;
}

static inline vfloat vf_sub(vfloat a, vfloat b)
{
    for (int i = 0; i < 4; i++)
        a.part[i] -= b.part[i];
    return a;
}

static inline vfloat vf_mul(vfloat a, vfloat b)
{
    for (int i = 0; i < 4; i++)
        a.part[i] *= b.part[i];
    return a;
}

/* a * b + c */
static inline vfloat vf_fma(vfloat a, vfloat b, vfloat c)
{
    for (int i = 0; i < 4; i++)
        c.part[i] += a.part[i] * b.part[i];
    return c;
}

/* Sum of the lanes, in one fixed order. */
static inline float vf_sum(vfloat v)
{
    float4 four = (v.part[0] + v.part[1]) + (v.part[2] + v.part[3]);
    return (four[0] + four[1]) + (four[2] + four[3]);
}

/* Four floats, four times over. */
static inline vfloat vf_broadcast4(const float *p)
{
    float4 four = {p[0], p[1], p[2], p[3]};
    return (vfloat){{four, four, four, four}};
}

/* Each lane takes one of four broadcast floats, by the low two bits of its index. */
static inline vfloat vf_pick4(vfloat four, vint index)
{
    float4 from = four.part[0];
    vfloat v;
    for (int i = 0; i < 4; i++) {
        word4 at = index.part[i] & 3;
        v.part[i] = (float4){from[at[0]], from[at[1]], from[at[2]], from[at[3]]};
    }
    return v;
}

/* For each lane the float that the low four bits of `place` count from x[group] on: one of `size`, 4, 8 or 16, which do
 * not reach past the sixteen that they begin among. */
static inline vfloat vf_pick_of(const float *x, vint place, const int group, const int size)
{
    vfloat v;
    x += group;
    for (int i = 0; i < 4; i++) {
        word4 at = place.part[i] & (size - 1);
        v.part[i] = (float4){x[at[0]], x[at[1]], x[at[2]], x[at[3]]};
    }
    return v;
}

/* Four columns from the two that are kept of them: each lane has its own places, the first in the low two bits of
 * `place`, the second in the next two. */
static inline void vf_spread4(float *to, const vfloat *kept, vint place)
{
    memset(to, 0, 64 * sizeof *to);
    for (int lane = 0; lane < 16; lane++) {
        const int at = place.part[lane / 4][lane % 4];
        to[16 * (at & 3) + lane] = kept[0].part[lane / 4][lane % 4];
        to[16 * (at >> 2 & 3) + lane] = kept[1].part[lane / 4][lane % 4];
    }
}

static inline vint vi_load(const int32_t *p)
{
    vint v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Every lane's bits moved down by the same number of places; what comes in at the top is not defined. */
static inline vint vi_shift_right(vint word, const int places)
{
    for (int i = 0; i < 4; i++)
        word.part[i] = word.part[i] >> places;
    return word;
}

/* Byte j of each lane, a two's complement number. */
static inline vfloat vf_byte(vint word, const int j)
{
    vfloat v;
    for (int i = 0; i < 4; i++)
        v.part[i] = __builtin_convertvector(word.part[i] << (24 - 8 * j) >> 24, float4);
    return v;
}

/* Nibble j of each lane, a two's complement number of 4 bits. */
static inline vfloat vf_nibble(vint word, const int j)
{
    vfloat v;
    for (int i = 0; i < 4; i++)
        v.part[i] = __builtin_convertvector(word.part[i] << (28 - 4 * j) >> 28, float4);
    return v;
}

/* Every lane's bits moved down, or up where places are negative. */
static inline vint vi_shift(vint word, const int places)
{
    for (int i = 0; i < 4; i++)
        word.part[i] = places < 0 ? word.part[i] << -places : word.part[i] >> places;
    return word;
}

static inline vint vi_and(vint word, const uint32_t mask)
{
    for (int i = 0; i < 4; i++)
        word.part[i] &= (int32_t)mask;
    return word;
}

/* The bits of a that are in the mask, and the other bits of b. */
static inline vint vi_select(vint a, vint b, const uint32_t mask)
{
    for (int i = 0; i < 4; i++)
        a.part[i] = (a.part[i] & (int32_t)mask) | (b.part[i] & (int32_t)~mask);
    return a;
}

typedef uint8_t byte16 __attribute__((vector_size(16)));

/* Bytes less bytes. */
static inline vint vi_sub_bytes(vint a, vint b)
{
    for (int i = 0; i < 4; i++)
        a.part[i] = (word4)((byte16)a.part[i] - (byte16)b.part[i]);
    return a;
}

/* The same byte everywhere. */
static inline vint vi_set_bytes(const int byte)
{
    vint v;
    memset(&v, byte, sizeof v);
    return v;
}

/* Zero points of 16 rows (two's complement, less 8) as four unsigned bytes a lane. */
static inline vint vi_zero_bytes(const int8_t *p)
{
    vint v;
    for (int i = 0; i < 16; i++)
        v.part[i / 4][i % 4] = (p[i] + 8) * 0x01010101;
    return v;
}

/* Twice the value of 64 4-bit floats in low nibbles, 12 added to each: whole numbers from 0 to 24. */
static inline vint vi_twice_e2m1(vint word)
{
    static const uint8_t value[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    uint8_t codes[64];
    memcpy(codes, &word, sizeof codes);
    for (int i = 0; i < 64; i++)
        codes[i] = value[codes[i] & 15];
    memcpy(&word, codes, sizeof codes);
    return word;
}

/* One of sixteen floats for each lane, by its low four bits. */
static inline vfloat vf_look_up(const float *table, vint index)
{
    vfloat v;
    for (int i = 0; i < 16; i++)
        v.part[i / 4][i % 4] = table[index.part[i / 4][i % 4] & 15];
    return v;
}

/* Exact, and never a subnormal on the way, so that it holds where the CPU flushes those to zero. */
static inline float f16_to_float(f16 value)
{
    uint32_t size = value & 0x7fff;
    union { float value; uint32_t word; } both = {(float)(int32_t)size * 0x1p-24f}; /* right below 2**-14 */
    if (size >= 0x7c00) /* infinity, NaN */
        both.word = size << 13 | 0x7f800000;
    else if (size >= 0x400)
        both.word = (size << 13) + 0x38000000;
    both.word |= (uint32_t)(value & 0x8000) << 16;
    return both.value;
}

/* Round to nearest even; a NaN stays a (quiet) NaN. */
static inline f16 float_to_f16(float value)
{
    union { float value; uint32_t word; } both = {value};
    uint32_t sign = both.word >> 16 & 0x8000, size = both.word & 0x7fffffff;
    if (size > 0x7f800000) /* NaN */
        return (f16)(sign | 0x7e00 | (size >> 13 & 0x3ff));
    if (size >= 0x477ff000) /* rounds past the largest half: infinity */
        return (f16)(sign | 0x7c00);
    both.word = size;
    if (size < 0x38800000) { /* subnormal: adding 0.5 leaves units of 2**-24 in the low bits, rounded */
        both.value += 0.5f;
        return (f16)(sign | (both.word - 0x3f000000));
    }
    return (f16)(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

/* Two columns of sixteen rows of which only some are stored, from p; zeros in the other lanes. Bits 0-15 of the mask
 * say which rows the first column keeps, bits 16-31 the second, whose values follow. */
static inline void vf_expand_f32(const float *p, const float *end, const int32_t *of, vfloat *first, vfloat *second)
{
    uint32_t mask = (uint32_t)*of;
    float lane[32] = {0};
    for (; mask; mask &= mask - 1)
        lane[__builtin_ctz(mask)] = *p++;
    *first = vf_load_f32(lane);
    *second = vf_load_f32(lane + 16);
}

/* The same with halves. */
static inline void vf_expand_f16(const f16 *p, const f16 *end, const int32_t *of, vfloat *first, vfloat *second)
{
    uint32_t mask = (uint32_t)*of;
    float lane[32] = {0};
    for (; mask; mask &= mask - 1)
        lane[__builtin_ctz(mask)] = f16_to_float(*p++);
    *first = vf_load_f32(lane);
    *second = vf_load_f32(lane + 16);
}

/* The same with bf16, where bit 2r + c of the mask is row r of column c, and values stand in that order. */
static inline void vf_expand_bf16(const bf16 *p, const bf16 *end, const int32_t *of, vfloat *first, vfloat *second)
{
    uint32_t mask = (uint32_t)*of;
    bf16 lane[32] = {0};
    for (; mask; mask &= mask - 1)
        lane[__builtin_ctz(mask)] = *p++;
    vf_pair_bf16(lane, first, second);
}

/* Sixteen bytes as 8-bit floats of kind e4m3: 1/256 of what they mean. */
static inline vfloat sixteen_e4m3(const uint8_t *p)
{
    vfloat v;
    for (int i = 0; i < 4; i++, p += 4) {
        word4 byte = {p[0], p[1], p[2], p[3]};
        v.part[i] = four_halves((byte & 128) << 8 | (byte & 127) << 7);
    }
    return v;
}

/* Sixteen scales of kind e4m3. */
static inline vfloat vf_load_e4m3(const uint8_t *p)
{
    return vf_mul(sixteen_e4m3(p), vf_set1(256));
}

/* Sixteen bytes and sixteen more as 8-bit floats of kind e4m3: 1/256 of what they mean. */
static inline void vf_pair_e4m3(const uint8_t *p, vfloat *first, vfloat *second)
{
    *first = sixteen_e4m3(p);
    *second = sixteen_e4m3(p + 16);
}

/* The same of kind e5m2, as they are. */
static inline void vf_pair_e5m2(const uint8_t *p, vfloat *first, vfloat *second)
{
    for (int i = 0; i < 4; i++, p += 4) {
        first->part[i] = four_halves((word4){p[0], p[1], p[2], p[3]} << 8);
        second->part[i] = four_halves((word4){p[16], p[17], p[18], p[19]} << 8);
    }
}

/* Sixteen scales of kind e8m0: powers of two. */
static inline vfloat vf_load_e8m0(const uint8_t *p)
{
    union { uint32_t word[16]; float value[16]; } lane;
    for (int i = 0; i < 16; i++)
        lane.word[i] = p[i] ? (uint32_t)p[i] << 23 : 1u << 22; /* the least is subnormal */
    return vf_load_f32(lane.value);
}
