"""A kernel of the Gluon dialect holds its weight once, as far as an emulated GPU can tell."""

import pytest
import torch

import stoicc
from stoicc.codegen.triton import backend
from stoicc.codegen.triton.backend import TritonBackend
from tests.ptx.driver import emulated


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """The CPU stands for a GPU of sm_80."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(TritonBackend, "available", lambda self: None)
    monkeypatch.setattr(TritonBackend, "runs_on_cpu", property(lambda self: True))
    monkeypatch.setattr(backend, "_why_portable", lambda module, device: None)
    monkeypatch.setattr(backend, "capability_of", lambda device: 80)


def test_canonical_planes_are_let_go_and_come_back() -> None:
    weight = torch.randn(128, 256).bfloat16()
    weight.view(128, 64, 4)[:64, :, 2:] = 0
    bias = torch.randn(128)
    kernel = stoicc.compile(weight, target="cuda", bias=bias)
    assert {segment.format for segment in kernel.program.segments} == {"dense", "nv24"}
    payload, x = kernel.stats().payload_bytes, torch.randn(3, 256)
    want = x.bfloat16().double() @ weight.double().T + bias
    with emulated(80), torch.no_grad():
        y = kernel(x.bfloat16())
        assert "gluon" in kernel.executor("tiles").source
        assert float((y.double() - want).norm() / want.norm()) < 4e-3
        assert payload < kernel.stats().resident_bytes < 1.2 * payload
        assert torch.equal(kernel.to_dense(), weight)
        other, exact = kernel(x), x.double() @ weight.double().T + bias
        assert float((other.double() - exact).norm() / exact.norm()) < 1e-5
        assert kernel.stats().resident_bytes > 1.9 * payload, "copies that another dtype needs are counted"
    assert torch.equal(kernel.to_dense(), weight)
