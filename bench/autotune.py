"""What tuning is worth: default, predicted, tuned and exhaustive best side by side, on skewed mosaics.

    python -m bench.autotune [--quick] [--resume] [--limit SECONDS]      (about 8 minutes on two cores)

For every mosaic `stoicc.autotune` is given three batch sizes and a budget; "predicted" is what the cost model
picks without measuring, "tuned" what won the race of that batch size, "kernel" the one schedule for all of them.
"best" is found by timing every schedule of the same space. So that the best of many noisy medians is not
one that was lucky, the fastest few of that search and the others are measured once more, interleaved, each from
memory (copies of the weight in turn, the cache displaced between rounds); all figures are from these rounds.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import stoicc
from bench.cost_model import Mosaic, tiled_weight
from bench.resuming import Resumable
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.passes import default_pipeline
from stoicc.retile import fixed_tile, retile
from stoicc.timing import Ballast, Call, Stopwatch, cache_bytes
from stoicc.tuning_arms import Rotation
from stoicc.tuning_result import Trial
from stoicc.tuning_store import TuningStore

BATCHES = (1, 16, 64)
GOAL = 0.03
FINALISTS = 5
"""How many of the exhaustive search are measured again."""
COPIES = 8
"""Copies of a kernel that are called in turn, while the cache is displaced between rounds."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Effort:
    """How much is measured: scale of the shapes, mosaics, seconds to tune, rounds of the search and of the end."""

    scale: int
    mosaics: int
    budget_s: float
    search_rounds: int
    last_rounds: int


FULL = Effort(scale=4, mosaics=10, budget_s=20.0, search_rounds=7, last_rounds=61)
QUICK = Effort(scale=2, mosaics=2, budget_s=10.0, search_rounds=5, last_rounds=41)

SPACE = stoicc.Space(tiles=((32, 64), (64, 128), (128, 64)), orders=("cost", "row"), parts=(1, 2, 4), bins=(32, 256))

Schedule = tuple[tuple[int, int], str, str]
"""Tile, pipeline without regimes, executor: what a trial and a kernel of the exhaustive search have in common."""


def mosaics(effort: Effort) -> list[Mosaic]:
    """Skewed mosaics, the heavy tiles in the first tile rows; two of five have codes, which keep their tiles."""
    mixes: Sequence[dict[str, float]] = (
        {"dense": 0.1, "nv24": 0.2, "empty": 0.7},
        {"dense": 0.1, "int8": 0.2, "int4": 0.4, "empty": 0.3},
        {"dense": 0.3, "nv24": 0.4, "empty": 0.3},
        {"dense": 0.05, "nv24": 0.15, "int4": 0.8},
        {"dense": 0.05, "empty": 0.95},
    )
    shapes = ((512, 1024), (1024, 512), (256, 2048), (768, 768), (1024, 1024))
    made = []
    for seed in range(effort.mosaics):
        rows, columns = shapes[seed % len(shapes)]
        dtype = "f32" if seed % 5 == 4 else "bf16"
        shape = (rows * effort.scale, columns * effort.scale)
        made.append(Mosaic(seed, shape, (64, 64), dtype, mixes[seed % len(mixes)], 1.0 if seed < 5 else 0.5))
    return made


def every_schedule(tiled: stoicc.TiledWeight) -> dict[Schedule, stoicc.Kernel]:
    """A kernel for every schedule of the space; those that come out alike are one."""
    own = tiled.program.tile
    tiles = [own] if fixed_tile(tiled.program) else list(dict.fromkeys([own, *SPACE.tiles]))
    cuts = {tile: stoicc.compile(retile(tiled, tile), target="cpu") for tile in tiles}
    structures = SPACE.structures(default_pipeline("cpu"), tiles, torch.get_num_threads())
    kernels: dict[Schedule, stoicc.Kernel] = {}
    seen = set()
    for structure in structures:
        for executor, tiles_up_to in (("tiles", max(BATCHES)), ("dense-once", 0)):
            if executor == "dense-once" and structure.passes != structures[0].passes:
                continue  # panels are decoded alike whatever the schedule
            kernel = stoicc.compile(cuts[structure.tile], target="cpu", pipeline=structure.pipeline(tiles_up_to))
            alike = (structure.tile, replace(kernel.schedule, applied=()))
            if alike not in seen:
                seen.add(alike)
                kernels[structure.tile, structure.passes, executor] = kernel
    return kernels


def measure(mosaic: Mosaic, effort: Effort, cold: Stopwatch, store: TuningStore) -> dict[str, object]:
    """Tune one mosaic, search it exhaustively, and time what came of both together."""
    tiled = tiled_weight(mosaic)
    result = stoicc.autotune(
        tiled, BATCHES, SPACE, effort.budget_s, target="cpu", cold=True, progress=False, store=store, fresh=True
    )
    kernels = every_schedule(tiled)
    rows = {}
    with torch.no_grad():
        for batch in BATCHES:
            x = torch.randn(batch, mosaic.shape[1]).to(TORCH_DTYPES[mosaic.dtype])
            calls = {name: Call(partial(kernel, x)) for name, kernel in kernels.items()}
            Stopwatch().samples(calls, 1)  # executors are built
            times = Stopwatch().samples(calls, effort.search_rounds)
            fastest = sorted(times, key=lambda name: statistics.median(times[name]))[:FINALISTS]
            roles = {
                "default": result.default(batch),
                "predicted": result.predicted(batch),
                "tuned": result.best(batch),
                "kernel": result.chosen(batch),
            }
            named = {role: _schedule(trial) for role, trial in roles.items()}
            copied = {name: Rotation(kernels[name], COPIES) for name in dict.fromkeys([*named.values(), *fastest])}
            finals = {name: Call(partial(rotation.run, x)) for name, rotation in copied.items()}
            cold.samples(finals, COPIES)  # executors of the copies
            rows[str(batch)] = compared(named, cold.samples(finals, effort.last_rounds))
    return {"mosaic": str(mosaic), "schedules": len(kernels), "tuning_s": result.seconds, "batches": rows}


def compared(named: dict[str, Schedule], finals: dict[Schedule, list[float]]) -> dict[str, object]:
    """Seconds of each role and of the best, and by how much each is slower: medians of rounds' ratios."""
    best = min(finals, key=lambda name: statistics.median(finals[name]))
    row: dict[str, object] = {"best_s": statistics.median(finals[best]), "best": _text(best)}
    for role, name in named.items():
        ratios = [mine / theirs for mine, theirs in zip(finals[name], finals[best], strict=True)]
        row |= {f"{role}_s": statistics.median(finals[name]), f"{role}_off": statistics.median(ratios) - 1}
        row[role] = _text(name)
    return row


def _schedule(trial: Trial) -> Schedule:
    return trial.tile, trial.passes, trial.executor


def _text(schedule: Schedule) -> str:
    tile, passes, executor = schedule
    return f"{tile[0]}x{tile[1]} {executor} {passes}"


ROLES = ("default", "predicted", "tuned", "kernel")


def table_of(rows: list[dict[str, object]]) -> Table:
    """Microseconds of the best, and how much slower the others are, for every mosaic and batch."""
    table = Table(title=f"slower than the best of all schedules by; {torch.get_num_threads()} threads")
    for column in ("mosaic", "schedules", "batch", "best, us", *ROLES):
        table.add_column(column, justify="left" if column == "mosaic" else "right")
    for row in rows:
        batches = row["batches"]
        assert isinstance(batches, dict)
        for batch, figures in batches.items():
            first = batch == str(BATCHES[0])
            offs = [_percent(figures[f"{role}_off"], red=role in ("tuned", "kernel")) for role in ROLES]
            names = (str(row["mosaic"]), str(row["schedules"])) if first else ("", "")
            table.add_row(
                *names, batch, f"{figures['best_s'] * 1e6:,.0f}", *offs, end_section=batch == str(BATCHES[-1])
            )
    return table


def _percent(off: float, red: bool) -> str:
    return f"[red]{off:.1%}[/red]" if red and off > GOAL else f"{off:.1%}"


def summary(rows: list[dict[str, object]]) -> dict[str, dict[str, float]]:
    """For each role: how many mosaics and batches are within the goal, the median and the largest distance."""
    figures = [entry for row in rows if isinstance(row["batches"], dict) for entry in row["batches"].values()]
    found = {}
    for role in ROLES:
        offs = [entry[f"{role}_off"] for entry in figures]
        within = sum(off <= GOAL for off in offs)
        found[role] = {
            "within_goal": within,
            "of": len(offs),
            "median_off": statistics.median(offs),
            "largest_off": max(offs),
        }
    return found


def page(record: dict[str, Any]) -> str:
    """The counts of a record as markdown, with the machine."""
    machine = record["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, commit {machine['commit']}; {len(record['rows'])} mosaics at "
        f"batch {', '.join(map(str, BATCHES))}.",
        "",
        f"| schedule | within {GOAL:.0%} of the best | median off | largest off |",
        "| --- | ---: | ---: | ---: |",
    ]
    for role, found in record["summary"].items():
        within = f"{found['within_goal']} of {found['of']}"
        lines.append(f"| {role} | {within} | {found['median_off']:.1%} | {found['largest_off']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small mosaics; under 60 s")
    parser.add_argument("--json", type=Path, help="default: bench/results/autotune.json, or nowhere with --quick")
    parser.add_argument("--resume", action="store_true", help="measure the mosaics that the file does not have")
    parser.add_argument("--limit", type=float, help="begin no mosaic after so many seconds")
    arguments = parser.parse_args()
    path = arguments.json or (None if arguments.quick else Path("bench/results/autotune.json"))
    effort = QUICK if arguments.quick else FULL
    stoicc.cost_model("cpu")  # a new device is measured first
    cold = Stopwatch(CPU, Ballast(CPU, cache_bytes(CPU) * 5 // 4, COPIES))
    record = Resumable(path, arguments.resume, arguments.limit, summary)
    console = Console(width=150)
    with tempfile.TemporaryDirectory() as folder, Progress(console=console, transient=True) as progress:
        subjects = record.missing(mosaics(effort))
        for mosaic in progress.track(subjects, total=effort.mosaics, description="tuning and searching"):
            assert isinstance(mosaic, Mosaic)
            record.add(measure(mosaic, effort, cold, TuningStore(Path(folder))))
    console.print(table_of(record.rows))
    found = summary(record.rows)
    for role, figures in found.items():
        console.print(
            f"{role:10s} within {GOAL:.0%} of the best in {figures['within_goal']:.0f} of {figures['of']:.0f}, "
            f"median {figures['median_off']:.1%}, largest {figures['largest_off']:.1%}"
        )


if __name__ == "__main__":
    main()
