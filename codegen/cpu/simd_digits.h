/* Products of 8-bit codes with x in three 8-bit digits: what does not depend on the instruction set, or is the same
 * wherever there are no products of four bytes (`simd_vnni.h` has its own). */

/* The digits of sixteen whole numbers, lowest first, and the sum of each sixteen. */
static inline void store_digits(const int32_t *whole, int8_t *to, int32_t *sums)
{
    int32_t left[16];
    memcpy(left, whole, sizeof left);
    for (int digit = 0; digit < 3; digit++, to += 16) {
        int32_t sum = 0;
        for (int i = 0; i < 16; i++) {
            to[i] = (int8_t)left[i];
            sum += to[i];
            left[i] = (left[i] + 128) >> 8;
        }
        sums[digit] = sum;
    }
}

/* Batch entries whose sums of digits the registers hold. */
INLINE int few_digits(const int nb)
{
    return nb < 4 ? nb : 4;
}

/* Sets of sums of digits: more than one where products of one set would wait for each other. */
INLINE int digit_sets(const int nb)
{
    (void)nb;
    return 1;
}

/* Strips that share what is read of x where lanes pick: as many as registers hold. */
INLINE int digit_strips(const int nb)
{
    (void)nb;
    return 1;
}

/* Two's complement nibbles as signed bytes, times a power of two: the low or the high ones of all bytes. */
static inline vint vi_signed_codes(vint word, const int high)
{
    return vi_sub_bytes(high ? vi_high_nibbles(word) : vi_low_nibbles(word), vi_set_bytes(8));
}

/* Which power. */
static inline int signed_codes_power(void)
{
    return 0;
}

INLINE void clear_digits(vint *sum, const int nb)
{
    #pragma GCC unroll 12
    for (int i = 0; i < 3 * nb; i++)
        sum[i] = vi_set1(0);
}

/* The set for products of an even or an odd turn. */
INLINE vint *digit_set(vint *sum, const int turn, const int nb)
{
    return sum + turn % digit_sets(nb) * (3 * nb);
}

/* Sums of digits begin with `below` [nb][3], `times` that. */
INLINE void start_digit_sets(vint *sum, const int32_t *below, vint times, const int nb)
{
    #pragma GCC unroll 12
    for (int i = 0; i < 3 * nb; i++)
        sum[i] = vi_mul(vi_set1(below[i]), times);
    for (int set = 1; set < digit_sets(nb); set++)
        clear_digits(digit_set(sum, set, nb), nb);
}

/* The first set becomes the sum of all. */
INLINE void join_digit_sets(vint *sum, const int nb)
{
    #pragma GCC unroll 3
    for (int i = 0; i < 3 * (digit_sets(nb) - 1); i++)
        sum[i] = vi_add(sum[i], sum[3 * nb + i]);
}

INLINE void clear_picked_digits(vint *sum, vint *of_codes, const int strips, const int nb)
{
    clear_digits(sum, strips * nb);
    #pragma GCC unroll 2
    for (int s = 0; s < strips; s++)
        of_codes[s] = vi_set1(0);
}

/* sum[n][digit] += sixteen unsigned codes of a lane times the sixteen digits at x, over nb entries. */
INLINE void multiply_add_digits(const vint *codes, const int8_t *x, vint *sum, const int nb)
{
    #pragma GCC unroll 4
    for (int n = 0; n < nb; n++)
        #pragma GCC unroll 3
        for (int digit = 0; digit < 3; digit++)
            sum[3 * n + digit] = vi_dot_sixteen(sum[3 * n + digit], codes, x + 48 * n + 16 * digit);
}

/* The same where every lane has its own columns of the 16 of `wide`, one or two `quads` of four of each strip, and codes
 * are signed: less 128 times the sum of the codes, as digits have to be unsigned here. Strips have sums behind each other. */
INLINE void multiply_add_picked_digits(
    const vint *codes, const vint *places, const uint8_t *wide, vint *sum, const int quads, const int strips,
    const int nb)
{
    #pragma GCC unroll 4
    for (int n = 0; n < nb; n++)
        #pragma GCC unroll 3
        for (int digit = 0; digit < 3; digit++)
            #pragma GCC unroll 2
            for (int s = 0; s < strips; s++) {
                vint *own = sum + 3 * (s * nb + n) + digit;
                *own = vi_dot_picked(*own, codes + quads * s, places + quads * s, wide + 192 * n + 64 * digit, quads);
            }
}

/* Where a panel of x in digits keeps the sums of each 16 columns. */
static inline const int32_t *digit_sums(const int8_t *x, const int nb)
{
    return (const int32_t *)(x + 3 * BK * nb);
}

/* Where it keeps the unit of each entry. */
static inline const float *digit_units(const int8_t *x, const int nb)
{
    return (const float *)(digit_sums(x, nb) + 3 * (BK / 16) * nb);
}

/* `times` the sums of the digits of `columns` columns: total[n][digit]. `sums` is where x has those of 16 columns. */
INLINE void total_digits(const int32_t *sums, const int columns, const int times, int32_t *total, const int nb)
{
    for (int i = 0; i < 3 * nb; i++) {
        int32_t all = 0;
        for (int k = 0; k < columns / 16; k++)
            all += sums[3 * nb * k + i];
        total[i] = times * all;
    }
}

/* acc += scale * (unit * a number of three digits): unit and scale together may be no normal number. */
INLINE void add_joined_digits(float *acc, const vfloat *digit, float unit, vfloat scale)
{
    vfloat all = vf_fma(vf_fma(digit[2], vf_set1(256), digit[1]), vf_set1(256), digit[0]);
    vf_store_f32(acc, vf_fma(vf_mul(all, vf_set1(unit)), scale, vf_load_f32(acc)));
}

/* unit * the digits of `sum`. Two digits are joined as whole numbers where 257 times a sum fits 32 bits: additions have
 * ports that products leave free. */
INLINE vfloat joined_digits(const vint *sum, const float unit, const int fits)
{
    vfloat high = vf_whole(sum[2]), all;
    if (fits)
        all = vf_whole(vi_add(sum[0], vi_times_power(sum[1], 8)));
    else
        all = vf_fma(vf_whole(sum[1]), vf_set1(256), vf_whole(sum[0]));
    return vf_mul(vf_fma(high, vf_set1(65536), all), vf_set1(unit));
}

/* acc[n] += scale * (unit[n] * digits of sum[n]), over nb entries of acc [nb][LANES]. */
INLINE void add_digits(float *acc, const vint *sum, vfloat scale, const float *unit, const int fits, const int nb)
{
    #pragma GCC unroll 4
    for (int n = 0; n < nb; n++, acc += LANES, sum += 3)
        vf_store_f32(acc, vf_fma(joined_digits(sum, unit[n], fits), scale, vf_load_f32(acc)));
}

/* The same after `multiply_add_picked_digits`: `of_codes` are the sums of the codes, which were 1 << up times too large. */
INLINE void add_picked_digits(
    float *acc, const vint *sum, vint of_codes, const int up, vfloat scale, const float *unit, const int nb)
{
    const vint bias = vi_times_power(of_codes, 7);
    #pragma GCC unroll 4
    for (int n = 0; n < nb; n++) {
        vfloat digit[3];
        #pragma GCC unroll 3
        for (int i = 0; i < 3; i++)
            digit[i] = vf_whole(vi_over_power(vi_sub(sum[3 * n + i], bias), up));
        add_joined_digits(acc + n * LANES, digit, unit[n], scale);
    }
}
