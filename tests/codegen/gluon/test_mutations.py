"""The emulated check sees faults: a kernel that is wrong in one place fails, whatever the place."""

import re

import pytest
import torch

from stoicc.codegen.gluon.compile import Compiled, compile_for
from stoicc.codegen.gluon.register_order import BlobLayout, pack
from stoicc.ir.fragment import Operands
from tests.codegen.gluon.test_emulated import TOLERANCE, error_of
from tests.kernel_classes import Case, KernelClass, make_case
from tests.ptx.program import EmulationError
from tests.ptx.run import Mutation, emulate

KERNEL = KernelClass("mosaic_64", (128, 64), "bf16", "same", "bias", False, 16)
SHAPE = (200, 712)


@pytest.fixture(scope="module")
def compiled() -> tuple[Case, Compiled]:
    case = make_case(KERNEL, SHAPE)
    return case, compile_for(case.module, torch.bfloat16, 16, "sm_80")


def is_caught(case: Case, compiled: Compiled, mutate: Mutation | None) -> bool:
    """Whether the run fails or its result is wrong."""
    x = torch.randn(19, SHAPE[1]).bfloat16()
    try:
        return not error_of(emulate(compiled, x, case.pools, mutate), case, x) < TOLERANCE["bf16"]
    except EmulationError:
        return True


def substitute(pattern: str, by: str, count: int = 0) -> Mutation:
    return lambda ptx: re.sub(pattern, by, ptx, count=count)


MUTATIONS: dict[str, Mutation] = {
    "waits for one copy too few": substitute(r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 3;"),
    "no barrier before a tile is read": substitute(r"bar\.sync\s+0;", ""),
    "sparsity selector of the other half": substitute(r"(mma\.sp[^;]*), 1;", r"\1, 0;"),
    "matrices of x transposed": substitute(r"m8n8\.x4\.shared", "m8n8.x4.trans.shared"),
    "registers of x swapped": substitute(r"(mma\.sync[^;]*\}, \{)(%r\d+),\s*(%r\d+)(\}, \{[^}]*\};)", r"\1\3,\2\4"),
    "registers of the weights swapped": substitute(r"(mma\.sp[^;{]*\{[^}]*\}, \{)(%r\d+),\s*(%r\d+)", r"\1\3,\2"),
    "code less 7, not 8": substitute(r"(?i)0xC308C308", "0xC307C307"),
    "a shift of codes": substitute(r"(shr\.u32 u, %r\d+, )8;", r"\g<1>12;"),
    "a mask of codes": substitute(r"0x000f000f", "0x00070007", 1),
    "halves of the scales swapped": substitute(
        r"shl\.b32 a, (%r\d+), 16; and\.b32 b, %r\d+, 0xffff0000", r"and.b32 a, \1, 0xffff0000; shl.b32 b, \1, 16"
    ),
    "x of another column": substitute(r"(and\.b32\s+%r\d+, %r\d+), -32;", r"\1, -64;"),
}  # fmt: skip


def test_the_kernel_as_it_is_passes(compiled: tuple[Case, Compiled]) -> None:
    assert not is_caught(*compiled, None)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_instruction_is_caught(name: str, compiled: tuple[Case, Compiled]) -> None:
    assert is_caught(*compiled, MUTATIONS[name])


@pytest.mark.parametrize("formats", ["nv24", "int4_64", "int4_nv24_64"])
def test_words_in_another_order_are_caught(formats: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blobs whose last words (positions, scales) stand one further on."""
    kernel = KernelClass(formats, (64, 64), "f16", "same", "plain", False, 8)
    case = make_case(kernel, (128, 136))
    compiled = compile_for(case.module, torch.float16, 8, "sm_90")
    x = torch.randn(8, 136).half()
    assert error_of(emulate(compiled, x, case.pools), case, x) < TOLERANCE["f16"]

    def rolled(operands: Operands, layout: BlobLayout) -> torch.Tensor:
        packed = pack(operands, layout).clone()
        packed[:, layout.positions :] = packed[:, layout.positions :].roll(1, 1)
        return packed

    monkeypatch.setattr("stoicc.codegen.gluon.blobs.pack", rolled)
    try:
        assert not error_of(emulate(compiled, x, case.pools), case, x) < TOLERANCE["f16"]
    except EmulationError:
        pass
