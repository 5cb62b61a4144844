"""C of units of rows that keep as many codes each: see `_kept_rows_c`, whose names it uses."""

from string import Template

PICKS = Template("""\
INLINE vfloat {name}($arguments, const int unit, bf16 *kept)
{
    const int at = unit / ($size / 32);
    vint place = vi_load(masks + unit * LANES);
    ahead(masks + unit * LANES, LANES * sizeof *masks);
$pairs_start    #pragma GCC unroll 4
    for (int i = 0; i < 2 * $quads; i++) { /* quads of two halves */
        const int quad = unit * 2 * $quads + i, half = i / $quads, q = i % $quads;
        vint code = $code, pair[2]; /* bytes 0 and 2, then 1 and 3 */
        if (quad % $quads_of_word == 0)
            ahead(codes + quad / $quads_of_word * LANES, LANES * sizeof *codes);
        $pairs
        #pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            vp_store(kept + (2 * i + j) * 2 * LANES, pair[j]);
            vp_store(
                kept + (8 * $quads + (2 * i + j) * 2) * LANES,
                vp_places(place, 8 * j + 4 * half + 2 * q, $range, 16 * half + $first_pick, 16 * half + $second_pick));
        }
    }
    return $pairs_scale;
}
""")
"""Pairs of a lane's own columns among 32."""

PICKS_OF_FOUR = Template("""\
INLINE vfloat {name}($arguments, const int unit, bf16 *kept)
{
    const int at = unit / ($size / 32);
    vint place = vi_load(masks + unit * LANES);
    ahead(masks + unit * LANES, LANES * sizeof *masks);
$pairs_start    #pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        vint of[2][2]; /* first and second weights of groups 0 and 2, then of 1 and 3 */
        #pragma GCC unroll 2
        for (int q = 0; q < 2; q++) {
            const int quad = (2 * unit + half) * 2 + q;
            vint code = $code, *pair = of[q];
            if (quad % $quads_of_word == 0)
                ahead(codes + quad / $quads_of_word * LANES, LANES * sizeof *codes);
            $pairs
        }
        #pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const int group = 4 * half + j;
            vp_store(kept + group * 2 * LANES, vp_of_both(of[0][j % 2], of[1][j % 2], j / 2));
            vp_store(kept + (8 + group) * 2 * LANES, vp_columns(place, group));
        }
    }
    return $pairs_scale;
}
""")
"""Pairs of 2:4, group by group."""

SPREAD = Template("""\
INLINE vfloat {name}($arguments, const int unit, bf16 *pairs)
{
    const int at = unit / ($size / 32);
    vint place = vi_load(masks + unit * LANES);
    ahead(masks + unit * LANES, LANES * sizeof *masks);
$pairs_start    #pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        vint kept[4 * $quads], column[4 * $quads]; /* in the order of columns */
        #pragma GCC unroll 2
        for (int q = 0; q < $quads; q++) {
            const int quad = (2 * unit + half) * $quads + q;
            vint code = $code, pair[2], places = $places;
            if (quad % $quads_of_word == 0)
                ahead(codes + quad / $quads_of_word * LANES, LANES * sizeof *codes);
            $pairs
            #pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                kept[$quads * j + q] = vp_half(pair[j % 2], j / 2);
                column[$quads * j + q] = vp_bytes(places, j, j);
            }
        }
        #pragma GCC unroll 4
        for (int first = 0; first < 16; first += $m)
            vp_spread_group(
                pairs + (16 * half + first) * LANES, kept + first / $m * $n, column + first / $m * $n, $n, first, $m);
    }
    return $pairs_scale;
}
""")
"""Columns with zeros between, for matrix units."""

OCTETS = Template("""\
INLINE vfloat {name}($arguments, const int unit, int8_t *octets)
{
    const int at = unit / ($size / 64);
    $start
    #pragma GCC unroll 4
    for (int half = 0; half < 4; half++) {
        vint place = vi_load(masks + (2 * unit + half / 2) * LANES), kept[4 * $quads], column[4 * $quads];
        #pragma GCC unroll 2
        for (int q = 0; q < $quads; q++) {
            const int quad = (4 * unit + half) * $quads + q;
            vint code = $code, places = $places;
            if (quad % $quads_of_word == 0)
                ahead(codes + quad / $quads_of_word * LANES, LANES * sizeof *codes);
            code = $signed;
            #pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                kept[$quads * j + q] = vo_byte(code, j);
                column[$quads * j + q] = vo_byte(places, j);
            }
        }
        #pragma GCC unroll 4
        for (int first = 0; first < 16; first += $m)
            vo_spread_group(
                octets + (16 * half + first) * LANES, kept + first / $m * $n, column + first / $m * $n, $n, first, $m);
    }
    return $scale;
}
""")
"""The same as signed bytes, for integer matrix units."""
