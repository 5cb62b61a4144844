"""Train the byte-level GPT on the corpus: AdamW, a cosine schedule, bf16 where the processor multiplies it fast.

    python -m bench.gpt_training    # the model of bench.accuracy; says how far it is

A run is seeded, saves a checkpoint every two minutes and goes on from it after a stop. What was trained
stays in the user's cache folder, under a key of sizes, plan, corpus and kind of model.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from torch import Tensor, nn

from bench.corpus import Corpus, standard_library, windows
from bench.gpt import Gpt, GptConfig, next_byte_bits

CHECKPOINT_S = 120.0
EVALUATION = 256
"""Windows that `held_out_bits` reads by default."""
OnStep = Callable[[int, float], None]
"""Called after each step with its number (from 1) and the bits per byte of its batch."""


@dataclass(frozen=True)
class Plan:
    """How a model is trained: AdamW with decoupled decay on matrices, linear warm-up, cosine to zero.

    Attributes:
        batch: windows a step, each of the model's context.
    """

    steps: int = 3000
    batch: int = 16
    rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


@dataclass(frozen=True)
class Trained:
    """A model that was trained, in eval mode.

    Attributes:
        seconds: of training, whenever that was.
        threads: that torch had.
    """

    model: Gpt
    seconds: float
    threads: int
    path: Path


def trained(
    config: GptConfig,
    plan: Plan,
    corpus: Corpus,
    model: Callable[[GptConfig, int], Gpt] = Gpt,
    on_step: OnStep | None = None,
    folder: Path | None = None,
) -> Trained:
    """The model of this configuration, plan and corpus: from the cache, or trained now and put there.

    Args:
        model: makes the model from configuration and seed; what it is called belongs to the key.
        folder: of the cache; default: the user's.
    """
    key = hashlib.sha256(repr((config, plan, corpus.hash, model.__qualname__)).encode()).hexdigest()[:12]
    folder = folder or user_cache_path("stoicc") / "models"
    path, checkpoint = folder / f"gpt_{key}.pt", folder / f"gpt_{key}.checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    made = model(config, plan.seed)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            seconds = train(made, corpus.text("train"), plan, config.context, checkpoint, on_step)
            state = {"model": made.state_dict(), "seconds": seconds, "threads": torch.get_num_threads()}
            with _replacing(path) as partial:
                torch.save(state, partial)
            checkpoint.unlink(missing_ok=True)
    found = torch.load(path, weights_only=True)
    made.load_state_dict(found["model"])
    return Trained(made.eval(), found["seconds"], found["threads"], path)


def train(
    model: nn.Module,
    text: Tensor,
    plan: Plan,
    context: int,
    checkpoint: Path | None = None,
    on_step: OnStep | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> float:
    """Train in place on random windows of `text` (uint8).

    The windows of a step follow from the seed and the step alone, so a run that was stopped and goes on from
    its checkpoint sees the same data.

    Args:
        optimizer: default: `optimizer_for`. A group with an `own_rate` falls linearly from that learning rate at step
            `joins_at` to zero at the end.

    Returns:
        Seconds of training, those before a stop included.
    """
    optimizer = optimizer or optimizer_for(model, plan)
    step, before = _resume(model, optimizer, checkpoint)
    start = saved = time.perf_counter()
    model.train()
    while step < plan.steps:
        for group in optimizer.param_groups:
            group["lr"] = _rate(group, plan, step)
        batch = windows(text, plan.batch, context + 1, seed=plan.seed * 1_000_003 + step)
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16()):
            loss = next_byte_bits(model, batch).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if on_step is not None:
            on_step(step, loss.item())
        if checkpoint is not None and time.perf_counter() - saved > CHECKPOINT_S:
            saved = time.perf_counter()
            _save(model, optimizer, checkpoint, step, before + saved - start)
    return before + time.perf_counter() - start


def _rate(group: Mapping[str, Any], plan: Plan, step: int) -> float:
    if group.get("own_rate") is None:
        return plan.rate_at(step)
    rate, joins = group["own_rate"], group["joins_at"]
    return float(rate * min(1.0, (plan.steps - step) / max(1, plan.steps - joins)))


def optimizer_for(model: nn.Module, plan: Plan) -> torch.optim.AdamW:
    """AdamW over the parameters that train; matrices decay, norms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": plan.decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.rate, betas=plan.betas, fused=True)


def multiplies_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware: autocast is for those alone."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()


@torch.no_grad()
def held_out_bits(model: nn.Module, text: Tensor, context: int, count: int = EVALUATION) -> float:
    """Bits per byte over evenly spread windows of a text, in the model's own dtype.

    Each window's first byte is given and not counted; what follows it has from 1 to `context` bytes before it.
    """
    parts = windows(text, count, context + 1).split(32)
    return torch.cat([next_byte_bits(model, part) for part in parts]).mean().item()


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path | None) -> tuple[int, float]:
    """The step to go on from, and the seconds it took to get there."""
    if checkpoint is None or not checkpoint.exists():
        return 0, 0.0
    found = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    return found["step"], found["seconds"]


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, step: int, seconds: float) -> None:
    with _replacing(path) as partial:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
        torch.save(state, partial)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file that takes the place of `path` when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    yield partial
    partial.replace(path)


def main() -> None:
    """Train the model of bench.accuracy, and say how far it is every 50 steps."""
    config, plan, corpus = GptConfig(), Plan(), standard_library()
    start, recent = time.perf_counter(), []

    def say(step: int, bits: float) -> None:
        recent.append(bits)
        if step % 50 == 0 or step == plan.steps:
            seconds = time.perf_counter() - start
            print(f"step {step} of {plan.steps}, {seconds:.0f} s: {sum(recent) / len(recent):.3f} bits", flush=True)
            recent.clear()

    print(corpus, flush=True)
    found = trained(config, plan, corpus, on_step=say)
    bits = held_out_bits(found.model, corpus.text("held-out"), config.context)
    print(f"{found.path}: {found.seconds:.0f} s on {found.threads} threads, {bits:.3f} bits per held-out byte")


if __name__ == "__main__":
    main()
