"""What the loss feels of a layer's error, against the loss itself."""

import math

import pytest
import torch
from torch.nn import functional as F

from bench import accuracy_loss
from bench.accuracy_rows import Row, step
from bench.accuracy_subjects import Subject
from bench.gpt import Gpt, GptConfig, next_byte_bits

LAYER = "blocks.0.mlp.fc"


@pytest.fixture
def subject() -> Subject:
    torch.manual_seed(0)
    model = Gpt(GptConfig(width=64, layers=1, heads=2, context=16)).eval()
    tokens = torch.randint(0, 256, (6, 17))
    score = lambda m: {"bits/byte": next_byte_bits(m, tokens).mean(1)}  # noqa: E731
    return Subject("tiny", model, (LAYER,), [tokens[:, :16]], score, {"bits/byte": "lower"}, "It.")


def test_gradients_are_those_of_the_loss(subject):
    tokens = torch.randint(0, 256, (3, 17))
    seen = accuracy_loss.see(subject.model, [LAYER], tokens)[LAYER]
    assert seen.x.shape == (48, 64)
    weight = subject.model.get_submodule(LAYER).weight.requires_grad_(True)
    F.cross_entropy(subject.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    torch.testing.assert_close(seen.gradients.T @ seen.x, weight.grad, atol=1e-5, rtol=1e-4)


def test_felt_is_the_square_along_the_gradient(subject):
    seen = accuracy_loss.see(subject.model, [LAYER], torch.randint(0, 256, (3, 17)))
    row = Row("2:4", "magnitude", "", "", step("nm_magnitude", n=2, m=4))
    found = accuracy_loss.felt(row, subject, seen)
    weight = subject.model.get_submodule(LAYER).weight.detach()
    kept = torch.zeros_like(weight).view(-1, 4)
    kept.scatter_(1, weight.abs().view(-1, 4).topk(2).indices, 1)
    lost = weight * (1 - kept.view_as(weight))
    along = [float(g @ lost @ x) ** 2 / 2 for x, g in zip(seen[LAYER].x, seen[LAYER].gradients, strict=True)]
    assert found.felt == pytest.approx(sum(along) / len(along) / math.log(2), rel=1e-3)
    assert found.parts == {"mlp.fc": found.felt}
    assert found.error == pytest.approx(((seen[LAYER].x @ lost.T).norm() / (seen[LAYER].x @ weight.T).norm()).item())


def test_every_row_is_there_and_shown():
    rows = accuracy_loss.wanted()
    assert [row.name for row in rows] == list(accuracy_loss.ROWS)
    assert [row.sequential for row in rows].count(False) == 3
    page = accuracy_loss.page([{"row": "a", "error": 0.1, "felt": 0.2, "parts": {"mlp.fc": 0.2}, "bits": 1.5}])
    assert page.endswith("| a | 0.100 | 0.200 | mlp.fc 0.200 | 1.5000 |")
