"""Every executor of the CPU against the reference in float64, over drawn shapes, mixes and inputs.

Kernel classes come from the named pairwise list, so that nothing compiles without bound; the
Triton kernels of the same list are held in tests/codegen/triton.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import stoicc
from stoicc.pools import TiledWeight
from tests.kernel_classes import KERNEL_CLASSES, KernelClass, make_case, reference

TOLERANCE = {"f32": 1e-5, "f16": 2e-3, "bf16": 1e-2}
"""Relative Frobenius error allowed for a weight dtype."""

EXTENTS = (1, 2, 13, 16, 37, 64, 97, 128, 131, 200)
LONG = (2880, 7392, 10944)
"""Shapes that users complained about elsewhere: they do not divide the usual tiles."""


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN, so that an element nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@st.composite
def shapes(draw):
    """(M, K), at most one of them long."""
    rows, columns = draw(st.sampled_from(EXTENTS)), draw(st.sampled_from(EXTENTS))
    match draw(st.integers(0, 5)):
        case 0:
            rows = draw(st.sampled_from(LONG))
        case 1:
            columns = draw(st.sampled_from(LONG))
    return rows, columns


@st.composite
def inputs(draw, columns: int, dtype: torch.dtype):
    """x with last dimension K: 2-D or 3-D, contiguous or a strided or transposed view."""
    batch = draw(st.one_of(st.integers(0, 40), st.integers(0, 300)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    match draw(st.sampled_from(["plain", "strided", "transposed", "3-D", "3-D permuted"])):
        case "plain":
            return torch.randn(batch, columns, generator=generator).to(dtype)
        case "strided":
            return torch.randn(batch, 2 * columns + 1, generator=generator).to(dtype)[:, 1::2]
        case "transposed":
            return torch.randn(columns, batch, generator=generator).to(dtype).T
        case "3-D":
            return torch.randn(2, batch // 2, columns, generator=generator).to(dtype)
        case _:
            return torch.randn(batch // 3, columns, 3, generator=generator).to(dtype).transpose(1, 2)


def assert_close(found: Tensor, expected: Tensor, weight: str) -> None:
    assert not found.isnan().any(), "some element was never written, or is NaN"
    error = (found.double() - expected).norm()
    assert error <= TOLERANCE[weight] * expected.norm(), f"relative error {error / expected.norm():.2e}"


@settings(max_examples=150)
@given(st.data())
def test_cpu_executors_agree_with_the_reference(data):
    kernel_class: KernelClass = data.draw(st.sampled_from(KERNEL_CLASSES))
    shape = data.draw(shapes())
    x = data.draw(inputs(shape[1], kernel_class.x_dtype))
    case = make_case(
        kernel_class, shape, seed=data.draw(st.integers(0, 99)), empty=data.draw(st.sampled_from([0.2, 1.0]))
    )
    split = data.draw(st.sampled_from([2, 5])) if kernel_class.split else 1
    pipeline = f"drop-empty,order{{by=cost}},build-csr,split-k{{parts={split}}},balance{{bins=7}},fuse-epilogue"
    regimes = data.draw(st.sampled_from(["regimes{tiles=8}", "regimes{tiles=64}"]))
    tiled = TiledWeight(case.module.tiles, case.pools)
    kernel = stoicc.compile(tiled, pipeline=f"{pipeline},{regimes}", target="cpu")
    y = kernel(x)
    assert y.shape == (*x.shape[:-1], shape[0])
    assert y.dtype == x.dtype
    if x.numel():
        flat = x.reshape(-1, shape[1])
        assert_close(y.reshape(-1, shape[0]), reference(case, flat), kernel_class.weight)


@pytest.mark.parametrize("kernel_class", KERNEL_CLASSES, ids=lambda entry: entry.name)
def test_every_class_runs(kernel_class):
    case = make_case(kernel_class, (200, 300))
    kernel = stoicc.compile(TiledWeight(case.module.tiles, case.pools), target="cpu")
    for batch in (1, 5, 40):
        x = torch.randn(batch, 300, generator=torch.Generator().manual_seed(batch)).to(kernel_class.x_dtype)
        assert_close(kernel(x), reference(case, x), kernel_class.weight)
