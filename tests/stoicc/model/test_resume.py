"""A compression that was stopped goes on where it was, and never with something else."""

import copy
import shutil

import pytest
import torch
from torch import nn

import stoicc
from stoicc.model import compress as compressing
from stoicc.model.one_layer import compress_layer
from tests.models import Transformer, kernels_of, record_of, token_batches

STEPS = ["nm_magnitude", {"group_absmax": {"group_size": 32}}]


class Stop(BaseException):
    """As an interrupt is: no `Exception`."""


@pytest.fixture
def case(monkeypatch):
    """A model, its batches, and the names of layers that were worked on; `limit` stops after so many."""
    worked: list[str] = []
    limit = [10**9]

    def spy(name, *args):
        if len(worked) == limit[0]:
            raise Stop
        worked.append(name)
        return compress_layer(name, *args)

    monkeypatch.setattr(compressing, "compress_layer", spy)
    return Transformer(), token_batches(), worked, limit


def state(model):
    records = {name: record_of(kernel) for name, kernel in kernels_of(model).items()}
    return {name: (record.error, record.steps) for name, record in records.items()}, model.state_dict()


def assert_same(one, other):
    (records, values), (other_records, other_values) = state(one), state(other)
    assert records == other_records
    assert list(values) == list(other_values)
    assert all(torch.equal(value, other_values[name]) for name, value in values.items())


@pytest.mark.parametrize("done", [0, 1, 5, 12])
def test_the_result_is_that_of_an_uninterrupted_run(case, tmp_path, done):
    model, batches, worked, limit = case
    expected = stoicc.compress(copy.deepcopy(model), STEPS, batches)
    names = worked.copy()
    worked.clear()
    limit[0] = done
    with pytest.raises(Stop):
        stoicc.compress(model, STEPS, batches, resume=tmp_path / "run")
    assert not kernels_of(model)
    worked.clear()
    limit[0] = 10**9
    stoicc.compress(model, STEPS, batches, resume=tmp_path / "run")
    assert worked == names[done:]
    assert_same(model, expected)
    assert torch.equal(model(batches[0]), expected(batches[0]))


def test_a_finished_run_is_read_back_whole(case, tmp_path):
    model, batches, worked, _ = case
    other = copy.deepcopy(model)
    stoicc.compress(model, STEPS, batches, resume=tmp_path)
    worked.clear()
    stoicc.compress(other, STEPS, batches, resume=tmp_path)
    assert worked == []
    assert_same(model, other)
    assert str(stoicc.report(model)) == str(stoicc.report(other))


def test_modules_of_one_weight_come_back_as_they_were(tmp_path):
    def twins():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        model[2].weight = model[0].weight
        return model.append(model[0])

    x = [torch.randn(5, 64)]
    first, second = (stoicc.compress(twins(), ["nm_magnitude"], x, resume=tmp_path) for _ in range(2))
    kernels = [second.get_submodule(str(index)) for index in range(4)]
    assert kernels[3] is kernels[0]
    assert kernels[2] is not kernels[0]
    assert_same(first, second)


def changed_weight(model):
    with torch.no_grad():
        model.blocks[0].norm.bias[0] += 1


@pytest.mark.parametrize(
    ("change", "steps", "keep", "options", "what"),
    [
        (lambda model: None, ["nm_magnitude"], 3, {}, "recipe"),
        (changed_weight, STEPS, 3, {}, "weights"),
        (lambda model: None, STEPS, 2, {}, "calibration"),
        (lambda model: None, STEPS, 3, {"sequential": False}, "options"),
        (changed_weight, ["nm_magnitude"], 3, {}, "recipe and weights"),
    ],
)
def test_a_run_of_something_else_is_refused(case, tmp_path, change, steps, keep, options, what):
    model, batches, *_ = case
    stoicc.compress(model, STEPS, batches, resume=tmp_path, in_place=False)
    change(model)
    with pytest.raises(stoicc.InputError, match=rf"that it was started with, found another {what}; name a new folder"):
        stoicc.compress(model, steps, batches[:keep], resume=tmp_path, **options)
    assert not kernels_of(model)


def test_a_folder_of_other_things_is_refused(case, tmp_path):
    model, batches, *_ = case
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(stoicc.InputError, match=r"resume .*: expected a new folder, or one of a run .* other things"):
        stoicc.compress(model, STEPS, batches, resume=tmp_path)
    with pytest.raises(stoicc.InputError, match=r"resume .*: expected a new folder"):
        stoicc.compress(model, STEPS, batches, resume=tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("kind", [".json", ".safetensors"])
def test_a_damaged_file_is_named(case, tmp_path, kind):
    model, batches, *_ = case
    stoicc.compress(model, STEPS, batches, resume=tmp_path, in_place=False)
    file = next(path for path in (tmp_path / "layers").iterdir() if path.suffix == kind and "blocks.1.up" in path.name)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(stoicc.InputError, match=r"folder .*blocks\.1\.up.*expected"):
        stoicc.compress(model, STEPS, batches, resume=tmp_path)
    assert not kernels_of(model)


def test_a_half_written_layer_is_made_again(case, tmp_path):
    model, batches, worked, _ = case
    expected = stoicc.compress(copy.deepcopy(model), STEPS, batches, resume=tmp_path)
    for path in (tmp_path / "layers").iterdir():
        if "blocks.1.up" in path.name and path.suffix == ".json":
            path.unlink()
    worked.clear()
    stoicc.compress(model, STEPS, batches, resume=tmp_path)
    assert worked == ["blocks.1.up"]
    assert_same(model, expected)


def test_names_that_differ_in_what_files_cannot_hold_stay_apart(tmp_path):
    model = nn.Sequential()
    for name in ("a/b", "a_b", "a:b", "x" * 300):
        model.add_module(name, nn.Linear(16, 16))
    stoicc.compress(model, ["nm_magnitude"], resume=tmp_path / "run", in_place=False)
    resumed = stoicc.compress(copy.deepcopy(model), ["nm_magnitude"], resume=tmp_path / "run")
    kernels = kernels_of(resumed)
    for name, weight in model.named_parameters():
        if (layer := name.removesuffix(".weight")) in kernels:
            assert torch.equal(kernels.pop(layer).to_dense(), stoicc.ops.nm_magnitude(weight).dense())
    assert not kernels
    shutil.rmtree(tmp_path / "run")
