"""The tuning store: keys, several processes, damaged files."""

import json
import multiprocessing
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import stoicc
from stoicc.tuning_store import TuningStore, bucket, key_of
from tests.stoicc.test_tuning_result import RESULT

KEY = {"shape": [128, 200], "dtype": "bf16", "device": "here", "batch_buckets": [1, 16]}


@pytest.fixture
def store(tmp_path):
    return TuningStore(tmp_path / "tuning")


def test_what_is_written_is_read(store):
    assert store.read(KEY) is None
    store.write(KEY, RESULT)
    assert store.read(KEY) == RESULT
    assert store.read({**KEY, "device": "there"}) is None


def test_a_file_is_readable_json_with_its_key(store):
    store.write(KEY, RESULT)
    path = store.path(KEY)
    assert path.name.startswith("128x200-bf16-")
    lines = path.read_text().splitlines()
    assert ' "key": {' in lines
    assert json.loads(path.read_text())["key"] == KEY


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\x00" * 50,
        lambda text: "[]",
        lambda text: text.replace('"here"', '"elsewhere"'),
        lambda text: text.replace('"trials"', '"trails"'),
    ],
)
def test_a_damaged_file_is_reported_set_aside_and_rebuilt(store, damage):
    store.write(KEY, RESULT)
    path = store.path(KEY)
    path.write_text(damage(path.read_text()))
    with pytest.warns(RuntimeWarning, match=r"tuning store: expected a whole record in .*\.json, found .* kept as"):
        assert store.read(KEY) is None
    assert not path.exists()
    assert path.with_name(path.name + ".damaged").exists()
    store.write(KEY, RESULT)
    assert store.read(KEY) == RESULT


def test_bytes_that_are_no_text_are_damage_too(store):
    store.write(KEY, RESULT)
    store.path(KEY).write_bytes(b"\xff\xfe\x00")
    with pytest.warns(RuntimeWarning, match="expected a whole record"):
        assert store.read(KEY) is None


def _write_often(folder: Path, worker: int) -> None:
    """What one process does: write a key that all share, and one of its own, reading in between."""
    warnings.simplefilter("error")  # a half-written file would be reported
    store = TuningStore(folder)
    for turn in range(15):
        store.write(KEY, replace(RESULT, seconds=float(worker * 1000 + turn)))
        store.write({**KEY, "device": f"worker {worker}"}, replace(RESULT, seconds=float(turn)))
        found = store.read(KEY)
        assert found is not None
        assert found.trials == RESULT.trials


def test_several_processes_write_at_once(store):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_often, args=(store.folder, number)) for number in (1, 2)]
    for process in workers:
        process.start()
    _write_often(store.folder, 0)
    for process in workers:
        process.join(60)
    assert [process.exitcode for process in workers] == [0, 0]
    found = store.read(KEY)
    assert found is not None
    assert found.seconds % 1000 == 14
    for number in range(3):
        own = store.read({**KEY, "device": f"worker {number}"})
        assert own is not None
        assert own.seconds == 14
    assert {file.suffix for file in store.folder.iterdir()} <= {".json", ".lock"}


@pytest.mark.parametrize(("batch", "least"), [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (1000, 1024)])
def test_buckets_end_at_powers_of_two(batch, least):
    assert bucket(batch) == least


def test_a_key_says_all_that_a_result_depends_on():
    weight = torch.randn(100, 128)
    weight[:64, :64] = 0

    def key(kernel, code="int x;", batches=(1, 16), x_dtype="f32", target="cpu", searched="space"):
        return key_of(kernel, code, batches, x_dtype, target, searched)

    kernel = stoicc.compile(weight)
    usual = key(kernel)
    assert usual["formats"] == {"dense": 3, "empty": 1}
    assert usual["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(usual)) == usual
    same = stoicc.compile(weight + (weight != 0).float())
    assert key(same) == usual, "contents do not matter"
    others = [
        key(stoicc.compile(weight.half())),
        key(stoicc.compile(weight, tile=(32, 32))),
        key(stoicc.compile(weight, ["dense"])),
        key(stoicc.compile(weight, bias=torch.ones(100))),
        key(stoicc.compile(weight, activation="relu")),
        key(kernel, code="int y;"),
        key(kernel, batches=(1, 17)),
        key(kernel, x_dtype="bf16"),
        key(kernel, target="triton"),
        key(kernel, searched="other"),
    ]
    assert len({json.dumps(other) for other in [usual, *others]}) == 11
