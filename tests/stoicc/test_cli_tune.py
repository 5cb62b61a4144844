"""`stoicc tune` on real files: it measures, prints the table and writes an artefact."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import stoicc
from stoicc.cli import app
from stoicc.timing import Stopwatch


@pytest.fixture
def weight(tmp_path, monkeypatch):
    monkeypatch.setenv("STOICC_CALIBRATION", "off")
    monkeypatch.setattr("stoicc.autotuner.cache_bytes", lambda device: 1 << 20)  # that of a server takes long to fill
    values = torch.randn(100, 150)
    values[:, :64] = 0
    np.save(tmp_path / "w.npy", values.numpy())
    return values


def tune(*arguments):
    done = CliRunner().invoke(app, ["tune", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_tune_prints_the_table_and_writes_an_artefact(weight, tmp_path, monkeypatch):
    out = tmp_path / "tuned.safetensors"
    printed = tune(tmp_path / "w.npy", "--batch", "1,4", "--budget", "3", "-o", out)
    assert "w: 100 x 150 f32, x f32, cpu" in printed
    assert "chosen" in printed
    assert f"wrote {out}" in printed
    kernel = stoicc.load(out)
    assert torch.equal(kernel.to_dense(), weight)
    assert ",".join(kernel.schedule.applied) in printed

    # a second run finds what the first has measured
    monkeypatch.setattr(Stopwatch, "samples", lambda *arguments: pytest.fail("measured again"))
    assert "remembered" in tune(tmp_path / "w.npy", "--batch", "1,4", "--budget", "3")


def test_tune_takes_an_artefact_and_operators(weight, tmp_path):
    kernel = stoicc.compile(stoicc.ops.group_absmax(weight, 4, 64))
    kernel.save(tmp_path / "w.safetensors")
    printed = tune(tmp_path / "w.safetensors", "--batch", "2", "--budget", "1", "-o", tmp_path / "tuned.safetensors")
    assert "note: tile 64x64 stays: the codes of int4" in printed
    assert torch.equal(stoicc.load(tmp_path / "tuned.safetensors").to_dense(), kernel.to_dense())
    printed = tune(tmp_path / "w.npy", "--prune", "2:4", "--quantize", 4, "--batch", "2", "--budget", "1")
    assert "stays" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["w.npy", "--batch", "one"], r"--batch: expected batch sizes such as 1,16,64, found 'one'"),
        (["w.npy", "--budget", "0"], r"autotune: expected budget_s to be seconds above 0, found 0.0"),
        (["k.safetensors", "--prune", "2:4"], r"artefact .*: expected no --prune with tiles that are cut already"),
    ],
)
def test_wrong_arguments_are_one_clear_sentence(weight, tmp_path, arguments, message):
    stoicc.compile(weight).save(tmp_path / "k.safetensors")
    with pytest.raises(stoicc.InputError, match=message):
        CliRunner().invoke(app, ["tune", str(tmp_path / arguments[0]), *arguments[1:]], catch_exceptions=False)
