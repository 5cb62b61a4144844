"""Empty tiles: every weight is +0.0; nothing is stored and no executor visits them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stoicc.ir.dtypes import bits
from stoicc.ir.format import Approximation, Plane, Planes, Tile, TileCodes, TileFormat, nonzero_codes, squared_error
from stoicc.ir.lattice import Lattice
from stoicc.ir.registry import register_format


@dataclass(frozen=True)
class Empty(TileFormat):
    """All weights +0.0. A -0.0 is a weight: its sign can reach the result, so it is not empty."""

    name: ClassVar[str] = "empty"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return ()

    def encode(self, tiles: Tensor) -> Planes:
        return {}

    def lattice(self, tile: Tile) -> Lattice:
        return Lattice(keep=(0, 1))

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        raise AssertionError("empty tiles have no planes to decode; callers leave them at zero")

    def reject(self, tiles: Tensor) -> Tensor:
        return bits(tiles).flatten(1).ne(0).any(1)

    def why(self, tile: Tensor) -> str:
        row, column = bits(tile).nonzero()[0].tolist()
        return f"expected only zeros, found {tile[row, column].item():g} at row {row}, column {column}"

    def approximate(self, tiles: Tensor, slots: Tensor, statistics: Tensor | None = None) -> Approximation:
        return Approximation({}, squared_error(tiles, torch.zeros_like(tiles), statistics))

    def reject_codes(self, codes: TileCodes) -> Tensor:
        return nonzero_codes(codes).flatten(1).any(1)

    def from_planes(self, codes: TileCodes) -> Planes:
        return {}


register_format(Empty())
