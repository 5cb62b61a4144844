"""Which weights of a tile are kept, as bits: what formats with unstructured zeros share.

A tile is taken in *strips* of 16 rows and, within a strip, two columns at a time: a mask word of
32 bits. Weights are ordered by strip, pair of columns and bit. Planes are thus in the order in which
a CPU's lanes read them, and need no second copy there (n:m up to a quarter is packed otherwise, `_nm_picked_c.py`).

Bits of a word: row r of column c is bit 16 c + r; with `paired` it is bit 2 r + c, so that a row's two
16-bit values are one 32-bit lane (what bf16 is multiplied in).
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from stoicc.ir.errors import FormatError
from stoicc.ir.format import Tile

ROWS = 16
"""Rows of a strip."""
_BITS = (torch.arange(256)[:, None] >> torch.arange(8) & 1).bool()


def check_tile(name: str, tile: Tile) -> None:
    """FormatError unless the tile is made of whole strips and pairs of columns."""
    if tile[0] % ROWS or tile[1] % 2:
        raise FormatError(
            f"format {name}: expected tiles of a multiple of 16 rows and of 2 columns, found {tile[0]}x{tile[1]}; "
            "choose another tile"
        )


def in_order(tiles: Tensor, paired: bool) -> Tensor:
    """`[T, BM, BK]` -> `[T, BM / 16, BK / 2, 32]`, contiguous: by strip, pair of columns and bit."""
    split = tiles.unflatten(2, (-1, 2)).unflatten(1, (-1, ROWS))  # T, strip, row, pair, column
    return split.permute((0, 1, 3, 2, 4) if paired else (0, 1, 3, 4, 2)).flatten(3).contiguous()


def as_tiles(ordered: Tensor, paired: bool) -> Tensor:
    """The inverse of `in_order`."""
    split = ordered.unflatten(3, (ROWS, 2) if paired else (2, ROWS))
    return split.permute((0, 1, 3, 2, 4) if paired else (0, 1, 4, 2, 3)).flatten(3).flatten(1, 2).contiguous()


def pack_bits(kept: Tensor) -> Tensor:
    """Bool `[..., 32]` -> int32 `[...]`, the first in the lowest bit.

    Eight bool bytes read as one int64 have a bit at 0, 8, .. 56; one multiplication brings them to the
    top eight bits, with no two products in the same place.
    """
    octets = kept.contiguous().view(torch.int64) * 0x0102040810204080 >> 56
    return octets.to(torch.uint8).view(torch.int32).squeeze(-1)


def unpack_bits(masks: Tensor) -> Tensor:
    """The inverse of `pack_bits`: int32 `[...]` -> bool `[..., 32]`."""
    octets = masks.contiguous().view(torch.uint8)
    table = _BITS.to(masks.device)
    return table.index_select(0, octets.flatten().int()).view(*masks.shape, 32)


def places(kept: Tensor) -> Tensor:
    """Where a bool tensor is true, as it lies in memory: int64 `[n]`. On a CPU ten times as fast as indexing by it."""
    if kept.device.type != "cpu":
        return kept.flatten().nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(kept.numpy()))


def taken(values: Tensor, kept: Tensor) -> Tensor:
    """`values[kept]`."""
    return values.flatten().index_select(0, places(kept))


def offsets(counts: Tensor) -> Tensor:
    """Lengths `[n]` of runs -> where each begins, and the end: int64 `[n + 1]`."""
    return torch.cat((counts.new_zeros(1, dtype=torch.int64), counts.cumsum(0)))


def starts(strips: Tensor) -> Tensor:
    """Kept weights of each strip `[T, BM / 16]` -> where in its tile's run each strip begins, int32."""
    return (strips.cumsum(1) - strips).to(torch.int32)


# ---- Triton ---------------------------------------------------------------------------------


@triton.jit
def ones(words):
    """How many bits are set in each word (compilers know this as one instruction)."""
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def ranks(masks, starts, BM: tl.constexpr, BK: tl.constexpr, PAIRED: tl.constexpr):
    """For both columns of each pair `[BM, BK / 2]`: whether a weight is kept (0 or 1), and its place in the run.

    `starts` `[BM / 16, 1]` is where each strip's weights begin.
    """
    strips = tl.arange(0, BM // 16)[:, None]
    words = tl.load(masks + strips * (BK // 2) + tl.arange(0, BK // 2)[None, :]).to(tl.uint32, bitcast=True)
    counts = ones(words)
    before = tl.cumsum(counts, 1) - counts + starts
    word = tl.reshape(tl.broadcast_to(words[:, None, :], (BM // 16, 16, BK // 2)), (BM, BK // 2))
    base = tl.reshape(tl.broadcast_to(before[:, None, :], (BM // 16, 16, BK // 2)), (BM, BK // 2))
    row = (tl.arange(0, BM)[:, None] & 15).to(tl.uint32)
    if PAIRED:
        bit = row * 2
        other = bit + 1
    else:
        bit = row
        other = row + 16
    one = tl.full((BM, 1), 1, tl.uint32)
    first, second = (word >> bit) & 1, (word >> other) & 1
    place = base + ones(word & ((one << bit) - 1))
    if PAIRED:
        then = place + first.to(tl.int32)
    else:
        then = base + ones(word & ((one << other) - 1))
    return first, second, place, then


@triton.jit
def woven(even, odd, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    """Even and odd columns `[BM, BK / 2]` as one tile.

    Bits are joined, not floats: with the reshape right before a dot, Triton 3.6 would give the halves the layout of
    Hopper's shared operands, which they are too narrow for, and abort ("Illegal shared layout").
    """
    if DTYPE == tl.float32:
        both = tl.join(even.to(tl.int32, bitcast=True), odd.to(tl.int32, bitcast=True))
    else:
        both = tl.join(even.to(tl.int16, bitcast=True), odd.to(tl.int16, bitcast=True))
    return tl.reshape(both, (BM, BK)).to(DTYPE, bitcast=True)
