"""Fakes for tests of the autotuner: a clock, a stopwatch and a cost model that answer from a formula."""

from collections.abc import Callable, Hashable, Mapping

from stoicc.ir.types import Module
from stoicc.passes.cost_model import CostModel, Prediction
from stoicc.timing import Call, Stopwatch
from stoicc.tuning_arms import Arm

Formula = Callable[[Arm, int], float]
"""Seconds of an arm at a batch size."""


def parts_of(arm: Arm) -> str:
    """The split-k option of an arm's schedule, as text."""
    return arm.structure.passes.partition("split-k{parts=")[2].partition("}")[0].partition(",")[0]


class FakeStopwatch(Stopwatch):
    """Times come from a formula, and the clock moves by what was timed (and a little for being asked).

    Attributes:
        timed: how many calls were timed.
        ran: threads and arms in the order in which they were first timed.
    """

    def __init__(self, formula: Formula, tick: float = 0.0) -> None:
        super().__init__()
        self.formula, self.tick = formula, tick
        self.clock, self.timed = 0.0, 0

    def now(self) -> float:
        self.clock += self.tick
        return self.clock

    def samples(self, calls: Mapping[Hashable, Call], rounds: int) -> dict[Hashable, list[float]]:  # type: ignore[override]
        times: dict[Hashable, list[float]] = {}
        for arm, call in calls.items():
            assert isinstance(arm, Arm)
            batch = call.run.args[0].shape[0]  # type: ignore[attr-defined]
            seconds = self.formula(arm, batch)
            times[arm] = [seconds * (1 + 0.001 * (turn % 3)) for turn in range(rounds)]
            self.clock += sum(times[arm])
            self.timed += rounds
        return times


class FakeModel(CostModel):
    """Predicts from the schedule alone: `formula(parts of the longest split, executor, batch)`."""

    target = "cpu"

    def __init__(self, formula: Callable[[Module, str, int], float]) -> None:
        self.formula = formula
        self.asked = 0

    def predict(self, module: Module, batch: int, x_dtype: str, threads: int = 1) -> Prediction:
        self.asked += 1
        assert module.schedule is not None
        return Prediction.of(bytes=self.formula(module, module.schedule.regime(batch), batch))


def flat(module: Module, executor: str, batch: int) -> float:
    """Every tiles schedule alike, dense-once behind them."""
    return 1e-3 if executor == "tiles" else 2e-3
