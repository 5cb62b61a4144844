"""Compile checks on GPUs that nothing here runs on: what they cannot take shows at compile time."""

import pytest
import torch

from stoicc.codegen.gluon.compile import compile_for
from tests.kernel_classes import KernelClass, make_case


@pytest.fixture(autouse=True)
def _no_triton_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_100", "sm_120"])  # sm_80 and sm_90 have tests of their own
def test_a_mosaic_compiles_for_every_gpu(arch: str) -> None:
    kernel = KernelClass("mosaic_64", (128, 64), "bf16", "same", "bias", False, 16)
    (compiled,) = compile_for(make_case(kernel, (256, 456)).module, torch.bfloat16, 16, arch).kernels
    machine = compiled.machine()
    assert machine.spills == 0
    assert machine.loads[128] >= 9
    if arch not in ("sm_100", "sm_120"):  # triton 3.6's disassembler writes their branches another way
        assert sorted("HMMA.SP" in loop.opcodes for loop in machine.loops) == [False, False, True, True]
        assert all(loop.loads.get(128, 0) >= 3 for loop in machine.loops)


@pytest.mark.parametrize("weight", ["bf16", "f16"])
def test_zero_points_and_parts_compile_without_spills(weight: str) -> None:
    kernel = KernelClass("wide_zeros", (128, 64), weight, "same", "most", True, 64)
    module = make_case(kernel, (256, 456)).module
    kernels = compile_for(module, kernel.x_dtype, 64, "sm_90").kernels
    assert [compiled.name for compiled in kernels] == ["tiles_kernel", "reduce_kernel"]
    assert all(compiled.machine().spills_in_loops == 0 for compiled in kernels)
