"""SparseGPT: its sweep equals a naive one, and exact OBS where the two must agree."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stoicc
from stoicc.ops import CompressedWeight, Statistics
from stoicc.ops._hessian import invert
from stoicc.ops._rounding import CodeOptions, ToCodes
from stoicc.ops._sweep import Given, OfEach, ShareOfRow, Sweep, ToDtype, blocks
from stoicc.ops.graph import Prune
from stoicc.ops.sparsegpt import tile_costs
from tests.stoicc.reference_ops import output_error, problem, refit
from tests.survives import assert_survives


def naive(weight, hessian, rule, group_size=0):
    """The sweep by its definition, in float64: H^-1 of the columns still to come is computed anew for each."""
    values, kept = weight.double().clone(), torch.ones(weight.shape, dtype=torch.bool)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(len(hessian))]
    diagonal = torch.stack([inverse[0, 0] for inverse in inverses])
    scale = torch.zeros(len(weight))
    for j, inverse in enumerate(inverses):
        if j % rule.span == 0:
            part = slice(j, j + rule.span)
            kept[:, part] = rule.keep(j, (values[:, part].square() / diagonal[part]).T).T
        if group_size and j % group_size == 0:
            group = slice(j, j + group_size)
            stays = rule.keep(j, torch.zeros_like(values[:, group].T)).T
            scale = ((values[:, group] * stays).abs().amax(1) / 7).float()
        rounded = values[:, j] * kept[:, j]
        if group_size:
            rounded = ((rounded / scale.double()).round().clamp(-7, 7).float() * scale).double()
        error = (values[:, j] - rounded) / inverse[0, 0]
        values[:, j:] -= error[:, None] * inverse[0]
        values[:, j] = rounded
    return values, kept


@pytest.mark.parametrize("rule", [ShareOfRow(0.4), OfEach(2, 4), OfEach(3, 7), ShareOfRow(1.0)], ids=str)
def test_the_cholesky_sweep_is_the_naive_one(rule):
    weight, statistics = problem(6, 270)  # three blocks
    inverse = invert("here", statistics, 0.01)
    values, kept = Sweep(inverse, ToDtype(torch.float64), rule).run(weight)
    expected = naive(weight, statistics.hessian(0.01), rule)
    assert torch.equal(kept, expected[1])
    torch.testing.assert_close(values, expected[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("group_size", [16, 64, 200])
def test_with_codes_it_is_the_naive_one_too(group_size):
    weight, statistics = problem(6, 400)
    rule = Given(torch.rand(400, 6) < 0.6)
    inverse = invert("here", statistics, 0.01)
    codes = ToCodes.empty(CodeOptions(4, group_size, clip=False), weight, torch.ones(400))
    values, _ = Sweep(inverse, codes, rule).run(weight)
    expected, _ = naive(weight, statistics.hessian(0.01), rule, group_size)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
    node = codes.node("here")
    again = (node.codes.float() - 8) * node.scales.repeat_interleave(group_size, 1)[:, :400]
    assert torch.equal(again.double(), values)


def test_a_single_removal_is_that_of_exact_obs():
    weight, statistics = problem(8, 40)
    weight[:, 0] *= 1e-4  # so that both choose the first column, after which every other is still to come
    found = stoicc.ops.sparsegpt(weight, statistics, 1 / 40).dense()
    exact = stoicc.ops.obs(weight, statistics, 1 / 40).dense()
    assert (exact[:, 0] == 0).all()
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_a_pruned_prefix_of_each_row_is_that_of_exact_obs():
    weight, statistics = problem(10, 24)
    hessian, lengths = statistics.hessian(0.01), torch.arange(10)
    kept = torch.arange(24) >= lengths[:, None]
    weight = torch.where(kept, weight, weight * 1e-6)  # so that OBS chooses the prefix, in whatever order
    values, _ = Sweep(invert("here", statistics, 0.01), ToDtype(torch.float64), Given(kept.T)).run(weight)
    for row, length, found in zip(weight.double(), lengths.tolist(), values, strict=True):
        exact, deleted = stoicc.ops.obs_prune(row, hessian, length)
        assert sorted(deleted.tolist()) == list(range(length))
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    weight = torch.randn(10, 24)  # and the best answer there is, however large what goes
    values, _ = Sweep(invert("here", statistics, 0.01), ToDtype(torch.float64), Given(kept.T)).run(weight)
    for row, mask, found in zip(weight.double(), kept, values, strict=True):
        torch.testing.assert_close(found, refit(row, hessian, mask)[0], rtol=1e-9, atol=1e-9)


def test_a_tile_costs_what_the_best_answer_to_its_removal_costs():
    weight, statistics = problem(40, 60)  # tail tiles of 8 rows, and of 12 columns
    hessian, costs = statistics.hessian(0.01), torch.empty(3, 4, dtype=torch.float64)
    for top in range(3):
        for left in range(4):
            kept = torch.ones(60, dtype=torch.bool)
            kept[16 * left : 16 * left + 16] = False
            rows = [refit(row, hessian, kept)[1] for row in weight[16 * top : 16 * top + 16].double()]
            costs[top, left] = sum(rows) / (len(rows) * (~kept).sum())
    torch.testing.assert_close(tile_costs(weight, invert("here", statistics, 0.01), (16, 16)), costs)
    pruned = stoicc.ops.sparsegpt(weight, statistics, 5 / 12, scope="tile", tile=(16, 16)).dense()
    gone = [[(part == 0).all() for part in rows.split(16, 1)] for rows in pruned.split(16)]
    assert torch.equal(torch.tensor(gone), costs <= costs.flatten().sort().values[4])


@given(st.integers(1, 700), st.integers(1, 20), st.integers(0, 300))
def test_blocks_keep_spans_whole(columns, m, group_size):
    grid = group_size or columns
    found = list(blocks(columns, m, grid))
    assert [column for block in found for column in range(block.start, block.stop)] == list(range(columns))
    starts = {block.start for block in found}
    for block in found:
        assert block.start % min(m, columns) == 0
        inside = [c for c in range(block.start, block.stop) if c % grid == 0 and c not in starts]
        assert all(c + grid <= block.stop or block.stop == columns for c in inside)


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 1.0])
def test_every_row_loses_its_share(sparsity):
    weight, statistics = problem(5, 200, dtype=torch.float32)
    pruned = stoicc.ops.sparsegpt(weight, statistics, sparsity)
    assert ((pruned.dense() == 0).sum(1) == round(sparsity * 200)).all()
    if sparsity == 0:
        assert torch.equal(pruned.dense(), weight)  # nothing goes, nothing moves


@pytest.mark.parametrize("share", [0.1, 0.8])
def test_what_was_pruned_stays_pruned_and_counts(share):
    weight, x = torch.randn(8, 256), torch.randn(600, 256, dtype=torch.float64) + 2 * torch.randn(600, 1)
    statistics, before = Statistics.of(x, dtype=torch.float64), torch.ones(8, 256, dtype=torch.bool)
    before[:, 128:] = torch.rand(8, 128) > share
    pruned = stoicc.ops.sparsegpt(CompressedWeight.of(weight).then(Prune(before, "some")), statistics, 0.5)
    kept = pruned.dense() != 0
    assert not kept[~before].any()
    gone = (~before).sum(1).clamp_min(64) + 64  # in the first block and in the second
    assert torch.equal((~kept).sum(1), gone)
    again, _ = Sweep(invert("here", statistics, 0.01), ToDtype(torch.float32), Given(kept.T)).run(weight * before)
    assert torch.equal(again.float(), pruned.dense())


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"n": 2, "m": 4}, {"sparsity": 0.5, "scope": "tile"}], ids=str)
def test_it_beats_wanda_and_magnitude(options):
    """SparseGPT < Wanda < magnitude in error of the output, as published."""
    weight, statistics = problem(128, 256, samples=600, dtype=torch.float32)
    found = [stoicc.ops.sparsegpt(weight, statistics, tile=(16, 16), **options)]
    if "scope" not in options:
        found.append(stoicc.ops.wanda(weight, statistics, **options))
    found.append(
        stoicc.ops.nm_magnitude(weight) if "n" in options else stoicc.ops.magnitude(weight, tile=(16, 16), **options)
    )
    errors = [output_error(weight, each.dense(), statistics) for each in found]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("zero_points", [False, True])
def test_codes_of_the_same_sweep_beat_codes_afterwards(zero_points):
    weight, statistics = problem(64, 256, samples=600, dtype=torch.float32)
    joint = stoicc.ops.sparsegpt(weight, statistics, n=2, m=4, bits=3, group_size=64, zero_points=zero_points)
    pruned = stoicc.ops.sparsegpt(weight, statistics, n=2, m=4)
    after = stoicc.ops.group_absmax(pruned, 3, 64, zero_points)
    errors = [output_error(weight, each.dense(), statistics) for each in (joint, after)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "formats"),
    [
        ({"sparsity": 0.5}, ()),
        ({"sparsity": 0.5, "scope": "tile"}, ("empty", "dense")),
        ({"n": 2, "m": 4}, ("nv24",)),
        ({"n": 2, "m": 4, "where": [[True, False, False, True]] * 3}, ("nv24", "dense")),
        ({"n": 2, "m": 4, "bits": 4}, ("int4_nv24<group_size=128>",)),
        (
            {"n": 2, "m": 4, "bits": 4, "group_size": 64, "where": [[True, False, False, True]] * 3},
            ("int4_nv24", "int4"),
        ),
        ({"n": 2, "m": 4, "bits": 8, "group_size": 0, "zero_points": True}, ("int8<group_size=0, zero_points=true>",)),
    ],
    ids=str,
)
def test_results_survive_lowering(dtype, options, formats):
    weight, statistics = problem(130, 200, samples=400, dtype=torch.float32)
    if "where" in options:
        options = {**options, "where": torch.tensor(options["where"])}
    assert_survives(stoicc.ops.sparsegpt(weight.to(dtype), statistics, **options), *formats)


def test_statistics_follow_permutations_and_scales():
    weight, statistics = problem(6, 64)
    columns, scale = torch.randperm(64), 2.0 ** torch.randint(-2, 3, (64,))
    stored = stoicc.ops.scale(stoicc.ops.permute(weight, columns=columns), scale)
    seen = statistics.scaled(scale).select(columns)
    plain = stoicc.ops.sparsegpt((weight / scale)[:, columns], seen)
    assert torch.equal(stoicc.ops.sparsegpt(stored, statistics).values(), plain.values())


def test_dead_channels_go_first_and_move_nothing():
    weight, x = torch.randn(6, 64), torch.randn(100, 64)
    x[:, [3, 40]] = 0
    pruned = stoicc.ops.sparsegpt(weight, Statistics.of(x), 2 / 64)
    assert torch.equal(pruned.dense(), weight.index_fill(1, torch.tensor([3, 40]), 0))
    assert "2 of 64 input channels dead" in str(pruned)


def test_damping_is_raised_where_it_does_not_do_and_the_result_says_so():
    with pytest.warns(UserWarning, match=r"ops.sparsegpt: damping raised from 0 to 0.0001"):
        pruned = stoicc.ops.sparsegpt(torch.randn(4, 64), Statistics.of(torch.randn(9, 64)), damping=0)
    assert "damping raised from 0 to 0.0001" in str(pruned)


STATISTICS = Statistics.of(torch.randn(40, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 2}, r"ops.sparsegpt: expected a sparsity from 0 to 1"),
        ({"n": 4, "m": 2}, r"ops.sparsegpt: expected 0 <= n <= m"),
        ({"scope": "layer"}, r"ops.sparsegpt: expected scope row, tile, found 'layer'"),
        ({"scope": "tile", "n": 2, "m": 4}, r"expected a sparsity with scope 'tile', found 2:4"),
        ({"where": torch.ones(1, 1) > 0}, r"expected n and m with where, found a sparsity"),
        ({"bits": 1}, r"ops.sparsegpt: expected 2 to 8 bits, found 1"),
        ({"bits": 4, "group_size": -1}, r"ops.sparsegpt: expected group_size >= 0 .* found -1"),
        ({"damping": float("nan")}, r"ops.sparsegpt: expected a finite damping >= 0"),
        ({"statistics": Statistics.of(torch.randn(9, 32), gram=False)}, r"ops.sparsegpt: .* collect with gram=True"),
        ({"weight": stoicc.ops.group_absmax(torch.randn(4, 32))}, r"found codes, and this moves weights; quantize"),
    ],
)
def test_misuse_is_one_clear_sentence(options, message):
    with pytest.raises(stoicc.InputError, match=message):
        stoicc.ops.sparsegpt(**{"weight": torch.randn(4, 32), "statistics": STATISTICS, **options})
