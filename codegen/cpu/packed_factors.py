"""Low-rank factors in the tiles of their kernels, given back as they are stored when somebody asks for those."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stoicc.codegen.executor import PackedPlanes
from stoicc.ir.factors import pack_codes, unpack_codes
from stoicc.ir.format import Planes
from stoicc.ir.planes import entry_count, tile_coordinates
from stoicc.ir.types import CodedFactor, Pool, TileProgram


@dataclass(frozen=True, eq=False)
class PackedFactor:
    """The pool of a factor's values, or of its codes, from the tiles of its kernel; scales of codes stay pools.

    Attributes:
        factor: what is given back.
        program: of the tiles, rows of zeros below included.
        packed: holds the planes of the tiles.
        rows: of the factor.
        order: i32 `[rows]`, row i of the tiles is row `order[i]` of the factor; None where they are the same.
    """

    factor: Pool | CodedFactor
    program: TileProgram
    packed: PackedPlanes
    rows: int
    order: Tensor | None = None

    @property
    def name(self) -> str:
        """Of the pool."""
        return self.factor.name if isinstance(self.factor, Pool) else self.factor.codes.name

    def pool(self) -> Tensor | None:
        """The pool, a new tensor; None where the tiles cannot be had as they were."""
        with torch.inference_mode(False), torch.no_grad():
            tiles = self._tiles()
            if tiles is None:
                return None
            words = tiles.contiguous().view(torch.int64)  # a tile's width is a multiple of 32
            words = words.view(*self.program.grid, *words.shape[1:]).transpose(1, 2).flatten(2).flatten(0, 1)
            matrix = words.view(tiles.dtype)[: self.rows, : self.program.shape[1]]
            if self.order is not None:
                matrix = torch.empty_like(matrix).index_copy_(0, self.order.long(), matrix)
            # not a view: its base would hold the memory as well
            return matrix.clone() if isinstance(self.factor, Pool) else pack_codes(matrix, self.factor.bits)

    def _tiles(self) -> Tensor | None:
        """`[tiles, height, width]`: values, or codes of the factor's own width."""
        fmt, tile = self.program.segments[0].resolve(), self.program.tile
        at = tile_coordinates(self.program, 0)
        ranges = {plane.name: (0, entry_count(plane, *at)) for plane in fmt.planes(tile, self.program.dtype)}
        planes: Planes | None = self.packed.entries(0, ranges)
        if planes is None or isinstance(self.factor, Pool):
            return None if planes is None else planes["values"]
        elements = fmt.elements(tile, self.program.dtype)
        if elements is None:
            return None
        codes = unpack_codes(planes[elements.plane].flatten(0, 1), elements.bits, tile[1])
        shift = (1 << (elements.bits - 1)) - (1 << (self.factor.bits - 1))
        return (codes - shift).view(-1, *tile)


class WithFactors(PackedPlanes):
    """The planes of a weight and its factors: those that come back bit for bit, as `pools` has them now."""

    def __init__(self, planes: PackedPlanes, factors: tuple[PackedFactor, ...], pools: Mapping[str, Tensor]) -> None:
        self._planes = planes
        self._factors = {each.name: each for each in factors if _same(each.pool(), pools[each.name])}
        self.apart = frozenset(self._factors)
        self.names = planes.names | self.apart

    @property
    def nbytes(self) -> int:
        return self._planes.nbytes + sum(each.packed.nbytes for each in self._factors.values())

    def whole(self) -> dict[str, Tensor]:
        return {**self._planes.whole(), **{name: self.pool(name) for name in self._factors}}

    def pool(self, name: str) -> Tensor:
        if name not in self._factors:
            return self._planes.pool(name)
        found = self._factors[name].pool()
        assert found is not None
        return found

    def entries(self, segment: int, ranges: Mapping[str, tuple[int, int]]) -> Planes | None:
        return self._planes.entries(segment, ranges)


def _same(found: Tensor | None, pool: Tensor) -> bool:
    return found is not None and found.dtype == pool.dtype and torch.equal(_bytes(found), _bytes(pool))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)
