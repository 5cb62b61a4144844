"""Times of calls beside one another."""

import itertools
from functools import partial

from bench.timing import interleaved_medians


def test_every_round_makes_every_call_once_in_an_order_of_its_own():
    made: list[str] = []
    names = ["a", "b", "c", "d"]
    found = interleaved_medians({name: partial(made.append, name) for name in names}, repeats=12)
    assert list(found) == names
    assert all(seconds >= 0 for seconds in found.values())
    rounds = [made[start : start + 4] for start in range(len(made) - 48, len(made), 4)]
    assert all(sorted(each) == names for each in rounds)
    before = {(first, then) for each in rounds for first, then in itertools.pairwise(each)}
    assert len(before) == 12  # of each other one, at some time
