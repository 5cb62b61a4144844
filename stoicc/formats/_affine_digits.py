"""C of the affine formats that multiplies x as digits: exact sums of whole numbers, for a batch of few.

`$groups` groups of `$size` columns to a tile, whose sums are scaled once; `_affine_c.py` fills in the rest.
"""

from string import Template

DIGITS = Template("""\
INLINE void {name}(
    const int32_t *codes,$positions const $T *scales,$zeros
    const int8_t *x, float *acc, const int nb)
{
    const int few = few_digits(nb); /* entries whose sums the registers hold: codes are read once for each few */
    int32_t below[$groups * 24]; /* what zero points take from the sums of a group */
    for (int group = 0; group < $groups; group++)
        total_digits(digit_sums(x, nb) + group * ($size / 16 * 3) * nb, $size, -$half, below + 3 * nb * group, nb);
    for (int strip = 0; strip < STRIPS; strip++, acc += LANES * nb) {
        for (int group = 0; group < $groups; group++) {
            const int32_t *codes_from = codes$keep;
            for (int n = 0; n < nb; n += few) {
                const int8_t *xg = x + (group * $size * nb + 16 * n) * 3;
                vint sum[12];
                start_digit_sets(sum, below + 3 * (nb * group + n), $zero, few);
                codes = codes_from$again;
$body
                join_digit_sets(sum, few);
                add_digits(acc + n * LANES, sum, vf_load_$T(scales), digit_units(x, nb) + n, $fits, few);
            }
            scales += LANES;$next_zeros
        }
    }
}
""")

INT8_DIGITS = """\
                #pragma GCC unroll 4
                for (int k = 0; k < $size; k += 16, xg += 48 * nb, codes += 4 * LANES) {
                    vint four[4];
                    ahead(codes, 4 * LANES * sizeof *codes);
                    #pragma GCC unroll 4
                    for (int i = 0; i < 4; i++)
                        four[i] = vi_unsigned_bytes(vi_load(codes + i * LANES));
                    multiply_add_digits(four, xg, sum, few);
                }"""

INT4_DIGITS = """\
                #pragma GCC unroll 4
                for (int k = 0; k < $size; k += 16, xg += 48 * nb, codes += 2 * LANES) {
                    vint first = vi_load(codes), second = vi_load(codes + LANES);
                    ahead(codes, 2 * LANES * sizeof *codes);
                    const vint four[4] = {
                        vi_low_nibbles(first), vi_high_nibbles(first), vi_low_nibbles(second), vi_high_nibbles(second)};
                    multiply_add_digits(four, xg, sum, few);
                }"""

INT4_NV24_DIGITS = Template("""\
/* Sums of a group of columns times `few` entries of x in digits, of two strips where they share what is read of x. */
INLINE void {name}_group(
    const int32_t *codes, const int32_t *positions,$zeros
    const uint8_t *x, vint *sum, vint *of_codes, const int beside, const int few, const int nb)
{
    enum { CODES = $groups * $code_words * LANES, POSITIONS = $groups * $position_words * LANES }; /* of a strip */
    clear_picked_digits(sum, of_codes, beside, few);
    #pragma GCC unroll 2
    for (int k = 0; k < $size; k += 32, positions += LANES) {
        #pragma GCC unroll 2
        for (int half = 0; half < $halves; half++, codes += LANES, x += 192 * nb) {
            vint kept[4], places[4]; /* the first and the second of four groups of four columns, of each strip */
            #pragma GCC unroll 2
            for (int s = 0; s < beside; s++) {
                vint word = vi_load(codes + s * CODES), place = vi_load(positions + s * POSITIONS);
$zero                ahead_beside(codes + s * CODES, LANES * sizeof *codes);
                kept[2 * s] = $first;
                kept[2 * s + 1] = $second;
                of_codes[s] = vi_add_bytes(vi_add_bytes(of_codes[s], kept[2 * s]), kept[2 * s + 1]);
                places[2 * s] = vi_places(place, 2 * half);
                places[2 * s + 1] = vi_places(place, 2 * half + 1);
            }
            multiply_add_picked_digits(kept, places, x, sum, beside, few);
        }
        #pragma GCC unroll 2
        for (int s = 0; s < beside; s++)
            ahead_beside(positions + s * POSITIONS, LANES * sizeof *positions);
    }
}

INLINE void {name}(
    const int32_t *codes, const int32_t *positions, const $T *scales,$zeros
    const int8_t *x, float *acc, const int nb)
{
    const int beside = STRIPS % 2 ? 1 : digit_strips(nb), few = few_digits(nb);
    uint8_t wide[(BK + 15) / 16 * 192 * 8] __attribute__((aligned(64)));
    widen_digits(x, wide, nb);
    for (int strip = 0; strip < STRIPS; strip += beside, acc += beside * LANES * nb) {
        for (int group = 0; group < $groups; group++) {
            const uint8_t *xg = wide + group * $size * 12 * nb;
            for (int n = 0; n < nb; n += few) {
                vint sum[12], of_codes[2];
                {name}_group(codes, positions,$zeros_too xg + 192 * n, sum, of_codes, beside, few, nb);
                #pragma GCC unroll 2
                for (int s = 0; s < beside; s++) {
                    vfloat scale = vf_load_$T(scales + s * $groups * LANES);
                    float *to = acc + (s * nb + n) * LANES;
                    add_picked_digits(to, sum + s * 3 * few, of_codes[s], $up, scale, digit_units(x, nb) + n, few);
                }
            }
            codes += $code_words * LANES;
            positions += $position_words * LANES;
            scales += LANES;$next_zeros
        }
        codes += (beside - 1) * ($groups * $code_words * LANES); /* the other strip's */
        positions += (beside - 1) * ($groups * $position_words * LANES);
        scales += (beside - 1) * $groups * LANES;$skip_zeros
    }
}
""")
