"""regimes: which executor runs at which batch size."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from stoicc.ir.options import is_whole
from stoicc.ir.schedule import EXECUTORS
from stoicc.ir.types import Module
from stoicc.passes.base import Pass, scheduled, with_schedule
from stoicc.passes.cost_gpu import GPUS, VENDOR_BATCH, GpuCostModel
from stoicc.passes.cost_model import provided

CROSSOVER = {"bf16": 2048, "f16": 1024, "f32": 1024}
"""Batch up to which a CPU multiplies tile by tile, by weight dtype, where nothing was measured on this device.

The largest batches of `python -m bench.crossover`, and f16 as f32: on a Xeon with AMX decoding for the BLAS pays at
none of them.
"""

LEAST_GPU = VENDOR_BATCH // 2
"""Batch up to which a GPU multiplies tile by tile, whatever a model says: there a product takes the time of its bytes,
of which tiles have the fewest, and of a matrix of few tiles a model knows little."""

GPU = "H200"
"""The GPU whose constants are taken where the one that is there has none, or none is there."""


@dataclass(frozen=True)
class Regimes(Pass):
    """`tiles` for batches up to `tiles` rows of x, `dense-once` above; 0 is dense-once at every batch.

    above=vendor: a library that keeps the matrix in its own form in place of dense-once, on GPUs (`stoicc.ir.library`).

    tiles=auto: the batch at which a cost model predicts that `above` overtakes for this matrix. device=cpu: the
        model of constants that were measured on this device (`stoicc.cost_model`); where none were, the built-in
        crossover for the weight's dtype. device=gpu: that of the GPU which is there, else of an H200.
    """

    name: ClassVar[str] = "regimes"
    tiles: int | Literal["auto"] = "auto"
    above: Literal["dense-once", "vendor"] = "dense-once"
    device: Literal["cpu", "gpu"] = "cpu"

    def __post_init__(self) -> None:
        whole = is_whole(self.tiles) and self.tiles >= 0
        self.check("tiles", self.tiles == "auto" or whole, "auto or a batch size from 0")
        self.check("above", self.above in EXECUTORS[1:], f"one of {', '.join(EXECUTORS[1:])}")
        self.check("device", self.device in ("cpu", "gpu"), "cpu or gpu")

    def apply(self, module: Module) -> Module:
        batch = self.tiles if not isinstance(self.tiles, str) else self._crossover(module)
        schedule = replace(scheduled(module), regimes=()).executor(self.above)
        return with_schedule(module, schedule.executor("tiles", batch) if batch else schedule)

    def _crossover(self, module: Module) -> int:
        if self.device == "cpu":
            return crossover(module)
        model, _ = provided("triton") or (GpuCostModel(GPUS[GPU]), 1)
        return max(LEAST_GPU, model.crossover(module, above=self.above))


def crossover(module: Module) -> int:
    """The largest batch for `tiles`: predicted with measured constants where there are some, else from the table."""
    found, schedule = provided("cpu"), scheduled(module)
    if found is None or len(schedule.csrs) != len(schedule.live):
        return CROSSOVER[module.tiles.dtype]  # without csrs there is nothing to predict
    model, threads = found
    return model.crossover(module, threads)
