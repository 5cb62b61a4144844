"""split-k{parts=balance}: a skewed mosaic shares among threads as well as a uniform one."""

import heapq
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stoicc
from stoicc.ir.schedule import Schedule, item_cost
from stoicc.ir.types import Module, TileProgram
from stoicc.passes import Pipeline, default_pipeline
from stoicc.passes.base import scheduled
from stoicc.passes.costs import csr_costs, row_costs, segment_cost
from tests.ir.modules import make_program, programs
from tests.products import assert_product

DENSE, QUARTER, EMPTY = "dense", "int4<group_size=64>", "empty"
THREADS = range(1, 17)


def mosaic(rows: int, columns: int, dense: set[tuple[int, int]], rest: str = QUARTER) -> TileProgram:
    """A grid of `rows` x `columns` tiles of 64 x 64, dense at those named and `rest` elsewhere."""
    tile_map = [0 if (row, column) in dense else 1 for row in range(rows) for column in range(columns)]
    return make_program((rows * 64, columns * 64), formats=(DENSE, rest), tile_map=tile_map)


def skewed(rows: int, columns: int, rest: str = QUARTER) -> TileProgram:
    """All dense tiles, a row's worth of them, in tile row 3."""
    return mosaic(rows, columns, {(3, column) for column in range(columns)}, rest)


def uniform(rows: int, columns: int, rest: str = QUARTER) -> TileProgram:
    """The same tiles as `skewed`, equally many dense ones in each row."""
    assert columns % rows == 0
    return mosaic(rows, columns, {(tile % rows, tile) for tile in range(columns)}, rest)


def cpu_schedule(program: TileProgram, cores: int = 16) -> Schedule:
    return scheduled(default_pipeline("cpu", cores=cores).run(Module(program)))


def item_loads(program: TileProgram, schedule: Schedule) -> list[float]:
    return [item_cost(item, csr_costs(program, schedule)) for item in schedule.items]


def makespan(program: TileProgram, schedule: Schedule, threads: int) -> float:
    """Bytes of the busiest thread where each takes the next bin when it is free."""
    loads = item_loads(program, schedule)
    busy = [0.0] * threads
    for begin, end in zip(schedule.bin_ptr, schedule.bin_ptr[1:], strict=False):
        heapq.heappush(busy, heapq.heappop(busy) + sum(loads[begin:end]))
    return max(busy)


# -- all of the dense tiles in one tile row --------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "rest"),
    [(64, 64, QUARTER), (64, 192, QUARTER), (128, 128, "nv24"), (64, 256, "int4_nv24"), (64, 1024, EMPTY)],
)
def test_skewed_is_shared_as_well_as_uniform(rows, columns, rest):
    """From 8 MB; what is smaller has fewer parts than it would need, as no part is under 64 KB."""
    apart, alike = skewed(rows, columns, rest), uniform(rows, columns, rest)
    for threads in THREADS:
        for cores in {threads, max(THREADS)}:  # all that a machine has, and some of many
            last = [makespan(program, cpu_schedule(program, cores), threads) for program in (apart, alike)]
            assert last[0] <= 1.1 * last[1]


def test_few_cores_take_fewer_parts():
    program = skewed(64, 1024, EMPTY)
    parts = [cpu_schedule(program, cores).max_parts for cores in (1, 2, 4, 8, 16)]
    assert parts == sorted(parts)
    assert 1 < parts[1] < parts[2] < parts[3] == parts[4]
    assert str(default_pipeline("cpu")) == str(default_pipeline("cpu", cores=os.cpu_count()))


@pytest.mark.parametrize("cores", [0, -1, 2.5])
def test_cores_are_a_whole_number(cores):
    with pytest.raises(stoicc.PassError, match="expected cores, a whole number from 1"):
        default_pipeline("cpu", cores=cores)


def test_whole_rows_would_not_share_so_well():
    """What the split is for: the measure above does tell the two apart."""
    apart, alike = skewed(64, 64), uniform(64, 64)
    pipeline = Pipeline.parse("drop-empty,order{by=cost},build-csr,split-k{parts=1},balance{bins=256}")
    whole = scheduled(pipeline.run(Module(apart)))
    assert makespan(apart, whole, 16) > 1.1 * makespan(alike, cpu_schedule(alike), 16)


def test_only_the_heavy_row_is_cut():
    schedule = cpu_schedule(skewed(64, 64))
    assert {item.row for item in schedule.items if item.parts > 1} == {3}


# -- what stays whole, and what does not -----------------------------------------------------


@pytest.mark.parametrize("text", ["dense", "nv24", QUARTER])
@pytest.mark.parametrize("rows", [43, 64, 100, 448])
def test_equal_rows_stay_whole(rows, text):
    assert cpu_schedule(make_program((rows * 64, 8192), formats=[text])).max_parts == 1


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_a_random_mosaic_stay_whole(seed):
    assert cpu_schedule(make_program((4096, 8192), seed=seed)).max_parts == 1


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_few_rows_are_cut_so_that_all_cores_have_work(rows):
    program = make_program((rows * 64, 65536), formats=["dense"])
    schedule = cpu_schedule(program)
    total = sum(item_loads(program, schedule))
    for threads in THREADS:
        # the last thread to end had started its last item before the others ended
        assert makespan(program, schedule, threads) <= total / threads + max(item_loads(program, schedule))
    assert max(item_loads(program, schedule)) <= 1.25 * total / 128


@pytest.mark.parametrize("shape", [(384, 384), (1536, 384), (384, 1536), (64, 1536)])
def test_small_layers_stay_whole(shape):
    """Up to three times 64 KB a row: a part would be over before its thread has begun."""
    assert cpu_schedule(make_program(shape, formats=["dense"])).max_parts == 1


@given(programs(), st.integers(1, 80), st.sampled_from([1, 2000, 30000]))
def test_items_are_within_bounds(program, min_items, min_bytes):
    text = f"drop-empty,build-csr,split-k{{parts=balance,min_items={min_items},min_bytes={min_bytes}}}"
    schedule = scheduled(Pipeline.parse(text).run(Module(program)))
    rows, loads = row_costs(program, schedule), item_loads(program, schedule)
    grain = max(rows.sum() / min_items / 2, min_bytes)
    # a cut is at the tile nearest to it, so an item is off by half of a tile at either end
    tile = max((segment_cost(program, program.segments[csr.segment]) for csr in schedule.csrs), default=0.0)
    for item, load in zip(schedule.items, loads, strict=True):
        if rows[item.row] <= 3 * grain:
            assert item.parts == 1
        elif item.parts > 1:
            assert load <= 1.25 * grain + tile + 1e-6
            assert item.parts <= rows[item.row] / grain + 0.5
        else:
            assert item.tiles == 1 or rows[item.row] <= 3.5 * grain + 1e-6


def test_row_costs_count_each_tile_of_live_segments():
    program = mosaic(3, 2, {(0, 0), (0, 1), (2, 1)}, EMPTY)
    schedule = scheduled(Pipeline.parse("drop-empty,build-csr").run(Module(program)))
    assert row_costs(program, schedule).tolist() == [2 * 8192, 0, 8192]


# -- the products of a cut kernel ------------------------------------------------------------


@pytest.fixture(scope="module")
def cut_kernel() -> tuple[stoicc.Kernel, torch.Tensor]:
    """A weight with one dense tile row, which alone is cut."""
    weight = torch.zeros(320, 1000)
    generator = torch.Generator().manual_seed(5)
    weight[64:128] = torch.randn(64, 1000, generator=generator)
    weight[:, :64] = torch.randn(320, 64, generator=generator)
    pipeline = (
        "drop-empty,build-csr,split-k{parts=balance,min_items=8,min_bytes=1000},order{by=item},balance,fuse-epilogue"
    )
    return stoicc.compile(weight, pipeline=pipeline, target="cpu"), weight


def test_a_kernel_of_rows_cut_unequally_is_right(cut_kernel):
    kernel, weight = cut_kernel
    assert {item.row for item in kernel.schedule.items if item.parts > 1} == {1}
    for batch in (1, 7):
        x = torch.randn(batch, 1000)
        assert_product(kernel(x), x, weight)
        reference = stoicc.compile(kernel, schedule=kernel.schedule, target="reference")
        assert_product(reference(x), x, weight)


def test_its_results_are_the_same_bits_for_any_thread_count(cut_kernel):
    kernel, x = cut_kernel[0], torch.randn(3, 1000)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(kernel(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
