"""build-csr: the tiles of every live segment by tile row."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from stoicc.ir.schedule import TileCsr
from stoicc.ir.types import Module
from stoicc.passes.base import Pass, scheduled, with_schedule


@dataclass(frozen=True)
class BuildCsr(Pass):
    """One csr per live segment, and one work item per tile row."""

    name: ClassVar[str] = "build-csr"

    def apply(self, module: Module) -> Module:
        schedule = scheduled(module)
        tile_map = module.tiles.map_array()
        csrs = tuple(tile_csr(tile_map, segment) for segment in schedule.live)
        return with_schedule(module, replace(schedule, csrs=csrs).split_k(1))


def tile_csr(tile_map: NDArray[np.int32], segment: int) -> TileCsr:
    """The csr of one segment from the tile map `[tile rows, tile columns]`."""
    member = tile_map == segment
    row_ptr = np.concatenate([[0], np.cumsum(member.sum(axis=1))])
    return TileCsr(segment, tuple(row_ptr.tolist()), tuple(np.nonzero(member)[1].tolist()))
