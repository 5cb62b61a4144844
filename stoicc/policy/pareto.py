"""The curve of error against bytes or time: what every budget would give, from one table."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from stoicc.ir.dtypes import DTYPE_NAMES
from stoicc.ir.errors import InputError
from stoicc.ops.graph import CompressedWeight
from stoicc.ops.statistics import Statistics
from stoicc.policy.budget import Budget
from stoicc.policy.choose import USUAL, Task, relative
from stoicc.policy.knapsack import hull_steps
from stoicc.policy.seconds import Clock, tile_seconds
from stoicc.policy.table import TileTable
from stoicc.tiling import grid_of
from stoicc.weights import FormatLike, on_cpu

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console, ConsoleOptions, RenderResult

    from stoicc.model.calibration import CalibrationLike

AXES = ("bytes", "time")


@dataclass(frozen=True)
class Point:
    """One budget and what it gives.

    Attributes:
        bytes_per_weight: of the tiles and the order of the columns.
        time_us: predicted for a call, or None where only bytes were asked for.
        error: relative error of the output that the table predicts.
        formats: tiles by format, the most first.
    """

    bytes_per_weight: float
    time_us: float | None
    error: float
    formats: tuple[tuple[str, int], ...]


@dataclass(frozen=True, repr=False)
class Pareto:
    """Points from the cheapest to the most exact; prints as a table, `plot` draws it.

    Attributes:
        uniform: every candidate for all tiles, cheapest first: what the curve is compared with.
        axis: "bytes" or "time".
        subject: what it is the curve of, in words.
    """

    points: tuple[Point, ...]
    uniform: tuple[Point, ...]
    axis: str
    subject: str

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.table import Table

        table = Table(title=f"{self.subject}: error against {self.axis}")
        table.add_column("bytes/weight", justify="right")
        table.add_column("bits/weight", justify="right")
        if self.axis == "time":
            table.add_column("us", justify="right")
        table.add_column("error", justify="right")
        table.add_column("tiles")
        for kind, points in (("", self.points), ("all ", self.uniform)):
            for point in points:
                cells = [f"{point.bytes_per_weight:.4f}", f"{8 * point.bytes_per_weight:.2f}"]
                cells += [f"{point.time_us:.1f}"] if point.time_us is not None and self.axis == "time" else []
                total = sum(count for _, count in point.formats)
                shares = ", ".join(f"{name} {count / total:.0%}" for name, count in point.formats)
                table.add_row(*cells, f"{point.error:.4g}", kind + (point.formats[0][0] if kind else shares))
            table.add_section()
        yield table

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        console = Console(file=StringIO(), width=120)
        console.print(self)
        assert isinstance(console.file, StringIO)
        return console.file.getvalue().rstrip()

    __repr__ = __str__

    def plot(self, path: str | PathLike[str] | None = None) -> "Axes":
        """Draw the curve with matplotlib (an extra: `pip install matplotlib`), and save it where a path is given.

        Raises:
            InputError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise InputError(
                "pareto: expected matplotlib to plot with, found none; pip install matplotlib, or print the curve"
            ) from None
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(*_line(self.points, self.axis), marker=".", label="mosaic")
        axes.plot(*_line(self.uniform, self.axis), "x", color="0.4", label="one format")
        for point in self.uniform:
            if point.error > 0:
                axes.annotate(
                    point.formats[0][0], _place(point, self.axis), fontsize=7, xytext=(4, 4), textcoords="offset points"
                )
        axes.set_yscale("log")
        axes.set_xlabel("bits per weight" if self.axis == "bytes" else "predicted microseconds")
        axes.set_ylabel("relative error of the output")
        axes.set_title(self.subject)
        axes.legend()
        if path is not None:
            figure.savefig(path)
        return axes


def _place(point: Point, axis: str) -> tuple[float, float]:
    across = 8 * point.bytes_per_weight if axis == "bytes" or point.time_us is None else point.time_us
    return across, point.error


def _line(points: Sequence[Point], axis: str) -> tuple[list[float], list[float]]:
    """Points that a logarithmic axis can show."""
    shown = [_place(point, axis) for point in points if point.error > 0]
    return [x for x, _ in shown], [y for _, y in shown]


def pareto(
    weight: Any,
    statistics: "Statistics | CalibrationLike | None" = None,
    *,
    axis: str = "bytes",
    batch: int = 1,
    points: int = 16,
    formats: Sequence[FormatLike] | None = None,
    tile: tuple[int, int] = (64, 64),
    layers: str | Sequence[str] = "*",
    target: str = "cpu",
) -> Pareto:
    """What every budget would give, from one table of errors: a point for each of some budgets.

    Errors are what the budget predicts, bytes those of the tiles; `stoicc.compile(weight, policy=Budget(...))`
    then makes the kernel of a point.

    Args:
        weight: `[M, K]`, an operator's result that is not quantized, or a model.
        statistics: of a weight's inputs; for a model, calibration batches (see `stoicc.compress`).
        axis: "bytes", or "time" as the cost model predicts it at `batch`; a model's is that of its layers in sum, each
            with `batch` rows of x.
        points: how many at most, spread evenly over the logarithm of the error.
        formats, tile: as in `Budget` and `stoicc.compile`.
        layers: of a model, patterns on names, as in a recipe; layers weigh by their effect on its output.
        target: "cpu" or "triton", for times.

    Raises:
        InputError: an axis or number that is none, or what `stoicc.compile` refuses.
    """
    if axis not in AXES:
        raise InputError(f"pareto: expected axis {' or '.join(AXES)}, found {axis!r}")
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise InputError(f"pareto: expected at least 2 points, found {points!r}")
    if isinstance(weight, nn.Module) and not isinstance(weight, nn.Linear):
        from stoicc.model.mosaic_budget import model_table  # it imports the compiler, which imports this package

        if isinstance(statistics, Statistics):
            raise InputError("pareto: expected calibration batches with a model, found Statistics; give batches")
        options = {"bytes_per_weight": USUAL, "formats": formats, "tile": tile}
        table, shapes, dtype = model_table(weight, statistics, options, layers)
        times = _seconds(table, shapes, tile, dtype, Clock.of(target, batch)) if axis == "time" else None
        return _curve(table, 1.0, times, axis, points, f"{type(weight).__name__}, {table.weights:,d} weights")
    if statistics is not None and not isinstance(statistics, Statistics):
        raise InputError(f"pareto: expected Statistics with a weight, found {type(statistics).__name__}")
    matrix = weight.weight if isinstance(weight, nn.Linear) else weight
    return _of_weight(matrix, statistics, formats, tile, axis, batch, points, target)


@on_cpu
def _of_weight(
    weight: Tensor | CompressedWeight,
    statistics: Statistics | None,
    formats: Sequence[FormatLike] | None,
    tile: tuple[int, int],
    axis: str,
    batch: int,
    points: int,
    target: str,
) -> Pareto:
    task = Task.of(weight, statistics, Budget(bytes_per_weight=0.5, batch=batch, formats=formats), tile)
    table, _ = task.table()
    shape, dtype = (task.weight.shape[0], task.weight.shape[1]), DTYPE_NAMES[task.weight.values().dtype]
    times = _seconds(table, [shape], tile, dtype, Clock.of(target, batch)) if axis == "time" else None
    return _curve(table, task.energy(), times, axis, points, f"weight {shape[0]} x {shape[1]}")


def _seconds(
    table: TileTable, shapes: Sequence[tuple[int, int]], tile: tuple[int, int], dtype: str, clock: Clock
) -> tuple[float, NDArray[np.float64]]:
    """Seconds of the calls of all layers whatever their formats are, and of every tile in every format `[T, F]`."""
    known = {shape: tile_seconds(table.formats, shape, tile, dtype, clock) for shape in dict.fromkeys(shapes)}
    tiles = [math.prod(grid_of(shape, tile)) for shape in shapes]
    each = [np.tile(known[shape].per_tile, (count, 1)) for shape, count in zip(shapes, tiles, strict=True)]
    return sum(known[shape].fixed for shape in shapes), np.concatenate(each)


def _curve(
    table: TileTable,
    energy: float,
    times: tuple[float, NDArray[np.float64]] | None,
    axis: str,
    points: int,
    subject: str,
) -> Pareto:
    costs = table.bytes if times is None else times[1]
    steps = hull_steps(table.errors, costs)
    lost = max(float(table.errors.sum()), 1e-300)
    left = np.append(steps.saved[::-1].cumsum()[::-1], 0.0) + 1e-12 * lost

    def point(choice: NDArray[np.int64]) -> Point:
        counts = Counter({str(fmt): int((choice == i).sum()) for i, fmt in enumerate(table.formats)})
        used = tuple((name, count) for name, count in counts.most_common() if count)
        per_weight, squared = table.bytes_of(choice) / table.weights, table.error(choice)
        time_us = None if times is None else 1e6 * (times[0] + float(times[1][np.arange(len(choice)), choice].sum()))
        return Point(per_weight, time_us, relative(squared, energy), used)

    goals = np.linspace(np.log(left[0]), np.log(left[-2] if len(left) > 1 else left[-1]), points - 1)
    counts = sorted({*np.searchsorted(-np.log(left), -goals - 1e-12).tolist(), len(steps.cost)})
    uniform = (point(np.full(len(table.errors), index)) for index in range(len(table.formats)))
    return Pareto(tuple(point(steps.after(count)) for count in counts), tuple(uniform), axis, subject)
