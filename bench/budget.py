"""Whether a mosaic under a budget pays, on models and not on its own objective.

    python -m bench.budget                   # both models, three draws of calibration inputs each (an hour)
    python -m bench.budget --model gpt       # one of gpt, minilm, synthetic
    python -m bench.budget --solver          # how long choosing takes for a 4096 x 11008 layer
    python -m bench.budget --quick           # synthetic layers, one draw, and a smaller layer to choose for: under 50 s

Every linear layer is compressed by `stoicc.compress`, calibrated on what the compressed layers before it produce, with
the same operator for mosaics and for uniform formats; formats are chosen on calibration text and judged on other
text. The full run writes bench/results/budget-<model>.json; `--resume FOLDER` keeps finished rows.
"""

import argparse
import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
from stoicc.kernel import Kernel

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


@torch.no_grad()
def measure(case: Case, row: Row) -> Found:
    """Compress as a row says once for each draw, and score what the kernels hold."""
    subject, stored = case.subject, 0.0
    scores: list[float] = []
    formats: dict[str, int] = {}
    for calibration in case.draws:
        rule = {"layers": list(subject.layers), **dict(row.rule), "compile": {"target": "reference"}}
        recipe = stoicc.Recipe.of({"rules": [rule]})
        model = stoicc.compress(subject.model, recipe, calibration, in_place=False, progress=False)
        if not scores:
            report = stoicc.report(model)
            tiles: Counter[str] = Counter()
            for layer in report.rows:
                tiles.update(dict(layer.formats))
            formats = dict(tiles.most_common())
            stored = stored_bits(model)
        scores.append(case.error(decoded(model)).mean().item() - case.dense)
    return Found(row.name, row.bits, stored, scores, formats)


def stored_bits(model: nn.Module) -> float:
    """Bits per weight of tiles and orders of columns; biases are the dense model's too."""
    kernels = [module for module in model.modules() if isinstance(module, Kernel)]
    weights = sum(kernel.program.shape[0] * kernel.program.shape[1] for kernel in kernels)
    total = 0
    for kernel in kernels:
        total += kernel.stats().payload_bytes
        total += 4 * kernel.in_features * (kernel.program.beside.column_permutation is not None)
    return 8 * total / weights


def decoded(model: nn.Module) -> nn.Module:
    """The model with dense layers that hold, bit for bit, what its kernels do: they run faster than the reference."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, Kernel):
            continue
        dense = module.to_dense()
        bias = module.pools.get("bias")
        layer = nn.Linear(module.in_features, module.out_features, bias is not None, dtype=dense.dtype)
        layer.weight.copy_(dense)
        if bias is not None:
            layer.bias.copy_(bias)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


def run(name: str, rows: Sequence[Row], console: Console, kept: Path | None = None) -> Record:
    """Measure the rows of a model; those that a folder keeps are read from there."""
    case = CASES[name]()
    found = []
    for number, row in enumerate(rows):
        path = None if kept is None else kept / f"{name}-{number}-{row.bits:g}.json"
        if path is not None and path.exists():
            one = Found(**json.loads(path.read_text()))
        else:
            with console.status(f"{name}: {row.name}, {row.bits:g} bits"):
                one = measure(case, row)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(asdict(one)))
        if not console.is_terminal:
            console.print(f"{name}: {row.name}, {one.stored:.3f} bits: {one.mean:.5f}")
        found.append(one)
    about = f"{case.subject.about} {len(case.draws)} draws of calibration inputs."
    return Record(case.subject.name, about, case.score, describe_machine(), tuple(found))


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
