"""order: in which order tile rows run."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from stoicc.ir.schedule import Schedule, item_cost
from stoicc.ir.types import Module, TileProgram
from stoicc.passes.base import Pass, scheduled, with_schedule
from stoicc.passes.costs import csr_costs, tile_costs


@dataclass(frozen=True)
class Order(Pass):
    """Reorder tile rows.

    by=cost: the row with the most bytes first, so that threads that take the next free row end
        at about the same time. Rows of equal cost keep their natural order.
    by=item: rows with costlier work items first (rows, before there are items), in classes of size: a class
        takes in a factor of 2, and the mean row is in the middle of one. Rows of a class keep their natural
        order, so that a thread that takes neighbours reads their tiles as one stream: a row out of that
        order begins with misses. Rows that split-k cut come last in a class: their parts fill
        what whole rows leave.
    by=row: natural order; neighbouring rows of y are written one after the other.
    by=none: leave the order as it is.
    """

    name: ClassVar[str] = "order"
    by: Literal["cost", "item", "row", "none"] = "cost"

    def __post_init__(self) -> None:
        self.check("by", self.by in ("cost", "item", "row", "none"), "cost or item or row or none")

    def apply(self, module: Module) -> Module:
        schedule = scheduled(module)
        if self.by == "none":
            return with_schedule(module, schedule)
        if self.by == "row":
            return with_schedule(module, schedule.order(range(len(schedule.row_order))))
        rows = tile_costs(module.tiles).sum(axis=1)
        if self.by == "cost":
            return with_schedule(module, schedule.order(np.argsort(-rows, kind="stable").tolist()))
        items = _costliest_items(module.tiles, schedule) if schedule.items else rows
        cut = np.zeros(len(rows), dtype=bool)
        cut[[item.row for item in schedule.items if item.parts > 1]] = True
        return with_schedule(module, schedule.order(np.lexsort((cut, -_size_class(items))).tolist()))


def _size_class(loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """By how many factors of 2 each load is above the mean, rounded; of no load, minus infinity."""
    with np.errstate(divide="ignore"):
        return np.round(np.log2(loads / loads.mean())) if loads.any() else loads


def _costliest_items(program: TileProgram, schedule: Schedule) -> NDArray[np.float64]:
    """Bytes of the costliest item of each tile row, `[tile rows]`."""
    costs = csr_costs(program, schedule)
    costliest = np.zeros(program.grid[0])
    for item in schedule.items:
        costliest[item.row] = max(costliest[item.row], item_cost(item, costs))
    return costliest
