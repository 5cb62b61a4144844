"""Bytes over the layers of a model: kept in sum, more of them where the model's output feels it more."""

import copy
from typing import Any

import pytest
import torch

import stoicc
from stoicc.model.budget import LayerBudget
from tests.models import Transformer, kernels_of, record_of, token_batches

RULE = {
    "layers": "blocks.*",
    "steps": [{"budget_mosaic": {"sort_inputs": False}}],
    "budget": {"bytes_per_weight": 0.8},
    "compile": {"target": "reference"},
}


def share_of(kernel):
    return float(record_of(kernel).steps[0].partition("bytes_per_weight=")[2].partition(",")[0].rstrip(")"))


def test_bytes_are_kept_in_sum_and_uneven(rng):
    model = Transformer()
    before, batches = copy.deepcopy(model.state_dict()), token_batches()
    kernels = kernels_of(stoicc.compress(model, {"rules": [RULE]}, batches, in_place=False))
    weights = sum(kernel.program.shape[0] * kernel.program.shape[1] for kernel in kernels.values())
    stored = sum(kernel.stats().payload_bytes for kernel in kernels.values())
    assert 0.75 < stored / weights <= 0.8 + 1e-9
    assert len({round(share_of(kernel), 3) for kernel in kernels.values()}) > 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_that_the_output_feels_gets_more(rng):
    shares = []
    for factor in (0.03, 30.0):
        model: Any = Transformer()
        with torch.no_grad():
            model.blocks[1].down.weight *= factor  # what it adds to the stream
        kernels = kernels_of(stoicc.compress(model, {"rules": [RULE]}, token_batches()))
        shares.append(share_of(kernels["blocks.1.down"]))
    assert shares[0] < 0.8 < shares[1]


def test_a_function_without_output_spreads_by_the_layers_own(rng):
    model = Transformer()
    batches = token_batches()

    def forward(given):
        for batch in batches:
            given(batch)

    kernels = kernels_of(stoicc.compress(model, {"rules": [RULE]}, forward))
    assert len({round(share_of(kernel), 3) for kernel in kernels.values()}) > 1


def test_a_budget_of_bytes_reads_back_and_needs_a_step(rng):
    budget = LayerBudget(bytes_per_weight=0.5)
    assert LayerBudget.of(budget.data) == budget
    with pytest.raises(stoicc.InputError, match="expected a step that takes bytes_per_weight and leaves it open"):
        stoicc.Rule("*", ["wanda"], budget={"bytes_per_weight": 0.5})
    with pytest.raises(stoicc.InputError, match="expected sparsity, bits or bytes_per_weight, found none"):
        LayerBudget()
    rule = {**RULE, "steps": ["magnitude", "budget_mosaic"]}
    with pytest.raises(
        stoicc.InputError, match="expected the first step to leave bytes_per_weight open, found magnitude"
    ):
        stoicc.compress(Transformer(), {"rules": [rule]}, token_batches())
    low = {**RULE, "steps": [{"budget_mosaic": {"formats": ["int3", "int4"]}}], "budget": {"bytes_per_weight": 0.1}}
    with pytest.raises(stoicc.InputError, match=r"expected at least .* bytes per weight, .* found 0\.1"):
        stoicc.compress(Transformer(), {"rules": [low]}, token_batches())
