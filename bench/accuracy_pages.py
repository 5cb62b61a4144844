"""Tables of `bench.accuracy`: for a terminal, and as markdown for docs/accuracy.md."""

from collections.abc import Callable, Sequence
from itertools import groupby

from rich import box
from rich.table import Table

from bench.accuracy_record import Found, Outcome, Record, Step

VERDICTS = {"holds": "holds", "level": "level", "reversed": "**reversed**"}


def rows_table(record: Record) -> Table:
    """A line for each row, a section for each pattern and width."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    names = _columns(record)
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < 4 else "right", no_wrap=True)
    for _, section in groupby(record.rows, lambda found: (found.pattern, bool(found.quantization))):
        for found in section:
            table.add_row(*_cells(found, record))
        table.add_section()
    return table


def orders_table(record: Record) -> Table:
    """A line for each pair of neighbours in a published order."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for index, name in enumerate(_order_columns(record)):
        table.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    for one in record.outcomes:
        for step in one.steps:
            table.add_row(*_order_cells(one, step))
        table.add_section()
    return table


def rows(record: Record) -> str:
    """`rows_table` as markdown."""
    return _markdown(_columns(record), 4, [_cells(found, record) for found in record.rows])


def published_orders(record: Record) -> str:
    """`orders_table` as markdown, under a sentence that counts."""
    steps = [step for one in record.outcomes for step in one.steps]
    held = sum(step.verdict == "holds" for step in steps)
    level = sum(step.verdict == "level" for step in steps)
    cells = [_order_cells(one, step) for one in record.outcomes for step in one.steps]
    counted = f"{held} of {len(steps)} hold, {level} are level, {len(steps) - held - level} are reversed."
    return f"{counted}\n\n{_markdown(_order_columns(record), 2, cells)}"


def about(record: Record) -> str:
    """What was measured, and where."""
    machine = record.machine
    place = f"Python {machine['python']}, torch {machine['torch']}, {machine['cpu']}"
    code = f"{machine.get('code', 'unknown')}, commit {machine['commit']}"
    return f"{record.about} {place}. All {len(record.rows)} rows are of one code ({code})."


PAGE: dict[str, Callable[[Record], str]] = {"about": about, "rows": rows, "orders": published_orders}
"""Blocks of docs/accuracy.md: `<!-- figures: accuracy_gpt_rows -->` is `rows` of the record of the GPT."""


def _columns(record: Record) -> list[str]:
    return ["zeros", "pruning", "quantization", "adapter", "B/weight", "layer error", *record.better]


def _cells(found: Found, record: Record) -> list[str]:
    pruning = found.pruning if found.sequential else f"{found.pruning}, dense inputs"
    names = [found.pattern, pruning, found.quantization, found.adapter]
    scores = [
        f"{found.scores[name]:.4f}" if "overlap" not in name else f"{found.scores[name]:.1%}" for name in record.better
    ]
    return [*names, f"{found.bytes_per_weight:.2f}", f"{found.error:.3f}", *scores]


def _order_columns(record: Record) -> list[str]:
    return ["order", "where", "layer errors", next(iter(record.better)), "gap", "+-", ""]


def _order_cells(one: Outcome, step: Step) -> list[str]:
    less, more = (_short(name, other) for name, other in ((step.less, step.more), (step.more, step.less)))
    errors = f"{step.layer_errors[0]:.3f}, {step.layer_errors[1]:.3f}"
    scores = f"{step.scores[0]:.4f}, {step.scores[1]:.4f}"
    return [f"{less} < {more}", one.where, errors, scores, f"{step.gap:.4f}", f"{step.deviation:.4f}", step.verdict]


def _short(name: str, other: str) -> str:
    """The parts of a row's name that the other lacks."""
    theirs = other.split(", ")
    return " ".join(part for part in name.split(", ") if part not in theirs) or "none"


def _markdown(columns: Sequence[str], left: int, lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *lines))
