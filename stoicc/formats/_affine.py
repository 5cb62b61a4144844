"""Group-wise affine integer codes, shared by int8, int4 and int4_nv24.

A weight is `(code - zero) * scale`, computed in fp32 and rounded once to the weight's dtype.
Codes are unsigned; symmetric codes have the fixed zero 2**(bits - 1). One scale serves a group of
`group_size` weights along K: a part of a tile, several tiles, or (0) the whole row.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stoicc.formats._kept_device import affine_values, symmetric_values
from stoicc.ir.dtypes import BITS_VIEW, TORCH_DTYPES, bits
from stoicc.ir.errors import FormatError
from stoicc.ir.format import (
    Approximation,
    Elements,
    Plane,
    PlaneKind,
    Planes,
    Tile,
    TileCodes,
    TileFormat,
    TritonDecode,
    squared_error,
)
from stoicc.ir.lattice import Lattice


@dataclass(frozen=True)
class GroupGrid:
    """Where groups of scales fall on a tile: groups per tile, and tiles per group."""

    per_tile: int
    kind: PlaneKind
    span: int

    @staticmethod
    def of(group_size: int, columns: int, name: str) -> "GroupGrid":
        """Groups of `group_size` along K on tiles of `columns`; FormatError where they do not meet."""
        if group_size == 0:
            return GroupGrid(1, PlaneKind.GROUP, 0)
        if group_size > 0 and columns % group_size == 0:
            return GroupGrid(columns // group_size, PlaneKind.TILE, 1)
        if group_size > 0 and group_size % columns == 0:
            return GroupGrid(1, PlaneKind.GROUP, group_size // columns)
        raise FormatError(
            f"format {name}: expected a group_size that divides the tile's {columns} columns, is a multiple of them, "
            f"or 0 for the whole row, found {group_size}; change group_size or the tile"
        )


def share(values: Tensor, slots: Tensor, grid: GroupGrid, reduce: str) -> Tensor:
    """Reduce per-tile group values `[T, BM, G]` over the tiles that share an entry."""
    if grid.kind is PlaneKind.TILE or values.shape[0] == 0:
        return values
    entries = values.new_zeros(int(slots.max()) + 1, *values.shape[1:])
    index = slots.view(-1, 1, 1).expand_as(values)
    return entries.scatter_reduce_(0, index, values, reduce, include_self=False)[slots]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes below 16 `[..., n]` -> bytes `[..., n / 2]`, the even one in the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def dequantize(codes: TileCodes, dtype: torch.dtype) -> Tensor:
    """`[T, BM, BK]` weights: (code - zero) * scale in fp32, rounded once to dtype."""
    groups = codes.codes.float().unflatten(2, (codes.scales.shape[2], codes.codes.shape[2] // codes.scales.shape[2]))
    zero = float(1 << (codes.bits - 1)) if codes.zeros is None else codes.zeros.float()[..., None]
    return ((groups - zero) * codes.scales.float()[..., None]).to(dtype).flatten(2)


def quantize(
    tiles: Tensor, scales: Tensor, zeros: Tensor | None, bits_: int, group_size: int, lowest: int = 0
) -> TileCodes:
    """Round tiles `[T, BM, BK]` to the nearest code from `lowest`, given scales and zeros `[T, BM, G]`."""
    groups = tiles.float().unflatten(2, (scales.shape[2], -1))
    step = scales.float()[..., None]
    zero = float(1 << (bits_ - 1)) if zeros is None else zeros.float()[..., None]
    scaled = torch.where(step != 0, groups / step, 0.0)
    codes = (scaled.round() + zero).clamp_(lowest, (1 << bits_) - 1)
    if bool((step * (1 << bits_)).to(tiles.dtype).isinf().any()):  # near the top of the dtype: a step less
        codes -= torch.where(((codes - zero) * step).to(tiles.dtype).isinf(), (codes - zero).sign(), 0.0)
    return TileCodes(codes.to(torch.uint8).flatten(2), scales, zeros, bits_, group_size)


def finite_scale(scale: Tensor, dtype: torch.dtype, steps: int) -> Tensor:
    """Scales in the weight's dtype, not so large that `steps` of one overflow it when rounded."""
    largest = torch.finfo(dtype).max
    limit = torch.tensor(largest / steps, dtype=torch.float64).to(dtype)
    if limit.double().item() * steps > largest:  # rounded up: the next value below
        limit = (limit.view(BITS_VIEW[dtype]) - 1).view(dtype)
    return scale.clamp_max(limit.float()).to(dtype)


def absmax(tiles: Tensor, slots: Tensor, grid: GroupGrid, bits_: int, group_size: int, zero_points: bool) -> TileCodes:
    """Group AbsMax: symmetric scale max|w| / (2**(bits-1) - 1), or min-max with zero points.

    Symmetric codes keep to +-(2**(bits-1) - 1), also where the scale was rounded down.
    """
    groups = tiles.float().unflatten(2, (grid.per_tile, -1))
    if not zero_points:
        most = (1 << (bits_ - 1)) - 1
        top = share(groups.abs().amax(3), slots, grid, "amax")
        return quantize(tiles, finite_scale(top / most, tiles.dtype, most), None, bits_, group_size, 1)
    high = share(groups.amax(3).clamp_min(0), slots, grid, "amax")
    low = share(groups.amin(3).clamp_max(0), slots, grid, "amin")
    levels = (1 << bits_) - 1
    scales = (high / levels - low / levels).to(tiles.dtype)
    zeros = torch.where(scales != 0, -low / scales.float(), 0.0).round().clamp_(0, levels).to(torch.uint8)
    return quantize(tiles, scales, zeros, bits_, group_size)


def exact_codes(
    tiles: Tensor, slots: Tensor, grid: GroupGrid, bits_: int, group_size: int, zero_points: bool
) -> TileCodes:
    """Codes that give the tiles back bit for bit wherever one of the tried scales does.

    Symmetric candidates per group: the largest magnitude over 2**(bits-1) - 1 and over
    2**(bits-1), and the smallest non-zero magnitude. With zero points: the min-max scale.
    """
    if zero_points:
        return absmax(tiles, slots, grid, bits_, group_size, True)
    magnitude = tiles.float().abs().unflatten(2, (grid.per_tile, -1))
    top = share(magnitude.amax(3), slots, grid, "amax")
    low = share(torch.where(magnitude > 0, magnitude, torch.inf).amin(3), slots, grid, "amin")
    half = 1 << (bits_ - 1)
    best = (top / (half - 1)).to(tiles.dtype)
    for other in (top / half, torch.where(low.isinf(), 0.0, low)):
        candidate = other.to(tiles.dtype)
        back = dequantize(quantize(tiles, best, None, bits_, group_size), torch.float32)
        wrong = (bits(back) != bits(tiles.float())).unflatten(2, (grid.per_tile, -1)).any(3)
        best = torch.where(share(wrong.to(torch.uint8), slots, grid, "amax").bool(), candidate, best)
    return quantize(tiles, best, None, bits_, group_size)


@dataclass(frozen=True)
class Affine(TileFormat):
    """Base of the formats that store affine codes; a subclass says how codes are packed."""

    group_size: int = 64
    zero_points: bool = False

    @property
    @abstractmethod
    def bits(self) -> int:
        """Width of a code."""

    @property
    def planes_hold_codes(self) -> bool:
        return True

    def for_codes(self, bits: int, group_size: int, zero_points: bool) -> TileFormat | None:
        if bits != self.bits:
            return None
        return replace(self, group_size=group_size, zero_points=zero_points)

    @abstractmethod
    def code_planes(self, tile: Tile) -> tuple[Plane, ...]:
        """Planes that hold the packed codes (and positions)."""

    @abstractmethod
    def pack(self, codes: TileCodes) -> Planes:
        """Packed planes of the codes, without scales and zeros."""

    @abstractmethod
    def unpack(self, planes: Planes, tile: Tile) -> Tensor:
        """The codes `[T, BM, BK]` again."""

    def keeps(self, codes: TileCodes) -> Tensor:
        """Bool `[T]`: tiles whose codes have the structure that this format can hold."""
        return torch.ones(codes.codes.shape[0], dtype=torch.bool)

    def lattice(self, tile: Tile) -> Lattice | None:
        if self.grid(tile[1]).kind is not PlaneKind.TILE:  # a scale that tiles share is not the tile's own choice
            return None
        return Lattice(self.bits, self.group_size, self.zero_points)

    def grid(self, columns: int) -> GroupGrid:
        return GroupGrid.of(self.group_size, columns, self.name)

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        grid = self.grid(tile[1])
        shape = (tile[0], grid.per_tile)
        scales = Plane("scales", dtype, shape, grid.kind, grid.span)
        zeros = (Plane("zeros", "u8", shape, grid.kind, grid.span),) if self.zero_points else ()
        return (*self.code_planes(tile), scales, *zeros)

    def from_planes(self, codes: TileCodes) -> Planes:
        planes = {**self.pack(codes), "scales": codes.scales}
        return planes if codes.zeros is None else {**planes, "zeros": codes.zeros}

    def reject_codes(self, codes: TileCodes) -> Tensor:
        same = codes.bits == self.bits and codes.group_size == self.group_size
        if not same or (codes.zeros is not None) != self.zero_points:
            return super().reject_codes(codes)
        return ~self.keeps(codes)

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        codes = TileCodes(self.unpack(planes, tile), planes["scales"], planes.get("zeros"), self.bits, self.group_size)
        return dequantize(codes, TORCH_DTYPES[dtype])

    def encode(self, tiles: Tensor) -> Planes:
        return self.encode_shared(tiles, torch.arange(tiles.shape[0]))

    def encode_shared(self, tiles: Tensor, slots: Tensor) -> Planes:
        return self.from_planes(self._exact(tiles, slots))

    def reject(self, tiles: Tensor) -> Tensor:
        return self.reject_shared(tiles, torch.arange(tiles.shape[0]))

    def reject_shared(self, tiles: Tensor, slots: Tensor) -> Tensor:
        """True where no tried scale is exact; the first rows are tried before whole tiles are."""
        rejected = self._inexact(tiles[:, :1], slots)
        left = (~rejected).nonzero().flatten()
        if left.numel():
            rejected[left] = self._inexact(tiles[left], slots[left])
        grid = self.grid(tiles.shape[2])
        return share(rejected.to(torch.uint8).view(-1, 1, 1), slots, grid, "amax").bool().flatten()

    def why(self, tile: Tensor) -> str:
        back = dequantize(self._exact(tile[None], torch.zeros(1, dtype=torch.int64)), torch.float32)[0]
        wrong = (bits(back) != bits(tile.float())).nonzero()
        if not len(wrong):
            return "expected one scale for the whole group, found tiles of the group that disagree"
        row, column = wrong[0].tolist()
        return (
            f"expected every weight to be a {self.bits}-bit code times its group's scale bit for bit, found "
            f"{tile[row, column].item():g} at row {row}, column {column}; quantize with an operator of "
            "stoicc.ops, or pass approximate=True"
        )

    def approximate(self, tiles: Tensor, slots: Tensor, statistics: Tensor | None = None) -> Approximation:
        grid = self.grid(tiles.shape[2])
        codes = absmax(self.prune(tiles, statistics), slots, grid, self.bits, self.group_size, self.zero_points)
        return Approximation(self.from_planes(codes), squared_error(tiles, dequantize(codes, tiles.dtype), statistics))

    def elements(self, tile: Tile, dtype: str) -> Elements | None:
        if [plane.name for plane in self.code_planes(tile)] != ["codes"]:
            return None
        values = TritonDecode(affine_values if self.zero_points else symmetric_values)
        zeros = "zeros" if self.zero_points else None
        in_lanes = self.bits < 8 or not self.zero_points  # a code of eight bits less its zero point takes nine
        return Elements("codes", self.bits, values, self.grid(tile[1]).per_tile, zeros, "words", in_lanes)

    def prune(self, tiles: Tensor, statistics: Tensor | None) -> Tensor:
        """Zero what the format cannot keep (nothing here; 2:4 formats drop two of four)."""
        return tiles

    def _exact(self, tiles: Tensor, slots: Tensor) -> TileCodes:
        grid = self.grid(tiles.shape[2])
        return exact_codes(tiles, slots, grid, self.bits, self.group_size, self.zero_points)

    def _inexact(self, tiles: Tensor, slots: Tensor) -> Tensor:
        """Tiles that differ from their codes; fp32, so that no executor's rounding can matter."""
        codes = self._exact(tiles, slots)
        differs = (bits(dequantize(codes, torch.float32)) != bits(tiles.float())).flatten(1).any(1)
        return differs | ~self.keeps(codes)
