"""Whether a mosaic under a budget pays, on models and not on its own objective.

    python -m bench.budget                   # both models, three draws of calibration inputs each
    python -m bench.budget --model gpt       # one of gpt, minilm, synthetic
    python -m bench.budget --solver          # how long choosing takes for a 4096 x 11008 layer
    python -m bench.budget --quick           # synthetic layers, one draw, and a smaller layer to choose for: under 50 s

Every linear layer is compressed by `stoicc.ops.budget_mosaic`, uniform formats by the same operator with one candidate,
calibrated on what the compressed layers before it produce. Formats are chosen on calibration text and judged on other
text, in fp32: the roundings of bf16 activations differ with every change of a weight, and are most of what is left at
8 bits. All on one thread, as sums that differ in their last bit choose other formats for some tiles. The full run
writes bench/results/budget-<model>.json; `--resume FOLDER` keeps finished rows.
"""

import argparse
import copy
import json
import math
import time
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
from bench.corpus import FRESH, fresh_text, sentences_in, standard_library, windows
from bench.gpt import GptConfig
from bench.machine import describe_machine
from stoicc.model.calibration import Calibration, Survey, collect_stage, survey
from stoicc.model.cross_fit import HalfCollector
from stoicc.model.layers import Layer, find_layers
from stoicc.model.mosaic_budget import Seen, Spread, layer_factor, layer_table, model_output, spread_bytes
from stoicc.model.replay import Replay
from stoicc.ops import Statistics
from stoicc.ops._hooks import watching
from stoicc.ops.statistics import Collector
from stoicc.policy.budget import CANDIDATES

RESULTS = Path(__file__).parent / "results"
MODELS = ("gpt", "minilm", "synthetic")
DRAWS = 3
HELD_OUT, SENTENCES = 256, 400
LN2 = math.log(2)
QUICK_SHAPE = (1024, 2752)


@dataclass(frozen=True, eq=False)
class Case:
    """A subject with several draws of calibration inputs.

    Attributes:
        draws: as `stoicc.compress` takes them, of equal size and without common parts.
        errors: of a model, by name; less is better, and the dense model has 0. The model is theirs to change.
        scores: what the errors are, in words.
    """

    subject: Subject
    draws: Sequence[Any]
    errors: Callable[[nn.Module], dict[str, float]]
    scores: dict[str, str]


def gpt_case() -> Case:
    """Bits per byte over the dense model's, and the divergence of predictions; 32 windows a draw."""
    corpus, context = standard_library(), GptConfig().context
    subject = subjects.gpt((32, HELD_OUT))
    found = windows(corpus.text("calibration"), DRAWS * 32, context)
    draws = [list(found[draw::DRAWS].split(16)) for draw in range(DRAWS)]
    texts = {"": corpus.text("held-out"), "fresh ": fresh_text().text()}
    parts = {name: windows(text, HELD_OUT, context + 1).split(32) for name, text in texts.items()}

    def predictions(model: nn.Module, name: str) -> list[Tensor]:
        return [model(part[:, :-1]).log_softmax(-1) for part in parts[name]]

    def bits(found: Sequence[Tensor], name: str) -> float:
        pairs = zip(found, parts[name], strict=True)
        losses = [-logs.gather(-1, part[:, 1:, None].long()).mean() for logs, part in pairs]
        return float(torch.stack(losses).mean()) / LN2

    with torch.no_grad():
        model = copy.deepcopy(subject.model).float()
        dense = {name: predictions(model, name) for name in parts}
    floors = {name: bits(logs, name) for name, logs in dense.items()}

    def errors(model: nn.Module) -> dict[str, float]:
        model, found = model.float(), dict[str, float]()
        for name, logs in dense.items():
            own = predictions(model, name)
            divergence = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(logs, own, strict=True)]
            found[f"{name}bits/byte"] = bits(own, name) - floors[name]
            found[f"{name}divergence"] = float(torch.stack(divergence).mean()) / LN2
        return found

    scores = {
        "bits/byte": "bits per byte of held-out text over the dense model's",
        "divergence": "bits of divergence of the next byte's distribution from the dense model's",
        "fresh bits/byte": f"the same of {', '.join(FRESH)}, which no choice was made on",
        "fresh divergence": "of that text",
    }
    return Case(subject, draws, errors, scores)


def minilm_case() -> Case:
    """1 - cosine to the dense embedding, calibrated on 128 sentences a draw."""
    subject = subjects.minilm((128, SENTENCES))
    texts = subjects.calibration_sentences(standard_library())[: DRAWS * 128]
    draws = [partial(subjects.embed, texts=texts[draw::DRAWS]) for draw in range(DRAWS)]
    known = subjects.evaluation_sentences(SENTENCES)
    others = [text for text in sentences_in(fresh_text().docstrings()) if text not in {*known, *texts}]
    unseen = {"1 - cosine": known, "fresh 1 - cosine": others[:: len(others) // SENTENCES][:SENTENCES]}
    model = copy.deepcopy(subject.model).float()
    dense = {name: subjects.embed(model, each).double() for name, each in unseen.items()}

    def errors(model: nn.Module) -> dict[str, float]:
        model = model.float()
        found = {name: (subjects.embed(model, unseen[name]) * y).sum(-1) for name, y in dense.items()}
        return {name: (1 - cosines).mean().item() for name, cosines in found.items()}

    scores = {
        "1 - cosine": "to the dense model's embedding of other sentences, their mean",
        "fresh 1 - cosine": f"of sentences from docstrings of {', '.join(FRESH)}, which no choice was made on",
    }
    return Case(subject, draws, errors, scores)


def synthetic_case() -> Case:
    """Squared error of the output of random layers; one draw."""
    found = subjects.synthetic()
    subject = replace(found, model=copy.deepcopy(found.model).bfloat16())
    inputs = [tuple(x.bfloat16() for x in batch) for batch in found.calibration]

    def errors(model: nn.Module) -> dict[str, float]:
        return {"squared error": subject.score(copy.deepcopy(model).float())["squared error"].mean().item()}

    floor = errors(subject.model)["squared error"]  # what bf16 alone leaves
    what = {"squared error": "of the output, as a share of its square, over that of bf16"}
    return Case(subject, [inputs], lambda model: {"squared error": errors(model)["squared error"] - floor}, what)


CASES = {"gpt": gpt_case, "minilm": minilm_case, "synthetic": synthetic_case}


@dataclass(frozen=True, eq=False)
class Draw:
    """A draw of calibration inputs, and what it tells of the dense model.

    Attributes:
        survey: which layers see the same inputs, in the order in which the model calls them.
        weights: of every layer.
        statistics: of every layer's inputs.
        factors: what a layer's squared error does to the model's output.
    """

    calibration: Calibration
    survey: Survey
    weights: dict[str, Tensor]
    statistics: dict[str, Statistics]
    factors: dict[str, float]

    @staticmethod
    def of(subject: Subject, given: Any) -> "Draw":
        """Run the model as `stoicc.compress` does for a budget over layers, statistics of all layers at once."""
        model, calibration = subject.model, Calibration(given)
        layers = find_layers(model, stoicc.Recipe([stoicc.Rule(subject.layers)]))
        collectors = {layer.name: (Collector(name=layer.name), HalfCollector(name=layer.name)) for layer in layers}

        def see(name: str, x: Tensor) -> None:
            for collector in collectors[name]:
                collector.add(x)

        with watching(model, collectors, see):
            for forward in calibration.runs():
                forward(model)
        seen = {name: Seen(whole.statistics(), halves.statistics()) for name, (whole, halves) in collectors.items()}
        found, output = survey(model, layers, calibration), model_output(model, calibration)
        replay, factors = Replay(layers, changing=False), {}
        for stage in found.stages:
            for layer in stage.layers:
                factors[layer.name] = layer_factor(model, layer, calibration, seen[layer.name], output, replay)
            replay.settle(stage.layers)
        weights = {layer.name: layer.weight for layer in layers}
        return Draw(calibration, found, weights, {name: each.whole for name, each in seen.items()}, factors)

    def spread(self, row: Row) -> Spread:
        """Options of `budget_mosaic` for every layer, and the error of the model that is foretold."""
        given = {"bytes_per_weight": row.bits / 8, **dict(row.options or ())}
        tables = {
            name: layer_table(weight, self.statistics[name], given, self.factors[name])
            for name, weight in self.weights.items()
        }
        if row.options is None:
            return spread_bytes(tables, row.bits / 8)
        each = (spread_bytes({name: table}, given["bytes_per_weight"]).error for name, table in tables.items())
        return Spread({name: dict(row.options or ()) for name in tables}, sum(each))


@dataclass(frozen=True)
class Measured:
    """A row with one draw.

    Attributes:
        errors: by name.
        foretold: change of the model's output on the calibration inputs, as a share of its squared norm.
        stored: bits per weight.
        formats: tiles by format.
    """

    errors: dict[str, float]
    foretold: float
    stored: float
    formats: dict[str, int]


@torch.no_grad()
def measure(case: Case, row: Row, draw: Draw) -> Measured:
    """Compress a copy of the model layer by layer, as `stoicc.compress` does, and score it."""
    model = copy.deepcopy(case.subject.model)
    tiles: Counter[str] = Counter()
    stored = weights = 0
    spread = draw.spread(row)
    options = spread.options
    replay = Replay([layer for stage in draw.survey.stages for layer in stage.layers])
    for stage in draw.survey.stages:
        own = replace(stage, layers=tuple(replace(layer, modules=_modules(model, layer)) for layer in stage.layers))
        statistics = collect_stage(model, own, draw.calibration, torch.float32, replay)
        for layer in own.layers:
            compressed = stoicc.ops.budget_mosaic(layer.weight, statistics, **options[layer.name])
            formats = options[layer.name].get("formats", CANDIDATES)
            kernel = stoicc.compile(compressed, formats, target="reference")
            stats = kernel.stats()
            tiles.update({entry.format: entry.tiles for entry in stats.formats})
            stored += stats.payload_bytes + stats.beside_bytes
            weights += layer.weight.numel()
            layer.weight.copy_(kernel.to_dense())  # runs as the kernel would, and faster than the reference
        replay.settle(own.layers)
    return Measured(case.errors(model), spread.error, 8 * stored / weights, dict(tiles.most_common()))


def _modules(model: nn.Module, layer: Layer) -> dict[str, nn.Linear]:
    """The modules of a layer in a copy of its model."""
    found = {name: model.get_submodule(name) for name in layer.modules}
    return {name: module for name, module in found.items() if isinstance(module, nn.Linear)}


def run(
    name: str,
    rows: Sequence[Row],
    console: Console,
    kept: Path | None = None,
    draws: int = DRAWS,
    seconds: float = math.inf,
) -> Record:
    """Measure the rows of a model; what a folder keeps is read from there, and after `seconds` nothing else."""
    case, start = CASES[name](), time.perf_counter()
    known: dict[int, Draw] = {}
    found: list[Found] = []
    for row in rows:
        parts = []
        for number, given in enumerate(case.draws[:draws]):
            path = None if kept is None else kept / f"{name}-{number}-{row.name}-{row.bits:g}.json"
            if path is not None and path.exists():
                parts.append(Measured(**json.loads(path.read_text())))
                continue
            if time.perf_counter() - start > seconds:
                continue
            with console.status(f"{name}, draw {number + 1}: {row.name}, {row.bits:g} bits"):
                if number not in known:
                    known[number] = Draw.of(case.subject, given)
                parts.append(measure(case, row, known[number]))
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(asdict(parts[-1])))
            if not console.is_terminal:
                console.print(f"{name}, draw {number + 1}: {row.name}, {parts[-1].stored:.3f} bits: {parts[-1].errors}")
        found += [_found(row, parts)] if parts else []
    about = f"{case.subject.about} Up to {min(draws, len(case.draws))} draws of calibration inputs."
    return Record(case.subject.name, about, case.scores, describe_machine(), tuple(found))


def _found(row: Row, parts: Sequence[Measured]) -> Found:
    scores = {name: [part.errors[name] for part in parts] for name in parts[0].errors}
    foretold = [part.foretold for part in parts]
    return Found(row.name, row.bits, parts[0].stored, scores, parts[0].formats, foretold)


def show(record: Record, console: Console) -> None:
    """Both tables of a record."""
    console.print(f"[bold]{record.subject}[/]: {record.about}")
    console.print(rows_table(record))
    console.print(claims_table(record))


def main() -> None:
    """Measure, print, and write the record of a full run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="synthetic layers; nothing is written; under 50 s")
    parser.add_argument("--solver", action="store_true", help="only time what choosing takes")
    parser.add_argument("--model", action="append", choices=MODELS, help="default: gpt and minilm")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row later: draws may be missing")
    parser.add_argument("--resume", type=Path, help="a folder that keeps finished rows")
    arguments = parser.parse_args()
    console = Console(width=150)
    if not arguments.solver:
        torch.set_num_threads(1)
    if arguments.solver or arguments.quick:
        console.print(phases_table(phases(QUICK_SHAPE) if arguments.quick else phases()))
    if arguments.quick:
        show(run("synthetic", all_rows(), console), console)
    elif not arguments.solver:
        for model in arguments.model or ["gpt", "minilm"]:
            record = run(model, all_rows(), console, arguments.resume, seconds=arguments.seconds)
            show(record, console)
            record.write(RESULTS / f"budget-{model}.json")


if __name__ == "__main__":
    main()
