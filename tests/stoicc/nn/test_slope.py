"""SlopeLinear: its products against dense ones, what it holds, and its kernel."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import stoicc
from bench.training_memory import allocated, layer_memory, training_bytes
from stoicc.ir.errors import InputError
from stoicc.nn import SlopeLinear, kept, product

STRUCTURES = [(2, 4), (1, 2), (2, 8), (1, 3)]


def slope(rows=40, columns=48, n=2, m=4, rank=0, bias=True, dtype=torch.float32):
    """A layer whose second prune is not that of the start."""
    layer = SlopeLinear(columns, rows, bias, n, m, rank, dtype=dtype)
    with torch.no_grad():
        layer.kept.normal_()
    layer.repack()
    return layer


def adapted(layer):
    """The same layer with an adapter that does something."""
    with torch.no_grad():
        layer.left.normal_()
    layer.adapting = True
    return layer


@pytest.mark.parametrize(("n", "m"), STRUCTURES)
@pytest.mark.parametrize("panel", [8 << 20, 48 * 8 * 7])
def test_products_are_those_of_slope(n, m, panel, monkeypatch):
    monkeypatch.setattr(product, "PANEL_BYTES", panel)
    layer = slope(n=n, m=m, dtype=torch.float64)
    x, grad = torch.randn(3, 5, 48, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, 40).double()
    y = layer(x)
    y.backward(grad)
    dense, flat = layer.to_dense(), grad.reshape(-1, 40)
    torch.testing.assert_close(y, F.linear(x, dense, layer.bias))
    torch.testing.assert_close(x.grad, grad @ layer.backward_dense())  # equation 6
    full = flat.T @ x.detach().reshape(-1, 48)
    torch.testing.assert_close(layer.kept.grad, kept.collect(full, layer.places, n, m))  # equation 5, kept ones alone
    torch.testing.assert_close(layer.bias.grad, flat.sum(0))
    assert not torch.equal(dense, layer.backward_dense())


def test_gradients_of_the_weights_are_exact():
    layer = slope(8, 12, dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda values: product.slope_linear(x, values, layer.places, 2, 4), layer.kept.detach().requires_grad_()
    )


def test_the_adapter_adds_its_product_and_learns_only_when_it_is_on():
    layer = slope(rank=3, bias=False)
    x = torch.randn(7, 48)
    layer(x).sum().backward()
    assert layer.left.grad is None
    adapted(layer)
    y = layer(x)
    torch.testing.assert_close(y, x @ (layer.to_dense() + layer.left @ layer.right).T)
    y.sum().backward()
    assert layer.left.grad is not None
    assert layer.right.grad is not None


@pytest.mark.parametrize("panel", [8 << 20, 8 * 48 * 7])
def test_the_adapter_within_the_product_is_the_adapter_beside_it(panel, monkeypatch):
    """Of one panel and of several: y and every gradient as two products more would have them."""
    monkeypatch.setattr(product, "PANEL_BYTES", panel)
    layer = adapted(slope(rank=3)).double()
    x, grad = torch.randn(2, 4, 48, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, 40).double()
    held = (x, *layer.parameters())
    y = layer(x)
    found = torch.autograd.grad(y, held, grad)
    beside = product.slope_linear(x, layer.kept, layer.places, 2, 4)
    beside = beside + F.linear(F.linear(x, layer.right), layer.left) + layer.bias
    torch.testing.assert_close(y, beside)
    torch.testing.assert_close(found, torch.autograd.grad(beside, held, grad))


def test_r_x_waits_for_the_backward_pass_without_the_product_beside_it():
    layer, x = adapted(slope(40, 48, rank=3)), torch.randn(64, 48)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert 64 * 3 * 4 in sizes
    assert 64 * (40 + 3) * 4 not in sizes


def test_autocast_computes_and_returns_bf16_and_keeps_fp32_gradients():
    layer, x = adapted(slope(rank=2)), torch.randn(9, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert [str(getattr(held.grad, "dtype", None)) for held in (layer.kept, x)] == ["torch.float32"] * 2
    exact = x @ (layer.to_dense() + layer.left @ layer.right).T + layer.bias
    torch.testing.assert_close(y.float(), exact, atol=0.3, rtol=0.05)
    assert not torch.equal(y.float(), exact)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    layer, x = slope(dtype=torch.float64), torch.randn(8, 48, dtype=torch.float64)
    layer(x).square().sum().backward()
    whole, layer.kept.grad = layer.kept.grad, None
    for part in x.split(2):
        layer(part).square().sum().backward()
    torch.testing.assert_close(layer.kept.grad, whole)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    layer, x = adapted(slope(rank=2)), torch.randn(6, 48, requires_grad=True)
    layer(x).square().sum().backward()
    plain = [parameter.grad.clone() for parameter in (x, *layer.parameters())]
    x.grad = None
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(plain, (x, *layer.parameters()), strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does so itself
def test_torch_compile_takes_it_in_one_graph():
    layer, x = adapted(slope(rank=2)), torch.randn(6, 48, requires_grad=True)
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        run(x).square().sum().backward()
        found.append([held.grad for held in (x, *layer.parameters())])
        x.grad = None
        layer.zero_grad()
    torch.testing.assert_close(*found)


def test_repacking_before_backward_is_seen():
    layer = slope()
    y = layer(torch.randn(2, 48, requires_grad=True))
    layer.repack()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_repacking_in_parts_is_repacking():
    layer = slope(rows=42)
    with torch.no_grad():
        layer.kept.normal_()
    whole = SlopeLinear(48, 42)
    whole.load_state_dict(layer.state_dict())
    before = layer.places.clone()
    whole.repack()
    for part in range(100):
        layer.repack(part, 100)
    assert torch.equal(layer.places, whole.places)
    assert not torch.equal(layer.places, before)


def test_nothing_dense_is_held_and_scratch_is_a_panel(monkeypatch):
    monkeypatch.setattr(product, "PANEL_BYTES", 1 << 16)
    rows = columns = 1024
    layer = SlopeLinear(columns, rows, bias=False, dtype=torch.bfloat16)
    x = torch.randn(16, columns).bfloat16().requires_grad_()
    layer(x).sum().backward()  # gradients are there now
    work = allocated(lambda: layer(x).sum().backward())
    assert work.held == 0
    assert work.peak < layer.kept.nbytes + 8 * (1 << 16)  # a gradient before it is added, and panels
    assert work.peak < 2 * rows * columns


def test_memory_of_training_and_serving():
    found = layer_memory(size=512, rank=16)
    assert found.dense_training == 512 * 512 * 12
    assert found.training == 512 * 256 * 13 <= 0.63 * found.dense_training
    assert found.adapting == found.training + 2 * 16 * 512 * 12
    assert found.serving == 0.5625 * found.dense_serving


def test_an_adapter_that_waits_has_no_gradient_and_no_state():
    def bytes_of(rank):
        make = lambda: SlopeLinear(256, 256, False, rank=rank, dtype=torch.bfloat16)  # noqa: E731
        return training_bytes(make, torch.randn(4, 256).bfloat16()).held

    assert bytes_of(8) - bytes_of(0) == 2 * 8 * 256 * 2


@pytest.mark.parametrize(("n", "m", "name"), [(2, 4, "nv24"), (2, 8, "nm"), (1, 2, "nm"), (1, 3, "bitmap")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_layer(n, m, name, dtype, tmp_path):
    layer = adapted(slope(96, 192, n, m, rank=5)).to(dtype)
    kernel = layer.to_kernel()
    assert [segment.format.partition("<")[0] for segment in kernel.program.segments] == [name]
    assert kernel.program.beside.low_rank is not None
    x = torch.randn(33, 192).to(dtype)
    atol, rtol = (1e-3, 1e-4) if dtype == torch.float32 else (0.2, 0.05)
    torch.testing.assert_close(kernel(x), layer(x).detach(), atol=atol, rtol=rtol)
    kernel.save(tmp_path / "layer.safetensors")
    again = stoicc.load(tmp_path / "layer.safetensors")
    assert torch.equal(again(x), kernel(x))
    layer.adapting = False
    assert torch.equal(layer.to_kernel().to_dense(), layer.to_dense())


def test_the_kernel_takes_the_dtype_that_is_asked_for():
    layer = slope(64, 64)
    assert torch.equal(layer.to_kernel(torch.bfloat16).to_dense(), layer.to_dense().bfloat16())


def test_state_comes_back_and_must_fit():
    layer = adapted(slope(rank=2))
    other = SlopeLinear(48, 40, rank=2)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 48)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.backward_dense(), layer.backward_dense())
    with pytest.raises(InputError, match=r"slope: expected a state of 1:2, found 2:4; make the layer alike"):
        SlopeLinear(48, 40, n=1, m=2, rank=2).load_state_dict(layer.state_dict())


def test_rows_of_broken_groups_are_refused():
    with pytest.raises(InputError, match=r"slope: expected rows of whole groups of 4 weights, found 30 columns; leave"):
        SlopeLinear(30, 8)
    with pytest.raises(InputError, match=r"slope: expected floats and a rank of 0 or more, found .* and -1; correct"):
        SlopeLinear(32, 8, rank=-1)
    with pytest.raises(InputError, match=r"slope: expected mask 'magnitude' or 'random', found 'best'; name one"):
        SlopeLinear(32, 8, mask="best")  # type: ignore[arg-type]
