"""The GPU check goes through all of its cases, and says so where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu_check import FORMATS, Plan, Report, Timing, check_all, main, show, time_all

ROOT = Path(__file__).parents[2]


def test_dry_run(tmp_path) -> None:
    """In the interpreter, in a process of its own, with no package that a GPU machine may lack."""
    output = tmp_path / "out.json"
    absent = "import sys; sys.modules.update(dict.fromkeys(('platformdirs', 'rich', 'safetensors', 'typer')));"
    program = f"{absent} from bench.gpu_check import main; sys.exit(main(['--dry-run', '--output', {str(output)!r}]))"
    environment = {k: v for k, v in os.environ.items() if k != "STOICC_CACHE_DIR"} | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dry run: no number above is a measurement" in done.stdout
    report = json.loads(output.read_text())
    assert report["measured"] is False
    assert not report["failures"]
    assert not report["dropped"]
    assert all(check["passed"] for check in report["checks"])
    assert {check["executor"] for check in report["checks"]} == {"tiles", "dense-once", "decode"}
    assert {(c["format"].partition("<")[0], c["weight"]) for c in report["checks"]} == {
        (name, dtype) for name in ("dense", "nv24", "int8", "int4", "int4_nv24") for dtype in ("bf16", "f16", "f32")
    }
    assert {timing["format"] for timing in report["times"]} >= {"dense (F.linear)", "nv24", "mosaic"}
    assert report["copy_bandwidth"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu(capsys) -> None:
    assert main([]) == 2
    assert "expected a GPU that torch can use, found none; run it where there is one" in capsys.readouterr().err


def test_a_dry_run_is_never_recorded(capsys, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["--dry-run"]) == 2
    assert "expected TRITON_INTERPRET=1 and --output with --dry-run" in capsys.readouterr().err


def test_cases_out_of_time_are_dropped_by_name() -> None:
    plan, report = Plan.make(dry=True, budget=0.0), Report("none", False, {}, "abc")
    check_all(plan, report)
    time_all(plan, report, lambda timing: None)
    assert not report.checks
    assert not report.times
    assert f"check {FORMATS[0]} torch.bfloat16" in report.dropped
    assert "times 128x64 mosaic" in report.dropped


def test_the_report_names_what_was_dropped_and_failed() -> None:
    timing = Timing((64, 128), 1, "nv24", "tiles", 10.0, 1000, 5.0, 0.5, 1.5)
    report = Report("GPU", True, {}, "abc", 1e12, times=[timing], dropped=["times 1x1"], failures=["check x: Error"])
    text = show(report)
    assert "FAILED check x: Error" in text
    assert "dropped, out of time (1):\n  times 1x1" in text
    assert "50%" in text
    assert "1.50" in text
