"""From a budget to a mosaic: measure every tile in every format, choose, and round with compensation."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stoicc.ir.dtypes import DTYPE_NAMES
from stoicc.ir.errors import InputError
from stoicc.ir.format import TileFormat
from stoicc.ops._choosing import unquantized
from stoicc.ops._hessian import Factor, InverseHessian, factorise, settled
from stoicc.ops._inputs import seen_by_tiles
from stoicc.ops._output import squared_output
from stoicc.ops.combine import permute
from stoicc.ops.graph import CompressedWeight
from stoicc.ops.lowering import Lowered, lower
from stoicc.ops.mosaic import lattice_of, swept_mosaic
from stoicc.ops.statistics import Statistics
from stoicc.policy.budget import Budget
from stoicc.policy.knapsack import solve
from stoicc.policy.seconds import Clock, TileSeconds, program_of, tile_seconds
from stoicc.policy.table import TileTable, measure, why_not
from stoicc.policy.uniform import PAYS, one_format
from stoicc.tiling import check_tile
from stoicc.weights import on_cpu

WHO = "Budget"
DAMPING = 0.01
SAMPLE_ROWS, SAMPLE_COLUMNS = 4, 2048
"""Tile rows, and columns in whole tiles, both spread over the weight, on which orders of the columns are compared."""
SINGLE = 4096
"""Columns beyond which formats are chosen with a Hessian factorised in float32, in half the time; sweeps are not."""
USUAL = 0.53
"""Bytes per weight at which they are compared where a budget gives none: those of 4-bit codes."""
NO_CODE = "no code for this target at this tile"
TRIES = 5
"""How often a bound on time is tightened where the mosaic as a whole misses it."""

Usable = Callable[[TileFormat, tuple[int, int], str], bool]


@dataclass(frozen=True, eq=False)
class Choice:
    """What a budget chose, and between what.

    Attributes:
        table: of the weight in its final order of columns.
        choice: `[T]`, the number of each tile's format in the table.
        tile: the tile shape.
        energy: squared norm of the layer's output, in the unit of the table's errors; NaN before it is needed, as it
            costs a product of the weight with X^T X.
        seconds: of a tile by format, where the budget is one of time.
        batch: that the seconds are for.
        columns: `[K]` the order of the columns, or None where they stay.
        refused: formats that were left out, and why, in words.
    """

    table: TileTable
    choice: NDArray[np.int64]
    tile: tuple[int, int]
    energy: float
    seconds: TileSeconds | None = None
    batch: int = 1
    columns: Tensor | None = None
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def predicted_error(self) -> float:
        """||X (W - W_c)^T|| / ||X W^T||, as the table has it."""
        return relative(self.table.error(self.choice), self.energy)

    @property
    def bytes_per_weight(self) -> float:
        """Of the tiles and the order of the columns."""
        return self.table.bytes_of(self.choice) / self.table.weights


def relative(squared: float, energy: float) -> float:
    """A relative error from a squared one; 0 for a layer without output."""
    return float((squared / energy) ** 0.5) if energy > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Order:
    """An order of the columns, None for the weight's own, and what is known of the inputs in it.

    Attributes:
        unsorted: `[F]`, the error of each format for all tiles with the columns as they are, over that in this order;
            None where that is this order.
    """

    columns: Tensor | None = None
    seen: Statistics | None = None
    factor: Factor | None = None
    unsorted: NDArray[np.float64] | None = None

    def inverse(self) -> InverseHessian:
        """What a sweep walks along."""
        assert self.seen is not None and self.factor is not None
        exact = self.factor.reversed.dtype == torch.float64
        return (self.factor if exact else factorise(WHO, self.seen, DAMPING)).inverse()


@dataclass(frozen=True, eq=False)
class Task:
    """A weight under a budget.

    Attributes:
        weight: not quantized.
        statistics: of its inputs, or None.
        backend: "cpu" or "triton", for times.
        rows: `[M]`, what a squared error in each row of the output counts; None for one.
        refused: formats of the default that were left out, and why, in words.
    """

    weight: CompressedWeight
    statistics: Statistics | None
    policy: Budget
    tile: tuple[int, int]
    formats: tuple[TileFormat, ...]
    backend: str = "cpu"
    rows: Tensor | None = None
    refused: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def of(
        weight: Tensor | CompressedWeight,
        statistics: Statistics | None,
        policy: Budget,
        tile: tuple[int, int] | None,
        usable: Usable | None = None,
        backend: str = "cpu",
    ) -> "Task":
        """A task from what users give; formats of the default that suit neither tile nor target are left out.

        Raises:
            InputError: a quantized weight, no statistics where they are needed, or a format without a lattice in a
                sweep.
        """
        compressed, state = unquantized(WHO, weight)
        shape = check_tile(tile or compressed.tile or (64, 64))
        if not isinstance(policy, Budget):
            raise InputError(f"policy: expected a Budget, found {type(policy).__name__}")
        if policy.compensate and (statistics is None or statistics.gram is None):
            raise InputError(
                f"{WHO}: expected statistics with a gram matrix to compensate with, found none; collect them with "
                "gram=True, or leave compensate out"
            )
        task = Task(compressed, statistics, policy, shape, policy.candidates, backend)
        if policy.formats is None:
            dtype = DTYPE_NAMES[state.values.dtype]
            why = {fmt: why_not(fmt, shape, dtype) for fmt in task.formats}
            if usable is not None:
                why.update({fmt: NO_CODE for fmt in why if why[fmt] is None and not usable(fmt, shape, dtype)})
            fitting = tuple(fmt for fmt, reason in why.items() if reason is None)
            task = replace(task, formats=fitting, refused=tuple((str(f), r) for f, r in why.items() if r is not None))
        if task.compensates:
            for fmt in task.formats:
                lattice_of(WHO, fmt, shape)
        return task

    @property
    def compensates(self) -> bool:
        """Whether a sweep rounds the tiles."""
        if self.policy.compensate is not None:
            return self.policy.compensate
        return self.statistics is not None and self.statistics.gram is not None

    def energy(self) -> float:
        """Squared norm of the layer's output, in the unit of the table's errors."""
        state = lower(self.weight)
        seen = self.statistics
        if seen is not None:
            seen = seen_by_tiles(WHO, state, seen, seen.gram is not None)
        return float(settled(torch.tensor(squared_output(state.values, seen), dtype=torch.float64)))

    def table(self) -> tuple[TileTable, "Order"]:
        """The table of the weight, and the order of the columns that it is in."""
        state = lower(self.weight)
        order = self.order(state)
        return self.measured(state, order), order

    def order(self, state: Lowered) -> "Order":
        """Input channels by energy, the largest first, where that is asked for or pays."""
        if self.statistics is None or self.policy.sort_inputs is False or state.values.shape[1] <= self.tile[1]:
            return self._ordered(state, None)
        if not self.policy.sort_inputs:
            unsorted = self._unsorted(state)
            if unsorted is None:
                return self._ordered(state, None)
            return replace(self._ordered(state, self._by_energy(state)), unsorted=unsorted)
        return self._ordered(state, self._by_energy(state))

    def _by_energy(self, state: Lowered) -> Tensor:
        return seen_by_tiles(WHO, state, self.statistics).square.argsort(descending=True, stable=True)

    def _unsorted(self, state: Lowered) -> NDArray[np.float64] | None:
        """`Order.unsorted` from a sample where sorting pays, else None."""
        assert self.statistics is not None
        rows = _spread(state.values.shape[0], self.tile[0], SAMPLE_ROWS)
        columns = _spread(state.values.shape[1], self.tile[1], max(1, SAMPLE_COLUMNS // self.tile[1]))
        sample = Lowered(state.values[rows][:, columns])
        seen = seen_by_tiles(WHO, state, self.statistics, self.statistics.gram is not None).select(columns)
        part = replace(self, statistics=seen, rows=None if self.rows is None else self.rows[rows])
        share = self.policy.bytes_per_weight
        tables, errors = [], []
        for order in (None, part._by_energy(sample)):
            table = part.measured(sample, part._ordered(sample, order), len(sample.values) / len(state.values))
            room = (USUAL if share is None else share) * table.weights
            try:
                found = table.error(solve(table.errors, table.bytes, room - table.beside))
            except ValueError:
                return None  # the order's own bytes are beyond the budget
            if order is None:
                plain = one_format(table, found, room)
                found = found if plain is None else float(table.errors[:, plain].sum())
            tables.append(table.errors.sum(0))
            errors.append(found)
        if errors[1] > PAYS * errors[0]:
            return None
        as_it_is, by_energy = tables
        return np.divide(as_it_is, by_energy, out=np.ones_like(as_it_is), where=by_energy > 0)

    def _ordered(self, state: Lowered, columns: Tensor | None) -> "Order":
        if self.statistics is None:
            return Order()
        seen = seen_by_tiles(WHO, state, self.statistics, gram=self.statistics.gram is not None)
        seen = seen if columns is None else seen.select(columns)
        if not self.compensates:
            return Order(columns, seen)
        dtype = torch.float32 if seen.columns > SINGLE else torch.float64
        return Order(columns, seen, factorise(WHO, seen, DAMPING, dtype))

    def measured(self, state: Lowered, order: "Order", share: float = 1.0) -> TileTable:
        """The table of a weight in an order; `share` of the order's bytes stand beside it."""
        values = state.values if order.columns is None else state.values[:, order.columns]
        table = measure(values, self.formats, self.tile, order.seen, order.factor, self.rows)
        return replace(table, beside=0 if order.columns is None else round(4 * len(order.columns) * share))


def _spread(extent: int, side: int, most: int) -> Tensor:
    """Indices below `extent` of at most so many whole tiles, spread evenly."""
    count = -(-extent // side)
    chosen = torch.linspace(0, count - 1, min(most, count)).long().unique()
    index = (chosen[:, None] * side + torch.arange(side)).flatten()
    return index[index < extent]


@on_cpu
def choose(task: Task) -> tuple[Choice, Order]:
    """Measure, and choose within the budget.

    Raises:
        InputError: a budget that no choice of the candidates keeps.
    """
    table, order = task.table()
    energy = task.energy() if task.policy.error is not None else math.nan
    nothing = np.zeros(len(table.errors), dtype=np.int64)
    found = Choice(table, nothing, task.tile, energy, columns=order.columns, refused=task.refused)
    return within(found, task), order


def within(found: Choice, task: Task) -> Choice:
    """The choice from a measured table that keeps the budget of a task."""
    policy = task.policy
    if policy.error is not None:
        return within_error(found, policy.error)
    if policy.time_us is not None:
        return _within_time(found, task, policy.time_us * 1e-6)
    assert policy.bytes_per_weight is not None
    return within_bytes(found, policy.bytes_per_weight)


def within_bytes(found: Choice, bytes_per_weight: float) -> Choice:
    """The least error at so many bytes per weight, one format for all tiles where that does as well; or InputError."""
    table = found.table
    room = bytes_per_weight * table.weights
    try:
        choice = solve(table.errors, table.bytes, room - table.beside)
    except ValueError as least:
        floor = (float(str(least)) + table.beside) / table.weights
        raise InputError(
            f"{WHO}: expected at least {floor:.4g} bytes per weight, the least that the formats take, found "
            f"{bytes_per_weight:g}; raise it, or add 'empty' to formats"
        ) from None
    plain = one_format(table, table.error(choice), room)
    return replace(found, choice=choice if plain is None else np.full_like(choice, plain))


def within_error(found: Choice, error: float) -> Choice:
    """The fewest bytes at a relative error, as the table has it, or InputError."""
    table = found.table
    try:
        choice = solve(table.bytes, table.errors, error * error * found.energy)
    except ValueError as least:
        raise InputError(
            f"{WHO}: expected an error of at least {relative(float(str(least)), found.energy):.3g}, the least that the "
            f"formats have, found {error:g}; raise it, or add 'dense' to formats"
        ) from None
    return replace(found, choice=choice)


def _within_time(found: Choice, task: Task, seconds: float) -> Choice:
    """The least error at a predicted time; tiles are paid by what each adds, and the sum is held to the prediction."""
    table, clock = found.table, Clock.of(task.backend, task.policy.batch, measure=True)
    shape, dtype = (task.weight.shape[0], task.weight.shape[1]), DTYPE_NAMES[task.weight.values().dtype]
    times = tile_seconds(table.formats, shape, task.tile, dtype, clock)
    costs = times.per_tile * table.bytes / np.maximum(table.bytes.mean(0), 1e-30)  # equal, but for ragged formats
    room = seconds - times.fixed
    least, target = float(costs.min(1).sum()), seconds
    for _ in range(TRIES):
        try:
            choice = solve(table.errors, costs, room)
        except ValueError:
            break
        predicted = clock.seconds(program_of(table.formats, choice, shape, task.tile, dtype))
        if predicted <= target:
            return replace(found, choice=choice, seconds=times, batch=task.policy.batch)
        room *= (target - times.fixed) / max(predicted - times.fixed, 1e-30) * 0.995
    raise InputError(
        f"{WHO}: expected at least {(least + times.fixed) * 1e6:.4g} us at batch {task.policy.batch}, predicted for "
        f"the fastest formats on this device, found {seconds * 1e6:g}; raise it, or add 'empty' to formats"
    )


def mosaic_of(task: Task, found: Choice, order: Order) -> CompressedWeight:
    """The weight in the order of the choice, its tiles rounded in a sweep."""
    ordered = task.weight if found.columns is None else permute(task.weight, columns=found.columns)
    return swept_mosaic(ordered, order.inverse(), found.table.map(found.choice), task.tile)
