"""Where decoding by panels for the BLAS overtakes multiplying tile by tile, and what either is to `F.linear`.

    python -m bench.crossover [--quick] [--shape M K] [--weights NAME...]

For each dtype and batch `F.linear` on the dense weight, the tiles executor and the dense-once executor of every
weight are called in turn, a round after another, so that a slow minute meets all alike; figures are ratios of medians
from the same rounds. A kernel that has packed its planes for the tiles executor serves both, as it would for a user who
calls it at small and at large batches. Between two visits of a weight all others are read.

What `stoicc.compile` picks by default is the regime of its schedule at that batch. The claims: from the first
batch that a weight is decoded for on, a call takes at most 1/0.95 of the time of `F.linear`, and at no batch does
the executor that was picked take 10% longer than the other.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import stoicc
from bench.cpu_kernels import inputs
from bench.cpu_weights import mixes, random_weight
from bench.machine import describe_machine
from bench.timing import interleaved_medians
from stoicc.dispatch import execute

LINEAR = "F.linear"
KINDS = ("tiles", "dense-once")
MIXES = (
    "dense", "nv24", "bitmap 50%", "int8 g=128", "int4 g=128", "int4_nv24 g=128", "mosaic of 5", "half empty",
)  # fmt: skip
GOAL, LATE = 0.95, 1.10
"""Of `F.linear`'s speed that is kept where panels are decoded, and how much slower a pick may be than the other."""


@dataclass(frozen=True)
class Plan:
    """What is measured: the weight's shape, batches by dtype, and rounds."""

    shape: tuple[int, int]
    batches: dict[str, tuple[int, ...]]
    rounds: int


FULL = Plan((11008, 8192), {"bf16": (64, 128, 256, 512, 1024, 2048), "f32": (64, 128, 256, 512, 1024)}, 5)
QUICK = Plan((2048, 4096), {"bf16": (64, 256, 1024), "f32": (64, 256, 1024)}, 3)


@dataclass(frozen=True)
class Row:
    """One weight at one batch: seconds by executor and of `F.linear` in the same rounds, and what is picked."""

    weight: str
    dtype: str
    batch: int
    picked: str
    linear: float
    tiles: float
    dense_once: float

    def seconds(self, kind: str) -> float:
        return self.tiles if kind == "tiles" else self.dense_once

    @property
    def speedup(self) -> float:
        """How many times faster than `F.linear` what is picked runs."""
        return self.linear / self.seconds(self.picked)

    @property
    def off(self) -> float:
        """By what share what is picked is slower than the faster of both."""
        return self.seconds(self.picked) / min(self.tiles, self.dense_once) - 1


def measure(plan: Plan, dtype: str, names: tuple[str, ...], report: Callable[[str], object]) -> list[Row]:
    """Rows of one dtype: every weight at every batch."""
    report(f"compiling, {dtype}")
    weight = random_weight(plan.shape)
    weight = weight.bfloat16() if dtype == "bf16" else weight
    kernels = {name: stoicc.compile(each) for name, each in mixes(weight, names).items()}
    for kernel in kernels.values():
        kernel(inputs(1, plan.shape[1], weight.dtype))  # planes are packed
    rows = []
    for batch in plan.batches[dtype]:
        report(f"{dtype}, batch {batch}")
        x = inputs(batch, plan.shape[1], weight.dtype)
        calls: dict[str, Callable[[], object]] = {LINEAR: partial(F.linear, x, weight)}
        for kind in KINDS:
            calls |= {f"{name}, {kind}": partial(execute, kind, x, None, k._handle) for name, k in kernels.items()}
        times = interleaved_medians(calls, plan.rounds)
        for name, kernel in kernels.items():
            picked, found = kernel.schedule.regime(batch), [times[f"{name}, {kind}"] for kind in KINDS]
            rows.append(Row(name, dtype, batch, picked, times[LINEAR], *found))
    return rows


def table_of(rows: list[Row], plan: Plan) -> Table:
    """Times faster than `F.linear`, of tiles and of dense-once; the one that is picked has a star."""
    batches = sorted({row.batch for row in rows})
    title = f"{plan.shape[0]} x {plan.shape[1]}, {torch.get_num_threads()} threads: times faster than F.linear"
    table = Table(title=f"{title}, tiles / dense-once (* picked)")
    for column in ("weight", "dtype", *(f"@{batch}" for batch in batches)):
        table.add_column(column, justify="left" if column == "weight" else "right")
    for name, dtype in dict.fromkeys((row.weight, row.dtype) for row in rows):
        at = {row.batch: row for row in rows if (row.weight, row.dtype) == (name, dtype)}
        table.add_row(name, dtype, *(_cell(at[batch]) if batch in at else "" for batch in batches))
    return table


def _cell(row: Row) -> str:
    cells = [f"{row.linear / row.seconds(kind):.2f}{'*' * (kind == row.picked)}" for kind in KINDS]
    wrong = row.off > LATE - 1 or (row.picked == KINDS[1] and row.speedup < GOAL)
    return f"[red]{' / '.join(cells)}[/red]" if wrong else " / ".join(cells)


def page(record: dict[str, Any]) -> str:
    """The table of a record as markdown, with the machine."""
    rows = [Row(**{name: row[name] for name in Row.__dataclass_fields__}) for row in record["rows"]]
    batches = sorted({row.batch for row in rows})
    machine = record["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}; weight "
        f"{record['shape'][0]} x {record['shape'][1]}.",
        "",
        f"| weight | dtype | {' | '.join(f'batch {batch}' for batch in batches)} |",
        f"| --- | ---: |{' ---: |' * len(batches)}",
    ]
    for name, dtype in dict.fromkeys((row.weight, row.dtype) for row in rows):
        at = {row.batch: row for row in rows if (row.weight, row.dtype) == (name, dtype)}
        cells = [_plain_cell(at[batch]) if batch in at else "" for batch in batches]
        lines.append(f"| {name} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _plain_cell(row: Row) -> str:
    tiles, panels = (f"{row.linear / row.seconds(kind):.2f}" for kind in KINDS)
    return f"**{tiles}** / {panels}" if row.picked == KINDS[0] else f"{tiles} / **{panels}**"


def summary(rows: list[Row]) -> dict[str, float | str]:
    """The worst that each claim met, and where."""
    worst = min(rows, key=lambda row: row.speedup)
    late = max(rows, key=lambda row: row.off)
    decoded = [row for row in rows if row.picked == KINDS[1]]
    found: dict[str, float | str] = {
        "picked_over_linear_at_least": worst.speedup,
        "picked_over_linear_where": _place(worst),
        "picked_off_at_most": late.off,
        "picked_off_where": _place(late),
    }
    if decoded:
        least = min(decoded, key=lambda row: row.speedup)
        found |= {"dense_once_over_linear_at_least": least.speedup, "dense_once_over_linear_where": _place(least)}
    return found


def _place(row: Row) -> str:
    return f"{row.weight}, {row.dtype}, batch {row.batch}"


def _report(console: Console, start: float, what: str) -> None:
    console.print(f"{time.perf_counter() - start:5.0f} s: {what}", style="dim")


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller weight, fewer batches; nothing is written")
    parser.add_argument("--shape", nargs=2, type=int, metavar=("M", "K"), help="of the weight; nothing is written")
    parser.add_argument("--weights", nargs="+", choices=MIXES, default=MIXES, help="only these; nothing is written")
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "f32"), default=("bf16", "f32"))
    parser.add_argument("--json", type=Path, help="default: bench/results/crossover.json where all is measured")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    if arguments.shape:
        plan = Plan(tuple(arguments.shape), plan.batches, plan.rounds)
    console, start, rows = Console(width=160), time.perf_counter(), list[Row]()
    with torch.no_grad():
        for dtype in arguments.dtypes:
            rows += measure(plan, dtype, tuple(arguments.weights), partial(_report, console, start))
    console.print(table_of(rows, plan))
    found = summary(rows)
    for name, value in found.items():
        console.print(f"{name.replace('_', ' ')}: {value:.3g}" if isinstance(value, float) else f"    {value}")
    whole = plan is FULL and len(arguments.weights) == len(MIXES) and len(arguments.dtypes) == 2
    path = arguments.json or (Path(__file__).with_name("results") / "crossover.json" if whole else None)
    console.print(f"{time.perf_counter() - start:.0f} s{f'; written to {path}' if path else ''}")
    if path is not None:
        record = {
            "machine": describe_machine(),
            "shape": list(plan.shape),
            "summary": found,
            "rows": [asdict(row) | {"speedup": row.speedup} for row in rows],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
