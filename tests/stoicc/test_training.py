"""A kernel whose pools are trained, as a module: parameters, copies, files, steps, torch.compile, errors."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

import stoicc
from tests.gradients import assert_gradients, close, make_kernel


def gradient(kernel: stoicc.Kernel, name: str) -> Tensor:
    found = kernel.get_parameter(name).grad
    assert found is not None
    return found


def is_packed(kernel: stoicc.Kernel) -> bool:
    return kernel._store.packed is not None


def change(kernel: stoicc.Kernel, name: str) -> None:
    """In place, as an optimizer does."""
    with torch.no_grad():
        kernel.get_parameter(name).mul_(2)


def test_what_can_be_trained_is_a_parameter_where_asked():
    kernel = make_kernel(target="cpu")
    assert not list(kernel.parameters())
    assert kernel.trainable() == ("p3_values", "p4_values", "bias", "left", "right")
    before, state = kernel.to_dense(), kernel.state_dict()
    kernel.requires_grad_(only=["left", "right"])
    assert [name for name, _ in kernel.named_parameters()] == ["left", "right"]
    assert torch.equal(kernel.to_dense(), before)
    found = kernel.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    kernel(torch.randn(3, 90)).sum().backward()
    assert gradient(kernel, "left").any()
    kernel.requires_grad_(False)
    assert not list(kernel.parameters())
    assert not kernel(torch.randn(3, 90)).requires_grad
    with pytest.raises(stoicc.InputError, match=r"names of p3_values, .* found 'p2_codes'; codes, positions and"):
        kernel.requires_grad_(only=["p2_codes"])


def test_a_frozen_kernel_computes_as_it_did():
    kernel = make_kernel(target="cpu")
    x = torch.randn(3, 90)
    y = kernel(x)
    assert is_packed(kernel)
    kernel.requires_grad_()
    kernel(x).sum().backward()
    with torch.no_grad():
        assert torch.equal(kernel(x), y)
    kernel.requires_grad_(False)
    assert torch.equal(kernel(x), y)
    assert is_packed(kernel)  # planes are packed, and let go, as before


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_steps_reach_every_executor(target):
    kernel = make_kernel(target=target).requires_grad_()
    x = torch.randn(3, 90)
    for way in ("optimizer", "load", "data"):
        kernel(x).sum().backward()
        with torch.no_grad():
            kernel(x)
        other = {name: torch.randn_like(p) for name, p in kernel.named_parameters()}
        if way == "load":
            kernel.load_state_dict({**kernel.state_dict(), **other})
        for name, parameter in kernel.named_parameters():
            if way == "optimizer":
                with torch.no_grad():
                    parameter.copy_(other[name])
            elif way == "data":
                parameter.data = other[name]
        fresh = copy.deepcopy(kernel).requires_grad_(False)
        with torch.no_grad():
            close(kernel(x), fresh(x).double(), 1e-6, way)
        close(kernel(x), fresh(x).double(), 1e-5, way)
        kernel.zero_grad()
        assert_gradients(kernel, x, 1e-5)


def test_copies_and_files_keep_what_is_trained(tmp_path):
    kernel = make_kernel(target="cpu").requires_grad_()
    kernel.get_parameter("bias").requires_grad_(False)
    for other in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        trains = {name: p.requires_grad for name, p in other.named_parameters()}
        assert trains == {name: name != "bias" for name in kernel.trainable()}
        assert other.get_parameter("left").data_ptr() != kernel.get_parameter("left").data_ptr()
    change(kernel, "left")
    kernel.save(tmp_path / "w.safetensors")
    loaded = stoicc.load(tmp_path / "w.safetensors", target="cpu")
    assert torch.equal(loaded.to_dense(), kernel.to_dense())
    assert not list(loaded.parameters())
    x = torch.randn(3, 90)
    assert torch.equal(loaded(x), kernel.requires_grad_(False)(x))


def test_torch_compile_trains_a_kernel():
    kernel = make_kernel(target="cpu").requires_grad_()
    x = torch.randn(3, 90, requires_grad=True)
    kernel(x).square().sum().backward()
    wanted = {name: p.grad for name, p in kernel.named_parameters()}
    of_x, x.grad = x.grad, None
    kernel.zero_grad()
    torch.compile(lambda x: kernel(x).square().sum(), backend="aot_eager", fullgraph=True)(x).backward()
    torch.testing.assert_close(x.grad, of_x)
    for name, parameter in kernel.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])


def test_ops_pass_torchs_own_checks():
    kernel = make_kernel().requires_grad_()
    x = torch.randn(3, 90, requires_grad=True)
    torch.library.opcheck(torch.ops.stoicc.reference, (x, None, kernel._handle, list(kernel.parameters())))
    grad = torch.randn(3, 72)
    torch.library.opcheck(torch.ops.stoicc.input_gradient, (grad, kernel._handle))
    torch.library.opcheck(torch.ops.stoicc.before_activation, (grad, x.detach(), kernel._handle))
    names = list(kernel.trainable())
    torch.library.opcheck(torch.ops.stoicc.weight_gradients, (grad, x.detach(), kernel._handle, names))


def test_a_step_between_the_passes_is_an_error():
    kernel = make_kernel().requires_grad_()
    y = kernel(torch.randn(3, 90))
    change(kernel, "p3_values")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused():
    kernel = make_kernel()
    x = torch.randn(3, 90, requires_grad=True)
    (first,) = torch.autograd.grad(kernel(x).square().sum(), x, create_graph=True)
    with pytest.raises(stoicc.InputError, match="expected a first derivative, found a derivative of one; "):
        first.sum().backward()


def test_only_what_is_asked_for_is_computed(monkeypatch):
    kernel = make_kernel(beside="bias").requires_grad_(only=["bias"])
    monkeypatch.setattr("stoicc.gradients.plane_gradients", None)
    kernel(torch.randn(3, 90)).sum().backward()  # and nothing of x
    assert "transposed" not in kernel._executors
    assert torch.equal(gradient(kernel, "bias"), torch.full((72,), 3.0))
