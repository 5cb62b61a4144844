"""C kernels against the float64 product of what the tiles decode to."""

import pytest
import torch

from stoicc.codegen.cpu.backend import CpuBackend
from stoicc.codegen.cpu.build import openmp_library
from stoicc.codegen.cpu.decode import CompiledDecoder
from stoicc.codegen.cpu.simd import ISAS
from stoicc.ir.dtypes import TORCH_DTYPES, bits
from tests.codegen.cpu.mosaics import ALL_FORMATS, BOUNDS, Mosaic, mosaic, need, relative_error, run

EVERYTHING = ("bias", "low_rank", "row_permutation", "column_permutation", "input_scale", "output_scale")
SOME_FORMATS = ("empty", "dense", "nv24", "int8", "int4<group_size=16>", "int4_nv24<group_size=0>")


def check(case: Mosaic, batches, x_dtype: torch.dtype | None = None, seed: int = 1) -> None:
    """One executor, several batches, each against float64."""
    program = case.module.tiles
    executor = CpuBackend().build(case.module, case.pools, "tiles", "error")
    torch.manual_seed(seed)
    for batch in batches:
        x = torch.randn(batch, program.shape[1]).to(x_dtype or TORCH_DTYPES[program.dtype])
        y = run(executor, x, program.dtype, program.shape[0])
        assert relative_error(y, case.expected(x)) < BOUNDS[program.dtype], (program.shape, batch)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch) -> str:
    """Each instruction set that this machine has."""
    need(request.param, monkeypatch)
    return request.param


@pytest.mark.parametrize(
    ("isa", "dtype"),
    [
        ("amx", "bf16"),
        ("avx512bf16", "bf16"),
        ("vnni", "f16"),
        ("avx512", "f32"),
        ("avx2", "f16"),
        ("avx2", "bf16"),
        ("portable", "f32"),
    ],
    indirect=["isa"],
)
def test_every_format_with_all_that_is_fused(isa, dtype):
    case = mosaic((130, 390), ALL_FORMATS, dtype, beside=EVERYTHING, activation="gelu", parts=3, bins=4)
    check(case, (1, 2, 3, 8, 13, 70))
    check(mosaic((37, 101), ALL_FORMATS, dtype, beside=EVERYTHING, activation="gelu", parts=2, seed=5), (1, 5))


@pytest.mark.parametrize("tile", [(16, 16), (64, 128), (256, 64)])
def test_tile_shapes_and_tails(tile):
    for seed, shape in enumerate([(1, 1), (37, 101), (130, 70), (17, 300), (300, 5)]):
        check(mosaic(shape, SOME_FORMATS, "f32", tile, seed=seed), (1, 4, 7))


def test_every_batch_to_70():
    check(mosaic((40, 72), SOME_FORMATS, "bf16"), range(1, 71))


@pytest.mark.parametrize(
    ("beside", "activation"),
    [
        (("bias",), "relu"),
        (("row_permutation",), "gelu_tanh"),
        (("column_permutation", "bias"), None),
        (("low_rank",), "silu"),
        (("input_scale", "output_scale"), None),
    ],
)
def test_each_fused_step_alone(beside, activation):
    check(mosaic((50, 70), ("dense", "empty"), "f32", beside=beside, activation=activation), (1, 6))


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_fp32_input_of_a_16_bit_weight_gives_fp32(dtype):
    case = mosaic((50, 70), SOME_FORMATS, dtype, beside=("low_rank",))
    check(case, (1, 9), torch.float32)
    executor = CpuBackend().build(case.module, case.pools, "tiles", "error")
    y = run(executor, torch.randn(2, 70), dtype, 50)
    assert y.dtype == torch.float32


def test_split_rows_sum_to_the_same_product_as_whole_rows():
    x = torch.randn(3, 1000)
    results = []
    for parts in (1, 2, 7):
        case = mosaic((70, 1000), SOME_FORMATS, "f32", parts=parts)
        assert case.module.schedule is not None
        assert case.module.schedule.max_parts == parts
        results.append(run(CpuBackend().build(case.module, case.pools, "tiles", "error"), x, "f32", 70))
    for result in results:
        assert relative_error(result, case.expected(x)) < BOUNDS["f32"]


def test_same_bits_for_any_thread_count():
    case = mosaic((520, 700), SOME_FORMATS, "bf16", beside=("low_rank",), parts=4, bins=13)
    executor = CpuBackend().build(case.module, case.pools, "tiles", "error")
    x = torch.randn(11, 700).bfloat16()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(executor, x, "bf16", 520))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_huge_batch_runs_in_pieces_with_the_same_bits(monkeypatch):
    case = mosaic((130, 390), SOME_FORMATS, "bf16", beside=EVERYTHING, activation="gelu", parts=3)
    executor = CpuBackend().build(case.module, case.pools, "tiles", "error")
    x = torch.randn(1603, 390).bfloat16()  # beside which scratch that no batch changes is small
    whole, bytes_ = run(executor, x, "bf16", 130), executor.workspace_bytes(1603, x.dtype)
    monkeypatch.setattr("stoicc.codegen.cpu.backend.WORKSPACE_BYTES", bytes_ // 3)
    executor = CpuBackend().build(case.module, case.pools, "tiles", "error")
    assert executor.workspace_bytes(1603, x.dtype) < bytes_ // 2
    assert executor.workspace_bytes(10**6, x.dtype) == executor.workspace_bytes(1603, x.dtype)
    assert torch.equal(run(executor, x, "bf16", 130), whole)


def openmp_runtimes() -> set[str]:
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line.rpartition("/")[2]}
    return {path for path in paths if path.rpartition("/")[2].startswith(("libgomp", "libomp", "libiomp"))}


def test_one_openmp_runtime_serves_torch_and_the_kernel():
    torch.ones(8, 8) @ torch.ones(8, 8)
    before = openmp_runtimes()  # another package of this process may have brought its own
    case = mosaic((40, 72), SOME_FORMATS, "bf16")
    run(CpuBackend().build(case.module, case.pools, "tiles", "error"), torch.randn(1, 72).bfloat16(), "bf16", 40)
    assert openmp_library() in before
    assert openmp_runtimes() == before


SPECIAL = [0.0, 1.0, -1.5, float("inf"), float("-inf"), float("nan"), 65504.0, 65519.9, 65520.0, 3.4e38]
SPECIAL += [1e-8, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 2.0**-14, 6.1e-5, -5.97e-8, 1e-40, 1.00390625, 1.01171875, 2049.0]


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_stores_round_to_nearest_even_and_keep_infinity_and_nan(isa, dtype):
    values = torch.cat([torch.tensor(SPECIAL), torch.randn(500) * torch.logspace(-9, 6, 500)])
    case = mosaic((values.numel(), 8), ("empty",), dtype, beside=("bias",))
    pool = case.module.tiles.beside.bias
    assert pool is not None
    executor = CpuBackend().build(case.module, {**case.pools, pool.name: values}, "tiles", "error")
    y = run(executor, torch.ones(1, 8).to(TORCH_DTYPES[dtype]), dtype, values.numel())[0]
    expected = values.to(TORCH_DTYPES[dtype])
    number = ~expected.isnan()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.view(torch.int16)[number], expected.view(torch.int16)[number])


def test_nan_and_infinity_in_x_reach_y():
    case = mosaic((40, 72), ("dense",), "bf16")
    executor = CpuBackend().build(case.module, case.pools, "tiles", "error")
    x = torch.ones(2, 72).bfloat16()
    x[1, 3] = torch.nan
    y = run(executor, x, "bf16", 40)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


def test_every_half_is_read_exactly_even_where_subnormals_are_flushed(isa):
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()]
    case = mosaic((halves.numel(), 4), ("dense",), "f16", (64, 4))
    program = case.module.tiles
    weight = torch.zeros(program.grid[0] * 64, 4).half()
    weight[: halves.numel(), 0] = halves
    executor = CpuBackend().build(case.module, {"p0_values": weight.view(-1, 64, 4)}, "tiles", "error")
    x = torch.tensor([[1.0, 0, 0, 0]])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the switch is the thread's own
    torch.set_flush_denormal(True)
    try:
        y = run(executor, x, "f16", halves.numel())
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert torch.equal(y[0], halves.float())


@pytest.mark.parametrize("name", ["int8", "int4", "int4_nv24"])
def test_infinite_x_meets_zero_points_as_it_meets_a_dense_matrix(isa, name):
    case = mosaic((48, 64), (f"{name}<group_size=16, zero_points=true>",), "f32")
    x = torch.ones(2, 64)
    x[0, 5], x[1, 20] = torch.inf, -torch.inf
    y = run(CpuBackend().build(case.module, case.pools, "tiles", "error"), x, "f32", 48)
    kept = case.weight[:, [5, 20]].T != 0  # zero times infinity is NaN here and there
    assert kept.sum() > 24
    assert torch.equal(y.double()[kept], case.expected(x)[kept])


@pytest.mark.parametrize(("dtype", "x_dtype"), [("f32", "f32"), ("f16", "f16"), ("bf16", "bf16"), ("bf16", "f32")])
def test_dense_once(dtype, x_dtype, monkeypatch):
    monkeypatch.setattr("stoicc.codegen.cpu.dense_once.PANEL_BYTES", 1 << 16)
    case = mosaic((333, 390), ALL_FORMATS, dtype, beside=EVERYTHING, activation="silu")
    executor = CpuBackend().build(case.module, case.pools, "dense-once", "error")
    for batch in (1, 100):
        x = torch.randn(batch, 390).to(TORCH_DTYPES[x_dtype])
        y = run(executor, x, dtype, 333)
        assert relative_error(y, case.expected(x)) < BOUNDS[dtype]
    assert executor.workspace_bytes(100, torch.float32) <= 1 << 16
    assert executor.resident_bytes == 0


@pytest.mark.parametrize(("beside", "scale"), [("output_scale", 1e-3), ("input_scale", 1e3)])
@pytest.mark.parametrize("kind", ["tiles", "dense-once"])
def test_f16_scales_reach_past_the_largest_half(kind, beside, scale):
    case = mosaic((32, 64), ("dense",), "f16", beside=(beside,))
    weight = 100.0 if beside == "output_scale" else 1e-4
    pools = {name: torch.full_like(pool, scale if name == beside else weight) for name, pool in case.pools.items()}
    x = torch.full((2, 64), 100.0).half()
    y = run(CpuBackend().build(case.module, pools, kind, "error"), x, "f16", 32)
    exact = 100.0 * 64 * float(torch.tensor(weight).half()) * float(torch.tensor(scale).half())
    assert relative_error(y, torch.full((2, 32), exact).double()) < BOUNDS["f16"]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_c_decode_equals_the_formats_decode_bit_for_bit(isa, dtype):
    formats = (*ALL_FORMATS, "int8<group_size=0>", "int4_nv24<group_size=8>")
    case = mosaic((70, 200), formats, dtype, seed=3)
    panel = torch.full((3 * 32, 7 * 32), torch.nan, dtype=TORCH_DTYPES[dtype])
    CompiledDecoder(case.module, case.pools)(0, 3, panel)
    assert torch.equal(bits(panel[:70, :200].contiguous()), bits(case.weight.to(TORCH_DTYPES[dtype])))
