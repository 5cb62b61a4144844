"""What a call does beside multiplying, for x in every form: tails, threads, workspace, infinities, tile state."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch.nn.functional import linear

from stoicc.codegen.cpu.backend import TilesExecutor
from stoicc.codegen.cpu.build import load
from stoicc.codegen.cpu.plan import classify
from stoicc.formats.dense import Dense
from stoicc.ir.dtypes import TORCH_DTYPES, output_dtype
from stoicc.ir.format import Tile, TileMac, TileOctets
from stoicc.ir.registry import REGISTRY, register_format
from tests.codegen.cpu.mosaics import need
from tests.codegen.cpu.unrounded import assert_close, build, coded, hard_inputs, product

FORMS = [("avx512", "bf16"), ("vnni", "f32"), ("vnni", "bf16"), ("amx", "f32"), ("amx", "bf16")]
"""Instruction set and dtype of a bf16 weight's x: floats, digits (of both), octets, octets or pairs."""
CODES = ("int8<zero_points=true>", "int8", "int4<group_size=32>", "int4", "int4_nv24<zero_points=true>")
"""Of which octets take the last two and plain int8, in tiles of 64 columns."""
FORMATS = (*CODES, "nv24", "empty")
BESIDE = ("bias", "low_rank", "row_permutation", "column_permutation", "output_scale")


@pytest.fixture(params=FORMS, ids="-".join)
def x_dtype(request, monkeypatch) -> torch.dtype:
    """The dtype of x, with the instruction set of its form forced."""
    isa, name = request.param
    need(isa, monkeypatch)
    return TORCH_DTYPES[name]


@pytest.fixture
def amx(monkeypatch) -> None:
    need("amx", monkeypatch)


def check(case, x_dtype, batches=(1, 3, 20, 70)) -> None:
    executor = build(case)
    for batch in batches:
        x = hard_inputs(batch, case.module.tiles.shape[1], x_dtype, first=batch)
        assert_close(product(executor, case, x), x, case)


def test_thin_matrices_and_tails(x_dtype):
    for seed, shape in enumerate([(1, 1), (1, 300), (70, 7), (3, 64), (65, 65), (127, 129)]):
        check(coded(shape, FORMATS, "bf16", (64, 64), seed=seed), x_dtype)


@pytest.mark.parametrize("beside", [BESIDE, (*BESIDE, "input_scale")], ids=["pairs", "input_scale"])
def test_all_that_is_fused_on_split_rows(x_dtype, beside):
    options = {"beside": beside, "activation": "gelu", "parts": 3, "bins": 4}
    case = coded((130, 390), FORMATS, "bf16", (64, 64), **options)
    assert classify(case.module, torch.bfloat16, "amx").pairs == ("input_scale" not in beside)
    executor = build(case)
    for batch in (1, 2, 4, 5, 17, 70):
        x = torch.randn(batch, 390).to(x_dtype)
        assert_close(product(executor, case, x), x, case)


@pytest.mark.parametrize("formats", [CODES, ("dense", *CODES, "nv24")], ids=["codes", "mixed"])
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_what_is_not_finite_stays_in_its_entry(x_dtype, formats, batch):
    case = coded((130, 200), formats, "bf16", (64, 64), seed=1)
    x = hard_inputs(batch, 200, x_dtype, first=2)
    executor = build(case)
    for column, value in ((5, torch.inf), (70, -torch.inf), (199, torch.nan)):
        poisoned = x.clone()
        poisoned[batch // 2, column] = value
        y = product(executor, case, poisoned)
        others = torch.arange(batch) != batch // 2
        assert_close(y[others], x[others], case)
        weight = case.weight[:, column]
        kept = weight != 0  # zero times infinity is NaN, and of 2:4 tiles not multiplied by all kernels
        assert kept.sum() > 20
        expected = weight[kept] * value
        assert torch.equal(y[batch // 2, kept].double().nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


def test_the_largest_number_is_finite(x_dtype):
    case = coded((64, 128), CODES, "bf16", (64, 64))
    x = torch.zeros(4, 128, dtype=x_dtype)
    largest = torch.finfo(x_dtype).max
    x[0, 0], x[1, 70], x[2, 3], x[3, 127] = largest, -largest, largest / 2, torch.finfo(x_dtype).tiny
    y = product(build(case), case, x * 2.0**-9)  # codes reach 255
    assert y.isfinite().all()
    assert_close(y, x * 2.0**-9, case)


@pytest.mark.parametrize("parts", [1, 4])
def test_same_bits_for_any_threads_and_any_workspace(x_dtype, parts):
    case = coded((520, 700), FORMATS, "bf16", (32, 32), beside=("low_rank",), parts=parts, bins=13)
    executor, threads = build(case), torch.get_num_threads()
    for batch in (1, 3, 20, 70):
        x = torch.randn(batch, 700).to(x_dtype)
        try:
            results = []
            for count, fill, offset in ((1, 255, 0), (2, 0, 1), (3, 255, 37), (1, 1, 63)):
                torch.set_num_threads(count)
                results.append(_guarded(executor, x, 520, fill, offset))
        finally:
            torch.set_num_threads(threads)
        assert results[0].isfinite().all()
        assert all(torch.equal(results[0], other) for other in results[1:])


def _guarded(executor, x, rows: int, fill: int, offset: int) -> torch.Tensor:
    """y of a call whose workspace and y stand between bytes that must not change."""
    size, guard, batch = executor.workspace_bytes(len(x), x.dtype), 256, len(x)
    memory = torch.full((offset + size + guard,), fill, dtype=torch.uint8)
    out = torch.full((batch + 2, rows), 7, dtype=output_dtype("bf16", x.dtype))
    executor.run(x, out[1:-1], memory[offset : offset + size])
    assert (torch.cat((memory[:offset], memory[offset + size :])) == fill).all()
    assert (out[[0, -1]] == 7).all()
    return out[1:-1].clone()


def test_a_batch_in_pieces(x_dtype, monkeypatch):
    case = coded((130, 390), FORMATS, "bf16", (32, 32), parts=3)
    executor = build(case)
    monkeypatch.setattr("stoicc.codegen.cpu.backend.WORKSPACE_BYTES", executor.workspace_bytes(80, torch.float32))
    pieces = build(case)
    assert pieces.workspace_bytes(203, x_dtype) < executor.workspace_bytes(203, x_dtype) / 2
    x = torch.randn(203, 390).to(x_dtype)
    whole = product(executor, case, x)
    if x_dtype == torch.float32:  # pairs of fewer entries go through another loop nest
        assert torch.equal(product(pieces, case, x), whole)
    for batch in (193, 195):  # the last piece has x in another form
        y = product(pieces, case, x[:batch])
        if x_dtype == torch.float32:
            assert torch.equal(y[:192], whole[:192])
        assert_close(y, x[:batch], case)


# ---- which form a call takes -----------------------------------------------------------------


@dataclass(frozen=True)
class Marked(Dense):
    """Dense tiles whose digits do no more than add a mark to each sum; without pairs."""

    name: ClassVar[str] = "marked"
    bits: int = 8

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        digits = f"INLINE void {{name}}(const {dtype} *values, const int8_t *x, float *acc, const int nb)\n"
        digits += "{\n    for (int i = 0; i < SUMS * nb; i++)\n        acc[i] += 1000.0f;\n}\n"
        return TileMac(code.source, code.pack, code.decode, digits, code_bits=self.bits)


@pytest.fixture
def marked():
    register_format(Marked())
    yield
    REGISTRY.unregister("marked")


@pytest.mark.usefixtures("marked")
@pytest.mark.parametrize(
    ("isa", "bits", "most"),
    [("amx", 8, 99), ("vnni", 8, 99), ("avx512", 6, 0), ("avx512", 5, 1), ("avx2", 6, 0), ("avx2", 5, 1)],
)
def test_digits_serve_finite_x(isa, bits, most, monkeypatch):
    need(isa, monkeypatch)
    case = coded((64, 64), (f"marked<bits={bits}>",), "bf16", (64, 64))
    case.pools["p0_values"].zero_()
    executor = build(case)
    for batch in (1, 2, 3, 4, 5, 6, 9, 64, 81):
        x = torch.randn(batch, 64).bfloat16()
        assert (product(executor, case, x) == (1000 if batch <= most else 0)).all()
    for batch in (3, 81):
        x[2, 5] = torch.inf
        y = product(executor, case, x[:batch])
        assert (y[torch.arange(batch) != 2] == 0).all()
        assert y[2].isnan().all()


@pytest.mark.parametrize("zeros", ["", ", zero_points=true"])
@pytest.mark.parametrize("isa", ["avx512bf16", "vnni", "avx512", "avx2"])
def test_every_format_of_codes_multiplies_digits_of_any_batch(isa, zeros, monkeypatch):
    need(isa, monkeypatch)
    names = [f"{name}<group_size=32{zeros}>" for name in ("int2", "int3", "int4", "int8", "int4_nv24")]
    formats = (*names, "mxfp4", "nvfp4")
    case = coded((130, 64 * len(formats) * 2), formats, "f32", (64, 64))
    executor = build(case)
    for batch in (1, 3, 5, 8, 13, 67):
        x = torch.randn(batch, case.weight.shape[1])  # no entry of which is better as floats
        expected = x.double() @ case.weight.T
        assert (product(executor, case, x) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.usefixtures("marked")
def test_a_format_without_pairs_keeps_all_from_them(amx):
    case = coded((130, 200), ("marked", "int8", "int4"), "bf16", (64, 64))
    kernel = classify(case.module, torch.bfloat16, "amx")
    assert not kernel.pairs
    assert kernel.digits
    executor = build(case)
    for batch in (5, 20, 70):
        x = hard_inputs(batch, 200, torch.bfloat16)
        assert_close(product(executor, case, x), x, case)


@dataclass(frozen=True)
class MarkedOctets(Dense):
    """Dense tiles that are ones as octets, and nothing in any other form."""

    name: ClassVar[str] = "marked_octets"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        octets = f"INLINE vfloat {{name}}(const {dtype} *values, const int unit, int8_t *octets)\n{{\n"
        octets += "    memset(octets, 1, BK * LANES);\n    return vf_set1(1);\n}\n"
        return replace(code, octets=TileOctets(octets, tile[1]))


@pytest.fixture
def marked_octets():
    register_format(MarkedOctets())
    yield
    REGISTRY.unregister("marked_octets")


@pytest.mark.usefixtures("marked_octets")
@pytest.mark.parametrize(
    ("isa", "name", "served"), [("amx", "bf16", range(2, 17)), ("amx", "f32", range(2, 200)), ("vnni", "f32", range(0))]
)
def test_octets_serve_finite_x_where_they_are_faster(isa, name, served, monkeypatch):
    need(isa, monkeypatch)
    case = coded((64, 100), ("marked_octets",), "bf16", (64, 64))
    case.pools["p0_values"].zero_()
    executor = build(case)
    for batch in (1, 2, 3, 15, 16, 17, 70, 130):
        x = torch.randint(-1, 2, (batch, 100)).to(TORCH_DTYPES[name])
        sums = x.float().sum(1, keepdim=True) if batch in served else torch.zeros(batch, 1)
        assert torch.equal(product(executor, case, x).float(), sums.expand(-1, 64)), batch
        if batch > 1:
            x[1, 5] = torch.nan
            y = product(executor, case, x)
            assert (y[torch.arange(batch) != 1] == 0).all()
            assert y[1].isnan().all()


# ---- matrix units are shared with the BLAS -----------------------------------------------------

_TILE_STATE = """\
void set_tiles(const char (*shapes)[64]) { __asm__ volatile("ldtilecfg %0" :: "m"(*shapes)); }
void get_tiles(char (*shapes)[64]) { __asm__ volatile("sttilecfg %0" : "=m"(*shapes)); }
void clear_tiles(void) { __asm__ volatile("tilerelease"); }
"""


@pytest.mark.usefixtures("amx")
def test_tiles_of_a_thread_are_put_back():
    library = load(_TILE_STATE, "tile_state", "amx")
    case = coded((64, 64), ("dense",), "bf16", (64, 64))
    executor, x = build(case), torch.randn(20, 64).bfloat16()
    assert isinstance(executor, TilesExecutor)
    kernel = executor._function(torch.bfloat16)  # the bare call
    out, workspace = torch.empty(20, 64).bfloat16(), torch.empty(executor.workspace_bytes(20, x.dtype) + 64).byte()
    own = bytearray(64)
    own[0], own[16:20], own[48:50] = 1, (48, 0, 16, 0), (7, 3)  # two small tiles
    address = workspace.data_ptr() + -workspace.data_ptr() % 64
    for before in (bytes(own), bytes(64)):
        after = ctypes.create_string_buffer(64)
        library.set_tiles(before) if any(before) else library.clear_tiles()
        kernel(executor._binding.address, x.data_ptr(), out.data_ptr(), address, 20, 1)
        library.get_tiles(after)
        library.clear_tiles()
        assert after.raw == before
    assert_close(out, x, case)


@pytest.mark.usefixtures("amx")
def test_the_blas_gives_the_same_bits_around_our_calls():
    case = coded((520, 700), ("dense", *CODES), "bf16", (64, 64), bins=8)
    executor = build(case)
    weight = torch.randn(500, 700).bfloat16()
    inputs = [torch.randn(batch, 700).bfloat16() for batch in (1, 16, 33, 100)]
    theirs = [linear(x, weight) for x in inputs]
    ours = [product(executor, case, x) for x in inputs]
    assert_close(ours[2], inputs[2], case)

    def both(turn: int) -> bool:
        same = True
        for i in (turn, turn + 1, turn + 2, turn + 3) * 4:
            x = inputs[i % 4]
            same &= torch.equal(linear(x, weight), theirs[i % 4])
            same &= torch.equal(product(executor, case, x), ours[i % 4])
        return same

    assert both(0)
    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(both, range(6)))


@pytest.mark.parametrize("size", [1e-26, 1e-30, 1e-36, 1e-40])
@pytest.mark.parametrize("isa", ["vnni", "avx512"])
def test_x_too_small_for_digits_is_multiplied_as_floats(isa, size, monkeypatch):
    need(isa, monkeypatch)
    case = coded((64, 256), ("int4<group_size=32>", "int8<zero_points=true>"), "f32", (64, 64))
    x = torch.randn(1, 256) * size
    y, expected = product(build(case), case, x).double(), x.double() @ case.weight.T
    # products that are subnormal in fp32 have fewer bits
    assert (y - expected).norm() <= 1e-5 * expected.norm() + 256 * 2**-149 * case.weight.abs().max()


@pytest.mark.parametrize("isa", ["vnni", "avx2"])
@pytest.mark.parametrize(("largest", "most"), [(1e2, 1e-5), (1e3, 2e-6), (1e5, 2e-6)])
@pytest.mark.parametrize("batch", [1, 9])
def test_rows_without_a_weight_where_x_is_large_are_as_exact_as_in_fp32(isa, largest, most, batch, monkeypatch):
    need(isa, monkeypatch)
    case = coded((64, 256), ("int4_nv24<group_size=64>", "int4<group_size=32, zero_points=true>"), "f32", (64, 128))
    x = torch.randn(batch, 256, generator=torch.Generator().manual_seed(0))
    x[0, 7] = largest
    expected = x.double() @ case.weight.T
    rows = case.weight[:, 7] == 0
    assert rows.any()
    error = product(build(case), case, x).double()[0, rows] - expected[0, rows]
    assert error.norm() <= most * expected[0, rows].norm()


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_sums_of_digits_of_large_groups_do_not_overflow(size, monkeypatch):
    need("vnni", monkeypatch)
    case = coded((16, 1024), (f"int8<group_size={size}>",), "f32", (16, 1024))
    case.pools["p0_scales"].fill_(1)
    case.pools["p0_codes"].zero_()  # -128
    x = torch.full((1, 1024), 4161408.0)  # in digits -128, -128 and 64
    assert (product(build(case), case, x) == -128 * 1024 * 4161408.0).all()


@pytest.mark.parametrize("isa", ["vnni", "avx2"])
def test_a_scale_and_a_unit_of_x_that_have_no_product_in_fp32(isa, monkeypatch):
    need(isa, monkeypatch)
    case = coded((64, 64), ("int4<group_size=64>",), "f32", (64, 64))
    case.pools["p0_scales"].fill_(2.0**60)
    case.pools["p0_codes"].fill_(0x88)  # all of them zeros
    assert (product(build(case), case, torch.full((1, 64), 2.0**100)) == 0).all()


def test_threads_take_neighbours_only_where_bins_cost_the_same():
    for formats, even in ((("dense",), 1), (("dense", "empty"), 0)):
        executor = build(coded((256, 256), formats, "bf16", (32, 32)))
        assert isinstance(executor, TilesExecutor)
        assert executor._binding.even == even
