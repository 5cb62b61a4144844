"""Checks that run side by side: in order, one that fails or dies spoils no other."""

import os
import time
from functools import partial

import pytest

from bench.gpu_processes import outcomes


def double(number: int) -> int:
    return 2 * number


def refuse(number: int) -> int:
    raise ValueError(f"found {number}")


def die(number: int) -> int:
    os._exit(number)


@pytest.mark.parametrize("jobs", [1, 2])
def test_outcomes_come_in_order(jobs: int) -> None:
    cases = {"a": partial(double, 1), "b": partial(refuse, 2), "c": partial(double, 3)}
    found = dict(outcomes(cases, jobs, time.monotonic() + 60))
    assert list(found) == ["a", "b", "c"]
    assert (found["a"], found["c"]) == (2, 6)
    assert isinstance(found["b"], ValueError)
    assert str(found["b"]) == "found 2"


@pytest.mark.parametrize("jobs", [1, 2])
def test_cases_past_the_deadline_are_not_begun(jobs: int) -> None:
    cases = {str(n): partial(double, n) for n in range(8)}
    found = dict(outcomes(cases, jobs, time.monotonic() - 1))
    assert set(found) == set(cases)
    assert found["7"] is None


def test_a_process_that_dies_takes_no_other_with_it() -> None:
    cases = {"dies": partial(die, 3), "lives": partial(double, 4)}
    found = dict(outcomes(cases, 2, time.monotonic() + 60))
    assert isinstance(found["dies"], Exception)
    assert found["lives"] == 8
