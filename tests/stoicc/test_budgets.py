"""Layer budgets: OWL's sparsities, and bits by a Hessian sensitivity, against exhaustive and numerical optima."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

import stoicc
from stoicc.ops.budgets import bit_budget, bit_sensitivity, codes_lose, exact_bits, outlier_ratio, sparsity_budget
from stoicc.ops.statistics import Statistics

sizes_of = st.integers(1, 5).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(1, 400), min_size=count, max_size=count),
        st.lists(st.floats(0, 1e3), min_size=count, max_size=count),
    )
)


def named(values):
    return {f"layer{index}": value for index, value in enumerate(values)}


def test_outlier_ratio_counts_what_is_far_above_the_mean():
    weight, x = torch.ones(10, 20), torch.ones(7, 20)
    weight[3, 4], weight[2, 2], x[:, 19] = 60.0, 6.0, 30.0  # the mean is about 2.7: over 5 times, 11 of 200
    assert outlier_ratio(weight, Statistics.of(x)) == 11 / 200
    assert outlier_ratio(weight, Statistics.of(x), times=12) == 1 / 200
    assert outlier_ratio(weight, Statistics.of(x), times=1) == 12 / 200


def test_outliers_of_a_block_are_above_its_mean():
    """A layer of large weights has no outliers by itself; beside small ones, all that it has."""
    large, small, x = torch.full((10, 20), 60.0), torch.ones(30, 20), torch.ones(7, 20)
    seen = Statistics.of(x)
    assert outlier_ratio(large, seen) == outlier_ratio(small, seen) == 0
    assert outlier_ratio([large, small], [seen, seen], times=3) == 200 / 800  # the mean is 15.75
    assert outlier_ratio([large, small], [seen, seen], times=4) == 0


@given(sizes_of, st.floats(0, 1), st.floats(0, 0.5))
def test_sparsities_keep_the_total_and_the_order(case, sparsity, spread):
    sizes, ratios = named(case[0]), named(case[1])
    found = sparsity_budget(ratios, sizes, sparsity, spread)
    total = sum(sizes.values())
    assert sum(found[name] * size for name, size in sizes.items()) / total == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= share <= 1 for share in found.values())
    assert max(found.values()) - min(found.values()) <= 2 * spread + 1e-9
    ordered = sorted(ratios, key=lambda name: ratios[name])
    assert all(found[a] >= found[b] - 1e-9 for a, b in itertools.pairwise(ordered))


def test_sparsities_of_owl():
    found = sparsity_budget({"a": 0.01, "b": 0.03, "c": 0.02}, {"a": 10, "b": 10, "c": 10}, 0.7)
    assert found == pytest.approx({"a": 0.78, "b": 0.62, "c": 0.7})
    assert sparsity_budget({"a": 0.2, "b": 0.2}, {"a": 10, "b": 30}, 0.5) == {"a": 0.5, "b": 0.5}


def test_layers_with_outliers_keep_more():
    x = torch.randn(400, 64)
    heavy, light = torch.randn(64, 64) ** 5, torch.randn(64, 64)
    statistics = Statistics.of(x)
    ratios = {"heavy": outlier_ratio(heavy, statistics), "light": outlier_ratio(light, statistics)}
    assert ratios["heavy"] > 10 * ratios["light"]
    found = sparsity_budget(ratios, {"heavy": 4096, "light": 4096}, 0.7)
    assert found["heavy"] == pytest.approx(0.62)


@pytest.mark.parametrize("group_size", [0, 16, 48])
@pytest.mark.parametrize("bits", [6, 8])
def test_sensitivity_predicts_the_error_of_rounding(group_size, bits):
    weight, x = torch.randn(64, 100), torch.randn(500, 100) * torch.rand(100)
    statistics = Statistics.of(x, dtype=torch.float64)
    rounded = stoicc.ops.group_absmax(weight, bits, group_size).dense()
    error, output = ((x @ matrix.T).double().square().sum().item() for matrix in (rounded - weight, weight))
    predicted = bit_sensitivity(weight, statistics, group_size) * 4.0**-bits
    assert error / output == pytest.approx(predicted, rel=0.1)
    absolute = bit_sensitivity(weight, statistics, group_size, relative=False) * 4.0**-bits
    assert absolute * 500 / output == pytest.approx(predicted, rel=1e-3)


def test_sensitivity_without_a_gram_matrix_takes_its_diagonal():
    weight, x = torch.randn(8, 16), torch.randn(90, 16) + 3
    diagonal = bit_sensitivity(weight, Statistics.of(x, gram=False))
    ratio = (x @ weight.T).square().sum() / (x.square() @ weight.square().T).sum()
    assert diagonal == pytest.approx(bit_sensitivity(weight, Statistics.of(x)) * ratio.item(), rel=1e-4)
    assert bit_sensitivity(torch.zeros(8, 16), Statistics.of(x)) == 0


@given(sizes_of, st.floats(2, 8))
def test_exact_bits_are_the_numerical_optimum(case, bits):
    sizes, values = named(case[0]), named([value + 1e-3 for value in case[1]])
    found = exact_bits(values, sizes, bits)
    weights = np.array(list(sizes.values()), dtype=float)
    costs = np.array(list(values.values()))

    def error(b):
        return float((costs * 4.0**-b).sum())

    mine = np.array(list(found.values()))
    assert (weights * mine).sum() == pytest.approx(bits * weights.sum(), rel=1e-9)
    assert mine.min() >= 2 - 1e-9
    assert mine.max() <= 8 + 1e-9
    other = scipy.optimize.minimize(
        error,
        np.full(len(costs), bits),
        bounds=[(2, 8)] * len(costs),
        constraints={"type": "eq", "fun": lambda b: (weights * b).sum() - bits * weights.sum()},
        method="SLSQP",
    )
    assert error(mine) <= other.fun * (1 + 1e-4) + 1e-9


def test_every_weight_loses_equally_much():
    sizes, values = {"a": 100, "b": 400, "c": 50}, {"a": 3.0, "b": 5.0, "c": 1.0}
    losses = [values[name] * 4.0**-bits / sizes[name] for name, bits in exact_bits(values, sizes, 4).items()]
    assert losses == pytest.approx([losses[0]] * 3)


@given(sizes_of, st.floats(2, 8))
def test_whole_bits_are_near_the_best_of_all(case, bits):
    sizes, values = named(case[0]), named(case[1])
    found = bit_budget(values, sizes, bits)
    budget = bits * sum(sizes.values())

    def cost(choice):
        return sum(b * size for b, size in zip(choice, sizes.values(), strict=True))

    def error(choice):
        return sum(value * codes_lose(b) for b, value in zip(choice, values.values(), strict=True))

    choices = [choice for choice in itertools.product((2, 3, 4, 8), repeat=len(sizes)) if cost(choice) <= budget]
    chosen = tuple(found.values())
    assert cost(chosen) <= budget
    best = min(map(error, choices))
    steps = [value * (codes_lose(a) - codes_lose(b)) for value in values.values() for a, b in ((2, 3), (3, 4), (4, 8))]
    assert best <= error(chosen) <= best + max(steps) + 1e-12
    same_size = [error(choice) for choice in choices if cost(choice) == cost(chosen)]
    assert error(chosen) <= min(same_size) + max(steps)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_codes_lose_what_their_steps_say(bits):
    weight, x = torch.rand(64, 512) * 2 - 1, torch.randn(512, 512)  # even over the range: as the law assumes
    rounded = stoicc.ops.group_absmax(weight, bits, 0).dense()
    lost = ((x @ (weight - rounded).T).square().sum() / 512).item()
    statistics = Statistics.of(x, gram=False)
    predicted = bit_sensitivity(weight, statistics, relative=False) * codes_lose(bits)
    assert lost == pytest.approx(predicted, rel=0.05)


def test_whole_bits_go_where_they_count():
    sizes = dict.fromkeys("abcd", 1000)
    assert bit_budget({"a": 1.0, "b": 1.0, "c": 1.0, "d": 300.0}, sizes, 5) == {"a": 4, "b": 4, "c": 4, "d": 8}
    assert bit_budget({"a": 1.0, "b": 1.0, "c": 0.01, "d": 0.01}, sizes, 3) == {"a": 4, "b": 4, "c": 2, "d": 2}
    assert bit_budget(dict.fromkeys("ab", 1.0), dict.fromkeys("ab", 9), 4.5, widths=(4,) * 2 + (8,)) == {"a": 4, "b": 4}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: outlier_ratio(torch.ones(2, 2), Statistics.of(torch.ones(1, 2)), 0), r"expected times > 0, found 0"),
        (
            lambda: outlier_ratio([torch.ones(2, 2)], []),
            r"budgets.outlier_ratio: expected statistics for each layer, found 0 for 1 weights",
        ),
        (
            lambda: outlier_ratio(torch.ones(2, 2), Statistics.of(torch.ones(1, 3))),
            r"budgets.outlier_ratio: expected statistics of the weight's 2 input channels, found 3",
        ),
        (lambda: sparsity_budget({}, {}, 0.5), r"budgets.sparsity_budget: expected at least one layer, found none"),
        (lambda: sparsity_budget({"a": 1}, {"a": 1}, 1.5), r"expected sparsity from 0 to 1, spread from 0 to 0.5"),
        (lambda: sparsity_budget({"a": 1}, {"b": 1}, 0.5), r"ratios and sizes of the same layers, found a in one of"),
        (lambda: sparsity_budget({"a": math.nan}, {"a": 1}, 0.5), r"expected ratios >= 0 and sizes >= 1, found nan"),
        (
            lambda: bit_budget({"a": 1.0}, {"a": 1}, 1.5),
            r"budgets.bit_budget: expected bits from 2 to 8 a weight",
        ),
        (lambda: bit_budget({"a": 1.0}, {"a": 1}, 4, widths=()), r"expected at least one width, found none"),
        (lambda: exact_bits({"a": -1.0}, {"a": 1}, 4), r"expected sensitivities >= 0 and sizes >= 1, found -1.0 and 1"),
        (
            lambda: bit_sensitivity(torch.ones(2, 2), Statistics.of(torch.ones(1, 2)), -1),
            r"budgets.bit_sensitivity: expected group_size >= 0, found -1",
        ),
    ],
)
def test_misuse_is_one_clear_sentence(call, message):
    with pytest.raises(stoicc.InputError, match=message):
        call()
