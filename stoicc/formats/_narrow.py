"""Codes of 2 and 3 bits: how they are packed in bytes, and how Triton unpacks them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stoicc.formats._device import code_at


def pack_crumbs(codes: Tensor) -> Tensor:
    """Codes below 4 `[..., n]` -> bytes `[..., n / 4]`, the first of four in the lowest bits."""
    return codes[..., 0::4] | codes[..., 1::4] << 2 | codes[..., 2::4] << 4 | codes[..., 3::4] << 6


def unpack_crumbs(packed: Tensor) -> Tensor:
    """The inverse of `pack_crumbs`."""
    return torch.stack([packed >> 2 * i & 3 for i in range(4)], -1).flatten(-2)


def pack_bits(codes: Tensor) -> Tensor:
    """Zeros and ones u8 `[..., n]` -> bytes `[..., n / 8]`, the first of eight in the lowest bit."""
    packed = codes[..., 0::8].clone(memory_format=torch.contiguous_format)  # else a view of no entries has odd strides
    for i in range(1, 8):
        packed |= codes[..., i::8] << i
    return packed


def unpack_bits(packed: Tensor) -> Tensor:
    """The inverse of `pack_bits`."""
    return torch.stack([packed >> i & 1 for i in range(8)], -1).flatten(-2)


@triton.jit
def crumbs(words, ZERO: tl.constexpr):
    """`[R, W]` uint32 -> `[R, 16 * W]` fp32: the sixteen 2-bit codes of each word minus ZERO, lowest first."""
    top = words >> 16
    first = tl.join(
        tl.join(
            tl.join(code_at(words, 0, 3, ZERO), code_at(top, 0, 3, ZERO)),
            tl.join(code_at(words, 8, 3, ZERO), code_at(top, 8, 3, ZERO)),
        ),
        tl.join(
            tl.join(code_at(words, 4, 3, ZERO), code_at(top, 4, 3, ZERO)),
            tl.join(code_at(words, 12, 3, ZERO), code_at(top, 12, 3, ZERO)),
        ),
    )
    second = tl.join(
        tl.join(
            tl.join(code_at(words, 2, 3, ZERO), code_at(top, 2, 3, ZERO)),
            tl.join(code_at(words, 10, 3, ZERO), code_at(top, 10, 3, ZERO)),
        ),
        tl.join(
            tl.join(code_at(words, 6, 3, ZERO), code_at(top, 6, 3, ZERO)),
            tl.join(code_at(words, 14, 3, ZERO), code_at(top, 14, 3, ZERO)),
        ),
    )
    return tl.reshape(tl.join(first, second), (words.shape[0], words.shape[1] * 16))


@triton.jit
def load_halves(plane, ROWS: tl.constexpr, HALVES: tl.constexpr):
    """`[ROWS, HALVES]` uint32: a plane of bytes, two at a time."""
    halves = plane.to(tl.pointer_type(tl.uint16), bitcast=True)
    return tl.load(halves + tl.arange(0, ROWS)[:, None] * HALVES + tl.arange(0, HALVES)[None, :]).to(tl.uint32)


@triton.jit
def three_at(words, high, J: tl.constexpr, ZERO: tl.constexpr):
    """Code J of sixteen minus ZERO, as fp32: two bits of `words` and, above them, one of `high` (moved up by 2)."""
    return code_at(((words >> (2 * J)) & 3) | ((high >> J) & 4), 0, 7, ZERO)


@triton.jit
def threes(words, high, ZERO: tl.constexpr):
    """`[R, W]` uint32 of lower bits and of highest bits -> `[R, 16 * W]` fp32: codes minus ZERO, lowest first."""
    high = high << 2
    first = tl.join(
        tl.join(
            tl.join(three_at(words, high, 0, ZERO), three_at(words, high, 8, ZERO)),
            tl.join(three_at(words, high, 4, ZERO), three_at(words, high, 12, ZERO)),
        ),
        tl.join(
            tl.join(three_at(words, high, 2, ZERO), three_at(words, high, 10, ZERO)),
            tl.join(three_at(words, high, 6, ZERO), three_at(words, high, 14, ZERO)),
        ),
    )
    second = tl.join(
        tl.join(
            tl.join(three_at(words, high, 1, ZERO), three_at(words, high, 9, ZERO)),
            tl.join(three_at(words, high, 5, ZERO), three_at(words, high, 13, ZERO)),
        ),
        tl.join(
            tl.join(three_at(words, high, 3, ZERO), three_at(words, high, 11, ZERO)),
            tl.join(three_at(words, high, 7, ZERO), three_at(words, high, 15, ZERO)),
        ),
    )
    return tl.reshape(tl.join(first, second), (words.shape[0], words.shape[1] * 16))
