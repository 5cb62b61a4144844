"""Low-rank factors of a CPU kernel live once, packed for their kernels: bytes, bits, training, and every way out."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

import stoicc
from bench.training_memory import allocated
from stoicc.ir.dtypes import bits
from stoicc.nn import SlopeLinear
from stoicc.ops.graph import CompressedWeight, LowRank
from stoicc.passes.pipeline import default_pipeline
from tests.gradients import close, make_kernel
from tests.stoicc.test_compact import is_compact, resident

FACTORS = {"left", "right"}


def adapted(rank: int = 40, weight: str = "bf16", size: tuple[int, int] = (100, 150)) -> CompressedWeight:
    """2:4 and an adapter, with a -0.0 among its numbers."""
    dtype = getattr(torch, {"bf16": "bfloat16", "f32": "float32"}[weight])
    left, right = (torch.randn(shape).to(dtype) for shape in ((size[0], rank), (rank, size[1])))
    right[0, 0] = -0.0
    compressed = CompressedWeight.of(stoicc.ops.nm_magnitude(torch.randn(size).to(dtype)))
    return compressed.then(LowRank(left, right, "an adapter"))


def packed(weight: CompressedWeight, **options) -> stoicc.Kernel:
    kernel = stoicc.compile(weight, target="cpu", **options)
    kernel(torch.randn(1, kernel.in_features))
    assert is_compact(kernel)
    return kernel


def test_inference_takes_the_bytes_of_the_weight_and_of_one_adapter():
    """From allocations: 0.5625 of dense for 2:4 in bf16, and 2 * 64 / 1024 for rank 64."""
    layer = SlopeLinear(1024, 1024, bias=False, rank=64, dtype=torch.bfloat16)
    layer.adapting = True

    def serve() -> stoicc.Kernel:
        kernel = layer.to_kernel(target="cpu")
        kernel(torch.zeros(1, 1024, dtype=torch.bfloat16))
        return kernel

    served, dense = allocated(serve), 2 * 1024 * 1024
    assert 0.6875 <= served.held / dense < 0.6875 + 0.01
    stats = served.result.stats()
    assert stats.beside_bytes == 2 * 2 * 64 * 1024
    assert 0.6875 <= stats.resident_bytes / dense < 0.6875 + 0.01
    assert stats.resident_bytes <= resident(served.result) < 0.7 * dense


@pytest.mark.parametrize("weight", ["bf16", "f32"])
@pytest.mark.parametrize("rank", [1, 33, 64])
def test_they_come_back_bit_for_bit(rank, weight):
    given = adapted(rank, weight)
    kernel = stoicc.compile(given, target="cpu")
    before = {name: kernel.get_buffer(name).clone() for name in FACTORS}
    y = kernel(torch.ones(1, 150))
    assert kernel._store.gone >= FACTORS
    for name, value in before.items():
        assert torch.equal(bits(kernel.source_of_pools[name]), bits(value))
    assert is_compact(kernel)
    for name, value in before.items():
        assert torch.equal(bits(kernel.get_buffer(name)), bits(value))
    assert not is_compact(kernel)
    assert torch.equal(bits(kernel(torch.ones(1, 150))), bits(y))
    assert is_compact(kernel)


@pytest.mark.parametrize("width", [4, 5, 8])
def test_codes_of_factors_live_once_too(width):
    weight = stoicc.ops.quantize_adapter(adapted(weight="f32"), bits=width, group_size=32)
    kernel = stoicc.compile(weight, target="cpu")
    names = {"left_codes", "right_codes"}
    before = {name: kernel.get_buffer(name).clone() for name in names}
    kernel(torch.randn(1, 150))
    assert names <= kernel._store.gone
    assert all(torch.equal(kernel.source_of_pools[name], value) for name, value in before.items())


def test_rows_in_an_order_of_their_own():
    base, left, right = torch.randn(128, 128), torch.randn(128, 7), torch.randn(7, 128)
    base[::2, :64] = base[1::2, 64:] = 0  # sorted rows make empty tiles
    weight = CompressedWeight.of(base).then(LowRank(left, right, "an adapter"))
    kernel = packed(weight, pipeline=f"reorder-rows,{default_pipeline('cpu')}", formats=["dense", "empty"])
    assert kernel.program.beside.row_permutation is not None
    x = torch.randn(4, 128)
    close(kernel(x), x @ kernel.to_dense().T, 1e-5, "y")
    assert torch.equal(kernel.get_buffer("left"), left)


def outputs(kernel: stoicc.Kernel) -> list[Tensor]:
    return [kernel(torch.ones(batch, 150)) for batch in (1, 3)]


def test_every_way_out_has_them(tmp_path):
    kernel = packed(adapted(weight="f32"))
    y, left = outputs(kernel), kernel.source_of_pools["left"]
    kernel.save(tmp_path / "k.safetensors")
    ways = [stoicc.load(tmp_path / "k.safetensors", target="cpu"), copy.deepcopy(kernel)]
    ways.append(pickle.loads(pickle.dumps(kernel)))
    assert is_compact(kernel)
    ways.append(copy.deepcopy(kernel))
    ways[-1].get_buffer("left").zero_()
    ways[-1].load_state_dict(kernel.state_dict())
    for way in ways:
        assert all(torch.equal(a, b) for a, b in zip(outputs(way), y, strict=True))
        assert torch.equal(way.source_of_pools["left"], left)
    kernel.get_buffer("left").mul_(2)  # an edit in place
    assert not torch.equal(kernel(torch.ones(3, 150)), y[1])
    with pytest.warns(UserWarning, match="keeps its f32 weights"):
        kernel.to(torch.bfloat16)
    assert torch.equal(kernel.get_buffer("left"), 2 * left)


def test_large_batches_and_gradients_read_them_packed():
    kernel, x = packed(adapted(weight="f32")), torch.randn(600, 150, requires_grad=True)
    whole = kernel.to_dense().double()
    y = torch.ops.stoicc.dense_once(x, None, kernel._handle)
    close(y.detach(), x.detach().double() @ whole.T, 1e-5, "y")
    y.sum().backward()
    assert x.grad is not None
    close(x.grad, torch.ones(600, 100).double() @ whole, 1e-5, "x")
    assert is_compact(kernel)


def test_a_held_factor_stays():
    kernel = stoicc.compile(adapted(weight="f32"), target="cpu")
    held = kernel.get_buffer("left")
    y = kernel(torch.ones(1, 150))
    assert not is_compact(kernel)
    held.mul_(2)
    assert not torch.equal(kernel(torch.ones(1, 150)), y)
    del held
    kernel(torch.ones(1, 150))
    assert is_compact(kernel)


def test_adapters_that_train_over_packed_planes():
    """Planes are let go all the same, and a factor that is a parameter is never what was packed once."""
    kernel = packed(adapted(weight="f32")).requires_grad_(only=["left", "right"])
    x = torch.randn(4, 150)
    optimizer = torch.optim.SGD(kernel.parameters(), 0.1)
    for _ in range(3):
        with torch.no_grad():
            kernel(x)  # on tiles
        assert is_compact(kernel)
        assert not kernel._store.gone & FACTORS
        optimizer.zero_grad()
        y = kernel(x)
        expected = x @ kernel.to_dense().T
        close(y.detach(), expected.detach(), 1e-5, "y")
        y.square().mean().backward()
        optimizer.step()
        copied = copy.deepcopy(kernel)
        assert torch.equal(copied.get_parameter("left"), kernel.get_parameter("left"))
    kernel.requires_grad_(False)
    with torch.no_grad():
        close(kernel(x), x @ kernel.to_dense().T, 1e-5, "y")


def test_a_trained_plane_keeps_all_planes():
    kernel = make_kernel(target="cpu").requires_grad_(only=["p3_values"])
    with torch.no_grad():
        kernel(torch.randn(3, 90))
    assert not is_compact(kernel)
