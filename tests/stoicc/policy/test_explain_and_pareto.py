"""What a tile would have cost in other formats, and the curve of all budgets."""

import sys
from typing import Any

import pytest
import torch

import stoicc
from stoicc import Budget
from stoicc.ops import Statistics
from stoicc.policy.choose import Task
from tests.models import Transformer, token_batches


@pytest.fixture(autouse=True)
def _built_in_constants(monkeypatch):
    monkeypatch.setenv("STOICC_CALIBRATION", "off")


@pytest.fixture
def layer(rng):
    x = torch.randn(1500, 256) @ torch.randn(256, 256) * torch.randn(256).exp()
    return (torch.randn(128, 256) * torch.randn(128, 1).exp()).bfloat16(), Statistics.of(x)


def test_a_tile_is_explained_by_what_the_budget_weighed(layer):
    weight, statistics = layer
    kernel: Any = stoicc.compile(weight, policy=Budget(bytes_per_weight=0.5), statistics=statistics, target="reference")
    for row, column in ((0, 0), (1, 3)):
        found = kernel.explain(row, column)
        number = row * 4 + column
        assert found.format == str(kernel.choice.table.formats[kernel.choice.choice[number]])
        assert [cost.bytes for cost in found.costs] == kernel.choice.table.bytes[number].tolist()
        squares = [cost.error**2 * kernel.choice.energy for cost in found.costs]
        assert squares == pytest.approx(kernel.choice.table.errors[number].tolist())
        assert f"* {found.format} " in str(found)
    whole = sum(
        next(cost.error for cost in kernel.explain(i, j).costs if cost.format == kernel.explain(i, j).format) ** 2
        for i in range(2)
        for j in range(4)
    )
    assert whole**0.5 == pytest.approx(kernel.choice.predicted_error)
    by_name = {cost.format: cost.time_us for cost in found.costs}
    assert 0 == by_name["empty"] < by_name["int4"] < by_name["dense"]
    assert dict.fromkeys(kernel.explain(0, 0, batch=64).costs) != dict.fromkeys(found.costs)


def test_a_kernel_without_a_budget_explains_itself_too(layer):
    kernel = stoicc.compile(layer[0], target="reference")
    found = kernel.explain(1, 2)
    assert found.format == "dense"
    costs = {cost.format: cost for cost in found.costs}
    assert costs["dense"].error == 0 < costs["int8"].error < costs["int4"].error < costs["empty"].error
    tile = kernel.to_dense()[64:, 128:192].double()
    assert costs["empty"].error == pytest.approx((tile.norm() / kernel.to_dense().double().norm()).item(), rel=1e-5)
    with pytest.raises(stoicc.InputError, match="explain: expected a tile row from 0 to 1, found 2"):
        kernel.explain(2, 0)
    with pytest.raises(stoicc.InputError, match="explain: expected a tile column from 0 to 3, found -1"):
        kernel.explain(0, -1)


def test_what_was_left_out_is_explained(layer):
    weight, statistics = layer
    policy = Budget(bytes_per_weight=0.5)
    kernel = stoicc.compile(weight, tile=(32, 32), policy=policy, statistics=statistics, target="reference")
    found = kernel.explain(0, 0)
    assert "shares planes between tiles" in dict(found.refused)["int4"]
    assert "  int4                         refused: shares planes between tiles" in str(found)
    assert "int4" not in [cost.format for cost in found.costs]
    task = Task.of(weight, statistics, policy, None, lambda fmt, tile, dtype: str(fmt) != "nv24")
    assert dict(task.refused) == {"nv24": "no code for this target at this tile"}
    assert "refused" in str(stoicc.compile(weight, tile=(32, 32), target="reference").explain(0, 0))


def test_the_curve_is_what_budgets_give(layer):
    weight, statistics = layer
    curve = stoicc.pareto(weight, statistics, points=12)
    costs = [point.bytes_per_weight for point in curve.points]
    errors = [point.error for point in curve.points]
    assert 6 < len(curve.points) <= 12
    assert costs == sorted(costs)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    for point in curve.points[3:6]:
        policy = Budget(bytes_per_weight=point.bytes_per_weight, sort_inputs=True)
        kernel: Any = stoicc.compile(weight, policy=policy, statistics=statistics, target="reference")
        assert kernel.choice.predicted_error <= point.error * (1 + 1e-6)
    int4 = next(point for point in curve.uniform if point.formats[0][0] == "int4")
    near = min(curve.points, key=lambda point: abs(point.bytes_per_weight - int4.bytes_per_weight))
    assert near.error < int4.error or near.bytes_per_weight < int4.bytes_per_weight


def test_a_curve_prints_and_is_drawn(layer, tmp_path):
    curve = stoicc.pareto(*layer, axis="time", batch=4, points=4)
    assert all(point.time_us and point.time_us > 0 for point in curve.points)
    assert "error against time" in str(curve)
    assert "all int4" in str(curve)
    pytest.importorskip("matplotlib")
    axes = curve.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert axes.get_xlabel() == "predicted microseconds"


def test_without_matplotlib_the_way_out_is_said(layer, monkeypatch):
    curve = stoicc.pareto(*layer, points=3)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(stoicc.InputError, match="expected matplotlib to plot with, found none; pip install"):
        curve.plot()


def test_a_model_has_a_curve(rng):
    model, batches = Transformer(), token_batches()
    curve = stoicc.pareto(model, batches, points=5, layers="blocks.*")
    assert "Transformer" in str(curve)
    assert curve.points[0].error > 10 * curve.points[2].error > 0
    with pytest.raises(stoicc.InputError, match="expected calibration batches with a model, found none"):
        stoicc.pareto(model)


def test_a_models_time_is_that_of_its_layers_in_sum(rng):
    model, batches = Transformer(), token_batches()
    curve = stoicc.pareto(model, batches, points=5, layers="blocks.*", axis="time", batch=4)
    times = [point.time_us or 0 for point in curve.points]
    assert times == sorted(times)
    assert times[0] < times[-1]
    assert "error against time" in str(curve)
    layers = [each for name, each in model.named_modules() if name.startswith("blocks.")]
    weights = [each.weight for each in layers if isinstance(each, torch.nn.Linear)]
    alone = [stoicc.pareto(weight, points=2, axis="time", batch=4).uniform for weight in weights]
    for place, fmt in ((0, "empty"), (-1, "dense")):
        assert curve.uniform[place].formats[0][0] == fmt
        assert curve.uniform[place].time_us == pytest.approx(sum(points[place].time_us or 0 for points in alone))


def test_what_is_no_curve_is_refused(layer):
    weight, statistics = layer
    with pytest.raises(stoicc.InputError, match="pareto: expected axis bytes or time, found 'energy'"):
        stoicc.pareto(weight, statistics, axis="energy")
    with pytest.raises(stoicc.InputError, match="pareto: expected at least 2 points, found 1"):
        stoicc.pareto(weight, statistics, points=1)
    with pytest.raises(stoicc.InputError, match="expected Statistics with a weight, found list"):
        stoicc.pareto(weight, [torch.ones(1)])


def test_a_table_is_of_the_weight_and_no_more(layer):
    weight, statistics = layer
    table, _ = Task.of(weight, statistics, Budget(bytes_per_weight=1), None).table()
    assert table.errors.shape == (8, 8)
    assert (table.errors >= 0).all()
    assert table.errors[:, -1].max() == 0  # dense
