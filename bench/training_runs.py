"""One training run of `bench.training`: a method, a seed, its settings; results stay in the user's cache folder."""

import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.corpus import Corpus, Split
from bench.gpt import Gpt, GptConfig
from bench.gpt_training import EVALUATION, Plan, held_out_bits, train
from bench.training_memory import allocated
from bench.training_methods import FORKS, METHODS, Fork, Options
from stoicc.nn import SlopeSchedule

CONFIG = GptConfig(width=64, layers=2, heads=2, context=64)
CURVE_POINTS = 20
CURVE_WINDOWS, FINAL_WINDOWS = 32, 1024
"""Windows that a point of a curve is read from, and the bits at the end."""
QUICK = 100
"""Steps of a run that no more than EVALUATION windows are read for."""
_OF_ADAPTERS = ("left", "right", "_extra_state")
ADAPTER_RATE = 1e-3
"""Before it is tuned."""
VERSION = 3
"""Of what a run is; another one forgets cached runs."""


@dataclass(frozen=True)
class Setting:
    """What was tuned for a method.

    Attributes:
        rate: peak learning rate.
        options: of the method.
        adapter_rates: of lazy adapters when they join, by name of the fork: the schedule's is next to nothing then.
    """

    rate: float = 6e-3
    options: Options = field(default_factory=dict)
    adapter_rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What one run found.

    Attributes:
        name: of the method, or of one of `FORKS`.
        bits: per byte of text it was not trained on.
        curve: (step, bits) on a part of that text; empty while tuning.
    """

    name: str
    seed: int
    bits: float
    curve: list[tuple[int, float]]


def plan_for(steps: int, seed: int, setting: Setting) -> Plan:
    """The same for every method, but for what was tuned."""
    decay = setting.options.get("decay", 0.1)
    return Plan(steps, batch=16, rate=setting.rate, warmup=min(100, steps // 5), decay=decay, seed=seed)


def runs_of(
    name: str, steps: int, seed: int, setting: Setting, corpus: Corpus, split: Split, folder: Path | None = None
) -> list[Run]:
    """The run of a method; of SLoPe also those with lazy adapters. From the cache, or trained now and put there."""
    forks = repr(FORKS) if name == "slope" else ""
    about = (VERSION, repr(CONFIG), name, steps, seed, asdict(setting), corpus.hash, split, torch.__version__, forks)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = (folder or user_cache_path("stoicc") / "training") / f"{key}.json"
    if not path.exists():
        found = _trained(name, plan_for(steps, seed, setting), setting, corpus, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps([asdict(run) for run in found]))
        partial.replace(path)
    return [Run(**run) for run in json.loads(path.read_text())]


def _trained(name: str, plan: Plan, setting: Setting, corpus: Corpus, split: Split) -> list[Run]:
    text, judge = corpus.text("train"), corpus.text(split)
    model, schedule, optimizer = _made(name, plan, setting)
    forks = {} if name != "slope" else {of: _forks_at(fork, plan.steps) for of, fork in FORKS.items()}
    curve: list[tuple[int, float]] = []
    count = FINAL_WINDOWS if split == "held-out" and plan.steps > QUICK else EVALUATION
    with tempfile.TemporaryDirectory() as folder, sdpa_kernel(SDPBackend.MATH):  # the faster one at this size

        def on_step(step: int, bits: float) -> None:
            if schedule is not None:
                schedule.step()
            if split == "held-out" and step % max(1, plan.steps // CURVE_POINTS) == 0:
                curve.append((step, held_out_bits(model, judge, CONFIG.context, CURVE_WINDOWS)))
            if step in forks.values():
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/{step}")

        train(model, text, plan, CONFIG.context, on_step=on_step, optimizer=optimizer)
        runs = [Run(name, plan.seed, held_out_bits(model.eval(), judge, CONFIG.context, count), curve)]
        for of, step in forks.items():
            adapted = _forked(of, plan, setting, Path(folder) / str(step), text)
            runs.append(Run(of, plan.seed, held_out_bits(adapted, judge, CONFIG.context, count), []))
    return runs


def _forks_at(fork: Fork, steps: int) -> int:
    return steps - max(1, round(fork.share * steps))


def _forked(name: str, plan: Plan, setting: Setting, saved: Path, text: torch.Tensor) -> Gpt:
    """The run that was saved at a step, gone on from there with adapters."""
    fork = FORKS[name]
    options = {**setting.options, "lazy": fork.share}
    own_rate = setting.adapter_rates.get(name, ADAPTER_RATE) if fork.own else None
    model, schedule, optimizer = _made("slope", plan, replace(setting, options=options), own_rate)
    assert schedule is not None
    step = _forks_at(fork, plan.steps)
    schedule.load_state_dict({**schedule.state_dict(), "position": step})
    before, mine = torch.load(saved, weights_only=True), model.state_dict()
    kept = {key: value for key, value in before["model"].items() if not key.endswith(_OF_ADAPTERS)}
    groups = [*before["optimizer"]["param_groups"][:2], *optimizer.state_dict()["param_groups"][2:]]
    merged = {"state": before["optimizer"]["state"], "param_groups": groups}  # adapters have no state yet
    path = saved.with_suffix(".fork")
    torch.save({"model": mine | kept, "optimizer": merged, "step": step, "seconds": 0.0}, path)
    train(model, text, plan, CONFIG.context, path, lambda step, bits: schedule.step(), optimizer)
    return model.eval()


def _made(
    name: str, plan: Plan, setting: Setting, own_rate: float | None = None
) -> tuple[Gpt, SlopeSchedule | None, torch.optim.Optimizer]:
    model = Gpt(CONFIG, plan.seed)
    options = {"seed": plan.seed, **METHODS[name].options[0], **setting.options}
    schedule = METHODS[name].apply(model, plan.steps, options)
    adapters = schedule.adapters if schedule is not None else []
    optimizer = _optimizer(model, adapters, plan)
    if schedule is not None and own_rate is not None:
        optimizer.param_groups[-1].update(own_rate=own_rate, joins_at=schedule.adapters_from)
    return model, schedule, optimizer


def _optimizer(model: nn.Module, adapters: Sequence[nn.Parameter], plan: Plan) -> torch.optim.AdamW:
    """That of `bench.gpt_training`, with adapters in a group of their own."""
    own = {id(factor) for factor in adapters}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in own]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": plan.decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    if adapters:
        groups.append({"params": adapters, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=plan.rate, betas=plan.betas, fused=True)


def step_times(settings: Mapping[str, Setting], corpus: Corpus, rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of a step of each method, a step of each in turn; refreshed masks and repacking included."""
    text = corpus.text("train")
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    steppers = {name: _stepper(name, setting, text) for name, setting in settings.items()}
    for turn in range(rounds):
        for name, step in steppers.items():
            start = time.perf_counter()
            step(turn)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(found[3:]) for name, found in seconds.items()}


def _stepper(name: str, setting: Setting, text: torch.Tensor) -> Callable[[int], None]:
    plan = plan_for(1000, 0, setting)
    model, schedule, optimizer = _made(name, plan, setting)

    def step(turn: int) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            once = replace(plan, steps=1, warmup=0, seed=turn)
            train(model, text, once, CONFIG.context, optimizer=optimizer)
        if schedule is not None:
            schedule.step()

    return step


def model_bytes(name: str, setting: Setting, corpus: Corpus) -> int:
    """Bytes of weights, masks, gradients and optimizer state of the whole model after a step, from real allocations."""
    text = corpus.text("train")

    def one_step() -> Any:
        plan = replace(plan_for(1000, 0, setting), steps=1)
        model, _, optimizer = _made(name, plan, setting)
        zero = optimizer.zero_grad
        optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]  # gradients are counted
        train(model, text, plan, CONFIG.context, optimizer=optimizer)
        optimizer.zero_grad = zero  # type: ignore[method-assign]
        return model, optimizer

    one_step()  # what libraries keep from their first call is not counted
    return allocated(one_step).held
