"""Triton helpers that device decodes share.

Integer codes become fp32 without a conversion instruction: with the bits of 2**(23 - AT) above
it, a code at bit AT of a word *is* the float 2**(23 - AT) + code, exactly, as long as the code
ends below bit 23. Subtracting that constant plus the zero point is exact too.
"""

import triton
import triton.language as tl


@triton.jit
def load_words(plane, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """`[ROWS, WORDS]` uint32: a plane of bytes, four at a time."""
    words = plane.to(tl.pointer_type(tl.uint32), bitcast=True)
    return tl.load(words + tl.arange(0, ROWS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :])


@triton.jit
def code_at(words, AT: tl.constexpr, MASK: tl.constexpr, ZERO: tl.constexpr):
    """The code at bit AT of each word minus ZERO, as fp32."""
    biased = (words & (MASK << AT)) | (0x4B000000 - (AT << 23))
    return biased.to(tl.float32, bitcast=True) - ((1 << (23 - AT)) + ZERO) * 1.0


@triton.jit
def nibbles(words, ZERO: tl.constexpr):
    """`[R, W]` uint32 -> `[R, 8 * W]` fp32: the eight 4-bit codes of each word minus ZERO, lowest first."""
    top = words >> 12
    even = tl.join(
        tl.join(code_at(words, 0, 15, ZERO), code_at(words, 16, 15, ZERO)),
        tl.join(code_at(words, 8, 15, ZERO), code_at(top, 12, 15, ZERO)),
    )
    odd = tl.join(
        tl.join(code_at(words, 4, 15, ZERO), code_at(top, 8, 15, ZERO)),
        tl.join(code_at(words, 12, 15, ZERO), code_at(top, 16, 15, ZERO)),
    )
    return tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1] * 8))


@triton.jit
def octets(words, ZERO: tl.constexpr):
    """`[R, W]` uint32 -> `[R, 4 * W]` fp32: the four 8-bit codes of each word minus ZERO, lowest first."""
    top = words >> 16
    even = tl.join(code_at(words, 0, 255, ZERO), code_at(top, 0, 255, ZERO))
    odd = tl.join(code_at(words, 8, 255, ZERO), code_at(top, 8, 255, ZERO))
    return tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1] * 4))


@triton.jit
def quads(fours, ZERO: tl.constexpr):
    """`[R, W]` uint32 -> `[R, 4 * W]` fp32: the four 4-bit codes below bit 16 minus ZERO, lowest first."""
    even = tl.join(code_at(fours, 0, 15, ZERO), code_at(fours, 8, 15, ZERO))
    odd = tl.join(code_at(fours, 4, 15, ZERO), code_at(fours, 12, 15, ZERO))
    return tl.reshape(tl.join(even, odd), (fours.shape[0], fours.shape[1] * 4))


# ---- groups along K -------------------------------------------------------------------------


@triton.jit
def load_groups(plane, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """`[ROWS, GROUPS, 1]`: a scale or a zero point for each group of a tile."""
    if GROUPS == 1:
        values = tl.load(plane + tl.arange(0, ROWS))[:, None]
    else:
        values = tl.load(plane + tl.arange(0, ROWS)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :])
    return values[:, :, None]


@triton.jit
def scale_codes(codes, scales, GROUPS: tl.constexpr, DTYPE: tl.constexpr):
    """Codes less their zero point `[R, C]` times scales `[R, GROUPS, 1]` in fp32, rounded once."""
    grouped = tl.reshape(codes, (codes.shape[0], GROUPS, codes.shape[1] // GROUPS))
    return tl.reshape((grouped * scales.to(tl.float32)).to(DTYPE), codes.shape)


@triton.jit
def shift_codes(codes, zeros, GROUPS: tl.constexpr):
    """Codes `[R, C]` less their group's zero point `[R, GROUPS, 1]`, exact in fp32."""
    grouped = tl.reshape(codes, (codes.shape[0], GROUPS, codes.shape[1] // GROUPS))
    return tl.reshape(grouped - zeros.to(tl.float32), codes.shape)


# ---- two of four ----------------------------------------------------------------------------


@triton.jit
def kept_columns(positions, BM: tl.constexpr, BK: tl.constexpr):
    """Four times the two kept columns of each group of four, uint32 `[BM, BK / 4]` each."""
    packed = tl.load(positions + tl.arange(0, BM)[:, None] * (BK // 8) + tl.arange(0, BK // 8)[None, :]).to(tl.uint32)
    groups = tl.reshape(tl.join(packed, packed >> 4), (BM, BK // 4))
    return (groups & 3) * 4, groups & 12


@triton.jit
def spread_values(kept, positions, BM: tl.constexpr, BK: tl.constexpr):
    """Kept values `[BM, BK / 2]` at their columns of each group of four, zeros between them.

    Four 16-bit values are one 64-bit word, in which a kept value is shifted to its column. On
    sm_90 that is a quarter fewer instructions than comparing every column with both positions.
    """
    first, second = tl.split(tl.reshape(kept, (BM, BK // 4, 2)))
    at, then = kept_columns(positions, BM, BK)
    if kept.dtype.primitive_bitwidth == 16:
        low = first.to(tl.uint16, bitcast=True).to(tl.uint64) << (at * 4).to(tl.uint64)
        high = second.to(tl.uint16, bitcast=True).to(tl.uint64) << (then * 4).to(tl.uint64)
        halves = tl.join(low | high, (low | high) >> 32)
        columns = tl.join(halves, halves >> 16).to(tl.uint16).to(kept.dtype, bitcast=True)
    else:
        column0 = tl.where(at == 0, first, 0.0)
        column1 = tl.where(at == 4, first, tl.where(then == 4, second, 0.0))
        column2 = tl.where(at == 8, first, tl.where(then == 8, second, 0.0))
        column3 = tl.where(then == 12, second, 0.0)
        columns = tl.join(tl.join(column0, column2), tl.join(column1, column3))
    return tl.reshape(columns, (BM, BK))


@triton.jit
def spread_codes(codes, positions, zero, BM: tl.constexpr, BK: tl.constexpr):
    """Each group's four codes in the low bits of uint32 `[BM, BK / 4]`, `zero` in dropped columns.

    Codes are kept as differences (xor) from the zero point while they are shifted to their
    columns, so that a column to which nothing is shifted ends up at the zero point itself.
    """
    words = load_words(codes, BM, BK // 16)
    words = tl.join(words, words >> 16)
    pairs = tl.reshape(tl.join(words, words >> 8), (BM, BK // 4)) ^ (zero * 0x11)
    at, then = kept_columns(positions, BM, BK)
    fours = ((pairs & 15) << at) | (((pairs >> 4) & 15) << then)
    return fours ^ (zero * 0x1111)


@triton.jit
def spread_groups(values, COLUMNS: tl.constexpr, GROUPS: tl.constexpr):
    """`[R, GROUPS, 1]` -> uint32 `[R, COLUMNS]`: each group's value in all of its columns."""
    wide = tl.broadcast_to(values.to(tl.uint32), (values.shape[0], GROUPS, COLUMNS // GROUPS))
    return tl.reshape(wide, (values.shape[0], COLUMNS))
