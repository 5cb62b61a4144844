"""The result of tuning: a table, text that replays it, a plot."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch

import stoicc
from stoicc.tuning_result import Trial, TuningResult

PASSES = "drop-empty,order{by=row},build-csr,split-k{parts=2},balance{bins=32},fuse-epilogue"
USUAL = "drop-empty,order{by=cost},build-csr,split-k{parts=1},balance{bins=256},fuse-epilogue"
TRIALS = (
    Trial(1, (64, 64), PASSES, 2, "tiles", 9e-5, 1e-4, 1.5, 40, best=True, chosen=True),
    Trial(1, (64, 64), USUAL, 2, "tiles", 1e-4, 1.5e-4, 1.0, 40, default=True),
    Trial(1, (32, 64), USUAL, 2, "tiles", 2e-4, problem="failed: out of registers"),
    Trial(16, (64, 64), USUAL, 2, "tiles", 1e-3, 2e-3, 1.0, 8, default=True, best=True),
    Trial(16, (64, 64), PASSES, 2, "tiles", 2e-3, 2.1e-3, 0.95, 8, chosen=True),
)
RESULT = TuningResult(
    "weight",
    (128, 200),
    "bf16",
    "bf16",
    "cpu",
    (1, 16),
    (64, 64),
    f"{PASSES},regimes{{tiles=64}}",
    2,
    TRIALS,
    100,
    3.21,
    20.0,
    ("weights were warm",),
)


def test_the_table(golden):
    golden(str(RESULT))


def test_what_ran_at_a_batch_size():
    assert (RESULT.default(1), RESULT.predicted(1), RESULT.chosen(1)) == (TRIALS[1], TRIALS[0], TRIALS[0])
    assert (RESULT.default(16), RESULT.best(16), RESULT.chosen(16)) == (TRIALS[3], TRIALS[3], TRIALS[4])
    with pytest.raises(stoicc.InputError, match="tuning result: expected one of the batch sizes 1, 16, found 2; tune"):
        RESULT.best(2)


def test_text_reads_back_and_replays_the_same_schedule():
    weight = torch.randn(128, 200).bfloat16()
    again = TuningResult.from_text(RESULT.text)
    assert again == RESULT
    kernel = stoicc.compile(weight, tile=RESULT.tile, pipeline=RESULT.pipeline)
    assert again.replay(weight).ir == kernel.ir
    assert again.replay(stoicc.compile(weight, tile=(32, 32))).schedule == kernel.schedule
    with pytest.raises(stoicc.InputError, match=r"expected a kernel, found a result read from text; use \.replay"):
        again.kernel  # noqa: B018


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-40], "tuning result: expected JSON text, found"),
        (lambda text: "[]", r"tuning result: expected version 1, found \[\]"),
        (lambda text: text.replace('"stoicc_tuning": 1', '"stoicc_tuning": 9'), "expected version 1, found 9"),
        (lambda text: text.replace('"pipeline"', '"pipelime"'), "expected the fields of a result, found .*pipelime"),
        (lambda text: text.replace('"executor"', '"executer"', 1), "expected the fields of a result, found .*executer"),
        (lambda text: re.sub(r'"measured_s": [^,]*', '"measured_s": "fast"', text), "expected the fields of a result"),
        (lambda text: text.replace('"pipeline": "drop-empty', '"pipeline": "drop-full'), "found pass 'drop-full'"),
        (lambda text: json.dumps({**json.loads(text), "trials": []}), "expected one of the batch sizes 1, 16, found 1"),
    ],
)
def test_a_text_that_is_no_result_is_one_clear_sentence(change, message):
    with pytest.raises(stoicc.InputError, match=message):
        TuningResult.from_text(change(RESULT.text))


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs the bench extra")
    figure = RESULT.plot(tmp_path / "tuning.png")
    assert (tmp_path / "tuning.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes[0].collections) == 6


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        stoicc.InputError, match=r"plot: expected matplotlib, found none; pip install 'stoicc\[bench\]'"
    ):
        RESULT.plot()


def test_a_remembered_result_says_so():
    assert "remembered" in str(replace(RESULT, remembered=True))
