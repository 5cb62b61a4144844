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
    by=item: the row with the costliest work item first (before there are items, as by=cost): parts of
        a row that split-k cut come where they are small enough to fill what whole rows leave.
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
        by_item = self.by == "item" and schedule.items
        loads = _costliest_items(module.tiles, schedule) if by_item else tile_costs(module.tiles).sum(axis=1)
        return with_schedule(module, schedule.order(np.argsort(-loads, kind="stable").tolist()))


def _costliest_items(program: TileProgram, schedule: Schedule) -> NDArray[np.float64]:
    """Bytes of the costliest item of each tile row, `[tile rows]`."""
    costs = csr_costs(program, schedule)
    costliest = np.zeros(program.grid[0])
    for item in schedule.items:
        costliest[item.row] = max(costliest[item.row], item_cost(item, costs))
    return costliest
