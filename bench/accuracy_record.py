"""What `bench.accuracy` found, as data: rows with scores, and published orders with what became of them."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.accuracy_rows import Order, Row

ROOT = Path(__file__).parents[1]
CODE = ("stoicc", "ir", "passes", "codegen", "bench/accuracy*", "bench/gpt*", "bench/corpus*", "bench/minilm*")
"""What a row depends on, in the repository."""

CERTAIN = 2.0
"""A difference counts where it is at least so many of its standard errors."""


@dataclass(frozen=True)
class Found:
    """A row and what was measured.

    Attributes:
        bytes_per_weight: of the compressed layers, adapters and scales included (a dense bf16 weight: 2).
        error: mean over the layers of ||X (W - W_c)^T|| / ||X W^T|| on the calibration inputs that they saw.
        scores: mean over the items of the evaluation, by name.
        seconds: to compress and to score.
        formats: tiles by format.
        sequential, budget, keep: as in `Row`.
    """

    pattern: str
    pruning: str
    quantization: str
    adapter: str
    steps: list[Any]
    bytes_per_weight: float
    error: float
    scores: dict[str, float]
    seconds: float
    formats: dict[str, int]
    sequential: bool = True
    budget: dict[str, Any] | None = None
    keep: float | None = None

    @property
    def row(self) -> Row:
        """What was done."""
        options = self.sequential, self.budget, self.keep
        return Row(self.pattern, self.pruning, self.quantization, self.adapter, tuple(self.steps), *options)


@dataclass(frozen=True)
class Step:
    """Two neighbours in a published order.

    Attributes:
        less, more: rows by name; `less` should have the lower error.
        layer_errors: of both.
        scores: of both.
        gap: by how much `less` is better in score.
        deviation: standard error of the gap, over paired items.
    """

    less: str
    more: str
    layer_errors: tuple[float, float]
    scores: tuple[float, float]
    gap: float
    deviation: float

    @property
    def verdict(self) -> str:
        """ "holds", "reversed", or "level" where the gap is within its error."""
        if abs(self.gap) <= CERTAIN * self.deviation:
            return "level"
        return "holds" if self.gap > 0 else "reversed"


@dataclass(frozen=True)
class Outcome:
    """A published order at one place of the table."""

    claim: str
    where: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Record:
    """One model: its rows and orders."""

    subject: str
    about: str
    better: dict[str, str]
    machine: dict[str, str | int]
    rows: tuple[Found, ...]
    outcomes: tuple[Outcome, ...]

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_rounded(asdict(self)), indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> "Record":
        """The inverse of `write`."""
        data = json.loads(path.read_text())
        data["rows"] = tuple(Found(**row) for row in data["rows"])
        data["outcomes"] = tuple(
            Outcome(one["claim"], one["where"], tuple(Step(**step) for step in one["steps"]))
            for one in data["outcomes"]
        )
        return Record(**data)


class RowFolder:
    """Rows of one subject that were measured, kept so that a run that was stopped goes on.

    A row is known by what was done, by what the subject says of itself, and by the code that did it.
    """

    def __init__(self, path: Path, about: str, code: str) -> None:
        self._path, self._known_by = path, [about, code]
        path.mkdir(parents=True, exist_ok=True)

    def read(self, row: Row) -> tuple[Found, dict[str, Tensor]] | None:
        """What an earlier run found; None where it did not come so far."""
        file = self._file(row)
        if not file.exists():
            return None
        data = json.loads(file.read_text())
        return Found(**data["found"]), {name: torch.tensor(values) for name, values in data["scores"].items()}

    def write(self, found: Found, scores: Mapping[str, Tensor]) -> None:
        """Keep a row, whole or not at all."""
        lists = {name: values.tolist() for name, values in scores.items()}
        file = self._file(found.row)
        scratch = file.with_suffix(".tmp")
        scratch.write_text(json.dumps({"found": asdict(found), "scores": lists}))
        scratch.replace(file)

    def _file(self, row: Row) -> Path:
        digest = hashlib.blake2b(json.dumps([*self._known_by, asdict(row)]).encode(), digest_size=6).hexdigest()
        return self._path / f"{re.sub(r'[^a-zA-Z0-9]+', '-', row.name)}-{digest}.json"


def code_digest() -> str:
    """Hash of the sources that CODE names: rows of one record are all of one such code."""
    digest = hashlib.blake2b(digest_size=8)
    found = {file for pattern in CODE for path in ROOT.glob(pattern) for file in (path, *path.rglob("*"))}
    for file in sorted(found):
        if file.suffix in (".py", ".c", ".h", ".txt") and file.is_file():
            digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def outcome(
    order: Order, rows: Mapping[str, Found], items: Mapping[str, Mapping[str, Tensor]], better: Mapping[str, str]
) -> Outcome | None:
    """What became of an order; None where one of its rows was not measured.

    Args:
        items: scores of each item by row and name of the score; the first name of `better` decides.
    """
    if not all(name in items for name in order.rows):
        return None
    score, direction = next(iter(better.items()))
    steps = []
    for less, more in zip(order.rows, order.rows[1:], strict=False):
        first, second = items[less][score].double(), items[more][score].double()
        gaps = second - first if direction == "lower" else first - second
        errors, scores = ((rows[less].error, rows[more].error), (first.mean().item(), second.mean().item()))
        deviation = gaps.std().item() / len(gaps) ** 0.5
        steps.append(Step(less, more, errors, scores, gaps.mean().item(), deviation))
    return Outcome(order.claim, order.where, tuple(steps))


def _rounded(data: Any) -> Any:
    """Six digits are plenty."""
    if isinstance(data, float):
        return float(f"{data:.6g}")
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    return [_rounded(value) for value in data] if isinstance(data, (list, tuple)) else data
