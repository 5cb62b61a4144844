"""Planes of a CPU kernel live once: what is resident, and that no edit and no door of nn.Module misses them."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import stoicc
from stoicc.buffers import Buffers
from stoicc.codegen.cpu.packed import UnpackedOnDemand
from stoicc.formats.dense import Dense
from stoicc.ir.registry import REGISTRY

BATCHES = (1, 4, 64, 256)
AFFINE = ("int8", "int4", "int4_nv24")
FORMATS = (
    "dense",
    "nv24",
    *(f"{name}<group_size={size}>" for name in AFFINE for size in (16, 64, 128, 0)),
    *(f"{name}<group_size={size}, zero_points=true>" for name in AFFINE for size in (32, 0)),
)


def resident(root: object) -> int:
    """Bytes of every torch storage and numpy array that can be reached from an object, each counted once."""
    seen: set[int] = set()
    found: dict[object, int] = {}
    waiting = [root]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, type) or type(each).__name__ in ("module", "function"):
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            if not each.is_meta:
                found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
            continue
        if type(each).__name__ == "ndarray":
            found[each.ctypes.data] = each.nbytes  # type: ignore[attr-defined]
            continue
        waiting += gc.get_referents(each)
    return sum(found.values())


def is_compact(kernel: stoicc.Kernel) -> bool:
    return isinstance(kernel._buffers, Buffers) and kernel._buffers.packed is not None


@pytest.fixture
def mosaic(rng):
    weight = torch.randn(200, 300, generator=rng)
    kind = torch.randint(0, 5, (4, 5), generator=rng)
    compressed = stoicc.ops.nm_magnitude(weight, 0, 4, where=kind == 0)
    compressed = stoicc.ops.nm_magnitude(compressed, where=(kind == 1) | (kind == 2))
    return stoicc.ops.group_absmax(compressed, where=(kind == 2) | (kind == 3))


@pytest.fixture
def kernel(mosaic):
    made = stoicc.compile(mosaic, bias=torch.randn(200), target="cpu")
    made(torch.randn(3, 300))
    assert is_compact(made)
    return made


@pytest.fixture
def x():
    return torch.randn(3, 300)


def compiled(text: str, dtype: torch.dtype = torch.bfloat16) -> stoicc.Kernel:
    """A kernel of a weight that is approximated in one format, tails in both directions."""
    tile_map = [[text] * 5] * 4
    return stoicc.compile(torch.randn(230, 300).to(dtype), tile_map=tile_map, approximate=True, target="cpu")


@pytest.mark.parametrize("text", FORMATS)
def test_bits_are_those_of_a_kernel_that_keeps_both_copies(text):
    compact = compiled(text)
    kept = copy.deepcopy(compact)
    holding = kept.pools
    before = compact.to_dense()
    for batch in BATCHES:
        x = torch.randn(batch, 300).bfloat16()
        assert torch.equal(compact(x), kept(x))
        for kind, given in (("dense-once", x), ("reference", x), ("reference", x.double())):
            made = [
                torch.ops.stoicc.__getattr__(kind.replace("-", "_"))(given, None, k._handle) for k in (compact, kept)
            ]
            assert torch.equal(*made)
    assert is_compact(compact)
    assert not is_compact(kept)
    assert torch.equal(compact.to_dense(), before)
    # positions of a group of 16 fill half a word each: 1.25 there
    assert compact.stats().resident_bytes < 1.3 * compact.stats().payload_bytes
    assert kept.stats().resident_bytes > 1.95 * kept.stats().payload_bytes
    for name, pool in compact.pools.items():  # the buffers come back
        assert torch.equal(pool.view(torch.uint8), holding[name].view(torch.uint8))
    assert not is_compact(compact)


@pytest.mark.parametrize("text", ["dense", "nv24", "int8<group_size=128>", "int4<group_size=0>", "int4_nv24"])
def test_resident_after_calls_is_the_payload(text):
    tile_map = [[text] * 16] * 16
    weight = torch.randn(1024, 1024).bfloat16()
    kernel = stoicc.compile(weight, tile_map=tile_map, approximate=True, target="cpu")
    for calls in (1, 50):
        for batch in BATCHES:
            x = torch.randn(batch, 1024).bfloat16()
            for _ in range(calls):
                kernel(x)
        kernel.executor("dense-once").run(x, torch.empty_like(x), torch.empty(9 << 20, dtype=torch.uint8))
        stats = kernel.stats()
        assert is_compact(kernel)
        assert resident(kernel) <= 1.05 * stats.payload_bytes + (16 << 10)
        assert stats.resident_bytes <= resident(kernel)
        assert stats.resident_bytes >= stats.payload_bytes
        assert 0 < stats.scratch_bytes < 64 << 20


STATM = """
import ctypes, gc, os
import torch, stoicc
torch.set_num_threads(1)
def rss():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
small = stoicc.compile(torch.randn(128, 128).bfloat16(), ["dense"], target="cpu")
weight = torch.empty(8192, 4096, dtype=torch.bfloat16).normal_()
xs = [torch.randn(n, 4096).bfloat16() for n in (1, 4, 64, 256)]
for n in (1, 256):
    small(torch.randn(n, 128).bfloat16())
    small.executor("dense-once")
before = rss()
kernel = stoicc.compile(weight, ["dense"], target="cpu")
for x in xs:
    kernel(x)
first = rss() - before
for x in xs[:2] * 50 + xs[2:] * 5:
    kernel(x)
kernel.executor("dense-once").run(xs[-1], torch.empty(256, 8192).bfloat16(), torch.empty(9 << 20, dtype=torch.uint8))
last = rss() - before
print(kernel.stats().payload_bytes, first, last)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_the_process_grows_by_the_payload():
    done = subprocess.run([sys.executable, "-c", STATM], capture_output=True, text=True, check=True)
    payload, first, last = map(int, done.stdout.split())
    assert payload == 64 << 20
    assert first < payload + (16 << 20)  # libraries and the schedule
    assert last < payload + (16 << 20)


def test_a_state_dict_is_whole_and_aliases_the_buffers(kernel, x):
    y = kernel(x)
    state = kernel.state_dict()
    assert not is_compact(kernel)
    assert kernel.stats().packed_bytes == 0  # not a second copy until the next call
    assert torch.equal(kernel(x), y)
    assert not is_compact(kernel)  # somebody holds them, and may edit them
    state["p4_values"].zero_()
    assert not torch.equal(kernel(x), y)
    del state
    changed = kernel(x)
    assert is_compact(kernel)
    assert torch.equal(kernel(x), changed)
    close(changed, x @ kernel.to_dense().T + kernel.bias)


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_values_reach_a_compact_kernel(kernel, x, assign):
    y = kernel(x)
    state = {name: value.clone() for name, value in kernel.state_dict().items()}
    kernel(x)
    doubled = {name: value * 2 if name.endswith(("values", "scales")) else value for name, value in state.items()}
    assert is_compact(kernel)
    kernel.load_state_dict(doubled, assign=assign)
    close(kernel(x) - kernel.bias, 2 * (y - kernel.bias))
    kernel.load_state_dict(state, assign=assign)
    del state, doubled
    assert torch.equal(kernel(x), y)
    assert torch.equal(kernel(x), y)
    assert is_compact(kernel)


EDITS = {
    "attribute": lambda kernel: kernel.p4_values.mul_(0),
    "get_buffer": lambda kernel: kernel.get_buffer("p4_values").mul_(0),
    "named_buffers": lambda kernel: dict(kernel.named_buffers())["p4_values"].mul_(0),
    "of the parent": lambda kernel: dict(nn.Sequential(kernel).named_buffers())["0.p4_values"].mul_(0),
    "buffers": lambda kernel: [b.mul_(0) for b in kernel.buffers() if b.is_floating_point()],
    "pools": lambda kernel: kernel.pools["p4_values"].mul_(0),
    "tiled": lambda kernel: kernel.tiled().pools["p4_values"].mul_(0),
    "state_dict": lambda kernel: kernel.state_dict()["p4_values"].mul_(0),
    "data": lambda kernel: kernel.p4_values.data.mul_(0),
    "numpy": lambda kernel: kernel.p4_values.numpy().fill(0),
    "assignment": lambda kernel: setattr(kernel, "p4_values", torch.zeros_like(kernel.p4_values)),
    "register_buffer": lambda kernel: kernel.register_buffer("p4_values", torch.zeros_like(kernel.p4_values)),
    "apply": lambda kernel: kernel._apply(torch.zeros_like),
    "update": lambda kernel: kernel._buffers.update(p4_values=torch.zeros_like(kernel.p4_values)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_reaches_the_executor(kernel, x, edit):
    y = kernel(x)
    assert is_compact(kernel)
    EDITS[edit](kernel)
    edited = kernel(x)
    assert not torch.equal(edited, y)
    close(edited, x @ kernel.to_dense().T + kernel.bias)
    assert torch.equal(kernel(x), edited)
    assert is_compact(kernel)


@pytest.mark.parametrize(
    "hold",
    [
        lambda kernel: kernel.p4_values,
        lambda kernel: kernel.p4_values.view(-1)[3:],
        lambda kernel: kernel.p4_values.detach(),
        lambda kernel: kernel.p4_values.numpy()[0],
        lambda kernel: memoryview(kernel.p4_values.numpy()),
        lambda kernel: kernel.p4_values.untyped_storage(),
        lambda kernel: kernel.p4_values.__dlpack__(),
        lambda kernel: kernel._buffers.items(),
        lambda kernel: iter(kernel._buffers.values()),
        lambda kernel: kernel.named_buffers(),
    ],
)
def test_what_somebody_holds_stays(kernel, x, hold):
    y = kernel(x)
    held = hold(kernel)
    if hasattr(held, "send"):
        next(held)
    for _ in range(2):
        assert torch.equal(kernel(x), y)
        assert not is_compact(kernel)
    del held
    assert torch.equal(kernel(x), y)
    assert is_compact(kernel)


def test_buffers_can_be_gone_through_with_calls_between(kernel, x):
    y = kernel(x)
    for name, buffer in kernel.named_buffers():
        assert not buffer.is_meta
        kept = buffer.clone()
        buffer.zero_()
        if name.endswith(("values", "scales", "bias")):
            assert not torch.equal(kernel(x), y)
        buffer.copy_(kept)
        assert torch.equal(kernel(x), y)
    del buffer
    assert torch.equal(kernel(x), y)
    assert is_compact(kernel)


def test_uncounted_edits_of_held_buffers_need_a_refresh_as_ever(kernel, x):
    y = kernel(x)
    held = kernel.p4_values
    kernel(x)
    held.data.mul_(0)
    kernel.refresh()
    edited = kernel(x)
    assert not torch.equal(edited, y)
    held.data.fill_(1)
    del held  # without a refresh: what is let go is packed anew first
    assert not torch.equal(kernel(x), edited)
    assert is_compact(kernel)
    kernel.refresh()  # of what nobody could edit
    close(kernel(x), x @ kernel.to_dense().T + kernel.bias)
    assert is_compact(kernel)


def test_a_bias_is_edited_while_the_planes_are_packed(kernel, x):
    y, bias = kernel(x), kernel.bias
    kernel(x)
    bias.add_(1)
    close(kernel(x), y + 1)


def test_kernels_that_share_buffers_keep_them_and_the_last_lets_go(kernel, x):
    other = stoicc.compile(kernel, target="cpu")
    y = kernel(x)
    assert torch.equal(other(x), y)
    assert not is_compact(kernel)
    assert not is_compact(other)
    kernel.p4_values.mul_(0)
    assert torch.equal(other(x), kernel(x))
    assert not torch.equal(other(x), y)
    changed = other(x)
    del kernel.p4_values
    handle = weakref.ref(kernel)
    del kernel
    gc.collect()
    if handle() is None:
        assert torch.equal(other(x), changed)


def test_reading_leaves_planes_packed(kernel, x, tmp_path):
    y = kernel(x)
    dense = kernel.to_dense()
    kernel.save(tmp_path / "w.safetensors")
    pickled = pickle.loads(pickle.dumps(kernel))
    copied = copy.deepcopy(kernel)
    kernel.stats(), repr(kernel), str(kernel.ir), kernel.eval(), kernel.zero_grad()
    assert set(kernel._buffers) == {"bias", *(pool.name for pool in kernel.program.pools())}
    assert "p4_values" in kernel._buffers
    assert is_compact(kernel)
    loaded = stoicc.load(tmp_path / "w.safetensors", target="cpu")
    for each in (pickled, copied, loaded):
        assert torch.equal(each.to_dense(), dense)
        assert torch.equal(each(x), y)
        assert is_compact(each)
        assert each.stats().resident_bytes == kernel.stats().resident_bytes
    copied.p4_values.zero_()
    copied(x)
    assert torch.equal(kernel(x), y)  # a copy shares nothing with what is packed


def test_gradients_leave_planes_packed(kernel):
    given = torch.randn(4, 300, requires_grad=True)
    for _ in range(2):
        kernel(given).sum().backward()
    assert given.grad is not None
    close(given.grad, 2 * kernel.to_dense().sum(0).expand(4, 300))
    assert is_compact(kernel)


def test_moves_bring_the_buffers_back(kernel, x):
    y = kernel(x)
    assert torch.equal(kernel.to("cpu")(x), y)
    assert is_compact(kernel)
    with pytest.warns(UserWarning, match="keeps its f32 weights"):
        kernel.double()
    assert torch.equal(kernel(x), y)
    moved = kernel.to("meta")
    assert all(buffer.is_meta for buffer in moved.buffers())


def test_a_buffer_that_could_differ_from_its_values_stays(kernel, x):
    y = kernel(x)
    kernel.p4_values.requires_grad_()
    for _ in range(2):
        assert torch.equal(kernel(x), y)
    assert kernel.p4_values.requires_grad
    kernel.p4_values.requires_grad_(False)
    kernel.p4_values.note = "mine"
    kernel(x)
    assert kernel.p4_values.note == "mine"
    del kernel.p4_values.note
    kernel.share_memory()
    kernel(x)
    assert kernel.p4_values.is_shared()


def test_reading_past_the_doors_fails_and_does_not_compute(kernel):
    gone = dict.__getitem__(kernel._buffers, "p4_values")
    assert gone.is_meta
    with pytest.raises(NotImplementedError, match="meta tensor"):
        gone.clone().cpu()


def test_under_inference_mode(mosaic, x):
    kernel = stoicc.compile(mosaic, target="cpu")
    with torch.inference_mode():
        y = kernel(x).clone()
        assert is_compact(kernel)
        assert not kernel.get_buffer("p4_values").is_inference()
        kernel.get_buffer("p4_values").mul_(0)
        assert not torch.equal(kernel(x), y)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_compile_neither_unpacks_nor_compiles_again(kernel, x):
    wanted = kernel(x).relu()
    traced = torch.compile(nn.Sequential(kernel, nn.ReLU()), backend="aot_eager")
    traced(x)
    assert is_compact(kernel)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert torch.equal(traced(x), wanted)
            assert is_compact(kernel)


def test_functional_call_swaps_buffers(kernel, x):
    y = kernel(x)
    zeros = {name: torch.zeros_like(b) for name, b in kernel.named_buffers() if name.endswith(("values", "scales"))}
    swapped = torch.func.functional_call(kernel, zeros, (x,))
    close(swapped, kernel.bias.expand(3, 200))
    assert torch.equal(kernel(x), y)
    del zeros
    kernel(x)
    assert is_compact(kernel)


def test_dense_once_unpacks_no_more_than_a_panel(mosaic, monkeypatch):
    monkeypatch.setattr("stoicc.codegen.cpu.dense_once.PANEL_BYTES", 1 << 16)
    kernel, x = stoicc.compile(mosaic, target="cpu"), torch.randn(300, 300)
    kernel(x[:1])
    largest = 0
    given = UnpackedOnDemand._unpacked

    def unpacked(self, part, planes):
        nonlocal largest
        largest = max(largest, sum(plane.nbytes for plane in planes.values()))
        return given(self, part, planes)

    monkeypatch.setattr(UnpackedOnDemand, "_unpacked", unpacked)
    y = torch.ops.stoicc.dense_once(x, None, kernel._handle)
    close(y, x @ mosaic.dense().T)
    assert 0 < largest <= 1 << 16
    assert largest <= kernel.stats().scratch_bytes
    assert is_compact(kernel)


@dataclass(frozen=True)
class NoWayBack(Dense):
    """Dense, but what is packed cannot be unpacked."""

    name: ClassVar[str] = "no_way_back"

    def tile_mac(self, tile, dtype):
        return replace(super().tile_mac(tile, dtype), unpack=None)


@dataclass(frozen=True)
class AsItIs(Dense):
    """Dense as it is stored, never packed."""

    name: ClassVar[str] = "as_it_is"

    def tile_mac(self, tile, dtype):
        source = """\
INLINE void {name}(const float *values, const float *x, float *acc, const int nb)
{
    for (int row = 0; row < BM; row++)
        for (int k = 0; k < BK; k++)
            for (int n = 0; n < nb; n++)
                acc[(row / LANES * nb + n) * LANES + row % LANES] +=
                    values[row * BK + k] * x[(k / 4 * nb + n) * 4 + k % 4];
}
"""
        return replace(super().tile_mac(tile, dtype), source=source, pack=dict, unpack=lambda packed, tile: packed)


@pytest.mark.parametrize(("fmt", "copies"), [(NoWayBack(), 2), (AsItIs(), 1)])
def test_without_a_way_back_both_copies_are_counted(fmt, copies, monkeypatch):
    monkeypatch.setattr(REGISTRY, "_formats", dict(REGISTRY._formats))
    stoicc.register_format(fmt)
    weight, x = torch.randn(256, 256), torch.randn(3, 256)
    kernel = stoicc.compile(weight, [fmt.name], target="cpu")
    close(kernel(x), x @ weight.T)
    assert not is_compact(kernel)
    stats = kernel.stats()
    assert stats.payload_bytes == weight.nbytes
    assert copies <= stats.resident_bytes / weight.nbytes < copies + 0.05
    kernel.get_buffer("p0_values").mul_(2)
    close(kernel(x), 2 * x @ weight.T)
