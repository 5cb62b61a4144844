"""regimes: which executor runs at which batch size."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from stoicc.ir.options import is_whole
from stoicc.ir.schedule import EXECUTORS
from stoicc.ir.types import Module
from stoicc.passes.base import Pass, scheduled, with_schedule
from stoicc.passes.cost_model import provided

CROSSOVER = {"bf16": 64, "f16": 256, "f32": 256}
"""Batch up to which a CPU multiplies tile by tile, by weight dtype, where nothing was measured on this device.

Measured on a Xeon with AMX (4096 x 4096, all formats): there its BLAS overtakes at about this batch
in bf16, which AMX speeds up, and at about four times that in the others.
"""


@dataclass(frozen=True)
class Regimes(Pass):
    """`tiles` for batches up to `tiles` rows of x, `dense-once` above; 0 is dense-once at every batch.

    above=vendor: a library that has the matrix in its own form in place of dense-once, on GPUs and for matrices
        of dense or of 2:4 tiles alone (`stoicc.ir.library`).

    tiles=auto: where the constants of this device were measured (`stoicc.cost_model`), the batch at which
        the cost model predicts that dense-once overtakes for this matrix; else the built-in crossover of a
        CPU for the weight's dtype.
    """

    name: ClassVar[str] = "regimes"
    tiles: int | Literal["auto"] = "auto"
    above: Literal["dense-once", "vendor"] = "dense-once"

    def __post_init__(self) -> None:
        whole = is_whole(self.tiles) and self.tiles >= 0
        self.check("tiles", self.tiles == "auto" or whole, "auto or a batch size from 0")
        self.check("above", self.above in EXECUTORS[1:], f"one of {', '.join(EXECUTORS[1:])}")

    def apply(self, module: Module) -> Module:
        batch = crossover(module) if isinstance(self.tiles, str) else self.tiles
        schedule = replace(scheduled(module), regimes=()).executor(self.above)
        return with_schedule(module, schedule.executor("tiles", batch) if batch else schedule)


def crossover(module: Module) -> int:
    """The largest batch for `tiles`: predicted with measured constants where there are some, else from the table."""
    found, schedule = provided("cpu"), scheduled(module)
    if found is None or len(schedule.csrs) != len(schedule.live):
        return CROSSOVER[module.tiles.dtype]  # without csrs there is nothing to predict
    model, threads = found
    return model.crossover(module, threads)
