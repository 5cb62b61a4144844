"""Each pass on small modules: what it prints, and what must hold whatever the module."""

import copy
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoicc.ir import PassError, verify, verify_runnable
from stoicc.ir.schedule import Regime, TileCsc, Transposed, item_cost
from stoicc.ir.types import Module
from stoicc.passes import Pipeline, WeightPass, default_pipeline, find_pass, initial_schedule, parse_pass, pass_names
from stoicc.passes.base import scheduled
from stoicc.passes.costs import csr_costs, tile_costs
from tests.ir.modules import MOSAIC, full_beside, make_program, modules, pipelines, programs

SHAPE = (200, 300)
MODULE = Module(make_program(SHAPE, beside=full_beside(SHAPE)))
EMPTY = Module(make_program(SHAPE, formats=["empty"], beside=full_beside(SHAPE)))
BEFORE = {"split-k": "build-csr,", "balance": "build-csr,split-k{parts=3},"}
STEPS = ["split-k{parts=2}", "split-k{parts=auto,min_items=10}", "split-k{parts=balance,min_items=6,min_bytes=8192}"]
STEPS += ["balance{bins=3}", "order{by=cost}", "order{by=item}", "order{by=row}", "order{by=none}", "drop-empty"]
STEPS += ["build-csr", "fuse-epilogue", "regimes{tiles=16}", "regimes{tiles=0}"]
STEPS += ["launch{block_n=32,num_stages=3}", "build-csc{bins=3}"]


def run(text: str, module: Module = MODULE) -> Module:
    return Pipeline.parse(text).run(module)


def columns_of(module: Module) -> Transposed:
    transposed = scheduled(module).transposed
    assert transposed is not None
    return transposed


@pytest.mark.parametrize("step", STEPS)
def test_pass_prints(step, golden):
    golden(str(scheduled(run(BEFORE.get(step.partition("{")[0], "") + step))))


def test_every_pass_has_a_golden_text():
    named = {step.partition("{")[0] for step in STEPS}
    assert named == {name for name in pass_names() if not issubclass(find_pass(name), WeightPass)}


@given(modules())
def test_passes_leave_their_input_as_it_was(module):
    before = copy.deepcopy(module)
    for step in default_pipeline("triton").passes[:3]:
        step.apply(module)
    default_pipeline("triton").run(module)
    assert module == before


@given(programs(), pipelines())
def test_the_same_input_gives_the_same_schedule(program, pipeline):
    assert pipeline.run(Module(program)) == pipeline.run(Module(program))


def test_initial_schedule_has_all_segments_and_rows():
    schedule = initial_schedule(MODULE.tiles)
    assert (schedule.live, schedule.row_order) == ((0, 1, 2, 3), (0, 1, 2, 3))
    verify(replace(MODULE, schedule=schedule))


# -- drop-empty ----------------------------------------------------------------------------


def test_drop_empty_drops_what_stores_nothing_at_any_time():
    early, late = run("drop-empty,build-csr,split-k{parts=2}"), run("build-csr,split-k{parts=2},drop-empty")
    assert scheduled(early).live == scheduled(late).live == (0, 1, 2)
    assert scheduled(early).csrs == scheduled(late).csrs


# -- order ---------------------------------------------------------------------------------


def test_order_by_cost_puts_the_heaviest_row_first():
    module = run("order{by=cost},build-csr")
    loads = tile_costs(MODULE.tiles).sum(1)
    assert np.all(np.diff(loads[list(scheduled(module).row_order)]) <= 0)
    assert [item.row for item in scheduled(module).items] == list(scheduled(module).row_order)


def test_order_keeps_rows_of_equal_cost_in_place():
    module = Module(make_program((320, 64), formats=["dense"]))
    assert scheduled(run("order{by=cost}", module)).row_order == (0, 1, 2, 3, 4)


def test_order_after_the_items_moves_them():
    moved = scheduled(run("build-csr,split-k{parts=2},order{by=cost}"))
    assert moved.items == scheduled(run("order{by=cost},build-csr,split-k{parts=2}")).items


def test_order_by_item_puts_rows_that_are_cut_where_their_parts_belong():
    program = make_program((192, 640), formats=["dense", "int4"], tile_map=[0] * 10 + [1] * 20)
    module = run("build-csr,split-k{parts=balance,min_items=4,min_bytes=1}", Module(program))
    assert [item.parts for item in scheduled(module).items if item.row == 0] == [5] * 5
    assert scheduled(run("order{by=cost}", module)).row_order == (0, 1, 2)
    assert scheduled(run("order{by=item}", module)).row_order == (1, 2, 0)
    assert scheduled(run("order{by=item}", Module(program))).row_order == (0, 1, 2)


def test_order_by_item_keeps_rows_of_about_equal_size_in_place():
    columns = 16
    held = (8, 9, 7, 16, 0, 10, 8, 3)  # dense tiles of each row; 7.6 in the mean
    tile_map = [0 if column < count else 1 for count in held for column in range(columns)]
    module = Module(make_program((64 * len(held), 64 * columns), formats=["dense", "empty"], tile_map=tile_map))
    assert scheduled(run("order{by=item}", module)).row_order == (3, 0, 1, 2, 5, 6, 7, 4)
    assert scheduled(run("build-csr,order{by=item}", module)).row_order == (3, 0, 1, 2, 5, 6, 7, 4)
    assert scheduled(run("order{by=cost}", module)).row_order == (3, 5, 1, 0, 6, 2, 7, 4)


def test_order_by_item_of_a_weight_of_nothing():
    module = Module(make_program((192, 64), formats=["empty"]))
    assert scheduled(run("order{by=item}", module)).row_order == (0, 1, 2)


def test_order_by_row_undoes_by_cost_and_none_keeps_it():
    assert scheduled(run("order{by=cost},order{by=row}")).row_order == (0, 1, 2, 3)
    assert scheduled(run("order{by=cost},order{by=none}")).row_order == scheduled(run("order{by=cost}")).row_order


def test_costs_follow_the_bytes_of_each_tile():
    program = make_program((128, 64), formats=["dense"], tile_map=[0, 0])
    light, heavy = 10, 8192
    sized = replace(program, segments=(replace(program.segments[0], tile_bytes=(light, heavy)),))
    assert tile_costs(program).tolist() == [[8192.0], [8192.0]]
    assert tile_costs(sized).tolist() == [[light], [heavy]]
    assert scheduled(run("order{by=cost}", Module(sized))).row_order == (1, 0)
    assert csr_costs(sized, scheduled(run("build-csr", Module(sized)))) == [(light + heavy) / 2]


# -- build-csr, split-k, balance -----------------------------------------------------------


@given(programs(), st.sampled_from([1, 2, 3, 7, 100]))
def test_split_k_covers_every_tile_once(program, parts):
    module = run(f"drop-empty,build-csr,split-k{{parts={parts}}}", Module(program))
    schedule, tile_map = scheduled(module), program.map_array()
    seen = Counter(
        (item.row, csr.col_idx[tile], csr.segment)
        for item in schedule.items
        for csr, (begin, end) in zip(schedule.csrs, item.ranges, strict=True)
        for tile in range(begin, end)
    )
    live = np.argwhere(np.isin(tile_map, schedule.live))
    assert seen == Counter((row, column, tile_map[row, column]) for row, column in live.tolist())
    assert schedule.max_parts <= parts
    assert Counter(item.row for item in schedule.items).keys() == set(range(program.grid[0]))


def test_more_parts_than_tiles_gives_a_part_per_tile():
    module = Module(make_program((64, 320), formats=["dense"]))
    items = scheduled(run("build-csr,split-k{parts=100}", module)).items
    assert [item.ranges for item in items] == [((tile, tile + 1),) for tile in range(5)]


def test_parts_have_about_equal_bytes():
    module = run("drop-empty,build-csr,split-k{parts=8}", Module(make_program((64, 64 * 400))))
    costs = csr_costs(module.tiles, scheduled(module))
    loads = [item_cost(item, costs) for item in scheduled(module).items]
    assert len(loads) == 8
    assert max(loads) - min(loads) <= 2 * max(costs)


@pytest.mark.parametrize(("min_items", "parts"), [(1, 1), (4, 1), (5, 2), (12, 3), (1000, 5)])
def test_auto_parts_are_the_fewest_that_give_the_items(min_items, parts):
    module = Module(make_program((256, 320), formats=["dense"]))
    assert scheduled(run(f"build-csr,split-k{{parts=auto,min_items={min_items}}}", module)).max_parts == parts


def test_one_part_undoes_a_split():
    assert scheduled(run("build-csr,split-k{parts=3},split-k{parts=1}")).items == scheduled(run("build-csr")).items


@given(programs(), st.integers(1, 20), st.sampled_from([1, 3]))
def test_bins_are_about_even(program, bins, parts):
    module = run(f"drop-empty,build-csr,split-k{{parts={parts}}},balance{{bins={bins}}}", Module(program))
    schedule, costs = scheduled(module), csr_costs(module.tiles, scheduled(module))
    loads = [item_cost(item, costs) for item in schedule.items]
    held = [sum(loads[begin:end]) for begin, end in zip(schedule.bin_ptr, schedule.bin_ptr[1:], strict=False)]
    assert 1 <= len(held) <= bins
    assert sum(held) == pytest.approx(sum(loads))
    # an item is never cut: a bin is off by half of one item at either end
    assert max(held) <= sum(loads) / bins + max(loads) + 1e-6


# -- fuse-epilogue, regimes ----------------------------------------------------------------


@given(programs())
def test_build_csc_finds_the_tiles_of_every_column(program):
    transposed = columns_of(run("drop-empty,build-csc{bins=4}", Module(program)))
    found = np.full(program.grid, -1)
    for csc in transposed.cscs:
        columns = np.repeat(np.arange(program.grid[1]), np.diff(csc.col_ptr))
        place = np.argwhere(program.map_array() == csc.segment)  # payload order
        assert np.array_equal(place[list(csc.tiles)], np.stack([csc.row_idx, columns], 1))
        found[csc.row_idx, columns] = csc.segment
    stores = np.isin(program.map_array(), [csc.segment for csc in transposed.cscs])
    assert np.array_equal(found[stores], program.map_array()[stores])
    assert len(transposed.bin_ptr) <= 5


def test_build_csc_runs_the_heaviest_column_first():
    program = make_program((64, 192), formats=["dense", "nv24"], tile_map=[1, 0, 1])
    assert scheduled(run("build-csc{bins=2}", Module(program))).transposed == Transposed(
        (1, 0, 2), (TileCsc(0, (0, 0, 1, 1), (0,), (0,)), TileCsc(1, (0, 1, 1, 2), (0, 0), (0, 1))), (0, 1, 3)
    )


def test_drop_empty_drops_columns_lists_of_what_stores_nothing():
    again = run("drop-empty", run("build-csr,build-csc"))
    assert [csc.segment for csc in columns_of(again).cscs] == [0, 1, 2]


def test_fuse_epilogue_takes_what_is_there():
    beside = replace(full_beside(SHAPE), low_rank=None, input_scale=None)
    schedule = scheduled(run("fuse-epilogue", Module(make_program(SHAPE, beside=beside))))
    assert schedule.prologue == ("column_permutation",)
    assert schedule.epilogue == ("output_scale", "bias", "activation", "row_permutation")
    bare = scheduled(run("fuse-epilogue", Module(make_program())))
    assert bare.prologue == bare.epilogue == ()


@pytest.mark.parametrize(("dtype", "batch"), [("bf16", 2048), ("f16", 1024), ("f32", 1024)])
def test_regimes_know_the_crossover_of_a_dtype(dtype, batch):
    program = make_program((20, 30), dtype=dtype)
    assert scheduled(run("regimes", Module(program))).regimes[0] == Regime("tiles", batch)


def test_regimes_replace_those_that_were_set():
    schedule = scheduled(run("regimes{tiles=64},regimes{tiles=8}"))
    assert schedule.regimes == (Regime("tiles", 8), Regime("dense-once"))
    assert [schedule.regime(batch) for batch in (1, 8, 9)] == ["tiles", "tiles", "dense-once"]


# -- a matrix of nothing -------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cpu", "triton", "reference"])
def test_empty_matrix_keeps_an_item_per_row_for_its_epilogue(target):
    module = default_pipeline(target).run(EMPTY)
    verify_runnable(module)
    assert (scheduled(module).live, scheduled(module).csrs) == ((), ())
    assert [(item.row, item.parts, item.ranges) for item in scheduled(module).items] == [(r, 1, ()) for r in range(4)]
    assert scheduled(module).epilogue[-1] == "row_permutation"


@given(pipelines())
def test_empty_matrix_goes_through_every_pipeline(pipeline):
    assert {item.row for item in scheduled(pipeline.run(EMPTY)).items} == {0, 1, 2, 3}


def test_empty_rows_among_others_keep_their_item():
    tile_map = [3] * 5 + [0] * 15
    module = run("drop-empty,build-csr,split-k{parts=4}", Module(make_program(formats=MOSAIC, tile_map=tile_map)))
    assert [item.parts for item in scheduled(module).items if item.row == 0] == [1]


# -- options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "order{by=size}",
            "pass order, option by: expected cost or item or row or none, found 'size'",
        ),
        ("order{of=cost}", "pass order: expected one of the options by, found 'of'; correct the name"),
        ("drop-empty{by=cost}", "pass drop-empty: expected no options, found 'by'"),
        ("split-k{parts=0}", "pass split-k, option parts: expected auto, balance or a whole number from 1, found '0'"),
        ("split-k{parts=many}", "pass split-k, option parts: expected int or auto or balance, found 'many'"),
        ("split-k{min_items=0}", "pass split-k, option min_items: expected a whole number from 1, found '0'"),
        ("split-k{min_bytes=0}", "pass split-k, option min_bytes: expected a whole number from 1, found '0'"),
        ("balance{bins=0}", "pass balance, option bins: expected a whole number from 1, found '0'"),
        ("build-csc{bins=0}", "pass build-csc, option bins: expected a whole number from 1, found '0'"),
        ("balance{bins=2.5}", "pass balance, option bins: expected int, found '2.5'"),
        ("regimes{tiles=-1}", "pass regimes, option tiles: expected auto or a batch size from 0, found '-1'"),
        ("order{cost}", "pass order: expected option=value, found 'cost'; correct the text"),
        ("order{by=cost,by=row}", "pass order: expected every option once, found 'by' twice"),
    ],
)
def test_wrong_option_is_named(text, message):
    with pytest.raises(PassError, match=message):
        parse_pass(text)
