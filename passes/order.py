"""order: in which order tile rows run."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from stoicc.ir.types import Module
from stoicc.passes.base import Pass, scheduled, with_schedule
from stoicc.passes.costs import tile_costs


@dataclass(frozen=True)
class Order(Pass):
    """Reorder tile rows.

    by=cost: the row with the most bytes first, so that threads that take the next free row end
        at about the same time. Rows of equal cost keep their natural order.
    by=row: natural order; neighbouring rows of y are written one after the other.
    by=none: leave the order as it is.
    """

    name: ClassVar[str] = "order"
    by: Literal["cost", "row", "none"] = "cost"

    def __post_init__(self) -> None:
        self.check("by", self.by in ("cost", "row", "none"), "cost or row or none")

    def apply(self, module: Module) -> Module:
        schedule = scheduled(module)
        if self.by == "none":
            return with_schedule(module, schedule)
        if self.by == "row":
            return with_schedule(module, schedule.order(range(len(schedule.row_order))))
        heaviest_first = np.argsort(-tile_costs(module.tiles).sum(axis=1), kind="stable")
        return with_schedule(module, schedule.order(heaviest_first.tolist()))
