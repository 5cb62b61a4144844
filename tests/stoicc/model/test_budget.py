"""Budgets over the layers of a rule: what they get together is what was asked, and uneven where layers differ."""

import copy
from typing import Any

import pytest
import torch

import stoicc
from stoicc import Recipe, Rule
from stoicc.model.budget import LayerBudget, blocks_of, output_change
from stoicc.model.calibration import Calibration
from stoicc.model.layers import find_layers
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


@pytest.mark.parametrize("per", ["block", "layer"])
def test_sparsity_is_spread_by_outliers(model, per):
    dense, batches = copy.deepcopy(model), token_batches()
    rule = {"layers": "blocks.*", "steps": ["wanda"], "budget": {"sparsity": 0.6, "spread": 0.15, "per": per}}
    kernels = kernels_of(stoicc.compress(model, {"rules": [rule]}, batches))
    seen = stoicc.ops.collect(dense, batches, list(kernels))
    weights = {name: dense.get_submodule(name).weight for name in kernels}
    ratios: dict[str, float] = {}
    for block in range(2) if per == "block" else kernels:
        names = [name for name in kernels if name == block or name.startswith(f"blocks.{block}.")]
        found = stoicc.ops.budgets.outlier_ratio([weights[name] for name in names], [seen[name] for name in names])
        ratios |= dict.fromkeys(names, found)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    expected = stoicc.ops.budgets.sparsity_budget(ratios, sizes, 0.6, 0.15)
    shares = {name: option_of(kernel, "sparsity") for name, kernel in kernels.items()}
    assert shares == pytest.approx(expected, abs=1e-5)
    assert shares["blocks.0.up"] == min(shares.values())
    assert (shares["blocks.0.q"] == shares["blocks.0.up"]) == (per == "block")
    assert max(shares.values()) - min(shares.values()) == pytest.approx(0.3, abs=1e-5)
    zeros = sum((kernel.to_dense() == 0).sum().item() for kernel in kernels.values())
    assert zeros / sum(sizes.values()) == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("per", ["block", "layer"])
def test_sparsity_is_spread_by_what_the_output_loses(model, per):
    """The second block adds next to nothing to the stream, so it is the one to go."""
    with torch.no_grad():
        for part in (model.blocks[1].out, model.blocks[1].down):
            part.weight *= 1e-3
    before, batches = copy.deepcopy(model.state_dict()), token_batches()
    rule = {"layers": "blocks.*", "steps": ["wanda"], "budget": {"sparsity": 0.6, "per": per, "by": "output"}}
    layers = find_layers(model, Recipe.of({"rules": [rule]}))
    groups = blocks_of(layers) if per == "block" else [[layer] for layer in layers]
    assert len(groups) == (2 if per == "block" else 12)
    statistics = stoicc.ops.collect(model, batches, [layer.name for layer in layers], gram=False)
    change = dict(
        zip(
            (group[0].name for group in groups),
            output_change(model, groups, statistics, Calibration(batches), 0.6),
            strict=True,
        )
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    dense = copy.deepcopy(model)
    own = groups[0]
    for layer in own:
        weight = stoicc.ops.wanda(layer.weight, statistics[layer.name], 0.6).dense()
        dense.get_submodule(layer.name).weight.data = weight
    lost = sum((dense(ids) - model(ids)).square().sum().item() for ids in batches)
    assert change[own[0].name] == pytest.approx(lost / sum(layer.weight.numel() for layer in own), rel=1e-4)
    kernels = kernels_of(stoicc.compress(model, {"rules": [rule]}, batches))
    shares = {name: option_of(kernel, "sparsity") for name, kernel in kernels.items()}
    assert len(set(shares.values())) == len(groups)
    ordered = sorted(change, key=lambda name: -change[name])
    assert [shares[name] for name in ordered] == sorted(shares[name] for name in ordered)
    assert shares["blocks.0.up"] < shares["blocks.1.down"]


def test_an_output_without_floats_is_one_sentence(model):
    rule = {"layers": "blocks.*", "steps": ["wanda"], "budget": {"sparsity": 0.6, "by": "output"}}
    with pytest.raises(stoicc.InputError, match=r"budget: expected a model that returns floats to weigh layers by its"):
        stoicc.compress(model, {"rules": [rule]}, lambda m: [None for ids in token_batches() if m(ids) is None])


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
    ({"budget": {"sparsity": 0.5, "per": "head"}}, "budget: expected per to be block or layer, found 'head'"),
    ({"budget": {"sparsity": 0.5, "by": "loss"}}, "budget: expected by to be outliers or output, found 'loss'"),
    ({"budget": 0.5}, "budget: expected sparsity, bits, spread, times, widths, bytes_per_weight, per, by, found 0.5"),
    (
        {"budget": {"bytes": 3}},
        "budget: expected sparsity, bits, spread, times, widths, bytes_per_weight, per, by, found {'bytes': 3}",
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
