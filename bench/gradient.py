"""What the gradient of x costs on this CPU: dL/dx = g W from the tiles, against the same product by the BLAS.

    python -m bench.gradient [--quick]    # writes bench/results/gradient.json unless quick

Weights are bf16, and so is g. Scratch is what one call takes and gives back: tiles that are decoded, and their sums.
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
from torch import Tensor

import stoicc
from bench.machine import describe_machine
from bench.timing import interleaved_medians
from stoicc.gradients import input_gradient

PATH = Path(__file__).parent / "results" / "gradient.json"
COLUMNS = ("batch", "format", "kernel us", "dense us", "dense / kernel", "weight MB", "scratch MB")


def kernels_of(size: int) -> dict[str, stoicc.Kernel]:
    """A square weight in several formats, by name."""
    torch.manual_seed(0)
    weight = torch.randn(size, size).bfloat16()
    half = weight.where(weight.abs() > weight.abs().float().median(), 0)
    weights: dict[str, Any] = {
        "dense": weight,
        "nv24": stoicc.ops.nm_magnitude(weight),
        "bitmap": half,
        "int4": stoicc.ops.group_absmax(weight),
        "int4_nv24": stoicc.ops.group_absmax(stoicc.ops.nm_magnitude(weight)),
    }
    return {name: stoicc.compile(one, target="cpu") for name, one in weights.items()}


def measure(size: int, batches: tuple[int, ...], repeats: int) -> list[list[Any]]:
    """Rows of COLUMNS: the kernels of a batch run in turn with the BLAS."""
    kernels = kernels_of(size)
    rows: list[list[Any]] = []
    dense = torch.randn(size, size).bfloat16()
    for batch in batches:
        grad = torch.randn(batch, size).bfloat16()
        calls: dict[str, Callable[[], Tensor]] = {n: partial(input_gradient, k, grad) for n, k in kernels.items()}
        seconds = interleaved_medians({**calls, "BLAS": partial(torch.mm, grad, dense)}, repeats, minimum_s=0.02)
        for name, kernel in kernels.items():
            stats, us = kernel.stats(), [seconds[name] * 1e6, seconds["BLAS"] * 1e6]
            held = stats.payload_bytes + stats.beside_bytes
            rows.append([batch, name, *us, us[1] / us[0], held / 1e6, stats.scratch_bytes / 1e6])
    return rows


def page(found: dict[str, Any]) -> str:
    """The record as markdown: speed beside the BLAS, by rows of g."""
    formats = list(dict.fromkeys(row[1] for row in found["rows"]))
    machine = found["machine"]
    lines = [
        f"{found['size']} x {found['size']} bf16 weights, {machine['threads']} threads of {machine['cpu']}, torch "
        f"{machine['torch']}; scratch of a call at most {max(row[6] for row in found['rows']):.1f} MB:",
        "",
        f"| rows of g | BLAS, us | {' | '.join(f'{name}, x BLAS' for name in formats)} |",
        f"| ---: | ---: |{' ---: |' * len(formats)}",
    ]
    for batch in dict.fromkeys(row[0] for row in found["rows"]):
        of = {name: row for count, name, *row in found["rows"] if count == batch}
        cells = " | ".join(f"{of[name][2]:.2f}" for name in formats)
        lines.append(f"| {batch} | {of[formats[0]][1]:,.0f} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller weight and fewer repeats")
    quick = parser.parse_args().quick
    size = 2048 if quick else 4096
    rows = measure(size, (1, 64, 512) if quick else (1, 16, 64, 512, 2048), 5 if quick else 15)
    machine = describe_machine()
    where = f"{machine['threads']} threads of {machine['cpu']}"
    table = Table(*COLUMNS, title=f"dL/dx through {size} x {size} bf16 weights, {where}")
    for batch, name, *numbers in rows:
        table.add_row(str(batch), name, *(f"{n:,.0f}" for n in numbers[:2]), *(f"{n:.2f}" for n in numbers[2:]))
    Console(width=120).print(table)
    if not quick:
        PATH.write_text(json.dumps({"machine": machine, "size": size, "columns": COLUMNS, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
