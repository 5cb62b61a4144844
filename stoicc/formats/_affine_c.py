"""C code and lane order of the affine formats, for the CPU backend.

Codes are multiplied and the sum of a group is scaled once in fp32; no weight is rounded to the
weight's dtype, but by the backend for a large batch on matrix units. Codes are stored less half their
range, in two's complement. A zero point is taken from each code: taken once from the sum of a
group, as zero * sum(x), an infinite x would give infinity - infinity (x in digits is finite and its
sums are exact, so there it is).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from string import Template

from torch import Tensor

from stoicc.formats import _affine_digits as _digits
from stoicc.formats import _affine_units as _units
from stoicc.formats._lane_order import byte_lanes, nibble_lanes, scale_lanes, signed
from stoicc.formats._nm_c import position_words
from stoicc.ir.format import LaneCodes, PairsOfCodes, Planes, TileMac, TileOctets, TilePairs

_INT4_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Columns of an int4 word by nibble: its low nibbles are four neighbours, its high nibbles the next four."""
_LARGEST_HIGH = 1 << 15
"""Columns of a group up to which sums of digits times 16 times codes are below 2**31."""
Unpack = Callable[[Tensor], Tensor]
"""Packed nibbles u8 `[..., n / 2]` -> codes u8 `[..., n]`."""

_TILE = Template("""\
INLINE void {name}(
    const int32_t *codes,$positions const $T *scales,$zeros
    const float *x, float *acc, const int nb)
{
$picked    for (int strip = 0; strip < STRIPS; strip++, acc += LANES * nb) {
        for (int group = 0; group < $groups; group++) {
            const float *xg = x + group * $size * nb;
            vfloat sum[8];
            clear_sums(sum, nb);
$start$body
            add_scaled_sums(acc, vf_load_$T(scales), sum, nb);
            scales += LANES;
        }
    }
}
""")

_INT8 = Template("""\
            for (int k = 0; k < $size; k += 8, codes += 2 * LANES) {
                vint half[2] = {vi_load(codes), vi_load(codes + LANES)};
                ahead(codes, 2 * LANES * sizeof *codes);
                #pragma GCC unroll 8
                for (int j = 0; j < $present; j++)
                    multiply_add($weight, xg + (k + j / 4 * 4) * nb + j % 4, sum, j, nb);
            }""")

_INT4 = Template("""\
            for (int k = 0; k < $size; k += 8, codes += LANES) {
                vint eight = vi_load(codes); /* columns k .. k + 7 of each row */
                ahead(codes, LANES * sizeof *codes);
                #pragma GCC unroll 8
                for (int j = 0; j < $present; j++)
                    multiply_add($weight, xg + (k + j / 4 * 4) * nb + j % 4, sum, j, nb);
            }""")

_INT4_NV24 = Template("""\
            for (int k = 0; k < $size; k += 32, positions += LANES) {
                vint place = vi_load(positions);
                ahead(positions, LANES * sizeof *positions);
                #pragma GCC unroll 2
                for (int half = 0; half < $halves; half++, codes += LANES) {
                    vint eight = vi_load(codes); /* two codes of each of four groups of four columns */
                    ahead(codes, LANES * sizeof *codes);
                    #pragma GCC unroll 8
                    for (int j = 0; j < $present; j++)
                        multiply_add_picked(
                            $weight, vi_shift_right(place, place_shift(4 * half + j / 2, j % 2)), x,
                            group * $size + k + 16 * half + j / 2 * 4, sum, j, nb);
                }
            }""")

_PICKED = """\
    float room[COLUMNS * WIDE] __attribute__((aligned(64)));
    x = columns_to_pick(x, room, nb);
"""

_LOW_CODES = {
    "low": "vi_low_nibbles(eight)",
    "high": "vi_high_nibbles(eight)",
    "kept": "vi_low_nibbles(vp_twins(word, i % 2))",
}
_HIGH_CODES = {"low": "vi_high_codes(eight, 0)", "high": "vi_high_codes(eight, 1)", "kept": "vo_twins(word, i % 2)"}
"""Codes of 4 bits as bytes, unsigned in their low half or signed in their high half."""

_LOAD_ZEROS = """\
            vfloat zero = vf_load_i8(zeros);
            zeros += LANES;
"""

_DECODE = Template("""\
static void {name}(
    const uint8_t *codes,$positions const $T *scales,$zeros $T *out, const int64_t stride)
{
    for (int row = 0; row < BM; row++, out += stride)
        for (int group = 0; group < $groups; group++) {
            const float scale = ${T}_to_float(*scales++), zero = $zero;
            $T *to = out + group * $size;
$body
        }
}
""")

_INT8_DECODE = Template("""\
            for (int k = 0; k < $size; k++)
                to[k] = float_to_$T((codes[k] - zero) * scale);
            codes += $size;""")

_INT4_DECODE = Template("""\
            $T value[16];
            for (int code = 0; code < 16; code++)
                value[code] = float_to_$T((code - zero) * scale);
            look_up_nibbles_$T(codes, value, to, $size);
            codes += $size / 2;""")

_INT4_NV24_DECODE = Template("""\
            $T value[16];
            for (int code = 0; code < 16; code++)
                value[code] = float_to_$T((code - zero) * scale);
            for (int k = 0; k < $size; k++)
                to[k] = float_to_$T(0.0f * scale);
            for (int k = group * $size; k < (group + 1) * $size; k += 4) {
                int place = positions[(row * BK + k) / 8] >> k % 8; /* a nibble places two of four columns */
                out[k + (place & 3)] = value[*codes & 15];
                out[k + (place >> 2 & 3)] = value[*codes++ >> 4];
            }""")


def _decode(body: Template, dtype: str, groups: int, size: int, zeros: bool, bits: int, **names: str) -> str:
    names = {"T": dtype, "groups": str(groups), "size": str(size), "positions": ""} | names
    names["zeros"] = " const uint8_t *zeros," if zeros else ""
    names["zero"] = "*zeros++" if zeros else f"{1 << (bits - 1)}.0f"
    return _DECODE.substitute(names, body=body.substitute(names))


@dataclass(frozen=True)
class _Groups:
    """What the C of a format depends on: dtype, groups of scales in a tile and their size, zero points."""

    dtype: str
    groups: int
    size: int
    zeros: bool

    def fill(self, outer: Template, body: Template | str, **names: str) -> str:
        """A format's function: `body` in `outer`, with the names that both use."""
        known = {
            "T": self.dtype,
            "groups": str(self.groups),
            "size": str(self.size),
            "positions": "",
            "picked": "",
            "start": "",
            "zeros": " const int8_t *zeros," if self.zeros else "",
            "next_zeros": "\n            zeros += LANES;" if self.zeros else "",
        } | names
        body = Template(body) if isinstance(body, str) else body
        return outer.substitute(known, body=body.substitute(known))

    def present(self, columns: int, step: int) -> str:
        """How many of `step` codes of a word there are, `columns` columns to a word, at column k of a group."""
        if self.size % columns == 0:
            return str(step)
        return f"(k + {columns} <= {self.size} ? {step} : ({self.size} - k) / {columns // step})"

    @property
    def on_integers(self) -> bool:
        """Whether groups are made of the 16 columns that x in digits is made of."""
        return self.size % 16 == 0

    def digits(self, bits: int) -> _digits.Digits | None:
        """What multiplies x as digits, of codes of these bits; zero points are stored less half of what they reach."""
        if not self.on_integers:
            return None
        return _digits.Digits(
            self.groups,
            self.size,
            half=1 if self.zeros else 1 << (bits - 1),
            zero=f"vi_zero_points(zeros, {1 << (bits - 1)})" if self.zeros else "vi_set1(1)",
            zeros=" const int8_t *zeros," * self.zeros,
            next="\n            zeros += LANES;" * self.zeros,
            scale=f"vf_load_{self.dtype}(scales)",
            scale_type=self.dtype,
            most=1 << bits,
        )

    def pairs(self, body: Template, per_word: int, step: int, **names: str) -> TilePairs | None:
        """The code for pairs, `per_word` columns to a word of codes, `step` of a unit's columns at a time."""
        return self._units(32, body, per_word, step, names)

    def dots(self, body: Template, per_word: int, step: int, **names: str) -> TilePairs | None:
        """The same for a batch of few in vectors: pairs of columns 0 and 2, then 1 and 3 of each four."""
        code = self._units(16, body, per_word, step, names)
        return code and replace(code, crossed=True)

    def _units(self, columns: int, body: Template, per_word: int, step: int, names: dict[str, str]) -> TilePairs | None:
        if self.size % 32 or self.dtype != "bf16":
            return None
        group = str(self.size // columns)
        names["start"] = Template(names.get("start", "")).substitute(group=group)
        names |= {"words": str(columns // per_word), "step": str(step), "group": group, "size": str(columns)}
        text = self.fill(_units.PAIRS, body, **names)
        return TilePairs(text, columns, scaled=True, group=int(group), least_in_vectors=2, least_blocked=48)

    def looked_up(self, start: str, pair: str) -> PairsOfCodes | None:
        """How codes are looked up, where a unit of 32 columns has one scale."""
        if self.size % 32 or self.dtype != "bf16":
            return None
        scale = "vf_load_bf16(scales + unit / GROUP * LANES)"
        return PairsOfCodes(Template(start).substitute(group="GROUP"), by_turns(pair), scale, self.size)

    def in_lanes(self, bits: int) -> LaneCodes | None:
        """How a code less its zero point is a signed byte; zero points are stored as those of 4 bits are."""
        if bits == 8 and self.zeros:  # it would need nine bits
            return None
        zero = "vi_zero_bytes(zeros + at * LANES)" if self.zeros else f"vi_set_bytes({1 << (bits - 1)})"
        scale = f"vf_load_{self.dtype}(scales + at * LANES)"
        return LaneCodes(scale, f"const vint zero = {zero};", "vi_sub_bytes(code, zero)")

    def octets(self, body: str, per_word: int, step: int, bits: int, **names: str) -> TileOctets | None:
        """The code for integer matrix units, `per_word` columns to a word of codes, `step` columns at a time.

        Without zero points, codes of fewer than 8 bits stand in the high bits of a byte, so their sums are scaled down.
        With them they stand in its low bits.
        """
        if self.size % 64 or (bits == 8 and self.zeros):  # a code less its zero point would need nine bits
            return None
        start, scale = "", f"vf_load_{self.dtype}(scales + unit / $group * LANES)"
        if bits < 8 and self.zeros:
            start = "    const vint zero = vi_zero_bytes(zeros + unit / $group * LANES);\n"
            codes = _LOW_CODES | ({"code": names["code"]} if "code" in names else {})
            names |= {what: f"vi_sub_bytes({code}, zero)" for what, code in codes.items()}
        elif bits < 8:
            scale = f"vf_mul({scale}, vf_set1(1 / {1 << (8 - bits)}.0f))"
            names |= _HIGH_CODES | ({"code": f"vo_less_half({names['code']}, {bits})"} if "code" in names else {})
        start += names.pop("start", "")
        group = str(self.size // 64)
        start, scale = (Template(text).substitute(group=group) for text in (start, scale))
        names |= {"words": str(64 // per_word), "step": str(step), "start": start, "scale": scale, "size": "64"}
        text = self.fill(_units.OCTETS, body, group=group, **names)
        return TileOctets(text, 64, most=16 if bits == 8 else 8, group=self.size // 64)


def _less_zero(code: str, zeros: bool) -> str:
    return f"vf_sub({code}, zero)" if zeros else code


def int8_mac(dtype: str, groups: int, size: int, zeros: bool) -> TileMac | None:
    """The C of 8-bit codes, `groups` groups of `size` columns to a tile; None where size % 4 != 0."""
    if size % 4:
        return None
    grid, start = _Groups(dtype, groups, size, zeros), _LOAD_ZEROS if zeros else ""

    def code(j: str) -> str:
        return _less_zero(f"vf_byte(half[({j}) / 4], ({j}) % 4)", zeros)

    source = grid.fill(_TILE, _INT8, start=start, weight=code("j"), present=grid.present(8, 8))
    digits = grid.digits(8)
    zero = "    vfloat zero = vf_load_i8(zeros + unit / $group * LANES);\n" * zeros
    pairs = grid.pairs(_units.INT8_PAIRS, 4, 8, start=zero, even=code("j"), odd=code("j + 1"))
    pairs = pairs and replace(pairs, least_in_vectors=3)
    octets = grid.octets(_units.INT8_OCTETS, 4, 8, 8)

    def pack(planes: Planes) -> Planes:
        return {"codes": byte_lanes(signed(planes["codes"], 8), groups), **scale_lanes(planes, 8)}

    decode = _decode(_INT8_DECODE, dtype, groups, size, zeros, 8)
    text = _digits.of_words(digits, _digits.INT8_SIXTEEN)
    of_kept = digits.text if digits else None
    return TileMac(source, pack, decode, text, pairs, octets, digits_of=of_kept, in_lanes=grid.in_lanes(8))


def int4_mac(dtype: str, groups: int, size: int, zeros: bool, unpack: Unpack) -> TileMac | None:
    """The C of 4-bit codes: eight columns of a row are one 32-bit lane."""
    if size % 4:
        return None
    grid = _Groups(dtype, groups, size, zeros)
    weight = _less_zero("vf_nibble(eight, j % 4 * 2 + j / 4)", zeros)
    source = grid.fill(_TILE, _INT4, start=_LOAD_ZEROS if zeros else "", weight=weight, present=grid.present(8, 8))
    digits = grid.digits(4)
    pair, start = _pair("vp_step(eight, j)", zeros)
    pairs = grid.pairs(_units.INT4_PAIRS, 8, 8, start=start, pair=pair)
    pairs = pairs and replace(pairs, least_blocked=192)
    pair, start = _pair("vi_shift_right(eight, 4 * j)", zeros)
    dots = grid.dots(_units.INT4_DOTS, 8, 8, start=start, pair=pair)
    octets = grid.octets(_units.INT4_OCTETS, 8, 8, 4)
    pair, start = _pair("code", zeros)

    def pack(planes: Planes) -> Planes:
        return {"codes": nibble_lanes(unpack(planes["codes"]), groups, _INT4_ORDER), **scale_lanes(planes, 4)}

    decode = _decode(_INT4_DECODE, dtype, groups, size, zeros, 4)
    text = _digits.of_words(digits, _digits.INT4_SIXTEEN)
    of_kept, looked_up = digits.text if digits else None, grid.looked_up(start, pair)
    return TileMac(
        source, pack, decode, text, pairs, octets,
        dots=dots, code_bits=4, digits_of=of_kept, pairs_of=looked_up, in_lanes=grid.in_lanes(4),
    )  # fmt: skip


def int4_nv24_mac(dtype: str, groups: int, size: int, zeros: bool, unpack: Unpack) -> TileMac | None:
    """The C of 4-bit codes on 2:4: four groups of four columns of a row are one 32-bit lane."""
    if size % 4:
        return None
    grid = _Groups(dtype, groups, size, zeros)
    halves = "2" if size % 32 == 0 else f"(k + 16 < {size} ? 2 : 1)"
    present = "8" if size % 16 == 0 else f"({size} - k - 16 * half < 16 ? ({size} - k - 16 * half) / 2 : 8)"
    weight = _less_zero("vf_nibble(eight, j)", zeros)
    arguments = {"positions": " const int32_t *positions,", "halves": halves, "present": present, "picked": _PICKED}
    source = grid.fill(_TILE, _INT4_NV24, start=_LOAD_ZEROS if zeros else "", weight=weight, **arguments)
    digits = grid.fill(_digits.INT4_NV24_DIGITS, "", halves=halves, **_picked_codes(grid)) if grid.on_integers else ""
    look_up = "vp_small" if zeros else "vp_nibble"
    names = {"first": f"{look_up}(pair[0])", "second": f"{look_up}(pair[1])"}
    names["kept"] = "vi_sub_bytes(vi_low_nibbles(kept), zero)" if zeros else "kept"
    start = "    const vint zero = vi_zero_bytes(zeros + unit / $group * LANES);\n" * zeros
    start += "    positions += unit * LANES;\n"
    planes = arguments["positions"]
    pairs = grid.pairs(_units.INT4_NV24_PAIRS, 16, 32, start=start, positions=planes, **names)
    pair, zero = _pair("vp_kept_nibbles(word, i)", zeros)
    picked = {"start": zero + "    positions += unit * LANES;\n", "positions": planes, "pair": pair}
    picks = grid.pairs(_units.INT4_NV24_PICKS, 16, 32, **picked)
    dots = grid.pairs(
        _units.INT4_NV24_DOTS, 16, 32, **picked | {"pair": _pair("vi_shift_right(word, 4 * j)", zeros)[0]}
    )
    dots = dots and replace(dots, picked=16, least_in_vectors=1, most=4)
    octets = grid.octets(
        _units.INT4_NV24_OCTETS, 16, 32, 4, start="    positions += unit * 2 * LANES;\n", positions=planes
    )

    def pack(planes: Planes) -> Planes:
        codes = nibble_lanes(unpack(planes["codes"]), groups, range(8))
        return {"codes": codes, "positions": position_words(planes["positions"], groups), **scale_lanes(planes, 4)}

    positions = " const uint8_t *positions,"
    decode = _decode(_INT4_NV24_DECODE, dtype, groups, size, zeros, 4, positions=positions)
    return TileMac(source, pack, decode, digits, pairs, octets, picks=picks, dots=dots, code_bits=4)


def _picked_codes(grid: _Groups) -> dict[str, str]:
    """C for kept codes as signed bytes, and what goes with them: in the high bits, if nothing is taken off."""
    names = {"code_words": str(-(-grid.size // 16)), "position_words": str(-(-grid.size // 32)), "skip_zeros": ""}
    names["zeros_too"] = " zeros," * grid.zeros
    if not grid.zeros and grid.size <= _LARGEST_HIGH:
        names |= {"first": "vi_signed_codes(word, 0)", "second": "vi_signed_codes(word, 1)", "zero": ""}
        return names | {"up": "signed_codes_power()"}
    zero = f"vi_zero_bytes(zeros + s * {grid.groups} * LANES)" if grid.zeros else "vi_set_bytes(8)"
    if grid.zeros:
        names["skip_zeros"] = f"\n        zeros += (beside - 1) * {grid.groups} * LANES;"
    kept = {"first": "vi_low_nibbles(word)", "second": "vi_high_nibbles(word)"}
    names |= {name: f"vi_sub_bytes({code}, zero)" for name, code in kept.items()}
    return names | {"up": "0", "zero": f"                const vint zero = {zero};\n"}


def by_turns(pair: str) -> str:
    """C for both pairs of four codes, of which `pair` looks up two in the low bits of words (`PairsOfCodes`)."""
    return f"pair[0] = {pair};\n        code = vi_shift_right(code, 8);\n        pair[1] = {pair};"


def _pair(codes: str, zeros: bool) -> tuple[str, str]:
    """C for a pair of 4-bit codes as bf16, and what it needs at the start of a group."""
    if not zeros:
        return f"vp_nibble({codes})", ""
    start = "    vint zero = vp_zero(zeros + unit / $group * LANES);\n"
    return f"vp_nibble_less({codes}, zero)", start
