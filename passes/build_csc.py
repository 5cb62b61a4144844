"""build-csc: the tiles of every live segment by tile column, for the gradient of x."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from stoicc.ir.options import is_whole
from stoicc.ir.schedule import Schedule, TileCsc, Transposed, cut_evenly
from stoicc.ir.types import Module, TileProgram
from stoicc.passes.base import Pass, scheduled, with_schedule
from stoicc.passes.costs import tile_costs


@dataclass(frozen=True)
class BuildCsc(Pass):
    """The transposed schedule: one csc per live segment over the same payload, columns in bins of about equal bytes.

    The column with the most bytes runs first, so that threads that take the next free bin end at about the same
    time. A column is never cut: its sums are added in one order, whatever the number of threads. A kernel runs this
    pass itself when a gradient is first asked of it.
    """

    name: ClassVar[str] = "build-csc"
    after: ClassVar[tuple[str, ...]] = ("drop-empty",)
    bins: int = 256

    def __post_init__(self) -> None:
        self.check("bins", is_whole(self.bins) and self.bins >= 1, "a whole number from 1")

    def apply(self, module: Module) -> Module:
        schedule, tile_map = scheduled(module), module.tiles.map_array()
        costs = column_costs(module.tiles, schedule)
        order = np.argsort(-costs, kind="stable")
        cscs = tuple(tile_csc(tile_map, segment) for segment in schedule.live)
        transposed = Transposed(tuple(order.tolist()), cscs, cut_evenly(costs[order], self.bins))
        return with_schedule(module, replace(schedule, transposed=transposed))


def tile_csc(tile_map: NDArray[np.int32], segment: int) -> TileCsc:
    """The csc of one segment from the tile map `[tile rows, tile columns]`."""
    member = tile_map == segment
    payload = np.cumsum(member).reshape(member.shape) - 1  # the payload stands in row-major order
    columns, rows = np.nonzero(member.T)
    col_ptr = np.concatenate([[0], np.cumsum(member.sum(axis=0))])
    return TileCsc(segment, tuple(col_ptr.tolist()), tuple(rows.tolist()), tuple(payload[rows, columns].tolist()))


def column_costs(program: TileProgram, schedule: Schedule) -> NDArray[np.float64]:
    """Bytes that each tile column reads, `[tile columns]`: its tiles of all live segments."""
    live = np.isin(program.map_array(), schedule.live)
    costs: NDArray[np.float64] = np.where(live, tile_costs(program), 0.0).sum(axis=0)
    return costs
