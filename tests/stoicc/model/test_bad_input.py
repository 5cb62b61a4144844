"""What operators refuse, through `stoicc.compress`: one sentence that names the layer, and the model as it was."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import stoicc
from stoicc.ops import Statistics
from tests.models import Transformer, record_of, token_batches

WANDA: Any = {"wanda": {"n": 2, "m": 4}}


def refused(recipe: Any, message: str) -> None:
    """The first block is compressed before the second is refused."""
    torch.manual_seed(0)
    model, batches = Transformer(), token_batches()
    modules, dense = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(stoicc.InputError, match=message) as caught:
        stoicc.compress(model, recipe, batches)
    assert "\n" not in str(caught.value)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    model(batches[0])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"slim_lora": {"rank": 65}}, "ops.slim_lora: expected a rank from 1 to 64, the smaller extent of"),
        ({"naive_lora": {"rank": 0}}, "ops.naive_lora: expected a rank from 1 to 64"),
        ({"sparsegpt": {"sparsity": 1.5}}, "ops.sparsegpt: expected "),
        ({"optq": {"bits": 1}}, "ops.optq: expected 2 to 8"),
        ({"optq": {"damping": -1}}, "ops.optq: expected a finite damping"),
        ({"quantize_adapter": {}}, "ops.quantize_adapter: expected a weight with low-rank factors, found none"),
    ],
)
def test_an_operator_that_refuses_a_layer_in_the_middle(step, message):
    rules = [{"layers": "blocks.0.*", "steps": [WANDA]}, {"layers": "blocks.1.*", "steps": [WANDA, step]}]
    refused({"rules": rules}, f"^layer blocks.1.q: {message}")


def test_a_gram_matrix_that_no_damping_mends(monkeypatch):
    indefinite = Statistics(9, torch.zeros(64), torch.ones(64), torch.ones(64), 1 - 500 * torch.eye(64))
    monkeypatch.setattr("stoicc.model.compress.collect_stage", lambda *_: indefinite)
    refused(["sparsegpt"], "^layer blocks.0.q: ops.sparsegpt: expected statistics whose gram matrix is positive semi")


def test_damping_that_had_to_be_raised_is_noted():
    model = nn.Sequential(nn.Linear(64, 32))
    stoicc.compress(model, [{"optq": {"damping": 0}}], [torch.randn(9, 64)])
    said = "ops.optq: damping raised from 0 to 0.0001 (the Hessian was not positive definite)"
    assert record_of(model[0]).notes == (said,)
    assert f"0: {said}" in str(stoicc.report(model))


@pytest.mark.parametrize("step", [WANDA, {"sparsegpt": {"n": 2, "m": 4}}, "optq", "slim", {"obs": {"sparsity": 0.5}}])
def test_dead_channels_are_no_error(step):
    x = torch.randn(100, 64)
    x[:, [3, 40]] = 0
    model = nn.Sequential(nn.Linear(64, 32))
    stoicc.compress(model, [step], [x])
    assert "2 of 64 input channels are 0 in every sample" in record_of(model[0]).notes
    assert model(x).isfinite().all()


def test_calibration_turns_to_nan_in_the_middle():
    """The first layer is compressed when a batch that was fine before is not any more: hash, survey, stage, stage."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    dense = copy.deepcopy(model)

    class Loader:
        passes = 0

        def __iter__(self) -> Iterator[torch.Tensor]:
            self.passes += 1
            yield torch.full((4, 64), torch.nan if self.passes == 4 else 1.0)

    with pytest.raises(stoicc.InputError, match=r"calibration of layer 2, batch 0: expected finite inputs, found nan"):
        stoicc.compress(model, ["wanda"], Loader())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
