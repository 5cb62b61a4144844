"""Training a small byte-level GPT dense, with SLoPe, and with other 2:4 methods: same seeds, steps and data.

    python -m bench.training             # five seeds of every method, three where they take more than 17 minutes
    python -m bench.training --quick     # one seed, few steps: under 50 s; writes nothing
    python -m bench.training --tune      # settings of every method, with the same effort
    python -m bench.training --tune-adapters  # of SLoPe's adapters alone
    python -m bench.training --times     # times and memory alone, into the record that is there
    python -m bench.training --runs      # runs alone, into the record that is there

Prints bits per held-out byte, memory and step time, and what they say about published claims. The full run keeps
finished runs in the user's cache folder, so it goes on after a stop; it writes bench/results/training.json and
docs/training.png.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from bench.corpus import Corpus, standard_library
from bench.machine import describe_machine
from bench.training_memory import layer_memory
from bench.training_methods import METHODS
from bench.training_record import NAMES, Record, claims_table, draw, layer, rows_table, table
from bench.training_runs import CONFIG, Run, Setting, model_bytes, plan_for, step_times
from bench.training_tuning import Trial, recorded, settings, tune
from bench.training_why import last_steps
from bench.training_why import rows as why
from bench.training_workers import Job, jobs_for, side_by_side
from stoicc.nn import SlopeLinear, kept

ROOT = Path(__file__).parents[1]
RESULT, PICTURE = ROOT / "bench" / "results" / "training.json", ROOT / "docs" / "training.png"
STEPS, SEEDS = 1600, (0, 1, 2, 3, 4)
MINUTES = 17
"""Of runs, after which no seed beyond the third is begun."""
QUICK_STEPS = 30


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--tune-adapters", action="store_true")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--runs", action="store_true")
    asked = parser.parse_args()
    corpus, console = standard_library(), Console()
    console = Console(width=max(console.width, 160))
    console.print(str(corpus), highlight=False)
    if asked.tune or asked.tune_adapters:
        return tune(corpus, lambda trial: _say_trial(console, trial), asked.tune_adapters)
    if asked.times:
        found = Record.read(RESULT)
        step_ms, layer_ms = step_times(found.settings, corpus), layer_times()
        record = replace(found, step_ms=step_ms, layer_ms=layer_ms, layer=layer_memory(), machine=describe_machine())
    elif asked.runs:
        found = Record.read(RESULT)
        runs = all_runs(corpus, STEPS, SEEDS, found.settings, console)
        record = replace(found, about=_about(corpus, STEPS, runs), runs=runs)
    elif asked.quick:
        record = measured(corpus, QUICK_STEPS, SEEDS[:1], console, [name for name in METHODS if not METHODS[name].like])
    else:
        record = measured(corpus, STEPS, SEEDS, console, list(METHODS))
    tables = rows_table(record), claims_table(record), table(*why(record))
    for shown in (*tables, last_steps(record), layer(record), record.layer_ms):
        console.print(shown)
    if not asked.quick:
        record.write(RESULT)
        _draw(record, console)


def measured(corpus: Corpus, steps: int, seeds: tuple[int, ...], console: Console, names: list[str]) -> Record:
    """All runs, times and memory of some methods."""
    trials = recorded()
    chosen = {name: setting for name, setting in settings(trials).items() if name in names}
    step_ms = step_times(chosen, corpus, rounds=15 if len(seeds) > 1 else 5)
    bytes_of = {name: model_bytes(name, setting, corpus) for name, setting in chosen.items()}
    runs = all_runs(corpus, steps, seeds, chosen, console)
    about = _about(corpus, steps, runs)
    return Record(about, chosen, runs, step_ms, bytes_of, layer_memory(), layer_times(), describe_machine(), trials)


def all_runs(
    corpus: Corpus, steps: int, seeds: tuple[int, ...], chosen: Mapping[str, Setting], console: Console
) -> list[Run]:
    """Every method with every seed, seed by seed; after MINUTES no more of those that come after the first three."""
    found: list[Run] = []
    start = time.perf_counter()

    def wanted(job: Job) -> bool:
        return job.seed in seeds[:3] or time.perf_counter() - start < 60 * MINUTES

    for job, runs, seconds in side_by_side(jobs_for(chosen, steps, seeds, corpus), wanted=wanted):
        found += runs
        said = ", ".join(f"{run.name} {run.bits:.4f}" for run in runs)
        console.print(f"seed {job.seed}: {said} ({seconds:.0f} s)", highlight=False)
    most = max(sum(run.seed == seed for run in found) for seed in seeds)
    whole = [seed for seed in seeds if sum(run.seed == seed for run in found) == most]
    return sorted((run for run in found if run.seed in whole), key=lambda run: (run.seed, list(NAMES).index(run.name)))


def _about(corpus: Corpus, steps: int, runs: list[Run]) -> str:
    seeds = sorted({run.seed for run in runs})
    plan = plan_for(steps, 0, Setting())
    return (
        f"A byte-level GPT of {CONFIG.layers} blocks of width {CONFIG.width}, {steps} steps of {plan.batch} windows "
        f"of {CONFIG.context} bytes, seeds {', '.join(map(str, seeds))}. Data: {corpus}."
    )


def layer_times(size: int = 1024, batch: int = 1024) -> dict[str, float]:
    """Milliseconds of products of one bf16 layer `[size, size]` with `batch` inputs, dense and 2:4."""
    dense = nn.Linear(size, size, bias=False, dtype=torch.bfloat16)
    sparse = SlopeLinear.of(dense)
    kernel = sparse.to_kernel(
        pipeline="drop-empty,build-csr,split-k{parts=balance},order{by=item},regimes{tiles=1000000}"
    )
    x = torch.randn(batch, size).bfloat16().requires_grad_()
    constant = x.detach()
    grad = torch.randn(batch, size).bfloat16()

    def both(module: nn.Module) -> Callable[[], object]:
        return lambda: module(x).backward(grad)

    def forward(module: nn.Module) -> Callable[[], object]:
        return torch.no_grad()(lambda: module(constant))

    def unaided() -> object:
        with torch.no_grad():
            return sparse.kept.new_zeros(size, size).scatter_(1, kept._columns(sparse.places, 2, 4), sparse.kept)

    what: dict[str, Callable[[], object]] = {
        "dense: forward": forward(dense),
        "2:4, written to a scratch: forward": forward(sparse),
        "2:4, compiled kernel on its tiles: forward": forward(kernel),
        "dense: forward and backward": both(dense),
        "2:4, written to a scratch: forward and backward": both(sparse),
        "kept weights to rows, in C": sparse.to_dense,
        "kept weights to rows, torch's scatter": unaided,
        "second prune of all rows (a step does a hundredth)": sparse.repack,
    }
    return {name: _milliseconds(run) for name, run in what.items()}


def _milliseconds(run: Callable[[], object], rounds: int = 9) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[2:])


def _draw(record: Record, console: Console) -> None:
    if find_spec("matplotlib") is None:
        return console.print(f"no matplotlib here: {PICTURE.name} is that of the last record")
    draw(record, PICTURE)


def _say_trial(console: Console, trial: Trial) -> None:
    console.print(f"{trial.name}: {trial.setting}, {trial.bits:.4f} bits", highlight=False)


if __name__ == "__main__":
    main()
