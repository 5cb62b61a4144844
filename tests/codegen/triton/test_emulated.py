"""What the portable dialect compiles to for NVIDIA's GPUs, run on the PTX emulator: the interpreter cannot see it."""

import pytest
import torch
import triton
from torch import Tensor

from stoicc.codegen.triton.backend import Tiles
from stoicc.ir.dtypes import TORCH_DTYPES
from tests.kernel_classes import Case, KernelClass, make_case, reference
from tests.ptx.driver import emulated

TOLERANCE = {"f16": 5e-4, "bf16": 4e-3}
"""Relative Frobenius error: y is rounded to 16 bits once, and weights are the reference's bit for bit."""

CLASSES = (
    KernelClass("nv24", (64, 64), "bf16", "same", "bias", False, 16),
    KernelClass("nv24", (64, 32), "f16", "same", "plain", True, 16),
    KernelClass("int8", (64, 64), "bf16", "same", "scales", False, 16),
    KernelClass("int8", (32, 128), "f16", "same", "permuted", False, 32),
    KernelClass("int4", (64, 128), "bf16", "same", "plain", False, 16),
    KernelClass("int4", (64, 64), "f16", "same", "plain", False, 16),
    KernelClass("int4_nv24", (128, 128), "bf16", "same", "plain", False, 16),
    KernelClass("int4_nv24", (64, 64), "f16", "same", "gelu", True, 16),
    KernelClass("rows", (64, 64), "bf16", "same", "plain", False, 16),
    KernelClass("zeros", (64, 64), "f16", "same", "plain", False, 16),
    KernelClass("zeros", (64, 64), "bf16", "f32", "plain", False, 16),
    KernelClass("mosaic", (128, 64), "bf16", "same", "gelu", False, 64),
)


@pytest.fixture(autouse=True)
def _no_triton_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


HOPPER = CLASSES[3], CLASSES[11]
"""Classes whose products are `wgmma` on sm_90, where blocks of the batch and of the tile are wide enough."""


def run(case: Case, x: Tensor, capability: int = 80) -> Tensor:
    executor = Tiles(case.module, case.pools, "error")
    out = torch.full((x.shape[0], case.module.tiles.shape[0]), torch.nan, dtype=x.dtype)
    with emulated(capability):
        executor.run(x, out, torch.empty(executor.workspace_bytes(x.shape[0], x.dtype), dtype=torch.uint8))
    return out


CASES = [pytest.param(kernel, 80, id=f"{kernel.name}-sm_80") for kernel in CLASSES] + [
    pytest.param(k, 90, id=f"{k.name}-sm_90", marks=[] if k in HOPPER else pytest.mark.slow) for k in CLASSES
]


@pytest.mark.parametrize(("kernel", "capability"), CASES)
def test_class_equals_the_reference(kernel: KernelClass, capability: int) -> None:
    if capability == 90 and triton.__version__.startswith(("3.6", "3.7", "3.8")):
        pytest.skip("older Triton has operands of wgmma that are not K-major, which are not emulated")
    case = make_case(kernel, (200, 200))
    x = torch.randn(kernel.block_n + 3, 200).to(kernel.x_dtype)
    y, want = run(case, x, capability), reference(case, x)
    assert float((y.double() - want).norm() / want.norm()) < TOLERANCE[kernel.weight]


@pytest.mark.parametrize("weight", ["bf16", "f16"])
@pytest.mark.parametrize("formats", ["mosaic", "zeros", "int8", "int8<group_size=16, zero_points=true>"])
def test_decoded_tiles_are_the_reference_s(formats: str, weight: str) -> None:
    """Times the identity: scales of either sign, and every value is rounded as the reference rounds it."""
    case = make_case(KernelClass(formats, (64, 64), weight, "same", "plain", False, 32), (128, 64))
    for name, pool in case.pools.items():
        if name.endswith("scales"):
            pool[..., ::2, :] *= -1
    x = torch.eye(64).to(TORCH_DTYPES[weight])
    assert torch.equal(run(case, x).double(), reference(case, x))
