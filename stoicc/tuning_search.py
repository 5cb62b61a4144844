"""The search of the autotuner: rank by the cost model, build the best few, race them, choose.

An *arm* is a schedule with one executor. Each batch size has a race of its own, by successive
halving; then the winners meet at every batch size, and the one schedule that is fastest over all
of them is chosen, with the executor that suits each batch.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from stoicc.compiler import compile
from stoicc.ir.dtypes import DTYPE_NAMES
from stoicc.ir.errors import StoiccError, brief
from stoicc.ir.schedule import Regime
from stoicc.ir.types import Module
from stoicc.kernel import Kernel
from stoicc.passes import Pipeline
from stoicc.passes.cost_model import CostModel
from stoicc.passes.reorder_rows import ReorderRows
from stoicc.timing import Call, Stopwatch
from stoicc.tuning_arms import TIE, Arm, Rotation, disagreement, fastest
from stoicc.tuning_result import Trial
from stoicc.tuning_space import Structure, Tile

RANK_BY, BUILD_BY, RACE_BY = 0.3, 0.55, 0.85
"""Shares of the budget after which ranking, building and the races of single batch sizes end."""
EARLY_ROUNDS, LAST_ROUNDS = 25, 200
"""The most rounds of a heat, and of the last one."""
NEAR = 1.25
"""Tile shapes whose best schedule is foretold to take no longer than so many times the least are all tried."""


@dataclass(frozen=True)
class Plan:
    """One schedule for all batch sizes: `tiles` up to `crossover` rows of x, `dense-once` above."""

    structure: Structure
    crossover: int
    arms: dict[int, Arm]


class Search:
    """One run of the autotuner.

    Args:
        kernel_of: the weight compiled at a tile shape, its rows reordered or not, with the default schedule.
        structures: what may be chosen, the default first.
        executors: which may serve a batch; what the default uses is always allowed.
        default: a kernel with the default schedule.
        budget_s: seconds from `started` on.
        keep: how many arms per batch size are built, beside the default.
        copies: of each kernel, which are called in turn.
        report: told the stage that begins, for a progress bar.
    """

    def __init__(
        self,
        kernel_of: Callable[[Tile, bool], Kernel],
        structures: Sequence[Structure],
        executors: Sequence[str],
        default: Kernel,
        batch_sizes: Sequence[int],
        x_dtype: torch.dtype,
        model: CostModel,
        stopwatch: Stopwatch,
        started: float,
        budget_s: float,
        keep: int,
        copies: int,
        report: Callable[[str], None],
    ) -> None:
        self.kernel_of, self.structures, self.executors = kernel_of, structures, tuple(executors)
        self.default, self.batch_sizes = default, sorted(set(batch_sizes))
        self.x_dtype, self.model, self.stopwatch, self.report = x_dtype, model, stopwatch, report
        self.keep, self.copies = keep, copies
        self.started, self.budget_s = started, budget_s
        self.notes: list[str] = []
        self.seen: set[int] = set()
        self.between = 0.0
        self.predicted: dict[tuple[Arm, int], float] = {}
        self.problems: dict[tuple[Arm, int], str] = {}
        self.estimates: dict[tuple[Arm, int], float] = {}
        self.seconds: dict[tuple[Arm, int], list[float]] = {}
        self.ratios: dict[tuple[Arm, int], list[float]] = {}
        self.kernels: dict[Arm, Rotation] = {}
        self.answers: dict[int, Tensor] = {}
        generator = torch.Generator("cpu").manual_seed(0)
        self.x = {
            batch: torch.randn(batch, default.in_features, generator=generator, device="cpu").to(
                default.device, x_dtype
            )
            for batch in self.batch_sizes
        }

    # -- the whole -------------------------------------------------------------------------

    def run(self) -> tuple[Plan, tuple[Trial, ...]]:
        """The plan to compile, and all trials with what they came to."""
        self._rank()
        self._build()
        winners = {}
        for index, batch in enumerate(self.batch_sizes):
            self.report(f"racing at batch {batch}")
            share = (RACE_BY * self.budget_s - self._elapsed()) / (len(self.batch_sizes) - index)
            winners[batch] = self._race(batch, self._elapsed() + share)
        plan = self._choose(winners)
        return plan, tuple(self._trials(winners, plan))

    def default_arm(self, batch: int) -> Arm:
        """What the default schedule runs at this batch size."""
        return Arm(self.structures[0], self.default.schedule.regime(batch))

    def _elapsed(self) -> float:
        return self.stopwatch.now() - self.started

    # -- ranking ---------------------------------------------------------------------------

    def _rank(self) -> None:
        """Predict every arm at every batch size, until the share of the budget ends."""
        self.report("ranking by the cost model")
        broken: dict[tuple[Tile, bool], str] = {}
        for index, structure in enumerate(self.structures):
            if index and self._elapsed() > RANK_BY * self.budget_s:
                left = len(self.structures) - index
                self.notes.append(f"{left} schedules, those furthest from the default, were not ranked: out of time")
                break
            cut = structure.tile, structure.reordered
            if cut not in broken:
                try:
                    self._predict(structure)
                except StoiccError as error:
                    if index == 0:
                        raise
                    broken[cut] = str(error)
        self.notes += [
            f"tile {tile[0]}x{tile[1]}{' of reordered rows' * reordered} was left out: {why}"
            for (tile, reordered), why in broken.items()
        ]

    def _predict(self, structure: Structure) -> None:
        program = self.kernel_of(structure.tile, structure.reordered).program
        if structure.reordered and program.beside.row_permutation is None:
            return  # no order of the rows pays
        schedule = Pipeline.parse(structure.passes).split()[1].run(Module(program)).schedule
        assert schedule is not None  # a pipeline makes one
        alike = hash((structure.tile, structure.reordered, structure.threads, replace(schedule, applied=())))
        if alike in self.seen and structure.passes != self.structures[0].passes:
            return  # another text for a schedule that is nearer to the default
        self.seen.add(alike)
        x_dtype = DTYPE_NAMES[self.x_dtype]
        for executor in ("tiles", "dense-once"):
            module = Module(program, replace(schedule, regimes=(Regime(executor),)))
            arm = Arm(structure, executor)
            for batch in self.batch_sizes:
                if self._allowed(arm, batch):
                    seconds = self.model.predict(module, batch, x_dtype, structure.threads).seconds
                    self.predicted[arm, batch] = seconds

    def _allowed(self, arm: Arm, batch: int) -> bool:
        """Panels are decoded alike whatever the schedule: dense-once has one arm for each tile shape."""
        if arm == self.default_arm(batch):
            return True
        varies = arm.executor == "tiles" or arm.structure == self._panels(arm.structure)
        return varies and arm.executor in self.executors

    def _ranked(self, batch: int) -> list[Arm]:
        """The arms to build for a batch size: the default, the best predicted of each tile shape, then the best of all.

        Many schedules of a tile shape are foretold alike; were they all, a shape that is misjudged by little would
        never be tried.
        """
        arms = sorted((arm for arm, at in self.predicted if at == batch), key=lambda arm: self.predicted[arm, batch])
        least = self.predicted[arms[0], batch]
        near = [arm for arm in arms if self.predicted[arm, batch] <= NEAR * least]
        firsts = {arm.structure.tile: arm for arm in reversed(near)}.values()
        shapes = sorted(firsts, key=lambda arm: self.predicted[arm, batch])
        return list(dict.fromkeys([self.default_arm(batch), *list(dict.fromkeys([*shapes, *arms]))[: self.keep]]))

    # -- building --------------------------------------------------------------------------

    def _build(self) -> None:
        """Build the arms rank by rank, so that what the budget leaves out is the least promising."""
        self.report("building the best predicted")
        ranked = {batch: self._ranked(batch) for batch in self.batch_sizes}
        missed = 0
        for rank in range(max(map(len, ranked.values()))):
            for batch, arms in ranked.items():
                if rank and rank < len(arms) and self._elapsed() > BUILD_BY * self.budget_s:
                    self.problems[arms[rank], batch] = "not reached: out of time"
                    missed += 1
                elif rank < len(arms):
                    self._try(arms[rank], batch)
        if missed:
            self.notes.append(f"{missed} promising trials were not reached: out of time; give a larger budget_s")

    def _try(self, arm: Arm, batch: int) -> None:
        """Build an arm, hold its output against the default's, and see how long a call takes."""
        is_default = arm == self.default_arm(batch)
        try:
            y = self._answer(arm, batch)
            problem = "" if is_default else disagreement(y, self.answers[batch], self.default.program.dtype)
        except Exception as error:  # compilers and drivers say anything; a schedule that fails cannot win
            if is_default:
                raise
            problem = f"failed: {brief(str(error))}"
        if problem:
            self.problems[arm, batch] = problem
            self.notes.append(f"batch {batch}, {arm.structure.passes}, {arm.executor}: {problem}")
            return
        if is_default:
            self.answers[batch] = y
        for _ in range(self.copies - 1):  # their executors are built when first called
            self._answer(arm, batch)
        before = self.stopwatch.now()
        seconds = self.stopwatch.samples({arm: self._call(arm, batch)}, 1)[arm][0]
        self.estimates[arm, batch] = seconds
        self.between = max(self.stopwatch.now() - before - seconds, 0.0)  # once a round, whatever runs in it

    def _answer(self, arm: Arm, batch: int) -> Tensor:
        y = self._call(arm, batch).run()
        assert isinstance(y, Tensor)  # that is what `_run` gives
        return y

    def _call(self, arm: Arm, batch: int) -> Call:
        if arm not in self.kernels:
            tiles = max(self.batch_sizes) if arm.executor == "tiles" else 0
            cut = self.kernel_of(arm.structure.tile, arm.structure.reordered)
            kernel = compile_as(cut, arm.structure.pipeline(tiles))
            self.kernels[arm] = Rotation(kernel, self.copies)
        return Call(partial(self.kernels[arm].run, self.x[batch]), arm.structure.threads)

    # -- racing ----------------------------------------------------------------------------

    def _race(self, batch: int, until: float) -> Arm:
        """The fastest arm at a batch size by successive halving; the default runs in every heat."""
        default = self.default_arm(batch)
        rivals = [arm for arm in self._ranked(batch) if (arm, batch) in self.estimates and arm != default]
        while len(rivals) > 2 and self._elapsed() < until:
            heats = math.ceil(math.log2(len(rivals)))
            rivals = self._heat(batch, rivals, (until - self._elapsed()) / heats, EARLY_ROUNDS)
            rivals = sorted(rivals, key=lambda arm: statistics.median(self.ratios[arm, batch]))[: -(-len(rivals) // 2)]
        if self._elapsed() < until or (default, batch) not in self.ratios:
            rivals = self._heat(batch, rivals, until - self._elapsed(), LAST_ROUNDS)
        return fastest({arm: self.ratios[arm, batch] for arm in [default, *rivals]})

    def _heat(self, batch: int, rivals: list[Arm], allowed: float, most: int) -> list[Arm]:
        """Time the default and its rivals in turn; those that the time does not allow are left out."""
        default = self.default_arm(batch)
        cost = self.between + self.estimates[default, batch]
        running = [default]
        for arm in rivals:
            if cost + self.estimates[arm, batch] <= max(allowed, 0) or (arm, batch) in self.ratios:
                cost += self.estimates[arm, batch]
                running.append(arm)
        rounds = min(max(int(allowed / max(cost, 1e-9)), 1), most)
        times = self.stopwatch.samples({arm: self._call(arm, batch) for arm in running}, rounds)
        for arm in running:
            self.seconds.setdefault((arm, batch), []).extend(times[arm])
            paired = [mine / theirs for mine, theirs in zip(times[arm], times[default], strict=True)]
            self.ratios.setdefault((arm, batch), []).extend(paired)
        return running[1:]

    # -- choosing --------------------------------------------------------------------------

    def _choose(self, winners: dict[int, Arm]) -> Plan:
        """The structure that is fastest over all batch sizes, each with the executor that suits it."""
        plain = self.structures[0]
        finalists = dict.fromkeys([plain, *(arm.structure for arm in winners.values())])
        if len(self.batch_sizes) > 1 and len(finalists) > 1:
            self.report("racing the winners at every batch size")
            self._meet(list(finalists))
        default = Plan(plain, self._default_crossover(), {batch: self.default_arm(batch) for batch in self.batch_sizes})
        plans = [default, *(plan for structure in finalists for plan in self._plans(structure))]
        best = min(plans, key=self._score)
        tied = [plan for plan in plans if self._score(plan) <= self._score(best) + TIE]
        if len(self.batch_sizes) == 1:  # the race has settled it, with the noise that it saw
            tied = [plan for plan in plans if list(plan.arms.values()) == list(winners.values())] or [best]
        return min(tied, key=lambda plan: (plan is not default, plan.structure.changes, self._score(plan)))

    def _meet(self, finalists: list[Structure]) -> None:
        """Time each finalist where it has not been, with the executor that is predicted to suit."""
        for index, batch in enumerate(self.batch_sizes):
            arms = []
            for structure in finalists:
                own = [arm for arm in self._arms(structure) if (arm, batch) in self.predicted]
                if not own or any((arm, batch) in self.ratios for arm in own):
                    continue
                arm = min(own, key=lambda arm: self.predicted[arm, batch])
                if (arm, batch) not in self.problems and self._elapsed() < self.budget_s:
                    self._try(arm, batch)
                    arms += [arm] if (arm, batch) in self.estimates else []
            share = (self.budget_s - self._elapsed()) / (len(self.batch_sizes) - index)
            if arms and share > 0:
                self._heat(batch, arms, share, LAST_ROUNDS)

    def _arms(self, structure: Structure) -> list[Arm]:
        """The arms that serve a structure: its tiles, and dense-once of its tile shape and threads."""
        return [Arm(structure, "tiles"), Arm(self._panels(structure), "dense-once")]

    def _panels(self, structure: Structure) -> Structure:
        """The structure that stands for dense-once at this tile shape: it runs on all threads."""
        plain = self.structures[0]
        reorder = f"{ReorderRows()}," * structure.reordered
        return replace(structure, passes=reorder + plain.passes, threads=max(structure.threads, plain.threads))

    def _plans(self, structure: Structure) -> list[Plan]:
        """Every crossover between the batch sizes for which both sides were timed."""
        tiles, panels = self._arms(structure)
        plans = []
        for count in range(len(self.batch_sizes) + 1):
            arms = {batch: tiles if i < count else panels for i, batch in enumerate(self.batch_sizes)}
            if all((arm, batch) in self.ratios for batch, arm in arms.items()):
                plans.append(Plan(structure, self._crossover(count), arms))
        return plans

    def _score(self, plan: Plan) -> float:
        """The mean logarithm of time over that of the default."""
        ratios = [statistics.median(self.ratios[arm, batch]) for batch, arm in plan.arms.items()]
        return statistics.fmean(map(math.log, ratios))

    def _crossover(self, count: int) -> int:
        """The largest batch for `tiles`, where the first `count` batch sizes are faster with it.

        Between two batch sizes that were timed the default's own crossover stands if it lies
        there, else their geometric mean; outside of them the default is kept as far as it goes.
        """
        usual = self._default_crossover()
        if count == len(self.batch_sizes):
            return max(usual, self.batch_sizes[-1])
        above = self.batch_sizes[count]
        if count == 0:
            return min(usual, above - 1)
        below = self.batch_sizes[count - 1]
        return usual if below <= usual < above else max(below, math.isqrt(below * (above - 1)))

    def _default_crossover(self) -> int:
        for regime in self.default.schedule.regimes:
            if regime.executor == "tiles":
                return regime.max_batch or max(self.batch_sizes)
        return 0

    # -- telling ---------------------------------------------------------------------------

    def _trials(self, winners: dict[int, Arm], plan: Plan) -> list[Trial]:
        """Everything that was tried, by batch, the fastest predicted first."""
        tried = {*self.estimates, *self.problems}
        ordered = sorted(tried, key=lambda key: (key[1], self.predicted.get(key, math.inf), str(key[0])))
        return [self._trial(arm, batch, winners[batch], plan.arms[batch]) for arm, batch in ordered]

    def _trial(self, arm: Arm, batch: int, best: Arm, chosen: Arm) -> Trial:
        seconds = self.seconds.get((arm, batch), [])
        ratios = self.ratios.get((arm, batch), [])
        return Trial(
            batch,
            arm.structure.tile,
            arm.structure.passes,
            arm.structure.threads,
            arm.executor,
            self.predicted[arm, batch],
            statistics.median(seconds) if seconds else None,
            1 / statistics.median(ratios) if ratios else None,
            len(seconds),
            self.problems.get((arm, batch), ""),
            default=arm == self.default_arm(batch),
            best=arm == best,
            chosen=arm == chosen,
        )


def compile_as(kernel: Kernel, pipeline: str) -> Kernel:
    """The kernel's weight under another pipeline; the pools are shared."""
    return compile(kernel, pipeline=pipeline, target=kernel.target, on_missing=kernel.on_missing)
