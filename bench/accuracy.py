"""What each operator costs in accuracy: the table of SLiM's paper on models that are at hand.

    python -m bench.accuracy                 # both models; trains the GPT first if it never was (under 15 minutes)
    python -m bench.accuracy --model gpt     # one of gpt, minilm, synthetic
    python -m bench.accuracy --only 2:4      # rows whose name has this in it; nothing is written
    python -m bench.accuracy --resume rows   # a folder that keeps rows: the same command goes on after a stop
    python -m bench.accuracy --quick         # synthetic layers, and MiniLM where it is installed: under 50 s

Every linear layer is compressed by `stoicc.compress`, calibrated on what the compressed layers before it
produce, and runs as the kernel that it became (--quick builds no C, and runs the reference backend). The
full run writes bench/results/accuracy-<model>.json.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console

import stoicc
from bench import accuracy_subjects as subjects
from bench.accuracy_pages import orders_table, rows_table
from bench.accuracy_record import Found, Record, RowFolder, code_digest, outcome
from bench.accuracy_rows import Row, all_rows, orders, quick_rows
from bench.accuracy_subjects import Scores, Subject
from bench.machine import describe_machine

RESULTS = Path(__file__).parent / "results"
QUICK_S = 40.0
"""No row of the quick run starts later than so many seconds after its start."""
QUICK_LAYERS = ("*.encoder.layer.0.*", "*.encoder.layer.1.*")
MODELS = ("gpt", "minilm", "synthetic")


@torch.no_grad()
def measure(subject: Subject, row: Row, target: str) -> tuple[Found, Scores]:
    """Compress a copy of the subject as the row says, and score it."""
    start = time.perf_counter()
    rule = stoicc.Rule(subject.layers, row.steps, compile={"target": target}, budget=row.budget)
    width = () if row.keep is None or subject.neurons is None else (stoicc.Width(*subject.neurons, keep=row.keep),)
    recipe = stoicc.Recipe([rule], width=width)
    given = subject.model, recipe, subject.calibration
    model = stoicc.compress(*given, sequential=row.sequential, in_place=False, progress=False)
    report = stoicc.report(model)
    formats: Counter[str] = Counter()
    for layer in report.rows:
        formats.update(dict(layer.formats))
    errors = [
        layer.record.error for layer in report.rows if layer.record is not None and layer.record.error is not None
    ]
    dense = [(layer.record and layer.record.narrowed_from) or layer.shape for layer in report.rows]
    weights = sum(rows * columns for rows, columns in dense)
    scores = subject.score(model)
    found = Found(
        row.pattern,
        row.pruning,
        row.quantization,
        row.adapter,
        list(row.steps),
        report.bytes / weights,
        sum(errors) / len(errors),
        {name: values.mean().item() for name, values in scores.items()},
        time.perf_counter() - start,
        dict(formats.most_common()),
        row.sequential,
        row.budget,
        row.keep,
    )
    return found, scores


def run(
    subject: Subject,
    rows: Iterable[Row],
    console: Console,
    target: str = "auto",
    deadline: float | None = None,
    folder: RowFolder | None = None,
) -> Record:
    """Measure the rows of one subject; those that would start after the deadline are left out, which is said.

    Rows that `folder` holds are read, and the others are kept there. A subject without MLPs has no width rows.
    """
    found: dict[str, Found] = {}
    items: dict[str, Scores] = {}
    for row in rows:
        if row.keep is not None and subject.neurons is None:
            continue
        kept = None if folder is None else folder.read(row)
        if kept is not None:
            found[row.name], items[row.name] = kept
            continue
        if deadline is not None and time.perf_counter() > deadline:
            console.print(f"{subject.name}: out of time before {row.name}")
            break
        with console.status(f"{subject.name}: {row.name}"):
            found[row.name], items[row.name] = measure(subject, row, target)
        if folder is not None:
            folder.write(found[row.name], items[row.name])
        if not console.is_terminal:
            one = found[row.name]
            figures = ", ".join(f"{name} {value:.4f}" for name, value in one.scores.items())
            console.print(f"{row.name}: {figures}, layer error {one.error:.3f}, {one.seconds:.1f} s")
    outcomes = [outcome(order, found, items, subject.better) for order in orders()]
    return Record(
        subject.name,
        subject.about,
        dict(subject.better),
        describe_machine() | {"code": code_digest()},
        tuple(found.values()),
        tuple(filter(None, outcomes)),
    )


def show(record: Record, console: Console) -> None:
    """Both tables of a record."""
    console.print(f"[bold]{record.subject}[/]: {record.about}")
    console.print(rows_table(record))
    console.print(orders_table(record))


def quick(console: Console) -> list[Record]:
    """Synthetic layers with every row, MiniLM with the fewest that show the orders."""
    deadline = time.perf_counter() + QUICK_S
    records = [run(subjects.synthetic(((256, 128),)), all_rows(), console, "reference", deadline)]
    if subjects.minilm_is_installed():
        records.append(run(subjects.minilm((32, 128), QUICK_LAYERS), quick_rows(), console, "reference", deadline))
    else:
        console.print("all-MiniLM-L6-v2 is not installed (extra `demo`): synthetic layers alone")
    return records


def _subject(model: str, console: Console) -> Subject:
    """One of MODELS."""

    def say(step: int, bits: float) -> None:
        if step % 100 == 0:
            console.print(f"training, step {step}: {bits:.2f} bits per byte")

    match model:
        case "gpt":
            return subjects.gpt(on_step=say)
        case "minilm":
            return subjects.minilm()
        case _:
            return subjects.synthetic()


def full(models: Sequence[str], only: str, resume: Path | None, console: Console) -> None:
    """The rows of these models, one after the other; each record is written when it is whole."""
    for model in models:
        if model == "minilm" and not subjects.minilm_is_installed():
            console.print("all-MiniLM-L6-v2 is not installed: pip install 'stoicc[demo]'")
            continue
        subject = _subject(model, console)
        folder = None if resume is None else RowFolder(resume / model, subject.about, code_digest())
        record = run(subject, [row for row in all_rows() if only in row.name], console, folder=folder)
        show(record, console)
        if not only:
            record.write(RESULTS / f"accuracy-{model}.json")


def main() -> None:
    """Measure, print, and write the record of a full run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="no training, nothing is written; under 50 s")
    parser.add_argument("--model", action="append", choices=MODELS, help="default: gpt and minilm")
    parser.add_argument("--resume", type=Path, help="a folder that keeps rows, to go on after a stop")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    arguments = parser.parse_args()
    console = Console(width=130)
    if arguments.quick:
        for record in quick(console):
            show(record, console)
    else:
        full(arguments.model or ["gpt", "minilm"], arguments.only, arguments.resume, console)


if __name__ == "__main__":
    main()
