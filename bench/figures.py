"""The figures of README.md and docs/, rendered from `bench/results/`: each is one that a command printed.

python -m bench.figures     # rewrites the blocks between the markers; a test compares them
"""

import json
import re
from pathlib import Path
from typing import Any

from bench import (
    accuracy_draws,
    accuracy_layers,
    accuracy_loss,
    accuracy_pages,
    adapter,
    autotune,
    budget_record,
    budget_search,
    cost_model,
    cpu_pages,
    crossover,
    gradient,
    operators,
    training_record,
    training_why,
)
from bench.accuracy_record import Record as AccuracyRecord
from bench.cpu_record import Record

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "docs" / "performance.md",
    ROOT / "docs" / "performance-vectors.md",
    ROOT / "docs" / "accuracy.md",
    ROOT / "docs" / "operators.md",
    ROOT / "docs" / "adapters.md",
    ROOT / "docs" / "budget.md",
    ROOT / "docs" / "training.md",
)
SEARCHES = {"autotune": autotune.page, "cost_model": cost_model.page, "crossover": crossover.page}
_BLOCK = re.compile(r"(<!-- figures(?:: (\w+)(?: of ([\w-]+))?)? -->\n).*?\n?(<!-- /figures -->)", re.DOTALL)


def filled(text: str) -> str:
    """A document with the block after each `<!-- figures -->` (README's) or `<!-- figures: name -->` rendered.

    `<!-- figures: name of record -->` takes `bench/results/record.json`, for a second machine.
    """
    return _BLOCK.sub(lambda found: f"{found[1]}{_rendered(found[2], found[3])}\n{found[4]}", text)


def _rendered(name: str | None, record: str | None) -> str:
    if name is not None and name.startswith("accuracy_"):
        _, model, block = name.split("_")
        return accuracy_pages.PAGE[block](AccuracyRecord.read(RESULTS / f"accuracy-{model}.json"))
    if name == "loss":
        return accuracy_loss.page(json.loads(accuracy_loss.PATH.read_text()))
    if name == "draws":
        return accuracy_draws.page(_read("accuracy-draws"))
    if name == "layers":
        return accuracy_layers.page(_read("accuracy-layers"))
    if name in SEARCHES:
        return SEARCHES[name](_read(record or name))
    if name == "adapter":
        return adapter.page(_read("adapter"))
    if name == "gradient":
        return gradient.page(_read("gradient"))
    if name == "operators":
        return operators.page(_read("operators"))
    if name == "budget_search":
        return budget_search.page(json.loads(budget_search.PATH.read_text()))
    if name is not None and name.startswith("budget_"):
        _, model, block = name.split("_")
        return budget_record.PAGE[block](budget_record.Record.read(RESULTS / f"budget-{model}.json"))
    if name is not None and name.startswith("training_"):
        pages = training_record.PAGE | training_why.PAGE
        return pages[name.partition("_")[2]](training_record.Record.read(RESULTS / "training.json"))
    found = Record.from_json(_read(record or "cpu"))
    return cpu_pages.PAGE[name](found) if name else render(found)


def render(record: Record) -> str:
    """README's block of figures as markdown."""
    parts = [cpu_pages.readme(record), inspector(_read("inspector"))]
    parts += [gpu(json.loads(path.read_text())) for path in sorted(RESULTS.glob("gpu-*.json"))]
    return "\n\n".join(parts)


def inspector(found: dict[str, Any]) -> str:
    """Time and peak memory of compiling a weight."""
    rows = [
        f"{name} {row['seconds']:.2f} s and {row['peak_over_weight']:.1f}x its bytes at the peak"
        for name, row in found["results"].items()
    ]
    return (
        f"`stoicc.compile` of a 4096 x 11008 bf16 weight on the same machine (`python -m bench.inspector`): "
        f"{'; '.join(rows)}."
    )


def gpu(found: dict[str, Any]) -> str:
    """Decode and prefill times of one GPU."""
    lines = [
        f"{found['device']}, torch {found['versions']['torch']}, triton {found['versions']['triton']} "
        f"(copy bandwidth {found['copy_bandwidth'] / 1e9:.0f} GB/s), `make gpu-check`:",
        "",
        "| shape | batch | format | executor | us | of the byte bound | x F.linear |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for t in found["times"]:
        shape = f"{t['shape'][0]} x {t['shape'][1]}"
        lines.append(
            f"| {shape} | {t['batch']} | {t['format']} | {t['executor']} | {t['time']:.1f} | {t['fraction']:.0%} "
            f"| {'none' if t['speedup'] is None else format(t['speedup'], '.2f')} |"
        )
    return "\n".join(lines)


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def main() -> None:
    """Put the figures between the markers of the documents."""
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text()))


if __name__ == "__main__":
    main()
