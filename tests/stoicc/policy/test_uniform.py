"""One format for all tiles is what a budget gives where a mosaic promises next to nothing more."""

import numpy as np
import pytest
import torch

import stoicc
from stoicc import Budget
from stoicc.model.mosaic_budget import layer_table, spread_bytes
from stoicc.ops import Statistics
from stoicc.policy.choose import Task
from stoicc.policy.table import TileTable
from stoicc.policy.uniform import PAYS, one_format
from stoicc.weights import as_formats

FORMATS = as_formats(("empty", "int4", "dense"))


def table_of(errors, sizes=(0.0, 4.0, 16.0), beside=0):
    errors = np.array(errors, dtype=np.float64)
    return TileTable(FORMATS, (len(errors), 1), errors, np.tile(sizes, (len(errors), 1)), 64, beside)


@pytest.mark.parametrize(
    ("found", "room", "beside", "wanted"),
    [
        (1.99, 8.0, 0, 1),  # next to nothing saved
        (PAYS * 2 - 1e-9, 8.0, 0, None),  # it pays
        (1.99, 8.2, 0, None),  # int4 leaves 2.4% of the bytes unused
        (1.99, 7.9, 0, None),  # int4 does not fit
        (1.99, 8.0, 1, None),  # nor with what stands beside
        (1.99, 9.0, 1, 1),
    ],
)
def test_one_format_where_a_mosaic_does_not_pay(found, room, beside, wanted):
    assert one_format(table_of([[9, 1, 0], [9, 1, 0]], beside=beside), found, room) == wanted


def test_errors_without_the_order_can_be_given():
    table = table_of([[9, 1, 0], [9, 1, 0]], beside=1)
    assert one_format(table, 1.99, 8.0, np.array([18.0, 2.0, 0.0])) == 1
    assert one_format(table, 1.99, 8.0, np.array([18.0, 2.2, 0.0])) is None
    assert one_format(table, 1.99, 8.0, np.array([18.0, np.inf, 0.0])) is None


@pytest.fixture
def even(rng):
    """A weight whose tiles are all alike, and inputs that are."""
    return torch.randn(192, 320).bfloat16(), Statistics.of(torch.randn(1500, 320))


def test_at_the_bytes_of_a_format_even_tiles_get_it(even):
    weight, statistics = even
    for bits, name in ((4.25, "int4"), (8.25, "int8")):
        policy = Budget(bytes_per_weight=bits / 8)
        kernel = stoicc.compile(weight, policy=policy, statistics=statistics, target="reference")
        assert [entry.format for entry in kernel.stats().formats] == [name]
    between = Budget(bytes_per_weight=5 / 8)
    assert len(stoicc.compile(weight, policy=between, statistics=statistics, target="reference").stats().formats) > 1


@pytest.mark.parametrize("forced", [True, None])
def test_layers_get_one_format_together_and_keep_their_order(rng, forced):
    x = torch.randn(1500, 512) * (0.6 * torch.randn(512)).exp()
    layers = {"a": torch.randn(512, 512).bfloat16(), "b": torch.randn(64, 512).bfloat16()}
    options = {"bytes_per_weight": 5 / 8, "sort_inputs": forced}
    tables = {name: layer_table(weight, Statistics.of(x), options, 1.0) for name, weight in layers.items()}
    assert tables["a"].sorted
    mixed = spread_bytes(tables, 5 / 8)
    assert mixed.options["a"]["sort_inputs"]
    plain = spread_bytes(tables, 8.25 / 8)  # the order's bytes would have to come from other tiles
    if forced:  # and so they do where the user asks for it
        assert all(each["sort_inputs"] for each in plain.options.values())
        return
    assert plain.options == {name: {"bytes_per_weight": 8.25 / 8, "sort_inputs": False} for name in layers}
    number = [str(fmt) for fmt in tables["a"].table.formats].index("int8")
    assert plain.error == pytest.approx(sum(table.alone[number] for table in tables.values()))


def test_what_sorting_saves_is_guessed_from_a_sample(rng):
    """Errors of one format with the columns as they are: from a sample where they are sorted, near the true ones."""
    x = torch.randn(1500, 512) @ torch.randn(512, 512) * torch.randn(512).exp()
    weight = torch.randn(512, 512).bfloat16()
    table = layer_table(weight, Statistics.of(x), {"bytes_per_weight": 0.5}, 1.0)
    assert table.sorted
    as_it_is, _ = Task.of(weight, Statistics.of(x), Budget(bytes_per_weight=0.5, sort_inputs=False), None).table()
    assert table.alone == pytest.approx(as_it_is.errors.sum(0), rel=0.05)
