"""What a scheduled module costs in seconds, before anything is built or run.

A `CostModel` predicts one call of an executor and says what the time goes to. The models are in
`stoicc.passes.cost_cpu` and `stoicc.passes.cost_gpu`; constants of a device come from outside
(`stoicc.device_constants` measures and stores them). Passes that want a device's constants ask
`provided`, which finds a model only where something outside provides one.
"""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from stoicc.ir.errors import InputError
from stoicc.ir.schedule import EVERYWHERE, Regime, Schedule
from stoicc.ir.types import Module

PARTS = ("bytes", "compute", "imbalance", "reduction", "decode", "gemm", "overhead")
"""Causes of time, as `Prediction.parts` names them.

bytes: reading the payload. compute: what tiles take beyond that. imbalance: processors that wait for the
last one. reduction: adding the parts of a split tile row. decode, gemm: of the dense-once executor.
overhead: the call itself, and x put in the order that tiles read.
"""

LARGEST_BATCH = 4096
"""Crossovers are looked for up to this batch; the tiles executor serves any larger one where none is found."""


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of one call, and what they go to; prints as one line.

    Attributes:
        seconds: of the call.
        parts: seconds by cause (all of PARTS); they sum to `seconds`.
    """

    seconds: float
    parts: Mapping[str, float]

    @staticmethod
    def of(**parts: float) -> "Prediction":
        """A prediction from its parts; those left out are 0."""
        every = {name: float(parts.pop(name, 0.0)) for name in PARTS}
        assert not parts, f"unknown parts: {parts}"
        return Prediction(sum(every.values()), every)

    def __str__(self) -> str:
        shown = sorted(((seconds, name) for name, seconds in self.parts.items() if seconds > 0), reverse=True)
        causes = ", ".join(f"{name} {seconds / max(self.seconds, 1e-30):.0%}" for seconds, name in shown)
        return f"{self.seconds * 1e6:.1f} us: {causes or 'nothing'}"


class CostModel(ABC):
    """Predicts scheduled modules on one device.

    Attributes:
        target: "cpu" or "triton", as backends are named.
        margin: by how much `tiles` may be predicted to be slower and still be chosen.
    """

    target: str
    margin: ClassVar[float] = 1.0

    @abstractmethod
    def predict(self, module: Module, batch: int, x_dtype: str, threads: int = 1) -> Prediction:
        """Seconds of one call with the executor of `schedule.regime(batch)`.

        Args:
            module: with a schedule.
            batch: rows of x, from 1.
            x_dtype: "bf16", "f16" or "f32".
            threads: of the CPU; a GPU model does not read it.

        Raises:
            InputError: no schedule, or a batch or number of threads below 1.
        """

    def crossover(self, module: Module, threads: int = 1, above: str = "dense-once") -> int:
        """The largest batch (0, or a power of two) up to which `tiles` is predicted to take `margin` times `above`."""
        schedule = replace(checked(module, 1, threads), regimes=())
        best, batch = 0, 1
        while batch <= LARGEST_BATCH:
            tiles, other = (
                self.predict(Module(module.tiles, schedule.executor(kind)), batch, module.tiles.dtype, threads).seconds
                for kind in ("tiles", above)
            )
            if tiles > self.margin * other:
                return best
            best, batch = batch, batch * 2
        return best

    def executors(self, module: Module, batch: int) -> tuple[str, ...]:
        """Executors that may serve a batch of a matrix on this device."""
        return EVERYWHERE

    def regimes(self, module: Module, threads: int = 1) -> tuple[Regime, ...]:
        """The executor that is predicted to be fastest, by batch: limits are powers of two up to LARGEST_BATCH.

        `dataclasses.replace(schedule, regimes=...)` puts them to use. Where two take equally long, the one that
        keeps less beside the payload serves: tiles, then dense-once.
        """
        schedule = replace(checked(module, 1, threads), regimes=())
        found: list[Regime] = []
        for batch in (1 << bit for bit in range(LARGEST_BATCH.bit_length())):
            times = {
                kind: self.predict(
                    Module(module.tiles, schedule.executor(kind)), batch, module.tiles.dtype, threads
                ).seconds
                for kind in self.executors(module, batch)
            }
            kind = min(times, key=lambda kind: times[kind])  # the first of the fastest
            if found and found[-1].executor == kind:
                found.pop()
            found.append(Regime(kind, batch))
        return (*found[:-1], replace(found[-1], max_batch=None))


Provider = Callable[[], "tuple[CostModel, int] | None"]
"""Finds a target's model with measured constants, and the threads to predict for; None where nothing was measured."""

_PROVIDERS: dict[str, Provider] = {}


def provide(target: str, provider: Provider) -> None:
    """Say where the measured model of a target is found; the provider is asked anew each time."""
    _PROVIDERS[target] = provider


def provided(target: str) -> "tuple[CostModel, int] | None":
    """The measured model of a target and its threads, or None: then passes keep to their built-in tables."""
    provider = _PROVIDERS.get(target)
    return provider() if provider is not None else None


# -- what the models share ---------------------------------------------------------------------


def checked(module: Module, batch: int, threads: int) -> Schedule:
    """The schedule of a module that can be predicted, or InputError."""
    where = f"cost model, {module.tiles.name}"
    if module.schedule is None:
        raise InputError(f"{where}: expected a schedule, found none; run a pipeline first")
    if batch < 1:
        raise InputError(f"{where}: expected a batch from 1, found {batch}; predict a call that does something")
    if threads < 1:
        raise InputError(f"{where}: expected threads from 1, found {threads}; use torch.get_num_threads()")
    return module.schedule


def item_tiles(schedule: Schedule) -> NDArray[np.int64]:
    """Tiles of each csr in each work item, `[items, csrs]`."""
    ranges = np.array([item.ranges for item in schedule.items], dtype=np.int64)
    ranges = ranges.reshape(len(schedule.items), len(schedule.csrs), 2)
    tiles: NDArray[np.int64] = ranges[:, :, 1] - ranges[:, :, 0]
    return tiles


def bin_loads(schedule: Schedule, loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """Load of each bin from that of each item; without bins every item is one."""
    if not schedule.bin_ptr:
        return loads
    total = np.concatenate([[0.0], np.cumsum(loads)])
    pointers = np.asarray(schedule.bin_ptr)
    sums: NDArray[np.float64] = total[pointers[1:]] - total[pointers[:-1]]
    return sums


def makespan(loads: Sequence[float] | NDArray[np.float64], workers: int) -> float:
    """When the last of `workers` ends, if each takes the next load in order as soon as it is free."""
    ends = [0.0] * max(1, min(workers, len(loads)))
    for load in loads:
        heapq.heapreplace(ends, ends[0] + float(load))
    return max(ends)
