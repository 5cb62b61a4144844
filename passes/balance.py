"""balance: group work items into bins of about equal bytes."""

from dataclasses import dataclass
from typing import ClassVar

from stoicc.ir.options import is_whole
from stoicc.ir.types import Module
from stoicc.passes.base import Pass, scheduled, with_schedule
from stoicc.passes.costs import csr_costs


@dataclass(frozen=True)
class Balance(Pass):
    """At most `bins` bins of neighbouring items; a thread takes a bin at a time."""

    name: ClassVar[str] = "balance"
    requires: ClassVar[tuple[str, ...]] = ("build-csr",)
    after: ClassVar[tuple[str, ...]] = ("order", "split-k")
    bins: int = 256

    def __post_init__(self) -> None:
        self.check("bins", is_whole(self.bins) and self.bins >= 1, "a whole number from 1")

    def apply(self, module: Module) -> Module:
        schedule = scheduled(module)
        return with_schedule(module, schedule.balance(self.bins, csr_costs(module.tiles, schedule)))
