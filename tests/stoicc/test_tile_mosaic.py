"""tile_mosaic: the sparsity that was asked for, in the tiles where it costs least."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stoicc
from stoicc.ops import Statistics
from tests.stoicc.reference_ops import output_error, problem
from tests.survives import assert_survives

METHODS = ("magnitude", "wanda", "sparsegpt")


def uneven(rows, columns):
    """A weight whose 16x16 tiles differ in size, and statistics."""
    weight, statistics = problem(rows, columns, samples=3 * columns, dtype=torch.float32)
    tiles = torch.randn(-(-rows // 16), -(-columns // 16)).exp()
    return weight * tiles.repeat_interleave(16, 0).repeat_interleave(16, 1)[:rows, :columns], statistics


def pruned_tiles(compressed, rows=64, columns=64):
    zeros = (compressed.dense() == 0).view(rows // 16, 16, columns // 16, 16).sum((1, 3))
    assert ((zeros == 0) | (zeros == 128)).all()
    return zeros > 0


@given(st.floats(0, 0.5), st.sampled_from(METHODS), st.integers(1, 70), st.integers(1, 70))
def test_it_has_the_sparsity_that_was_asked_for(sparsity, method, rows, columns):
    weight, statistics = torch.randn(rows, columns), Statistics.of(torch.randn(90, columns))
    mosaic = stoicc.ops.tile_mosaic(weight, statistics, sparsity, method, tile=(16, 16))
    most = (stoicc.ops.nm_magnitude(weight).dense() == 0).sum()
    wanted = min(sparsity * weight.numel(), most)
    assert abs((mosaic.dense() == 0).sum() - wanted) <= 64


@pytest.mark.parametrize("method", METHODS)
def test_at_either_end_it_is_the_weight_and_pure_2_4(method):
    weight, statistics = uneven(64, 64)
    dense = stoicc.ops.tile_mosaic(weight, statistics, 0.0, method, tile=(16, 16))
    assert torch.equal(dense.dense(), weight)
    whole = stoicc.ops.tile_mosaic(weight, statistics, 0.5, method, tile=(16, 16))
    pure = {
        "magnitude": lambda: stoicc.ops.nm_magnitude(weight),
        "wanda": lambda: stoicc.ops.wanda(weight, statistics, n=2, m=4),
        "sparsegpt": lambda: stoicc.ops.sparsegpt(weight, statistics, n=2, m=4),
    }[method]()
    assert torch.equal(whole.dense(), pure.dense())


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_no_other_choice_of_tiles_takes_less(method):
    weight, statistics = uneven(32, 64)
    importance = statistics.square if method == "wanda" else torch.ones(64)
    mosaic = stoicc.ops.tile_mosaic(weight, statistics, 0.1875, method, tile=(16, 16))
    whole = stoicc.ops.tile_mosaic(weight, statistics, 0.5, method, tile=(16, 16))
    taken = ((whole.dense() - weight).square() * importance).view(2, 16, 4, 16).sum((1, 3)).flatten().tolist()
    best = min(itertools.combinations(range(8), 3), key=lambda tiles: sum(taken[t] for t in tiles))
    assert pruned_tiles(mosaic, 32).flatten().nonzero().flatten().tolist() == list(best)


@pytest.mark.parametrize("method", METHODS)
def test_it_beats_tiles_chosen_at_random(method):
    weight, statistics = uneven(64, 64)
    mosaic = stoicc.ops.tile_mosaic(weight, statistics, 0.25, method, tile=(16, 16))
    assert pruned_tiles(mosaic).sum() == 8
    others = []
    for _ in range(5):
        where = (torch.randperm(16) < 8).view(4, 4)
        if method == "magnitude":
            pruned = stoicc.ops.nm_magnitude(weight, 2, 4, where, (16, 16))
        else:
            pruned = getattr(stoicc.ops, method)(weight, statistics, n=2, m=4, where=where, tile=(16, 16))
        others.append(output_error(weight, pruned.dense(), statistics))
    assert output_error(weight, mosaic.dense(), statistics) < 0.7 * sorted(others)[2]


def test_order_of_error():
    """SparseGPT < Wanda < magnitude in error of the output, and a mosaic of 25% between dense and 2:4."""
    weight, statistics = uneven(128, 128)
    errors = {
        (method, sparsity): output_error(
            weight, stoicc.ops.tile_mosaic(weight, statistics, sparsity, method, tile=(16, 16)).dense(), statistics
        )
        for method in METHODS
        for sparsity in (0.25, 0.5)
    }
    for sparsity in (0.25, 0.5):
        assert errors["sparsegpt", sparsity] < errors["wanda", sparsity] < errors["magnitude", sparsity]
    for method in METHODS:
        assert errors[method, 0.25] < 0.4 * errors[method, 0.5]


def formats_of(compressed):
    return {segment.format for segment in stoicc.inspect(compressed).program.segments}


@pytest.mark.parametrize("method", METHODS)
def test_results_survive_lowering(method):
    weight, statistics = problem(130, 200, samples=400, dtype=torch.float32)
    mosaic = stoicc.ops.tile_mosaic(weight.bfloat16(), statistics, 0.3, method)
    assert_survives(mosaic)
    assert formats_of(mosaic) >= {"nv24", "dense"}
    quantized = stoicc.ops.optq(mosaic, statistics, group_size=64)
    assert_survives(quantized)
    assert formats_of(quantized) >= {"int4_nv24", "int4"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "obs"}, r"ops.tile_mosaic: expected method magnitude, wanda, sparsegpt, found 'obs'"),
        ({"statistics": None}, r"ops.tile_mosaic: expected statistics for method 'wanda', found none; or choose"),
        ({"sparsity": 0.6}, r"ops.tile_mosaic: expected a sparsity from 0 to 0.5, the share to drop, found 0.6"),
        ({"n": 1, "m": 3}, r"expected an m that divides the tile's 64 columns, found 3; change the tile"),
        ({"tile": (8, 8)}, r"tile: expected two of"),
        ({"statistics": Statistics.of(torch.ones(2, 9))}, r"the weight's 8 input channels, found 9"),
    ],
)
def test_misuse_is_one_clear_sentence(options, message):
    with pytest.raises(stoicc.InputError, match=message):
        stoicc.ops.tile_mosaic(
            **{"weight": torch.randn(8, 8), "statistics": Statistics.of(torch.ones(4, 8)), **options}
        )
