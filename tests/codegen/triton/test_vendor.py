"""The executor that hands a whole matrix to a vendor's library, and which matrices have one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import stoicc
from stoicc.codegen.triton import backend
from stoicc.codegen.triton.backend import TritonBackend
from stoicc.codegen.triton.vendor import Vendor
from stoicc.ir.errors import CodegenError
from stoicc.ir.library import library_copy, library_matrix, why_no_library
from stoicc.ir.schedule import Regime, Schedule
from tests.kernel_classes import KernelClass, make_case

KERNEL = KernelClass("dense", (32, 32), "bf16", "same", "plain", False, 16)


@pytest.mark.parametrize(
    ("formats", "weight", "shape", "empty", "want"),
    [
        ("dense", "bf16", (70, 72), 0.0, "dense"),
        ("dense", "f16", (64, 64), 0.3, "some tiles are empty, which a dense matrix would store"),
        ("nv24", "bf16", (64, 128), 0.3, "2:4"),
        ("nv24", "bf16", (72, 128), 0.0, "72 x 128 is no multiple of 32 x 64"),
        ("mosaic", "bf16", (64, 128), 0.0, "tiles of int4"),
        ("int8", "f16", (64, 64), 0.0, "tiles of int8 are neither dense nor 2:4"),
        ("dense", "f32", (64, 64), 0.0, "weights are f32, not f16 or bf16"),
        ("dense", "f16", (64, 64), 1.0, "every tile is empty"),
    ],
)
def test_matrices_of_a_library(formats: str, weight: str, shape: tuple[int, int], empty: float, want: str) -> None:
    program = make_case(replace(KERNEL, formats=formats, weight=weight), shape, empty=empty).module.tiles
    if want in ("dense", "2:4"):
        assert library_matrix(program) == want
        assert why_no_library(program) is None
    else:
        assert library_matrix(program) is None
        assert str(why_no_library(program)).startswith(want)


def test_dense_and_sparse_tiles_together_have_none() -> None:
    tiled = stoicc.inspect(
        torch.randn(64, 64).half(), tile=(32, 32), tile_map=[["dense", "nv24"]] * 2, approximate=True
    )
    assert why_no_library(tiled.program) == "some tiles are dense and some 2:4"
    assert library_copy(tiled.program) == "dense"


@pytest.mark.parametrize(
    ("dtype", "fill", "found"), [(torch.float32, 1.0, "f32 weights"), (torch.float16, 0.0, "that every tile is empty")]
)
def test_what_no_library_keeps(dtype: torch.dtype, fill: float, found: str) -> None:
    tiled = stoicc.inspect(torch.full((64, 64), fill, dtype=dtype), tile=(32, 32))
    assert library_copy(tiled.program) is None
    with pytest.raises(CodegenError, match=f"expected f16 or bf16 weights to keep, found {found}; use dense-once"):
        Vendor(stoicc.compile(tiled, target="reference").ir, tiled.pools, "error")


class Sparse:
    """What `to_sparse_semi_structured` would give: it has a GPU alone."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def to_dense(self) -> Tensor:
        return self.weight


@pytest.mark.interpreter
@pytest.mark.parametrize("formats", ["dense", "nv24", "mosaic"])
@pytest.mark.parametrize("beside", ["plain", "bias", "all"])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_products(formats: str, beside: str, x_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.codegen.triton.test_interpreter import check

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", Sparse)
    plain = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: plain(x.float(), w.weight.float()).to(x.dtype))
    case = make_case(replace(KERNEL, formats=formats, beside=beside), (64, 128), empty=0.0)
    check(case, 5, x_dtype, "vendor", most=2e-2 if formats == "nv24" and beside == "all" else None)
    executor = TritonBackend().build(case.module, case.pools, "vendor", "error")
    assert executor.resident_bytes >= 64 * 128 * 2 * (9 / 16 if formats == "nv24" else 1)


def test_what_runs_and_why_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    module = make_case(replace(KERNEL, formats="nv24", tile=(64, 64)), (64, 128)).module
    assert module.schedule is not None

    def said(schedule: Schedule) -> str:
        text = TritonBackend().dialect(replace(module, schedule=schedule), torch.device("cuda"))
        return text.partition("portable Triton for others")[2]

    tiles = module.schedule.executor("tiles", 256)
    assert said(module.schedule) == ""
    assert said(tiles.executor("vendor")) == "; batches from 257 in the vendor's library: every tile is 2:4"
    predicted = replace(tiles, applied=("regimes{tiles=auto,device=gpu}",)).executor("dense-once")
    assert said(predicted).endswith("the vendor's GEMM, from where on it is predicted to be faster")
    both = replace(tiles, regimes=(Regime("tiles", 256), Regime("dense-once", 1000), Regime("vendor")))
    assert said(both).startswith("; batches from 257 to 1000 in dense-once: panels are decoded for the vendor's GEMM; ")
    assert said(tiles.launch_with(wgmma=1)) == "; wgmma for batches of 64 and more, which no GPU has confirmed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert said(tiles.launch_with(wgmma=1)) == "; no wgmma: sm_80 has no wgmma, which sm_90 alone has"
