"""Which layers a model cannot spare, beside what outlier ratios (OWL) say: why uneven sparsity helps, or does not.

    python -m bench.accuracy_layers                  # minutes a model; writes bench/results/accuracy-layers.json
    python -m bench.accuracy_layers --model minilm   # one of gpt, minilm; the other stays in the file as it is

Each layer is pruned by Wanda alone, the others dense, and the model scored: its damage. Then all layers are pruned,
with sparsity shared out evenly, by OWL's outlier ratios, and by what the model's output changes on the calibration
inputs; over layers, or over blocks with one share for their layers. All spreads are OWL's. The rank correlation of
ratio and damage says whether outliers name the layers that a model cannot spare.
"""

import argparse
import copy
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import stoicc
from bench.accuracy_record import code_digest
from bench.accuracy_subjects import Subject, gpt, minilm
from bench.machine import describe_machine
from stoicc import ops
from stoicc.ops.budgets import outlier_ratio, sparsity_budget

PATH = Path(__file__).parent / "results" / "accuracy-layers.json"
SPARSITIES = (0.5, 0.7)
WAYS: dict[str, dict[str, Any] | None] = {
    "even": None,
    "OWL, layers": {"per": "layer"},
    "OWL, blocks": {"per": "block"},
    "output, layers": {"per": "layer", "by": "output"},
    "output, blocks": {"per": "block", "by": "output"},
}
"""How sparsity is shared out: options of a budget."""
SUBJECTS = {"gpt": lambda: gpt((32, 128)), "minilm": lambda: minilm((128, 200))}


@dataclass(frozen=True)
class Measured:
    """One model at one sparsity.

    Attributes:
        scores: of the model with all layers pruned, by the ways to share sparsity out; the dense model's under "dense".
        correlation: Spearman's, of outlier ratio and damage per weight.
        layers: name, outlier ratio, OWL's share to drop (over layers), and damage, the most damage per weight first.
    """

    subject: str
    score: str
    sparsity: float
    scores: dict[str, float]
    correlation: float
    layers: list[tuple[str, float, float, float]]


@torch.no_grad()
def measure(subject: Subject, sparsity: float) -> Measured:
    """Prune one layer at a time, and then all in every way."""
    name = next(iter(subject.better))

    def scored(model: nn.Module) -> float:
        return subject.score(model)[name].mean().item()

    weights = linears(subject)
    statistics = ops.collect(subject.model, _batches(subject), list(weights), gram=False)
    sizes = {layer: module.weight.numel() for layer, module in weights.items()}
    ratios = {layer: outlier_ratio(module.weight, statistics[layer]) for layer, module in weights.items()}
    dense = scored(subject.model)
    damage = {}
    for layer, module in weights.items():
        before = module.weight.data
        module.weight.data = ops.wanda(before, statistics[layer], sparsity).dense()
        damage[layer] = abs(scored(subject.model) - dense)
        module.weight.data = before
    each = {layer: damage[layer] / sizes[layer] for layer in weights}
    shares = sparsity_budget(ratios, sizes, sparsity)
    scores = {"dense": dense} | {way: scored(pruned(subject, sparsity, options)) for way, options in WAYS.items()}
    layers = [(layer, ratios[layer], shares[layer], damage[layer]) for layer in weights]
    correlation = scipy.stats.spearmanr([ratios[layer] for layer in weights], [each[layer] for layer in weights])
    layers.sort(key=lambda one: -each[one[0]])
    return Measured(subject.name, name, sparsity, scores, float(correlation.statistic), layers)


def linears(subject: Subject) -> dict[str, nn.Linear]:
    """The layers that a subject means, by name."""
    rule = stoicc.Rule(subject.layers)
    return {
        name: layer
        for name, layer in subject.model.named_modules()
        if isinstance(layer, nn.Linear) and rule.names(name)
    }


def pruned(subject: Subject, sparsity: float, options: dict[str, Any] | None) -> nn.Module:
    """Every layer by Wanda, evenly or with a budget of these options."""
    steps = ({"wanda": {"sparsity": sparsity}},) if options is None else ({"wanda": {}},)
    rule = stoicc.Rule(subject.layers, steps, budget=None if options is None else {"sparsity": sparsity, **options})
    given = subject.model, stoicc.Recipe([rule]), subject.calibration
    return stoicc.compress(*given, in_place=False, progress=False)


def _batches(subject: Subject) -> Iterable[Any]:
    """Calibration as `ops.collect` takes it."""
    if not callable(subject.calibration):
        return list(subject.calibration)
    calls: list[dict[str, Any]] = []
    hook = subject.model.register_forward_pre_hook(lambda module, args: calls.append(copy.copy(args[0])))
    subject.calibration(subject.model)
    hook.remove()
    return [(call,) for call in calls]


def page(data: dict[str, Any]) -> str:
    """Both tables as markdown."""
    found = [Measured(**one) for one in data["measured"].values()]
    lines = [f"| model | pruned | score | dense | {' | '.join(WAYS)} | rank correlation |"]
    lines += [f"| --- | --- | --- |{' ---: |' * (len(WAYS) + 2)}"]
    for one in found:
        scores = " | ".join(f"{one.scores[way]:.4f}" for way in ("dense", *WAYS))
        lines.append(f"| {one.subject} | {one.sparsity:.0%} | {one.score} | {scores} | {one.correlation:+.2f} |")
    lines += ["", "| model, 70% | layers by damage per weight, the most first: damage, outliers, OWL's share to drop |"]
    lines += ["| --- | --- |"]
    for one in found:
        if one.sparsity == SPARSITIES[-1]:
            first = "; ".join(f"`{n}` {d:.3f}, {r:.2%}, {s:.0%}" for n, r, s, d in (_short(e) for e in one.layers[:5]))
            lines.append(f"| {one.subject} | {first} |")
    return "\n".join(lines)


def _short(layer: Any) -> tuple[str, float, float, float]:
    name, ratio, share, damage = layer
    return re.sub(r"^.*?(?=blocks\.|layer\.)", "", name), ratio, share, damage


def show(one: Measured, console: Console) -> None:
    """Every layer, and the scores."""
    table = Table("layer", "outliers", "OWL drops", "damage", box=box.SIMPLE_HEAD)
    for name, ratio, share, damage in one.layers:
        table.add_row(_short((name, 0, 0, 0))[0], f"{ratio:.3%}", f"{share:.1%}", f"{damage:.4f}")
    console.print(f"{one.subject}, {one.sparsity:.0%}", table)
    scores = ", ".join(f"{way} {score:.4f}" for way, score in one.scores.items())
    console.print(f"{one.score}: {scores}; rank correlation {one.correlation:+.2f}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=tuple(SUBJECTS), help="default: both")
    console = Console(width=130)
    for model in parser.parse_args().model or SUBJECTS:
        subject = SUBJECTS[model]()
        for sparsity in SPARSITIES:
            one = measure(subject, sparsity)
            show(one, console)
            data = json.loads(PATH.read_text()) if PATH.exists() else {"measured": {}}
            data["machine"] = describe_machine() | {"code": code_digest()}
            data["measured"][f"{model}, {sparsity}"] = asdict(one)
            PATH.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
