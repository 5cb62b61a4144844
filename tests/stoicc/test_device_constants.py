"""Constants of a device: measured once, stored, loaded, damaged, and what compile makes of them."""

import json
import threading
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import stoicc
from stoicc import calibration, calibration_timing, device_constants
from stoicc.device_constants import constants_file, cost_model, from_json, load_constants, to_json
from stoicc.gpu_model import find_gpu
from stoicc.ir.errors import InputError
from stoicc.ir.format import Planes, Tile
from stoicc.ir.registry import REGISTRY, find_format
from stoicc.passes.cost_cpu import CpuConstants, CpuCostModel
from stoicc.passes.cost_defaults import BUILT_IN
from stoicc.passes.cost_gpu import GpuCostModel
from stoicc.passes.cost_model import provided
from tests.passes.cost_constants import constants

DEVICE = from_json(to_json(constants(gemm=2e-11)))
"""To four digits, as a file holds them."""


def cpu_model(measure: bool = True) -> CpuCostModel:
    model = cost_model("cpu", measure=measure)
    assert isinstance(model, CpuCostModel)
    return model


def stored() -> CpuConstants:
    """What the store holds, parsed anew."""
    device_constants._LOADED.clear()
    found = load_constants()
    assert found is not None
    return found


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store of its own, in which measuring is allowed."""
    monkeypatch.setenv("STOICC_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("STOICC_CALIBRATION", "on")
    return tmp_path


@pytest.fixture
def measured(store, monkeypatch):
    """Counts measurements of the device, which take no time."""
    calls = []

    def calibrate(step):
        calls.append(step("everything"))
        return DEVICE

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    return calls


def test_a_device_is_measured_once_and_loaded_afterwards(measured):
    first = cpu_model()
    assert first.constants == DEVICE
    assert cpu_model().constants == cpu_model(measure=False).constants == stored() == first.constants
    assert len(measured) == 1


def test_calibrate_measures_anew(measured):
    cost_model("cpu")
    device_constants.calibrate(quiet=True)
    assert len(measured) == 2


def test_nothing_is_measured_where_it_is_not_wanted(measured, monkeypatch):
    assert cpu_model(measure=False).constants.source == "built-in"
    monkeypatch.setenv("STOICC_CALIBRATION", "off")
    assert cpu_model().constants is BUILT_IN
    assert measured == []


def test_two_that_start_together_measure_once(store, monkeypatch):
    calls, found = [], []

    def slow(step):
        calls.append(step)
        time.sleep(0.3)
        return DEVICE

    monkeypatch.setattr(calibration, "calibrate", slow)
    monkeypatch.setattr(device_constants, "_measure_and_store", quietly(device_constants._measure_and_store))
    both = [threading.Thread(target=lambda: found.append(cpu_model().constants)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert (len(calls), found) == (1, [DEVICE] * 2)


def quietly(function):
    """Without a progress bar, of which there can be one at a time."""
    return lambda path, quiet: function(path, True)


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"constants": {}}', '{"constants": 3}', "cut", "negative"],
)
def test_a_damaged_file_is_reported_set_aside_and_rebuilt(measured, damage):
    cost_model("cpu")
    path = constants_file()
    whole = path.read_text("utf-8")
    cut = whole[: len(whole) // 2]
    negative = whole.replace('"1": 1e-05', '"1": -1e-05')
    assert negative != whole
    path.write_text({"cut": cut, "negative": negative}.get(damage, damage), "utf-8")
    device_constants._LOADED.clear()
    with pytest.warns(RuntimeWarning, match=r"expected what stoicc measured, as JSON, found .*set aside as .*damaged"):
        assert cpu_model().constants == DEVICE
    assert len(measured) == 2
    assert path.read_text("utf-8") == whole
    assert len(list(path.parent.glob("*.damaged"))) == 1


def test_the_file_is_json_that_one_can_read_and_names_what_it_holds_for(measured):
    cost_model("cpu")
    held = json.loads(constants_file().read_text("utf-8"))
    assert set(held["key"]) == {"device", "isa", "threads", "torch", "stoicc", "kernels"}
    assert held["key"]["threads"] == torch.get_num_threads()
    assert held["constants"]["tiles"]["int4|bf16|64x64"]["16"] == 4e-6
    assert from_json(to_json(DEVICE)) == DEVICE


@pytest.mark.parametrize("what", ["device_name", "kernel_hash"])
def test_another_device_or_other_kernels_need_a_measurement_of_their_own(measured, monkeypatch, what):
    cost_model("cpu")
    monkeypatch.setattr(device_constants, what, lambda: "another")
    assert load_constants() is None
    cost_model("cpu")
    assert len(measured) == 2


def test_a_format_that_is_met_later_joins_the_file(measured, monkeypatch):
    met = []

    def measure_format(fmt, dtype, tile, known):
        met.append(str(fmt))
        return known.joined({(str(fmt), dtype, *tile): {1: 1e-6}}, {}, {})

    monkeypatch.setattr(calibration, "measure_format", measure_format)
    kernel = stoicc.compile(torch.randn(64, 64).bfloat16(), formats=["dense"], tile=(32, 32), target="cpu")
    cost_model("cpu").predict(kernel.ir, 1, "bf16")
    assert ("dense", "bf16", 32, 32) in stored().tiles
    cost_model("cpu").predict(kernel.ir, 1, "bf16")
    assert met == ["dense"]


def test_compile_takes_the_crossover_of_a_calibrated_device(measured):
    weight = torch.randn(512, 512)
    table = stoicc.compile(weight, target="cpu").schedule.regimes
    model = cost_model("cpu")
    kernel = stoicc.compile(weight, target="cpu")
    batch = model.crossover(kernel.ir, torch.get_num_threads())
    assert kernel.schedule.regimes[0].max_batch == batch != table[0].max_batch


def test_a_folder_that_cannot_be_made_leaves_compile_as_it_is(store, monkeypatch):
    (store / "file").write_text("")
    monkeypatch.setenv("STOICC_CACHE_DIR", str(store / "file" / "below"))
    assert stoicc.compile(torch.randn(64, 64), target="reference", pipeline="build-csr,regimes").schedule.regimes


def test_an_unknown_target_or_gpu_is_named():
    with pytest.raises(InputError, match="expected target cpu or triton, found 'tpu'"):
        cost_model("tpu")
    with pytest.raises(InputError, match="expected a GPU of H200, H100, A100, L40S, found 'Voodoo 2'"):
        cost_model("triton", device="Voodoo 2")


def test_gpus_go_by_the_name_that_the_driver_gives():
    assert find_gpu("NVIDIA H100 80GB HBM3").name == "H100"
    assert find_gpu("NVIDIA A100-SXM4-80GB").name == "A100"


def test_instructions_of_a_gpu_are_counted_in_compiled_code():
    kernel = stoicc.compile(torch.randn(256, 1024).bfloat16(), formats=["dense"], target="cpu")
    model = cost_model("triton", device="A100")
    assert isinstance(model, GpuCostModel)
    assert model.code is not None
    code = model.code(kernel.ir, 1, "bf16")
    assert code is not None
    assert code.tile_instructions[0] > 64 * 64 / 32 / 8  # at least one load of 8 values a lane
    assert 0 < code.registers <= 255
    assert model.predict(kernel.ir, 1, "bf16").seconds > 0
    assert model.code(kernel.ir, 1, "bf16") is code  # compiled once


# -- measuring ---------------------------------------------------------------------------------


def test_a_format_is_measured_by_running_it(store):
    """Times are this machine's; what must hold is that they are times, and grow with the batch (in fp32, which has no
    matrix unit)."""
    known = replace(constants(), tiles={}, decode={}, exposed={})
    found = calibration.measure_format(find_format("nv24"), "f32", (32, 32), known)
    assert found is not None
    curve = found.tiles["nv24", "f32", 32, 32]
    assert tuple(curve) == calibration_timing.BATCHES
    assert list(curve.values()) == sorted(curve.values())
    assert 1e-9 < curve[1] < 1e-3
    assert curve[256] > 8 * curve[1]
    assert set(found.decode) == set(found.tiles)
    assert set(found.exposed) == {"nv24|f32"}


def test_a_format_without_c_code_is_not_measured(store):
    fmt = stoicc.register_format(Portable())
    try:
        assert calibration.measure_format(fmt, "bf16", (64, 64), constants()) is None
    finally:
        REGISTRY.unregister("portable")


@dataclass(frozen=True)
class Portable(stoicc.TileFormat):
    """Runs on the reference backend alone."""

    name: ClassVar[str] = "portable"

    def planes(self, tile: Tile, dtype: str) -> tuple[stoicc.Plane, ...]:
        return (stoicc.Plane("values", dtype, tile),)

    def encode(self, tiles: Tensor) -> Planes:
        return {"values": tiles}

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        return planes["values"]


@pytest.mark.slow
def test_the_whole_device_is_measured_in_less_than_a_minute(store):
    start = time.perf_counter()
    found = cpu_model().constants
    assert time.perf_counter() - start < 60
    assert found.source == "measured"
    assert {key[0] for key in found.tiles} == {"dense", "nv24", "int8", "int4", "int4_nv24"}
    assert min(found.bandwidth[1].values()) > 1e8


def test_the_gpu_that_is_there(monkeypatch):
    """Its constants place the crossover of a schedule; a GPU that nobody knows leaves it to the built-in ones."""
    assert provided("triton") is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, known in (("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA GeForce RTX 2060", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        found = provided("triton")
        if known is None:
            assert found is None
        else:
            assert found is not None
            assert isinstance(found[0], GpuCostModel)
            assert found[0].gpu.name == known


def test_a_disturbed_calibration_has_no_negative_rates(monkeypatch):
    """The small weight was interrupted and took longer than the large one: what is stored can be read again."""
    times = iter([1e-3, 5e-3, 1e-5] * len(calibration.GEMM_BATCHES))
    monkeypatch.setattr(calibration, "out_of_cache", lambda kernel, batch, other: next(times))
    monkeypatch.setattr(calibration, "SETS", (1 << 16, 1 << 17, 1 << 18, 1 << 19))
    rates, calls = calibration._gemm("f32", 1, 1e-10, {1 << 18: 1e10})
    assert all(rate > 0 for rate in rates.values())
    assert all(call >= 0 for call in calls.values())
