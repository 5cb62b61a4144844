"""Optimal Brain Surgeon: exact by brute force, and the XOR network on which only it is right."""

import itertools

import pytest
import torch

import stoicc
from stoicc.ops import Statistics
from stoicc.ops._hessian import LEAF, factorise, inverse_of_upper, invert
from tests.stoicc.reference_ops import problem, refit
from tests.survives import assert_survives

POINTS = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]], dtype=torch.float64)
TARGETS = torch.tensor([-0.8, 0.8, 0.8, -0.8], dtype=torch.float64)
ONES = torch.ones(9, dtype=torch.float64)
HIDDEN_BIASES = {4, 5}


def xor(p):
    """A 2-2-1 network of 9 weights: inputs to hidden 0-3, hidden biases 4-5, output 6-7, its bias 8."""
    return torch.tanh(torch.tanh(POINTS @ p[:4].view(2, 2).T + p[4:6]) @ p[6:8] + p[8])


def trained(start, kept):
    """Weights at a minimum of the squared error, those outside `kept` at zero; and that error."""
    p = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [p], max_iter=500, tolerance_grad=1e-9, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = (xor(p * kept) - TARGETS).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = (p * kept).detach()
    return found, (xor(found) - TARGETS).square().mean().item()


TRAINED = [  # to two decimals, from random starts
    [1.43, 2.95, -0.87, -1.14, -2.57, -1.15, -1.36, -1.57, -1.37],
    [-0.95, -0.8, -1.64, -1.25, -0.99, 1.53, -1.7, 1.48, -1.49],
]


@pytest.mark.parametrize("network", TRAINED)
def test_only_obs_deletes_the_right_weight_of_an_xor_network(network):
    """Without one of the four input weights a hidden unit sees one input, and no 2-2-1 network computes XOR."""
    network, error = trained(torch.tensor(network, dtype=torch.float64), ONES)
    assert error < 1e-6
    jacobian = torch.autograd.functional.jacobian(xor, network)
    hessian = jacobian.T @ jacobian / 4 + 1e-6 * torch.eye(9)
    pruned, deleted = stoicc.ops.obs_prune(network, hessian, 1)
    assert deleted.item() in HIDDEN_BIASES
    assert torch.equal(xor(pruned).sign(), TARGETS.sign())  # as it is, and exact after some training
    assert trained(pruned, ONES.index_fill(0, deleted, 0))[1] < 1e-6
    for diagonal in (hessian, ONES):  # OBD; and magnitude, which is OBD where all curvatures are equal
        pruned, deleted = stoicc.ops.obd_prune(network, diagonal, 1)
        assert deleted.item() < 4
        assert not torch.equal(xor(pruned).sign(), TARGETS.sign())
        assert trained(pruned, ONES.index_fill(0, deleted, 0))[1] > 0.3


def test_each_deletion_is_the_best_one_and_the_rest_refits():
    weight, statistics = problem(3, 9)
    hessian = statistics.hessian(0.01)
    for row in weight.double():
        values, order = stoicc.ops.obs_prune(row, hessian, 5)
        kept = torch.ones(9, dtype=torch.bool)
        for step, index in enumerate(order.tolist()):
            costs = {}
            for candidate in kept.nonzero().flatten().tolist():
                trial = kept.clone()
                trial[candidate] = False
                costs[candidate] = refit(row, hessian, trial)[1]
            assert min(costs, key=lambda each: costs[each]) == index, step
            kept[index] = False
        torch.testing.assert_close(values, refit(row, hessian, kept)[0], rtol=1e-9, atol=1e-9)


def test_a_layer_is_its_rows_and_near_the_best_of_all_masks():
    weight, statistics = problem(4, 8)
    hessian = statistics.hessian(0.01)
    pruned = stoicc.ops.obs(weight, statistics, 0.5).dense().double()
    for row, found in zip(weight.double(), pruned, strict=True):
        assert torch.allclose(stoicc.ops.obs_prune(row, hessian, 4)[0], found, atol=1e-6)
        masks = itertools.combinations(range(8), 4)
        best = min(refit(row, hessian, torch.zeros(8).bool().index_fill(0, torch.tensor(m), True))[1] for m in masks)
        change = found - row
        assert best - 1e-6 <= change @ hessian @ change <= 3 * best


def test_over_the_whole_layer_the_cheapest_deletion_of_any_row_comes_next():
    weight, statistics = problem(5, 8)
    weight *= torch.tensor([0.2, 1, 3, 1, 1])[:, None]
    hessian, inverse = statistics.hessian(0.01), torch.linalg.inv(statistics.hessian(0.01))
    rows, inverses = list(weight.double()), [inverse] * 5
    gone = torch.zeros(5, 8, dtype=torch.bool)
    for _ in range(20):
        scores = torch.stack([w.square() / h.diagonal() for w, h in zip(rows, inverses, strict=True)])
        row, column = divmod(int(scores.masked_fill(gone, torch.inf).argmin()), 8)
        gone[row, column] = True
        rows[row] = refit(weight[row].double(), hessian, ~gone[row])[0]
        free = (~gone[row]).nonzero().flatten()
        inverses[row] = torch.eye(8, dtype=torch.float64)
        inverses[row][free[:, None], free] = torch.linalg.inv(hessian[free[:, None], free])
    pruned = stoicc.ops.obs(weight, statistics, 0.5, scope="layer")
    assert torch.equal(pruned.dense() == 0, gone)
    torch.testing.assert_close(pruned.dense(), torch.stack(rows).float())
    assert gone[0].sum() > 5
    assert gone[2].sum() < 4


def test_what_was_pruned_stays_pruned():
    weight, statistics = problem(6, 16)
    before = stoicc.ops.nm_magnitude(weight, 3, 4)
    pruned = stoicc.ops.obs(before, statistics, 0.5)
    assert not pruned.dense()[before.dense() == 0].any()
    assert ((pruned.dense() == 0).sum(1) == 8).all()
    hessian = statistics.hessian(0.01)
    for row, found in zip(before.dense().double(), pruned.dense().double(), strict=True):
        torch.testing.assert_close(found, refit(row, hessian, found != 0)[0], rtol=1e-5, atol=1e-5)


def test_statistics_follow_permutations_and_scales():
    weight, statistics = problem(4, 16)
    stored = stoicc.ops.scale(stoicc.ops.permute(weight, columns=torch.randperm(16)), torch.full((16,), 2.0))
    torch.testing.assert_close(stoicc.ops.obs(stored, statistics).dense(), stoicc.ops.obs(weight, statistics).dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_survive_lowering(dtype):
    weight, statistics = problem(20, 40, dtype=torch.float32)
    pruned = stoicc.ops.obs(weight.to(dtype), statistics)
    assert (pruned.dense() == 0).sum() == 400
    assert_survives(pruned)


def test_damping_is_raised_where_it_does_not_do_and_the_result_says_so():
    few = Statistics.of(torch.randn(4, 12))  # 4 samples: rank 4 of 12
    with pytest.warns(UserWarning, match="ops.obs: damping raised from 0 to 0.0001") as warned:
        pruned = stoicc.ops.obs(torch.randn(3, 12), few, damping=0.0)
    assert warned[0].filename == __file__
    assert "damping raised from 0 to 0.0001 (the Hessian was not positive definite)" in str(pruned)
    assert pruned.dense().isfinite().all()
    assert "damping 0.01" in str(stoicc.ops.obs(torch.randn(3, 12), few))


@pytest.mark.parametrize("dead", [slice(0), slice(2, 5), slice(None)])
def test_the_factor_is_that_of_the_inverse(dead):
    x = torch.randn(50, 7, dtype=torch.float64)
    x[:, dead] = 0
    statistics = Statistics.of(x, dtype=torch.float64)
    found = invert("here", statistics, 0.01)
    hessian = statistics.hessian(0.01)
    hessian.diagonal()[dead] = hessian.diagonal().mean()
    torch.testing.assert_close(found.full() @ hessian, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-10)
    assert torch.equal(found.upper, found.upper.triu())


def test_a_factor_in_single_precision_is_near_and_gives_way_where_it_does_not_do():
    x = torch.randn(500, 300) @ torch.randn(300, 300)
    statistics = Statistics.of(x)
    exact = factorise("here", statistics, 0.01)
    single = factorise("here", statistics, 0.01, torch.float32)
    assert single.reversed.dtype == torch.float32
    torch.testing.assert_close(single.left, exact.left, rtol=1e-2, atol=0)
    full = exact.inverse().upper.double().diagonal() ** -2  # what is left counts with 16 bits
    torch.testing.assert_close(exact.left, full, rtol=2**-16, atol=0)
    alike = Statistics.of(torch.randn(20, 1, dtype=torch.float64).expand(20, 300), dtype=torch.float64)
    assert factorise("here", alike, 1e-8, torch.float32).reversed.dtype == torch.float64


@pytest.mark.parametrize("size", [1, LEAF, LEAF + 1, 2 * LEAF + 77])
def test_an_upper_triangle_is_inverted(size):
    upper = torch.randn(size, size, dtype=torch.float64).triu(1) / size + torch.rand(size).add(0.5).double().diag()
    found = inverse_of_upper(upper)
    assert torch.equal(found, found.triu())
    torch.testing.assert_close(found @ upper, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


def indefinite(columns):
    """Sums that no inputs have."""
    ones = torch.ones(columns)
    return Statistics(1, ones, ones, ones, 1000 - 999 * torch.eye(columns))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, s: stoicc.ops.obs(w, s, damping=-1), r"ops.obs: expected a finite damping >= 0, .* found -1"),
        (lambda w, s: stoicc.ops.obs(w, s, scope="tile"), r"ops.obs: expected scope row, layer, found 'tile'"),
        (lambda w, s: stoicc.ops.obs(stoicc.ops.group_absmax(w), s), r"expected a weight that is not quantized yet"),
        (
            lambda w, s: stoicc.ops.obs(w, Statistics.of(torch.ones(2, 8), gram=False)),
            r"ops.obs: expected statistics with a gram matrix, found none; collect with gram=True",
        ),
        (
            lambda w, s: stoicc.ops.obs(
                w, Statistics(1, torch.ones(8), torch.ones(8), torch.ones(8), 1000 - 999 * torch.eye(8))
            ),
            r"ops.obs: expected statistics whose gram matrix is positive semidefinite, found one that damping",
        ),
        (lambda w, s: stoicc.ops.obs_prune(w[0], torch.zeros(8, 8), 1), r"expected a positive definite Hessian"),
        (lambda w, s: stoicc.ops.obs_prune(w[0], torch.eye(7), 1), r"expected flat parameters \[P\] and a Hessian"),
    ],
)
def test_misuse_is_one_clear_sentence(call, message):
    with pytest.raises(stoicc.InputError, match=message):
        call(torch.randn(8, 8), Statistics.of(torch.randn(20, 8)))
