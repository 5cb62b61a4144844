"""Whether an order of MiniLM's rows that stands reversed in `bench.accuracy` is one of its draw of calibration inputs.

    python -m bench.accuracy_draws     # minutes; writes bench/results/accuracy-draws.json

The error bars of `bench.accuracy` are those of the sentences that a model is judged on; calibration inputs are drawn
once. Here the rows are compressed anew from each third of the sentences there are.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.accuracy import measure
from bench.accuracy_record import code_digest
from bench.accuracy_rows import all_rows
from bench.accuracy_subjects import calibration_sentences, embed, minilm
from bench.corpus import standard_library

PATH = Path(__file__).parent / "results" / "accuracy-draws.json"
DRAWS = 3
PAIRS = (
    ("2:4, Wanda, SLiM-LoRA", "2:4, Wanda, Naive-LoRA"),
    ("50%, Wanda, SLiM-LoRA", "50%, Wanda, Naive-LoRA"),
)
"""Rows, the one first that is published as the better."""
COLUMNS = ("better, as published", "other", "1 - cosine by draw", "gap", "+-")


def scores(draws: int) -> dict[str, list[float]]:
    """1 - cosine of each row of `PAIRS`, by draw."""
    subject, rows = minilm(), {row.name: row for row in all_rows()}
    texts = calibration_sentences(standard_library())
    found: dict[str, list[float]] = {name: [] for pair in PAIRS for name in pair}
    for draw in range(draws):
        given = partial(embed, texts=texts[draw::draws])
        for name, values in found.items():
            _, scored = measure(replace(subject, calibration=given), rows[name], "auto")
            values.append(scored["1 - cosine"].mean().item())
    return found


def cells(better: str, other: str, found: Mapping[str, Sequence[float]]) -> tuple[str, ...]:
    """A line of the table: by draw, and the mean gap with its standard error over draws."""
    gaps = [b - a for a, b in zip(found[better], found[other], strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    pairs = ", ".join(f"{a:.4f} / {b:.4f}" for a, b in zip(found[better], found[other], strict=True))
    return better, other, pairs, f"{statistics.mean(gaps):.4f}", f"{error:.4f}"


def page(data: dict[str, Any]) -> str:
    """The table as markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | --- | --- | ---: | ---: |"]
    return "\n".join([*lines, *(f"| {' | '.join(cells(*pair, data['scores']))} |" for pair in PAIRS)])


def main() -> None:
    """Measure, print, write."""
    found = scores(DRAWS)
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD)
    for pair in PAIRS:
        table.add_row(*cells(*pair, found))
    Console(width=150).print(table)
    PATH.write_text(json.dumps({"code": code_digest(), "scores": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
