"""One training run of `bench.training`: a method, a seed, its settings; results stay in the user's cache folder."""

import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.corpus import Corpus, Split
from bench.gpt import Gpt, GptConfig
from bench.gpt_training import Plan, held_out_bits, train
from bench.training_memory import allocated
from bench.training_methods import LAZY, METHODS, Options
from stoicc.nn import SlopeLinear, SlopeSchedule

CONFIG = GptConfig(width=64, layers=2, heads=2, context=64)
LAZY_SHARE = 0.01
CURVE_POINTS = 20
CURVE_WINDOWS = 32
VERSION = 2
"""Of what a run is; another one forgets cached runs."""


@dataclass(frozen=True)
class Setting:
    """What was tuned for a method.

    Attributes:
        rate: peak learning rate.
        options: of the method.
        adapter_rate: of lazy adapters, which train when the schedule's rate is next to nothing.
    """

    rate: float = 6e-3
    options: Options = field(default_factory=dict)
    adapter_rate: float = 3e-3


@dataclass(frozen=True)
class Run:
    """What one run found.

    Attributes:
        name: of the method, or `LAZY`.
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
    """The run of a method; of SLoPe also that with lazy adapters. From the cache, or trained now and put there."""
    about = (VERSION, repr(CONFIG), name, steps, seed, asdict(setting), corpus.hash, split, torch.__version__)
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
    curve: list[tuple[int, float]] = []
    fork = plan.steps - max(1, round(LAZY_SHARE * plan.steps))
    with tempfile.TemporaryDirectory() as folder, sdpa_kernel(SDPBackend.MATH):  # the faster one at this size
        checkpoint = Path(folder) / "fork.checkpoint"

        def on_step(step: int, bits: float) -> None:
            if schedule is not None:
                schedule.step()
            if split == "held-out" and step % max(1, plan.steps // CURVE_POINTS) == 0:
                curve.append((step, held_out_bits(model, judge, CONFIG.context, CURVE_WINDOWS)))
            if step == fork and name == "slope":
                _save_fork(model, optimizer, step, checkpoint)

        train(model, text, plan, CONFIG.context, on_step=on_step, optimizer=optimizer)
        runs = [Run(name, plan.seed, held_out_bits(model.eval(), judge, CONFIG.context), curve)]
        if name == "slope":
            adapted, lazily, optimizer = _made(name, plan, setting, LAZY_SHARE)
            assert lazily is not None
            lazily.position = fork
            train(adapted, text, plan, CONFIG.context, checkpoint, lambda step, bits: lazily.step(), optimizer)
            bits = held_out_bits(adapted.eval(), judge, CONFIG.context)
            runs.append(Run(LAZY, plan.seed, bits, [point for point in curve if point[0] <= fork]))
    return runs


def _made(
    name: str, plan: Plan, setting: Setting, lazy: float = 0.0
) -> tuple[Gpt, SlopeSchedule | None, torch.optim.Optimizer]:
    model = Gpt(CONFIG, plan.seed)
    options = {"seed": plan.seed, "lazy": lazy, **METHODS[name].options[0], **setting.options}
    schedule = METHODS[name].apply(model, plan.steps, options)
    return model, schedule, _optimizer(model, plan, setting.adapter_rate)


def _optimizer(model: nn.Module, plan: Plan, adapter_rate: float) -> torch.optim.AdamW:
    """That of `bench.gpt_training`, with adapters in a group of their own."""
    adapters = _adapters(model)
    own = {id(factor) for factor in adapters}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in own]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": plan.decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    if adapters:
        groups.append({"params": adapters, "weight_decay": 0.0, "fixed_rate": adapter_rate})
    return torch.optim.AdamW(groups, lr=plan.rate, betas=plan.betas, fused=True)


def _slopes(model: nn.Module) -> list[SlopeLinear]:
    return [module for module in model.modules() if isinstance(module, SlopeLinear)]


def _adapters(model: nn.Module) -> list[nn.Parameter]:
    factors = (factor for layer in _slopes(model) for factor in (layer.left, layer.right))
    return [factor for factor in factors if factor is not None]


def _save_fork(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, path: Path) -> None:
    """A checkpoint as `train` reads it, of the run as it would go on with adapters."""
    for layer in _slopes(model):
        layer.adapting = True
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": 0.0}
    torch.save(state, path)
    for layer in _slopes(model):
        layer.adapting = False


def step_times(settings: Mapping[str, Setting], corpus: Corpus, rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of a step of every method, a step of each in turn; refreshed masks and repacking included."""
    text = corpus.text("train")
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    steppers = {name: _stepper(name, settings[name], text) for name in METHODS}
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
