"""Products on the CPU against the peers in the same run, on cold weights.

    python -m bench.cpu [--quick]

Every row is one mix of tile formats of one weight; columns are batch sizes. A figure is the time of
`F.linear` on the dense bf16 weight over the time of the kernel (bf16 input and output), from
interleaved runs: medians of ratios' parts, in one process. Copies of each weight are visited in
turn, so that together they exceed the cache. "bound" is the fraction of the byte bound at batch 1:
payload bytes over the bandwidth of a plain read, measured in the same run, over the kernel's time.
"""

import argparse
import copy
import itertools
import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import stoicc
from bench.machine import describe_machine
from bench.timing import interleaved_medians

COLD_BYTES = 640 << 20
"""Copies of a weight are rotated until they hold so many bytes."""


def mixes(weight: Tensor) -> dict[str, stoicc.ops.CompressedWeight | Tensor]:
    """The weights that are measured, by name; the mosaic has a fifth of its tiles in each format."""
    grid = (-(-weight.shape[0] // 64), -(-weight.shape[1] // 64))
    kind = torch.randint(0, 5, grid, generator=torch.Generator().manual_seed(1))
    prune, quantize = stoicc.ops.nm_magnitude, stoicc.ops.group_absmax
    mosaic = prune(prune(weight, 0, 4, where=kind == 0), where=(kind == 1) | (kind == 2))
    return {
        "dense": weight,
        "nv24": prune(weight),
        "int8 g=128": quantize(weight, 8, 128),
        "int4 g=128": quantize(weight, 4, 128),
        "int4_nv24 g=128": quantize(prune(weight), 4, 128),
        "mosaic of 5": quantize(mosaic, 4, 64, where=(kind == 2) | (kind == 3)),
    }


def rotated(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call that makes the calls in turn, so that each finds its weight out of the cache."""
    order = itertools.cycle(calls)
    return lambda: next(order)()


def copies_for(nbytes: int) -> int:
    return max(2, -(-COLD_BYTES // nbytes))


class Products:
    """The calls of one batch size: our kernels and the peers."""

    def __init__(self, weight: Tensor, console: Console) -> None:
        self.weight = weight
        self.dense = [weight.clone() for _ in range(copies_for(weight.nbytes))]
        self.kernels: dict[str, list[stoicc.Kernel]] = {}
        with Progress(console=console) as progress:
            for name, compressed in progress.track(mixes(weight).items(), description="compiling"):
                kernel = stoicc.compile(compressed)
                count = copies_for(kernel.stats().payload_bytes)
                self.kernels[name] = [kernel, *(copy.deepcopy(kernel) for _ in range(count - 1))]
                for each in self.kernels[name]:
                    for batch in (1, 256):  # executors are built, and planes repacked, on first use
                        each(torch.zeros(batch, weight.shape[1], dtype=weight.dtype))
        pruned = stoicc.ops.nm_magnitude(weight).dense().float()
        self.csr = scipy.sparse.csr_matrix(pruned.numpy())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says once that CSR tensors are in beta
            self.torch_csr = pruned.to_sparse_csr()

    def calls(self, batch: int) -> dict[str, Callable[[], object]]:
        x = torch.randn(batch, self.weight.shape[1]).bfloat16()
        calls: dict[str, Callable[[], object]] = {
            "F.linear bf16": rotated([partial(F.linear, x, dense) for dense in self.dense])
        }
        for name, kernels in self.kernels.items():
            calls[name] = rotated([partial(kernel, x) for kernel in kernels])
        return calls

    def sparse_peers(self, batch: int) -> dict[str, Callable[[], object]]:
        """What others offer for the 2:4 weight on a CPU: CSR in fp32 (slow, so few batches)."""
        x = torch.randn(self.weight.shape[1], batch)
        dense_x = np.ascontiguousarray(x.numpy())
        return {"torch.sparse CSR f32": lambda: self.torch_csr @ x, "scipy CSR f32": lambda: self.csr @ dense_x}


def measure(shape: tuple[int, int], batches: tuple[int, ...], repeats: int, console: Console) -> dict[str, object]:
    """Times of all products at all batch sizes, and what follows from them."""
    weight = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    products = Products(weight, console)
    big = torch.ones(1 << 27, dtype=torch.int64)  # 1 GiB, read by a sum
    bandwidth = 0.0
    rows: dict[str, dict[str, float]] = {name: {} for name in ("F.linear bf16", *products.kernels)}
    with torch.no_grad():
        for batch in batches:
            # short calls suffer most from what else the machine does
            calls = products.calls(batch) | ({"read": big.sum} if batch == 1 else {})
            times = interleaved_medians(calls, repeats * (4 if batch <= 4 else 1))
            bandwidth = big.nbytes / times.pop("read") if batch == 1 else bandwidth
            if batch == batches[0]:
                times |= interleaved_medians(products.sparse_peers(batch), 3)
            for name, seconds in times.items():
                rows.setdefault(name, {})[str(batch)] = times["F.linear bf16"] / seconds
                if batch == 1 and name in products.kernels:
                    payload = products.kernels[name][0].stats().payload_bytes
                    rows[name]["bound"] = payload / bandwidth / seconds
                    rows[name]["bytes_per_weight"] = payload / weight.numel()
    return {"shape": list(shape), "batches": list(batches), "read_gb_s": bandwidth / 1e9, "rows": rows}


def table_of(result: dict[str, object]) -> Table:
    """Speed over F.linear bf16 per mix and batch size."""
    rows, batches = result["rows"], result["batches"]
    assert isinstance(rows, dict) and isinstance(batches, list)
    table = Table(title=f"{result['shape']} bf16, {torch.get_num_threads()} threads: times faster than F.linear bf16")
    for column in ("weight", "bytes/weight", "of byte bound @1", *(f"@{batch}" for batch in batches)):
        table.add_column(column, justify="left" if column == "weight" else "right")
    for name, row in rows.items():
        figures = [f"{row[key]:.2f}" if key in row else "" for key in ("bytes_per_weight", "bound", *map(str, batches))]
        table.add_row(name, *figures)
    return table


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller weight and fewer repeats; under 50 s")
    parser.add_argument("--json", type=Path, default=Path("bench/results/cpu.json"))
    arguments = parser.parse_args()
    console = Console(width=120)
    shape, repeats = ((4096, 8192), 5) if arguments.quick else ((11008, 8192), 12)
    result = measure(shape, (1, 4, 16, 64, 256), repeats, console)
    console.print(table_of(result))
    console.print(f"plain read: {result['read_gb_s']:.1f} GB/s")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"machine": describe_machine(), "result": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
