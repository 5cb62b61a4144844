"""How long inspecting, scheduling and encoding takes, how much memory, and where the time goes.

    python -m bench.inspector

A 4096 x 11008 bf16 weight (a LLaMA-7B MLP layer); the bounds that the project set itself are 1.5 s
on 2 cores and a peak of 4x the weight's bytes, the weight itself included.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import stoicc
from bench.machine import describe_machine

SHAPE = (4096, 11008)
STAGES = {
    "check that values are finite": ("weights.py", "non_finite"),
    "cut into tiles": ("tiling.py", "to_tiles"),
    "choose formats": ("choosing.py", "_choose"),
    "encode planes": ("choosing.py", "encode"),
    "join pools": ("pools.py", "_join"),
    "hash pools": ("digest.py", "digest"),
    "passes": ("pipeline.py", "run"),
    "verify": ("verify.py", "verify"),
}
"""What to report of the profile: a stage, and the file and function whose cumulative time it is."""


def weights() -> dict[str, Callable[[], torch.Tensor]]:
    """The kinds of weight that are measured."""

    def dense() -> torch.Tensor:
        return torch.empty(SHAPE, dtype=torch.bfloat16).normal_(generator=torch.Generator().manual_seed(0))

    def mosaic() -> torch.Tensor:
        share = torch.rand(64, 172, generator=torch.Generator().manual_seed(1))
        pruned = stoicc.ops.nm_magnitude(dense(), where=share < 0.5)
        return stoicc.ops.nm_magnitude(pruned, 0, 4, where=share < 0.1).dense()

    return {"dense": dense, "2:4": lambda: stoicc.ops.nm_magnitude(dense()).dense(), "mosaic": mosaic}


def peak_over(weight: torch.Tensor) -> float:
    """Peak resident memory of one compile, over the weight's bytes (the weight included)."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
    before = _status("VmRSS")
    kernel = stoicc.compile(weight)
    return (_status("VmHWM") - before + weight.nbytes) / weight.nbytes if kernel else 0.0


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def stages(weight: torch.Tensor) -> dict[str, float]:
    """Seconds of each stage, from a profile of one compile."""
    profile = cProfile.Profile()
    profile.runcall(stoicc.compile, weight)
    table = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    found: dict[str, float] = {}
    for (file, _, function), (_, _, _, cumulative, _) in table.items():
        for stage, place in STAGES.items():
            if (Path(file).name, function) == place:
                found[stage] = found.get(stage, 0.0) + cumulative
    return found


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("bench/results/inspector.json"))
    arguments = parser.parse_args()
    results: dict[str, dict[str, object]] = {}
    for name, make in weights().items():
        weight = make()
        peak = peak_over(weight)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            stoicc.compile(weight)
            times.append(time.perf_counter() - start)
        results[name] = {"seconds": statistics.median(times), "peak_over_weight": peak, "stages": stages(weight)}
    table = Table(title=f"stoicc.compile of {SHAPE[0]} x {SHAPE[1]} bf16, {torch.get_num_threads()} threads")
    for column in ("weight", "seconds (median of 5)", "peak memory / weight", *STAGES):
        table.add_column(column, justify="right")
    for name, row in results.items():
        parts = row["stages"]
        assert isinstance(parts, dict)
        table.add_row(
            name,
            f"{row['seconds']:.2f}",
            f"{row['peak_over_weight']:.2f}",
            *(f"{parts.get(stage, 0):.3f}" for stage in STAGES),
        )
    Console(width=170).print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"machine": describe_machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
