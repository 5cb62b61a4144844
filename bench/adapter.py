"""What a low-rank adapter costs a kernel on this CPU: seconds with it over seconds without, in turns.

    python -m bench.adapter [--size 4096] [--batch 1 16]    # writes bench/results/adapter.json at the default size

A 2:4 + int4 weight of bf16 and an adapter of a tenth of its width, as bf16 factors and as codes of 4 bits, beside
`F.linear` in bf16.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

import stoicc
from bench.machine import describe_machine
from bench.timing import interleaved_medians

PATH = Path(__file__).parent / "results" / "adapter.json"
SIZE = 4096
COLUMNS = ("batch", "without", "bf16 factors", "4-bit factors", "F.linear", "bf16 / without", "4-bit / without")


def kernels_of(size: int) -> dict[str, stoicc.Kernel]:
    """The weight without an adapter and with each kind, by the name of its column."""
    torch.manual_seed(0)
    rank = size // 10
    weight = stoicc.ops.absmax(stoicc.ops.nm_magnitude(torch.randn(size, size).bfloat16()))
    adapted = stoicc.ops.low_rank(weight, torch.randn(size, rank).bfloat16(), torch.randn(rank, size).bfloat16())
    weights = (weight, adapted, stoicc.ops.quantize_adapter(adapted))
    return {name: stoicc.compile(one, target="cpu") for name, one in zip(COLUMNS[1:4], weights, strict=True)}


def measure(size: int, batch: int, kernels: dict[str, stoicc.Kernel]) -> dict[str, float]:
    """Seconds by column."""
    x, dense = torch.randn(batch, size).bfloat16(), torch.randn(size, size).bfloat16()
    calls: dict[str, Callable[[], object]] = {name: partial(kernel, x) for name, kernel in kernels.items()}
    calls["F.linear"] = partial(functional.linear, x, dense)
    with torch.no_grad():
        return interleaved_medians(calls, repeats=15, minimum_s=0.03)


def cells(batch: int, seconds: dict[str, float]) -> list[str]:
    """A line: microseconds, and ratios."""
    ratios = (seconds[name] / seconds["without"] for name in COLUMNS[2:4])
    return [
        str(batch),
        *(f"{seconds[name] * 1e6:,.0f}" for name in COLUMNS[1:5]),
        *(f"{ratio:.2f}" for ratio in ratios),
    ]


def page(data: dict[str, Any]) -> str:
    """The table as markdown, of what `main` wrote."""
    machine = data["machine"]
    what = (
        f"{SIZE} x {SIZE} int4_nv24, rank {SIZE // 10}, {machine['threads']} threads of {machine['cpu']}; microseconds:"
    )
    lines = [what, "", f"| {' | '.join(COLUMNS)} |", f"| {' | '.join(['---:'] * len(COLUMNS))} |"]
    return "\n".join([*lines, *(f"| {' | '.join(cells(row['batch'], row['seconds']))} |" for row in data["rows"])])


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    given = parser.parse_args(arguments)
    kernels = kernels_of(given.size)
    threads = torch.get_num_threads()
    table = Table(
        title=f"{given.size} x {given.size} int4_nv24, adapter of rank {given.size // 10}, {threads} threads (us)"
    )
    for column in COLUMNS:
        table.add_column(column, justify="right")
    found = {batch: measure(given.size, batch, kernels) for batch in given.batch}
    for batch, seconds in found.items():
        table.add_row(*cells(batch, seconds))
    Console(width=110).print(table)
    if given.size == SIZE:
        rows = [{"batch": batch, "seconds": seconds} for batch, seconds in found.items()]
        PATH.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
