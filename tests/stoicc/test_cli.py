"""The command line on real files."""

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
from stoicc.cli import app, main, read_weight
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


@pytest.mark.parametrize(("backend", "text"), [("cpu", "#include"), ("triton", "@triton.jit")])
def test_compile_prints_the_emitted_source(weight, tmp_path, backend, text):
    done = run("compile", tmp_path / "w.npy", "--emit", backend)
    assert done.exit_code == 0, done.output
    assert text in done.output


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
        (["compile", "w.npy", "--emit", "cuda"], "--emit: expected cpu or triton, found 'cuda'"),
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
        (
            ["compile", "w.npy", "-o", "absent/w.safetensors"],
            "absent/w.safetensors: expected a file that can be written",
        ),
        (["compile", "w.npy", "-o", "folder.npy"], "folder.npy: expected a file that can be written"),
        (["opt", "x" * 5000, "--pipeline", "build-csr"], "expected a file of tile IR, found nothing at xxx"),
    ],
)
def test_bad_use_is_one_sentence_on_stderr(weight, tmp_path, arguments, message, monkeypatch, capsys):
    (tmp_path / "w.txt").write_text("nonsense")
    _write_broken_files(tmp_path)
    save_file({"a.weight": weight, "b.weight": weight.clone()}, tmp_path / "m.safetensors")
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
