"""What the autotuner found: trials, the winner, and text that replays it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from typing import Any, NoReturn

from stoicc.compiler import compile
from stoicc.ir.errors import InputError, StoiccError, brief
from stoicc.kernel import Kernel
from stoicc.passes import Pipeline
from stoicc.pools import TiledWeight
from stoicc.retile import retile
from stoicc.tuning_space import differences

TEXT_VERSION = 1


@dataclass(frozen=True)
class Trial:
    """One schedule with one executor at one batch size.

    Attributes:
        batch: rows of x.
        tile, passes, threads: see `stoicc.tuning_space.Structure`.
        executor: "tiles" or "dense-once".
        predicted_s: seconds by the cost model.
        measured_s: median seconds; None where it was not timed, or not to the end.
        speedup: the default's time over this one's, the median over rounds of both.
        rounds: how many were timed.
        problem: why it could not win, or "".
        default: the default schedule at this batch.
        best: the fastest at this batch (the default, or the simplest, where others tie with it).
        chosen: what the tuned kernel runs at this batch.
    """

    batch: int
    tile: tuple[int, int]
    passes: str
    threads: int
    executor: str
    predicted_s: float
    measured_s: float | None = None
    speedup: float | None = None
    rounds: int = 0
    problem: str = ""
    default: bool = False
    best: bool = False
    chosen: bool = False


@dataclass(frozen=True)
class TuningResult:
    """The result of `stoicc.autotune`; `str()` is a table, `text` replays it.

    Attributes:
        name, shape, dtype, x_dtype, target: of the weight, the inputs and the backend.
        batch_sizes: what was tuned for.
        tile, pipeline: the winner: `stoicc.compile(weight, tile=result.tile, pipeline=result.pipeline)`.
        threads: CPU threads that the winner was timed with; `torch.set_num_threads` sets them.
        trials: all that were built, by batch, the fastest predicted first.
        ranked: how many schedules the cost model ranked, over all batch sizes.
        seconds, budget_s: what tuning took, and what it was given.
        notes: what was left out, and why.
        remembered: read from the tuning store, nothing was measured.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    x_dtype: str
    target: str
    batch_sizes: tuple[int, ...]
    tile: tuple[int, int]
    pipeline: str
    threads: int
    trials: tuple[Trial, ...]
    ranked: int
    seconds: float
    budget_s: float
    notes: tuple[str, ...] = ()
    remembered: bool = field(default=False, compare=False)
    _kernel: Kernel | None = field(default=None, compare=False, repr=False)

    @property
    def kernel(self) -> Kernel:
        """The weight compiled with the winner; InputError for a result that was read from text."""
        if self._kernel is None:
            raise InputError("tuning result: expected a kernel, found a result read from text; use .replay(weight)")
        return self._kernel

    def default(self, batch: int) -> Trial:
        """The default schedule at this batch size."""
        return self._one(batch, lambda trial: trial.default)

    def predicted(self, batch: int) -> Trial:
        """What the cost model picks at this batch size without measuring."""
        at = [trial for trial in self.trials if trial.batch == batch]
        return min(at, key=lambda trial: trial.predicted_s) if at else self._missing(batch)

    def best(self, batch: int) -> Trial:
        """The fastest at this batch size alone."""
        return self._one(batch, lambda trial: trial.best)

    def chosen(self, batch: int) -> Trial:
        """What the tuned kernel, which has one schedule for all batch sizes, runs at this one."""
        return self._one(batch, lambda trial: trial.chosen)

    def replay(self, weight: Any, **options: Any) -> Kernel:
        """Compile a weight with this result's tile and pipeline.

        Args:
            weight, options: as for `stoicc.compile`.
        """
        if isinstance(weight, (Kernel, TiledWeight)):
            return compile(retile(weight, self.tile), pipeline=self.pipeline, **options)
        return compile(weight, tile=self.tile, pipeline=self.pipeline, **options)

    @property
    def text(self) -> str:
        """Readable JSON with all but the kernel; `from_text` reads it back."""
        kept = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.compare}
        trials = [asdict(trial) for trial in self.trials]
        return json.dumps({"stoicc_tuning": TEXT_VERSION, **kept, "trials": trials}, indent=1) + "\n"

    @staticmethod
    def from_text(text: str) -> "TuningResult":
        """A result from its text, without a kernel.

        Raises:
            InputError: not the text of a result, or of another version.
        """
        try:
            return from_json(json.loads(text))
        except ValueError as error:
            if isinstance(error, StoiccError):
                raise
            raise InputError(f"tuning result: expected JSON text, found {brief(str(error))}; use result.text") from None

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """A matplotlib figure: measured time over predicted, one point a trial; written to `path` if given.

        Raises:
            InputError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise InputError("plot: expected matplotlib, found none; pip install 'stoicc[bench]'") from None
        figure = Figure(figsize=(7, 5), layout="constrained")
        axes = figure.add_subplot(xscale="log", yscale="log", xlabel="predicted, us", ylabel="measured, us")
        axes.set_title(f"{self.name}: {self.shape[0]} x {self.shape[1]} {self.dtype} on {self.target}")
        for batch in self.batch_sizes:
            for mark, size, kind in (("o", 25, "tried"), ("s", 60, "default"), ("*", 160, "chosen")):
                points = [t for t in self.trials if t.batch == batch and t.measured_s and _marked(t, kind)]
                axes.scatter(
                    [trial.predicted_s * 1e6 for trial in points],
                    [(trial.measured_s or 0) * 1e6 for trial in points],
                    s=size,
                    c=f"C{self.batch_sizes.index(batch) % 10}",
                    marker=mark,
                    label=f"batch {batch}, {kind}",
                )
        ends = [extreme(trial.predicted_s * 1e6 for trial in self.trials) for extreme in (min, max)]
        axes.plot(ends, ends, color="0.7", linewidth=0.8, zorder=0)
        axes.legend(fontsize=7)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.shape[0]} x {self.shape[1]} {self.dtype}, x {self.x_dtype}, {self.target}, "
            f"{self.threads} threads; "
            + ("remembered" if self.remembered else f"{self.ranked} ranked, {self.seconds:.1f} s"),
            f"{'batch':>6s} {'default':>11s} {'predicted':>16s} {'best':>16s} {'chosen':>16s}  executor",
        ]
        for batch in self.batch_sizes:
            default, chosen = self.default(batch), self.chosen(batch)
            cells = [_cell(self.predicted(batch)), _cell(self.best(batch)), _cell(chosen)]
            lines.append(
                f"{batch:6d} {_micros(default.measured_s):>11s} {' '.join(f'{cell:>16s}' for cell in cells)}"
                f"  {chosen.executor}"
            )
        plain = self.default(self.batch_sizes[0])
        changed = differences(self.pipeline.rpartition(",regimes")[0], plain.passes)
        if self.tile != plain.tile:
            changed = f"tile {self.tile[0]}x{self.tile[1]}{', ' if changed else ''}{changed}"
        lines.append("microseconds, in brackets how many times faster than the default")
        lines.append(f"tile {self.tile[0]}x{self.tile[1]}, {self.pipeline}")
        lines.append(f"differs from the default in {changed or 'nothing but executors'}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _one(self, batch: int, wanted: Any) -> Trial:
        for trial in self.trials:
            if trial.batch == batch and wanted(trial):
                return trial
        self._missing(batch)

    def _missing(self, batch: int) -> NoReturn:
        sizes = ", ".join(map(str, self.batch_sizes))
        raise InputError(f"tuning result: expected one of the batch sizes {sizes}, found {batch}; tune for it")


def from_json(record: Any) -> TuningResult:
    """A result from the object that its JSON text holds; InputError names what is wrong with it."""
    if not isinstance(record, dict) or record.get("stoicc_tuning") != TEXT_VERSION:
        found = record.get("stoicc_tuning") if isinstance(record, dict) else record
        raise InputError(f"tuning result: expected version {TEXT_VERSION}, found {brief(repr(found))}; tune again")
    try:
        trials = tuple(Trial(**_tupled(trial, "tile")) for trial in record["trials"])
        rest = {name: value for name, value in record.items() if name not in ("stoicc_tuning", "trials")}
        result = TuningResult(trials=trials, **_tupled(rest, "shape", "batch_sizes", "tile", "notes"))
        Pipeline.parse(result.pipeline)
        str(result)  # every batch size has its trials, and every number is one
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"tuning result: expected the fields of a result, found {brief(str(error))}; tune again"
        ) from None
    return result


def with_kernel(result: TuningResult, kernel: Kernel, remembered: bool) -> TuningResult:
    """The result with the kernel that it compiles to."""
    return replace(result, _kernel=kernel, remembered=remembered)


def _tupled(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: tuple(value) if name in names else value for name, value in record.items()}


def _marked(trial: Trial, kind: str) -> bool:
    shown = "chosen" if trial.chosen else "default" if trial.default else "tried"
    return shown == kind


def _micros(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:,.1f}"


def _cell(trial: Trial) -> str:
    return f"{_micros(trial.measured_s)} [{trial.speedup:.2f}x]" if trial.speedup else _micros(trial.measured_s)
