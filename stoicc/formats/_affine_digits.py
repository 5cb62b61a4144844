"""C of formats of codes that multiplies x as digits: exact sums of whole numbers.

Codes come sixteen columns at a time, unsigned, four bytes to a lane, and are less a zero point; the sum of a group is
scaled once. Where they come from is a piece of C: a plane of words, or the kept codes of a composed format.
"""

from dataclasses import dataclass
from string import Template

_DIGITS = Template("""\
INLINE void {name}(
    $planes, const $scale_type *scales,$zeros
    const int8_t *x, float *acc, const int nb)
{
    const int few = few_digits(nb); /* entries whose sums the registers hold: codes are read once for each few */
$begin    int32_t below[$groups * 3 * WIDE]; /* what zero points take from the sums of a group */
    for (int group = 0; group < $groups; group++)
        total_digits(digit_sums(x, nb) + group * ($size / 16 * 3) * nb, $size, -$half, below + 3 * nb * group, nb);
    for (int strip = 0; strip < STRIPS; strip++, acc += LANES * nb) {
        for (int group = 0; group < $groups; group++) {
            const vfloat scale = $scale;
            const $element *codes_from = codes;
            for (int n = 0; n < nb; n += few) {
                const int8_t *xg = x + (group * $size * nb + 16 * n) * 3;
                vint sum[12];
                start_digit_sets(sum, below + 3 * (nb * group + n), $zero, few);
                codes = codes_from;
                #pragma GCC unroll $unroll
                for (int first = 0; first < $size; first += $step)
                    #pragma GCC unroll 2
                    for (int k = first; k < $end; k += 16, xg += 48 * nb) {
                        vint four[4];
$sixteen
                        multiply_add_digits(four, xg, sum, few);
                    }
                join_digit_sets(sum, few);
                add_digits(acc + n * LANES, sum, scale, digit_units(x, nb) + n, $fits, few);
            }
            scales += LANES;$next
        }
    }
}
""")


@dataclass(frozen=True)
class Digits:
    """A format's function of x in digits, but for where codes come from.

    Attributes:
        groups: of columns that share a scale, in a tile.
        size: columns of a group, a multiple of 16.
        half: what is taken from every code.
        zero: C of what it is taken times in each lane.
        zeros: C of the parameters after the scales, each followed by a comma.
        next: C that moves those on to the next group.
        scale: C of a group's scales, and the C type that they are loaded from.
        codes: C that makes of `four[i]`, which is a code as it is stored, what is multiplied.
        most: all that a code less its zero point is below.
    """

    groups: int
    size: int
    half: int
    zero: str
    zeros: str
    next: str
    scale: str
    scale_type: str
    most: int
    codes: str = ""

    def text(self, planes: str, element: str, sixteen: str, begin: str = "", step: int = 16) -> str:
        """The C text.

        Args:
            planes: parameters for the codes, `codes` among them.
            element: the C type that `codes` points to.
            sixteen: C that sets `four` to the codes of columns k .. k + 15 of a group of a strip, and moves `codes` on.
            begin: C at the begin of the function.
            step: columns of which `sixteen` knows where they begin: k is a multiple of it and a constant.
        """
        end = f"first + {step}"
        if self.size % step:
            end = f"({end} < {self.size} ? {end} : {self.size})"
        return _DIGITS.substitute(
            planes=planes,
            element=element,
            begin=begin,
            step=step,
            end=end,
            unroll=64 // step,
            sixteen=sixteen + (f"\n{_OF_EACH}{self.codes}" if self.codes else ""),
            groups=self.groups,
            size=self.size,
            half=self.half,
            zero=self.zero,
            zeros=self.zeros,
            next=self.next,
            scale=self.scale,
            scale_type=self.scale_type,
            fits=int(257 * 128 * self.most * self.size < 1 << 31),  # 257 times a sum of digits
        )


def of_words(digits: Digits | None, sixteen: str, also: str = "", step: int = 16) -> str:
    """The text where codes are words of a plane, and `also` a parameter; none where x cannot be digits."""
    return digits.text(f"const int32_t *codes{also}", "int32_t", sixteen, step=step) if digits else ""


_OF_EACH = """\
                        #pragma GCC unroll 4
                        for (int i = 0; i < 4; i++)
                        """

INT8_SIXTEEN = """\
                        ahead(codes, 4 * LANES * sizeof *codes);
                        #pragma GCC unroll 4
                        for (int i = 0; i < 4; i++, codes += LANES)
                            four[i] = vi_unsigned_bytes(vi_load(codes));"""

INT4_SIXTEEN = """\
                        ahead(codes, 2 * LANES * sizeof *codes);
                        #pragma GCC unroll 2
                        for (int i = 0; i < 4; i += 2, codes += LANES) {
                            vint eight = vi_load(codes);
                            four[i] = vi_low_nibbles(eight);
                            four[i + 1] = vi_high_nibbles(eight);
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
            multiply_add_picked_digits(kept, places, x, sum, 2, beside, few);
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
    uint8_t wide[(BK + 15) / 16 * 192 * WIDE] __attribute__((aligned(64)));
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
