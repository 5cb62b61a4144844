"""Correctness and times of the Triton backend on this machine's GPU.

    python -m bench.gpu_check

Needs a GPU, torch, triton and numpy; no network and no installation. First what no emulator can tell of the
Gluon dialect (subnormal operands on the tensor cores, and races: the same bits each time), products of warpgroups
(`wgmma`) and the vendor's library as an executor, then every format x dtype x batch against float64 in both
dialects (each check in a process of its own), then decode and prefill times against `F.linear`,
`torch.sparse.to_sparse_semi_structured` and torch's int4 kernel with cold caches. A table is printed and
`bench/results/gpu-<device>.json` written. Cases that do not fit the time budget are dropped and
named. `--dry-run` goes through all of it on tiny shapes in Triton's interpreter
(`TRITON_INTERPRET=1`); nothing that it prints is a measurement.
"""

import argparse
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu_processes import outcomes, side_by_side
from bench.gpu_runners import VENDORS, is_vendor, runners_of
from bench.gpu_timing import METHOD

RESULTS = Path(__file__).parent / "results"

FORMATS = ("dense", "nv24", "int8", "int4", "int4_nv24", "int4<group_size=128, zero_points=true>")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative Frobenius error allowed, by output dtype."""

SHAPES = (
    (8192, 28672), (5120, 5120), (20480, 5120), (7168, 7168), (28672, 7168), (12288, 12288), (49152, 12288),
)  # fmt: skip
"""A large decode layer, then attention and MLP layers of OPT-13B, -30B and -175B."""
DECODE, PREFILL = (1, 8, 16, 32, 64, 128), (512, 2048, 4096)
TIMED = ("dense", "nv24", "int4<group_size=128>", "int4_nv24<group_size=128>", "half 2:4", "mosaic", "int8")
"""Rows of ours in the table of times."""
REPEATS = 20
"""Launches whose results have to be the same bits."""


@dataclass(frozen=True)
class Check:
    """One comparison with float64; the error is None where it is no finite number."""

    format: str
    weight: str
    x: str
    batch: int
    executor: str
    error: float | None
    passed: bool


@dataclass(frozen=True)
class Timing:
    """One measured case; times in microseconds.

    Attributes:
        bytes: payload, x and y: the least that has to move.
        bound: microseconds that those bytes take at the copy bandwidth of this run.
        fraction: bound / time.
        speedup: F.linear's time / time, at the same shape and batch; None where F.linear has no time.
    """

    shape: tuple[int, int]
    batch: int
    format: str
    executor: str
    time: float
    bytes: int
    bound: float
    fraction: float
    speedup: float | None


@dataclass
class Report:
    """What a run found, as the JSON holds it."""

    device: str
    measured: bool
    versions: dict[str, str]
    commit: str
    method: dict[str, str] = field(default_factory=lambda: dict(METHOD))
    copy_bandwidth: float = 0.0
    checks: list[Check] = field(default_factory=list)
    times: list[Timing] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What a run goes through: the full one, or a tiny one for a dry run."""

    device: torch.device
    check_shape: tuple[int, int]
    check_batches: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    start: float
    budget: float
    jobs: int = 1

    @staticmethod
    def make(dry: bool, budget: float, jobs: int = 1) -> "Plan":
        start = time.monotonic()
        if dry:
            return Plan(torch.device("cpu"), (40, 72), (1, 18), ((128, 64),), (1,), (20,), start, budget)
        batches = (1, 7, 16, 33, 128, 300)
        return Plan(torch.device("cuda"), (300, 456), batches, SHAPES, DECODE, PREFILL, start, budget, jobs)

    def late(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() > self.start + self.budget


# ---- correctness ----------------------------------------------------------------------------


def check_all(plan: Plan, report: Report) -> None:
    """Tensor cores, then every format x weight dtype x x dtype x batch x executor, in the first 60% of the time."""
    from bench.gpu_prefill import check_prologue, check_vendor, check_warpgroups

    checks = {"tensor cores": check_tensor_cores, "x in the launch": check_prologue}
    checks |= {"warpgroups": check_warpgroups, "the library": check_vendor}
    dtypes = (torch.float16, torch.bfloat16)
    cases = {f"check of {what} {d}": partial(all_of, check, plan, d) for d in dtypes for what, check in checks.items()}
    for weight in (torch.bfloat16, torch.float16, torch.float32):
        cases |= {f"check {text} {weight}": partial(all_of, check_format, plan, text, weight) for text in FORMATS}
    for name, outcome in outcomes(cases, plan.jobs, plan.start + 0.6 * plan.budget):
        if outcome is None:
            report.dropped.append(name)
        elif isinstance(outcome, Exception):  # one broken case must not hide the others
            report.failures.append(f"{name}: {type(outcome).__name__}: {outcome}")
        else:
            report.checks += outcome


def all_of(check: Callable[..., Iterator[Check]], *arguments: Any) -> list[Check]:
    """What a check yields, as another process can send it."""
    return list(check(*arguments))


def check_tensor_cores(plan: Plan, dtype: torch.dtype) -> Iterator[Check]:
    """What an emulator cannot tell: subnormal operands, and whether launches of one kernel give the same bits.

    The weight is a mosaic at the Gluon dialect's own tile, with split-K.
    """
    import stoicc

    generator = torch.Generator().manual_seed(1)
    (rows, columns), formats = plan.check_shape, ("dense", "nv24", "int4", "int4_nv24", "int8", "empty")
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    if dtype == torch.float16:  # the least numbers of f16 are weights that occur, those of bf16 are not
        tiny = stoicc.inspect(weight * 2.0**-20, tile=(64, 64))
        yield compare_decode(tiny, plan.device, "dense, subnormal")
    grid = (-(-rows // 128), -(-columns // 64))
    names = [[formats[(row * grid[1] + column) % len(formats)] for column in range(grid[1])] for row in range(grid[0])]
    tiled = stoicc.inspect(weight, tile=(128, 64), tile_map=names, approximate=True)
    kernel = stoicc.compile(tiled, target="cuda", pipeline="build-csr,split-k{parts=2}").to(plan.device)
    dense = kernel.to_dense().double()
    for batch in plan.check_batches:
        x = torch.randn(batch, columns, generator=generator).to(dtype).to(plan.device)
        yield compare(kernel, "tiles", x, F.linear(x.double(), dense), "mosaic")
    repeats = REPEATS if plan.device.type == "cuda" else 2
    first, *others = (run_once(kernel.executor("tiles"), x, rows) for _ in range(repeats))
    same = all(torch.equal(first, other) for other in others)
    yield Check(f"mosaic, {repeats} times", kernel.program.dtype, str(dtype)[6:], len(x), "tiles", None, same)


def run_once(executor: Any, x: Tensor, rows: int) -> Tensor:
    """y of a call into a poisoned output and workspace."""
    out = torch.full((x.shape[0], rows), torch.nan, dtype=x.dtype, device=x.device)
    workspace = torch.full((executor.workspace_bytes(x.shape[0], x.dtype),), 255, dtype=torch.uint8, device=x.device)
    executor.run(x, out, workspace)
    return out


def check_format(plan: Plan, text: str, dtype: torch.dtype) -> Iterator[Check]:
    """One format and weight dtype on a shape with tails, outputs poisoned.

    f16 goes with split-K and a bias, the others without: compiling takes most of the time here.
    """
    import stoicc

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*plan.check_shape, generator=generator).to(dtype)
    grid = [[text] * -(-plan.check_shape[1] // 64)] * -(-plan.check_shape[0] // 64)
    bias = torch.randn(plan.check_shape[0], generator=generator) if dtype == torch.float16 else None
    parts = 1 if bias is None else 2
    tiled = stoicc.inspect(weight, tile=(64, 64), tile_map=grid, approximate=True, bias=bias)
    pipeline = f"build-csr,split-k{{parts={parts}}},fuse-epilogue"
    kernel = stoicc.compile(tiled, target="cuda", pipeline=pipeline).to(plan.device)
    executors = [(kind, kernel, kind) for kind in ("tiles", "dense-once")]
    if kernel.stats().dialect.startswith("Gluon"):
        plain = stoicc.compile(tiled, target="cuda", pipeline=f"{pipeline},launch{{gluon=0}}").to(plan.device)
        executors.append(("portable", plain, "tiles"))
    yield compare_decode(stoicc.inspect(weight, tile=(64, 64), tile_map=grid, approximate=True), plan.device, text)
    dense = kernel.to_dense().double()
    for x_dtype in dict.fromkeys((dtype, torch.float32)):
        for batch in plan.check_batches:
            x = torch.randn(batch, plan.check_shape[1], generator=generator).to(x_dtype).to(plan.device)
            want = F.linear(x.double(), dense, None if bias is None else bias.double().to(plan.device))
            for name, compiled, kind in executors:
                if name != "portable" or x_dtype == dtype:  # other inputs run in it already
                    yield replace(compare(compiled, kind, x, want, text), executor=name)


def compare_decode(tiled: Any, device: torch.device, text: str) -> Check:
    """Multiply by the identity: every weight comes back as the device decoded it."""
    import stoicc

    kernel = stoicc.compile(tiled, target="cuda", pipeline="build-csr").to(device)
    dense = kernel.to_dense()
    x = torch.eye(dense.shape[1], dtype=dense.dtype, device=device)
    out = torch.full((dense.shape[1], dense.shape[0]), torch.nan, dtype=dense.dtype, device=device)
    executor = kernel.executor("tiles")
    workspace = torch.empty(executor.workspace_bytes(len(x), x.dtype), dtype=torch.uint8, device=device)
    executor.run(x, out, workspace)
    error = float((out.T.double() - dense.double()).abs().max())
    dtype = str(x.dtype).removeprefix("torch.")
    return Check(text, kernel.program.dtype, dtype, len(x), "decode", finite(error), torch.equal(out.T, dense))


def compare(kernel: Any, kind: str, x: Tensor, want: Tensor, text: str) -> Check:
    """Run an executor on a poisoned output and workspace."""
    out = run_once(kernel.executor(kind), x, want.shape[1])
    error = float((out.double() - want).norm() / want.norm())
    # A NaN error compares false, so an output that was not written fails.
    passed = error < TOLERANCE[x.dtype]
    return Check(
        text, kernel.program.dtype, str(x.dtype).removeprefix("torch."), x.shape[0], kind, finite(error), passed
    )


def finite(value: float) -> float | None:
    """The value as JSON can hold it."""
    return value if math.isfinite(value) else None


# ---- times ----------------------------------------------------------------------------------


def time_all(plan: Plan, report: Report, note: Callable[[Timing], None]) -> None:
    """Layer by layer, the large decode layer first; a short budget drops the last ones."""
    from bench.gpu_timing import Clock

    clock = Clock(plan.device)
    report.copy_bandwidth = clock.copy_bandwidth()
    batches = (*plan.decode, *plan.prefill)
    for shape in plan.shapes:
        linear: dict[int, float] = {}
        for name in (*VENDORS[: None if plan.device.type == "cuda" else 1], *TIMED):
            if plan.late():
                report.dropped.append(f"times {shape[0]}x{shape[1]} {name}")
                continue
            try:
                for timing in time_format(clock, shape, batches, name, linear, report.copy_bandwidth):
                    report.times.append(timing)
                    note(timing)
            except Exception as error:  # a layer that does not fit, or a library that refuses a shape
                told = f"times {shape[0]}x{shape[1]} {name}: {type(error).__name__}: {error}".splitlines()[0]
                (report.refused if is_vendor(name) else report.failures).append(told)
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()


def time_format(
    clock: Any, shape: tuple[int, int], batches: tuple[int, ...], name: str, linear: dict[int, float], bandwidth: float
) -> Iterator[Timing]:
    """One weight at several batches; `linear` collects F.linear's times for the others."""
    runners, payload = runners_of(clock, shape, name)
    for batch in batches:
        x = torch.randn(batch, shape[1], device=clock.device).to(torch.bfloat16)
        for kind, calls in runners(x, batch).items():
            seconds = clock.seconds(calls)
            if name == VENDORS[0]:
                linear[batch] = seconds
            moved = payload + x.nbytes + 2 * batch * shape[0]
            bound = moved / bandwidth
            speedup = linear[batch] / seconds if batch in linear else None
            yield Timing(shape, batch, name, kind, seconds * 1e6, moved, bound * 1e6, bound / seconds, speedup)


# ---- report ---------------------------------------------------------------------------------


def new_report(dry: bool) -> Report:
    """The header of a report: device, versions and commit."""
    import triton

    from bench.machine import describe_machine

    device = "dry-run" if dry else torch.cuda.get_device_name()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if not dry:
        versions["cuda"] = str(torch.version.cuda or torch.version.hip)
    return Report(device, not dry, versions, str(describe_machine()["commit"]))


def show(report: Report) -> str:
    """The report as text: a line per failed check, a table of times, what was dropped."""
    failed = [check for check in report.checks if not check.passed]
    lines = [f"{report.device}: {len(report.checks) - len(failed)} of {len(report.checks)} checks passed"]
    lines += [open_end] if (open_end := unchecked(report)) else []
    lines += [f"  FAILED {check}" for check in failed]
    lines += [f"  FAILED {failure}" for failure in report.failures]
    if report.times:
        lines += [f"copy bandwidth {report.copy_bandwidth / 1e9:.0f} GB/s", header(), *map(row, report.times)]
    if report.refused:
        lines += ["refused by the vendor's library:", *(f"  {refusal}" for refusal in report.refused)]
    if report.dropped:
        lines += [f"dropped, out of time ({len(report.dropped)}):", *(f"  {name}" for name in report.dropped)]
    if not report.measured:
        lines.append("dry run: no number above is a measurement")
    return "\n".join(lines)


def header() -> str:
    return f"{'shape':>13s} {'batch':>5s} {'format':24s} {'executor':10s} {'us':>9s} {'of bound':>8s} {'x linear':>8s}"


def row(timing: Timing) -> str:
    shape = f"{timing.shape[0]}x{timing.shape[1]}"
    speedup = "none" if timing.speedup is None else f"{timing.speedup:.2f}"
    return (
        f"{shape:>13s} {timing.batch:5d} {timing.format:24s} {timing.executor:10s} {timing.time:9.1f} "
        f"{timing.fraction:8.0%} {speedup:>8s}"
    )


def write(report: Report, path: Path | None) -> Path:
    """The JSON of a report; default bench/results/gpu-<device>.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", report.device.lower()).strip("-")
    path = path or RESULTS / f"gpu-{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=440.0, help="seconds after which no new case starts")
    parser.add_argument("--jobs", type=int, default=side_by_side(), help="checks at a time; default: by cores")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter; no measurement")
    given = parser.parse_args(arguments)
    if given.dry_run and (os.environ.get("TRITON_INTERPRET") != "1" or given.output is None):
        print("gpu-check: expected TRITON_INTERPRET=1 and --output with --dry-run; set both", file=sys.stderr)
        return 2
    if not given.dry_run and not torch.cuda.is_available():
        print("gpu-check: expected a GPU that torch can use, found none; run it where there is one", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="stoicc-gpu-check-") as cache:
        os.environ.setdefault("STOICC_CACHE_DIR", cache)
        return run(
            Plan.make(given.dry_run, given.budget, 1 if given.dry_run else given.jobs), given.dry_run, given.output
        )


def run(plan: Plan, dry: bool, output: Path | None) -> int:
    """Check, time, report; 1 where anything failed."""
    report = new_report(dry)
    check_all(plan, report)
    print(f"{len(report.checks)} checks, {sum(not check.passed for check in report.checks)} failed", flush=True)
    time_all(plan, report, lambda timing: print(row(timing), flush=True))
    print(show(report))
    print(f"wrote {write(report, output)}")
    return int(bool(report.failures or unchecked(report)) or not all(check.passed for check in report.checks))


def unchecked(report: Report) -> str | None:
    """What the checks of a run leave open: a run that skipped some has not passed."""
    dropped = sum(name.startswith("check ") for name in report.dropped)
    if not report.checks:
        return "NOT CHECKED: no check ran; give a larger --budget"
    return f"NOT CHECKED: {dropped} checks were dropped; give a larger --budget" if dropped else None


if __name__ == "__main__":
    sys.exit(main())
