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
from stoicc.cli import app, read_weight
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
    ],
)
def test_bad_use_is_one_sentence_on_stderr(weight, tmp_path, arguments, message):
    (tmp_path / "w.txt").write_text("nonsense")
    (tmp_path / "broken.npy").write_text("nonsense")
    save_file({"a.weight": weight, "b.weight": weight.clone()}, tmp_path / "m.safetensors")
    command = [sys.executable, "-m", "stoicc.cli", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=_environment(), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("stoicc: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}
