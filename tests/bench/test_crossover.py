"""Records of the benches of schedules: what they sum up to, and how they go on."""

import json

from bench.crossover import Row, page, summary
from bench.machine import describe_machine
from bench.resuming import Resumable

ROWS = [
    Row("dense", "f32", 64, "tiles", linear=1.0, tiles=0.5, dense_once=1.5),
    Row("dense", "f32", 512, "dense-once", linear=1.0, tiles=1.25, dense_once=1.02),
    Row("nv24", "f32", 512, "dense-once", linear=1.0, tiles=0.8, dense_once=1.0),
]


def test_the_summary_names_the_worst_pick_and_the_latest():
    found = summary(ROWS)
    assert found["picked_over_linear_at_least"] == found["dense_once_over_linear_at_least"] == 1 / 1.02
    assert found["picked_over_linear_where"] == "dense, f32, batch 512"
    assert found["picked_off_at_most"] == 1.0 / 0.8 - 1
    assert found["picked_off_where"] == "nv24, f32, batch 512"
    assert "dense_once_over_linear_at_least" not in summary(ROWS[:1])


def test_the_page_marks_what_is_picked():
    machine = {"cpu": "a CPU", "threads": 2, "torch": "2", "commit": "c"}
    text = page({"machine": machine, "shape": [64, 128], "rows": [row.__dict__ | {"speedup": 1} for row in ROWS]})
    assert "| dense | f32 | **2.00** / 0.67 | 0.80 / **0.98** |" in text
    assert "| nv24 | f32 |  | 1.25 / **1.00** |" in text


def test_a_bench_goes_on_where_its_file_ends(tmp_path):
    path = tmp_path / "record.json"
    first = Resumable(path, False, None, len)
    assert list(first.missing(["a", "b"])) == ["a", "b"]
    first.add({"mosaic": "a"})
    held = json.loads(path.read_text())
    assert held["summary"] == 1
    assert held["machine"]["cpu"] == describe_machine()["cpu"]
    again = Resumable(path, True, None, len)
    assert list(again.missing(["a", "b"])) == ["b"]
    assert list(Resumable(path, False, None, len).missing(["a"])) == ["a"]
    assert list(Resumable(path, True, -1.0, len).missing(["a", "b"])) == []  # out of time


def test_a_record_of_another_machine_is_not_gone_on_with(tmp_path):
    path = tmp_path / "record.json"
    Resumable(path, False, None, len).add({"mosaic": "a"})
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | {"machine": held["machine"] | {"threads": 999}}))
    assert list(Resumable(path, True, None, len).missing(["a"])) == ["a"]
