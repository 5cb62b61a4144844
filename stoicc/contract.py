"""A format under contract: sample tiles of many kinds, and which of them it accepts.

What it promises stands in `stoicc.contract_storage` and `stoicc.contract_kernels`; `stoicc.testing`
runs it all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.format import Plane, PlaneKind, TileFormat
from stoicc.ir.registry import REGISTRY
from stoicc.ir.schedule import entry_slots
from stoicc.ops.group_absmax import group_absmax
from stoicc.ops.nm_magnitude import nm_magnitude

Problems = Iterator[str]
TILES = 3
"""Tiles in a sample."""


class NotTried(Exception):
    """A promise that cannot be checked here: the capability, or the device, is not there."""


@dataclass(frozen=True)
class Contract:
    """One format at one tile shape and dtype, with sample tiles to try it on."""

    fmt: TileFormat
    tile: tuple[int, int]
    dtype: str

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        return self.fmt.planes(self.tile, self.dtype)

    @cached_property
    def registered(self) -> bool:
        """Whether the format's name means this class: programs name formats by their text."""
        name = getattr(self.fmt, "name", "")
        return name in REGISTRY.names() and type(REGISTRY.parse(name)) is type(self.fmt)

    def samples(self) -> dict[str, Tensor]:
        """Fresh tiles `[3, BM, BK]` of several kinds, by what they are."""
        return {kind: tiles.clone() for kind, tiles in self._samples.items()}

    def accepted(self) -> dict[str, Tensor]:
        """Of each kind the tiles that the format accepts, each by itself; kinds without any are left out."""
        return {kind: tiles.clone() for kind, tiles in self._accepted.items()}

    def back(self, tiles: Tensor) -> Tensor:
        """Encode and decode."""
        if not self.planes:
            return torch.zeros_like(tiles)
        return self.fmt.decode(self.fmt.encode(tiles), self.tile, self.dtype)

    def of_kind(self, kind: PlaneKind) -> tuple[Plane, ...]:
        return tuple(plane for plane in self.planes if plane.kind is kind)

    def fits(self, tiles: Tensor, columns: int) -> bool:
        """Whether tiles `[T, BM, BK]` of a grid with so many columns are accepted with those they share planes with."""
        rows, at = np.divmod(np.arange(len(tiles)), columns)
        spans = [plane.span for plane in self.of_kind(PlaneKind.GROUP)]
        slots = torch.from_numpy(entry_slots(rows, at, spans[0] if spans else 1))
        return not bool(self.fmt.reject_shared(tiles.clone(), slots).any())

    def rows(self) -> dict[str, Tensor]:
        """Of each accepted kind `[3, BM, BK]`: a tile row that fits; one tile three times where tiles disagree."""
        rows = {}
        for kind, tiles in self.accepted().items():
            row = tiles[torch.arange(TILES) % len(tiles)]
            if not self.fits(row, TILES):
                row = row[:1].repeat(TILES, 1, 1)
            if self.fits(row, TILES):
                rows[kind] = row
        return rows

    def tile_map(self, tiles: int, columns: int) -> list[list[TileFormat]]:
        """This format for every tile, so that the inspector has no choice."""
        return [[self.fmt] * columns] * (tiles // columns)

    @cached_property
    def _samples(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        dense = torch.randn(TILES, *self.tile, generator=generator).to(TORCH_DTYPES[self.dtype])
        keep = torch.rand(TILES, *self.tile, generator=generator)
        pruned = torch.stack([nm_magnitude(tile).dense() for tile in dense])
        kinds = {
            "zero": torch.zeros_like(dense),
            "random": dense,
            "2:4": pruned,
            "unstructured 90% sparse": dense.where(keep > 0.9, 0),
            "ternary": dense.sign() * 0.25,
            "ternary 2:4": pruned.sign() * 0.25,
            "4-bit codes": torch.stack([group_absmax(tile, 4, self.tile[1]).dense() for tile in dense]),
            "negative zero": torch.full_like(dense, -0.0),
        }
        for width in sorted({4, 8, min(getattr(self.fmt, "bits", 4), 8)}):
            whole = _whole_numbers(width, dense, generator)
            kinds[f"{width}-bit whole"] = whole
            kinds[f"{width}-bit whole 2:4"] = whole.where(torch.arange(self.tile[1]) % 4 < 2, 0)
            kept = self.fmt.keep(whole.float().abs())
            if kept is not None:
                kinds[f"{width}-bit whole, with zeros of its own,"] = whole.where(kept, 0)
        apart, rows = kinds["4-bit whole"].clone(), torch.arange(self.tile[0])
        apart[:, rows, 7 * rows % self.tile[1]] = 100
        return {**kinds, "4-bit whole, but one of each row,": apart, **self._nearest(dense)}

    def _nearest(self, dense: Tensor) -> dict[str, Tensor]:
        """What the format itself makes of random tiles: each alone, and all with one shared entry."""
        slots = {"its own approximation of random": torch.arange(TILES)}
        if self.of_kind(PlaneKind.GROUP):
            slots["its own approximation of random, planes shared,"] = torch.zeros(TILES, dtype=torch.int64)
        nearest: dict[str, Tensor] = {}
        for kind, shared in slots.items() if self.planes else ():
            try:
                back = self.fmt.decode(self.fmt.approximate(dense.clone(), shared).planes, self.tile, self.dtype)
            except Exception:  # "approximation tells its error" says what was raised
                continue
            if back.shape == dense.shape and back.dtype == dense.dtype:
                nearest[kind] = back.clone()
        return nearest

    @cached_property
    def _accepted(self) -> dict[str, Tensor]:
        kept = {kind: tiles[~self.fmt.reject(tiles.clone())] for kind, tiles in self.samples().items()}
        return {kind: tiles for kind, tiles in kept.items() if len(tiles)}


def _whole_numbers(width: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Signed integers of a width, every eight columns with both extremes: their scale is 1 by any rule."""
    half = 1 << (width - 1)
    values = torch.randint(-half, half, like.shape, generator=generator).to(like.dtype)
    values[:, :, 0::8], values[:, :, 4::8] = -half, half - 1
    return values
