"""Masks of sparse training: the first prune, the second, and what the second drops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stoicc.ir.errors import InputError
from stoicc.nn import kept as moves
from stoicc.nn.kept import COLUMN, TWICE, collect, spread
from stoicc.nn.masks import check_structure, expected_drop, first_places, prune_again

PUBLISHED = {(1, 2): 12.5, (2, 4): 9.375, (2, 8): 5.84}
"""Points of all entries that the second prune drops of a random mask."""


def counts(matrix, m, dim):
    """Non-zeros of each whole group of m along a dimension."""
    whole = matrix.narrow(dim, 0, matrix.shape[dim] // m * m)
    return whole.ne(0).unflatten(dim, (-1, m)).sum(dim + 1)


@pytest.mark.parametrize("structure", PUBLISHED)
def test_the_second_prune_drops_what_the_formula_says(structure, rng):
    n, m = structure
    assert 100 * expected_drop(n, m) == pytest.approx(PUBLISHED[structure], abs=0.005)
    weight = torch.randn(2048, 512, generator=rng)
    places = first_places(weight, n, m, "random", rng)
    values = collect(weight, places, n, m)
    twice = prune_again(values, places, n, m)
    dropped = (spread(values, twice, n, m).ne(0).float() - spread(values, twice, n, m, twice=True).ne(0).float()).mean()
    # a column group drops at most m - n of m entries, so the mean of 2**20 / m groups has an error below this
    assert abs(dropped.item() - expected_drop(n, m)) < 4 * 0.5 / (2**20 / m) ** 0.5 * (m - n) / m


@given(
    st.sampled_from([(1, 2), (2, 4), (2, 8), (1, 3), (3, 5)]),
    st.integers(1, 40),
    st.integers(1, 8),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    st.randoms(use_true_random=False),
)
def test_kept_weights_go_to_their_rows_and_back(structure, rows, groups, dtype, random):
    n, m = structure
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    weight = torch.randn(rows, groups * m, generator=generator).to(dtype)
    places = first_places(weight, n, m, "magnitude")
    values = collect(weight, places, n, m)
    assert torch.equal(values, weight.gather(1, moves._columns(places, n, m)))
    dense = spread(values, places, n, m)
    assert torch.equal(dense, torch.zeros_like(weight).scatter(1, moves._columns(places, n, m), values))
    twice = prune_again(values, places, n, m)
    marked = spread(values, twice, n, m, twice=True)
    assert torch.equal(marked[marked != 0], dense[marked != 0])
    assert int(counts(dense, m, 1).max()) <= n
    assert rows < m or int(counts(marked, m, 0).max()) <= n


def test_c_and_torch_move_alike(rng, monkeypatch):
    assert moves._library(torch.zeros(1)) is not None
    weight = torch.randn(70, 120, generator=rng)
    places = first_places(weight, 2, 4, "random", rng)
    places = prune_again(collect(weight, places, 2, 4), places, 2, 4)
    values = collect(weight, places, 2, 4)
    fast = spread(values, places, 2, 4), spread(values, places, 2, 4, twice=True)
    monkeypatch.setattr(moves, "_library", lambda tensor: None)
    assert torch.equal(collect(weight, places, 2, 4), values)
    assert torch.equal(spread(values, places, 2, 4), fast[0])
    assert torch.equal(spread(values, places, 2, 4, twice=True), fast[1])
    assert not torch.equal(*fast)


def test_magnitude_keeps_the_largest(rng):
    weight = torch.randn(16, 32, generator=rng)
    places = first_places(weight, 2, 4, "magnitude")
    dense = spread(collect(weight, places, 2, 4), places, 2, 4)
    least_kept = dense.abs().view(16, 8, 4).topk(2).values[..., 1]
    assert torch.equal(least_kept, weight.abs().view(16, 8, 4).topk(2).values[..., 1])


def test_the_second_prune_keeps_the_largest_of_a_column_even_if_they_are_zero():
    kept = torch.tensor([[3.0], [0.0], [-5.0], [1.0]])
    places = torch.tensor([[0], [0], [0], [1]], dtype=torch.uint8)
    assert prune_again(kept, places, 1, 2).tolist() == [[TWICE], [0], [TWICE], [TWICE | 1]]
    zero = torch.zeros(2, 1)
    again = prune_again(zero, torch.tensor([[0], [1]], dtype=torch.uint8), 1, 2)
    assert (again & COLUMN).tolist() == [[0], [1]]
    assert bool((again >= TWICE).all())


def test_a_short_last_group_of_rows_keeps_n_of_its_own(rng):
    weight = torch.randn(6, 16, generator=rng)
    places = first_places(weight, 2, 4, "magnitude")
    values = collect(weight, places, 2, 4)
    twice = prune_again(values, places, 2, 4)
    assert bool((twice[4:] >= TWICE).all())  # two rows, of which two may stay
    assert torch.equal(twice[:4], prune_again(values[:4], places[:4], 2, 4))


@pytest.mark.parametrize("structure", [(0, 4), (4, 4), (2, 256), (1.0, 4)])
def test_no_structure(structure):
    with pytest.raises(InputError, match=r"slope: expected 0 < n < m <= 128, found n=.*; correct them"):
        check_structure(*structure)
