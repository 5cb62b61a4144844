"""What a low-rank adapter costs a kernel on this CPU: seconds with it over seconds without, in turns.

    python -m bench.adapter [--size 4096] [--batch 1 16]

A 2:4 + int4 weight of bf16 and an adapter of a tenth of its width, bf16 factors, beside `F.linear` in bf16.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

import stoicc
from bench.timing import interleaved_medians


def ratios(size: int, batch: int, kernels: dict[str, stoicc.Kernel], dense: torch.Tensor) -> list[str]:
    """A row of the table: times in microseconds and their ratio."""
    x = torch.randn(batch, size).bfloat16()
    calls: dict[str, Callable[[], object]] = {name: partial(kernel, x) for name, kernel in kernels.items()}
    calls["F.linear"] = partial(functional.linear, x, dense)
    with torch.no_grad():
        seconds = interleaved_medians(calls, repeats=15, minimum_s=0.03)
    ratio = seconds["with"] / seconds["without"]
    return [str(batch), *(f"{seconds[name] * 1e6:,.0f}" for name in calls), f"{ratio:.2f}"]


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    size, rank = given.size, given.size // 10
    dense = torch.randn(size, size).bfloat16()
    weight = stoicc.ops.absmax(stoicc.ops.nm_magnitude(dense))
    left, right = torch.randn(size, rank).bfloat16(), torch.randn(rank, size).bfloat16()
    kernels = {
        "without": stoicc.compile(weight, target="cpu"),
        "with": stoicc.compile(stoicc.ops.low_rank(weight, left, right), target="cpu"),
    }
    table = Table(title=f"{size} x {size} int4_nv24, adapter of rank {rank}, {torch.get_num_threads()} threads (us)")
    for column in ("batch", *kernels, "F.linear", "with / without"):
        table.add_column(column, justify="right")
    for batch in given.batch:
        table.add_row(*ratios(size, batch, kernels, dense))
    Console().print(table)


if __name__ == "__main__":
    main()
