"""Every kernel class compiles for GPUs that are not here, and keeps its registers in loops."""

import pytest
import torch

from stoicc.codegen.triton.compile_check import Machine, check_class, parse_target
from stoicc.codegen.triton.launch import LaunchConfig
from stoicc.ir.errors import CodegenError
from tests.kernel_classes import FURTHER_CLASSES, KERNEL_CLASSES, KernelClass, make_case

SOME = KERNEL_CLASSES[::10]
"""Classes that are compiled for the further targets too."""

CASES = [
    *[(kernel, target) for kernel in KERNEL_CLASSES + FURTHER_CLASSES for target in ("sm_80", "sm_90")],
    *[(kernel, target) for kernel in SOME + FURTHER_CLASSES[::3] for target in ("sm_100", "gfx942")],
]


def compiled(kernel: KernelClass, target: str) -> tuple[Machine, ...]:
    given = {"block_n": kernel.block_n} | ({"num_stages": 2} if target.startswith("gfx") else {})
    config = LaunchConfig.choose(kernel.block_n, kernel.x_dtype, kernel.tile, given)
    return check_class(make_case(kernel, (256, 256)).module, target, kernel.x_dtype, config)


@pytest.fixture(autouse=True)
def _no_triton_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Compile afresh: nothing a machine has in its cache may decide a test."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(("kernel", "target"), CASES, ids=lambda value: getattr(value, "name", value))
def test_class_compiles_without_spills_in_loops(kernel: KernelClass, target: str) -> None:
    for machine in compiled(kernel, target):
        assert machine.instructions > 0
        assert machine.shared <= (64 if target == "gfx942" else 160) * 1024
        if target.startswith("sm_"):
            assert machine.spills_in_loops == 0, f"{machine.kernel}: {machine}"


def test_kept_weights_are_operands_of_warpgroups() -> None:
    """Triton 3.6 aborts where a reshape of floats is right before the dot (`stoicc.formats._mask.woven`)."""
    (machine,) = compiled(KernelClass("kept", (64, 64), "bf16", "same", "plain", False, 64), "sm_90")
    assert any(loop.opcodes.get("HGMMA", 0) for loop in machine.loops)


LIMITS = {
    "dense": 480,
    "nv24": 720,
    "bitmap": 2100,
    "int8": 900,
    "int4": 750,
    "int4_nv24": 980,
    "int2": 1300,
    "int3": 1700,
    "fp8": 1800,
    "mxfp4": 1650,
    "nvfp4": 1750,
    "nm": 2100,
    "masked": 3700,
    "group_sparse": 2100,
}
"""Warp instructions a 64x64 bf16 tile at batch 16, with a little room: a decode that grows fails."""
OUTSIDE = {("int4_nv24", "sm_90"): 3}
"""Registers that are kept in memory before the loop begins; none elsewhere."""


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("formats", LIMITS)
def test_decode_stays_cheap(formats: str, target: str) -> None:
    kernel = KernelClass(formats, (64, 64), "bf16", "same", "plain", False, 16)
    (machine,) = compiled(kernel, target)
    assert len(machine.loops) == 1
    assert machine.warp_instructions[0] <= LIMITS[formats]
    assert machine.spills_in_loops == 0
    assert machine.spills <= OUTSIDE.get((formats, target), 0)
    widest, least = (64, 1) if formats == "int4_nv24" else (128, 2)  # 2 KB of codes for 128 threads
    assert machine.loads.get(widest, 0) >= least, f"expected planes loaded by {widest} bits, found {machine.loads}"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(("formats", "weight"), [("mosaic", "bf16"), ("rows", "f32"), ("zeros", "f16")])
def test_decode_kernels_of_dense_once(formats: str, weight: str, target: str) -> None:
    kernel = KernelClass(formats, (64, 64), weight, "same", "plain", False, 16)
    module = make_case(kernel, (256, 256)).module
    machines = check_class(module, target, kernel.x_dtype, LaunchConfig(16, 4, 2), "dense-once")
    assert module.schedule is not None
    assert len(machines) == len(module.schedule.csrs)
    assert all(machine.spills == 0 for machine in machines)


def test_one_loop_for_each_format() -> None:
    kernel = KernelClass("mosaic", (64, 64), "bf16", "same", "plain", False, 16)
    (machine,) = compiled(kernel, "sm_80")
    assert len(machine.loops) == 4
    assert all(loop.opcodes.get("HMMA", 0) > 0 for loop in machine.loops)


def test_spills_are_seen() -> None:
    """The check can fail: one warp cannot hold a wide block in its registers."""
    kernel = KernelClass("dense", (64, 64), "bf16", "same", "plain", False, 128)
    machine = check_class(make_case(kernel, (256, 256)).module, "sm_80", torch.bfloat16, LaunchConfig(128, 1, 2))[0]
    assert machine.spills_in_loops > 0


def test_unknown_target() -> None:
    with pytest.raises(CodegenError, match="expected sm_<number> or gfx<name>, found neither"):
        parse_target("tpu")
