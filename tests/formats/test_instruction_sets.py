"""Formats beyond those of the CPU mosaics, on every instruction set of this machine, against float64."""

import numpy as np
import pytest
import torch

import stoicc
from stoicc.codegen.cpu.simd import ISAS
from stoicc.formats._table import fp8_values
from stoicc.ir.dtypes import TORCH_DTYPES
from tests.codegen.cpu.mosaics import BOUNDS, need, relative_error

FORMATS = (
    "bitmap",
    "int2<group_size=32, zero_points=true>",
    "int3<group_size=0>",
    "fp8",
    "fp8<kind=e5m2, group_size=16>",
    "mxfp4",
    "nvfp4",
    "nm",
    "nm<n=1, m=4>",
    "nm<n=3, m=16>",
    "nm<n=5, m=16>",
)
COMPOSED = (
    "masked<values=int8<zero_points=true>>",
    "masked<mask=nm<n=2, m=16>, values=int4<group_size=16>>",
    "masked<mask=nv24, values=int2<group_size=0, zero_points=true>>",
    "masked<values=fp8<kind=e5m2>>",
    "masked<mask=nv24, values=nvfp4>",
    *("masked<mask=nm, values=int4>", "masked<mask=nm<n=1, m=4>, values=int2<zero_points=true>>"),
    *("masked<mask=nm<n=4, m=16>, values=int8>", "masked<mask=nv24, values=int4<group_size=32, zero_points=true>>"),
    *("masked<mask=nv24, values=int8<group_size=0>>", "masked<mask=nm, values=mxfp4>"),
    *("masked<mask=nv24, values=fp8>", "masked<mask=nm, values=fp8<kind=e5m2, group_size=32>>"),
    "group_sparse<group_size=8, zero_points=true>",
    "group_sparse<group_size=32>",
    "group_sparse<group_size=64>",
    "outlier<values=int4<group_size=32>, share=0.03>",
    "outlier<values=int3<group_size=16, zero_points=true>>",
)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("isa", ["vnni", "avx512", "avx2", "portable"])
def test_products_and_panels(isa, dtype, monkeypatch):
    check(FORMATS, isa, dtype, monkeypatch)


@pytest.mark.parametrize(
    ("isa", "dtype"),
    [
        ("avx512bf16", "bf16"),
        ("vnni", "f32"),
        ("avx512", "bf16"),
        ("avx2", "f16"),
        *(pytest.param("portable", dtype, marks=pytest.mark.slow) for dtype in ("f32", "f16", "bf16")),
    ],
)
def test_composed_formats(isa, dtype, monkeypatch):
    check(COMPOSED, isa, dtype, monkeypatch)


@pytest.mark.parametrize(
    "values",
    [
        "int8<group_size=32>",
        "int4<group_size=32>",
        "int4<group_size=64, zero_points=true>",
        "int2<group_size=32, zero_points=true>",
        "mxfp4",
        "nvfp4",
        "fp8",
        "fp8<kind=e5m2>",
    ],
)
@pytest.mark.parametrize(("isa", "dtype"), [("avx512bf16", "bf16"), ("vnni", "f32"), ("avx2", "f32")])
def test_kept_codes_alone_in_a_kernel(isa, dtype, values, monkeypatch):
    need(isa, monkeypatch)
    weight = torch.randn(70, 133, generator=torch.Generator().manual_seed(1))
    weight = weight.where(weight.abs() > 0.5, 0).to(TORCH_DTYPES[dtype])
    tile_map = [[f"masked<values={values}>"] * 3] * 2
    kernel = stoicc.compile(weight, tile_map=tile_map, approximate=True, target="cpu")
    held = kernel.to_dense().double()
    for batch in (1, 3, 5, 11):
        x = torch.randn(batch, 133).to(weight.dtype)
        y = torch.full((batch, 70), torch.nan, dtype=weight.dtype)
        executor = kernel.executor("tiles")
        executor.run(x, y, torch.full((executor.workspace_bytes(batch, x.dtype),), 255, dtype=torch.uint8))
        assert relative_error(y, x.double() @ held.T) < BOUNDS[dtype], batch


def check(formats: tuple[str, ...], isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and decoded panels of a matrix of tiles in these formats."""
    need(isa, monkeypatch)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(70, 64 * len(formats) + 5, generator=generator).to(TORCH_DTYPES[dtype])
    weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    tile_map = [[*formats, "dense"]] * 2
    kernel = stoicc.compile(weight, tile_map=tile_map, approximate=True, target="cpu")
    held = kernel.to_dense().double()
    for kind, batch in (("tiles", 1), ("tiles", 23), ("dense-once", 3)):
        x = torch.randn(batch, weight.shape[1], generator=generator).to(weight.dtype)
        executor = kernel.executor(kind)
        y = torch.full((batch, 70), torch.nan, dtype=weight.dtype)
        workspace = torch.full((executor.workspace_bytes(batch, x.dtype),), 255, dtype=torch.uint8)
        executor.run(x, y, workspace)
        assert relative_error(y, x.double() @ held.T) < BOUNDS[dtype], (kind, batch)


@pytest.mark.parametrize("isa", ISAS)
def test_every_half_and_every_small_float_is_multiplied_as_it_is(isa, monkeypatch):
    need(isa, monkeypatch)
    halves = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.float16)).view(256, 256)
    halves = halves.where(halves.isfinite(), 0)
    assert torch.equal(stoicc.compile(halves, ["dense"], target="cpu")(torch.eye(256)).T, halves.float())
    for kind in ("e4m3", "e5m2"):
        values = fp8_values(torch.arange(256, dtype=torch.uint8), kind).view(16, 16).repeat(1, 4)
        values = values.where(values.isfinite(), 0)
        kernel = stoicc.compile(values, [f"fp8<kind={kind}>"], tile=(16, 64), target="cpu")
        assert torch.equal(kernel(torch.eye(64)).T, values)
