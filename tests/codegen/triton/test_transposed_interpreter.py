"""h W by the emitted Triton kernel, in Triton's interpreter (`TRITON_INTERPRET=1`), against float64."""

from dataclasses import replace

import pytest
import torch

import stoicc
from stoicc.codegen.reference import decode_tiles
from stoicc.codegen.triton.backend import TritonBackend
from stoicc.codegen.triton.transposed import TransposedTiles
from stoicc.ir.registry import find_format
from stoicc.passes.build_csc import BuildCsc
from stoicc.pools import TiledWeight
from tests.gradients import assert_gradients
from tests.kernel_classes import FURTHER, MIXES, Case, KernelClass, make_case

pytestmark = pytest.mark.interpreter
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
PLAIN = KernelClass("mosaic", (16, 16), "f32", "same", "plain", False, 16)


def check(case: Case, batch: int, dtype: torch.dtype, on_missing: str = "error") -> None:
    rows, columns = case.module.tiles.shape
    executor = TritonBackend().build(BuildCsc().apply(case.module), case.pools, "transposed", on_missing)
    assert isinstance(executor, TransposedTiles)
    h = torch.randn(batch, rows, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = torch.full((batch, columns), torch.nan, dtype=dtype)
    executor.run(h, out, torch.empty(executor.workspace_bytes(batch, dtype), dtype=torch.uint8))
    want = h.double() @ decode_tiles(case.module.tiles, case.pools).double()
    error = (out.double() - want).norm() / want.norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"  # NaN is in no bound


@pytest.mark.parametrize("formats", [*MIXES, *FURTHER])
def test_every_format(formats):
    check(make_case(replace(PLAIN, formats=formats, tile=(32, 32)), (70, 90)), 5, torch.float32)


@pytest.mark.parametrize(
    ("weight", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16), ("bf16", torch.float32)]
)
@pytest.mark.parametrize("tile", [(16, 32), (64, 16)])
def test_dtypes_and_tails(weight, dtype, tile):
    for shape in ((37, 33), (64, 96), (1, 1)):
        check(make_case(replace(PLAIN, formats="dense", weight=weight, tile=tile), shape), 17, dtype)


def test_a_format_without_a_decode(monkeypatch):
    monkeypatch.setattr(type(find_format("nv24")), "decode_block", lambda *_: None)
    check(make_case(replace(PLAIN, tile=(32, 32)), (70, 90)), 3, torch.float32, on_missing="dense")


def test_a_kernel_trains():
    case = make_case(replace(PLAIN, beside="all", tile=(32, 32)), (72, 90))
    kernel = stoicc.compile(TiledWeight(case.module.tiles, case.pools), target="cuda").requires_grad_()
    for _ in range(2):
        kernel.zero_grad()
        assert_gradients(kernel, torch.randn(5, 90), 1e-5)
        assert isinstance(kernel.executor("transposed"), TransposedTiles)
        with torch.no_grad():
            for parameter in kernel.parameters():
                parameter.add_(0.1)
