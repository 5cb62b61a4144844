"""h W by C kernels that walk tile columns, against float64: instruction sets, shapes, threads, memory."""

import pytest
import torch

import stoicc
from stoicc.codegen.cpu.backend import CpuBackend
from stoicc.codegen.cpu.simd import ISAS
from stoicc.codegen.cpu.transposed import CHUNK, TransposedExecutor
from stoicc.codegen.executor import Executor
from stoicc.codegen.reference import TransposedReference
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.registry import find_format
from stoicc.passes.build_csc import BuildCsc
from tests.codegen.cpu.mosaics import ALL_FORMATS, BOUNDS, Mosaic, mosaic, need, relative_error

FORMATS = ("empty", "dense", "nv24", "int4_nv24<group_size=0>")


def build(case: Mosaic) -> Executor:
    return CpuBackend().build(BuildCsc(bins=7).apply(case.module), case.pools, "transposed", "error")


def run(executor: Executor, h: torch.Tensor, columns: int) -> torch.Tensor:
    """Out and workspace are poisoned first."""
    out = torch.full((h.shape[0], columns), torch.nan, dtype=h.dtype)
    workspace = torch.full((executor.workspace_bytes(h.shape[0], h.dtype),), 255, dtype=torch.uint8)
    executor.run(h, out, workspace)
    return out


def check(case: Mosaic, batches, dtype: torch.dtype | None = None) -> None:
    program, executor = case.module.tiles, build(case)
    assert isinstance(executor, TransposedExecutor)
    for batch in batches:
        h = torch.randn(batch, program.shape[0]).to(dtype or TORCH_DTYPES[program.dtype])
        found = run(executor, h, program.shape[1])
        assert found.dtype == h.dtype
        bound = 1e-5 if h.dtype == torch.float32 else BOUNDS[program.dtype]
        assert relative_error(found, h.double() @ case.weight) < bound, (program.shape, batch)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_every_instruction_set(isa, dtype, monkeypatch):
    need(isa, monkeypatch)
    check(mosaic((130, 390), FORMATS, dtype), (1, 5, 6, 7, 13, 40))


def test_every_format_with_its_own_decode():
    check(mosaic((130, 390), ALL_FORMATS, "f16"), (1, 9))


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 64), (64, 128), (256, 64)])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_tile_shapes_and_tails(tile, dtype):
    for seed, shape in enumerate([(1, 1), (37, 101), (130, 70), (17, 300), (300, 5)]):
        check(mosaic(shape, ("dense", "empty", "nv24"), dtype, tile, seed=seed), (1, 4, 33))


def test_batches_and_slabs_are_done_in_pieces(monkeypatch):
    monkeypatch.setattr("stoicc.codegen.cpu.transposed.SLAB_BYTES", 3 * 32 * 32 * 4)
    for dtype in ("f32", "bf16"):
        check(mosaic((400, 70), ("dense", "nv24"), dtype), (CHUNK - 1, CHUNK, CHUNK + 34))


def test_fp32_rows_of_16_bit_weights():
    check(mosaic((50, 70), FORMATS, "bf16"), (1, 9), torch.float32)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_same_bits_for_any_threads_and_in_any_batch(dtype):
    case = mosaic((200, 300), FORMATS, dtype)
    executor, threads = build(case), torch.get_num_threads()
    h = torch.randn(40, 200).to(TORCH_DTYPES[dtype])
    expected = run(executor, h, 300)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(run(executor, h, 300), expected)
    finally:
        torch.set_num_threads(threads)
    for place in (0, 7, 39):
        assert torch.equal(run(executor, h[place : place + 1], 300)[0], expected[place])


def test_what_is_not_finite_stays_in_its_row():
    h = torch.randn(3, 50).bfloat16()
    h[1, -1], h[2, 0] = torch.inf, torch.nan
    found = run(build(mosaic((50, 70), ("dense",), "bf16")), h, 70)
    assert found[0].isfinite().all()
    assert not found[1:].isfinite().any()


def test_a_format_without_c_takes_the_way_of_the_reference(monkeypatch):
    monkeypatch.setattr(type(find_format("nv24")), "tile_mac", lambda *_: None)
    case = mosaic((50, 70), ("dense", "nv24"), "f32")
    executor = build(case)
    assert isinstance(executor, TransposedReference)
    h = torch.randn(3, 50)
    assert relative_error(run(executor, h, 70), h.double() @ case.weight) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_no_dense_weight_and_no_second_packing(packed, monkeypatch):
    """Of 4 MB of bf16 weights as int4: a backward pass allocates nothing near them, and keeps next to nothing."""
    weight = torch.randn(1024, 2048).bfloat16()
    kernel = stoicc.compile(stoicc.ops.group_absmax(weight, group_size=128), target="cpu")
    x = torch.randn(4, 2048, dtype=torch.bfloat16, requires_grad=True)
    if packed:
        kernel(x.detach())
        kernel(x.detach())
    y = kernel(x)
    before = kernel.stats()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with torch.profiler.profile(profile_memory=True) as profile:
        y.sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    # a slab, a tile and sums of each thread; where planes are packed, unpacked ones for a while
    assert 0 < largest <= before.dense_bytes / 2
    after = kernel.stats()
    assert after.resident_bytes - before.resident_bytes < 0.01 * before.dense_bytes
    assert after.packed_bytes - before.packed_bytes == kernel._executors["transposed"].resident_bytes > 0
    assert after.scratch_bytes < before.dense_bytes


def test_the_columns_of_a_mosaic(golden, monkeypatch):
    need("avx2", monkeypatch)
    golden(build(mosaic((130, 390), ("dense", "nv24", "int4<group_size=128>"), "f16", (64, 64))).source)


def test_the_columns_of_nv24_amx(golden, monkeypatch):
    need("amx", monkeypatch)
    golden(build(mosaic((130, 390), ("nv24",), "bf16", (64, 64))).source)
