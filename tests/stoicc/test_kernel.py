"""The kernel as a module: calling, moving, copying, saving, compiling, gradients, errors."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import stoicc
from stoicc import targets
from stoicc.io import text_hash
from stoicc.ir.parser import parse
from stoicc.ir.printer import print_module


@pytest.fixture
def mosaic():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(200, 300, generator=generator)
    kind = torch.randint(0, 5, (4, 5), generator=generator)
    compressed = stoicc.ops.nm_magnitude(weight, 0, 4, where=kind == 0)
    compressed = stoicc.ops.nm_magnitude(compressed, where=(kind == 1) | (kind == 2))
    return stoicc.ops.group_absmax(compressed, where=(kind == 2) | (kind == 3))


def close(found, expected, tolerance=1e-5):
    assert found.isfinite().all()
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_a_drop_in_for_linear(mosaic, target):
    bias = torch.randn(200)
    kernel = stoicc.compile(mosaic, bias=bias, target=target)
    assert torch.equal(kernel.to_dense(), mosaic.dense())
    for x in (
        torch.randn(300),
        torch.randn(1, 300),
        torch.randn(2, 3, 300),
        torch.randn(300, 9).T,
        torch.randn(70, 600)[:, ::2],
        torch.randn(0, 300),
    ):
        y = kernel(x)
        assert y.shape == (*x.shape[:-1], 200)
        assert y.is_contiguous()
        close(y, F.linear(x.double(), mosaic.dense().double(), bias.double()))


def test_compile_takes_a_linear_layer_with_its_bias():
    layer = nn.Linear(70, 50)
    x = torch.randn(4, 70)
    with torch.no_grad():
        close(stoicc.compile(layer)(x), layer(x))


def test_float64_input_runs_on_the_reference(mosaic):
    x = torch.randn(3, 300, dtype=torch.float64)
    y = stoicc.compile(mosaic)(x)
    assert y.dtype == torch.float64
    close(y, x @ mosaic.dense().double().T, 1e-14)


def test_copy_state_dict_and_half(mosaic):
    kernel = stoicc.compile(mosaic)
    x = torch.randn(3, 300)
    y = kernel(x)
    assert torch.equal(copy.deepcopy(kernel)(x), y)
    other = copy.deepcopy(kernel)
    for pool in other.buffers():
        pool.zero_()
    other.load_state_dict(kernel.state_dict())
    assert torch.equal(other(x), y)
    # `.half()` on a whole model must not change what a compiled weight holds
    with pytest.warns(UserWarning, match=r"keeps its f32 weights, where a cast to torch.float16 was asked"):
        kernel.half()
    assert torch.equal(kernel.to_dense(), mosaic.dense())


def test_a_kernel_survives_pickling(mosaic):
    kernel = stoicc.compile(mosaic, target="cpu")
    x = torch.randn(3, 300)
    y = kernel(x)
    assert torch.equal(pickle.loads(pickle.dumps(kernel))(x), y)


def test_loaded_values_replace_what_executors_packed():
    first, second = torch.randn(64, 64), torch.randn(64, 64)
    kernel, x = stoicc.compile(first), torch.randn(2, 64)
    kernel(x)
    kernel.load_state_dict(stoicc.compile(second).state_dict())
    close(kernel(x), x @ second.T)


def test_save_and_load(mosaic, tmp_path):
    kernel = stoicc.compile(mosaic, bias=torch.randn(200), activation="gelu", name="layer.0")
    path = tmp_path / "w.safetensors"
    kernel.save(path)
    loaded = stoicc.load(path)
    assert loaded.ir == kernel.ir
    x = torch.randn(5, 300)
    assert torch.equal(loaded(x), kernel(x))
    assert torch.equal(loaded.to_dense(), kernel.to_dense())


def test_load_refuses_what_is_not_an_artefact(mosaic, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "w.safetensors"
    path.write_text("nothing")
    with pytest.raises(stoicc.InputError, match="expected a safetensors file"):
        stoicc.load(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(
        stoicc.InputError, match="expected version 1 of a stoicc artefact, found a file without IR text"
    ):
        stoicc.load(path)
    kernel = stoicc.compile(mosaic)
    kernel.save(path)
    pools = load_file(path)
    name = next(name for name in pools if name.endswith("values"))
    pools[name].view(-1)[0] += 1
    text = print_module(kernel.ir, exact=True)
    metadata = {"stoicc.ir": text, "stoicc.ir.hash": text_hash(text), "stoicc.artefact": "1"}
    save_file(pools, path, metadata=metadata)
    with pytest.raises(stoicc.VerifyError, match=name):
        stoicc.load(path)
    save_file(pools, path, metadata={**metadata, "stoicc.ir": text.replace("[200, 300]", "[200, 299]")})
    with pytest.raises(stoicc.VerifyError, match="expected the IR text as it was saved, found it changed"):
        stoicc.load(path)
    del pools[name]
    save_file(pools, path, metadata=metadata)
    with pytest.raises(stoicc.VerifyError, match=name):
        stoicc.load(path)
    with pytest.raises(stoicc.InputError, match="expected a file that can be written"):
        kernel.save(tmp_path / "absent" / "w.safetensors")


def test_ir_prints_and_reads_back(mosaic):
    kernel = stoicc.compile(mosaic)
    assert parse(print_module(kernel.ir, exact=True)) == kernel.ir
    assert "int4_nv24" in str(kernel.ir)


def test_schedules_are_values_that_can_be_edited(mosaic):
    kernel = stoicc.compile(mosaic, target="cpu")
    x = torch.randn(3, 300)
    edited = kernel.schedule.split_k(3).order([3, 1, 0, 2])
    assert kernel.schedule.max_parts == 1
    again = stoicc.compile(kernel, schedule=edited, target="cpu")
    assert again.schedule.max_parts > 1
    assert again.schedule.items[0].row == 3
    close(again(x), kernel(x))
    pipeline = "drop-empty,order{by=row},build-csr,split-k{parts=2},fuse-epilogue"
    piped = stoicc.compile(kernel, pipeline=pipeline, target="cpu")
    close(piped(x), kernel(x))
    assert "split-k{parts=2}" in piped.schedule.applied


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_torch_compile_sees_one_op(mosaic, target):
    kernel = stoicc.compile(mosaic, target=target)
    x = torch.randn(3, 300)
    compiled = torch.compile(lambda x: kernel(x).relu(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), kernel(x).relu())


def test_op_passes_torchs_own_checks(mosaic):
    kernel = stoicc.compile(mosaic, target="reference")
    x = torch.randn(3, 300, requires_grad=True)
    torch.library.opcheck(torch.ops.stoicc.reference, (x, None, kernel._handle))


def test_gradient_of_the_input(mosaic):
    kernel = stoicc.compile(mosaic, target="cpu")
    x = torch.randn(4, 300, requires_grad=True)
    kernel(x).square().sum().backward()
    dense = x.detach().clone().requires_grad_()
    F.linear(dense, mosaic.dense()).square().sum().backward()
    close(x.grad, dense.grad)


def test_stats_count_real_bytes(mosaic):
    kernel = stoicc.compile(mosaic, bias=torch.zeros(200))
    stats = kernel.stats()
    assert stats.payload_bytes + stats.beside_bytes == sum(pool.nbytes for pool in kernel.buffers())
    assert sum(entry.tiles for entry in stats.formats) == 20
    assert f"{stats.bytes_per_weight:.3f} bytes per weight" in str(stats)
    pure = stoicc.compile(stoicc.ops.nm_magnitude(torch.randn(256, 256).bfloat16()))
    assert pure.stats().bytes_per_weight == 9 / 8


def test_an_all_empty_matrix_gives_the_bias():
    bias = torch.randn(100)
    for target in ("cpu", "reference"):
        kernel = stoicc.compile(torch.zeros(100, 50), bias=bias, target=target)
        assert torch.equal(kernel(torch.randn(3, 50)), bias.expand(3, 100))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3, 299), r"kernel weight: expected x of shape \[..., 300\], found \[3, 299\]"),
        (torch.tensor(1.0), r"expected x of shape \[..., 300\], found \[\]"),
        (torch.randn(3, 300).half(), r"input of a f32 kernel: expected dtype f32 or f32|expected dtype f32"),
        (torch.ones(3, 300).long(), r"expected dtype f32"),
        (torch.randn(3, 300, device="meta"), r"expected x on cpu, found meta; move one of them"),
    ],
)
def test_bad_input_is_one_clear_sentence(mosaic, x, message):
    with pytest.raises(stoicc.InputError, match=message):
        stoicc.compile(mosaic)(x)


def test_bad_options_are_one_clear_sentence(mosaic):
    with pytest.raises(stoicc.InputError, match="target: expected one of auto, cpu, cuda, reference, found 'gpu'"):
        stoicc.compile(mosaic, target="gpu")
    with pytest.raises(stoicc.InputError, match="expected a pipeline or a schedule, found both"):
        stoicc.compile(mosaic, pipeline="build-csr", schedule=stoicc.compile(mosaic).schedule)
    with pytest.raises(stoicc.InputError, match="on_missing: expected 'error' or 'dense', found 'skip'"):
        stoicc.compile(mosaic, on_missing="skip")
    with pytest.raises(stoicc.InputError, match=r"expected no tile with a weight that is inspected already"):
        stoicc.compile(stoicc.inspect(mosaic), tile=(32, 32))
    other = stoicc.compile(torch.randn(64, 64)).schedule
    with pytest.raises(stoicc.VerifyError):
        stoicc.compile(mosaic, schedule=other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_is_said_at_compile_time(mosaic):
    with pytest.raises(stoicc.InputError, match="target 'cuda': expected a GPU that Triton can use, found"):
        stoicc.compile(mosaic, target="cuda")


def test_no_compiler_falls_to_the_reference_with_one_warning(mosaic, monkeypatch):
    monkeypatch.setattr(type(targets.backend_named("cpu")), "available", lambda self: "no compiler of this name")
    with pytest.warns(RuntimeWarning, match="expected a C compiler, found no compiler of this name"):
        kernel = stoicc.compile(mosaic, target="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = stoicc.compile(mosaic, target="cpu")
    x = torch.randn(2, 300)
    y = kernel(x)
    assert torch.equal(again(x), y)
    close(y, x @ mosaic.dense().T)


# -- what a hostile review found -----------------------------------------------------------


def test_a_state_dict_of_other_tiles_is_refused():
    first, second = torch.zeros(128, 128), torch.zeros(128, 128)
    first[:64, :64] = first[64:, 64:] = torch.randn(64, 64)
    second[:64, 64:] = second[64:, :64] = torch.randn(64, 64)
    kernel = stoicc.compile(second)
    with pytest.raises(stoicc.InputError, match="expected a state dict of the same tiles, formats and shape"):
        kernel.load_state_dict(stoicc.compile(first).state_dict())
    assert torch.equal(kernel.to_dense(), second)


def test_values_changed_in_place_reach_the_executor():
    weight, x = torch.randn(128, 128), torch.randn(3, 128)
    kernel = stoicc.compile(weight, ["dense"], target="cpu")
    other = stoicc.compile(kernel, target="cpu")
    kernel(x), other(x)
    kernel.get_buffer("p0_values").mul_(2)
    close(kernel(x), x @ (2 * weight).T)
    close(other(x), x @ (2 * weight).T)
    kernel.p0_values = torch.zeros(4, 64, 64)
    assert not kernel(x).any()


def test_what_the_caller_does_later_does_not_reach_the_kernel():
    weight, bias, left = torch.randn(64, 64), torch.zeros(64), torch.randn(64, 2)
    adapted = stoicc.ops.low_rank(weight, left, torch.randn(2, 64))
    kernels = [stoicc.compile(adapted, bias=bias, target=target) for target in ("cpu", "reference")]
    x = torch.randn(2, 64)
    before = [kernel(x) for kernel in kernels]
    bias.fill_(5)
    left.zero_()
    assert all(torch.equal(kernel(x), y) for kernel, y in zip(kernels, before, strict=True))
    weight.zero_()
    with pytest.raises(stoicc.InputError, match="expected the weight as it was, found it changed in place"):
        adapted.dense()


def test_pools_that_do_not_fit_are_refused_before_any_kernel_reads_them():
    tiled = stoicc.inspect(torch.randn(256, 256), ["dense"])
    for pools in ({}, {"p0_values": torch.zeros(1, 64, 64)}, {"p0_values": torch.zeros(16, 64, 64).half()}):
        with pytest.raises(stoicc.VerifyError, match="p0_values"):
            stoicc.compile(stoicc.TiledWeight(tiled.program, pools), target="cpu")


@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_pools_of_any_strides_and_alignment(target):
    weight, x = torch.randn(128, 128), torch.randn(3, 128)
    tiled = stoicc.inspect(weight, ["dense"])
    held = tiled.pools["p0_values"]
    strided = held.transpose(1, 2).contiguous().transpose(1, 2)
    odd = torch.empty(held.numel() + 1)[1:].view(held.shape).copy_(held)
    for pool in (strided, odd):
        kernel = stoicc.compile(stoicc.TiledWeight(tiled.program, {"p0_values": pool}), target=target)
        close(kernel(x), x @ weight.T)
    loaded = stoicc.compile(torch.randn(128, 128), ["dense"], target=target)
    loaded.load_state_dict({**kernel.state_dict(), "p0_values": strided}, assign=True)
    close(loaded(x), x @ weight.T)
    loaded.load_state_dict({**kernel.state_dict(), "p0_values": held.double()}, assign=True)
    with pytest.raises(stoicc.VerifyError, match=r"p0_values: expected torch\.float32"):
        loaded(x)


def test_edits_through_data_need_a_refresh():
    weight, x = torch.randn(64, 64), torch.randn(2, 64)
    kernel = stoicc.compile(weight, ["dense"], target="cpu")
    kernel(x)
    kernel.get_buffer("p0_values").data.mul_(3)
    kernel.refresh()
    close(kernel(x), 3 * x @ weight.T)


def test_ops_check_what_they_are_given():
    weight = torch.randn(64, 128)
    kernel = stoicc.compile(stoicc.ops.low_rank(weight, torch.randn(64, 2), torch.randn(2, 128)), target="cpu")
    op, handle = torch.ops.stoicc.tiles, kernel._handle
    x = torch.randn(128, 5).T
    close(op(x, None, handle), x @ kernel.to_dense().T)
    with pytest.raises(stoicc.InputError, match=r"expected x \[N, 128\] on cpu, found \[3, 5\] on cpu"):
        op(torch.randn(3, 5), None, handle)
    with pytest.raises(stoicc.InputError, match="expected a workspace of at least"):
        op(x, torch.empty(0, dtype=torch.uint8), handle)
    with pytest.raises(stoicc.InputError, match="expected the handle of a live kernel, found -1"):
        op(x, None, -1)


def test_the_graph_keeps_its_kernel_alive():
    weight, x = torch.randn(64, 64), torch.randn(2, 64, requires_grad=True)
    y = stoicc.compile(weight)(x)
    y.sum().backward()
    close(x.grad, weight.sum(0).expand(2, 64))
    empty = torch.randn(0, 64, requires_grad=True)
    stoicc.compile(weight)(empty).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 64)


# torch itself scripts its decompositions when forward mode is first used
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_is_refused_rather_than_zero():
    kernel = stoicc.compile(torch.randn(64, 64))
    with forward_ad.dual_level(), pytest.raises(stoicc.InputError, match="expected no forward-mode derivative"):
        kernel(forward_ad.make_dual(torch.randn(2, 64), torch.randn(2, 64)))


def test_autocast_brings_the_input_to_the_weights_dtype():
    weight, x = torch.randn(64, 64), torch.randn(2, 64)
    kernel = stoicc.compile(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kernel(x.bfloat16())
    close(y, x.bfloat16().float() @ weight.T)


def test_a_default_device_of_the_caller_does_not_matter():
    weight = torch.randn(64, 64)
    with torch.device("meta"):
        kernel = stoicc.compile(stoicc.ops.group_absmax(stoicc.ops.nm_magnitude(weight)))
    assert kernel.to_dense().device.type == "cpu"


def test_an_empty_kernel_knows_where_it_is():
    assert stoicc.compile(torch.zeros(64, 64)).to("meta").device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": "dense"}, "formats: expected a list, found 'dense'"),
        ({"formats": [3]}, "formats: expected texts or TileFormat instances, found 3"),
        ({"tile": 64}, "tile: expected two of"),
        ({"tile_map": None, "approximate": True}, "expected a tile_map with approximate=True, found none"),
        ({"tile_map": [["dense"]], "formats": ["dense"]}, "expected formats or a tile_map, found both"),
        ({"bias": [1.0]}, r"bias: expected a tensor of \[64\] floats, found list"),
        ({"bias": torch.full((64,), 1e300, dtype=torch.float64)}, "bias: expected finite values, found inf"),
        ({"pipeline": ["order"]}, "pipeline: expected text or a Pipeline, found list"),
        ({"schedule": "order"}, "schedule: expected a Schedule, found str"),
    ],
)
def test_options_of_the_wrong_kind(options, message):
    with pytest.raises(stoicc.InputError, match=message):
        stoicc.compile(torch.randn(64, 64), **options)


def test_weights_of_the_wrong_kind():
    with pytest.raises(stoicc.InputError, match="found a tensor on the meta device"):
        stoicc.compile(torch.empty(64, 64, device="meta"), target="cpu")
    with pytest.raises(stoicc.InputError, match="expected a torch tensor, numpy array"):
        stoicc.ops.nm_magnitude([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(stoicc.InputError, match="expected a dense tensor x, found list"):
        stoicc.compile(torch.randn(64, 64))([1.0])
