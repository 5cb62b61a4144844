"""Every format, on every instruction set, with x in every form, against the unrounded matrix in float64."""

from dataclasses import replace

import pytest
import torch

from stoicc.codegen.cpu.plan import classify
from stoicc.codegen.cpu.simd import ISAS
from stoicc.ir.dtypes import TORCH_DTYPES
from tests.codegen.cpu.mosaics import need
from tests.codegen.cpu.unrounded import assert_close, assert_columns, build, coded, hard_inputs, product

BATCHES = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 33, 40, 64, 65, 130)
NAMES = ("int8", "int4", "int4_nv24")
GROUPS = (16, 32, 64, 128, 256, 0)
TILES = ((16, 16), (32, 32), (64, 64), (64, 128), (128, 64), (256, 16))
DTYPES = (("bf16", "bf16"), ("f16", "f16"), ("f32", "f32"), ("bf16", "f32"), ("f16", "f32"))
"""Of the weight and of x."""
PAIR_TILES = ((32, 32), (64, 64), (64, 128), (128, 64), (256, 64))

Case = tuple[str, tuple[int, int], tuple[str, str], tuple[str, ...]]
"""Instruction set, tile, dtypes, formats."""


def variant(index: int, turn: int, groups: tuple[int, ...]) -> str:
    """An affine format: over six turns every name meets every group size, with and without zero points."""
    zeros = str((index // 3 + turn // 3) % 2 == 1).lower()
    return f"{NAMES[(index + turn) % 3]}<group_size={groups[index]}, zero_points={zeros}>"


def float_cases() -> list[Case]:
    """Of floats and digits: every tile meets every group size; every name, group size and zero points on VNNI."""
    cases: list[Case] = []
    for number, isa in enumerate(("vnni", "avx512bf16", "avx512", "avx2", "portable")):
        for turn, tile in enumerate(TILES):
            for half in range(2) if isa == "vnni" else ((turn + number) % 2,):
                formats = tuple(variant(index, turn, GROUPS) for index in range(3 * half, 3 * half + 3))
                cases.append((isa, tile, DTYPES[len(cases) % 5], formats))
    return cases


def pair_cases() -> list[Case]:
    """Of pairs, which groups of 16 have not."""
    cases: list[Case] = []
    for turn, tile in enumerate(PAIR_TILES):
        five = [variant(index, turn, GROUPS[1:]) for index in range(5)]
        for isa in ("amx", "avx512bf16"):
            cases.append((isa, tile, ("bf16", "bf16"), tuple(five[:3])))
            cases.append((isa, tile, ("bf16", "bf16"), ("dense", *five[3:], "nv24")))
    return cases


def octet_cases() -> list[Case]:
    """Of octets, which groups of 64 and more have: with every dtype, other formats beside them or none."""
    cases: list[Case] = []
    for turn, tile in enumerate(((64, 64), (64, 128), (16, 64), (64, 256), (128, 192))):
        groups = (64, 128, 0) if tile[1] % 128 == 0 else (64, tile[1], 0)
        three = tuple(variant(index, turn, groups) for index in range(3))
        cases.append(("amx", tile, DTYPES[turn % 5], (*three, "dense") if turn % 2 else three))
    return cases


MIXED: list[Case] = [
    ("vnni", (64, 64), ("bf16", "bf16"), ("dense", "int4", "nv24", "empty", "int8<zero_points=true>")),
    ("amx", (64, 64), ("bf16", "bf16"), ("int4_nv24<group_size=16>", "dense", "empty")),
    ("amx", (64, 128), ("bf16", "bf16"), ("int2<group_size=64>", "int3<group_size=128, zero_points=true>")),
    ("amx", (64, 64), ("f32", "f32"), ("int3<group_size=64>", "int2<group_size=64, zero_points=true>")),
    ("amx", (32, 32), ("f16", "f16"), ("int4_nv24<group_size=32, zero_points=true>", "nv24")),
    ("amx", (64, 64), ("bf16", "bf16"), ("dense",)),
    ("amx", (64, 64), ("bf16", "bf16"), ("int8",)),
    ("amx", (64, 64), ("bf16", "bf16"), ("nv24",)),
    ("avx512bf16", (64, 128), ("bf16", "bf16"), ("int2<group_size=64>", "int3<group_size=128, zero_points=true>")),
    ("avx512bf16", (64, 64), ("bf16", "bf16"), ("dense",)),
    ("avx512bf16", (32, 32), ("bf16", "bf16"), ("nv24",)),
    ("avx512", (32, 32), ("bf16", "bf16"), ("dense", "nv24")),
    ("avx2", (32, 32), ("f16", "f16"), ("dense", "nv24")),
    ("portable", (32, 32), ("bf16", "f32"), ("dense", "nv24")),
]
"""Formats with and without digits or pairs together, formats alone, and those that have no codes."""


CASES = [*float_cases(), *pair_cases(), *octet_cases(), *MIXED]


@pytest.mark.parametrize(
    ("isa", "tile", "dtypes", "formats"), CASES, ids=lambda v: "-".join(map(str, v)) if isinstance(v, tuple) else v
)
def test_products_of_any_codes_are_those_of_float64(isa, tile, dtypes, formats, monkeypatch):
    need(isa, monkeypatch)
    dtype, x_dtype = dtypes[0], TORCH_DTYPES[dtypes[1]]
    shape = (tile[0] + tile[0] // 2 + 3, max(5 * tile[1] + tile[1] // 2 + 3, 300))
    case = coded(shape, formats, dtype, tile, parts=2 if len(formats) % 2 else 1)
    executor, kernel = build(case), classify(case.module, x_dtype, isa)
    for batch in BATCHES:
        x = hard_inputs(batch, shape[1], x_dtype, first=batch)
        # the blocked loop nest multiplies what `to_dense` gives: codes times scale, rounded once
        rounded = kernel.pairs and batch >= kernel.least_blocked
        expected = replace(case, weight=case.weight.bfloat16().double()) if rounded else case
        assert_close(product(executor, case, x), x, expected)
    for batch in (1, 4, 48):
        assert_columns(executor, case, x_dtype, batch)


def test_the_cases_are_what_they_say():
    floats = [case for case in CASES if case[0] == "vnni"]
    assert {f for *_, formats in floats for f in formats if "int" in f} >= {
        f"{name}<group_size={size}, zero_points={zeros}>"
        for name in NAMES
        for size in GROUPS
        for zeros in ("true", "false")
    }
    for isa in ISAS[1:]:
        assert {dtypes for case_isa, _, dtypes, _ in CASES if case_isa == isa} == set(DTYPES)
    for isa, tile, dtypes, formats in pair_cases():
        case = coded((3, 3), formats, dtypes[0], tile)
        kernel = classify(case.module, torch.bfloat16, isa)
        assert kernel.pairs, formats
        assert kernel.digits == any("int" in text for text in formats)
    assert {dtypes for _, _, dtypes, _ in octet_cases()} == set(DTYPES)
    for isa, tile, dtypes, formats in octet_cases():
        kernel = classify(coded((3, 3), formats, dtypes[0], tile).module, TORCH_DTYPES[dtypes[1]], isa)
        assert kernel.octets, formats


@pytest.mark.parametrize("zeros", ["true", "false"])
@pytest.mark.parametrize("tile", [(32, 1024), (48, 2048)], ids=str)
def test_sums_of_long_groups_are_exact(tile, zeros, monkeypatch):
    """Sums of digits times codes stay below 2**24, up to which fp32 has every whole number."""
    need("vnni", monkeypatch)
    case = coded((tile[0] + 3, tile[1]), (f"int4_nv24<group_size=0, zero_points={zeros}>",), "f32", tile)
    executor = build(case)
    for batch in (1, 2, 4):
        x = torch.randint(-(2**22), 2**22, (batch, tile[1])).float()
        x[0] = 127 + 127 * 256 + 63 * 65536  # the largest digits, all of one sign
        y, expected = product(executor, case, x), x.double() @ case.weight.T
        assert ((y - expected).abs() <= 2**-22 * expected.abs()).all()
