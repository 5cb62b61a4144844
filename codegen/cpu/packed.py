"""Planes in lane order, unpacked to canonical planes when somebody asks for those.

A weight lives once: after the tiles executor has packed its planes, `stoicc.buffers` lets the
canonical ones go, and this gives them back, whole or a run of entries at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stoicc.codegen.cpu.build import instruction_set
from stoicc.codegen.cpu.plan import FormatPart
from stoicc.codegen.executor import PackedPlanes
from stoicc.ir.format import Planes, Tile
from stoicc.ir.planes import pool_name


@dataclass(frozen=True, eq=False)
class PackedSegment:
    """The packed planes of a segment, and the inverse of their packing."""

    planes: Planes
    unpack: Callable[[Planes, Tile], Planes]


def can_unpack(part: FormatPart) -> bool:
    """Whether the canonical planes of a part can be had from its packed ones."""
    return part.code.unpack is not None and not part.materialised


def address_of_storage(tensor: Tensor) -> int:
    """The address at which a tensor's storage begins: the same for all that share it."""
    return tensor.untyped_storage().data_ptr()


class UnpackedOnDemand(PackedPlanes):
    """The planes of a weight that can be unpacked. Those that packing left where they were count as pools.

    They are shown packed (`held`) to code for the instruction set that they were packed for: their order may depend on
    it.
    """

    def __init__(
        self, tile: Tile, segments: Mapping[int, PackedSegment], pools: Mapping[str, Tensor], isa: str
    ) -> None:
        self._tile, self._segments, self._isa = tile, segments, isa
        packed = {pool_name(index, name): p for index, part in segments.items() for name, p in part.planes.items()}
        moved = {name: p for name, p in packed.items() if address_of_storage(p) != address_of_storage(pools[name])}
        self.names = frozenset(moved)
        self._bytes = sum(plane.nbytes for plane in moved.values())

    @property
    def nbytes(self) -> int:
        return self._bytes

    def whole(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for index, part in self._segments.items():
            planes = self._unpacked(part, part.planes)
            own = {address_of_storage(plane) for plane in part.planes.values()}
            for name, plane in planes.items():
                if pool_name(index, name) in self.names:  # not a view: its base would hold the memory as well
                    found[pool_name(index, name)] = (
                        plane.clone() if address_of_storage(plane) in own else plane
                    ).detach()
        return found

    def held(self, segment: int) -> Planes | None:
        part = self._segments.get(segment)
        return None if part is None or instruction_set() != self._isa else part.planes

    def entries(self, segment: int, ranges: Mapping[str, tuple[int, int]]) -> Planes | None:
        part = self._segments.get(segment)
        if part is None:
            return None
        return self._unpacked(part, {name: part.planes[name][first:last] for name, (first, last) in ranges.items()})

    def _unpacked(self, part: PackedSegment, planes: Planes) -> Planes:
        with torch.inference_mode(False), torch.no_grad():  # what an edit could not be counted of is of no use
            return part.unpack(planes, self._tile)
