"""What `bench.budget` found, as data and as tables."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from bench.budget_rows import Claim, Found, claims

ROW_COLUMNS = ("bits", "tiles", "stored bits", "error", "by draw", "formats")
CLAIM_COLUMNS = ("claim", "mosaic", "other", "gap", "+-", "")


@dataclass(frozen=True)
class Record:
    """One model.

    Attributes:
        score: what errors are in: the model's own over the dense one's.
        machine: as `bench.machine` describes it.
    """

    subject: str
    about: str
    score: str
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
    return _table(ROW_COLUMNS, [_row_cells(found) for found in record.rows])


def claims_table(record: Record) -> Table:
    """A line for each claim."""
    return _table(CLAIM_COLUMNS, [_claim_cells(claim) for claim in claims(record.rows)])


def rows(record: Record) -> str:
    """`rows_table` as markdown."""
    return _markdown(ROW_COLUMNS, [_row_cells(found) for found in record.rows])


def shown_claims(record: Record) -> str:
    """`claims_table` as markdown."""
    return _markdown(CLAIM_COLUMNS, [_claim_cells(claim) for claim in claims(record.rows)])


def about(record: Record) -> str:
    """What was measured, and where."""
    machine = record.machine
    return (
        f"{record.about} Errors are {record.score}. Python {machine['python']}, torch {machine['torch']}, "
        f"{machine['cpu']}."
    )


PAGE = {"about": about, "rows": rows, "claims": shown_claims}
"""Blocks of docs/budget.md: `<!-- figures: budget_gpt_rows -->` is `rows` of the record of the GPT."""


def _row_cells(found: Found) -> list[str]:
    total = sum(found.formats.values())
    shares = ", ".join(f"{name} {count / total:.0%}" for name, count in found.formats.items())
    draws = " ".join(f"{draw:.5f}" for draw in found.draws)
    return [f"{found.bits:g}", found.name, f"{found.stored:.3f}", f"{found.mean:.5f}", draws, shares]


def _claim_cells(claim: Claim) -> list[str]:
    figures = [f"{value:.5f}" for value in (claim.mosaic, claim.other, claim.gap, claim.noise)]
    return [claim.what, *figures, "holds" if claim.holds else "**fails**"]


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for line in lines:
        table.add_row(*line)
    return table


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *lines))
