"""What `bench.budget` found, as data and as tables."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from bench.budget_rows import Claim, Found, claims

CLAIM_COLUMNS = ("claim", "score", "mosaic", "other", "gap", "+-", "saved", "foretold", "")


@dataclass(frozen=True)
class Record:
    """One model.

    Attributes:
        scores: what errors are in, by name; the first is the one that claims are about.
        machine: as `bench.machine` describes it.
    """

    subject: str
    about: str
    scores: dict[str, str]
    machine: dict[str, str | int]
    rows: tuple[Found, ...]

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> "Record":
        """The inverse of `write`."""
        data = json.loads(path.read_text())
        data["rows"] = tuple(Found(**row) for row in data["rows"])
        return Record(**data)


def rows_table(record: Record) -> Table:
    """A line for each row, uniform formats first."""
    return _table(_row_columns(record), [_row_cells(found) for found in record.rows])


def claims_table(record: Record) -> Table:
    """A line for each claim."""
    return _table(CLAIM_COLUMNS, list(_claim_lines(record)))


def rows(record: Record) -> str:
    """`rows_table` as markdown."""
    return _markdown(_row_columns(record), [_row_cells(found) for found in record.rows])


def shown_claims(record: Record) -> str:
    """`claims_table` as markdown."""
    return _markdown(CLAIM_COLUMNS, list(_claim_lines(record)))


def about(record: Record) -> str:
    """What was measured, and where."""
    machine = record.machine
    return f"{record.about} {_scores(record)} Python {machine['python']}, torch {machine['torch']}, {machine['cpu']}."


PAGE = {"about": about, "rows": rows, "claims": shown_claims}
"""Blocks of docs/budget.md: `<!-- figures: budget_gpt_rows -->` is `rows` of the record of the GPT."""


def _row_cells(found: Found) -> list[str]:
    total = sum(found.formats.values())
    shares = ", ".join(f"{name} {count / total:.0%}" for name, count in found.formats.items())
    errors = [
        f"{found.mean(score):.6f} ({', '.join(f'{draw:.6f}' for draw in found.scores[score])})"
        for score in found.scores
    ]
    return [f"{found.bits:g}", found.name, f"{found.stored:.3f}", *errors, shares]


def _row_columns(record: Record) -> list[str]:
    return ["bits", "tiles", "stored bits", *(f"{name} (by draw)" for name in record.scores), "formats"]


def _claim_lines(record: Record) -> Iterator[list[str]]:
    for score in record.scores:
        yield from (_claim_cells(score, claim) for claim in claims(record.rows, score))


def _claim_cells(score: str, claim: Claim) -> list[str]:
    figures = [f"{value:.6f}" for value in (claim.mosaic, claim.other, claim.gap, claim.noise)]
    figures += [f"{claim.gap / claim.other:.1%}" if claim.other > 0 else ""]
    figures += ["" if math.isnan(claim.foretold) else f"{claim.foretold:.1%}"]
    return [claim.what, score, *figures, "holds" if claim.holds else "**fails**"]


def _scores(record: Record) -> str:
    return " ".join(f"{name}: {what}." for name, what in record.scores.items())


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for line in lines:
        table.add_row(*line)
    return table


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *lines))
