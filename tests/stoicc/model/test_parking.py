"""Dense weights in files while a model is compressed: who reads them, who gets them back, and what memory it takes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import stoicc
from stoicc.ir.errors import InputError
from stoicc.model import parking
from stoicc.model.parking import Parking

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what Linux says of a process")
X = [torch.randn(8, 64)]


def in_file(weight: torch.Tensor) -> bool:
    """Whether the values stand in a mapped file, as the system has it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= weight.data_ptr() < end:
            return "stoicc-dense-" in line
    return False


def two_layers() -> tuple[nn.Sequential, nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    return nn.Sequential(first, nn.ReLU(), second), first, second


def test_values_are_read_from_a_file_without_a_name_and_come_back(tmp_path):
    weight = nn.Parameter(torch.randn(64, 64).bfloat16())
    before = weight.detach().clone()
    kept = Parking(tmp_path)
    kept.park(weight)
    assert in_file(weight)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(weight, before)
    kept.fetch()
    assert not in_file(weight)
    assert torch.equal(weight, before)


def test_parts_of_larger_storages_and_full_disks_leave_weights_where_they_are(tmp_path):
    part = nn.Parameter(torch.randn(4, 64)[:2])
    turned = nn.Parameter(torch.randn(64, 32).T)
    whole = nn.Parameter(torch.randn(64, 64))
    for weight, folder in ((part, tmp_path), (turned, tmp_path), (whole, tmp_path / "none")):
        Parking(folder).park(weight)
        assert not in_file(weight)


@pytest.fixture
def parked(monkeypatch) -> list[bool]:
    """Whether each weight that was parked is in a file."""
    seen = []

    class Seen(Parking):
        def park(self, weight: torch.Tensor) -> None:
            super().park(weight)
            seen.append(in_file(weight))

    monkeypatch.setattr("stoicc.model.compress.Parking", Seen)
    return seen


def test_weights_that_somebody_holds_come_back(parked):
    model, layer, _ = two_layers()
    before = layer.weight.detach().clone()
    stoicc.compress(model, [{"group_absmax": {"bits": 8}}], X)
    assert parked == [True, True]
    assert not in_file(layer.weight)
    assert torch.equal(layer.weight, before)


def test_an_error_brings_the_very_parameters_back(parked):
    model, first, second = two_layers()
    weights = [first.weight, second.weight]
    before = [weight.detach().clone() for weight in weights]
    rules = [{"layers": "0"}, {"layers": "2", "steps": ["wanda", {"slim_lora": {"rank": 65}}]}]
    with pytest.raises(InputError, match=r"layer 2: ops.slim_lora: expected a rank from 1 to 64"):
        stoicc.compress(model, {"rules": rules}, X)
    assert parked == [True]
    assert list(model)[::2] == [first, second]
    for layer, weight, values in zip((first, second), weights, before, strict=True):
        assert layer.weight is weight
        assert not in_file(weight)
        assert torch.equal(weight, values)


def test_a_weight_that_the_model_still_reads_stays(parked):
    embedding, head = nn.Embedding(32, 64), nn.Linear(64, 32, bias=False)
    head.weight = embedding.weight
    stoicc.compress(nn.Sequential(embedding, head), {"rules": [{"layers": "*"}], "untie": True}, [torch.arange(32)])
    assert parked == []


def test_a_copy_leaves_the_weights_of_the_model_in_memory(parked):
    stoicc.compress(two_layers()[0], ["wanda"], X, in_place=False)
    assert parked == []


def test_layers_that_still_run_read_their_weights_from_files(parked):
    model, _, second = two_layers()
    expected = stoicc.compress(two_layers()[0], ["wanda"], X, sequential=False, in_place=False)
    assert parked == []
    stoicc.compress(model, ["wanda"], X, sequential=False)
    assert parked == [True, True]
    assert not in_file(second.weight)
    assert torch.equal(model(X[0]), expected(X[0]))


PEAK = """
import threading, time, torch, stoicc
from torch import nn

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024

def peak(count):
    model = nn.Sequential(*[layer for _ in range(count) for layer in (nn.Linear(512, 512, bias=False), nn.ReLU())])
    before, found, done = anonymous(), [0.0], threading.Event()
    def watch():
        while not done.is_set():
            found.append(anonymous() - before)
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    stoicc.compress(model, {"rules": [{"layers": "*", "compile": {"target": "reference"}}]}, [torch.randn(8, 512)])
    done.set()
    thread.join()
    return max(found)

peak(4)
print(peak(8), peak(40))
"""


def test_memory_beside_the_model_does_not_grow_with_its_layers():
    """Kernels as large as their layers (1 MiB each): if the dense weights stayed, 32 layers more would take 32 MiB."""
    told = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    few, many = map(float, told.stdout.split())
    assert many < few + 3 * parking.SLACK_BYTES / 2**20
