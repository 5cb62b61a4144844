"""Numbers near the ends of what fp32 holds, and codes that stand for none: alike in every form that a kernel has."""

import re

import pytest
import torch

from stoicc.codegen.cpu.simd import ISAS
from stoicc.ir.planes import pool_name
from stoicc.ir.registry import find_format
from tests.codegen.cpu.mosaics import mosaic, need
from tests.codegen.cpu.unrounded import build, coded, product

TILE = (32, 64)
BATCHES = (1, 2, 4, 5, 8, 64, 100)


@pytest.mark.parametrize("isa", ISAS)
def test_products_of_fp8_overflow_no_sooner_than_their_sums(isa, monkeypatch):
    need(isa, monkeypatch)
    case = mosaic(TILE, ("fp8",), "bf16", TILE)
    executor = build(case)
    for batch in BATCHES:
        x = (torch.randn(batch, TILE[1]) * 2.0**118).bfloat16()
        y, expected = product(executor, case, x).double(), case.expected(x)
        assert (y - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("isa", ISAS)
def test_a_code_of_no_number_counts_alike_at_any_batch(isa, monkeypatch):
    need(isa, monkeypatch)
    case = mosaic(TILE, ("fp8",), "bf16", TILE)
    case.pools[pool_name(0, "codes")][..., 3] = 0x7F
    executor = build(case)
    finite = [product(executor, case, torch.ones(batch, TILE[1]).bfloat16()).isfinite() for batch in BATCHES]
    assert len({bool(each.all()) for each in finite}) == 1


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_tables_of_fp8_are_bytes_without_a_sign(kind):
    code = find_format(f"fp8<kind={kind}>").tile_mac(TILE, "bf16")
    assert code is not None
    assert code.pairs is not None
    low, high = (
        [int(number) for number in table.split(",")] for table in re.findall(r"= \{(.*?)\};", code.pairs.source, re.S)
    )
    assert len(low) == len(high) == 128
    assert all(0 <= number < 256 for number in low)
    assert all(0 <= number < 128 for number in high)


@pytest.mark.parametrize("scale", [2.0**-125 * 1.23, 2.0**-130 * 1.23, 1e-42], ids=str)
@pytest.mark.parametrize("isa", ["amx", "avx512bf16", "vnni"])
def test_subnormal_scales_keep_their_bits(isa, scale, monkeypatch):
    need(isa, monkeypatch)
    case = coded(TILE, ("int4_nv24",), "f32", TILE, scale=scale)
    executor = build(case)
    for batch in (1, 2, 4, 8):
        x = torch.randn(batch, TILE[1]) * 1e28
        y, expected = product(executor, case, x).double(), case.expected(x)
        assert (y - expected).norm() <= 1e-6 * expected.norm()
