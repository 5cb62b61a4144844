"""A call like one before asks little anew, and misses nothing: edits, watchers, other inputs, other threads."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import stoicc
from stoicc import ready as ready_module
from stoicc.codegen.cpu import backend, scratch

K, M = 128, 96


@pytest.fixture
def kernel():
    generator = torch.Generator().manual_seed(0)
    return stoicc.compile(torch.randn(M, K, generator=generator), target="cpu", bias=torch.zeros(M))


@pytest.fixture
def x():
    return torch.randn(2, K, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def looked_up(kernel, monkeypatch):
    """How often the kernel has asked everything."""
    calls, ask = [], type(kernel)._looked_up

    def counted(self, x):
        calls.append(x.shape)
        return ask(self, x)

    monkeypatch.setattr(type(kernel), "_looked_up", counted)
    return calls


def test_a_second_call_asks_nothing(kernel, x, looked_up):
    first = kernel(x)
    assert torch.equal(kernel(x.clone()), first)
    assert torch.equal(kernel(2 * x), 2 * first)
    assert len(looked_up) == 1
    assert kernel(x) is not kernel(x)
    with torch.inference_mode():
        assert kernel(x).is_inference()


@pytest.mark.parametrize("shape", [(K,), (1, K), (3, 5, K), (2, 0, K), (70, K)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape_gives_the_same_bits(shape, dtype):
    kernel = stoicc.compile(torch.randn(M, K).to(dtype), target="cpu")
    for x_dtype in {dtype, torch.float32}:
        x = torch.randn(shape).to(x_dtype)
        first, again = kernel(x), kernel(x)
        assert again.shape == first.shape == (*shape[:-1], M)
        assert again.dtype == first.dtype
        assert torch.equal(again, first)


def test_edits_are_seen(kernel, x):
    expected = kernel(x)
    kernel(x)
    kernel.bias.add_(1)  # in place, counted by torch
    torch.testing.assert_close(kernel(x), expected + 1)
    kernel(x)
    kernel.bias = torch.full((M,), 2.0)  # another tensor
    torch.testing.assert_close(kernel(x), expected + 2)
    kernel(x)
    next(pool for name, pool in kernel.pools.items() if name.endswith("values")).mul_(2)
    torch.testing.assert_close(kernel(x), 2 * expected + 2)
    kernel(x)
    kernel.bias.data.zero_()  # not counted
    kernel.refresh()
    torch.testing.assert_close(kernel(x), 2 * expected)
    kernel(x)
    kernel.load_state_dict(stoicc.compile(torch.zeros(M, K), formats=["dense"], bias=torch.ones(M)).state_dict())
    assert torch.equal(kernel(x), torch.ones(2, M))


def test_planes_that_somebody_holds_are_let_go_later(x):
    kernel = stoicc.compile(torch.randn(M, K), target="cpu")
    held = kernel.pools
    kernel(x)
    kernel(x)
    assert kernel.stats().resident_bytes > 1.5 * kernel.stats().payload_bytes
    del held
    kernel(x)
    assert kernel.stats().resident_bytes < 1.5 * kernel.stats().payload_bytes


@pytest.mark.parametrize(
    "edit", [lambda k: setattr(k, "bias", torch.ones(M)), lambda k: k.bias.add_(1)], ids=["another", "in place"]
)
def test_an_edit_during_a_call_is_seen_by_the_next(kernel, x, monkeypatch, edit):
    expected, run = kernel(x[:1]), backend.TilesExecutor.run

    def edited(self, *given):
        run(self, *given)
        edit(kernel)

    monkeypatch.setattr(backend.TilesExecutor, "run", edited)
    kernel(x)
    monkeypatch.undo()
    torch.testing.assert_close(kernel(x)[:1], expected + 1)


@pytest.mark.parametrize(
    "edit",
    [
        lambda buffers, bias: buffers.__ior__({"bias": bias}),
        lambda buffers, bias: dict.__setitem__(buffers, "bias", bias),
        lambda buffers, bias: (buffers.pop("bias"), buffers.setdefault("bias", bias)),
        lambda buffers, bias: (items := dict(buffers), buffers.clear(), buffers.update({**items, "bias": bias})),
        lambda buffers, bias: (buffers.popitem(), buffers.update(bias=bias)),
    ],
)
def test_tensors_exchanged_by_other_doors_are_seen(kernel, x, edit):
    expected = kernel(x)
    kernel(x)
    edit(kernel._buffers, torch.ones(M))
    torch.testing.assert_close(kernel(x), expected + 1)
    assert kernel._buffers.setdefault("bias", None) is kernel.bias


def test_shapes_of_symbols(kernel, x):
    expected = kernel(x)
    kernel(x)
    traced = make_fx(kernel, tracing_mode="symbolic")(x)
    torch.testing.assert_close(traced(x), expected)
    assert torch.equal(kernel(x), expected)


def test_a_kernel_that_nobody_has_is_gone_at_once(x):
    kernel = stoicc.compile(torch.randn(M, K), target="cpu")
    kernel(x)
    kernel(x)
    executor, kernel_is = weakref.ref(kernel.executor("tiles")), weakref.ref(kernel)
    gc.disable()
    try:
        del kernel
        assert kernel_is() is None
        assert executor() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("formats", [["bitmap"], ["empty", "dense"]])
def test_planes_that_stay_where_they_are(formats, x, looked_up):
    weight = torch.randn(M, K) * (torch.rand(M, K) < 0.5) if formats == ["bitmap"] else torch.zeros(M, K)
    kernel = stoicc.compile(weight, target="cpu", formats=formats)
    assert torch.equal(kernel(x), kernel(x))
    assert len(looked_up) == 1


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_whoever_watches_is_asked_for(kernel, x, looked_up):
    kernel(x)
    for watch in (Seen(), Called(), torch.profiler.profile()):
        before = len(looked_up)
        with watch:
            kernel(x)
        assert len(looked_up) == before + 1
    before = len(looked_up)
    kernel(x.clone().requires_grad_()).sum().backward()
    kernel(x.as_subclass(type("Own", (torch.Tensor,), {})))
    torch.vmap(kernel)(x[:, None])
    kernel(x[:, ::1].t().contiguous().t())  # strides of another order
    assert len(looked_up) == before + 4
    with torch.autocast("cpu", torch.bfloat16):
        kernel(x.bfloat16())
    assert len(looked_up) == before + 5
    with torch.no_grad():
        kernel(x.clone().requires_grad_())
    assert len(looked_up) == before + 5


def test_autocast_between_calls(x):
    kernel = stoicc.compile(torch.randn(M, K).bfloat16(), target="cpu")
    kernel(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = [kernel(x) for _ in range(3)]
    assert {y.dtype for y in cast} == {torch.bfloat16}
    assert {kernel(x).dtype for _ in range(3)} == {torch.float32}


def test_what_is_refused_stays_refused(kernel, x):
    kernel(x)
    with pytest.raises(stoicc.InputError, match="dense tensor"):
        kernel(x.to_sparse())
    with pytest.raises(stoicc.InputError, match="expected x on cpu"):
        kernel(x.to("meta"))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(stoicc.InputError, match="forward-mode"):
        kernel(x)


def test_parameters_and_moves_end_it(kernel, x, looked_up):
    kernel(x)
    kernel.requires_grad_()
    kernel(x).sum().backward()
    assert kernel.bias.grad is not None
    with torch.no_grad():
        expected = kernel(x)
        kernel.bias.add_(1)
        torch.testing.assert_close(kernel(x), expected + 1)
    kernel.requires_grad_(False)
    kernel.to("cpu")
    torch.testing.assert_close(kernel(x), expected + 1)


def test_other_numbers_of_threads(kernel, x, looked_up):
    threads, first = torch.get_num_threads(), kernel(x)
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(kernel(x), first)
        assert len(looked_up) == 2
        assert torch.equal(kernel(x), first)
        assert len(looked_up) == 2
    finally:
        torch.set_num_threads(threads)


def test_few_shapes_are_remembered(kernel, looked_up):
    inputs = [torch.randn(batch, K) for batch in range(1, 2 * ready_module.MOST)]
    for x in inputs:
        assert torch.equal(kernel(x), kernel(x))
    assert len(looked_up) == len(inputs)
    assert len(kernel._ready._known) <= ready_module.MOST


def test_calls_at_a_time_have_workspaces_of_their_own(kernel):
    inputs = [torch.randn(batch, K) for batch in (1, 2, 5, 17, 64)] * 20
    expected = [kernel(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for y, right in zip(pool.map(kernel, inputs), expected, strict=True):
            assert torch.equal(y, right)
    assert len({workspace.data_ptr() for workspace in scratch._free}) == len(scratch._free)


def test_large_workspaces_are_not_kept():
    large = scratch.take(scratch.LARGEST + 1)
    kept = len(scratch._free)
    scratch.give(large)
    assert large.numel() == scratch.LARGEST + 1
    assert len(scratch._free) == kept
    small = scratch.take(1)
    assert small.numel() == scratch.LARGEST
    scratch.give(small)
    assert scratch.take(scratch.LARGEST) is small
    scratch.give(small)


def test_a_low_rank_term_and_pieces_of_a_batch(monkeypatch):
    weight, x = torch.randn(M, K), torch.randn(200, K)
    kernel = stoicc.compile(stoicc.ops.naive_lora(stoicc.ops.nm_magnitude(weight), 8), target="cpu")
    assert kernel.program.beside.low_rank is not None
    assert torch.equal(kernel(x), kernel(x))
    torch.testing.assert_close(kernel(x), x @ kernel.to_dense().T, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(backend, "WORKSPACE_BYTES", 1)
    pieces = stoicc.compile(weight, target="cpu")
    assert torch.equal(pieces(x), pieces(x))
    torch.testing.assert_close(pieces(x), x @ weight.T, rtol=1e-4, atol=1e-4)
