"""magnitude, OBD and Wanda: which weights go, by the definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stoicc
from stoicc.ops import Statistics
from tests.survives import assert_survives

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dropped_by_sort(scores, count):
    """Bool `[R, K]`: what a stable sort of each row drops; of equal scores the last."""
    kept = torch.ones_like(scores, dtype=torch.bool)
    for row, line in enumerate(scores.tolist()):
        order = sorted(range(len(line)), key=lambda column: (line[column], -column))
        kept[row, order[:count]] = False
    return ~kept


def mask_of(compressed):
    *_, (_, node, _) = compressed.nodes()
    return node.kept


@given(st.integers(0, 10**6), st.sampled_from(DTYPES), st.floats(0, 1), st.booleans())
def test_wanda_drops_what_a_sort_of_each_row_drops(seed, dtype, sparsity, coarse):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 45, generator=generator)
    weight = ((weight * 2).round() if coarse else weight).to(dtype)  # coarse weights tie
    statistics = Statistics.of(torch.randn(20, 45, generator=generator).clamp_min(0))
    norms = (statistics.square / 20).sqrt()
    expected = dropped_by_sort(weight.float().abs() * norms, round(sparsity * 45))
    pruned = stoicc.ops.wanda(weight, statistics, sparsity)
    assert torch.equal(~mask_of(pruned), expected)
    assert torch.equal(pruned.dense(), weight.masked_fill(expected, 0))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (1, 4), (2, 4), (3, 7), (2, 20), (8, 8)])
def test_wanda_keeps_n_of_every_m_by_its_score(n, m):
    weight, x = torch.randn(9, 50), torch.randn(30, 50) * torch.rand(50).exp()
    kept = stoicc.ops.wanda(weight, Statistics.of(x), n=n, m=m).dense() != 0
    scores = weight.abs() * x.norm(dim=0)
    for row in range(9):
        for start in range(0, 50, m):
            group = scores[row, start : start + m]
            best = group.topk(min(n, len(group))).indices
            assert sorted(kept[row, start : start + m].nonzero().flatten().tolist()) == sorted(best.tolist())


@pytest.mark.parametrize("scope", ["layer", "row"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
def test_magnitude_drops_the_smallest(scope, sparsity):
    weight = (torch.randn(12, 40) * 3).round()  # with ties
    lines = weight.abs() if scope == "row" else weight.abs().view(1, -1)
    dropped = dropped_by_sort(lines, round(sparsity * lines.shape[1])).view(12, 40)
    assert torch.equal(~mask_of(stoicc.ops.magnitude(weight, sparsity, scope)), dropped)


def test_magnitude_drops_the_smallest_tiles():
    weight = torch.randn(70, 90)
    weight[16:32, 32:48] *= 0.1
    weight[64:, 80:] *= 0.2  # a tail tile of 6 x 10 counts by its mean
    weight[:16, :16] *= 0.5
    pruned = stoicc.ops.magnitude(weight, 3 / 30, "tile", tile=(16, 16))
    gone = torch.zeros(70, 90, dtype=torch.bool)
    gone[16:32, 32:48] = gone[64:, 80:] = gone[:16, :16] = True
    assert torch.equal(~mask_of(pruned), gone)
    assert stoicc.inspect(pruned).program.segments[0].format == "empty"
    assert_survives(pruned)


def test_obd_weighs_by_the_curvature_of_the_input():
    weight, x = torch.randn(10, 30), torch.randn(40, 30) * torch.linspace(0.1, 3, 30)
    saliency = weight.double().square() * x.double().square().sum(0) / 2
    for scope, lines in (("layer", saliency.view(1, -1)), ("row", saliency)):
        dropped = dropped_by_sort(lines, lines.shape[1] // 2).view(10, 30)
        assert torch.equal(~mask_of(stoicc.ops.obd(weight, Statistics.of(x), 0.5, scope)), dropped)


def test_obd_within_a_row_is_wanda():
    weight, statistics = torch.randn(10, 30), Statistics.of(torch.randn(40, 30))
    assert torch.equal(
        mask_of(stoicc.ops.obd(weight, statistics, scope="row")), mask_of(stoicc.ops.wanda(weight, statistics))
    )


def test_obd_prune_takes_a_diagonal_or_a_whole_hessian():
    parameters, hessian = torch.randn(8), torch.rand(8, 8).double() + torch.eye(8).double()
    order = (parameters.double().square() * hessian.diagonal()).argsort()
    for given_hessian in (hessian, hessian.diagonal()):
        values, deleted = stoicc.ops.obd_prune(parameters, given_hessian, 3)
        assert torch.equal(deleted, order[:3])
        assert torch.equal(values, parameters.double().index_fill(0, order[:3], 0))


def prune_with(name, weight, statistics, **options):
    operator = getattr(stoicc.ops, name)
    return operator(weight, **options) if name == "magnitude" else operator(weight, statistics, **options)


@pytest.mark.parametrize("name", ["magnitude", "obd", "wanda"])
def test_what_was_pruned_stays_pruned_and_counts(name):
    weight, statistics = torch.randn(16, 64), Statistics.of(torch.randn(30, 64))
    weight[:, 5] = 0.0  # a weight that happens to be zero is not one that was pruned
    once = prune_with(name, weight, statistics, sparsity=0.3)
    twice = prune_with(name, once, statistics, sparsity=0.5)
    assert not twice.dense()[once.dense() == 0].any()
    assert (~mask_of(twice) | ~mask_of(once)).sum() == (16 * 64 * 0.5)


@pytest.mark.parametrize("name", ["magnitude", "obd", "wanda"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_survive_lowering(name, dtype):
    weight, statistics = torch.randn(100, 200).to(dtype), Statistics.of(torch.randn(30, 200))
    assert_survives(prune_with(name, weight, statistics))


def test_codes_stay_codes_under_wanda():
    weight, statistics = torch.randn(64, 128), Statistics.of(torch.randn(30, 128))
    pruned = stoicc.ops.wanda(stoicc.ops.group_absmax(weight), statistics, n=2, m=4)
    assert_survives(pruned, "int4_nv24")


def test_where_names_the_tiles_that_wanda_prunes():
    weight, statistics = torch.randn(128, 128), Statistics.of(torch.randn(30, 128))
    where = torch.tensor([[True, False], [False, True]])
    pruned = stoicc.ops.wanda(weight, statistics, n=2, m=4, where=where)
    whole = stoicc.ops.wanda(weight, statistics, n=2, m=4).dense()
    spread = where.repeat_interleave(64, 0).repeat_interleave(64, 1)
    assert torch.equal(pruned.dense(), torch.where(spread, whole, weight))
    assert_survives(pruned, "nv24", "dense")


@pytest.mark.parametrize("name", ["obd", "wanda"])
def test_statistics_follow_permutations_and_scales(name):
    """Scores are those of the inputs that reach the tiles: y does not know how columns are stored."""
    weight, x = torch.randn(16, 64), torch.randn(50, 64) * torch.linspace(0.1, 2, 64)
    columns, scale = torch.randperm(64), 2.0 ** torch.randint(-3, 4, (64,))
    stored = stoicc.ops.scale(stoicc.ops.permute(weight, columns=columns), scale)
    plain = prune_with(name, weight, Statistics.of(x))
    assert torch.equal(prune_with(name, stored, Statistics.of(x)).dense(), plain.dense())


@pytest.mark.parametrize("name", ["obd", "obs", "wanda"])
def test_weights_of_dead_channels_go_first_and_the_result_says_so(name):
    x = torch.randn(40, 32)
    x[:, [3, 9]] = 0
    pruned = prune_with(name, torch.randn(8, 32) + 5, Statistics.of(x), sparsity=2 / 32)
    assert (pruned.dense()[:, [3, 9]] == 0).all()
    assert "2 of 32 input channels dead" in str(pruned)


def test_order_of_error_on_correlated_inputs():
    """OBS < Wanda < magnitude in error of the output, as published."""
    x = torch.randn(300, 48) @ torch.randn(48, 48) * torch.linspace(0.2, 2, 48)
    weight, statistics = torch.randn(32, 48), Statistics.of(x, dtype=torch.float64)
    pruned = [
        stoicc.ops.obs(weight, statistics),
        stoicc.ops.wanda(weight, statistics),
        stoicc.ops.magnitude(weight, scope="row"),
    ]
    errors = [(x @ (each.dense() - weight).T).norm().item() for each in pruned]
    assert errors[0] < 0.7 * errors[1] < 0.7 * errors[2]


STATISTICS = Statistics.of(torch.ones(4, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: stoicc.ops.magnitude(w, 1.5), r"ops.magnitude: expected a sparsity from 0 to 1, .* found 1.5"),
        (lambda w: stoicc.ops.magnitude(w, scope="column"), r"expected scope layer, row, tile, found 'column'"),
        (lambda w: stoicc.ops.magnitude(w, scope="tile", tile=(5, 5)), r"tile: expected two of"),
        (lambda w: stoicc.ops.obd(w, STATISTICS, scope="tile"), r"ops.obd: expected scope layer, row, found 'tile'"),
        (lambda w: stoicc.ops.wanda(w, STATISTICS, n=3), r"ops.wanda: expected 0 <= n <= m with m >= 1, found 3:None"),
        (lambda w: stoicc.ops.wanda(w, STATISTICS, where=torch.ones(1, 1) > 0), r"expected n and m with where"),
        (
            lambda w: stoicc.ops.wanda(w, torch.ones(4, 8)),  # type: ignore[arg-type]
            r"ops.wanda: expected Statistics, found Tensor; Statistics.of",
        ),
        (
            lambda w: stoicc.ops.wanda(w, Statistics.of(torch.ones(4, 9))),
            r"expected statistics of the weight's 8 input channels, found 9; collect them on this layer",
        ),
        (
            lambda w: stoicc.ops.wanda(w, Statistics.of(w.log())),
            r"calibration, batch 0: expected finite inputs, found nan at sample \d, channel \d",
        ),
        (
            lambda w: Statistics(3, torch.ones(2), torch.ones(2), torch.tensor([1.0, float("nan")])),
            r"statistics: expected finite sums, found NaN or infinity in square; collect them again",
        ),
        (
            lambda w: stoicc.ops.obd_prune(w[0], torch.eye(7), 1),
            r"expected flat parameters \[P\] and a Hessian \[P, P\]",
        ),
        (lambda w: stoicc.ops.obd_prune(w[0], torch.eye(8), 9), r"expected a count from 0 to 8, .* found 9"),
        (lambda w: stoicc.ops.obd_prune(w[0].log(), torch.eye(8), 9), r"expected finite parameters and Hessian"),
    ],
)
def test_misuse_is_one_clear_sentence(call, message):
    with pytest.raises(stoicc.InputError, match=message):
        call(torch.randn(8, 8))
