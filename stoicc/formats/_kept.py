"""The codes of the weights that are kept: what a composed format stores, in the order of a CPU's lanes.

A tile is taken in *blocks* of 16 rows by 4 columns, strip by strip. A block has a mask of 64 bits, bit 4 r + c for
row r and column c, and the codes of its kept weights in that order, the first in a byte's lowest bits. Each block's
codes begin with a byte of their own.
"""

import torch
from torch import Tensor

from stoicc.formats._mask import ROWS, offsets
from stoicc.formats._mask import pack_bits as pack_words
from stoicc.formats._mask import unpack_bits as unpack_words
from stoicc.ir.errors import FormatError
from stoicc.ir.format import Planes, Tile

COLUMNS = 4
"""Of a block."""


def check_tile(name: str, tile: Tile) -> None:
    """FormatError unless the tile is made of whole blocks."""
    if tile[0] % ROWS or tile[1] % COLUMNS:
        raise FormatError(
            f"format {name}: expected tiles of a multiple of 16 rows and of 4 columns, found {tile[0]}x{tile[1]}; "
            "choose another tile"
        )


def in_blocks(tiles: Tensor) -> Tensor:
    """`[T, BM, BK]` -> `[T, BM / 16, BK / 4, 64]`, contiguous."""
    split = tiles.unflatten(2, (-1, COLUMNS)).unflatten(1, (-1, ROWS))  # T, strip, row, block, column
    return split.transpose(2, 3).flatten(3).contiguous()


def as_tiles(blocks: Tensor) -> Tensor:
    """The inverse of `in_blocks`."""
    return blocks.unflatten(3, (ROWS, COLUMNS)).transpose(2, 3).flatten(3).flatten(1, 2).contiguous()


def run_bytes(kept: Tensor, bits: int) -> Tensor:
    """Bytes of the codes of each block: bool `[..., 64]` -> int64 `[...]`."""
    return (kept.sum(-1) * bits + 7) // 8


def pack(codes: Tensor, kept: Tensor, bits: int) -> Planes:
    """Planes of the kept ones of codes u8 `[T, BM, BK]`: masks, where each strip's run starts, runs of bytes."""
    blocks, kept = in_blocks(codes), in_blocks(kept)
    sizes = run_bytes(kept, bits)
    runs = blocks.new_zeros(int(sizes.sum()), 8 // bits)
    runs.view(-1)[_places(kept, sizes, bits)] = blocks[kept]
    packed = runs[:, 0]
    for field in range(1, 8 // bits):
        packed = packed | runs[:, field] << bits * field
    strips = sizes.sum(2)
    return {
        "masks": pack_words(kept.unflatten(3, (2, 32))).view(torch.int64).squeeze(-1),
        "starts": (strips.cumsum(1) - strips).to(torch.int32),
        "codes": packed.contiguous(),
        "codes_ptr": offsets(strips.sum(1)),
    }


def unpack(planes: Planes, bits: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: codes u8 `[T, BM, BK]`, 0 where none is kept, and the kept ones as bool."""
    masks = planes["masks"]
    kept = unpack_words(masks.contiguous().view(torch.int32).unflatten(2, (-1, 2))).flatten(3)
    packed = planes["codes"]
    runs = torch.stack([packed >> bits * field & (1 << bits) - 1 for field in range(8 // bits)], -1).flatten()
    blocks = packed.new_zeros(kept.shape)
    blocks[kept] = runs[_places(kept, run_bytes(kept, bits), bits)]
    return as_tiles(blocks), as_tiles(kept)


def _places(kept: Tensor, sizes: Tensor, bits: int) -> Tensor:
    """For every kept weight, in order, where its code stands among the codes of all runs."""
    first = (sizes.flatten().cumsum(0) - sizes.flatten()) * (8 // bits)
    return (first.view(*sizes.shape, 1) + kept.cumsum(3) - 1)[kept]


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes u8 `[..., n]` -> bytes `[..., n * bits / 8]`, the first in the lowest bits."""
    fields = codes.unflatten(-1, (-1, 8 // bits))
    packed = fields[..., 0]
    for field in range(1, 8 // bits):
        packed = packed | fields[..., field] << bits * field
    return packed


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_rows`."""
    return torch.stack([packed >> bits * field & (1 << bits) - 1 for field in range(8 // bits)], -1).flatten(-2)
