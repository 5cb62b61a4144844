"""How good the schedule is that the CPU cost model picks without measuring.

    python -m bench.cost_model [--quick] [--resume] [--limit SECONDS]     (about 15 minutes on two cores, in pieces)

For random mosaics (shapes, dtypes, mixes of formats, tiles, skews) every schedule of a space is measured: tile shape
where the weight can be cut anew, split-K, order, bins, executor. "off" is by how much the schedule of the least
predicted time is slower than the fastest one. So that the fastest of many noisy medians is not one that was
lucky, the fastest few and the picked one are measured once more, together, and "off" is taken from these times.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

import stoicc
from bench.resuming import Resumable
from bench.timing import interleaved_medians
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.passes.cost_cpu import CpuCostModel
from stoicc.retile import fixed_tile, retile

BATCHES = (1, 4, 16, 64)
GOAL = 0.10
TILES = ((32, 32), (32, 64), (64, 64), (64, 128), (128, 64), (128, 128))
FINALISTS = 4
TIE = 0.01
"""Predicted times that differ by no more are alike."""
_TEXT = (
    "drop-empty,{order},build-csr,split-k{{parts={parts}}},balance{{bins={bins}}},"
    "fuse-epilogue,regimes{{tiles={up_to}}}"
)


@dataclass(frozen=True)
class Mosaic:
    """A random weight: `shares` of tiles per format, more of the heavier ones in the first tile rows by `skew`."""

    seed: int
    shape: tuple[int, int]
    tile: tuple[int, int]
    dtype: str
    shares: dict[str, float]
    skew: float

    def __str__(self) -> str:
        mix = " ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        return f"{self.shape[0]}x{self.shape[1]} {self.dtype} {self.tile[0]}x{self.tile[1]} skew {self.skew:.1f} {mix}"


def random_mosaic(seed: int) -> Mosaic:
    """Every other one is bf16, every other pair has codes, whose tiles stay as they are."""
    rng = np.random.default_rng(seed)
    names = ("dense", "nv24", "empty", *(("int8", "int4") if seed % 4 < 2 else ()))
    shares = rng.dirichlet(np.full(len(names), 0.8))
    return Mosaic(
        seed,
        (int(rng.integers(2, 33)) * 64 + int(rng.choice([0, 0, 8])), int(rng.integers(4, 65)) * 64),
        TILES[int(rng.integers(len(TILES)))],
        ("bf16", "f32")[seed % 2],
        dict(zip(names, shares.tolist(), strict=True)),
        float(rng.choice([0.0, 0.5, 1.0])),
    )


def tiled_weight(mosaic: Mosaic) -> stoicc.TiledWeight:
    """The weight, its tiles in formats as the mosaic says."""
    generator = torch.Generator().manual_seed(mosaic.seed)
    values = (torch.randn(*mosaic.shape, generator=generator) * 0.02).to(TORCH_DTYPES[mosaic.dtype])
    kinds = _kinds(mosaic)
    weight: Tensor | stoicc.ops.CompressedWeight = values
    tile = mosaic.tile
    for index, name in enumerate(mosaic.shares):
        where = torch.from_numpy(kinds == index)
        if name in ("empty", "nv24"):
            weight = stoicc.ops.nm_magnitude(weight, 0 if name == "empty" else 2, 4, where=where, tile=tile)
        elif name.startswith("int"):
            group = min(64, tile[1])
            weight = stoicc.ops.group_absmax(weight, int(name[3:]), group, where=where, tile=tile)
    if not isinstance(weight, Tensor) and not any(name.startswith("int") for name in mosaic.shares):
        weight = weight.dense()  # floats, which may be cut in other tiles
    return stoicc.inspect(weight, tile=tile)


def _kinds(mosaic: Mosaic) -> np.ndarray:
    """An index in `shares` for every tile; with skew 1 the formats of the first rows come first in `shares`."""
    rows, columns = (-(-extent // size) for extent, size in zip(mosaic.shape, mosaic.tile, strict=True))
    rng = np.random.default_rng(mosaic.seed + 1000)
    place = np.arange(rows * columns).reshape(rows, columns) / (rows * columns)
    drawn = (1 - mosaic.skew) * rng.random((rows, columns)) + mosaic.skew * place
    ranked = drawn.argsort(axis=None).argsort().reshape(rows, columns) / (rows * columns)
    kinds: np.ndarray = np.searchsorted(np.cumsum(list(mosaic.shares.values()))[:-1], ranked, side="right")
    return kinds


def pipelines() -> Iterator[str]:
    """Schedules of one tile shape, those of fewer pieces and of natural order first; they matter to `tiles` alone."""
    orders = ("order{by=row}", "order{by=cost}")
    for parts, bins, order in itertools.product((1, 2, 4), (16, 256), orders):
        yield _TEXT.format(order=order, parts=parts, bins=bins, up_to=1 << 20)
    yield _TEXT.format(order=orders[0], parts=1, bins=256, up_to=0)


def space(mosaic: Mosaic) -> dict[str, stoicc.Kernel]:
    """A kernel for every schedule, by a short name; schedules that come out alike are one."""
    tiled = tiled_weight(mosaic)
    tiles = (mosaic.tile,) if fixed_tile(tiled.program) else TILES
    kernels: dict[str, stoicc.Kernel] = {}
    seen = set()
    for tile in tiles:
        cut = retile(tiled, tile)
        for text in pipelines():
            kernel = stoicc.compile(cut, target="cpu", pipeline=text)
            schedule = kernel.schedule
            alike = (tile, schedule.items, schedule.bin_ptr, schedule.regimes)
            if alike not in seen:
                seen.add(alike)
                kernels[f"{tile[0]}x{tile[1]} {_short(text)}"] = kernel
    return kernels


def _short(text: str) -> str:
    if text.endswith("{tiles=0}"):
        return "dense-once"
    steps = [step for step in text.split(",") if step.startswith(("order", "split-k", "balance"))]
    return " ".join(step.partition("=")[2].rstrip("}") for step in steps)


def pick(predicted: dict[str, float], kernels: dict[str, stoicc.Kernel]) -> str:
    """The schedule that is predicted to be fastest; where several are within TIE, that of the fewest items, then tiles.

    Each item begins streams of its own: what that takes is too little to be predicted.
    """
    least = min(predicted.values())
    alike = [name for name, seconds in predicted.items() if seconds <= (1 + TIE) * least]
    return min(alike, key=lambda name: (len(kernels[name].schedule.items), math.prod(kernels[name].program.grid)))


def compare(
    kernels: dict[str, stoicc.Kernel], model: CpuCostModel, batch: int, rounds: tuple[int, int]
) -> dict[str, object]:
    """All schedules of a weight at a batch: which one is picked, which one is the fastest, and by how much.

    Args:
        rounds: of all schedules, and of the finalists.
    """
    program = next(iter(kernels.values())).program
    threads = torch.get_num_threads()
    # schedules are called in turn: between two calls of one the weights of all others are read
    model.beside_bytes = sum(kernel.stats().payload_bytes for kernel in kernels.values())
    start = time.perf_counter()
    predicted = {n: model.predict(k.ir, batch, program.dtype, threads).seconds for n, k in kernels.items()}
    picking = time.perf_counter() - start
    x = torch.randn(batch, program.shape[1]).to(TORCH_DTYPES[program.dtype])
    calls = {name: partial(kernel, x) for name, kernel in kernels.items()}
    with torch.no_grad():
        measured = interleaved_medians(calls, rounds[0])
        picked = pick(predicted, kernels)
        fastest = sorted(measured, key=measured.__getitem__)[:FINALISTS]
        finals = interleaved_medians({name: calls[name] for name in dict.fromkeys([picked, *fastest])}, rounds[1])
    best = min(finals, key=finals.__getitem__)
    names = list(kernels)
    return {
        "picked": picked,
        "best": best,
        "off": finals[picked] / finals[best] - 1,
        "picked_s": finals[picked],
        "best_s": finals[best],
        "predicted_s": predicted[picked],
        "worst_over_best": max(measured.values()) / finals[best],
        "rank_correlation": float(spearmanr([predicted[n] for n in names], [measured[n] for n in names]).statistic)
        if len(names) > 2
        else 1.0,
        "schedules": len(kernels),
        "seconds_to_pick": picking,
    }


def table_of(rows: list[dict[str, object]]) -> Table:
    """By how much the picked schedule is slower than the best, for every mosaic and batch."""
    table = Table(title=f"picked without measuring, slower than the best by; {torch.get_num_threads()} threads")
    for column in ("mosaic", "schedules", *(f"@{batch}" for batch in BATCHES)):
        table.add_column(column, justify="left" if column == "mosaic" else "right")
    for row in rows:
        results = row["batches"]
        assert isinstance(results, dict)
        offs = [results[str(batch)]["off"] for batch in BATCHES]
        shown = [f"{off:.1%}" if off <= GOAL else f"[red]{off:.1%}[/red]" for off in offs]
        table.add_row(str(row["mosaic"]), str(results[str(BATCHES[0])]["schedules"]), *shown)
    return table


def summary(rows: list[dict[str, object]]) -> dict[str, float]:
    """Counts and medians over all mosaics and batches."""
    results = [row["batches"] for row in rows]
    each = [[entry[str(batch)] for batch in BATCHES] for entry in results if isinstance(entry, dict)]
    flat = [entry for entries in each for entry in entries]
    offs = [entry["off"] for entry in flat]
    errors = [abs(entry["predicted_s"] / entry["picked_s"] - 1) for entry in flat]
    return {
        "mosaics": len(rows),
        "mosaics_within_goal_at_every_batch": sum(all(e["off"] <= GOAL for e in entries) for entries in each),
        "mosaics_within_goal_over_all_batches": sum(
            sum(e["picked_s"] for e in entries) <= (1 + GOAL) * sum(e["best_s"] for e in entries) for entries in each
        ),
        "picks": len(flat),
        "picks_within_goal": sum(off <= GOAL for off in offs),
        "median_off": statistics.median(offs),
        "largest_off": max(offs),
        "median_error_of_seconds": statistics.median(errors),
        "median_rank_correlation": statistics.median(entry["rank_correlation"] for entry in flat),
        "median_worst_over_best": statistics.median(entry["worst_over_best"] for entry in flat),
    }


def page(record: dict[str, Any]) -> str:
    """The counts of a record as markdown, with the machine."""
    found, machine = record["summary"], record["machine"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, commit {machine['commit']}: of {found['mosaics']} mosaics at "
        f"batch {', '.join(map(str, BATCHES))}, {found['picks_within_goal']} of {found['picks']} picks are within "
        f"{GOAL:.0%} of the best, in {found['mosaics_within_goal_at_every_batch']} mosaics at every batch and in "
        f"{found['mosaics_within_goal_over_all_batches']} over the sum of all batches; the median pick is "
        f"{found['median_off']:.1%} off, the worst {found['largest_off']:.0%}. The worst schedule takes "
        f"{found['median_worst_over_best']:.1f} times as long as the best (median), and ranks correlate by "
        f"{found['median_rank_correlation']:.2f}."
    )


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 mosaics; under 60 s once the device is calibrated")
    parser.add_argument("--first", type=int, default=0, help="number of the first mosaic")
    parser.add_argument("--count", type=int, default=None, help="how many mosaics (default: 40, quick: 6)")
    parser.add_argument("--json", type=Path, help="default: bench/results/cost_model.json, or nowhere with --quick")
    parser.add_argument("--resume", action="store_true", help="measure the mosaics that the file does not have")
    parser.add_argument("--limit", type=float, help="begin no mosaic after so many seconds")
    arguments = parser.parse_args()
    console = Console(width=140)
    model = stoicc.cost_model("cpu")
    assert isinstance(model, CpuCostModel)
    count = arguments.count or (6 if arguments.quick else 40)
    rounds = (3, 21) if arguments.quick else (5, 41)
    path = arguments.json or (None if arguments.quick else Path("bench/results/cost_model.json"))
    record = Resumable(path, arguments.resume, arguments.limit, summary)
    mosaics = [random_mosaic(seed) for seed in range(arguments.first, arguments.first + count)]
    with Progress(console=console, transient=True) as progress:
        for mosaic in progress.track(record.missing(mosaics), total=count, description="mosaics"):
            assert isinstance(mosaic, Mosaic)
            kernels = space(mosaic)
            for kernel in kernels.values():  # libraries are compiled and planes packed outside of any time
                kernel(torch.zeros(1, kernel.in_features, dtype=TORCH_DTYPES[kernel.program.dtype]))
            record.add(
                {"mosaic": str(mosaic), "batches": {str(b): compare(kernels, model, b, rounds) for b in BATCHES}}
            )
    console.print(table_of(record.rows))
    found = summary(record.rows)
    for name, value in found.items():
        console.print(f"{name.replace('_', ' ')}: {value:.3g}")


if __name__ == "__main__":
    main()
