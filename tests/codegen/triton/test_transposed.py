"""The emitted kernel of h W: its text, and what compilers for GPUs that are not here make of it."""

from dataclasses import replace

import pytest

from stoicc.codegen.triton.backend import TritonBackend
from stoicc.codegen.triton.compile_check import check_class
from stoicc.codegen.triton.launch import LaunchConfig
from stoicc.codegen.triton.transposed import emit_transposed
from stoicc.ir.errors import CodegenError
from stoicc.ir.types import Module
from stoicc.passes.build_csc import BuildCsc
from tests.kernel_classes import FURTHER, KERNEL_CLASSES, MIXES, KernelClass, make_case

PLAIN = KernelClass("mosaic", (64, 64), "bf16", "same", "plain", False, 64)


def columns(kernel: KernelClass, shape: tuple[int, int] = (256, 256)) -> Module:
    return BuildCsc().apply(make_case(kernel, shape).module)


def test_the_columns_of_a_mosaic(golden):
    golden(emit_transposed(columns(PLAIN, (200, 300))).source)


def test_text_depends_on_the_class_alone():
    text = emit_transposed(columns(PLAIN)).source
    assert emit_transposed(columns(replace(PLAIN, beside="all", split=True), (512, 320))).source == text


QUICK = {("nv24", "sm_80"), ("int4", "sm_90"), ("kept", "sm_90")}
CASES = [
    pytest.param(formats, target, marks=() if (formats, target) in QUICK else pytest.mark.slow)
    for formats in (*MIXES, *FURTHER)
    for target in ("sm_80", "sm_90")
]


@pytest.mark.parametrize(("formats", "target"), CASES)
def test_every_format_compiles_without_spills_in_loops(formats, target, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = LaunchConfig.choose(64, PLAIN.x_dtype, PLAIN.tile)
    (machine,) = check_class(columns(replace(PLAIN, formats=formats)), target, PLAIN.x_dtype, config, "transposed")
    assert machine.instructions > 0
    assert machine.spills_in_loops == 0, machine
    assert machine.shared <= 160 * 1024


@pytest.mark.parametrize(
    ("weight", "tile", "batch"), [("f32", (64, 64), 16), ("f16", (128, 64), 128), ("bf16", (32, 32), 16)]
)
def test_dtypes_and_tiles_compile(weight, tile, batch, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = replace(PLAIN, formats="nv24", weight=weight, tile=tile)
    config = LaunchConfig.choose(batch, kernel.x_dtype, tile)
    (machine,) = check_class(columns(kernel), "sm_90", kernel.x_dtype, config, "transposed")
    assert machine.spills_in_loops == 0, machine


def test_a_module_without_columns_is_refused():
    case = make_case(KERNEL_CLASSES[0], (100, 100))
    with pytest.raises(CodegenError, match=r"expected a transposed schedule, found none; run .* build-csc"):
        TritonBackend().build(case.module, case.pools, "transposed", "error")
