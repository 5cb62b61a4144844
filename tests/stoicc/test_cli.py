"""The command line on real files."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import stoicc
from stoicc.cli import app, main
from stoicc.files import read_weight
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.parser import parse

ROOT = Path(__file__).parents[2]


@pytest.fixture
def weight(tmp_path):
    values = torch.randn(100, 150)
    values[:, :64] = 0
    np.save(tmp_path / "w.npy", values.numpy())
    return values


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_inspect_prints_ir_that_parses(weight, tmp_path):
    done = run("inspect", tmp_path / "w.npy", "--exact")
    assert done.exit_code == 0, done.output
    assert parse(done.output).tiles == stoicc.inspect(weight, name="w").program


def test_compile_counts_and_writes_an_artefact(weight, tmp_path):
    out = tmp_path / "w.safetensors"
    done = run("compile", tmp_path / "w.npy", "--prune", "2:4", "--quantize", "4", "-o", out, "--ir")
    assert done.exit_code == 0, done.output
    assert "int4_nv24" in done.output
    assert "bytes per weight" in done.output
    expected = stoicc.ops.group_absmax(stoicc.ops.nm_magnitude(weight))
    assert torch.equal(stoicc.load(out).to_dense(), expected.dense())


@pytest.mark.parametrize(("backend", "text"), [("cpu", "#include"), ("triton", "@triton.jit"), ("cuda", "@triton.jit")])
def test_compile_prints_the_emitted_source(weight, tmp_path, backend, text):
    done = run("compile", tmp_path / "w.npy", "--emit", backend)
    assert done.exit_code == 0, done.output
    assert text in done.output


@pytest.mark.parametrize(
    "arguments", [["compile", "w.npy", "--ir", "--exact", "-o", "w.out"], ["inspect", "w.art", "--exact"]]
)
def test_the_exact_ir_alone_is_on_stdout_for_opt_to_read(weight, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert run("compile", "w.npy", "-o", "w.art").exit_code == 0
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert parse(done.stdout) == stoicc.load("w.art").ir
    assert "bytes per weight" in done.stderr
    assert ("wrote w.out" in done.stderr) == ("-o" in arguments)
    (tmp_path / "p.tile").write_text(done.stdout)
    again = run("opt", "p.tile", "--pipeline", "build-csr,split-k{parts=2}", "--exact")
    assert again.exit_code == 0, again.output


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("name", ["w.npy", "w.art"])
def test_the_emitted_c_alone_is_on_stdout_for_cc_to_compile(weight, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert run("compile", "w.npy", "-o", "w.art").exit_code == 0
    done = run("compile", name, "--emit", "cpu")
    assert "bytes per weight" in done.stderr
    command = ["cc", "-march=native", "-fsyntax-only", "-x", "c", "-"]
    compiled = subprocess.run(command, input=done.stdout, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr


def test_an_artefact_is_compiled_again_from_its_tiles(weight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("compile", "w.npy", "--quantize", "4", "-o", "w.safetensors").exit_code == 0
    first = stoicc.load("w.safetensors")
    done = run("compile", "w.safetensors", "--pipeline", "drop-empty,build-csr,split-k{parts=2}", "-o", "again")
    assert done.exit_code == 0, done.output
    again = stoicc.load("again")
    assert torch.equal(again.to_dense(), first.to_dense())
    assert again.schedule.max_parts == 2
    assert again.schedule != first.schedule
    assert run("compile", "w.safetensors", "-o", "same").exit_code == 0
    assert stoicc.load("same").ir == first.ir
    triton = run("compile", "w.safetensors", "--emit", "triton")
    assert ast.parse(triton.stdout).body


@pytest.mark.parametrize(
    "option", [("--prune", "2:4"), ("--quantize", "4"), ("--formats", "dense"), ("--tensor", "a"), ("--dtype", "f16")]
)
def test_an_artefact_takes_no_option_that_changes_its_tiles(weight, tmp_path, option):
    assert run("compile", tmp_path / "w.npy", "-o", tmp_path / "w.art").exit_code == 0
    with pytest.raises(stoicc.InputError, match=f"expected no {option[0]} with tiles that are cut already"):
        app(["compile", str(tmp_path / "w.art"), *option], standalone_mode=False)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_dtype_converts_what_is_read(tmp_path, dtype):
    values = np.random.default_rng(0).standard_normal((70, 80))
    np.save(tmp_path / "w.npy", values.astype(">f8"))
    out = tmp_path / "w.art"
    done = run("compile", tmp_path / "w.npy", "--dtype", dtype, "-o", out)
    assert done.exit_code == 0, done.output
    assert torch.equal(stoicc.load(out).to_dense(), torch.from_numpy(values).to(TORCH_DTYPES[dtype]))
    inspected = run("inspect", tmp_path / "w.npy", "--dtype", dtype, "--exact")
    assert parse(inspected.output).tiles.dtype == dtype


@pytest.mark.parametrize(
    ("text", "expected"),
    [("dense,nv24", {"dense", "nv24"}), ("dense; int4<group_size=32, zero_points=true>,empty", {"dense", "empty"})],
)
def test_formats_are_split_outside_their_options(tmp_path, text, expected):
    values = torch.randn(64, 192)
    values[:, 64:128] = 0
    if "nv24" in expected:
        values[:, 64:128] = stoicc.ops.nm_magnitude(torch.randn(64, 64)).dense()
    np.save(tmp_path / "w.npy", values.numpy())
    done = run("inspect", tmp_path / "w.npy", "--formats", text, "--exact")
    assert done.exit_code == 0, done.output
    assert {segment.format for segment in parse(done.output).tiles.segments if segment.count} == expected


@pytest.mark.parametrize("output", ["absent/w.art", "folder"])
def test_an_output_that_cannot_be_written_is_refused_before_compiling(weight, tmp_path, monkeypatch, output):
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stoicc, "compile", lambda *_, **__: pytest.fail("compiled"))
    with pytest.raises(stoicc.InputError, match=f"--output {output}: expected"):
        app(["compile", "w.npy", "-o", output], standalone_mode=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_version_and_help():
    assert run("--version").output == f"stoicc {stoicc.__version__}\n"
    assert "Compile weight matrices to mosaic kernels." in run("--help").output


def test_opt_runs_passes_on_text(weight, tmp_path):
    run_ = run("inspect", tmp_path / "w.npy", "--exact")
    (tmp_path / "w.tile").write_text(run_.output)
    pipeline = "drop-empty,order{by=cost},build-csr,split-k{parts=2}"
    done = run("opt", tmp_path / "w.tile", "--pipeline", pipeline, "--exact")
    assert done.exit_code == 0, done.output
    module = parse(done.output)
    assert module.schedule is not None
    assert module.schedule.max_parts == 2
    after_all = run("opt", tmp_path / "w.tile", "--pipeline", pipeline, "--print-after-all").output
    assert after_all.count("schedule") >= 4


def test_other_files(weight, tmp_path):
    save_file({"a.weight": weight, "b.weight": weight + 1, "bias": weight[0].clone()}, tmp_path / "m.safetensors")
    assert torch.equal(read_weight(tmp_path / "m.safetensors", "a.weight"), weight)
    scipy.sparse.save_npz(tmp_path / "s.npz", scipy.sparse.csr_matrix(weight.numpy()))
    assert torch.equal(read_weight(tmp_path / "s.npz", None), weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "absent.npy"], "expected a file, found nothing at"),
        (["inspect", "w.txt"], "expected .safetensors, .npy or .npz, found .txt"),
        (["inspect", "broken.npy"], "expected a readable .npy file, found"),
        (["inspect", "m.safetensors", "--tensor", "a.wieght"], "for example a.weight"),
        (["inspect", "w.npy", "--tile", "64"], "--tile: expected BMxBK such as 64x64, found '64'"),
        (["compile", "w.npy", "--prune", "24"], "--prune: expected N:M such as 2:4, found '24'"),
        (["compile", "w.npy", "--emit", "ptx"], "--emit: expected cpu, triton or cuda, found 'ptx'"),
        (["inspect", "m.safetensors"], "one of the 2 matrices, found none given; for example a.weight, b.weight"),
        (["inspect", "m.safetensors", "--tensor", "bias"], "the 2 matrices, found 'bias' of shape [150]; for example"),
        (["inspect", "vectors.safetensors"], "expected a matrix, found none among its tensors (1)"),
        (["inspect", "f64.npy"], "expected dtype f32, f16, bf16, found f64; convert it with --dtype f32, which rounds"),
        (["compile", "f64.npy", "--dtype", "f64"], "--dtype: expected f32, f16, bf16, found 'f64'"),
        (["compile", "f64.npy", "--dtype", "f16"], "--dtype f16: expected values in its range, found larger ones"),
        (["compile", "complex.npy", "--dtype", "f32"], "expected real numbers, found complex64"),
        (["compile", "w.npy", "--quantize", "5"], "(2 to 4 or 8 with the built-in ones), found 5; use --quantize 4,"),
        (["compile", "w.npy", "-o", "w.npy"], "--output w.npy: expected another file, found the one that is read"),
        (["compile", "w.npy", "--formats", "nv24;denze"], "did you mean dense"),
        (["opt", "absent.tile", "--pipeline", "build-csr"], "expected a file of tile IR, found nothing at"),
        (["opt", "w.txt", "--pipeline", "build-csr"], "line 1, column 1"),
        (["inspect", "broken.npz"], "expected a readable .npz file, found File is not a zip file"),
        (["inspect", "torn.npz"], "expected a readable .npz file, found"),
        (["inspect", "plain.npz"], "expected a readable .npz file, found"),
        (["inspect", "hollow.npy"], "expected a readable .npy file, found"),
        (["inspect", "vast.npy"], "expected a readable .npy file, found"),
        (["inspect", "folder.npy"], "expected a readable .npy file, found"),
        (["inspect", "broken.safetensors"], "expected a readable .safetensors file, found"),
        (["opt", "w.npy", "--pipeline", "build-csr"], "expected a file of tile IR, found at w.npy 'utf-8' codec"),
        (["opt", ".", "--pipeline", "build-csr"], "expected a file of tile IR, found at . [Errno 21] Is a directory"),
        (["compile", "w.npy", "-o", "absent/w.safetensors"], "expected a folder absent to write to, found none"),
        (["compile", "w.npy", "-o", "folder.npy"], "--output folder.npy: expected a file to write, found a folder"),
        (["opt", "x" * 5000, "--pipeline", "build-csr"], "expected a file of tile IR, found nothing at xxx"),
    ],
)
def test_bad_use_is_one_sentence_on_stderr(weight, tmp_path, arguments, message, monkeypatch, capsys):
    (tmp_path / "w.txt").write_text("nonsense")
    _write_broken_files(tmp_path)
    save_file({"a.weight": weight, "b.weight": weight + 1, "bias": weight[0].clone()}, tmp_path / "m.safetensors")
    save_file({"bias": weight[0].clone()}, tmp_path / "vectors.safetensors")
    np.save(tmp_path / "f64.npy", np.full((64, 64), 1e5))
    np.save(tmp_path / "complex.npy", np.ones((64, 64), np.complex64))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stoicc", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert error.startswith("stoicc: ")
    assert message in error
    # a ParseError goes on with the line and a caret
    assert len(error.splitlines()) == (3 if "column" in message else 1)


def test_the_command_ends_with_status_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "stoicc.cli", "inspect", "absent.npy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=_environment(), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "stoicc: weight file: expected a file, found nothing at absent.npy\n"


def _write_broken_files(folder):
    for name in ("broken.npy", "broken.npz", "broken.safetensors"):
        (folder / name).write_text("PK\x03\x04 nonsense" if name.endswith(".npz") else "nonsense")
    scipy.sparse.save_npz(folder / "torn.npz", scipy.sparse.random(200, 200, 0.5, "csr"))
    content = bytearray((folder / "torn.npz").read_bytes())
    content[400:2000] = bytes(1600)
    (folder / "torn.npz").write_bytes(content)
    np.savez(folder / "plain.npz", values=np.zeros(3))
    (folder / "hollow.npy").touch()
    header = (
        np.lib.format.magic(1, 0) + b"\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 99999), }"
    )
    (folder / "vast.npy").write_bytes(header.ljust(127) + b"\n")
    (folder / "folder.npy").mkdir()


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}
