"""How much of a layer's error the loss of the GPT feels, where rows of `bench.accuracy` stand in another order.

    python -m bench.accuracy_loss      # half a minute a row; writes bench/results/accuracy-loss.json

Operators see the inputs x of a layer and keep ||E x|| small, E = W - W_c. What a layer's error adds to the loss is, in
second order, E[(g . E x)^2] / 2 with g the gradient of the loss by the layer's output (the empirical Fisher information
along E): of two errors of one size, the one along g counts. Both are taken on calibration windows of the dense model.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import stoicc
from bench.accuracy_rows import Row, all_rows
from bench.accuracy_subjects import Subject, gpt
from bench.corpus import standard_library, windows

PATH = Path(__file__).parent / "results" / "accuracy-loss.json"
ROWS = tuple(
    f"{pattern}, {pruning}"
    for pattern in ("2:4", "50%", "70%")
    for pruning in ("magnitude", "Wanda", "Wanda, dense inputs", "SparseGPT")
) + tuple(f"{place}, {each}" for place in ("2:4, Wanda", "dense, SLiM-Quant") for each in ("Naive-LoRA", "SLiM-LoRA"))
COLUMNS = ("row", "layer error", "felt, bits", "of it", "bits/byte")


@dataclass(frozen=True)
class Felt:
    """One row.

    Attributes:
        error: mean over the layers of ||X E^T|| / ||X W^T||, X the inputs in the dense model.
        felt: sum over the layers of E[(g . E x)^2] / 2, in bits per byte.
        parts: of `felt`, by kind of layer.
        bits: per held-out byte of the compressed model.
    """

    row: str
    error: float
    felt: float
    parts: dict[str, float]
    bits: float


@dataclass(frozen=True, eq=False)
class Seen:
    """Of one layer in the dense model: inputs `[N, K]`, and gradients of the loss (nats) by its outputs `[N, M]`."""

    x: Tensor
    gradients: Tensor


def see(model: nn.Module, names: list[str], tokens: Tensor) -> dict[str, Seen]:
    """Run windows `[count, length]` forward and backward in fp32."""
    wide = copy.deepcopy(model).float().requires_grad_(True)
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    gradients: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        inputs[name].append(args[0].detach().flatten(0, -2))
        y.register_hook(lambda gradient: gradients[name].append(gradient.flatten(0, -2)))

    for name in names:
        wide.get_submodule(name).register_forward_hook(partial(keep, name))
    with torch.enable_grad():
        for part in tokens.split(16):
            logits = wide(part[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").backward()
    return {name: Seen(torch.cat(inputs[name]), torch.cat(gradients[name])) for name in names}


@torch.no_grad()
def felt(row: Row, subject: Subject, seen: Mapping[str, Seen]) -> Felt:
    """Compress as the row says, and weigh the errors of the layers."""
    rule = stoicc.Rule(subject.layers, row.steps)
    model = stoicc.compress(
        subject.model, stoicc.Recipe([rule]), subject.calibration, sequential=row.sequential, in_place=False
    )
    errors, parts = [], dict[str, float]()
    for name, one in seen.items():
        dense, kernel = subject.model.get_submodule(name), model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        assert isinstance(kernel, stoicc.Kernel)
        weight = dense.weight.float()
        change = one.x @ (weight - kernel.to_dense().float()).T
        errors.append((change.norm() / (one.x @ weight.T).norm()).item())
        along = (change * one.gradients).sum(1).square().mean().item() / 2 / math.log(2)
        kind = ".".join(name.split(".")[2:])
        parts[kind] = parts.get(kind, 0.0) + along
    score = next(iter(subject.better))
    bits = subject.score(model)[score].mean().item()
    return Felt(row.name, sum(errors) / len(errors), sum(parts.values()), parts, bits)


def cells(one: Felt) -> tuple[str, ...]:
    """A line of the table."""
    parts = ", ".join(f"{kind} {value:.3f}" for kind, value in one.parts.items())
    return one.row, f"{one.error:.3f}", f"{one.felt:.3f}", parts, f"{one.bits:.4f}"


def page(data: list[dict[str, object]]) -> str:
    """The table as markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | ---: | ---: | --- | ---: |"]
    return "\n".join([*lines, *(f"| {' | '.join(cells(Felt(**one)))} |" for one in data)])  # type: ignore[arg-type]


def wanted() -> list[Row]:
    """ROWS; the table of `bench.accuracy` lacks some of those with dense inputs."""
    rows = {row.name: row for row in all_rows()}
    for name in ROWS:
        dense = name.removesuffix(", dense inputs")
        if name not in rows:
            one = rows[dense]
            rows[name] = Row(one.pattern, one.pruning, "", "", one.steps, sequential=False)
    return [rows[name] for name in ROWS]


def main() -> None:
    """Measure, print, write."""
    subject = gpt()
    names = [
        name
        for name, layer in subject.model.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith("blocks.")
    ]
    seen = see(subject.model, names, windows(standard_library().text("calibration"), 64, 257))
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD)
    found = []
    for row in wanted():
        found.append(felt(row, subject, seen))
        table.add_row(*cells(found[-1]))
    Console(width=150).print(table)
    PATH.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
