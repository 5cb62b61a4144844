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
def load_groups(plane, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """`[ROWS, GROUPS, 1]` fp32: a scale or a zero point for each group of a tile."""
    if GROUPS == 1:
        values = tl.load(plane + tl.arange(0, ROWS))[:, None]
    else:
        values = tl.load(plane + tl.arange(0, ROWS)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :])
    return values.to(tl.float32)[:, :, None]


@triton.jit
def scale_codes(codes, scales, GROUPS: tl.constexpr, DTYPE: tl.constexpr):
    """Codes less their zero point `[R, C]` times scales `[R, GROUPS, 1]` in fp32, rounded once."""
    grouped = tl.reshape(codes, (codes.shape[0], GROUPS, codes.shape[1] // GROUPS))
    return tl.reshape((grouped * scales).to(DTYPE), codes.shape)


@triton.jit
def shift_codes(codes, zeros, GROUPS: tl.constexpr):
    """Codes `[R, C]` less their group's zero point `[R, GROUPS, 1]`, exact in fp32."""
    grouped = tl.reshape(codes, (codes.shape[0], GROUPS, codes.shape[1] // GROUPS))
    return tl.reshape(grouped - zeros, codes.shape)


@triton.jit
def zero_weights(scales, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, DTYPE: tl.constexpr):
    """`[ROWS, COLUMNS]` of `0 * scale`: what a dropped weight decodes to (-0.0 under a negative scale)."""
    zeros = (scales * 0.0).to(DTYPE)
    return tl.reshape(tl.broadcast_to(zeros, (ROWS, GROUPS, COLUMNS // GROUPS)), (ROWS, COLUMNS))


@triton.jit
def spread_pairs(kept, positions, fill, BM: tl.constexpr, BK: tl.constexpr):
    """Kept values `[BM, BK / 2]` at their columns of each group of four; `fill` everywhere else."""
    first, second = tl.split(tl.reshape(kept, (BM, BK // 4, 2)))
    packed = tl.load(positions + tl.arange(0, BM)[:, None] * (BK // 8) + tl.arange(0, BK // 8)[None, :]).to(tl.uint32)
    nibble = tl.reshape(tl.join(packed & 15, packed >> 4), (BM, BK // 4))
    at, then = nibble & 3, nibble >> 2
    column0 = tl.where(at == 0, first, fill)
    column1 = tl.where(at == 1, first, tl.where(then == 1, second, fill))
    column2 = tl.where(at == 2, first, tl.where(then == 2, second, fill))
    column3 = tl.where(then == 3, second, fill)
    return tl.reshape(tl.join(tl.join(column0, column2), tl.join(column1, column3)), (BM, BK))
