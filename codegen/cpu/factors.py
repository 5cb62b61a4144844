"""Low-rank factors on their way to kernels: floats in dense tiles, codes in tiles of a format that holds them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from stoicc.ir.digest import digest
from stoicc.ir.dtypes import DTYPE_NAMES
from stoicc.ir.errors import FormatError
from stoicc.ir.factors import factor_values, unpack_codes
from stoicc.ir.format import PlaneKind, Planes, Tile, TileCodes, TileFormat
from stoicc.ir.planes import plane_slots, pool_name
from stoicc.ir.registry import REGISTRY, find_format
from stoicc.ir.types import CodedFactor, Pool, Segment, TileProgram

Tiled = tuple[TileProgram, dict[str, Tensor]]

_WASTE = 1.05
"""Padding that a larger tile may cost."""


class HeldFactor(Protocol):
    """A factor `[rows, columns]` that can be cut in tiles."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its values."""
        ...

    def ordered(self, rows: Tensor) -> "HeldFactor":
        """Row `rows[i]` at i."""
        ...

    def padded(self, rows: int) -> "HeldFactor":
        """With rows of zeros below, so that there are `rows`."""
        ...

    def tiled(self, name: str, tile: Tile) -> Tiled:
        """A program of tiles, padded to whole ones, and its pools."""
        ...


@dataclass(frozen=True, eq=False)
class Floats:
    """A factor by its values."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def ordered(self, rows: Tensor) -> HeldFactor:
        return Floats(self.values[rows])

    def padded(self, rows: int) -> HeldFactor:
        return Floats(pad(self.values, (0, 0, 0, rows - self.values.shape[0])))

    def tiled(self, name: str, tile: Tile) -> Tiled:
        return _program(name, self, tile, find_format("dense"), {"values": _cut(self.values, tile, 0)})


@dataclass(frozen=True, eq=False)
class Codes:
    """A factor by its codes: uint8 `[rows, columns]` of the format's width, and scales `[rows, groups]`."""

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int
    format: TileFormat

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    def ordered(self, rows: Tensor) -> HeldFactor:
        return replace(self, codes=self.codes[rows], scales=self.scales[rows])

    def padded(self, rows: int) -> HeldFactor:
        more = (0, 0, 0, rows - self.codes.shape[0])
        return replace(self, codes=pad(self.codes, more, value=self._zero), scales=pad(self.scales, more))

    def tiled(self, name: str, tile: Tile) -> Tiled:
        codes = _cut(self.codes, tile, self._zero)
        if 0 < self.group_size < tile[1]:
            scales = _cut(self.scales, (tile[0], tile[1] // self.group_size), 0)
        else:  # one scale for a tile or for several
            columns = -(-self.codes.shape[1] // tile[1])
            spread = self.scales.repeat_interleave(self.group_size // tile[1] or columns, 1)[:, :columns]
            scales = _cut(spread, (tile[0], 1), 0)
        held = TileCodes(codes, scales, None, self.bits, self.group_size)
        return _program(name, self, tile, self.format, self.format.from_planes(held))

    @property
    def _zero(self) -> int:
        return 1 << (self.bits - 1)


def tile_of(shape: tuple[int, ...]) -> Tile:
    """The tile that a factor is cut in."""
    return _extent(shape[0], 16), _extent(shape[1], 32)


def held_factor(factor: Pool | CodedFactor, pools: Mapping[str, Tensor]) -> HeldFactor:
    """A factor as codes where a format with C code holds them on its tiles, else as floats."""
    if isinstance(factor, Pool):
        return Floats(pools[factor.name])
    for bits in range(factor.bits, 9):
        fmt = _format_for(factor, bits, tile_of(factor.shape))
        if fmt is not None:
            codes = unpack_codes(pools[factor.codes.name], factor.bits, factor.columns)
            codes += (1 << (bits - 1)) - (1 << (factor.bits - 1))
            return Codes(codes, pools[factor.scales.name], bits, factor.group_size, fmt)
    return Floats(factor_values(factor, pools))


def _format_for(factor: CodedFactor, bits: int, tile: Tile) -> TileFormat | None:
    """The smallest format that has C code and takes any such codes: also a tile whose codes all stand for a weight."""
    weights, scales = torch.zeros(1, *tile, dtype=torch.uint8), torch.zeros(1, tile[0], 1)
    sample = TileCodes(weights, scales, None, bits, factor.group_size)
    able: list[tuple[float, TileFormat]] = []
    for name in REGISTRY.names():
        try:
            fmt = find_format(name).for_codes(bits, factor.group_size, False)
            if fmt is None or fmt.tile_mac(tile, factor.dtype) is None or bool(fmt.reject_codes(sample).any()):
                continue
            if all(plane.kind in (PlaneKind.TILE, PlaneKind.GROUP) for plane in fmt.planes(tile, factor.dtype)):
                able.append((fmt.cost(tile, factor.dtype).bytes, fmt))
        except FormatError:  # groups that do not meet the tile
            continue
    return min(able, key=lambda entry: entry[0], default=(0.0, None))[1]


def _program(name: str, factor: HeldFactor, tile: Tile, fmt: TileFormat, planes: Planes) -> Tiled:
    """One segment of all tiles; what tiles share is stored once."""
    dtype = DTYPE_NAMES[factor.dtype]
    grid = -(-factor.shape[0] // tile[0]), -(-factor.shape[1] // tile[1])
    rows, columns = (each.ravel() for each in np.indices(grid))
    pools: dict[str, Tensor] = {}
    for plane in fmt.planes(tile, dtype):
        entries = planes[plane.name]
        if plane.kind is PlaneKind.GROUP:
            first = np.unique(plane_slots(plane, rows, columns), return_index=True)[1]
            entries = entries[torch.from_numpy(first)]
        pools[pool_name(0, plane.name)] = entries.contiguous()
    described = (Pool(key, DTYPE_NAMES[pool.dtype], tuple(pool.shape), digest(pool)) for key, pool in pools.items())
    segment = Segment(str(fmt), rows.size, tuple(described))
    return TileProgram(name, factor.shape, tile, dtype, (segment,), (0,) * rows.size), pools


def _extent(size: int, least: int) -> int:
    """The largest extent of a tile, from `least` to 64, that pads little."""
    padded = {extent: -(-size // extent) * extent for extent in (64, 32, 16) if extent >= least}
    return next((extent for extent, whole in padded.items() if whole <= _WASTE * size), least)


def _cut(matrix: Tensor, tile: Tile, fill: int) -> Tensor:
    """`[rows, columns]` -> `[tiles, height, width]`, padded."""
    (rows, columns), (height, width) = matrix.shape, tile
    whole = pad(matrix, (0, -columns % width, 0, -rows % height), value=fill)
    return whole.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2).reshape(-1, height, width)
