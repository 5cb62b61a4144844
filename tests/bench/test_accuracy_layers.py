"""What each layer costs alone, and shares by outliers and by output, on a tiny GPT."""

import copy
from typing import Any

import pytest
import torch

from bench import accuracy_layers
from bench.accuracy_subjects import Subject
from bench.gpt import Gpt, GptConfig, next_byte_bits
from stoicc import ops


@pytest.fixture
def subject() -> Subject:
    torch.manual_seed(0)
    model = Gpt(GptConfig(width=64, layers=2, heads=2, context=16)).eval()
    tokens = torch.randint(0, 256, (6, 17))
    score = lambda m: {"bits/byte": next_byte_bits(m, tokens).mean(1)}  # noqa: E731
    return Subject("tiny", model, ("blocks.*",), [tokens[:, :16]], score, {"bits/byte": "lower"}, "It.")


def test_damage_is_that_of_one_layer_and_every_way_is_scored(subject):
    one = accuracy_layers.measure(subject, 0.6)
    assert [name for name, *_ in sorted(one.layers)] == sorted(accuracy_layers.linears(subject))
    model: Any = copy.deepcopy(subject.model)
    statistics = ops.collect(model, subject.calibration, ["blocks.1.mlp.fc"])["blocks.1.mlp.fc"]
    model.blocks[1].mlp.fc.weight.data = ops.wanda(model.blocks[1].mlp.fc.weight, statistics, 0.6).dense()
    bits = subject.score(model)["bits/byte"].mean().item()
    found = {name: damage for name, _, _, damage in one.layers}["blocks.1.mlp.fc"]
    assert found == pytest.approx(abs(bits - one.scores["dense"]), abs=1e-6)
    assert list(one.scores) == ["dense", *accuracy_layers.WAYS]
    assert len(set(one.scores.values())) == 6
    assert -1 <= one.correlation <= 1


def test_the_page_has_a_line_for_each_model():
    scores = {"dense": 1.0} | dict.fromkeys(accuracy_layers.WAYS, 1.5)
    layers = [("model.blocks.0.mlp.fc", 0.01, 0.65, 0.2)]
    one = {
        "subject": "GPT",
        "score": "bits/byte",
        "sparsity": 0.7,
        "scores": scores,
        "correlation": -0.3,
        "layers": layers,
    }
    page = accuracy_layers.page({"measured": {"gpt, 0.7": one}})
    assert "| GPT | 70% | bits/byte | 1.0000 | 1.5000 | 1.5000 | 1.5000 | 1.5000 | 1.5000 | -0.30 |" in page
    assert page.endswith("| GPT | `blocks.0.mlp.fc` 0.200, 1.00%, 65% |")
