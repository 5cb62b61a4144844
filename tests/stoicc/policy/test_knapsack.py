"""The knapsack keeps its budget, takes hull steps best first, and is within 1% of HiGHS's optimum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from stoicc.policy.knapsack import hull_steps, solve

BITS = np.array([0.0, 2.375, 3.25, 3.25, 4.25, 8.25, 9.0, 16.0])


def optimum(errors, costs, budget):
    """HiGHS's least error."""
    tiles, formats = errors.shape
    one_each = np.kron(np.eye(tiles), np.ones(formats))
    rows = np.vstack([one_each, costs.ravel()])
    bounds = LinearConstraint(rows, [1] * tiles + [-np.inf], [1] * tiles + [budget])
    whole = np.ones(errors.size)
    return milp(errors.ravel(), constraints=bounds, integrality=whole, bounds=Bounds(0, 1)).fun


def case(seed, tiles, formats, kind):
    """Errors and costs `[T, F]`: of codes, of anything sorted, or of anything at all."""
    rng = np.random.default_rng(seed)
    if kind == "codes":
        costs = np.tile(BITS[:formats], (tiles, 1))
        errors = 4.0**-costs * np.exp(2 * rng.normal(size=(tiles, 1))) * (1 + rng.random((tiles, formats)) / 2)
    elif kind == "falling":
        costs, errors = np.sort(rng.random((tiles, formats))), -np.sort(-(rng.random((tiles, formats)) ** 3))
    else:
        costs, errors = rng.random((2, tiles, formats))
    least, most = costs.min(1).sum(), costs.max(1).sum()
    return errors, costs, least + (most - least) * rng.random()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 8), st.sampled_from(["codes", "falling", "any"]))
def test_within_a_hundredth_of_the_optimum(seed, tiles, formats, kind):
    errors, costs, budget = case(seed, tiles, formats, kind)
    choice = solve(errors, costs, budget)
    every = np.arange(tiles)
    assert costs[every, choice].sum() <= budget * (1 + 1e-6)
    assert errors[every, choice].sum() <= 1.01 * optimum(errors, costs, budget) + 1e-12


def test_steps_fall_and_end_at_the_least_error():
    errors, costs, _ = case(1, 500, 8, "codes")
    steps = hull_steps(errors, costs)
    assert (np.diff(steps.slope) <= 1e-15).all()
    every = np.arange(500)
    assert errors[every, steps.after(len(steps.cost))].sum() == pytest.approx(errors.min(1).sum())
    half = steps.after(len(steps.cost) // 2)
    multiplier = steps.slope[len(steps.cost) // 2]
    weighed = errors + multiplier * costs
    assert weighed[every, half] == pytest.approx(weighed.min(1))  # what a multiplier means


def test_formats_that_a_tile_cannot_have_are_left():
    errors = np.array([[3.0, np.inf, 0.0], [3.0, 1.0, 0.0]])
    costs = np.array([[1.0, np.inf, 4.0], [1.0, 2.0, 4.0]])
    assert solve(errors, costs, 3.0).tolist() == [0, 1]
    assert solve(errors, costs, 8.0).tolist() == [2, 2]


def test_a_budget_below_the_least_costs_is_refused():
    with pytest.raises(ValueError, match=r"2\.0"):
        solve(np.ones((2, 2)), np.array([[1.0, 2.0], [1.0, 2.0]]), 1.9)


def test_many_tiles_take_no_time_and_leave_no_step():
    errors, costs, _ = case(2, 20_000, 8, "codes")
    choice = solve(errors, costs, 4.0 * 20_000)
    assert 4.0 - 1e-4 < costs[np.arange(20_000), choice].mean() <= 4.0
