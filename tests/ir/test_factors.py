"""Low-rank factors as codes: packed and back, what they mean, their text, and what the verifier refuses."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stoicc.formats  # noqa: F401  registers the built-in formats
from stoicc.ir import CodedFactor, Pool, VerifyError, digest, parse, verify
from stoicc.ir.dtypes import DTYPE_NAMES
from stoicc.ir.factors import factor_values, pack_codes, stored_bits, unpack_codes
from stoicc.ir.printer import print_module
from stoicc.ir.types import Beside, Module, Segment, TileProgram


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 21), st.integers(0, 99))
def test_codes_come_back_from_few_bytes(bits, rows, columns, seed):
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes.to(torch.uint8), bits)
    assert packed.shape == (rows, -(-columns * stored_bits(bits) // 8))
    assert torch.equal(unpack_codes(packed, bits, columns).long(), codes)


def test_the_first_code_of_a_byte_is_in_its_lowest_bits():
    assert pack_codes(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack_codes(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 2).tolist() == [[0b111001]]


def coded(
    rows: int, columns: int, side: str, bits: int = 4, group: int = 4
) -> tuple[CodedFactor, dict[str, torch.Tensor]]:
    """A factor of random codes, and its pools."""
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    scales = torch.rand(rows, -(-columns // (group or columns))).bfloat16()
    pools = {f"{side}_codes": pack_codes(codes, bits), f"{side}_scales": scales}
    first, second = (Pool(name, DTYPE_NAMES[p.dtype], tuple(p.shape), digest(p)) for name, p in pools.items())
    return CodedFactor(first, second, bits, group, columns), {**pools, "codes": codes}


@pytest.mark.parametrize(("bits", "group"), [(4, 4), (3, 0), (8, 7), (2, 100)])
def test_values_are_steps_times_the_scale_of_their_group(bits, group):
    factor, pools = coded(6, 10, "left", bits, group)
    found = factor_values(factor, pools)
    for row in range(6):
        for column in range(10):
            step = int(pools["codes"][row, column]) - (1 << (bits - 1))
            scale = pools["left_scales"][row, column // group if group else 0]
            assert found[row, column] == (step * scale.float()).bfloat16()


def module_of(left: CodedFactor, right: CodedFactor | Pool) -> Module:
    beside = Beside(low_rank=(left, right))  # type: ignore[arg-type]
    return Module(TileProgram("w", (40, 50), (64, 64), "bf16", (Segment("empty", 1),), (0,), beside))


def test_their_text_reads_back():
    module = module_of(coded(40, 9, "left")[0], coded(9, 50, "right", 3, 0)[0])
    text = print_module(module, exact=True)
    assert "low_rank (bits 4 group 4 columns 9 left_codes : u8[40, 5] #" in text
    assert parse(text) == module


LEFT, RIGHT = coded(40, 9, "left")[0], coded(9, 50, "right")[0]


@pytest.mark.parametrize(
    ("left", "message"),
    [
        (replace(LEFT, bits=1), "left_codes: expected 2 to 8 bits, groups of 0 or more, a column, found 1 bits"),
        (replace(LEFT, group_size=-1), "found 4 bits, groups of -1"),
        (replace(LEFT, columns=11), r"left_codes: expected u8\[40, 6\], found u8\[40, 5\]"),
        (replace(LEFT, group_size=5), r"left_codes: expected bf16\[40, 2\], found bf16\[40, 3\]"),
        (replace(LEFT, codes=replace(LEFT.codes, dtype="i8")), r"expected u8\[40, 5\], found i8\[40, 5\]"),
        (
            replace(LEFT, columns=10),
            r"expected factors \[40, r\] and \[r, 50\] with r >= 1, found \[40, 10\] and \[9, 50\]",
        ),
    ],
)
def test_the_verifier_refuses(left, message):
    with pytest.raises(VerifyError, match=message):
        verify(module_of(left, RIGHT))
