"""regimes: which executor runs at which batch size."""

from dataclasses import dataclass, replace
from typing import ClassVar

from stoicc.ir.types import Module
from stoicc.passes.base import Pass, scheduled, with_schedule


@dataclass(frozen=True)
class Regimes(Pass):
    """`tiles` for batches up to `tiles` rows of x, `dense-once` above; 0 is dense-once at every batch."""

    name: ClassVar[str] = "regimes"
    tiles: int = 32

    def __post_init__(self) -> None:
        self.check("tiles", self.tiles >= 0, "a batch size from 0")

    def apply(self, module: Module) -> Module:
        schedule = replace(scheduled(module), regimes=()).executor("dense-once")
        return with_schedule(module, schedule.executor("tiles", self.tiles) if self.tiles else schedule)
