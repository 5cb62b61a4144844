"""Training a small byte-level GPT dense, with SLoPe, and with other 2:4 methods: same seeds, steps and data.

    python -m bench.training             # all seeds of every method: under 25 minutes on two cores
    python -m bench.training --quick     # one seed, few steps: under 50 s; writes nothing
    python -m bench.training --tune      # settings of every method, with the same effort
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
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from bench.corpus import Corpus, standard_library
from bench.machine import describe_machine
from bench.training_memory import layer_memory
from bench.training_methods import METHODS
from bench.training_record import Record, claims_table, draw, layer, rows_table
from bench.training_runs import CONFIG, Run, Setting, model_bytes, plan_for, runs_of, step_times
from bench.training_tuning import Trial, recorded, settings, tune
from stoicc.nn import SlopeLinear, kept

ROOT = Path(__file__).parents[1]
RESULT, PICTURE = ROOT / "bench" / "results" / "training.json", ROOT / "docs" / "training.png"
STEPS, SEEDS = 2000, (0, 1, 2, 3, 4)
QUICK_STEPS = 100


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--runs", action="store_true")
    asked = parser.parse_args()
    corpus, console = standard_library(), Console()
    console = Console(width=max(console.width, 160))
    console.print(str(corpus), highlight=False)
    if asked.tune:
        return tune(corpus, lambda trial: _say_trial(console, trial))
    if asked.times:
        found = Record.read(RESULT)
        step_ms, layer_ms = step_times(found.settings, corpus), layer_times()
        record = replace(found, step_ms=step_ms, layer_ms=layer_ms, layer=layer_memory(), machine=describe_machine())
    elif asked.runs:
        found = Record.read(RESULT)
        runs = all_runs(corpus, STEPS, SEEDS, found.settings, console)
        record = replace(found, about=_about(corpus, STEPS, SEEDS), runs=runs)
    elif asked.quick:
        record = measured(corpus, QUICK_STEPS, SEEDS[:1], console)
    else:
        record = measured(corpus, STEPS, SEEDS, console)
    for shown in (rows_table(record), claims_table(record), layer(record), record.layer_ms):
        console.print(shown)
    if not asked.quick:
        record.write(RESULT)
        draw(record, PICTURE)


def measured(corpus: Corpus, steps: int, seeds: tuple[int, ...], console: Console) -> Record:
    """All runs, times and memory."""
    trials = recorded()
    chosen = settings(trials)
    step_ms, bytes_of = step_times(chosen, corpus), {name: model_bytes(name, chosen[name], corpus) for name in METHODS}
    runs = all_runs(corpus, steps, seeds, chosen, console)
    about = _about(corpus, steps, seeds)
    return Record(about, chosen, runs, step_ms, bytes_of, layer_memory(), layer_times(), describe_machine(), trials)


def all_runs(
    corpus: Corpus, steps: int, seeds: tuple[int, ...], chosen: Mapping[str, Setting], console: Console
) -> list[Run]:
    """Every method with every seed."""
    runs: list[Run] = []
    for seed in seeds:
        for name in METHODS:
            start = time.perf_counter()
            found = runs_of(name, steps, seed, chosen[name], corpus, "held-out")
            runs += found
            said = ", ".join(f"{run.name} {run.bits:.4f}" for run in found)
            console.print(f"seed {seed}: {said} ({time.perf_counter() - start:.0f} s)", highlight=False)
    return runs


def _about(corpus: Corpus, steps: int, seeds: tuple[int, ...]) -> str:
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


def _say_trial(console: Console, trial: Trial) -> None:
    console.print(f"{trial.name}: {trial.setting}, {trial.bits:.4f} bits", highlight=False)


if __name__ == "__main__":
    main()
