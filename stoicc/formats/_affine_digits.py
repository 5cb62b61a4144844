"""C of the affine formats that multiplies x as digits: exact sums of whole numbers, for a batch of few.

`$groups` groups of `$size` columns to a tile, whose sums are scaled once; `_affine_c.py` fills in the rest.
"""

from string import Template

DIGITS = Template("""\
INLINE void {name}(
    const int32_t *codes,$positions const $T *scales,$zeros
    const int8_t *x, float *acc, const int nb)
{
    float total[$groups * 12];
    for (int group = 0; group < $groups; group++)
        total_digits(digit_sums(x, nb) + group * ($size / 16 * 3) * nb, $size, total + 3 * nb * group, nb);
    for (int strip = 0; strip < STRIPS; strip++, acc += LANES * nb) {
        for (int group = 0; group < $groups; group++) {
            const int8_t *xg = x + group * $size * 3 * nb;
            vint sum[12];
            clear_digit_sets(sum, nb);
$body
            join_digit_sets(sum, nb);
            add_digits(acc, sum, total + 3 * nb * group, $zero, vf_load_$T(scales), digit_units(x, nb), nb);
            scales += LANES;$next_zeros
        }
    }
}
""")

INT8_DIGITS = """\
            #pragma GCC unroll 4
            for (int k = 0; k < $size; k += 16, xg += 48 * nb, codes += 4 * LANES) {
                ahead(codes, 4 * LANES * sizeof *codes);
                #pragma GCC unroll 4
                for (int i = 0; i < 4; i++)
                    multiply_add_digits(
                        vi_unsigned_bytes(vi_load(codes + i * LANES)), xg + 4 * i, digit_set(sum, i, nb), nb);
            }"""

INT4_DIGITS = """\
            #pragma GCC unroll 4
            for (int k = 0; k < $size; k += 16, xg += 48 * nb, codes += 2 * LANES) {
                ahead(codes, 2 * LANES * sizeof *codes);
                #pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    vint eight = vi_load(codes + half * LANES);
                    multiply_add_digits(vi_low_nibbles(eight), xg + 8 * half, digit_set(sum, 0, nb), nb);
                    multiply_add_digits(vi_high_nibbles(eight), xg + 8 * half + 4, digit_set(sum, 1, nb), nb);
                }
            }"""

INT4_NV24_DIGITS = Template("""\
INLINE void {name}(
    const int32_t *codes, const int32_t *positions, const $T *scales,$zeros
    const int8_t *x, float *acc, const int nb)
{
    enum { CODES = $groups * $code_words * LANES, POSITIONS = $groups * $position_words * LANES }; /* of a strip */
    const int beside = STRIPS % 2 || nb > 2 ? 1 : 2; /* strips that share what is read of x */
    uint8_t wide[(BK + 15) / 16 * 192 * 4] __attribute__((aligned(64)));
    widen_digits(x, wide, nb);
    for (int strip = 0; strip < STRIPS; strip += beside) {
        for (int group = 0; group < $groups; group++) {
            const uint8_t *xg = wide + group * $size * 12 * nb;
            vint sum[12], of_codes[2];
            clear_picked_digits(sum, of_codes, beside, nb);
            #pragma GCC unroll 2
            for (int k = 0; k < $size; k += 32, positions += LANES) {
                #pragma GCC unroll 2
                for (int half = 0; half < $halves; half++, codes += LANES, xg += 192 * nb) {
                    vint kept[4], places[4]; /* the first and the second of four groups, of each strip */
                    #pragma GCC unroll 2
                    for (int s = 0; s < beside; s++) {
                        vint word = vi_load(codes + s * CODES), place = vi_load(positions + s * POSITIONS);
$zero                        ahead_beside(codes + s * CODES, LANES * sizeof *codes);
                        kept[2 * s] = $first;
                        kept[2 * s + 1] = $second;
                        of_codes[s] = vi_add_bytes(vi_add_bytes(of_codes[s], kept[2 * s]), kept[2 * s + 1]);
                        places[2 * s] = vi_places(place, 2 * half);
                        places[2 * s + 1] = vi_places(place, 2 * half + 1);
                    }
                    multiply_add_picked_digits(kept, places, xg, sum, beside, nb);
                }
                #pragma GCC unroll 2
                for (int s = 0; s < beside; s++)
                    ahead_beside(positions + s * POSITIONS, LANES * sizeof *positions);
            }
            #pragma GCC unroll 2
            for (int s = 0; s < beside; s++) {
                vfloat scale = vf_load_$T(scales + s * $groups * LANES);
                add_picked_digits(
                    acc + s * LANES * nb, sum + s * 3 * nb, of_codes[s], $up, scale, digit_units(x, nb), nb);
            }
            scales += LANES;$next_zeros
        }
        acc += beside * LANES * nb;
        codes += (beside - 1) * CODES;
        positions += (beside - 1) * POSITIONS;
        scales += (beside - 1) * $groups * LANES;$skip_zeros
    }
}
""")
