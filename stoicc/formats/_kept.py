"""The codes of the weights that are kept: what a composed format stores, in the order of a CPU's lanes.

A mask that keeps as many weights of every row has a simpler order, in `_kept_rows.py`. For any other, a tile is taken
in *blocks* of 16 rows by 4 columns, strip by strip. A block has a mask of 64 bits, bit 4 r + c for row r and column c,
and the codes of its kept weights in that order, the first in a byte's lowest bits. Each block's codes begin with a byte
of their own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stoicc.formats._mask import ROWS, offsets
from stoicc.formats._mask import pack_bits as pack_words
from stoicc.formats._mask import unpack_bits as unpack_words
from stoicc.ir.errors import FormatError
from stoicc.ir.format import Plane, PlaneKind, Planes, Tile

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


@dataclass(frozen=True)
class KeptRuns:
    """Masks i64 `[BM / 16, BK / 4]`, where the run of each strip starts, and the runs of a tile: for any mask."""

    bits: int

    def planes(self, tile: Tile) -> tuple[Plane, ...]:
        strips = tile[0] // ROWS
        return (
            Plane("masks", "i64", (strips, tile[1] // COLUMNS)),
            Plane("starts", "i32", (strips,)),
            Plane("codes", "u8", (), PlaneKind.RAGGED),
        )

    def pack(self, codes: Tensor, kept: Tensor) -> Planes:
        """Codes u8 `[T, BM, BK]`, of which some are kept -> planes."""
        blocks, kept = in_blocks(codes), in_blocks(kept)
        sizes = run_bytes(kept, self.bits)
        runs = blocks.new_zeros(int(sizes.sum()), 8 // self.bits)
        runs.view(-1)[_places(kept, sizes, self.bits)] = blocks[kept]
        strips = sizes.sum(2)
        return {
            "masks": pack_words(kept.unflatten(3, (2, 32))).view(torch.int64).squeeze(-1),
            "starts": (strips.cumsum(1) - strips).to(torch.int32),
            "codes": pack_rows(runs, self.bits).flatten(),
            "codes_ptr": offsets(strips.sum(1)),
        }

    def unpack(self, planes: Planes) -> tuple[Tensor, Tensor]:
        """The inverse of `pack`: codes u8 `[T, BM, BK]`, 0 where none is kept, and the kept ones as bool."""
        masks = planes["masks"]
        kept = unpack_words(masks.contiguous().view(torch.int32).unflatten(2, (-1, 2))).flatten(3)
        blocks = planes["codes"].new_zeros(kept.shape)
        runs = unpack_rows(planes["codes"], self.bits)
        blocks[kept] = runs[_places(kept, run_bytes(kept, self.bits), self.bits)]
        return as_tiles(blocks), as_tiles(kept)


def _places(kept: Tensor, sizes: Tensor, bits: int) -> Tensor:
    """For every kept weight, in order, where its code stands among the codes of all runs."""
    first = (sizes.flatten().cumsum(0) - sizes.flatten()) * (8 // bits)
    return (first.view(*sizes.shape, 1) + kept.cumsum(3) - 1)[kept]


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes u8 `[..., n]` -> bytes `[..., n * bits / 8]`, the first in the lowest bits."""
    return join_fields(codes, bits, -1)


def join_fields(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Each 8 / bits codes u8 that follow one another along a dimension as one byte, the first in the lowest bits."""
    parts = codes.unflatten(dim, (-1, 8 // bits)).unbind(dim if dim < 0 else dim + 1)
    packed = parts[0]
    for field, part in enumerate(parts[1:], 1):
        packed = packed | part << bits * field
    return packed


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_rows`."""
    return torch.stack([packed >> bits * field & (1 << bits) - 1 for field in range(8 // bits)], -1).flatten(-2)
