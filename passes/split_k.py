"""split-k: several work items per tile row, so that every core or SM has work."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from stoicc.ir.options import is_whole
from stoicc.ir.types import Module
from stoicc.passes.base import Pass, scheduled, with_schedule
from stoicc.passes.costs import csr_costs, row_costs

MODES = ("auto", "balance")

WHOLE = 3
"""Grains up to which a row stays whole under parts=balance."""


@dataclass(frozen=True)
class SplitK(Pass):
    """Cut tile rows into parts of about equal bytes; a reduction adds the parts' sums.

    parts=<n>: up to n parts (a row of fewer tiles has fewer); 1 undoes a split.
    parts=auto: the fewest parts, the same for every row, that give `min_items` work items where the
        tiles allow it.
    parts=balance: a grain is half of 1 / `min_items` of all bytes, and at least `min_bytes`. A row of
        up to three grains stays whole; a heavier one is cut into as many parts as it holds grains, to
        the nearest. So a row that is heavier than the others keeps no thread waiting, a weight of few
        tile rows has work for all, and one of many about equal rows is left as it is. Parts are
        smaller than whole rows: put them last with `order{by=item}` and they fill the gaps.

    Nothing depends on the number of threads of a call: sums are added in the same order.
    """

    name: ClassVar[str] = "split-k"
    requires: ClassVar[tuple[str, ...]] = ("build-csr",)
    parts: int | Literal["auto", "balance"] = 1
    min_items: int = 64
    min_bytes: int = 1 << 16

    def __post_init__(self) -> None:
        whole = is_whole(self.parts) and self.parts >= 1
        self.check("parts", self.parts in MODES or whole, "auto, balance or a whole number from 1")
        self.check("min_items", is_whole(self.min_items) and self.min_items >= 1, "a whole number from 1")
        self.check("min_bytes", is_whole(self.min_bytes) and self.min_bytes >= 1, "a whole number from 1")

    def apply(self, module: Module) -> Module:
        schedule = scheduled(module)
        return with_schedule(module, schedule.split_k(self._parts(module), csr_costs(module.tiles, schedule)))

    def _parts(self, module: Module) -> int | list[int]:
        """The most parts of every tile row, or of each."""
        rows, columns = module.tiles.grid
        if not isinstance(self.parts, str):
            return self.parts
        if self.parts == "auto":
            return min(-(-self.min_items // rows), columns)
        loads = row_costs(module.tiles, scheduled(module))
        grain = max(float(loads.sum()) / self.min_items / 2, self.min_bytes)
        # the nearest whole number, a half rounded down, whatever the last bit of the quotient is
        grains = [math.ceil(load / grain - 0.5 - 1e-9) for load in loads.tolist()]
        return [count if count > WHOLE else 1 for count in grains]
