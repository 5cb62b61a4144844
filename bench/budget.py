"""Whether a mosaic under a budget pays, on models and not on its own objective.

    python -m bench.budget                   # both models, three draws of calibration inputs each
    python -m bench.budget --model gpt       # one of gpt, minilm, synthetic
    python -m bench.budget --solver          # how long choosing takes for a 4096 x 11008 layer
    python -m bench.budget --quick           # synthetic layers, one draw, and a smaller layer to choose for: under 50 s

Every linear layer is compressed by `stoicc.ops.budget_mosaic`, uniform formats by the same operator with one candidate,
calibrated on what the dense layers before it produce. Formats are chosen on calibration text and judged on other text.
The full run writes bench/results/budget-<model>.json; `--resume FOLDER` keeps finished rows.
"""

import argparse
import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import stoicc
from bench import accuracy_subjects as subjects
from bench.accuracy_subjects import Subject
from bench.budget_record import Record, claims_table, rows_table
from bench.budget_rows import Found, Row, all_rows
from bench.budget_solver import phases, phases_table
from bench.corpus import standard_library, windows
from bench.gpt import GptConfig
from bench.machine import describe_machine
from stoicc.model.calibration import Calibration
from stoicc.model.layers import find_layers
from stoicc.model.mosaic_budget import layer_factor, layer_table, model_output, spread_bytes
from stoicc.ops import Statistics
from stoicc.ops._hooks import watching
from stoicc.ops.statistics import Collector
from stoicc.policy.budget import CANDIDATES

RESULTS = Path(__file__).parent / "results"
MODELS = ("gpt", "minilm", "synthetic")
DRAWS = 3
QUICK_SHAPE = (1024, 2752)


@dataclass(frozen=True, eq=False)
class Case:
    """A subject with several draws of calibration inputs.

    Attributes:
        draws: as `stoicc.compress` takes them, of equal size and without common parts.
        error: of a model, a number for each item of the evaluation; less is better, the dense model has `dense`.
        score: what the error is, in words.
    """

    subject: Subject
    draws: Sequence[Any]
    error: Callable[[nn.Module], Tensor]
    dense: float
    score: str


def gpt_case() -> Case:
    """Bits per byte over the dense model's, calibrated on 32 windows a draw."""
    subject = subjects.gpt()
    found = windows(standard_library().text("calibration"), DRAWS * 32, GptConfig().context)
    draws = [list(found[draw::DRAWS].split(16)) for draw in range(DRAWS)]

    def error(model: nn.Module) -> Tensor:
        return subject.score(model)["bits/byte"]

    return Case(subject, draws, error, error(subject.model).mean().item(), "bits per byte over the dense model's")


def minilm_case() -> Case:
    """1 - cosine to the dense embedding, calibrated on 128 sentences a draw."""
    subject = subjects.minilm()
    texts = subjects.calibration_sentences(standard_library())[: DRAWS * 128]
    draws = [partial(subjects.embed, texts=texts[draw::DRAWS]) for draw in range(DRAWS)]
    return Case(subject, draws, lambda model: subject.score(model)["1 - cosine"], 0.0, "1 - cosine to the dense model")


def synthetic_case() -> Case:
    """Squared error of the output of random layers; one draw."""
    found = subjects.synthetic()
    subject = replace(found, model=copy.deepcopy(found.model).bfloat16())
    inputs = [tuple(x.bfloat16() for x in batch) for batch in found.calibration]

    def error(model: nn.Module) -> Tensor:
        return subject.score(copy.deepcopy(model).float())["squared error"]

    score = "squared error of the output, as a share of its square"
    return Case(subject, [inputs], error, error(subject.model).mean().item(), score)


CASES = {"gpt": gpt_case, "minilm": minilm_case, "synthetic": synthetic_case}


@dataclass(frozen=True, eq=False)
class Draw:
    """What one draw of calibration inputs tells of the dense model.

    Attributes:
        weights: of every layer.
        statistics: of every layer's inputs.
        factors: what a layer's squared error does to the model's output.
    """

    weights: dict[str, Tensor]
    statistics: dict[str, Statistics]
    factors: dict[str, float]

    @staticmethod
    def of(subject: Subject, given: Any) -> "Draw":
        """Run the model once for the statistics, then as `stoicc.compress` does for a budget over layers."""
        calibration = Calibration(given)
        layers = find_layers(subject.model, stoicc.Recipe([stoicc.Rule(subject.layers)]))
        collectors = {layer.name: Collector(name=layer.name) for layer in layers}
        with watching(subject.model, collectors, lambda name, x: collectors[name].add(x)):
            for forward in calibration.runs():
                forward(subject.model)
        statistics = {name: each.statistics() for name, each in collectors.items()}
        output = model_output(subject.model, calibration)
        factors = {
            layer.name: layer_factor(subject.model, layer, calibration, statistics[layer.name], output)
            for layer in layers
        }
        return Draw({layer.name: layer.weight for layer in layers}, statistics, factors)

    def options(self, row: Row) -> dict[str, dict[str, Any]]:
        """Options of `budget_mosaic` for every layer."""
        if row.options is not None:
            return {name: dict(row.options or ()) for name in self.weights}
        share = {"bytes_per_weight": row.bits / 8}
        tables = {
            name: layer_table(weight, self.statistics[name], share, self.factors[name])
            for name, weight in self.weights.items()
        }
        shares = spread_bytes(tables, row.bits / 8)
        return {name: {"bytes_per_weight": shares[name], "sort_inputs": tables[name].sorted} for name in shares}


@torch.no_grad()
def measure(case: Case, row: Row, draw: Draw) -> tuple[float, float, dict[str, int]]:
    """The model's error over the dense one's, stored bits per weight, and tiles by format."""
    model = copy.deepcopy(case.subject.model)
    tiles: Counter[str] = Counter()
    stored = weights = 0
    for name, options in draw.options(row).items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        compressed = stoicc.ops.budget_mosaic(layer.weight, draw.statistics[name], **options)
        kernel = stoicc.compile(compressed, options.get("formats", CANDIDATES), target="reference")
        stats = kernel.stats()
        tiles.update({entry.format: entry.tiles for entry in stats.formats})
        stored += stats.payload_bytes + stats.beside_bytes
        weights += layer.weight.numel()
        layer.weight.copy_(kernel.to_dense())  # runs as the kernel would, and faster than the reference
    return case.error(model).mean().item() - case.dense, 8 * stored / weights, dict(tiles.most_common())


def run(name: str, rows: Sequence[Row], console: Console, kept: Path | None = None) -> Record:
    """Measure the rows of a model, draw by draw; what a folder keeps is read from there."""
    case = CASES[name]()
    parts: dict[Row, list[tuple[float, float, dict[str, int]]]] = {row: [] for row in rows}
    for number, given in enumerate(case.draws):
        draw: Draw | None = None
        for row in rows:
            path = None if kept is None else kept / f"{name}-{number}-{row.name}-{row.bits:g}.json"
            if path is not None and path.exists():
                parts[row].append(tuple(json.loads(path.read_text())))
                continue
            with console.status(f"{name}, draw {number + 1}: {row.name}, {row.bits:g} bits"):
                draw = draw or Draw.of(case.subject, given)
                parts[row].append(measure(case, row, draw))
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(parts[row][-1]))
            if not console.is_terminal:
                error, stored, _ = parts[row][-1]
                console.print(f"{name}, draw {number + 1}: {row.name}, {stored:.3f} bits: {error:.5f}")
    found = tuple(
        Found(row.name, row.bits, each[0][1], [part[0] for part in each], each[0][2]) for row, each in parts.items()
    )
    about = f"{case.subject.about} {len(case.draws)} draws of calibration inputs."
    return Record(case.subject.name, about, case.score, describe_machine(), found)


def show(record: Record, console: Console) -> None:
    """Both tables of a record."""
    console.print(f"[bold]{record.subject}[/]: {record.about} Errors are {record.score}.")
    console.print(rows_table(record))
    console.print(claims_table(record))


def main() -> None:
    """Measure, print, and write the record of a full run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="synthetic layers; nothing is written; under 50 s")
    parser.add_argument("--solver", action="store_true", help="only time what choosing takes")
    parser.add_argument("--model", action="append", choices=MODELS, help="default: gpt and minilm")
    parser.add_argument("--resume", type=Path, help="a folder that keeps finished rows")
    arguments = parser.parse_args()
    console = Console(width=150)
    if arguments.solver or arguments.quick:
        console.print(phases_table(phases(QUICK_SHAPE) if arguments.quick else phases()))
    if arguments.quick:
        show(run("synthetic", all_rows(), console), console)
    elif not arguments.solver:
        for model in arguments.model or ["gpt", "minilm"]:
            record = run(model, all_rows(), console, arguments.resume)
            show(record, console)
            record.write(RESULTS / f"budget-{model}.json")


if __name__ == "__main__":
    main()
