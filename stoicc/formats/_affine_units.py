"""The C of affine formats for matrix units: a strip of one group is unpacked, and scaled when it was multiplied."""

from string import Template

PAIRS = Template("""\
INLINE vfloat {name}(
    const int32_t *codes,$positions const bf16 *scales,$zeros const int unit, bf16 *pairs)
{
    codes += unit * $words * LANES;
$start    for (int k = 0; k < $size; k += $step) {
$body
    }
    return vf_load_bf16(scales + unit / $group * LANES);
}
""")

INT8_PAIRS = Template("""\
        vint half[2] = {vi_load(codes), vi_load(codes + LANES)};
        ahead(codes, 2 * LANES * sizeof *codes);
        codes += 2 * LANES;
        #pragma GCC unroll 4
        for (int j = 0; j < 8; j += 2)
            vp_store(pairs + (k + j) * LANES, vp_join($even, $odd));""")

INT4_PAIRS = Template("""\
        vint eight = vi_load(codes);
        ahead(codes, LANES * sizeof *codes);
        codes += LANES;
        #pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            vp_store(pairs + (k + 2 * j) * LANES, $pair);""")

INT4_DOTS = Template("""\
        vint eight = vi_load(codes);
        ahead(codes, LANES * sizeof *codes);
        codes += LANES;
        #pragma GCC unroll 4
        for (int j = 0; j < 4; j++) /* columns 0 and 2, 4 and 6, 1 and 3, 5 and 7 */
            vp_store(pairs + (k + j % 2 * 4 + j / 2 * 2) * LANES, $pair);""")

INT4_NV24_PAIRS = Template("""\
        vint place = vi_load(positions);
        ahead(positions, LANES * sizeof *positions);
        ahead(codes, 2 * LANES * sizeof *codes);
        positions += LANES;
        vint word[2] = {vi_load(codes), vi_load(codes + LANES)};
        #pragma GCC unroll 4
        for (int i = 0; i < 4; i++) { /* two groups of each word of codes */
            vint kept = vp_twins(word[i / 2], i % 2), pair[2];
            #pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                const int g = i / 2 * 4 + i % 2 + 2 * half;
                vp_spread_codes(pair, $kept, half, vp_place(place, g));
                vp_store(pairs + (k + 4 * g) * LANES, $first);
                vp_store(pairs + (k + 4 * g + 2) * LANES, $second);
            }
        }
        codes += 2 * LANES;""")

INT4_NV24_PICKS = Template("""\
        vint place = vi_load(positions);
        ahead(positions, LANES * sizeof *positions);
        ahead(codes, 2 * LANES * sizeof *codes);
        #pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            vint word = vi_load(codes + half * LANES);
            #pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const int g = 4 * half + i;
                vp_store(pairs + g * 2 * LANES, $pair);
                vp_store(pairs + (8 + g) * 2 * LANES, vp_columns(place, g));
            }
        }""")

INT4_NV24_DOTS = Template("""\
        vint place = vi_load(positions);
        ahead(positions, LANES * sizeof *positions);
        ahead(codes, 2 * LANES * sizeof *codes);
        #pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            vint word = vi_load(codes + half * LANES);
            #pragma GCC unroll 4
            for (int j = 0; j < 4; j++) { /* both groups' first, then second kept column: 0 and 2, then 1 and 3 */
                vp_store(pairs + (4 * half + j) * 2 * LANES, $pair);
                vp_store(pairs + (8 + 4 * half + j) * 2 * LANES, vp_two_columns(place, 4 * half + j / 2, j % 2));
            }
        }""")

OCTETS = Template("""\
INLINE vfloat {name}(
    const int32_t *codes,$positions const $T *scales,$zeros const int unit, int8_t *octets)
{
    codes += unit * $words * LANES;
$start    #pragma GCC unroll 2
    for (int k = 0; k < $size; k += $step) {
$body
    }
    return $scale;
}
""")

INT8_OCTETS = """\
        ahead(codes, 2 * LANES * sizeof *codes);
        vo_store(octets + k * LANES, vi_load(codes));
        vo_store(octets + (k + 4) * LANES, vi_load(codes + LANES));
        codes += 2 * LANES;"""

INT4_OCTETS = """\
        vint eight = vi_load(codes);
        ahead(codes, LANES * sizeof *codes);
        codes += LANES;
        vo_store(octets + k * LANES, $low);
        vo_store(octets + (k + 4) * LANES, $high);"""

INT4_NV24_OCTETS = """\
        vint place = vi_load(positions);
        ahead(positions, LANES * sizeof *positions);
        ahead(codes, 2 * LANES * sizeof *codes);
        positions += LANES;
        #pragma GCC unroll 4
        for (int i = 0; i < 4; i++) { /* two groups of each word of codes */
            vint word = vi_load(codes + i / 2 * LANES), kept = $kept;
            const int g = i / 2 * 4 + i % 2;
            vo_spread(octets + (k + 4 * g) * LANES, kept, 0, vp_place(place, g));
            vo_spread(octets + (k + 4 * g + 8) * LANES, kept, 1, vp_place(place, g + 2));
        }
        codes += 2 * LANES;"""
