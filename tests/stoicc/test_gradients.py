"""Gradients through every kernel: of x, the bias, low-rank factors and the floats that formats keep."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stoicc
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.format import Plane, PlaneKind, TileFormat
from stoicc.ir.registry import REGISTRY, register_format
from tests.gradients import FORMATS, TOLERANCE, assert_gradients, close, expected, make_kernel
from tests.kernel_classes import EPILOGUES, FURTHER, MIXES

TRAINABLE = ("dense", "nv24", "nm", "bitmap", "outlier<values=int4<group_size=32>>", "mosaic")


@pytest.mark.parametrize("formats", [*FORMATS, "mosaic"])
def test_gradcheck_of_x_in_float64(formats):
    kernel = make_kernel(formats)
    x = torch.randn(3, 90, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kernel, (x,), fast_mode=True)


@pytest.mark.parametrize("beside", EPILOGUES)
def test_gradcheck_through_all_that_stands_beside(beside):
    kernel = make_kernel(beside=beside)
    x = torch.randn(2, 90, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kernel, (x,), fast_mode=beside != "all")


@pytest.mark.parametrize("formats", TRAINABLE)
def test_trained_pools_move_y_as_their_gradient_says(formats):
    """Central differences in float64; the pools lie on a grid, so that a step of 2**-13 is exact in fp32."""
    kernel = make_kernel(formats).requires_grad_()
    x = torch.randn(3, 90, dtype=torch.float64)
    along = torch.randn(3, 72, dtype=torch.float64)
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.copy_((parameter * 256).round() / 256)
    (kernel(x) * along).sum().backward()
    assert set(dict(kernel.named_parameters())) >= {"bias", "left", "right"}
    for name, parameter in kernel.named_parameters():
        way = torch.randint(-1, 2, parameter.shape) * 2.0**-13
        with torch.no_grad():
            parameter.add_(way)
            after = (kernel(x) * along).sum()
            parameter.sub_(2 * way)
            before = (kernel(x) * along).sum()
            parameter.add_(way)
        assert parameter.grad is not None
        said = 2 * (parameter.grad.double() * way.double()).sum()
        assert abs(after - before - said) <= 1e-4 * abs(said) + 1e-6, name


@pytest.mark.parametrize(
    ("formats", "target"), [*((text, "reference") for text in FORMATS), *((mix, "cpu") for mix in (*MIXES, *FURTHER))]
)
def test_every_backend_has_the_gradients_of_every_format(formats, target):
    kernel = make_kernel(formats, target=target).requires_grad_()
    assert_gradients(kernel, torch.randn(5, 90), TOLERANCE["f32"])


@pytest.mark.parametrize(
    ("beside", "weight"),
    [*((beside, "f32") for beside in EPILOGUES), ("all", "bf16"), ("scales", "f16"), ("gelu", "bf16")],
)
def test_every_dtype_and_epilogue(beside, weight):
    kernel = make_kernel(beside=beside, weight=weight, target="cpu").requires_grad_()
    tolerance = TOLERANCE[weight] * (3 if "relu" in EPILOGUES[beside] else 1)  # some z are rounded past the kink
    for batch in (1, 33, 150):
        kernel.zero_grad()
        assert_gradients(kernel, torch.randn(batch, 90).to(TORCH_DTYPES[weight]), tolerance)


@pytest.mark.parametrize("formats", TRAINABLE)
def test_panels_of_a_tile_row(formats, monkeypatch):
    monkeypatch.setattr("stoicc.codegen.reference.PANEL_WEIGHTS", 1)
    assert_gradients(make_kernel(formats, "bias").requires_grad_(), torch.randn(5, 90), TOLERANCE["f32"])


def test_shapes_of_x_and_strides_of_the_gradient():
    kernel = make_kernel(target="cpu")
    x = torch.randn(2, 3, 90, requires_grad=True)
    kernel(x).sum().backward()  # the gradient is one number, expanded
    assert x.grad is not None
    close(x.grad.flatten(0, 1), expected(kernel, x.flatten(0, 1), torch.ones(6, 72))["x"], 1e-5, "x")
    empty = torch.randn(0, 90, requires_grad=True)
    kernel.requires_grad_()
    kernel(empty).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 90)
    assert all(p.grad is not None and not p.grad.any() for p in kernel.parameters())


# -- training ------------------------------------------------------------------------------


def pruned(weight):
    return weight.where(weight.abs() > weight.abs().median(), 0)


class Masked(nn.Module):
    """A dense layer whose zeros stay zeros."""

    mask: torch.Tensor

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.register_buffer("mask", weight != 0)

    def dense(self):
        return self.weight * self.mask

    def forward(self, x):
        return F.linear(x, self.dense(), self.bias)


@pytest.mark.parametrize(
    "optimizer", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.Adam(p, 1e-2)]
)
@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_it_trains_as_a_masked_dense_net_does(optimizer, target):
    weights = stoicc.ops.nm_magnitude(torch.randn(96, 64) / 8), pruned(torch.randn(32, 96) / 8)
    biases = torch.randn(96), torch.randn(32)
    layers = [Masked(weights[0].dense(), biases[0]), Masked(weights[1], biases[1])]
    kernels = [stoicc.compile(w, bias=b, target=target) for w, b in zip(weights, biases, strict=True)]
    assert "nv24" in str(kernels[0].ir)
    assert "bitmap" in str(kernels[1].ir)
    nets = [
        nn.Sequential(first, nn.ReLU(), second) for first, second in (layers, [k.requires_grad_() for k in kernels])
    ]
    batches = [(torch.randn(40, 64), torch.randn(40, 32)) for _ in range(6)]
    dense, ours = (torch.tensor(trained(net, optimizer(net.parameters()), batches)) for net in nets)
    assert dense[-1] < dense[0]
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)
    for layer, kernel in zip(layers, kernels, strict=True):
        torch.testing.assert_close(kernel.to_dense(), layer.dense().detach(), rtol=1e-4, atol=1e-5)
        x = torch.randn(1, kernel.in_features)
        torch.testing.assert_close(kernel(x), layer(x), rtol=1e-4, atol=1e-4)
        plain = kernel.requires_grad_(False)
        assert not list(plain.parameters())
        torch.testing.assert_close(plain(x), layer(x).detach(), rtol=1e-4, atol=1e-4)


def trained(net, steps, batches):
    """The loss at each step."""
    losses = []
    for x, y in batches:
        loss = F.mse_loss(net(x), y)
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    return losses


# -- formats of users ----------------------------------------------------------------------


@dataclass(frozen=True)
class Scaled(TileFormat):
    """A value for each weight, a scale for each row, and one for the whole matrix: all of them trained."""

    name: ClassVar[str] = "test_scaled"

    def planes(self, tile, dtype):
        rows = Plane("row_scale", dtype, (tile[0],), PlaneKind.GROUP, 0)
        return Plane("values", dtype, tile), rows, Plane("scale", "f32", (1,), PlaneKind.MATRIX)

    def encode(self, tiles):
        rows = tiles.new_full(tiles.shape[:2], 2.0)
        return {"values": tiles / 4, "row_scale": rows, "scale": tiles.new_full((tiles.shape[0], 1), 2.0).float()}

    def decode(self, planes, tile, dtype):
        scales = planes["row_scale"][:, :, None] * planes["scale"][:, :, None]
        return (planes["values"] * scales).to(TORCH_DTYPES[dtype])

    def trainable(self, tile, dtype):
        return "values", "row_scale", "scale"


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_a_users_format_with_planes_that_tiles_share(target):
    register_format(Scaled())
    try:
        weight = torch.randn(40, 100)
        made = stoicc.compile(weight, ["test_scaled"], (16, 32), target=target, on_missing="dense")
        kernel = made.requires_grad_()
        x = torch.randn(7, 100, requires_grad=True)
        grad = torch.randn(7, 40)
        kernel(x).backward(grad)
        assert x.grad is not None
        close(x.grad, grad.double() @ weight.double(), 1e-5, "x")
        of_weight = grad.double().T @ x.detach().double()
        values, rows, scale = (torch.as_tensor(parameter.grad) for parameter in kernel.parameters())
        assert (values.shape, rows.shape, scale.shape) == ((12, 16, 32), (3, 16), (1, 1))
        close(rows.flatten()[:40], (of_weight * weight / 2).sum(1), 1e-5, "rows")
        close(scale, (of_weight * weight / 2).sum(), 1e-5, "scale")
        close(values[0], 4 * of_weight[:16, :32], 1e-5, "values")
        close(values[11, :8, :4], 4 * of_weight[32:, 96:], 1e-5, "values of a tail")
    finally:
        REGISTRY.unregister("test_scaled")
