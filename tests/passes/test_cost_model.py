"""The cost model of a CPU: what must hold whatever the constants, and what follows from round ones."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stoicc
from stoicc.ir.errors import InputError
from stoicc.ir.format import TileCost
from stoicc.ir.registry import REGISTRY
from stoicc.ir.schedule import Regime
from stoicc.ir.types import Module
from stoicc.passes import Pipeline, cost_model
from stoicc.passes.base import scheduled
from stoicc.passes.cost_cpu import CpuCostModel, at, by_size, for_batch, nearest_key
from stoicc.passes.cost_defaults import BUILT_IN
from stoicc.passes.cost_model import PARTS, Prediction, bin_loads, makespan
from stoicc.passes.regimes import CROSSOVER
from tests.ir.modules import make_program, programs
from tests.passes.cost_constants import constants

MODEL = CpuCostModel(constants())
TILES = "drop-empty,build-csr,split-k{{parts={parts}}},balance{{bins={bins}}},fuse-epilogue,regimes{{tiles=100000}}"
DENSE_ONCE = "drop-empty,build-csr,fuse-epilogue,regimes{tiles=0}"


def tiles_of(program, parts=1, bins=256):
    return Pipeline.parse(TILES.format(parts=parts, bins=bins)).run(Module(program))


def seconds(module, batch=1, threads=1, model=MODEL):
    return model.predict(module, batch, "bf16", threads).seconds


# -- predictions -------------------------------------------------------------------------------


@given(programs(), st.integers(1, 300), st.integers(1, 5), st.sampled_from([1, 3]), st.booleans())
def test_parts_are_causes_that_sum_to_the_seconds(program, batch, threads, parts, once):
    module = Pipeline.parse(DENSE_ONCE).run(Module(program)) if once else tiles_of(program, parts)
    found = MODEL.predict(module, batch, "bf16", threads)
    assert tuple(found.parts) == PARTS
    assert min(found.parts.values()) >= 0
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert found.seconds >= MODEL.constants.call[1]
    assert (found.parts["gemm"] > 0) == once


def test_a_prediction_prints_as_one_line_with_the_largest_cause_first():
    assert str(Prediction.of(bytes=3e-6, compute=1e-6)) == "4.0 us: bytes 75%, compute 25%"


@pytest.mark.parametrize(
    ("module", "batch", "threads", "found"),
    [
        (Module(make_program()), 1, 1, "expected a schedule, found none; run a pipeline first"),
        (tiles_of(make_program()), 0, 1, "expected a batch from 1, found 0"),
        (tiles_of(make_program()), 1, 0, "expected threads from 1, found 0"),
    ],
)
def test_what_cannot_be_predicted_is_named(module, batch, threads, found):
    with pytest.raises(InputError, match=found):
        MODEL.predict(module, batch, "bf16", threads)


# -- properties --------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(1, 100), st.sampled_from([1, 2, 4]))
def test_more_bytes_are_never_cheaper(seed, batch, threads):
    """The same tiles, as cheap to multiply, in formats of fewer and of more bytes, and from farther away."""
    few, many = (tiles_of(make_program((640, 900), formats=[name, "empty"], seed=seed)) for name in ("int4", "dense"))
    assert seconds(few, batch, threads) <= seconds(many, batch, threads)
    far = replace(MODEL, beside_bytes=1 << 20)
    assert seconds(many, batch, threads) <= seconds(many, batch, threads, far)


@given(programs(), st.integers(1, 300), st.sampled_from([1, 2, 3]))
def test_more_threads_cost_no_more_than_their_overhead(program, batch, parts):
    module = tiles_of(program, parts)
    for few, many in ((1, 2), (2, 4), (1, 4)):
        first, second = (MODEL.predict(module, batch, "bf16", count) for count in (few, many))
        work, more = (found.seconds - found.parts["overhead"] for found in (first, second))
        assert more <= work * (1 + 1e-9)


@given(st.integers(0, 99), st.sampled_from([2, 4]))
def test_more_imbalance_is_never_cheaper(seed, threads):
    """The same tiles, spread over tile rows or in as few of them as hold them; the same bins joined to one."""
    drawn = np.random.default_rng(seed).integers(0, 2, 144).tolist()
    gathered = sorted(drawn)
    spread, skewed = (
        tiles_of(make_program((768, 768), formats=["dense", "empty"], tile_map=m)) for m in (drawn, gathered)
    )
    total = MODEL.predict(spread, 1, "bf16", 1)
    assert seconds(spread, 1, 1) == pytest.approx(seconds(skewed, 1, 1))
    assert total.parts["imbalance"] == pytest.approx(0, abs=1e-12)
    joined = tiles_of(spread.tiles, bins=1)
    assert seconds(spread, 1, threads) <= seconds(joined, 1, threads) * (1 + 1e-9)
    assert MODEL.predict(joined, 1, "bf16", threads).parts["imbalance"] == pytest.approx(0, abs=1e-12)


def test_one_heavy_tile_row_is_imbalance_and_a_split_mends_it():
    tile_map = np.ones((16, 64), dtype=int)
    tile_map[:, 0] = 0
    tile_map[3] = 0
    program = make_program((1024, 4096), formats=["dense", "empty"], tile_map=tile_map.ravel().tolist())
    whole, cut = tiles_of(program), tiles_of(program, parts=4)
    # 64 of the 79 tiles are one row's, 1 us each
    model = CpuCostModel(constants(bandwidth=1e12))
    one, four = (model.predict(module, 1, "bf16", 4) for module in (whole, cut))
    assert one.parts["imbalance"] == pytest.approx(64e-6 - 79e-6 / 3.4, rel=0.1)
    assert four.parts["imbalance"] < one.parts["imbalance"] / 4
    assert four.seconds < 0.7 * one.seconds
    assert four.parts["reduction"] > one.parts["reduction"] == 0
    assert seconds(cut, 1, 1, model) > seconds(whole, 1, 1, model)


@given(st.lists(st.floats(0, 1e3), max_size=40), st.integers(1, 9))
def test_the_last_worker_ends_between_an_even_share_and_the_whole(loads, workers):
    last = makespan(loads, workers)
    assert max([sum(loads) / workers, *loads]) <= last * (1 + 1e-9) + 1e-9
    assert last <= sum(loads) * (1 + 1e-9)
    assert makespan(loads, workers + 1) <= last * (1 + 1e-9)


def test_workers_take_the_next_load_when_they_are_free():
    assert makespan([3, 1, 1, 1, 2], 2) == 5
    assert makespan([2, 3, 1, 1, 1], 2) == 4


def test_many_bins_end_closer_together_than_few():
    program, model = make_program((4096, 640), formats=["dense"]), CpuCostModel(constants(bandwidth=1e12))
    apart = [model.predict(tiles_of(program, bins=bins), 1, "bf16", 2).parts["imbalance"] for bins in (4, 16, 64)]
    assert apart[0] == pytest.approx(apart[1])  # 4%, then half a bin
    assert apart[1] > 2 * apart[2] > 0
    assert model.predict(tiles_of(program, bins=16), 1, "bf16", 1).parts["imbalance"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("bandwidth", [1e9, 1e12, float("inf")])
@pytest.mark.parametrize("threads", [1, 2, 5, 8])
def test_imbalance_is_never_negative(bandwidth, threads):
    for bins in (1, 4, 64):
        module = tiles_of(make_program((512, 768), formats=["dense"]), bins=bins)
        found = CpuCostModel(constants(bandwidth=bandwidth)).predict(module, 8, "f32", threads)
        assert found.parts["imbalance"] >= 0
        assert found.seconds == pytest.approx(sum(found.parts.values()))


def test_bins_sum_their_items():
    schedule = scheduled(tiles_of(make_program((640, 64), formats=["dense"]), bins=4))
    loads = np.arange(10.0)
    sums = [loads[a:b].sum() for a, b in zip(schedule.bin_ptr, schedule.bin_ptr[1:], strict=False)]
    assert bin_loads(schedule, loads).tolist() == sums


# -- constants ---------------------------------------------------------------------------------


def test_tiles_cost_what_was_measured():
    module = tiles_of(make_program((64, 640), formats=["dense"]))
    near = replace(MODEL, constants=replace(constants(), bandwidth={1: {1 << 30: 1.0}}))  # all in cache
    found = near.predict(module, 4, "bf16", 1)
    assert found.parts["bytes"] == 0
    assert found.parts["compute"] == pytest.approx(10 * 2e-6 + 64 * for_batch(constants().items["bf16"], 4))
    assert near.predict(module, 128, "bf16", 1).parts["compute"] == pytest.approx(10 * 32e-6 + 64 * 8e-9)


def test_bytes_are_waited_for_as_far_as_they_are_exposed():
    module = tiles_of(make_program((64, 640), formats=["dense"]))
    work = {
        share: seconds(module, model=CpuCostModel(constants(exposed=share, tile=1e-5))) for share in (0.0, 0.5, 1.0)
    }
    nbytes = 10 * 64 * 64 * 2
    reading = nbytes / by_size(constants().bandwidth[1], nbytes)
    assert work[1.0] - work[0.5] == pytest.approx(reading / 2)
    # hidden behind 100 us of arithmetic, which a slower memory outlasts
    assert work[0.5] - work[0.0] == pytest.approx(reading / 2)
    slow = CpuCostModel(constants(exposed=0.0, bandwidth=1e8))
    assert slow.predict(module, 1, "bf16", 1).parts["bytes"] == pytest.approx(
        nbytes / by_size(constants(bandwidth=1e8).bandwidth[1], nbytes)
    )


def test_other_tile_shapes_and_options_take_the_nearest_measured():
    known = constants().tiles
    assert nearest_key(("int4<group_size=32>", "bf16", 128, 64), known) == ("int4", "bf16", 64, 64)
    assert nearest_key(("nv24", "f16", 64, 64), known)[0] == "nv24"
    whole = tiles_of(make_program((512, 512), formats=["dense"]))
    small = tiles_of(make_program((512, 512), (32, 32), formats=["dense"]))
    assert seconds(small) == pytest.approx(seconds(whole), rel=1e-6)


@dataclass(frozen=True)
class Costly(stoicc.TileFormat):
    """A format that nobody measured, of ten times the multiply-adds of dense."""

    name: ClassVar[str] = "costly"

    def planes(self, tile, dtype):
        return (stoicc.Plane("values", dtype, tile),)

    def encode(self, tiles):
        return {"values": tiles}

    def decode(self, planes, tile, dtype):
        return planes["values"]

    def cost(self, tile, dtype):
        return TileCost(tile[0] * tile[1] * 2, macs=10.0 * tile[0] * tile[1])


@pytest.fixture
def costly():
    yield stoicc.register_format(Costly())
    REGISTRY.unregister("costly")


def test_a_new_format_is_estimated_from_its_cost(costly):
    dense, other = (tiles_of(make_program((640, 640), formats=[name])) for name in ("dense", "costly"))
    model = CpuCostModel(constants(bandwidth=1e12))
    compute = [model.predict(module, 1, "bf16", 1).parts["compute"] for module in (dense, other)]
    assert 8 * compute[0] < compute[1] < 12 * compute[0]


def test_a_new_format_is_measured_once_when_it_is_met(costly):
    asked = []

    def measure(fmt, dtype, tile):
        asked.append((str(fmt), dtype, tile))
        key = (str(fmt), dtype, *tile)
        return model.constants.joined({key: {1: 1.0}}, {}, {key: 1e-9})

    model = CpuCostModel(constants(), measure)
    module = tiles_of(make_program((64, 64), formats=["costly"]))
    assert seconds(module, model=model) > 1.0
    assert seconds(module, 2, model=model) > 1.0
    assert asked == [("costly", "bf16", (64, 64))]


def test_a_format_that_cannot_be_measured_is_asked_for_once(costly):
    asked = []
    model = CpuCostModel(constants(), lambda *key: asked.append(key))
    module = tiles_of(make_program((64, 64), formats=["costly"]))
    assert seconds(module, model=model) == seconds(module, model=model)
    assert len(asked) == 1


def test_curves_are_lines_between_what_was_measured():
    assert [at({1: 2.0, 3: 4.0}, point) for point in (0, 1, 2, 3, 9)] == [2, 2, 3, 4, 4]
    assert for_batch({1: 2.0, 4: 4.0}, 8) == 8
    assert by_size({1 << 10: 1.0, 1 << 20: 3.0}, 1 << 15) == pytest.approx(2.0)


def test_built_in_constants_say_so_and_know_every_builtin_format():
    assert BUILT_IN.source == "built-in"
    module = tiles_of(make_program((640, 640), formats=["dense", "nv24", "int4", "int8", "int4_nv24", "empty"]))
    times = [CpuCostModel(BUILT_IN).predict(module, batch, "bf16", 2).seconds for batch in (1, 16, 64, 256)]
    assert times == sorted(times)
    assert 1e-6 < times[0] < 1e-2


# -- crossover and the regimes pass ------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """Lets a test say which model the device has."""

    def install(model, threads=1):
        monkeypatch.setitem(cost_model._PROVIDERS, "cpu", lambda: (model, threads))

    return install


@pytest.mark.parametrize(("gemm", "batch"), [(1e-15, 0), (1e-6, 4096)])
def test_the_crossover_follows_the_blas(gemm, batch):
    module = tiles_of(make_program((640, 640), formats=["dense"]))
    assert CpuCostModel(constants(gemm=gemm, tile=1e-4)).crossover(module) == batch


def test_the_crossover_is_where_dense_once_overtakes():
    module = tiles_of(make_program((640, 640), formats=["dense"]))
    model = CpuCostModel(constants(gemm=2e-11))
    batch = model.crossover(module)
    assert 1 < batch < 4096
    once = Pipeline.parse(DENSE_ONCE).run(module)
    assert seconds(module, batch, model=model) <= 1.15 * seconds(once, batch, model=model)
    assert seconds(module, 2 * batch, model=model) > 1.15 * seconds(once, 2 * batch, model=model)


def test_regimes_take_the_measured_crossover_of_this_matrix(measured):
    model = CpuCostModel(constants(gemm=2e-11))
    measured(model, threads=2)
    text = "drop-empty,build-csr,regimes{tiles=auto}"
    module = Pipeline.parse(text).run(Module(make_program((640, 640), formats=["dense"])))
    batch = model.crossover(module, 2)
    assert scheduled(module).regimes == (Regime("tiles", batch), Regime("dense-once"))
    assert batch != 64
    mostly_empty = Module(make_program((640, 640), formats=["dense", "empty"], tile_map=[0] * 10 + [1] * 90))
    assert (scheduled(Pipeline.parse(text).run(mostly_empty)).regimes[0].max_batch or 0) > batch


def test_regimes_keep_their_table_where_nothing_was_measured_or_nothing_can_be_predicted(measured):
    program = make_program((640, 640), formats=["dense"])
    table = (Regime("tiles", CROSSOVER["bf16"]), Regime("dense-once"))
    assert scheduled(Pipeline.parse("drop-empty,build-csr,regimes").run(Module(program))).regimes == table
    measured(CpuCostModel(constants(gemm=1e-6)))
    assert scheduled(Pipeline.parse("regimes").run(Module(program))).regimes == table  # no csrs yet


def test_dense_once_alone_where_tiles_never_pay(measured):
    measured(CpuCostModel(constants(gemm=1e-15, tile=1e-4)))
    module = Pipeline.parse("drop-empty,build-csr,regimes").run(Module(make_program((640, 640), formats=["dense"])))
    assert scheduled(module).regimes == (Regime("dense-once"),)


def test_x_that_no_cache_holds_is_read_again_by_every_tile():
    """256 entries of 4096 columns are 4 MB; a tile's 64 columns of them take 64 KB from memory, on top of its work."""
    held, large = (tiles_of(make_program((64, columns), formats=["dense"], dtype="f32")) for columns in (64, 4096))
    model = CpuCostModel(replace(constants(), bandwidth={1: {1 << 20: 1e10, 1 << 30: 1e10}}))
    small, wide = (model.predict(module, 256, "f32", 1).parts["compute"] for module in (held, large))
    items = 64 * for_batch(model.constants.items["f32"], 256)
    assert wide - items == pytest.approx(64 * (small - items + 4 * 256 * 64 / 1e10))
    shared = tiles_of(make_program((64, 4096), formats=["dense"]))
    again = model.predict(shared, 256, "bf16", 1).parts["compute"]
    assert again - 64 * for_batch(model.constants.items["bf16"], 256) == pytest.approx(64 * (small - items))


def test_tiles_run_on_no_more_threads_than_the_schedule_says():
    module = tiles_of(make_program((640, 640), formats=["dense"]))
    capped = Module(module.tiles, scheduled(module).launch_with(threads=1))
    assert seconds(capped, 64, 4) == pytest.approx(seconds(module, 64, 1))
    assert seconds(module, 64, 4) < seconds(module, 64, 1)
