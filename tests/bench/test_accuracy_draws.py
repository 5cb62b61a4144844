import json

import pytest

from bench import accuracy_draws
from bench.accuracy_rows import all_rows


def test_pairs_are_rows_of_the_table():
    names = {row.name for row in all_rows()}
    assert {name for pair in accuracy_draws.PAIRS for name in pair} <= names


def test_a_gap_is_of_draws_in_pairs():
    found = {"a": [0.1, 0.2, 0.4], "b": [0.2, 0.4, 0.4]}
    better, other, draws, gap, error = accuracy_draws.cells("a", "b", found)
    assert (better, other, draws) == ("a", "b", "0.1000 / 0.2000, 0.2000 / 0.4000, 0.4000 / 0.4000")
    assert float(gap) == pytest.approx(0.1)
    assert float(error) == pytest.approx(0.1 / 3**0.5, abs=1e-4)


def test_the_record_has_every_draw():
    data = json.loads(accuracy_draws.PATH.read_text())
    assert all(len(values) == accuracy_draws.DRAWS for values in data["scores"].values())
    assert accuracy_draws.page(data).count("\n") == 1 + len(accuracy_draws.PAIRS)
