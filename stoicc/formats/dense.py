"""Dense tiles: every weight as it is."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stoicc.ir.format import Plane, Planes, Tile, TileFormat
from stoicc.ir.registry import register_format


@dataclass(frozen=True)
class Dense(TileFormat):
    """Values `[BM, BK]` in the weight's dtype; holds any tile."""

    name: ClassVar[str] = "dense"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return (Plane("values", dtype, tile),)

    def encode(self, tiles: Tensor) -> Planes:
        return {"values": tiles}

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        return planes["values"]

    def reject(self, tiles: Tensor) -> Tensor:
        return torch.zeros(tiles.shape[0], dtype=torch.bool)


register_format(Dense())
