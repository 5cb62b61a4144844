"""Triton decode of composed formats: the codes of kept weights to their places, then the other format's decode."""

import triton
import triton.language as tl

from stoicc.formats._device import load_groups, scale_codes, shift_codes
from stoicc.formats._float_device import e2m1_at, e4m3, e5m2, e8m0
from stoicc.formats._mask import ones


@triton.jit
def to_rows(blocks, BM: tl.constexpr, BK: tl.constexpr):
    """`[BM / 16, BK / 4]` -> `[BM, BK / 4]`: each block's value in all of its rows."""
    return tl.reshape(tl.broadcast_to(blocks[:, None, :], (BM // 16, 16, BK // 4)), (BM, BK // 4))


@triton.jit
def columns(first, second, third, fourth, BM: tl.constexpr, BK: tl.constexpr):
    """`[BM, BK / 4]` of each of four columns -> `[BM, BK]`."""
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (BM, BK))


@triton.jit
def kept_codes(masks, starts, codes, count, BM: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr):
    """Whether each weight is kept (0 or 1), and its code, both uint32 `[BM, BK]`.

    A block is 64 weights of four columns. Of a row of one, four bits of the mask say what is kept, and its codes, at
    most four, follow each other: they are loaded as one word.
    """
    strips = tl.arange(0, BM // 16)[:, None]
    words = tl.load(masks + strips * (BK // 4) + tl.arange(0, BK // 4)[None, :])
    low, high = words.to(tl.uint32), (words >> 32).to(tl.uint32)
    fewer = ones(low)
    sizes = ((fewer + ones(high)) * BITS + 7) >> 3
    start = (tl.cumsum(sizes, 1) - sizes + tl.load(starts + strips)) * 8
    row = tl.arange(0, BM)[:, None] & 15
    own = tl.where(row < 8, to_rows(low, BM, BK), to_rows(high, BM, BK))
    start = tl.where(row < 8, to_rows(start, BM, BK), to_rows(start + fewer * BITS, BM, BK))
    bit = (row.to(tl.uint32) & 7) * 4
    one = tl.full((BM, 1), 1, tl.uint32)
    at = start + ones(own & ((one << bit) - 1)) * BITS
    return four_codes(own >> bit, codes, at, count, BM, BK, BITS)


@triton.jit
def four_codes(four, codes, at, count, BM: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr):
    """Of the low four bits of a mask `[BM, BK / 4]` and the bit where their codes begin: kept, and codes `[BM, BK]`."""
    byte = at >> 3
    word = tl.load(codes + byte, mask=byte < count, other=0).to(tl.uint32)
    for i in tl.static_range(1, (BITS * 3 + 7) // 8 + 1):
        more = tl.load(codes + byte + i, mask=byte + i < count, other=0).to(tl.uint32)
        word = word | (more << (8 * i))
    if BITS < 8:
        word = word >> (at & 7).to(tl.uint32)
    k0, k1, k2, k3 = four & 1, (four >> 1) & 1, (four >> 2) & 1, (four >> 3) & 1
    second = word >> (k0 * BITS)
    third = second >> (k1 * BITS)
    code = columns(word, second, third, third >> (k2 * BITS), BM, BK) & ((1 << BITS) - 1)
    return columns(k0, k1, k2, k3, BM, BK), code


@triton.jit
def row_codes(masks, codes, BM: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """The same of rows that keep N of every M, 4, 8 or 16: how many stand before a word of the mask is known."""
    WIDTH: tl.constexpr = 16 if M == 16 else 8
    row, group = tl.arange(0, BM)[:, None], tl.arange(0, BK // 4)[None, :]
    words = masks.to(tl.pointer_type(tl.uint16), bitcast=True) if M == 16 else masks
    word = tl.load(words + row * (BK // WIDTH) + group * 4 // WIDTH).to(tl.uint32)
    bit = (group * 4 % WIDTH).to(tl.uint32)
    one = tl.full((1, BK // 4), 1, tl.uint32)
    before = (row * (BK // WIDTH) + group * 4 // WIDTH) * (WIDTH * N // M) + ones(word & ((one << bit) - 1))
    return four_codes(word >> bit, codes, before * BITS, BM * BK * N // M * BITS // 8, BM, BK, BITS)


@triton.jit
def decode_kept(
    masks, starts, codes, count, scales,
    BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr,
    VALUES: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Kept weights of codes with one plane beside them, zeros between."""
    kept, code = kept_codes(masks, starts, codes, count, BM, BK, BITS)
    return tl.where(kept != 0, VALUES(code, scales, BM, BK, DTYPE, GROUPS, BITS), 0.0).to(DTYPE)


@triton.jit
def decode_kept_2(
    masks, starts, codes, count, scales, second,
    BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr,
    VALUES: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Kept weights of codes with two planes beside them, zeros between."""
    kept, code = kept_codes(masks, starts, codes, count, BM, BK, BITS)
    return tl.where(kept != 0, VALUES(code, scales, second, BM, BK, DTYPE, GROUPS, BITS), 0.0).to(DTYPE)


@triton.jit
def decode_rows(
    masks, codes, scales,
    BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr,
    VALUES: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Kept weights of rows with N of every M, of codes with one plane beside them."""
    kept, code = row_codes(masks, codes, BM, BK, BITS, N, M)
    return tl.where(kept != 0, VALUES(code, scales, BM, BK, DTYPE, GROUPS, BITS), 0.0).to(DTYPE)


@triton.jit
def decode_rows_2(
    masks, codes, scales, second,
    BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr,
    VALUES: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The same of codes with two planes beside them."""
    kept, code = row_codes(masks, codes, BM, BK, BITS, N, M)
    return tl.where(kept != 0, VALUES(code, scales, second, BM, BK, DTYPE, GROUPS, BITS), 0.0).to(DTYPE)


# ---- what a code means, for `Elements.values` ---------------------------------------------------


@triton.jit
def symmetric_values(
    codes, scales, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr
):
    """`(code - half the range) * scale`."""
    steps = codes.to(tl.float32) - (1 << (BITS - 1)) * 1.0
    return scale_codes(steps, load_groups(scales, BM, GROUPS), GROUPS, DTYPE)


@triton.jit
def affine_values(
    codes, scales, zeros,
    BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """`(code - zero) * scale`."""
    steps = shift_codes(codes.to(tl.float32), load_groups(zeros, BM, GROUPS), GROUPS)
    return scale_codes(steps, load_groups(scales, BM, GROUPS), GROUPS, DTYPE)


@triton.jit
def e4m3_values(
    codes, scales, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr
):
    """fp8 of kind e4m3 times a scale."""
    return scale_codes(e4m3(codes), load_groups(scales, BM, GROUPS), GROUPS, DTYPE)


@triton.jit
def e5m2_values(
    codes, scales, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr
):
    """fp8 of kind e5m2 times a scale."""
    return scale_codes(e5m2(codes), load_groups(scales, BM, GROUPS), GROUPS, DTYPE)


@triton.jit
def mxfp4_values(
    codes, scales, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr
):
    """4-bit floats times a power of two."""
    return scale_codes(e2m1_at(codes, 0), e8m0(load_groups(scales, BM, GROUPS)), GROUPS, DTYPE)


@triton.jit
def nvfp4_values(
    codes, scales, tensor_scale,
    BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """4-bit floats times a block's scale times the tensor's."""
    scale = e4m3(load_groups(scales, BM, GROUPS)) * tl.load(tensor_scale)
    return scale_codes(e2m1_at(codes, 0), scale, GROUPS, DTYPE)
