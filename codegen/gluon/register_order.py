"""Tiles in the order in which tensor-core registers take them: one contiguous blob a tile, and back.

A blob is four sections of 32-bit words, each ordered by what a warp reads at once:

    operands    [BK / 64][vectors][BM / 16][32 lanes][width]
    positions   [BK / 64][BM / 16][32 lanes]                    sparse operands only
    scales      [groups][BM / 16][8 row pairs]                  where sums are scaled
    zeros       [groups][BM / 16][8 row pairs]                  where there are zero points

BM / 16 counts m-tiles of 16 rows. With g = lane // 4 and t = lane % 4 (PTX ISA, fragments of
`mma.m16n8k16` and `mma.sp.m16n8k32`):

- register r of a lane's operand holds row g + 8 * (r % 2), columns 2 t + 8 * (r // 2) and the next, of the 16 (kept)
  columns of a fragment. A lane reads the fragments of 64 columns in `vectors` runs of `width` words.
- a lane's word of positions holds columns 16 t .. 16 t + 15 of 64: row g in the lower half, row g + 8 in the upper.
  Half of it serves the first 32 columns (sparsity selector 0), half the others (selector 1).
- a row pair is row g in the lower half of a word and row g + 8 in the upper.

`ir/fragment.py` says where codes stand in a word. The functions here are exact inverses.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.fragment import Fragment, Operands, Tile

MTILE = 16
"""Rows of one `mma`."""
STEP = 64
"""Columns whose operands a lane reads in one go: one word of positions covers them."""
CHUNK = 4
"""Words of a 16-byte copy; blobs are whole chunks."""


@dataclass(frozen=True)
class BlobLayout:
    """Where the sections of a format's blob begin, in words.

    Attributes:
        vectors, width: a lane reads the operands of 64 columns as `vectors` runs of `width` words.
        positions, scales, zeros: first word of the section; where there is none, of what follows it.
        words: of the whole blob.
    """

    tile: Tile
    bits: int
    sparse: bool
    groups: int
    zero_points: bool
    vectors: int
    width: int
    positions: int
    scales: int
    zeros: int
    words: int

    @staticmethod
    def of(fragment: Fragment, tile: Tile) -> "BlobLayout":
        """The layout for tiles `(BM, BK)`, BM a multiple of 64 and BK of 64."""
        mtiles, steps = tile[0] // MTILE, tile[1] // STEP
        lane_words = fragment.bits // (2 if fragment.sparse else 1)
        width = min(lane_words, CHUNK)
        positions = steps * mtiles * 32 * lane_words
        scales = positions + (steps * mtiles * 32 if fragment.sparse else 0)
        pairs = fragment.groups * mtiles * 8
        zeros = scales + pairs
        words = zeros + (pairs if fragment.zero_points else 0)
        return BlobLayout(
            tile, fragment.bits, fragment.sparse, fragment.groups, fragment.zero_points,
            lane_words // width, width, positions, scales, zeros, words,
        )  # fmt: skip

    @property
    def mtiles(self) -> int:
        return self.tile[0] // MTILE

    @property
    def steps(self) -> int:
        return self.tile[1] // STEP

    @property
    def chunks(self) -> int:
        """16-byte chunks of a blob."""
        return self.words // CHUNK


def pack(operands: Operands, layout: BlobLayout) -> Tensor:
    """Operands of T tiles -> int32 `[T, words]`."""
    tiles = operands.values.shape[0]
    sections = [_operand_words(operands.values, layout)]
    if layout.sparse:
        assert operands.positions is not None
        sections.append(_position_words(operands.positions, layout))
    if layout.groups:
        assert operands.scales is not None
        sections.append(_row_pairs(operands.scales.view(torch.int16), layout))
    if layout.zero_points:
        assert operands.zeros is not None and operands.scales is not None
        less = operands.zeros.to(torch.int16) - (1 << (layout.bits - 1))
        sections.append(_row_pairs(less.to(operands.scales.dtype).view(torch.int16), layout))
    return torch.cat([section.reshape(tiles, -1) for section in sections], 1)


def unpack(blobs: Tensor, layout: BlobLayout, dtype: str) -> Operands:
    """The exact inverse of `pack`: int32 `[T, words]` -> operands, scales in the weight's dtype."""
    ends = [layout.positions, layout.scales, layout.zeros, layout.words]
    values, positions, scales, zeros = (
        blobs[:, begin:end].contiguous() for begin, end in zip([0, *ends], ends, strict=False)
    )
    operands = Operands(_operand_values(values, layout))
    if layout.sparse:
        operands = replace(operands, positions=_position_bytes(positions, layout))
    if layout.groups:
        operands = replace(operands, scales=_rows(scales, layout).view(TORCH_DTYPES[dtype]))
    if layout.zero_points:
        less = _rows(zeros, layout).view(TORCH_DTYPES[dtype]).to(torch.int16)
        operands = replace(operands, zeros=(less + (1 << (layout.bits - 1))).to(torch.uint8))
    return operands


# ---- operands -------------------------------------------------------------------------------


def _operand_words(values: Tensor, layout: BlobLayout) -> Tensor:
    """`[T, BM, C]` -> int32 `[T, steps, vectors, mtiles, 8, 4, width]`."""
    tiles, per_word = values.shape[0], 16 // layout.bits  # registers whose codes share a word
    # a row is (m-tile, upper half, g); a column is (step, fragment, upper half, t, element)
    split = values.view(tiles, layout.mtiles, 2, 8, layout.steps, -1, 2, 4, 2)
    registers = split.permute(0, 4, 1, 3, 7, 5, 6, 2, 8).reshape(tiles, layout.steps, layout.mtiles, 8, 4, -1, 4, 2)
    words = _join(registers.unflatten(6, (-1, per_word)).transpose(-1, -2), layout.bits)
    vectors = words.view(tiles, layout.steps, layout.mtiles, 8, 4, layout.vectors, layout.width)
    return vectors.permute(0, 1, 5, 2, 3, 4, 6)


def _operand_values(words: Tensor, layout: BlobLayout) -> Tensor:
    """The inverse of `_operand_words`."""
    tiles, per_word = words.shape[0], 16 // layout.bits
    vectors = words.view(tiles, layout.steps, layout.vectors, layout.mtiles, 8, 4, layout.width)
    lanes = vectors.permute(0, 1, 3, 4, 5, 2, 6).reshape(tiles, layout.steps, layout.mtiles, 8, 4, -1)
    codes = _cut(lanes, layout.bits).unflatten(-1, (2, per_word)).transpose(-1, -2)
    split = codes.reshape(tiles, layout.steps, layout.mtiles, 8, 4, -1, 2, 2, 2)
    return split.permute(0, 2, 7, 3, 1, 5, 6, 4, 8).reshape(tiles, layout.tile[0], -1)


def _join(codes: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits `[..., 2, 16 / bits]`, lowest first -> int32 `[...]`."""
    codes = codes.contiguous().flatten(-2)
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return codes.contiguous().view(torch.int32)


def _cut(words: Tensor, bits: int) -> Tensor:
    """int32 `[..., n]` -> codes `[..., n, 32 / bits]`, lowest first: uint8, or int16 for 16 bits."""
    words = words.contiguous()[..., None]
    if bits == 16:
        return words.view(torch.int16)
    pieces = words.view(torch.uint8)
    return torch.stack((pieces & 15, pieces >> 4), -1).flatten(-2) if bits == 4 else pieces


# ---- positions, scales, zeros ---------------------------------------------------------------


def _position_words(positions: Tensor, layout: BlobLayout) -> Tensor:
    """uint8 `[T, BM, BK / 8]` -> int32 `[T, steps, mtiles, 8, 4, 1]`: two bytes hold 16 columns."""
    split = positions.view(positions.shape[0], layout.mtiles, 2, 8, layout.steps, 4, 2)
    return split.permute(0, 4, 1, 3, 5, 2, 6).flatten(-2).contiguous().view(torch.int32)


def _position_bytes(words: Tensor, layout: BlobLayout) -> Tensor:
    split = words.view(torch.uint8).view(words.shape[0], layout.steps, layout.mtiles, 8, 4, 2, 2)
    return split.permute(0, 2, 5, 3, 1, 4, 6).reshape(words.shape[0], layout.tile[0], -1)


def _row_pairs(rows: Tensor, layout: BlobLayout) -> Tensor:
    """int16 `[T, BM, G]` -> int32 `[T, G, mtiles, 8, 1]`."""
    split = rows.view(rows.shape[0], layout.mtiles, 2, 8, layout.groups)
    return split.permute(0, 4, 1, 3, 2).contiguous().view(torch.int32)


def _rows(pairs: Tensor, layout: BlobLayout) -> Tensor:
    split = pairs.view(torch.int16).view(pairs.shape[0], layout.groups, layout.mtiles, 8, 2)
    return split.permute(0, 2, 4, 3, 1).reshape(pairs.shape[0], layout.tile[0], layout.groups)
