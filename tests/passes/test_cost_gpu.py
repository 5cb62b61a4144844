"""The cost model of a GPU: bytes against issue slots, occupancy and waves, from synthetic counts."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoicc.ir.types import Module
from stoicc.passes import Pipeline
from stoicc.passes.cost_gpu import GEMM_SHARE, GPUS, GpuCostModel, KernelCode, occupancy
from stoicc.passes.cost_model import PARTS
from tests.ir.modules import make_program, programs

H200 = GPUS["H200"]
TEXT = "drop-empty,build-csr,split-k{{parts={parts}}},fuse-epilogue,regimes{{tiles=256}}"


def module_of(name, shape=(8192, 28672), parts=4):
    program = make_program(shape, formats=[name])
    return Pipeline.parse(TEXT.format(parts=parts)).run(Module(program))


BIG = module_of("int4")
FEW = module_of("int4", parts=1)
DENSE = module_of("dense")


def model_of(instructions, gpu=H200, **code):
    found = KernelCode(
        **{"registers": 64, "shared": 32 << 10, "warps": 4, "block_n": 16, **code}, tile_instructions=(instructions,)
    )
    return GpuCostModel(gpu, lambda module, batch, x_dtype: found)


def test_a_loop_of_few_instructions_is_bound_by_bytes_and_a_long_one_by_issue_slots():
    """An int4 tile of 64 x 64 is read in the time of about 530 warp instructions on an H200."""
    short, long = (model_of(count).predict(BIG, 1, "bf16").parts for count in (300, 1200))
    assert short["compute"] == pytest.approx(0, abs=1e-9)
    assert long["compute"] > long["bytes"]
    assert long["bytes"] == pytest.approx(short["bytes"])


def test_the_kernel_of_fewer_bytes_loses_where_its_loop_is_long():
    dense = model_of(300).predict(DENSE, 1, "bf16").seconds
    assert model_of(300).predict(BIG, 1, "bf16").seconds < dense / 3
    assert model_of(3000).predict(BIG, 1, "bf16").seconds > dense


def test_only_an_issue_bound_kernel_gains_by_fewer_instructions_and_only_a_bytes_bound_one_by_bandwidth():
    faster = replace(H200, bandwidth=H200.bandwidth * 2, flops={k: 2 * f for k, f in H200.flops.items()})
    times = {
        (count, gpu.bandwidth): model_of(count, gpu).predict(BIG, 1, "bf16").seconds
        for count in (100, 200, 2000, 4000)
        for gpu in (H200, faster)
    }
    slow, fast = H200.bandwidth, faster.bandwidth
    assert times[100, slow] == pytest.approx(times[200, slow])
    assert times[4000, slow] == pytest.approx(2 * times[2000, slow], rel=0.05)
    assert times[100, fast] < 0.6 * times[100, slow]
    assert times[4000, fast] == pytest.approx(times[4000, slow], rel=0.02)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "held"),
    [(128, 0, 4, 4), (64, 100 << 10, 4, 2), (16, 1 << 10, 8, 8), (255, 0, 8, 1), (16, 0, 1, 32), (32, 300 << 10, 4, 1)],
)
def test_occupancy_is_what_registers_shared_memory_and_warps_let(registers, shared, warps, held):
    assert occupancy(H200, KernelCode(registers, shared, warps, 16, ())) == held


def test_a_program_more_than_a_wave_costs_another_wave():
    """132 SMs, one program each: the 133rd runs alone."""
    full, over = (module_of("int4", (64 * rows, 4096), parts=1) for rows in (132, 133))
    model = model_of(2000, registers=255, warps=8)
    first, second = (model.predict(module, 1, "bf16") for module in (full, over))
    assert first.parts["imbalance"] == pytest.approx(0, abs=1e-9)
    assert second.parts["imbalance"] > 0.9 * (first.parts["bytes"] + first.parts["compute"])


def test_a_split_gives_idle_sms_work_and_costs_a_reduction():
    whole, split = (module_of("int4", (1024, 16384), parts=parts) for parts in (1, 8))
    one, many = (model_of(600).predict(module, 1, "bf16") for module in (whole, split))
    assert many.seconds < one.seconds / 2
    assert one.parts["reduction"] == 0
    assert many.parts["reduction"] >= H200.launch


def test_few_loads_in_flight_do_not_fill_the_bandwidth():
    starved = model_of(100, shared=1 << 10, registers=255, warps=8)
    assert starved.predict(FEW, 1, "bf16").seconds > 1.5 * model_of(100).predict(FEW, 1, "bf16").seconds


@given(programs(), st.integers(1, 5000), st.sampled_from([1, 3]))
def test_parts_sum_to_the_seconds_with_and_without_compiled_code(program, batch, parts):
    module = Pipeline.parse(TEXT.format(parts=parts)).run(Module(program))
    found = GpuCostModel(H200).predict(module, batch, "bf16")
    assert tuple(found.parts) == PARTS
    assert min(found.parts.values()) >= 0
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert (found.parts["gemm"] > 0) == (batch > 256)


def test_dense_once_reads_the_payload_once_and_multiplies_at_the_rate_of_the_device():
    found = GpuCostModel(H200).predict(BIG, 8192, "bf16")
    least = 2 * 8192 * 8192 * 28672 / H200.flops["bf16"]
    assert least < found.parts["gemm"] < 2 * least
    assert found.parts["compute"] == found.parts["reduction"] == 0


def test_tiles_of_a_large_batch_are_bound_by_tensor_cores_and_lose_to_the_library():
    """No kernel of ours is predicted to beat a dense GEMM at its own work, so that none is chosen that might lose."""
    tiles = model_of(300, block_n=128).predict(Module(DENSE.tiles, DENSE.schedule.executor("tiles")), 8192, "bf16")
    peak = 2 * 8192 * 8192 * 28672 / H200.flops["bf16"]
    assert tiles.parts["bytes"] + tiles.parts["compute"] > peak / GEMM_SHARE
    warpgroups = model_of(300, block_n=128, wgmma=True)
    faster = warpgroups.predict(Module(DENSE.tiles, DENSE.schedule.executor("tiles")), 8192, "bf16")
    assert peak / GEMM_SHARE < faster.parts["bytes"] + faster.parts["compute"] < 0.9 * tiles.seconds


@pytest.mark.parametrize(
    ("module", "kinds"),
    [(BIG, ["tiles", "dense-once"]), (DENSE, ["tiles", "vendor"]), (module_of("nv24"), ["tiles", "vendor"])],
    ids=["int4", "dense", "nv24"],
)
def test_regimes_go_from_bytes_to_arithmetic(module, kinds):
    """Few rows of x by tiles; many by what decodes once, or by a library that has nothing to decode."""
    regimes = model_of(300).regimes(module)
    assert [regime.executor for regime in regimes] == kinds
    assert 1 <= regimes[0].max_batch <= 4096
    assert regimes[-1].max_batch is None
    schedule = replace(module.schedule, regimes=regimes)
    for batch in (1, 64, 1024, 4096):
        chosen = model_of(300).predict(Module(module.tiles, schedule), batch, "bf16").seconds
        for kind in ("tiles", "dense-once"):
            alone = Module(module.tiles, replace(schedule, regimes=()).executor(kind))
            assert chosen <= model_of(300).predict(alone, batch, "bf16").seconds


def test_a_library_multiplies_a_sparse_matrix_faster_than_a_dense_one():
    dense, sparse = (
        GpuCostModel(H200).predict(Module(m.tiles, replace(m.schedule, regimes=()).executor("vendor")), 4096, "bf16")
        for m in (DENSE, module_of("nv24"))
    )
    assert sparse.seconds == pytest.approx(dense.seconds / 1.2, rel=0.01)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_every_constant_says_where_it_is_from(gpu):
    assert set(gpu.sources) == {"sms", "flops", "shared", "warps", "instructions", "bandwidth"}
    assert set(gpu.sources.values()) <= {"published", "measured", "derived"}
    # four schedulers an SM, one instruction a cycle each
    assert 1e9 < gpu.instructions / (gpu.sms * 4) < 3e9
