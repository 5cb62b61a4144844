"""Kernels of the Gluon dialect, compiled for GPUs that are not here, run on the PTX emulator against float64."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest
import torch
from torch import Tensor

from stoicc.codegen.gluon.compile import compile_for
from stoicc.codegen.gluon.launch import GluonConfig, shared_bytes
from tests.codegen.gluon.classes import COVER, PARAMETERS, Covered
from tests.kernel_classes import Case, KernelClass, make_case, reference
from tests.ptx.run import emulate

TOLERANCE = {"f16": 5e-4, "bf16": 4e-3}
"""Relative Frobenius error: y is rounded to 16 bits once, weights scaled in fp32 are not rounded at all."""


def each_value_once(cover: Sequence[Covered]) -> list[Covered]:
    """Classes of a cover, in any order, until every value of every parameter has occurred."""
    seen: set[tuple[str, object]] = set()
    kept = []
    for covered in Random(3).sample(cover, len(cover)):
        values = {(name, covered.value(name)) for name in PARAMETERS}
        if not values <= seen:
            kept.append(covered)
            seen |= values
    return kept


FAST = each_value_once(COVER)
"""What runs in every test run; the others with --slow."""


def error_of(y: Tensor, case: Case, x: Tensor) -> float:
    """Relative Frobenius error against float64; NaN where an element was not written."""
    want = reference(case, x)
    return float((y.double() - want).norm() / want.norm())


def run(covered: Covered, batch: int, seed: int = 0, config: GluonConfig | None = None) -> float:
    """Compile a class and run it on a weight and a batch of its own; its error."""
    kernel = covered.kernel
    case = make_case(kernel, covered.shape, seed=seed)
    compiled = compile_for(case.module, kernel.x_dtype, kernel.block_n, covered.arch, config)
    assert [launched.machine().spills_in_loops for launched in compiled.kernels] == [0] * len(compiled.kernels)
    assert max(launched.shared for launched in compiled.kernels) <= shared_bytes(int(covered.arch[3:]))
    x = torch.randn(batch, covered.shape[1]).to(kernel.x_dtype)
    return error_of(emulate(compiled, x, case.pools), case, x)


@pytest.fixture(autouse=True)
def _no_triton_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Compile afresh: nothing a machine has in its cache may decide a test."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    "covered",
    [pytest.param(c, id=c.name, marks=[] if c in FAST else pytest.mark.slow) for c in COVER],
)
def test_class_equals_the_reference(covered: Covered) -> None:
    block_n = covered.kernel.block_n
    batch = block_n + 3 if block_n < 64 else block_n - 5  # a tail, and for small blocks two of them
    assert run(covered, batch) < TOLERANCE[covered.kernel.weight]


def test_classes_cover_every_pair_and_fast_ones_every_value() -> None:
    for a, b in combinations(PARAMETERS, 2):
        found = {(covered.value(a), covered.value(b)) for covered in COVER}
        assert found == {(u, v) for u in PARAMETERS[a] for v in PARAMETERS[b]}, (a, b)
    for name, values in PARAMETERS.items():
        assert {covered.value(name) for covered in FAST} == set(values), name
    assert len(FAST) < len(COVER) / 3


PLAIN = KernelClass("mosaic", (64, 64), "bf16", "same", "bias", False, 16)


@pytest.mark.parametrize("batch", [1, 8, 16, 17])
def test_every_batch_of_one_kernel(batch: int) -> None:
    assert run(Covered(PLAIN, (70, 136), "sm_90"), batch) < TOLERANCE["bf16"]


@pytest.mark.parametrize("columns", [1, 57, 130, 199])
def test_columns_that_are_no_whole_runs(columns: int) -> None:
    """Rows of x that copies of 16 bytes cannot take as they are."""
    covered = Covered(replace(PLAIN, beside="all", split=columns > 100), (70, columns), "sm_90")
    assert run(covered, 19) < 1.5 * TOLERANCE["bf16"]  # x times its scale is rounded as well


def test_a_row_of_empty_tiles() -> None:
    """Nothing to multiply: y is the bias, and every element of it is written."""
    case = make_case(PLAIN, (600, 72), empty=0.8, seed=3)
    program = case.module.tiles
    empty = [index for index, segment in enumerate(program.segments) if segment.format == "empty"]
    assert (program.map_array() == empty[0]).all(1).any()
    x = torch.randn(5, 72).bfloat16()
    compiled = compile_for(case.module, torch.bfloat16, 16, "sm_80")
    assert error_of(emulate(compiled, x, case.pools), case, x) < TOLERANCE["bf16"]


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_rows_shorter_and_longer_than_the_ring(stages: int) -> None:
    config = GluonConfig(16, 4, stages)
    for columns in (64, 704):
        assert run(Covered(PLAIN, (64, columns), "sm_80"), 3, config=config) < TOLERANCE["bf16"]
