"""How long each operator takes on one layer, where the time goes, and what it costs the layer's output.

    python -m bench.operators [--quick]
    python -m bench.operators --only sparsegpt --json bench/results/operators.json    # these rows of the file anew

A 4096 x 4096 bf16 weight (--quick: 1024 x 1024) with correlated inputs, some channels larger than others.
"error" is ||X (W - W')^T|| / ||X W^T||. Bounds that the project set itself on 2 cores: SparseGPT 60 s, Wanda 3 s,
SLiM end to end 90 s.
"""

import argparse
import cProfile
import json
import pstats
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.machine import describe_machine
from stoicc import ops
from stoicc.ops import CompressedWeight, Statistics

BOUNDS = {"wanda": 3.0, "sparsegpt": 60.0, "slim": 90.0}
"""Seconds on a 4096 x 4096 layer, 2 cores, by operator."""

STAGES = {
    "invert H": ("_hessian.py", "invert"),
    "masks": ("_sweep.py", "_keep"),
    "grids": ("_rounding.py", "begin"),
    "static grids": ("optq.py", "_all_grids"),
    "codes": ("_rounding.py", "round"),
    "columns": ("_sweep.py", "block"),
    "sweep": ("_sweep.py", "run"),
    "select": ("_choosing.py", "all_but"),
    "clip": ("slim_quant.py", "best_clip"),
    "SVD": ("_svd.py", "truncated_svd"),
    "graph": ("graph.py", "then"),
}
"""What to report of the profile: a stage, and the file and function whose cumulative time it is."""

WITHIN = {"masks": ("select",), "columns": ("masks", "grids", "codes"), "sweep": ("columns",)}
"""Stages whose time holds that of others, which is taken out."""


@dataclass(frozen=True)
class Row:
    """One operator with its options: seconds in all and by stage, and the relative error of the output."""

    name: str
    seconds: float
    stages: dict[str, float]
    error: float


def layer(size: int) -> tuple[Tensor, Statistics]:
    """A weight `[size, size]` in bf16, and statistics of 2 * size inputs."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=draw).to(torch.bfloat16)
    mix = torch.randn(size, size, generator=draw) / size**0.5
    x = torch.randn(2 * size, size, generator=draw) @ mix * torch.randn(size, generator=draw).exp()
    return weight, Statistics.of(x)


def operators(weight: Tensor, statistics: Statistics) -> dict[str, Callable[[], CompressedWeight]]:
    """What is measured; a new operator is one more line."""
    pruned = ops.wanda(weight, statistics, n=2, m=4)
    return {
        "magnitude 50%": lambda: ops.magnitude(weight),
        "nm_magnitude 2:4": lambda: ops.nm_magnitude(weight),
        "obd 50%": lambda: ops.obd(weight, statistics),
        "wanda 50%": lambda: ops.wanda(weight, statistics),
        "wanda 2:4": lambda: ops.wanda(weight, statistics, n=2, m=4),
        "sparsegpt 50%": lambda: ops.sparsegpt(weight, statistics),
        "sparsegpt 2:4": lambda: ops.sparsegpt(weight, statistics, n=2, m=4),
        "sparsegpt 50% of tiles": lambda: ops.sparsegpt(weight, statistics, scope="tile"),
        "sparsegpt 2:4 + int4": lambda: ops.sparsegpt(weight, statistics, n=2, m=4, bits=4),
        "tile_mosaic 25% wanda": lambda: ops.tile_mosaic(weight, statistics),
        "tile_mosaic 25% sparsegpt": lambda: ops.tile_mosaic(weight, statistics, method="sparsegpt"),
        "group_absmax int4": lambda: ops.group_absmax(weight, group_size=128),
        "optq int4": lambda: ops.optq(weight, statistics),
        "optq int4, largest first": lambda: ops.optq(weight, statistics, activation_order=True),
        "absmax int4": lambda: ops.absmax(weight),
        "slim_quant int4": lambda: ops.slim_quant(weight),
        "naive_lora on wanda 2:4": lambda: ops.naive_lora(pruned),
        "slim_lora on wanda 2:4": lambda: ops.slim_lora(pruned, statistics),
        "slim 2:4 + int4": lambda: ops.slim(weight, statistics),
    }


def measure(name: str, call: Callable[[], CompressedWeight], weight: Tensor, gram: Tensor) -> Row:
    """Run once, under the profiler, which counts calls of Python functions only and takes little."""
    profile = cProfile.Profile()
    start = time.perf_counter()
    result = profile.runcall(call)
    seconds = time.perf_counter() - start
    table = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    found: dict[str, float] = {}
    for (file, _, function), (_, _, _, cumulative, _) in table.items():
        for stage, place in STAGES.items():
            if (Path(file).name, function) == place:
                found[stage] = found.get(stage, 0.0) + cumulative
    if "static grids" in found:  # found before the sweep, by the function that finds the others in it
        found["grids"] -= found["static grids"]
    inner = {stage: sum(found.get(part, 0.0) for part in WITHIN.get(stage, ())) for stage in found}
    own = {stage: max(spent - inner[stage], 0.0) for stage, spent in found.items()}  # what calls take is in neither
    change = result.dense().float() - weight.float()
    error = ((change @ gram * change).sum() / (weight.float() @ gram * weight.float()).sum()).sqrt().item()
    return Row(name, seconds, own, error)


COLUMNS = ("operator", "seconds", "bound", "error", "where the time goes (seconds)")


def cells(row: Row, size: int) -> tuple[str, ...]:
    """A line of the table: seconds, the bound where there is one, error, and stages from the longest on."""
    bound = BOUNDS.get(row.name.split()[0]) if size == 4096 else None
    stages = sorted(row.stages.items(), key=lambda each: -each[1])
    where = ", ".join(f"{stage} {spent:.2f}" for stage, spent in stages if spent >= 0.01)
    return row.name, f"{row.seconds:.2f}", f"{bound:.0f}" if bound else "", f"{row.error:.3f}", where


def show(rows: list[Row], size: int, console: Console) -> None:
    """The table for a terminal."""
    table = Table(title=f"operators on {size} x {size} bf16, {torch.get_num_threads()} threads")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in COLUMNS[1:4] else "left")
    for row in rows:
        table.add_row(*cells(row, size))
    console.print(table)


def page(data: dict[str, Any]) -> str:
    """The table as markdown, of what `write` wrote."""
    machine, size = data["machine"], data["size"]
    lines = [
        f"A {size} x {size} bf16 weight, {machine['threads']} threads of {machine['cpu']}, torch {machine['torch']}:",
        "",
    ]
    lines += [f"| {' | '.join(COLUMNS)} |", "| --- | ---: | ---: | ---: | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(cells(Row(**row), size))} |" for row in data["operators"])])


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a 1024 x 1024 layer; ends within 50 s")
    parser.add_argument("--only", default="", help="operators whose name starts with this")
    parser.add_argument(
        "--json", type=Path, help="default bench/results/operators.json; nowhere with --quick or --only"
    )
    given = parser.parse_args(arguments)
    size, console = 1024 if given.quick else 4096, Console(width=150)
    weight, statistics = layer(size)
    gram = statistics.hessian(0.0)
    calls = operators(weight, statistics)
    rows = [measure(name, call, weight, gram) for name, call in calls.items() if name.startswith(given.only)]
    show(rows, size, console)
    path = given.json or (None if given.quick or given.only else Path("bench/results/operators.json"))
    if path is not None:
        write(path, size, rows, list(calls))


def write(path: Path, size: int, rows: list[Row], order: list[str]) -> None:
    """Put rows in a file, in this order; those that it has of other operators and the same machine stay."""
    machine = describe_machine()
    found = {row.name: asdict(row) for row in rows}
    if path.exists():
        before = json.loads(path.read_text())
        known = {key: value for key, value in before["machine"].items() if key != "commit"}
        if before["size"] == size and known == {key: value for key, value in machine.items() if key != "commit"}:
            found = {row["name"]: row for row in before["operators"]} | found
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = [found[name] for name in order if name in found]
    path.write_text(json.dumps({"machine": machine, "size": size, "operators": listed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
