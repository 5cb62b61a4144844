"""Decode-once on a CPU: panels of packed planes, products that the BLAS writes where y is."""

import pytest
import torch
from torch.nn import functional

import stoicc
from stoicc.codegen.cpu.decode import CompiledDecoder
from stoicc.codegen.cpu.dense_once import LINE, DenseOnceExecutor
from stoicc.ir.dtypes import TORCH_DTYPES

SHAPE = (200, 330)


def once(kernel, x):
    y = torch.full((len(x), kernel.out_features), torch.nan, dtype=x.dtype)
    executor = kernel.executor("dense-once")
    executor.run(x, y, torch.empty(executor.workspace_bytes(len(x), x.dtype), dtype=torch.uint8))
    return y


def weight(dtype, tile=(64, 64)):
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[:64, :64] = 0  # an empty tile: its place in the scratch must be cleared
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [(64, 64), (16, 16), (32, 128)])
def test_packed_planes_are_read_as_they_are_held(dtype, tile, monkeypatch):
    values = weight(dtype)
    kernel = stoicc.compile(values, formats=["dense", "empty"], tile=tile, target="cpu")
    x = torch.randn(33, SHAPE[1]).to(dtype)
    before = once(kernel, x)
    kernel(x[:1])
    assert kernel.stats().packed_bytes  # and the canonical planes are gone

    def refused(*_):
        raise AssertionError("unpacked")

    monkeypatch.setattr("stoicc.codegen.cpu.packed.UnpackedOnDemand.entries", refused)
    assert torch.equal(once(kernel, x), before)
    assert kernel.executor("dense-once").transient_bytes == 0
    exact = functional.linear(x.double(), values.double())
    assert (before - exact).norm() <= 8e-3 * exact.norm()


def test_planes_that_came_back_are_read_where_they_are_now():
    kernel = stoicc.compile(weight(torch.float32), formats=["dense", "empty"], target="cpu")
    x = torch.randn(9, SHAPE[1])
    kernel(x[:1])
    before = once(kernel, x)
    name = next(pool for pool in kernel.pools if pool.endswith("values"))  # which brings them back
    kernel.pools[name].mul_(2)
    assert torch.equal(once(kernel, x), 2 * before)


@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_with_a_bias_of_its_dtype_is_written_where_y_is(dtype, bias, monkeypatch):
    values = weight(dtype)
    added = None if bias is None else torch.randn(SHAPE[0]).to(bias)
    monkeypatch.setattr("stoicc.codegen.cpu.dense_once.PANEL_BYTES", 1 << 15)  # several panels
    kernel = stoicc.compile(values, formats=["dense", "empty"], bias=added, target="cpu")
    finished: list[object] = []
    usual = DenseOnceExecutor._epilogue
    monkeypatch.setattr(DenseOnceExecutor, "_epilogue", lambda *given: finished.append(usual(*given)))
    x = torch.randn(17, SHAPE[1]).to(dtype)
    exact = functional.linear(x.double(), values.double(), None if added is None else added.double())
    y = once(kernel, x)
    assert (y - exact).norm() <= {torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype] * exact.norm()
    held = kernel.program.beside.bias
    assert bool(finished) == (held is not None and TORCH_DTYPES[held.dtype] != dtype)


def test_rows_of_a_panel_are_an_odd_number_of_lines_apart():
    for columns in (64, 330, 4096):
        kernel = stoicc.compile(torch.randn(64, columns), formats=["dense"], target="cpu")
        executor = kernel.executor("dense-once")
        assert isinstance(executor, DenseOnceExecutor)
        assert executor._stride * 4 // LINE % 2 == 1
        assert executor._stride >= -(-columns // 64) * 64
        assert executor.workspace_bytes(1, torch.float32) == 64 * executor._stride * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lines_of_a_panel_between_tiles_are_not_touched(dtype):
    """Rows that tiles fill need not be cleared first; those that they do not fill are."""
    values = weight(dtype)
    kernel = stoicc.compile(values, formats=["dense", "empty"], target="cpu")
    panel = torch.full((256, 400), torch.nan, dtype=dtype)
    CompiledDecoder(kernel.ir, kernel.pools)(0, 4, panel)
    assert torch.equal(panel[:200, :330], values)


def test_rows_of_one_word_of_positions_are_unpacked():
    values = torch.randn(512, 256).view(-1, 4)
    values.scatter_(1, values.abs().argsort(1)[:, :2], 0)
    kernel = stoicc.compile(values.view(512, 256), formats=["nv24"], tile=(32, 32), target="cpu")
    x = torch.randn(9, 256)
    kernel(x)
    torch.testing.assert_close(once(kernel, x), functional.linear(x, values.view(512, 256)))
