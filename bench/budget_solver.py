"""How long a budget takes to choose for one layer, phase by phase."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from stoicc import Budget
from stoicc.ops import Statistics
from stoicc.ops.lowering import lower
from stoicc.policy.budget import CANDIDATES
from stoicc.policy.choose import Choice, Task, within_bytes

SHAPE = (4096, 11008)
BOUND_S = 10.0
"""Seconds that choosing for `SHAPE` with 8 candidates may take on 2 cores."""


@dataclass(frozen=True)
class Phases:
    """Seconds by phase."""

    shape: tuple[int, int]
    formats: int
    seconds: dict[str, float]
    threads: int

    @property
    def chosen(self) -> float:
        """Of all that choosing takes."""
        return sum(self.seconds.values())


def layer(shape: tuple[int, int]) -> tuple[Tensor, Statistics]:
    """A weight in bf16 and statistics of few inputs, channels of different energy."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=draw).mul_(torch.randn(shape[0], 1, generator=draw).exp())
    x = torch.randn(256, shape[1], generator=draw) * torch.randn(shape[1], generator=draw).exp()
    return weight.bfloat16(), Statistics.of(x)


def phases(shape: tuple[int, int] = SHAPE) -> Phases:
    """Choose once, at 4.25 bits, as `compile` does before it sweeps."""
    weight, statistics = layer(shape)
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    task = Task.of(weight, statistics, Budget(bytes_per_weight=4.25 / 8), None)
    state = lower(task.weight)
    with phase("order of the columns, factor of the Hessian"):
        order = task.order(state)
    with phase(f"errors in {len(task.formats)} formats"):
        table = task.measured(state, order)
    with phase("hulls, multiplier and remainder"):
        within_bytes(Choice(table, table.errors.argmin(1), task.tile, 1.0, columns=order.columns), 4.25 / 8)
    return Phases(shape, len(CANDIDATES), seconds, torch.get_num_threads())


def phases_table(found: Phases) -> Table:
    """A line for each phase."""
    rows, columns = found.shape
    title = f"choosing for {rows} x {columns}, {found.formats} candidates, {found.threads} threads"
    table = Table("phase", "seconds", title=title)
    for name, seconds in found.seconds.items():
        table.add_row(name, f"{seconds:.2f}")
    bound = f" (bound {BOUND_S:g})" if found.shape == SHAPE else ""
    table.add_row("all", f"{found.chosen:.2f}{bound}")
    return table
