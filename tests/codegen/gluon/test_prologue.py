"""x scaled and permuted in the launch that multiplies, emulated: against float64 and against x prepared before."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from stoicc.codegen.gluon.compile import Compiled, compile_for
from stoicc.codegen.gluon.emit import emit
from stoicc.codegen.gluon.launch import (
    HAS_WGMMA,
    TILE_COLUMNS,
    TILE_ROWS,
    GluonConfig,
    loops_of,
    prologue_batch,
    prologue_rows,
)
from tests.codegen.gluon.test_emulated import TOLERANCE, error_of
from tests.codegen.gluon.test_executor import launch
from tests.codegen.gluon.test_mutations import substitute
from tests.kernel_classes import Case, KernelClass, make_case
from tests.ptx.program import EmulationError
from tests.ptx.run import Mutation, emulate

ROUNDED = 1.5
"""What rounding scaled x to bf16 adds to the tolerance."""


@pytest.fixture(autouse=True)
def _no_triton_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled_class(
    kernel: KernelClass, shape: tuple[int, int], arch: str, inside: bool = True
) -> tuple[Case, Compiled]:
    """Forced into the launch, or out of it, whatever the batch."""
    case = make_case(kernel, shape)
    assert case.module.schedule is not None
    module = replace(case.module, schedule=case.module.schedule.launch_with(prologue=int(inside)))
    return case, compile_for(module, kernel.x_dtype, kernel.block_n, arch)


def run(compiled: Compiled, case: Case, x: Tensor, mutate: Mutation | None = None) -> Tensor:
    return emulate(compiled, x, case.pools, mutate)


SLOW = pytest.mark.slow
CLASSES: list[tuple[tuple[KernelClass, tuple[int, int], str], Any]] = [
    ((KernelClass("nv24", (64, 64), "bf16", "same", "scales", False, 8), (200, 456), "sm_80"), ()),
    ((KernelClass("mosaic", (128, 64), "f16", "same", "permuted", False, 16), (300, 328), "sm_90"), ()),
    ((KernelClass("int4", (64, 128), "bf16", "same", "all", True, 32), (128, 456), "sm_80"), ()),
    ((KernelClass("int4_nv24", (128, 64), "bf16", "same", "all", False, 16), (200, 456), "sm_80"), SLOW),
    ((KernelClass("dense", (128, 128), "f16", "same", "permuted", True, 64), (200, 456), "sm_90"), SLOW),
    ((KernelClass("wide_zeros", (64, 256), "bf16", "same", "scales", False, 128), (200, 1288), "sm_90"), SLOW),
    ((KernelClass("int8", (128, 256), "bf16", "same", "all", True, 8), (300, 72), "sm_90"), SLOW),
    ((KernelClass("mosaic", (64, 64), "bf16", "same", "all", True, 128), (128, 520), "sm_80"), SLOW),
]
"""Scale, permutation and both; short rows and long ones, tails of rows, columns and the batch."""


@pytest.mark.parametrize(
    ("kernel", "shape", "arch"),
    [pytest.param(*case, marks=marks, id=f"{case[0].name}-{case[2]}") for case, marks in CLASSES],
)
def test_class_equals_the_reference(kernel: KernelClass, shape: tuple[int, int], arch: str) -> None:
    """And, bit for bit, the kernel that finds x prepared: sums are added in one order."""
    case, compiled = compiled_class(kernel, shape, arch)
    assert compiled.config.prologue
    assert compiled.kernels[0].machine().spills_in_loops == 0
    x = torch.randn(kernel.block_n + 3, shape[1]).to(kernel.x_dtype)
    y = run(compiled, case, x)
    assert error_of(y, case, x) < ROUNDED * TOLERANCE[kernel.weight]
    assert torch.equal(y, run(compiled_class(kernel, shape, arch, inside=False)[1], case, x))


TILES = tuple(product(TILE_ROWS, TILE_COLUMNS))
CROWDED = [("mosaic", (64, 64), 128), ("int8", (64, 128), 64), ("dense", (64, 256), 64), ("int8", (128, 256), 64)]
"""Classes that spilled before inputs were counted."""


@pytest.mark.parametrize(
    ("formats", "tile", "block_n"),
    [
        pytest.param(*case, marks=[] if case in CROWDED else SLOW, id=f"{case[0]}-{case[1][0]}x{case[1][1]}-n{case[2]}")
        for case in sorted({*CROWDED, *product(("dense", "nv24", "int8", "wide_zeros", "mosaic"), TILES, (64, 128))})
    ],
)
def test_registers_hold_what_is_on_its_way(formats: str, tile: tuple[int, int], block_n: int) -> None:
    """In loops; blocks of the batch are as narrow as that takes."""
    kernel = KernelClass(formats, tile, "bf16", "same", "all", False, block_n)
    _, compiled = compiled_class(kernel, (tile[0], 4 * tile[1]), "sm_90")
    assert compiled.config.prologue
    assert compiled.kernels[0].machine().spills_in_loops == 0


KERNEL = KernelClass("nv24", (64, 64), "bf16", "same", "all", False, 16)
SHAPE = (64, 584)


@pytest.fixture(scope="module")
def both() -> tuple[Case, Compiled]:
    return compiled_class(KERNEL, SHAPE, "sm_80")


MUTATIONS: dict[str, Mutation] = {
    "halves of two columns swapped": substitute(r"prmt\.b32 (%r\d+), (%r\d+), (%r\d+),", r"prmt.b32 \1, \3, \2,"),
    "scales swapped": substitute(
        r"mul\.f32 a, a, (%r\d+); mul\.f32 b, b, (%r\d+)", r"mul.f32 a, a, \2; mul.f32 b, b, \1"
    ),
    "rounded halves swapped": substitute(r"(cvt\.rn\.bf16x2\.f32 %r\d+), b, a;", r"\1, a, b;"),
    "no barrier": substitute(r"bar\.sync\s+0;", ""),
}


def test_the_kernel_as_it_is_passes(both: tuple[Case, Compiled]) -> None:
    x = torch.randn(19, SHAPE[1]).bfloat16()
    assert error_of(run(both[1], both[0], x), both[0], x) < ROUNDED * TOLERANCE["bf16"]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_instruction_is_caught(name: str, both: tuple[Case, Compiled]) -> None:
    case, compiled = both
    x = torch.randn(19, SHAPE[1]).bfloat16()
    try:
        assert not error_of(run(compiled, case, x, MUTATIONS[name]), case, x) < ROUNDED * TOLERANCE["bf16"]
    except EmulationError:
        pass


def test_a_block_stored_to_the_slot_that_is_read_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoicc.codegen.gluon.consumers.end_tile", lambda: ["blocks.index(t & 1).store(arriving)"])
    case, compiled = compiled_class(KERNEL, SHAPE, "sm_80")
    x = torch.randn(19, SHAPE[1]).bfloat16()
    try:
        assert not error_of(run(compiled, case, x), case, x) < TOLERANCE["bf16"]
    except EmulationError:
        pass


# ---- the choice -----------------------------------------------------------------------------


def test_a_small_batch_takes_one_launch() -> None:
    module = make_case(KERNEL, (256, 256)).module
    assert module.schedule is not None

    def chosen(batch: int, capability: int = 90, **given: int) -> bool:
        return GluonConfig.choose(batch, module, loops_of(module), capability, given).prologue

    assert [chosen(batch) for batch in (1, 64, 65, 4096)] == [True, True, False, False]
    large = [replace(module, tiles=replace(module.tiles, shape=shape)) for shape in ((8192, 28672), (20480, 5120))]
    assert [prologue_rows(one) for one in (module, *large)] == [64, 32, 64]
    assert chosen(4096, prologue=1)
    assert not chosen(1, prologue=0)
    crowded = make_case(replace(KERNEL, formats="dense", tile=(64, 256)), (256, 256)).module
    assert [GluonConfig.choose(n, crowded, loops_of(crowded), 90).prologue for n in (32, 33)] == [True, False]
    assert GluonConfig.choose(64, crowded, loops_of(crowded), 90, {"prologue": 1}).block_n == 32
    assert prologue_batch(crowded, 90) == 32
    narrow = make_case(replace(KERNEL, formats="wide_zeros", tile=(64, 256)), (256, 256)).module
    found = [GluonConfig.choose(n, narrow, loops_of(narrow), 90) for n in (64, 65)]
    assert [(one.block_n, one.prologue) for one in found] == [(32, True), (32, False)], "however narrow a block is"
    warpgroups = HAS_WGMMA and chosen(4096, prologue=1, wgmma=1)
    assert not warpgroups, "a block of wgmma's operands is copied as it is"
    plain = make_case(replace(KERNEL, beside="bias"), (256, 256)).module
    assert not GluonConfig.choose(1, plain, loops_of(plain), 90, {"prologue": 1}).prologue


def test_the_text(golden) -> None:
    module = make_case(KERNEL, (200, 456)).module
    text = emit(module, loops_of(module), 4, prologue=True).source
    assert max(map(len, text.splitlines())) <= 120
    golden(text)


@pytest.mark.parametrize("inside", [0, 1])
def test_a_batch_in_pieces_is_prepared_once(inside: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last piece is small enough to be prepared in its launch, and is not again."""
    monkeypatch.setattr("stoicc.codegen.triton.launch.PARTS_BYTES", 1)
    case = make_case(replace(KERNEL, beside="all", split=True), (64, 136))
    assert case.module.schedule is not None
    given = {} if not inside else {"prologue": 1}
    case = Case(replace(case.module, schedule=case.module.schedule.launch_with(**given)), case.pools)
    x = torch.randn(131, 136).bfloat16()
    y, launched = launch(case, x, 90)
    assert launched == ["tiles_kernel", "reduce_kernel"] * 2
    assert error_of(y, case, x) < ROUNDED * TOLERANCE["bf16"]
