"""Budgets over the layers of a rule: what they get together is what was asked, and uneven where layers differ."""

import copy
from typing import Any

import pytest
import torch

import stoicc
from stoicc import Recipe, Rule
from stoicc.model.budget import LayerBudget
from tests.models import Transformer, kernels_of, record_of, token_batches


@pytest.fixture
def model():
    made: Any = Transformer()
    with torch.no_grad():
        made.blocks[0].up.weight[:, :3] *= 30  # outliers
    return made


def option_of(kernel, name, step=0):
    text = record_of(kernel).steps[step]
    return float(text.partition(f"{name}=")[2].partition(",")[0].rstrip(")"))


def test_sparsity_is_spread_by_outliers(model):
    dense, batches = copy.deepcopy(model), token_batches()
    rule = {"layers": "blocks.*", "steps": ["wanda"], "budget": {"sparsity": 0.6, "spread": 0.15}}
    kernels = kernels_of(stoicc.compress(model, {"rules": [rule]}, batches))
    seen = stoicc.ops.collect(dense, batches, list(kernels))
    weights = {name: dense.get_submodule(name).weight for name in kernels}
    ratios = {name: stoicc.ops.budgets.outlier_ratio(weights[name], seen[name]) for name in kernels}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    expected = stoicc.ops.budgets.sparsity_budget(ratios, sizes, 0.6, 0.15)
    shares = {name: option_of(kernel, "sparsity") for name, kernel in kernels.items()}
    assert shares == pytest.approx(expected, abs=1e-5)
    assert min(shares, key=lambda name: shares[name]) == "blocks.0.up"
    assert max(shares.values()) - min(shares.values()) == pytest.approx(0.3, abs=1e-5)
    zeros = sum((kernel.to_dense() == 0).sum().item() for kernel in kernels.values())
    assert zeros / sum(sizes.values()) == pytest.approx(0.6, abs=0.02)


def test_bits_are_spread_by_sensitivity_and_only_where_steps_leave_them_open(model):
    rules = [
        {
            "layers": "blocks.*",
            "steps": [{"nm_magnitude": {"n": 2, "m": 4}}, {"group_absmax": {"group_size": 32}}],
            "budget": {"bits": 5, "widths": [2, 4, 8]},
        },
        {"layers": "head", "steps": [{"group_absmax": {"bits": 8}}]},
    ]
    kernels = kernels_of(stoicc.compress(model, {"rules": rules}, token_batches()))
    bits = {name: option_of(kernel, "bits", -1) for name, kernel in kernels.items()}
    assert bits.pop("head") == 8
    assert set(bits.values()) <= {2, 4, 8}
    assert len(set(bits.values())) > 1
    total = sum(kernel.program.shape[0] * kernel.program.shape[1] for name, kernel in kernels.items() if name in bits)
    used = sum(bits[name] * kernels[name].program.shape[0] * kernels[name].program.shape[1] for name in bits)
    assert 4.5 * total <= used <= 5 * total


def test_both_at_once_survive_a_stop(model, tmp_path):
    rule = {"layers": "*.up", "steps": ["wanda", "group_absmax"], "budget": {"sparsity": 0.5, "bits": 5}}
    batches = token_batches()
    first, second = (
        stoicc.compress(model, {"rules": [rule]}, batches, resume=tmp_path, in_place=False) for _ in range(2)
    )
    assert str(stoicc.report(first)) == str(stoicc.report(second))
    assert option_of(kernels_of(first)["blocks.0.up"], "sparsity") < 0.5


def test_a_budget_reads_back_as_it_was():
    recipe = Recipe([Rule("*", ["wanda"], budget=LayerBudget(sparsity=0.5, spread=0.1))])
    assert Recipe.parse(str(recipe)) == recipe
    recipe = Recipe([Rule("*", ["group_absmax"], budget={"bits": 3.5, "widths": [2, 4]})])
    assert Recipe.parse(str(recipe)) == recipe
    assert recipe.rules[0].budget == LayerBudget(bits=3.5, widths=(2, 4))


BROKEN = [
    ({"budget": {}}, "recipe, rule 1, budget: expected sparsity, bits or bytes_per_weight, found none; give one"),
    ({"budget": 0.5}, "budget: expected sparsity, bits, spread, times, widths, bytes_per_weight, found 0.5"),
    (
        {"budget": {"bytes": 3}},
        "budget: expected sparsity, bits, spread, times, widths, bytes_per_weight, found {'bytes': 3}",
    ),
    ({"budget": {"sparsity": "half"}}, "budget: expected a number for sparsity, found 'half'"),
    ({"budget": {"bits": 4, "widths": 4}}, "budget: expected widths as a list of bits, found 4"),
    ({"budget": {"bits": 4}}, r"expected a step that takes bits and leaves it open, found none in wanda\(\)"),
    (
        {"steps": [{"wanda": {"n": 2, "m": 4}}]},
        r"expected a step that takes sparsity and leaves it open, found none in wanda\(n=2, m=4\); take sparsity",
    ),
    ({"steps": []}, "expected a step that takes sparsity and leaves it open, found none in no steps"),
    ({"budget": {"sparsity": 1.5}}, "budgets.sparsity_budget: expected sparsity from 0 to 1"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=range(len(BROKEN)))
def test_a_budget_that_cannot_be_is_one_sentence(model, change, message):
    rule = {"layers": "*", "steps": ["wanda"], "budget": {"sparsity": 0.5}, **change}
    with pytest.raises(stoicc.InputError, match=message):
        stoicc.compress(model, {"rules": [rule]}, token_batches())
    assert not kernels_of(model)


def test_a_budget_needs_calibration_that_reaches_its_layers(model):
    rule = {"layers": "*", "steps": ["wanda"], "budget": {"sparsity": 0.5}}
    with pytest.raises(stoicc.InputError, match="budget: expected calibration batches to measure layers with"):
        stoicc.compress(model, {"rules": [rule]})
    model.unused = torch.nn.Linear(64, 64)
    with pytest.raises(stoicc.InputError, match="calibration of layer unused: expected at least one sample"):
        stoicc.compress(model, {"rules": [rule]}, token_batches())
    assert not kernels_of(model)
