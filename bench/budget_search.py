"""Whether a choice of formats gets better by looking at the error that its sweep really leaves.

    python -m bench.budget_search [--rounds 30]    # layers of the GPT's first and last block: about 2 minutes

A budget chooses by errors that were measured tile by tile, on weights that no sweep has moved. Here its choice for a
layer alone is swept, and two things are tried on the squared error of the output, ||X (W - W_c)^T||^2 on the inputs
that it was chosen for:

- again: tiles are measured anew on the weights as the sweep met them, and chosen anew;
- search: two tiles of a tile row exchange their formats, so that bytes stay, likeliest pairs by the table first. Rows
  do not depend on one another, so that one sweep judges a pair in every tile row, and each row keeps what is better.

Writes bench/results/budget-search.json.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import stoicc
from bench import accuracy_subjects as subjects
from stoicc import Budget
from stoicc.ops import Statistics
from stoicc.ops.mosaic import _Mosaic, lattice_of
from stoicc.policy.choose import Choice, Order, Task, choose, within_bytes
from stoicc.policy.table import measure
from stoicc.tiling import to_tiles

PATH = Path(__file__).parent / "results" / "budget-search.json"
LAYERS = ("blocks.0.*", "blocks.3.*")
BITS = (3.25, 4.25)
ROUNDS = 30
COLUMNS = ("layer", "bits", "foretold", "again", "search", "exchanges", "s to choose", "s to search")


@dataclass(frozen=True)
class Row:
    """One layer at one budget.

    Attributes:
        foretold: squared error that the table foretells, over the one that is left by the sweep of the choice.
        again, search: squared error by the other ways, over that one.
        kept, tried: exchanges in all tile rows.
        choose_s, search_s: seconds.
    """

    layer: str
    bits: float
    foretold: float
    again: float
    search: float
    kept: int
    tried: int
    choose_s: float
    search_s: float


@dataclass(frozen=True, eq=False)
class Swept:
    """A choice `[tile rows, tile columns]`, the weights that its sweep met `[M, K]`, and squared errors by tile row."""

    choice: Tensor
    met: Tensor
    errors: Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight under a budget, its columns in the order of the choice."""

    task: Task
    order: Order
    found: Choice
    values: Tensor

    @staticmethod
    def of(weight: Tensor, statistics: Statistics, bits: float) -> "Layer":
        """Choose for a weight `[M, K]`."""
        task = Task.of(weight, statistics, Budget(bytes_per_weight=bits / 8), None)
        found, order = choose(task)
        return Layer(task, order, found, weight if order.columns is None else weight[:, order.columns])

    def sweep(self, choice: Tensor) -> Swept:
        """Round to a choice of formats, and measure what is left."""
        inverse, tile = self.order.inverse(), self.task.tile
        lattices = [lattice_of("bench", fmt, tile) for fmt in self.found.table.formats]
        done = _Mosaic(inverse, lattices, choice, tile, True).run(
            self.values, torch.ones_like(self.values.T, dtype=torch.bool)
        )
        lost = self.values.double() - done.values.double()
        assert self.order.seen is not None and self.order.seen.gram is not None
        squares = ((lost @ self.order.seen.gram.double()) * lost).sum(1)
        return Swept(choice, done.met, to_tiles(squares[:, None], (tile[0], 64)).sum((1, 2)))

    def again(self, swept: Swept) -> Swept:
        """Choose from a table of the weights that a sweep met."""
        own, order = self.task, self.order
        table = measure(swept.met, own.formats, own.tile, order.seen, order.factor)
        table = replace(table, beside=self.found.table.beside)
        assert own.policy.bytes_per_weight is not None
        found = within_bytes(replace(self.found, table=table), own.policy.bytes_per_weight)
        return self.sweep(torch.from_numpy(found.choice).view(swept.choice.shape))

    def search(self, swept: Swept, rounds: int) -> tuple[Swept, int, int]:
        """Exchange formats in tile rows; what is reached, and how many exchanges were kept and tried."""
        kept = tried = 0
        pairs = [self._pairs(row, swept.choice[row]) for row in range(len(swept.choice))]
        for _ in range(rounds):
            choice = swept.choice.clone()
            moved = [
                row for row, left in enumerate(pairs) if (pair := next(left, None)) and _exchange(choice[row], pair)
            ]
            if not moved:
                break
            other = self.sweep(choice)
            better = other.errors < swept.errors
            kept, tried = kept + int(better[moved].sum()), tried + len(moved)
            for row in better.nonzero().flatten().tolist():
                pairs[row] = self._pairs(row, choice[row])
            picked = torch.where(better[:, None], choice, swept.choice)
            swept = Swept(picked, other.met, torch.minimum(other.errors, swept.errors))
        return swept, kept, tried

    def _pairs(self, row: int, choice: Tensor) -> Iterator[tuple[int, int]]:
        """Pairs of tiles of a row with different formats, those first that lose least by the table."""
        errors = torch.from_numpy(self.found.table.errors).view(*self.found.table.grid, -1)[row]
        swapped = errors[:, choice]  # of tile i in the format of tile j
        own = swapped.diagonal()
        lost = swapped + swapped.T - own[:, None] - own
        lost[choice[:, None] == choice] = torch.inf
        first, second = torch.triu_indices(len(choice), len(choice), 1)
        order = lost[first, second].argsort()
        found = [(int(first[i]), int(second[i])) for i in order if lost[first[i], second[i]] < torch.inf]
        return iter(found)


def _exchange(choice: Tensor, pair: tuple[int, int]) -> bool:
    choice[list(pair)] = choice[[pair[1], pair[0]]]
    return True


def measured(name: str, weight: Tensor, statistics: Statistics, bits: float, rounds: int) -> Row:
    """All ways for one layer."""
    start = time.perf_counter()
    layer = Layer.of(weight, statistics, bits)
    chosen_s = time.perf_counter() - start
    first = layer.sweep(torch.from_numpy(layer.found.choice).view(layer.found.table.grid))
    whole = float(first.errors.sum())
    again = layer.again(first)
    start = time.perf_counter()
    best, kept, tried = layer.search(first, rounds)
    searched_s = time.perf_counter() - start
    foretold = layer.found.table.error(layer.found.choice) / whole
    reached = float(again.errors.sum()) / whole, float(best.errors.sum()) / whole
    return Row(name, bits, foretold, *reached, kept, tried, chosen_s, searched_s)


def run(model: nn.Module, calibration: Any, patterns: tuple[str, ...], rounds: int) -> Iterator[Row]:
    """Every layer that the patterns name at every budget."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in names if any(name.startswith(each.rstrip("*")) for each in patterns)]
    seen = stoicc.ops.collect(model, calibration, chosen)
    for name in chosen:
        weight = model.get_parameter(f"{name}.weight").detach()
        for bits in BITS:
            yield measured(name, weight, seen[name], bits, rounds)


def shown(rows: list[Row]) -> Table:
    """A line for each layer and budget."""
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    ratios = [f"{ratio:.3f}" for ratio in (row.foretold, row.again, row.search)]
    times = [f"{row.choose_s:.2f}", f"{row.search_s:.1f}"]
    return [row.layer, f"{row.bits:g}", *ratios, f"{row.kept} of {row.tried}", *times]


def page(found: dict[str, Any]) -> str:
    """The table without times, as markdown."""
    rows = [_cells(Row(**row))[:6] for row in found["rows"]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS[:6], ["---"] * 6, *rows))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="exchanges that are tried in every tile row")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    subject = subjects.gpt((32, 1))
    with torch.no_grad():
        rows = list(run(subject.model, subject.calibration, LAYERS, rounds))
    Console(width=120).print(shown(rows))
    PATH.write_text(json.dumps({"rounds": rounds, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
