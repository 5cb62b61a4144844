"""fp8, mxfp4 and nvfp4 against the published tables and conversions."""

import pytest
import torch

import stoicc
from stoicc.formats import _table
from stoicc.formats.fp8 import Fp8
from stoicc.formats.mxfp4 import Mxfp4
from stoicc.formats.nvfp4 import Nvfp4
from stoicc.ir.dtypes import bits


def by_definition(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """OFP8 1.0, section 5: (-1)**s * 2**(e - bias) * (1 + m / 2**mantissa_bits), or subnormal where e is 0."""
    bias = (1 << (exponent_bits - 1)) - 1
    mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    size = mantissa * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa) * 2.0 ** (exponent - bias)
    return -size if code >> (exponent_bits + mantissa_bits) else size


def is_number(code: int, kind: str) -> bool:
    """e4m3 has one NaN of each sign, e5m2 the infinities and NaNs of IEEE 754."""
    return code & 127 != 127 if kind == "e4m3" else code & 124 != 124


@pytest.mark.parametrize(("kind", "exponent", "mantissa", "most"), [("e4m3", 4, 3, 448.0), ("e5m2", 5, 2, 57344.0)])
def test_every_code_of_fp8_on_the_reference_and_in_c(kind, exponent, mantissa, most):
    codes = [code for code in range(256) if is_number(code, kind)]
    published = torch.tensor([by_definition(code, exponent, mantissa) for code in codes])
    assert torch.equal(bits(_table.fp8_values(torch.tensor(codes, dtype=torch.uint8), kind)), bits(published))
    assert published.max() == most == _table.FP8_MAX[kind]
    assert torch.equal(_table.fp8_codes(published, kind), torch.tensor(codes, dtype=torch.uint8))
    weight = torch.zeros(64, 64)
    weight.view(-1)[: len(codes)] = published
    kernel = stoicc.compile(weight, [f"fp8<kind={kind}>"], target="cpu")
    assert torch.equal(bits(kernel.to_dense()), bits(weight))
    assert torch.equal(kernel(torch.eye(64)).T, weight)


def test_every_code_of_e2m1_and_ties_go_to_the_even_code():
    codes = torch.arange(16, dtype=torch.uint8)
    published = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]  # OCP MX 1.0, table 5
    assert torch.equal(bits(_table.fp4_values(codes)), bits(torch.tensor(published)))
    assert torch.equal(_table.fp4_codes(torch.tensor(published)), codes)
    halfway = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0, -0.25, -5.0])
    assert _table.fp4_values(_table.fp4_codes(halfway)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 0, -4]


@pytest.mark.parametrize("kind", ["e2m1", "e4m3", "e5m2"])
def test_a_sweep_rounds_as_codes_do(rng, kind):
    values = torch.randn(4096) * (4 * torch.randn(4096)).exp2()
    ties = torch.arange(-64, 65) / 8
    for given in (values, ties, 1e6 * values):
        if kind == "e2m1":
            wanted = _table.fp4_values(_table.fp4_codes(given))
        else:
            wanted = _table.fp8_values(_table.fp8_codes(given, kind), kind)
        assert torch.equal(_table.nearest_float(given, _table.SMALL_FLOATS[kind]), wanted)


def test_every_exponent_of_e8m0():
    values = _table.e8m0_values(torch.arange(255, dtype=torch.uint8))
    assert values.tolist() == [2.0 ** (code - 127) for code in range(255)]


def test_mxfp4_converts_as_the_specification_says():
    """OCP MX 1.0, 6.3: exponent floor(log2(amax)) - 2; what is above the largest code is the largest."""
    tile = torch.zeros(1, 16, 64)
    tile[0, 0, :3] = torch.tensor([7.9, 1.3, -0.2])
    tile[0, 1, 33] = 2.0**-20
    planes = Mxfp4().nearest(tile, torch.zeros(1, dtype=torch.int64))
    assert planes["scales"][0, :2].tolist() == [[127, 0], [0, 127 - 22]]
    back = Mxfp4().decode(planes, (16, 64), "f32")[0]
    assert back[0, :3].tolist() == [6.0, 1.5, 0.0]
    assert back[1, 33] == 2.0**-20


def test_nvfp4_scales_by_the_recipe():
    """Tensor scale amax / (6 * 448), block scale (block amax / 6) / tensor scale in e4m3."""
    tile = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    planes = Nvfp4().nearest(tile, torch.zeros(1, dtype=torch.int64))
    tensor = tile.abs().max() / 2688
    assert planes["tensor_scale"].item() == tensor
    wanted = (tile.abs().view(16, 4, 16).amax(2) / 6 / tensor).to(torch.float8_e4m3fn)
    assert torch.equal(planes["scales"][0], wanted.view(torch.uint8))
    assert planes["scales"].max() == 126  # 448, the block of the largest weight
    error = (Nvfp4().decode(planes, (16, 64), "f32")[0] - tile[0]).view(16, 4, 16).abs().amax(2)
    assert (error <= 1.2 * wanted.float() * tensor).all()  # codes 4 and 6 are two steps apart; scales are rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", ["fp8", "fp8<kind=e5m2, group_size=128>", "mxfp4", "nvfp4"])
def test_weights_on_the_grid_are_held_exactly_and_others_are_refused(fmt, dtype):
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([0.0, -0.0, 0.5, 1.0, 1.5, 2.0, 3.0, -4.0, 6.0, -6.0])
    weight = values[torch.randint(0, len(values), (100, 256), generator=generator)].to(dtype) * 2**-7
    kernel = stoicc.compile(weight, [fmt], target="reference")
    assert torch.equal(bits(kernel.to_dense()), bits(weight))
    weight[70, 3] = 1.0 + 2**-7 + 2**-6
    with pytest.raises(stoicc.FormatError, match=r"expected every weight to be a code of .* bit for bit, found"):
        stoicc.compile(weight, [fmt], target="reference")


def test_blocks_that_do_not_meet_the_tile():
    weight = torch.zeros(16, 16)
    with pytest.raises(stoicc.FormatError, match="format mxfp4: expected tiles of a multiple of 32 columns, the block"):
        stoicc.compile(weight, ["mxfp4"], tile=(16, 16))


def test_the_error_is_that_of_the_format():
    """Of normal weights: three mantissa bits, two and one leave about 2.6%, 5.3% and 10% to 12% of the norm."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    errors = {}
    for fmt in (Fp8(), Fp8("e5m2"), Nvfp4(), Mxfp4()):
        found = fmt.approximate(weight.view(1, 64, 256), torch.zeros(1, dtype=torch.int64))
        errors[str(fmt)] = (found.error.sum().sqrt() / weight.norm()).item()
    e4m3, e5m2, nvfp4, mxfp4 = errors.values()
    assert 0.02 < e4m3 < 0.03 < 0.045 < e5m2 < 0.06 < 0.08 < nvfp4 < 0.105 < mxfp4 < 0.14
