"""The GPU check goes through all of its cases, and says so where there is no GPU."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu_check import (
    FORMATS,
    Check,
    Plan,
    Report,
    Timing,
    check_all,
    compare,
    main,
    row,
    run,
    show,
    time_all,
    write,
)
from bench.gpu_timing import calls_of_graph

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
    assert {check["executor"] for check in report["checks"]} == {"tiles", "dense-once", "decode", "vendor"}
    formats = ("dense", "nv24", "int8", "int4", "int4_nv24")
    assert {(c["format"].partition("<")[0], c["weight"]) for c in report["checks"]} == {
        *((name, dtype) for name in formats for dtype in ("bf16", "f16", "f32")),
        *((name, dtype) for name in ("mosaic", "mosaic, 2 times") for dtype in ("bf16", "f16")),
        *((f"x {where}", d) for where in ("in the launch", "before it", "padded before it") for d in ("bf16", "f16")),
        ("dense, subnormal", "f16"),
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


def test_a_run_that_checked_nothing_has_not_passed(capsys, tmp_path) -> None:
    output = tmp_path / "out.json"
    assert run(Plan.make(dry=True, budget=0.0), dry=True, output=output) == 1
    assert "NOT CHECKED: no check ran; give a larger --budget" in capsys.readouterr().out
    assert "x is warm for all" in json.loads(output.read_text())["method"]["cold"]


def test_dropped_checks_are_told() -> None:
    check = Check("nv24", "bf16", "bfloat16", 1, "tiles", 0.0, True)
    report = Report("GPU", True, {}, "abc", checks=[check], dropped=["times 1x1"])
    assert "NOT CHECKED" not in show(report)
    report.dropped.append("check int4 torch.float16")
    assert "NOT CHECKED: 1 checks were dropped" in show(report)


def test_outputs_that_were_not_written_fail_as_valid_json(tmp_path) -> None:
    class Idle:
        program = SimpleNamespace(dtype="f32")

        def executor(self, kind):
            return SimpleNamespace(workspace_bytes=lambda batch, dtype: 0, run=lambda x, out, workspace: None)

    check = compare(Idle(), "tiles", torch.ones(2, 3), torch.ones(2, 4).double(), "nv24")
    assert not check.passed
    path = write(Report("GPU", True, {}, "abc", checks=[check]), tmp_path / "out.json")
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["checks"][0]["error"] is None


@pytest.mark.parametrize(("copies", "calls"), [(1, 8), (3, 9), (8, 8), (20, 20)])
def test_a_graph_holds_every_copy_and_several_calls(copies: int, calls: int) -> None:
    taken = calls_of_graph([partial(str, index) for index in range(copies)])
    assert [call() for call in taken] == [str(index % copies) for index in range(calls)]


def test_a_time_without_one_to_compare_with_has_no_speedup() -> None:
    timing = Timing((64, 128), 1, "nv24", "tiles", 10.0, 1000, 5.0, 0.5, None)
    assert row(timing).split()[-1] == "none"


def test_the_report_names_what_was_dropped_and_failed() -> None:
    timing = Timing((64, 128), 1, "nv24", "tiles", 10.0, 1000, 5.0, 0.5, 1.5)
    report = Report(
        "GPU", True, {}, "abc", copy_bandwidth=1e12, times=[timing], dropped=["times 1x1"], failures=["check x: Error"]
    )
    text = show(report)
    assert "FAILED check x: Error" in text
    assert "dropped, out of time (1):\n  times 1x1" in text
    assert "50%" in text
    assert "1.50" in text
