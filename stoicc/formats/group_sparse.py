"""4-bit codes in groups along K of which some are dropped: codes and a scale for each group that is kept.

Source: GQSA, group quantization and sparsity (Zeng et al. 2024, arXiv 2412.17560): pruning takes whole groups, so that
an index counts groups and not weights.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from stoicc.formats import _group_sparse_c
from stoicc.formats._affine import Affine, GroupGrid, dequantize
from stoicc.formats._device import code_at, scale_codes, shift_codes
from stoicc.formats._mask import ROWS, offsets, ones
from stoicc.ir.dtypes import TORCH_DTYPES, bits, itemsize
from stoicc.ir.errors import FormatError
from stoicc.ir.format import (
    Elements,
    Plane,
    PlaneKind,
    Planes,
    Tile,
    TileCodes,
    TileFormat,
    TileMac,
    TritonDecode,
    nonzero_codes,
)
from stoicc.ir.registry import register_format

WORD = 8
"""Codes of a word."""
NO_CODES = -0x77777778
"""A word of codes that are 8, which is zero without zero points."""


@triton.jit
def kept_groups(masks, BM: tl.constexpr, GROUPS: tl.constexpr):
    """Of each row's groups `[BM, GROUPS]`: whether it is kept, its place among those of its column, how many the
    columns before keep and how many its own, as int32."""
    strips = tl.arange(0, BM // 16)[:, None]
    words = tl.load(masks + tl.arange(0, GROUPS)[None, :] * (BM // 16) + strips).to(tl.uint32) & 0xFFFF
    counts = ones(words)
    above = tl.cumsum(counts, 0) - counts
    all = tl.broadcast_to(tl.sum(counts, 0)[None, :], (BM // 16, GROUPS))
    before = tl.cumsum(all, 1) - all
    word, above = in_rows(words, BM, GROUPS), in_rows(above, BM, GROUPS)
    bit = (tl.arange(0, BM)[:, None] & 15).to(tl.uint32)
    one = tl.full((BM, 1), 1, tl.uint32)
    rank = above + ones(word & ((one << bit) - 1))
    return ((word >> bit) & 1) != 0, rank, in_rows(before, BM, GROUPS), in_rows(all, BM, GROUPS)


@triton.jit
def in_rows(strips, BM: tl.constexpr, GROUPS: tl.constexpr):
    """`[BM / 16, GROUPS]` -> `[BM, GROUPS]`."""
    return tl.reshape(tl.broadcast_to(strips[:, None, :], (BM // 16, 16, GROUPS)), (BM, GROUPS))


@triton.jit
def group_codes(codes, kept, rank, base, count, WORDS: tl.constexpr):
    """Codes `[BM, K]` as fp32: each kept group's words stand `count` apart, eight codes to a word; 8 elsewhere."""
    word = tl.arange(0, WORDS)[None, None, :]
    at = base[:, :, None] * WORDS + word * count[:, :, None] + rank[:, :, None]
    words = tl.load(codes + at, mask=kept[:, :, None], other=-0x77777778).to(tl.uint32, bitcast=True)
    words = tl.reshape(words, (words.shape[0], words.shape[1] * WORDS))
    top = words >> 12
    even = tl.join(
        tl.join(code_at(words, 0, 15, 0), code_at(words, 4, 15, 0)),
        tl.join(code_at(words, 16, 15, 0), code_at(top, 8, 15, 0)),
    )
    odd = tl.join(
        tl.join(code_at(words, 8, 15, 0), code_at(words, 12, 15, 0)),
        tl.join(code_at(top, 12, 15, 0), code_at(top, 16, 15, 0)),
    )
    return tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1] * 8))


@triton.jit
def decode_group_sparse(
    masks, codes, words, scales, kept_count,
    BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """`(code - 8) * scale` in groups that are kept."""
    kept, rank, base, count = kept_groups(masks, BM, GROUPS)
    values = group_codes(codes, kept, rank, base, count, BK // GROUPS // 8) - 8.0
    scale = tl.load(scales + base + rank, mask=kept, other=0.0)
    return scale_codes(values, scale[:, :, None], GROUPS, DTYPE)


@triton.jit
def decode_group_sparse_zeros(
    masks, codes, words, scales, kept_count, zeros, again,
    BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """`(code - zero) * scale` in groups that are kept."""
    kept, rank, base, count = kept_groups(masks, BM, GROUPS)
    values = group_codes(codes, kept, rank, base, count, BK // GROUPS // 8)
    zero = tl.load(zeros + base + rank, mask=kept, other=8)
    scale = tl.load(scales + base + rank, mask=kept, other=0.0)
    return scale_codes(shift_codes(values, zero[:, :, None], GROUPS), scale[:, :, None], GROUPS, DTYPE)


@dataclass(frozen=True)
class GroupSparse(Affine):
    """Masks i16 `[groups, BM / 16]` (bit r: row r of the strip keeps its group), and what is kept, by column of groups
    and row: codes as words of eight (field i of byte b is column 4 i + b), word by word; scales; zeros.

    Rows that keep a group of the same columns of x are thus neighbours, whatever rows they are.

    Attributes:
        group_size: weights of a group, a multiple of 8 that divides the tile's columns.
        share: of a tile's groups, what `approximate` keeps: those with the most energy.
    """

    name: ClassVar[str] = "group_sparse"
    revision: ClassVar[int] = 2
    by_default: ClassVar[bool] = False  # by bytes it would win wherever a group is zero, at int4's time or more
    group_size: int = 16
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise FormatError(f"format group_sparse: expected a share above 0, at most 1, found {self.share}; mend it")

    @property
    def bits(self) -> int:
        return 4

    def grid(self, columns: int) -> GroupGrid:
        if self.group_size < WORD or self.group_size % WORD or columns % self.group_size:
            raise FormatError(
                f"format group_sparse: expected a group_size of 8, 16, .. that divides the tile's {columns} columns, "
                f"found {self.group_size}; change group_size or the tile"
            )
        return GroupGrid.of(self.group_size, columns, self.name)

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        groups = self.grid(tile[1]).per_tile
        if tile[0] % ROWS:
            raise FormatError(
                f"format group_sparse: expected tiles of a multiple of 16 rows, found {tile[0]}x{tile[1]}; choose "
                "another tile"
            )
        return (
            Plane("masks", "i16", (groups, tile[0] // ROWS)),
            Plane("codes", "i32", (), PlaneKind.RAGGED),
            Plane("scales", dtype, (), PlaneKind.RAGGED),
            *((Plane("zeros", "u8", (), PlaneKind.RAGGED),) if self.zero_points else ()),
        )

    def code_planes(self, tile: Tile) -> tuple[Plane, ...]:
        return self.planes(tile, "f32")[:2]

    def pack(self, codes: TileCodes) -> Planes:
        """All planes: what is kept depends on codes and zeros."""
        groups = codes.scales.shape[2]
        kept = _by_columns(nonzero_codes(codes).unflatten(2, (groups, -1)).any(3))  # T, group, row
        eight = codes.codes.unflatten(2, (groups, -1, 2, WORD // 2))
        words = (eight[..., 0, :] | eight[..., 1, :] << 4).contiguous().view(torch.int32).squeeze(-1)
        return _planes(kept, words.permute(0, 2, 3, 1), _by_columns(codes.scales), codes.zeros)

    def from_planes(self, codes: TileCodes) -> Planes:
        return self.pack(codes)

    def unpack(self, planes: Planes, tile: Tile) -> Tensor:
        """The codes `[T, BM, BK]`; 8 in groups that are dropped."""
        kept = _kept(planes)
        shape = (*kept.shape[:2], tile[1] // kept.shape[1] // WORD, tile[0])
        words = torch.full(shape, NO_CODES, dtype=torch.int32, device=kept.device)
        words.masked_scatter_(kept[:, :, None].expand(shape), planes["codes"])
        rows = words.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        four = rows.view(torch.uint8).unflatten(3, (-1, WORD // 2))
        return torch.cat((four & 15, four >> 4), -1).flatten(2)

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        kept = _kept(planes)
        scales = planes["scales"]
        wide = scales.new_zeros(kept.shape).masked_scatter_(kept, scales)
        zeros = planes.get("zeros")
        if zeros is not None:
            zeros = _by_columns(zeros.new_full(kept.shape, 8).masked_scatter_(kept, zeros))
        codes = TileCodes(self.unpack(planes, tile), _by_columns(wide), zeros, 4, self.group_size)
        return dequantize(codes, TORCH_DTYPES[dtype])

    def migrate(self, planes: Planes, tile: Tile, dtype: str, revision: int) -> Planes | None:
        """Revision 1 had what a strip keeps together, by column of groups and row of the strip."""
        masks = planes["masks"]
        old = (masks[..., None].int() >> torch.arange(ROWS, dtype=torch.int32) & 1).bool()  # T, strip, group, row
        each = [len(planes[name]) for name in ("scales", "zeros") if name in planes]
        kept = {planes["codes"].numel() * WORD // self.group_size, int(old.sum()), *each}
        here = tile[0] // ROWS, self.grid(tile[1]).per_tile
        if "starts" not in planes or len(each) != 1 + self.zero_points or masks.shape[1:] != here or len(kept) > 1:
            return None  # they are not what revision 1 had

        def by_columns(plane: Tensor, kept: Tensor = old) -> Tensor:
            """What is kept in places of its own, `[T, group, .., BM]`."""
            spread = plane.new_zeros(kept.shape).masked_scatter_(kept, plane)
            return spread.movedim(1, -2).flatten(-2)

        zeros = by_columns(planes["zeros"]).transpose(1, 2) if self.zero_points else None
        of_words = old[:, :, :, None].expand(*old.shape[:3], self.group_size // WORD, ROWS)
        words = by_columns(planes["codes"], of_words)
        return _planes(by_columns(old[old], old), words, by_columns(planes["scales"]), zeros)

    def prune(self, tiles: Tensor, statistics: Tensor | None) -> Tensor:
        groups = self.grid(tiles.shape[2]).per_tile
        weighted = tiles.float().square() if statistics is None else tiles.float().square() * statistics[:, None]
        energy = weighted.unflatten(2, (groups, -1)).sum(3)
        most = max(1, round(energy[0].numel() * self.share)) if len(tiles) else 1
        kept = torch.zeros_like(energy, dtype=torch.bool).flatten(1)
        kept.scatter_(1, energy.flatten(1).topk(most, dim=1).indices, True)
        wide = kept.view(energy.shape)[..., None].expand(*energy.shape, self.group_size).flatten(2)
        return tiles.where(wide, 0)

    def tile_bytes(self, tiles: Tensor, dtype: str) -> Tensor:
        grouped = bits(tiles).ne(0).unflatten(2, (self.grid(tiles.shape[2]).per_tile, -1)).any(3)
        each = self.group_size // 2 + itemsize(dtype) + self.zero_points
        return grouped.flatten(1).sum(1).double() * each + TileFormat.tile_bytes(self, tiles, dtype)

    def elements(self, tile: Tile, dtype: str) -> Elements | None:
        return None

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode:
        function = decode_group_sparse_zeros if self.zero_points else decode_group_sparse
        return TritonDecode(function, {"GROUPS": self.grid(tile[1]).per_tile})

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        return _group_sparse_c.group_sparse_mac(tile, dtype, self.group_size, self.zero_points, self.share)


def _planes(kept: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None) -> Planes:
    """Of `kept` `[T, G, BM]`, words `[T, G, words, BM]`, scales `[T, G, BM]` and zero points `[T, BM, G]`."""
    counts = kept.sum((1, 2))
    planes = {
        "masks": (kept.unflatten(2, (-1, ROWS)).long() << torch.arange(ROWS)).sum(3).to(torch.int16),
        "codes": words[kept[:, :, None].expand(words.shape)],
        "codes_ptr": offsets(counts * words.shape[2]),
        "scales": scales[kept],
        "scales_ptr": offsets(counts),
    }
    if zeros is not None:
        planes |= {"zeros": _by_columns(zeros)[kept], "zeros_ptr": offsets(counts)}
    return planes


def _by_columns(groups: Tensor) -> Tensor:
    """`[T, BM, G]` -> `[T, G, BM]`, and back."""
    return groups.transpose(1, 2).contiguous()


def _kept(planes: Planes) -> Tensor:
    """Which groups are kept, bool `[T, G, BM]`."""
    masks = planes["masks"]
    rows = torch.arange(ROWS, device=masks.device, dtype=torch.int32)
    return (masks[..., None].int() >> rows & 1).bool().flatten(2)


register_format(GroupSparse())
