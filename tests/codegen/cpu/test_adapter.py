"""The low-rank term by kernels of its factors: every form of x, any rank, and as exact as fp32 sums are."""

from dataclasses import replace

import pytest
import torch

from stoicc.codegen.cpu.adapter import factor_module
from stoicc.codegen.cpu.backend import CpuBackend
from stoicc.codegen.cpu.factors import Floats, held_factor, tile_of
from stoicc.codegen.cpu.plan import KernelClass
from stoicc.ir.factors import factor_values, pack_codes
from stoicc.ir.types import CodedFactor, Pool
from stoicc.ir.verify import verify
from tests.codegen.cpu.mosaics import BOUNDS, mosaic, need, relative_error, run

FORMATS = ("empty", "dense", "int4<group_size=16>")
BESIDE = ("low_rank", "row_permutation", "column_permutation", "output_scale", "bias")


def built(case):
    return CpuBackend().build(case.module, case.pools, "tiles", "error")


@pytest.mark.parametrize("isa", ["amx", "avx512", "portable"])
@pytest.mark.parametrize("rank", [1, 33, 150])
def test_any_rank_and_batch(isa, rank, monkeypatch):
    need(isa, monkeypatch)
    case = mosaic((100, 150), FORMATS, "bf16", beside=BESIDE, rank=rank)
    executor = built(case)
    for batch in (1, 2, 17, 100):
        x = torch.randn(batch, 150).bfloat16()
        assert relative_error(run(executor, x, "bf16", 100), case.expected(x)) < BOUNDS["bf16"]


@pytest.mark.parametrize("batch", [1, 2, 7, 8, 17])
def test_the_term_beside_a_format_that_takes_matrix_units_later(batch, monkeypatch):
    later = property(lambda kernel: 2 if kernel.label.startswith("bf16_64x64_dense_x") else 8)
    monkeypatch.setattr(KernelClass, "least_pairs", later)
    case = mosaic((100, 150), FORMATS, "bf16", beside=BESIDE, rank=33)
    x = torch.randn(batch, 150).bfloat16()
    assert relative_error(run(built(case), x, "bf16", 100), case.expected(x)) < BOUNDS["bf16"]


@pytest.mark.parametrize("batch", [1, 2, 33])
def test_the_term_is_not_rounded_to_16_bits(batch):
    case = mosaic((100, 150), ("empty",), "bf16", beside=("low_rank",), rank=40)
    x = torch.randn(batch, 150)
    assert relative_error(run(built(case), x, "bf16", 100), case.expected(x)) < 1e-6
    rounded = run(built(case), x.bfloat16(), "bf16", 100).double()
    off_by_a_unit = (rounded - case.expected(x.bfloat16()).bfloat16()).abs() > 1e-6
    assert off_by_a_unit.double().mean() < 0.02  # with 8 bits of R x, half of y would be


def test_factors_of_another_dtype_than_the_weight():
    case = mosaic((100, 150), FORMATS, "bf16", beside=BESIDE, rank=20)
    for name in ("left", "right"):
        case.pools[name] = case.pools[name].float() + 1e-3
    names = case.module.tiles.beside.low_rank
    assert names is not None
    factors = Pool("left", "f32", names[0].shape, ""), Pool("right", "f32", names[1].shape, "")
    program = replace(case.module.tiles, beside=replace(case.module.tiles.beside, low_rank=factors))
    case = replace(case, module=replace(case.module, tiles=program))
    for x_dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(9, 150).to(x_dtype)
        assert relative_error(run(built(case), x, "bf16", 100), case.expected(x)) < BOUNDS["bf16"]


@pytest.mark.parametrize(
    ("isa", "bits", "group", "formats"),
    [
        ("amx", 4, 128, ["int4", "int4"]),
        ("avx512", 4, 128, ["int4", "int4"]),
        ("portable", 4, 128, ["int4", "int4"]),
        ("avx512", 3, 16, ["int3", "int3"]),
        ("amx", 5, 0, ["int8", "int8"]),  # the next wider codes that a format has
        ("avx512", 4, 48, ["dense", "dense"]),  # groups that meet no tile
    ],
)
def test_codes_run_on_the_kernels_of_their_format(isa, bits, group, formats, monkeypatch):
    need(isa, monkeypatch)
    case = mosaic((100, 150), FORMATS, "bf16", beside=BESIDE, rank=40)
    factors, held = [], []
    for side, shape in (("left", (100, 40)), ("right", (40, 150))):
        codes = pack_codes(torch.randint(0, 1 << bits, shape, dtype=torch.uint8), bits)
        scales = torch.rand(shape[0], -(-shape[1] // (group or shape[1]))).bfloat16()
        case.pools.update({f"{side}_codes": codes, f"{side}_scales": scales})
        first = Pool(f"{side}_codes", "u8", tuple(codes.shape), "")
        second = Pool(f"{side}_scales", "bf16", tuple(scales.shape), "")
        factors.append(CodedFactor(first, second, bits, group, shape[1]))
        held.append(held_factor(factors[-1], case.pools).tiled(side, tile_of(shape))[0].segments[0].format)
        case.pools[side] = factor_values(factors[-1], case.pools)
    assert [text.partition("<")[0] for text in held] == formats
    beside = replace(case.module.tiles.beside, low_rank=(factors[0], factors[1]))
    module = replace(case.module, tiles=replace(case.module.tiles, beside=beside))
    executor = built(replace(case, module=module))
    for batch in (1, 2, 17, 100):
        for x_dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(batch, 150).to(x_dtype)
            assert relative_error(run(executor, x, "bf16", 100), case.expected(x)) < BOUNDS["bf16"]


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_entry(value):
    case = mosaic((100, 150), FORMATS, "bf16", beside=("low_rank",), rank=20)
    x = torch.randn(20, 150).bfloat16()
    x[7, 3] = value
    y = run(built(case), x, "bf16", 100)
    others = torch.arange(20) != 7
    assert relative_error(y[others], case.expected(x)[others]) < BOUNDS["bf16"]
    assert not y[7].isfinite().any()


def test_a_workspace_anywhere():
    case = mosaic((100, 150), FORMATS, "bf16", beside=BESIDE, rank=20)
    executor, x = built(case), torch.randn(20, 150).bfloat16()
    size = executor.workspace_bytes(20, x.dtype)
    results = []
    for offset in (0, 1, 37):
        memory = torch.full((size + offset + 64,), 255, dtype=torch.uint8)
        out = torch.empty(20, 100, dtype=torch.bfloat16)
        executor.run(x, out, memory[offset : offset + size])
        assert (memory[:offset] == 255).all()
        assert (memory[offset + size :] == 255).all()
        results.append(out)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("shape", [(409, 4096), (5, 70), (4096, 409), (130, 13)])
def test_a_factor_is_a_valid_program_that_pads_little(shape):
    module, pools = factor_module("right", Floats(torch.randn(shape)))
    verify(module)
    assert module.schedule is not None
    assert len(module.schedule.items) >= 16 or shape[1] < 1024
    assert pools["p0_values"].numel() <= 1.06 * shape[0] * shape[1] or min(shape) < 16
