"""split-k: several work items per tile row, so that every core or SM has work."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from stoicc.ir.options import is_whole
from stoicc.ir.types import Module
from stoicc.passes.base import Pass, scheduled, with_schedule
from stoicc.passes.costs import csr_costs


@dataclass(frozen=True)
class SplitK(Pass):
    """Cut each tile row into parts of about equal bytes; a reduction adds the parts' sums.

    parts=<n>: up to n parts (a row of fewer tiles has fewer); 1 undoes a split.
    parts=auto: the fewest parts that give `min_items` work items where the tiles allow it.
    """

    name: ClassVar[str] = "split-k"
    requires: ClassVar[tuple[str, ...]] = ("build-csr",)
    parts: int | Literal["auto"] = 1
    min_items: int = 64

    def __post_init__(self) -> None:
        whole = is_whole(self.parts) and self.parts >= 1
        self.check("parts", self.parts == "auto" or whole, "auto or a whole number from 1")
        self.check("min_items", is_whole(self.min_items) and self.min_items >= 1, "a whole number from 1")

    def apply(self, module: Module) -> Module:
        schedule = scheduled(module)
        rows, columns = module.tiles.grid
        parts = min(-(-self.min_items // rows), columns) if isinstance(self.parts, str) else self.parts
        return with_schedule(module, schedule.split_k(parts, csr_costs(module.tiles, schedule)))
