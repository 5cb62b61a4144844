"""The kernel as a module: calling, moving, copying, saving, compiling, gradients, errors."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stoicc
from stoicc import targets
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
    assert torch.equal(kernel.half().to_dense(), mosaic.dense())


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
    metadata = {"stoicc.ir": print_module(kernel.ir, exact=True), "stoicc.artefact": "1"}
    save_file(pools, path, metadata=metadata)
    with pytest.raises(stoicc.VerifyError, match=name):
        stoicc.load(path)


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
    fused = stoicc.compile(mosaic, activation="relu", target="cpu")
    with pytest.raises(stoicc.InputError, match="expected no gradient through a fused relu"):
        fused(torch.randn(4, 300, requires_grad=True)).sum().backward()


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
