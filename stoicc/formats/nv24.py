"""2:4 tiles: at most two of every four consecutive weights along K are not zero.

Source: the structured sparsity of NVIDIA's sparse tensor cores (Mishra et al. 2021,
arXiv 2104.08378, section 3).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stoicc.formats import _nm
from stoicc.ir.dtypes import bits
from stoicc.ir.format import Approximation, Plane, Planes, Tile, TileFormat, squared_error
from stoicc.ir.registry import register_format


@dataclass(frozen=True)
class Nv24(TileFormat):
    """Two kept values of each group of four, and their columns in a nibble.

    A -0.0 counts as a weight that must be kept: dropping it would change its sign.
    """

    name: ClassVar[str] = "nv24"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        rows, columns = tile
        return (
            Plane("values", dtype, (rows, columns // 2)),
            Plane("positions", "u8", (rows, columns // 8)),
        )

    def encode(self, tiles: Tensor) -> Planes:
        values, positions = _nm.compress(tiles, _nm.group_masks(bits(tiles).ne(0)))
        return {"values": values, "positions": positions}

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        values = planes["values"]
        return _nm.expand(values, planes["positions"], values.new_zeros(values.shape[0], *tile))

    def reject(self, tiles: Tensor) -> Tensor:
        return _nm.overfull(bits(tiles).ne(0))

    def why(self, tile: Tensor) -> str:
        return f"{_nm.first_overfull(tile)}; prune first or add 'dense' to formats"

    def approximate(self, tiles: Tensor, slots: Tensor, statistics: Tensor | None = None) -> Approximation:
        magnitude = tiles.float().abs()
        kept = _nm.top2(magnitude if statistics is None else magnitude * statistics[:, None, :].sqrt())
        planes = self.encode(tiles.where(kept, 0))
        return Approximation(planes, squared_error(tiles, tiles.where(kept, 0), statistics))


register_format(Nv24())
