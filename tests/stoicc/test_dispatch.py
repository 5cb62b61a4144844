"""Who looks on sees an op of torch; where nobody does, a call goes to the executor at once."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import stoicc
from stoicc import dispatch


@pytest.fixture
def kernel():
    return stoicc.compile(torch.randn(48, 40), target="reference")


@pytest.fixture
def x():
    return torch.randn(3, 40)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(str(func))
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    """A tensor of a user's own class."""


def test_a_plain_call_is_no_op(kernel, x, monkeypatch):
    expected = kernel(x)
    monkeypatch.setattr(dispatch, "KINDS", {})
    assert torch.equal(kernel(x), expected)
    assert torch.equal(kernel(x[None, :, :])[0], expected)
    with torch.inference_mode():
        assert torch.equal(kernel(x), expected)
    for watched in (x.clone().requires_grad_(), torch.nn.Parameter(x), x.as_subclass(Own)):
        with pytest.raises(KeyError, match="reference"):
            kernel(watched)
    with torch.no_grad():
        assert torch.equal(kernel(x.clone().requires_grad_()), expected)


def test_modes_see_the_op(kernel, x):
    with Seen() as seen:
        kernel(x)
    assert "stoicc.reference.default" in seen.ops
    with Called() as called:
        kernel(x)
    assert any("stoicc.reference" in name for name in called.functions)


def test_a_profiler_and_a_trace_see_the_op(kernel, x):
    with torch.profiler.profile() as profile:
        kernel(x)
    assert "stoicc::reference" in {event.key for event in profile.key_averages()}
    assert "stoicc.reference.default" in make_fx(kernel)(x).code.replace("torch.ops.", "")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_see_the_op(kernel, x):
    torch.testing.assert_close(torch.vmap(kernel)(x), kernel(x))
    with pytest.raises(RuntimeError, match="functorch transforms"):  # not a gradient of zero
        torch.func.grad(lambda x: kernel(x).sum())(x)
