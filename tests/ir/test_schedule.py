"""Schedule primitives: what they refuse, and how a row is cut."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoicc.ir import InputError
from stoicc.ir.schedule import cut_evenly
from stoicc.ir.types import Module
from stoicc.passes import Pipeline
from tests.ir.modules import make_program

_MODULE = Pipeline.parse("build-csr").run(Module(make_program()))
assert _MODULE.schedule is not None
SCHEDULE = _MODULE.schedule  # 4 csrs, 4 tile rows


@pytest.mark.parametrize("value", ["a", 2.5, True, None, 0, -3, 10**18, 10**400])
@pytest.mark.parametrize("what", ["split_k", "balance", "executor"])
def test_numbers_are_whole_and_from_one(what, value):
    if what == "executor" and value is None:
        assert SCHEDULE.executor("tiles", value).regimes[-1].max_batch is None
        return
    call = (lambda n: SCHEDULE.executor("tiles", n)) if what == "executor" else getattr(SCHEDULE, what)
    with pytest.raises(InputError, match=rf"schedule\.{what}: expected \w+ to be a whole number from 1, found"):
        call(value)


@pytest.mark.parametrize("parts", [[], [1, 2, 3], [1] * 5, [1, 1, 1, 0], [1, 2.5, 1, 1], (1, True, 1, 1), ["a"] * 4])
def test_parts_are_one_number_a_row(parts):
    with pytest.raises(InputError, match=r"schedule\.split_k: expected parts from 1 for each of 4 tile rows, found"):
        SCHEDULE.split_k(parts)


def test_rows_are_cut_as_each_is_told():
    cut = SCHEDULE.order([3, 1, 0, 2]).split_k([1, 4, 1, 2])
    assert [(item.row, item.part, item.parts) for item in cut.items] == [
        *((3, part, 2) for part in range(2)),
        *((1, part, 4) for part in range(4)),
        (0, 0, 1),
        (2, 0, 1),
    ]
    whole = {item.row: item.ranges for item in SCHEDULE.items}
    assert [item.ranges for item in cut.items if item.parts == 1] == [whole[0], whole[2]]
    assert [item for item in cut.items if item.row == 1] == [i for i in SCHEDULE.split_k(4).items if i.row == 1]


@pytest.mark.parametrize(
    "costs", [[], [1.0], [1.0] * 5, [1, 1, 1, -1], [1, 1, 1, float("nan")], ["a"] * 4, 3, [1e300] * 4]
)
def test_costs_are_one_number_a_csr(costs):
    for cut in (SCHEDULE.split_k, SCHEDULE.balance):
        with pytest.raises(InputError, match=r"expected a cost of 0 or more for each of 4 csrs, found"):
            cut(2, costs)


@pytest.mark.parametrize(
    "rows", [["a", "b", "c", "d"], [0.0, 1.0, 2.0, 3.0], [0, 1, 2], [0, 1, 2, 10**30], [False, True, 2, 3]]
)
def test_an_order_is_a_permutation(rows):
    with pytest.raises(InputError, match=r"schedule\.order: expected a permutation of 4 tile rows"):
        SCHEDULE.order(rows)


@pytest.mark.parametrize("value", ["a", 2.5, True, None, -1, 0, 8, 24, 512, [16]])
def test_launch_parameters_are_those_that_kernels_take(value):
    with pytest.raises(InputError, match="expected block_n to be one of 16, 32, 64, 128, 256, found"):
        SCHEDULE.launch_with(block_n=value)


@pytest.mark.parametrize(("name", "value"), [("num_warps", 3), ("num_warps", 32), ("num_stages", 0), ("num_stages", 9)])
def test_warps_and_stages_have_limits(name, value):
    with pytest.raises(InputError, match=f"expected {name} to be one of 1, 2, .*, found {value}; give one of them"):
        SCHEDULE.launch_with(**{name: value})


def test_other_launch_parameters_are_refused():
    known = "block_n, gluon, num_stages, num_warps, prologue, threads, wgmma"
    with pytest.raises(InputError, match=f"expected {known}, found 'bogus'; name one of them"):
        SCHEDULE.launch_with(bogus=3)


def test_very_many_parts_cost_nothing():
    start = time.perf_counter()
    pipeline = Pipeline.parse(f"drop-empty,build-csr,split-k{{parts={10**17}}},balance{{bins={10**17}}}")
    schedule = pipeline.run(Module(make_program())).schedule
    assert time.perf_counter() - start < 1
    assert schedule is not None
    assert {item.tiles for item in schedule.items} == {1}
    assert schedule.bin_ptr == tuple(range(len(schedule.items) + 1))


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 20))
def test_cuts_are_where_the_middles_change_part(loads, parts):
    """As said in exact fractions: entry i is in part floor(parts * middle / total)."""
    total, part_of = sum(loads), []
    for index, load in enumerate(loads):
        doubled = 2 * sum(loads[:index]) + load
        part_of.append(min(parts * doubled // (2 * total), parts - 1) if total else 0)
    inner = [i for i in range(1, len(loads)) if part_of[i] != part_of[i - 1]]
    assert cut_evenly(np.array(loads, dtype=float), parts) == ((0, *inner, len(loads)) if loads else (0,))
