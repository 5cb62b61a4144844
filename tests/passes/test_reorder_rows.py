"""reorder-rows: fewer non-empty tiles where a permutation finds them, nothing where it does not pay."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stoicc.ir import PassError
from stoicc.ir.types import Module
from stoicc.passes import Pipeline, WeightView, parse_pass
from stoicc.passes.base import scheduled
from stoicc.passes.reorder_rows import ReorderRows, fewest_tiles, gathered, stored_tiles
from stoicc.passes.row_similarity import similarity_graph, spanning_order
from tests.ir.modules import make_program

MODULE = Module(make_program())


def shuffled_patterns(
    rows: int, columns: int, patterns: int, *, seed: int = 0, density: float = 0.2, lost: float = 0.0, more: float = 0.0
) -> np.ndarray:
    """Rows of several patterns, shuffled; each loses and gains tile columns of its own at random."""
    rng = np.random.default_rng(seed)
    kinds = rng.random((patterns, columns)) < density
    exact = kinds[rng.integers(0, patterns, rows)]
    return (exact & (rng.random(exact.shape) >= lost)) | (rng.random(exact.shape) < more)


def view(occupied: np.ndarray, height: int = 64, tile_bytes: float = 8192.0) -> WeightView:
    """A weight whose tiles that store something all take the same bytes."""

    def payload(order):
        return tile_bytes * stored_tiles(occupied if order is None else occupied[order], height)

    return WeightView(occupied, (height, 64), payload)


# -- the order -----------------------------------------------------------------------------


@pytest.mark.parametrize("height", [16, 64, 128])
@pytest.mark.parametrize("noise", [{}, {"lost": 0.15}, {"more": 0.001}, {"lost": 0.1, "more": 0.0005}])
def test_tiles_shrink_where_rows_of_several_patterns_are_shuffled(noise, height):
    for seed in range(3):
        occupied = shuffled_patterns(2048, 96, 12, seed=seed, **noise)
        order = gathered(occupied, height)
        assert stored_tiles(occupied, height) >= 2 * stored_tiles(occupied[order], height)


@pytest.mark.parametrize("groups", [2, 8])
def test_patterns_that_fill_tile_rows_reach_the_fewest_tiles(groups):
    """Disjoint patterns of a multiple of the tile's rows: nothing is fewer, so the order has to be it."""
    columns = np.repeat(np.eye(groups, dtype=bool), 4, axis=1)
    occupied = columns[np.random.default_rng(3).permutation(np.repeat(np.arange(groups), 128))]
    order = gathered(occupied, 64)
    assert stored_tiles(occupied[order], 64) == fewest_tiles(occupied, 64) == groups * 2 * 4
    assert stored_tiles(occupied, 64) > 2 * groups * 4


def test_rows_that_are_like_no_other_do_not_spoil_the_rest():
    occupied = shuffled_patterns(2048, 96, 8)
    rng = np.random.default_rng(1)
    odd = rng.random(2048) < 0.02
    occupied[odd] = rng.random((int(odd.sum()), 96)) < 0.2
    order = gathered(occupied, 64)
    assert stored_tiles(occupied, 64) >= 2 * stored_tiles(occupied[order], 64)


@given(
    arrays(bool, st.tuples(st.integers(1, 90), st.integers(1, 7))),
    st.sampled_from([1, 3, 16, 64]),
)
@example(np.zeros((5, 3), dtype=bool), 16)
@example(np.eye(40, dtype=bool), 16)
def test_the_order_is_a_permutation_with_the_low_tile_row_last(occupied, height):
    order = gathered(occupied, height)
    assert np.array_equal(np.sort(order), np.arange(len(occupied)))
    assert stored_tiles(occupied[order], height) >= fewest_tiles(occupied, height)
    for begin in range(0, len(order), height):
        assert np.all(np.diff(order[begin : begin + height]) > 0)
    assert np.array_equal(order, gathered(occupied.copy(), height))


def test_more_patterns_than_a_window_are_all_placed(monkeypatch):
    monkeypatch.setattr("stoicc.passes.reorder_rows.WINDOW", 50)
    occupied = shuffled_patterns(1024, 96, 6, lost=0.1)
    order = gathered(occupied, 64)
    assert np.array_equal(np.sort(order), np.arange(1024))
    assert stored_tiles(occupied, 64) >= 1.5 * stored_tiles(occupied[order], 64)


def test_counts_are_of_tiles():
    occupied = np.array([[1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0], [1, 0, 1]], dtype=bool)
    assert stored_tiles(occupied, 2) == 2 + 1 + 2
    assert fewest_tiles(occupied, 2) == 2 + 0 + 1


@pytest.mark.parametrize("occupied", [shuffled_patterns(4096, 172, 16, lost=0.1, more=0.001)], ids=["4096x11008"])
def test_a_large_weight_is_ordered_soon(occupied):
    """0.3 s on one core of 2024; a comparison of all pairs, or a walk in Python, takes minutes."""
    start = time.process_time()
    gathered(occupied, 64)
    assert time.process_time() - start < 8


# -- the graph -----------------------------------------------------------------------------


def test_the_graph_links_what_is_alike_by_jaccard():
    patterns = np.unique(shuffled_patterns(600, 80, 5, lost=0.05), axis=0)
    graph = similarity_graph(patterns)
    assert graph.number_of_nodes() == len(patterns)
    assert 0 < graph.number_of_edges() <= 6 * len(patterns)
    for one, other, weight in graph.edges(data="weight"):
        both, either = (patterns[one] & patterns[other]).sum(), (patterns[one] | patterns[other]).sum()
        assert weight == both / either
    assert np.median([weight for *_, weight in graph.edges(data="weight")]) > 0.8


def test_the_graph_stays_sparse_where_all_patterns_are_alike():
    ones = np.ones((300, 64), dtype=bool)
    ones[np.arange(300), np.arange(300) % 64] = False
    ones[np.arange(300), np.arange(300) // 64] = False
    assert similarity_graph(np.unique(ones, axis=0)).number_of_edges() <= 6 * 300


def test_the_spanning_order_keeps_clusters_together():
    kinds = shuffled_patterns(400, 80, 4, density=0.3, lost=0.05)
    patterns, rows = np.unique(kinds, axis=0, return_index=True)
    exact = np.random.default_rng(0).random((4, 80)) < 0.3  # as shuffled_patterns drew them
    cluster = (kinds[rows][:, None] & exact[None]).sum(2).argmax(1)
    along = cluster[spanning_order(similarity_graph(patterns))]
    assert (np.diff(along) != 0).sum() == 3


# -- whether it pays -----------------------------------------------------------------------


def test_it_is_taken_where_it_pays():
    occupied = shuffled_patterns(1024, 64, 8)
    order = ReorderRows().row_order(view(occupied))
    assert order is not None
    assert np.array_equal(order, gathered(occupied, 64))


@pytest.mark.parametrize(
    "occupied",
    [
        np.ones((512, 32), dtype=bool),
        np.zeros((512, 32), dtype=bool),
        np.repeat(shuffled_patterns(16, 32, 16), 64, axis=0),
        np.random.default_rng(0).random((1024, 64)) < 0.5,
        np.random.default_rng(0).random((60, 64)) < 0.1,
    ],
    ids=["dense", "nothing", "grouped", "random", "one tile row"],
)
def test_it_is_skipped_where_there_is_nothing_to_gain(occupied):
    assert ReorderRows().row_order(view(occupied)) is None


def test_bytes_decide_and_not_tiles():
    """Half of the tiles go, and with them a twentieth of the bytes: the others are heavy."""
    occupied = shuffled_patterns(1024, 64, 8)

    def payload(order):
        return 1e8 + stored_tiles(occupied if order is None else occupied[order], 64)

    assert ReorderRows().row_order(WeightView(occupied, (64, 64), payload)) is None
    assert ReorderRows().row_order(WeightView(occupied, (64, 64), lambda order: 1e6 if order is None else 1e9)) is None


def test_the_permutation_counts_against_it():
    """4 bytes a row: tiles of one byte cannot pay for that."""
    assert ReorderRows().row_order(view(shuffled_patterns(1024, 64, 8), tile_bytes=1)) is None


def test_the_least_saving_is_an_option():
    occupied = shuffled_patterns(1024, 64, 8)
    gain = 1 - (stored_tiles(occupied[gathered(occupied, 64)], 64) + 0.5) / stored_tiles(occupied, 64)
    for least, taken in [(0.0, True), (gain - 0.01, True), (gain + 0.01, False)]:
        assert (ReorderRows(min_saving=least).row_order(view(occupied)) is not None) == taken


# -- as a pass -----------------------------------------------------------------------------


def test_a_module_is_told_that_a_weight_is_needed():
    with pytest.raises(
        PassError,
        match=r"pass reorder-rows: expected a weight, found a program whose tiles are cut already; run it on the "
        r"weight, stoicc.compile\(weight, pipeline='reorder-rows\{min_saving=0.1\},...'\), or take it out",
    ):
        Pipeline.parse("reorder-rows,drop-empty,build-csr").run(MODULE)


def test_a_module_that_has_it_goes_through():
    made = Pipeline.parse("build-csr").run(MODULE)
    assert made.schedule is not None
    made = replace(made, schedule=replace(made.schedule, applied=("reorder-rows{min_saving=0.1}", "build-csr")))
    again = Pipeline.parse("reorder-rows,drop-empty,build-csr").run(made)
    assert scheduled(again).applied == ("reorder-rows{min_saving=0.1}", "build-csr", "drop-empty", "build-csr")
    assert ReorderRows().apply(made) is made
    with pytest.raises(PassError, match="pass reorder-rows: expected a weight"):
        Pipeline.parse("reorder-rows{min_saving=0.2}").run(made)


def test_it_comes_first():
    with pytest.raises(PassError, match="expected reorder-rows before drop-empty, found it after; move reorder-rows"):
        Pipeline.parse("drop-empty,reorder-rows,build-csr")
    pipeline = Pipeline.ordered(["split-k{parts=2}", "build-csr", "reorder-rows", "drop-empty"])
    assert str(pipeline) == "reorder-rows{min_saving=0.1},drop-empty,build-csr,split-k{parts=2}"
    on_weight, others = pipeline.split()
    assert on_weight == (ReorderRows(),)
    assert str(others) == "drop-empty,build-csr,split-k{parts=2}"


@pytest.mark.parametrize("value", ["1", "-0.1", "nan", "1e400"])
def test_a_wrong_saving_is_named(value):
    with pytest.raises(PassError, match="pass reorder-rows, option min_saving: expected a share of the bytes from 0"):
        parse_pass(f"reorder-rows{{min_saving={value}}}")


def test_a_saving_that_is_no_number_is_named():
    with pytest.raises(PassError, match="pass reorder-rows, option min_saving: expected float, found 'much'"):
        parse_pass("reorder-rows{min_saving=much}")
