"""The tile format protocol: what a user subclasses to add a format.

A format says how one [BM, BK] tile of a weight is stored. Its parameters are the fields of a
frozen dataclass; its storage is a list of *planes*. Everything is batched: `encode` takes
`[tiles, BM, BK]` and returns one tensor per plane with a leading dimension of `tiles`.

The smallest useful format has `planes`, `encode` and `decode`, and runs on the reference backend. `decode_block`
makes it fast on GPUs, `tile_mac` on CPUs. Passes and backends ask for these, and never for a format's name.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from stoicc.ir.codes import Elements, TileCodes, nonzero_codes
from stoicc.ir.dtypes import DTYPE_NAMES, bits, itemsize
from stoicc.ir.errors import FormatError
from stoicc.ir.fragment import Fragment, Planes, Tile
from stoicc.ir.lattice import Lattice
from stoicc.ir.options import print_options, read_options
from stoicc.ir.tile_mac import NEVER, LaneCodes, PairsOfCodes, TileFloats, TileMac, TileOctets, TilePairs

__all__ = [
    "NEVER", "Approximation", "Elements", "Fragment", "LaneCodes", "Lattice", "PairsOfCodes", "Plane", "PlaneKind",
    "Planes",
    "Tile", "TileCodes", "TileCost", "TileFloats", "TileFormat", "TileMac", "TileOctets", "TilePairs", "TritonDecode",
    "nonzero_codes", "squared_error", "tile_shape",
]  # fmt: skip


class PlaneKind(Enum):
    """How entries of a plane relate to tiles.

    TILE: one entry of a fixed shape for each tile.
    RAGGED: a run of elements for each tile, found by an offsets pool `[tiles + 1]`.
    GROUP: one entry shared by `span` neighbouring tiles of a tile row (aligned: tile columns
        c with equal c // span); span 0 shares it over the whole tile row.
    MATRIX: one entry for the whole matrix (a tensor scale, a codebook).
    """

    TILE = "tile"
    RAGGED = "ragged"
    GROUP = "group"
    MATRIX = "matrix"


@dataclass(frozen=True, slots=True)
class Plane:
    """One array of a format: its name, element dtype and the shape of one entry."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: PlaneKind = PlaneKind.TILE
    span: int = 1

    @property
    def entry_elements(self) -> int:
        elements = 1
        for extent in self.shape:
            elements *= extent
        return elements

    @property
    def entry_bytes(self) -> int:
        return self.entry_elements * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class TileCost:
    """What one tile costs: bytes read, multiply-adds at batch 1, scalar decode operations."""

    bytes: float
    macs: float = 0.0
    decode_ops: float = 0.0

    def __add__(self, other: "TileCost") -> "TileCost":
        return TileCost(self.bytes + other.bytes, self.macs + other.macs, self.decode_ops + other.decode_ops)


class Approximation(NamedTuple):
    """A lossy encoding: the planes, and the squared error of each tile `[tiles]` (float32)."""

    planes: Planes
    error: Tensor


@dataclass(frozen=True)
class TritonDecode:
    """A format's device decode for the portable Triton dialect.

    Attributes:
        function: a `@triton.jit` function
            `(one pointer per plane at this tile's entry..., BM, BK, DTYPE, **constants)`
            returning the `[BM, BK]` block in DTYPE, equal to `decode` bit for bit. The last
            three are `tl.constexpr`. A RAGGED plane passes its pointer and then its count.
        constants: further constexpr arguments, by name; also `@triton.jit` functions that `function` calls.
    """

    function: Any
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TileFormat(ABC):
    """How a tile is stored. Subclass, add parameters as dataclass fields, register.

    Shapes: T tiles of BM rows and BK columns. `tiles` is always contiguous `[T, BM, BK]` in a
    weight dtype (f32, f16, bf16); tails of the matrix arrive padded with +0.0.
    """

    name: ClassVar[str]
    by_default: ClassVar[bool] = True
    """Whether it is one of those to choose from where a user names no formats."""
    revision: ClassVar[int] = 1
    """Of its planes' layout: raised when planes of the same text mean something else, so that files are not misread."""

    # -- storage ---------------------------------------------------------------------------

    @abstractmethod
    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        """The planes of a tile of this shape and weight dtype; `()` stores nothing."""

    @abstractmethod
    def encode(self, tiles: Tensor) -> Planes:
        """Exact planes of tiles that `reject` accepts; one entry per tile in every plane.

        A GROUP plane is returned per tile too; the caller folds equal neighbours into one.
        """

    @abstractmethod
    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        """The `[T, BM, BK]` tiles that the planes stand for: what the format *means*."""

    def reject(self, tiles: Tensor) -> Tensor:
        """Bool `[T]`: True where a tile cannot be held bit for bit.

        The default encodes, decodes and compares bit patterns.
        """
        back = self.decode(self.encode(tiles), tile_shape(tiles), DTYPE_NAMES[tiles.dtype])
        return (bits(back) != bits(tiles)).flatten(1).any(1)

    def why(self, tile: Tensor) -> str:
        """For one rejected `[BM, BK]` tile: what was expected, what was found and where."""
        return "expected a tile that survives encode and decode bit for bit, found one that changes"

    def migrate(self, planes: Planes, tile: Tile, dtype: str, revision: int) -> Planes | None:
        """A file's planes of an older revision (entries as `TileMac.pack` gets them) as they are now; None: refused."""
        return None

    def cost(self, tile: Tile, dtype: str) -> TileCost:
        """Bytes from the planes (a shared entry counts by its share); one mac per weight."""
        total = 0.0
        for plane in self.planes(tile, dtype):
            if plane.kind in (PlaneKind.TILE, PlaneKind.GROUP):
                total += plane.entry_bytes / max(plane.span, 1)
        return TileCost(bytes=total, macs=float(tile[0] * tile[1]))

    def tile_bytes(self, tiles: Tensor, dtype: str) -> Tensor:
        """Bytes of each tile, `[T]` float64: a constant unless a plane is RAGGED."""
        return torch.full((tiles.shape[0],), self.cost(tile_shape(tiles), dtype).bytes, dtype=torch.float64)

    # -- lossy doors -----------------------------------------------------------------------

    def reject_shared(self, tiles: Tensor, slots: Tensor) -> Tensor:
        """As `reject`, for formats with GROUP planes: tiles of equal `slots` share an entry.

        The default also rejects a tile whose shared entry differs from that of the first tile
        of its slot.
        """
        rejected = self.reject(tiles)
        kept = (~rejected).nonzero().flatten()
        shared = [
            plane.name
            for plane in self.planes(tile_shape(tiles), DTYPE_NAMES[tiles.dtype])
            if plane.kind in (PlaneKind.GROUP, PlaneKind.MATRIX)
        ]
        if shared and kept.numel():
            planes = self.encode(tiles[kept])
            unique, slot = slots[kept].unique(return_inverse=True)
            first = torch.full_like(unique, len(kept)).scatter_reduce_(0, slot, torch.arange(len(kept)), "amin")
            for name in shared:
                entries = planes[name]
                rejected[kept] |= (entries != entries[first[slot]]).flatten(1).any(1)
        return rejected

    def encode_shared(self, tiles: Tensor, slots: Tensor) -> Planes:
        """As `encode`, for formats with GROUP planes: tiles of equal `slots` share an entry.

        Args:
            slots: int64 `[T]`, the shared entry that each tile belongs to.
        """
        return self.encode(tiles)

    def approximate(self, tiles: Tensor, slots: Tensor, statistics: Tensor | None = None) -> Approximation:
        """The nearest planes under this format, for users who asked for a lossy choice.

        Args:
            statistics: `[T, BK]` mean squared activation of each column, to weight the error.

        The default encodes what `encode` makes of the tiles and measures what that lost.
        """
        planes = self.encode_shared(tiles, slots)
        back = self.decode(planes, tile_shape(tiles), DTYPE_NAMES[tiles.dtype])
        return Approximation(planes, squared_error(tiles, back, statistics))

    @property
    def planes_hold_codes(self) -> bool:
        """Whether the planes hold quantized codes (so that floats are only guessed into it)."""
        return False

    def for_codes(self, bits: int, group_size: int, zero_points: bool) -> "TileFormat | None":
        """The variant of this format that holds codes of this kind, or None."""
        return None

    def reject_codes(self, codes: TileCodes) -> Tensor:
        """Bool `[T]`: True where the tile's codes cannot be held as they are (default: all)."""
        return torch.ones(codes.codes.shape[0], dtype=torch.bool)

    def from_planes(self, codes: TileCodes) -> Planes:
        """Planes from an operator's codes and scales, as they are."""
        raise FormatError(f"format {self}: expected floats, found quantized codes; allow a format that holds codes")

    # -- composition: `stoicc/formats/masked.py` takes positions from one format and values from another ---------

    def keep(self, importance: Tensor) -> Tensor | None:
        """Bool `[T, BM, BK]`: the weights kept of tiles where some matter (> 0) and others are zeros (0).

        None, the default: the format has no positions of its own.
        """
        return None

    def elements(self, tile: Tile, dtype: str) -> Elements | None:
        """How one code for each weight is stored, or None where planes are anything else."""
        return None

    def lattice(self, tile: Tile) -> Lattice | None:
        """What single weights of such a tile may be, so that a sweep can round one after the other; None: unknown."""
        return None

    # -- training --------------------------------------------------------------------------

    def trainable(self, tile: Tile, dtype: str) -> tuple[str, ...]:
        """Names of its planes of floats that training may change: through `decode`, in torch, their gradients come."""
        return ()

    # -- devices ---------------------------------------------------------------------------

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode | None:
        """The Triton decode, or None: then GPUs need `on_missing="dense"`."""
        return None

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        """The C multiply, or None: then CPUs need `on_missing="dense"`."""
        return None

    def fragment(self, tile: Tile, dtype: str) -> Fragment | None:
        """Tensor-core operands for NVIDIA GPUs, or None: then kernels of this format are of the portable dialect."""
        return None

    def transposed(self, planes: Planes, tile: Tile, dtype: str) -> Planes | None:
        """Planes of the transposed tiles where the format is closed under it, else None."""
        return None

    # -- text ------------------------------------------------------------------------------

    def __str__(self) -> str:
        """`name` or `name<field=value, ...>` with the fields that differ from their default.

        Raises:
            FormatError: a field's value would not read back from its text.
        """
        changed = print_options(self, f"format {self.name}", FormatError)
        return f"{self.name}<{', '.join(changed)}>" if changed else self.name

    @classmethod
    def from_text(cls, options: Mapping[str, str]) -> Self:
        """Build the format from the options of its textual form; FormatError names a wrong one."""
        return read_options(cls, options, f"format {cls.name}", FormatError)


def tile_shape(tiles: Tensor) -> Tile:
    """(BM, BK) of a batch `[T, BM, BK]`."""
    return tiles.shape[1], tiles.shape[2]


def squared_error(tiles: Tensor, decoded: Tensor, statistics: Tensor | None) -> Tensor:
    """Sum of squared differences of each tile `[T]`, columns weighted by `statistics [T, BK]`."""
    square = (tiles.float() - decoded.float()).square().sum(1)
    return (square if statistics is None else square * statistics).sum(1)
