"""What rounding a layer does on inputs that the rounding never saw."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stoicc
from stoicc import Budget
from stoicc.model.calibration import Calibration
from stoicc.model.cross_fit import HalfCollector, running_apart
from stoicc.model.layers import find_layers
from stoicc.model.mosaic_budget import Seen, layer_factor, layer_tables, model_output
from stoicc.ops import Statistics
from stoicc.policy.choose import Task, choose, mosaic_of
from tests.models import Transformer, token_batches


def layers_of(model, *patterns):
    return find_layers(model, stoicc.Recipe([stoicc.Rule(patterns)]))


def test_sequences_take_turns_over_all_calls(rng):
    calls = [torch.randn(3, 5, 8), torch.randn(1, 4, 8), torch.randn(8), torch.randn(2, 8)]
    collector = HalfCollector()
    for x in calls:
        collector.add(x)
    halves = collector.statistics()
    assert halves is not None
    sequences = [row for x in calls for row in (x if x.ndim > 1 else x[None])]
    for half, found in enumerate(halves):
        expected = Statistics.of(torch.cat([row.reshape(-1, 8) for row in sequences[half::2]]))
        assert found.samples == expected.samples
        torch.testing.assert_close(found.gram, expected.gram)


def test_a_single_sequence_has_no_halves(rng):
    collector = HalfCollector()
    collector.add(torch.randn(1, 5, 8))
    assert collector.statistics() is None


def test_each_half_runs_through_a_weight_of_its_own(rng):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4, bias=False))
    before = copy.deepcopy(model.state_dict())
    layer = layers_of(model, "0")[0]
    weights = torch.randn(6, 8), torch.randn(6, 8)
    linear = layer.modules["0"]
    with running_apart(layer, weights), torch.no_grad():
        calls = torch.randn(3, 5, 8), torch.randn(8), torch.randn(2, 8)
        found = [linear(x) for x in calls]
    for number, place in enumerate([(0, 0), (0, 1), (0, 2), (1,), (2, 0), (2, 1)]):
        x, y = calls[place[0]], found[place[0]]
        x, y = (x[place[1]], y[place[1]]) if len(place) > 1 else (x, y)
        torch.testing.assert_close(y, F.linear(x, weights[number % 2], linear.bias))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(linear(calls[1]), F.linear(calls[1], linear.weight, linear.bias))


def test_a_factor_foretells_what_another_rounding_does_on_other_inputs(rng):
    model: Any = Transformer()
    batches, unseen = token_batches(20), Calibration(token_batches(60))
    calibration = Calibration(batches)
    layers = layers_of(model, "blocks.*.out", "blocks.*.down")
    dense, other = model_output(model, calibration), model_output(model, unseen)
    assert dense is not None
    assert other is not None
    seen = stoicc.ops.collect(model, batches, [layer.name for layer in layers])
    tables = layer_tables(model, layers, calibration, {layer.name: {"bytes_per_weight": 0.5} for layer in layers})
    ratios: list[list[float]] = []
    for layer in layers:
        policy = Budget(bytes_per_weight=4.5 / 8, formats=["int4"], sort_inputs=False)
        task = Task.of(layer.weight, seen[layer.name], policy, (64, 64))
        found, order = choose(task)
        changed = copy.deepcopy(model)
        changed.get_submodule(layer.name).weight.data.copy_(mosaic_of(task, found, order).dense())
        promise = tables[layer.name].factor * found.table.error(found.choice)
        shares = []
        for inputs, before in ((calibration, dense), (unseen, other)):
            output = model_output(changed, inputs)
            assert output is not None
            shares.append(float((output - before).square().sum() / before.square().sum()))
        ratios.append([share / shares[1] for share in (shares[0], promise)])
    for within, foretold in ratios:
        assert within < 0.93  # the sweep answered for the inputs that it had
        assert 0.9 < foretold < 1.35  # halves are fewer inputs to answer for than there are


def test_runs_that_go_on_where_others_ended_find_the_same(rng):
    model: Any = Transformer(blocks=3)
    batches = token_batches()
    calibration, layers = Calibration(batches), layers_of(model, "blocks.*.up", "blocks.*.q")
    calls = {name: 0 for name in ("blocks.0", "blocks.2")}

    def count(name):
        return lambda *_: calls.update({name: calls[name] + 1})

    of = {name: model.get_submodule(name).norm.register_forward_hook(count(name)) for name in calls}
    policies = {layer.name: {"bytes_per_weight": 0.5, "tile": (64, 64)} for layer in layers}
    tables = layer_tables(model, layers, calibration, policies)
    for hook in of.values():
        hook.remove()
    survey_and_reference = 2 * len(batches)
    assert calls["blocks.0"] == survey_and_reference + (2 * 2 + 1) * len(batches)  # its own stages and probes, a copy
    assert calls["blocks.2"] == survey_and_reference + (2 + 6) * len(batches)
    reference = model_output(model, calibration)
    for layer in layers:
        collector = HalfCollector()
        inputs = stoicc.ops.collect(model, batches, [layer.name])[layer.name]
        hook = layer.modules[layer.name].register_forward_pre_hook(lambda _, args, add=collector.add: add(args[0]))
        model_output(model, calibration)
        hook.remove()
        factor = layer_factor(model, layer, calibration, Seen(inputs, collector.statistics()), reference)
        assert factor == pytest.approx(tables[layer.name].factor, rel=1e-5)
