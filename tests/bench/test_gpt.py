"""The corpus is split by name and pinned by hash; the GPT looks back only; training is seeded and resumes."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import gpt_training
from bench.corpus import FILES, SPLITS, Corpus, sentences_in, split_of, standard_library, windows
from bench.gpt import Gpt, GptConfig, block_linears, next_byte_bits
from bench.gpt_training import Plan, held_out_bits, train, trained

TINY = GptConfig(width=64, layers=2, heads=2, context=16)
PLAN = Plan(steps=12, batch=4, warmup=2)


@pytest.fixture
def corpus(tmp_path):
    """Three small files, one of them named but missing."""
    (tmp_path / "a.py").write_bytes(b'"""The first file of the three, which is small enough."""\n' * 20)
    (tmp_path / "b.py").write_bytes(b"x = 1\n" * 100)
    return Corpus(tmp_path, ("a.py", "b.py", "c.py"))


@pytest.fixture
def text() -> Tensor:
    return torch.frombuffer(bytearray(b"for each in range(10):\n    pass\n" * 50), dtype=torch.uint8)


def test_splits_are_disjoint_and_none_is_small():
    corpus = standard_library()
    names = {split: set(corpus.names(split)) for split in SPLITS}
    assert sum(map(len, names.values())) == len(corpus.contents) == len(set.union(*names.values()))
    assert len(FILES) == len(set(FILES))
    assert all(len(corpus.text(split)) > 300_000 for split in SPLITS)
    assert "held-out 0." in str(corpus)


def test_hash_follows_contents_and_names(corpus, tmp_path):
    before = corpus.hash
    assert corpus.missing == ["c.py"]
    assert "1 files of the list are missing" in str(corpus)
    assert "not one on record" in str(corpus)
    assert Corpus(tmp_path, ("b.py", "a.py")).hash != before
    (tmp_path / "b.py").write_bytes(b"x = 2\n" * 100)
    assert Corpus(tmp_path, corpus.files).hash != before


def test_docstrings_and_sentences(corpus):
    found = [text for split in SPLITS for text in corpus.docstrings(split)]
    assert found == ["The first file of the three, which is small enough."]
    assert sentences_in(iter(found)) == found
    assert split_of("argparse.py") == split_of("argparse.py")


def test_windows_are_spread_or_seeded(text):
    even = windows(text, 3, 8)
    assert torch.equal(even[0], text[:8].long())
    assert torch.equal(even[-1], text[-8:].long())
    assert torch.equal(windows(text, 3, 8, seed=1), windows(text, 3, 8, seed=1))
    assert not torch.equal(windows(text, 3, 8, seed=1), windows(text, 3, 8, seed=2))


def test_model_looks_back_only():
    model = Gpt(TINY).eval()
    tokens = torch.arange(16)[None]
    changed = tokens.clone()
    changed[0, 9] = 200
    with torch.no_grad():
        same = (model(tokens) == model(changed)).all(-1)[0]
    assert same[:9].all()
    assert not same[9:].any()


def test_untrained_bits_and_layers():
    model = Gpt(TINY)
    assert list(block_linears(model))[:2] == ["blocks.0.attn.qkv", "blocks.0.attn.out"]
    assert len(block_linears(model)) == 8
    uniform = torch.zeros(1)
    bits = next_byte_bits(lambda tokens: uniform.expand(*tokens.shape, 256), torch.zeros(2, 5).long())  # type: ignore[arg-type]
    assert bits.shape == (2, 4)
    assert torch.allclose(bits, torch.full((2, 4), 8.0))


def test_training_learns(text):
    model, seen = Gpt(TINY), []
    train(model, text, Plan(steps=40, batch=8, warmup=4, rate=1e-2), TINY.context, on_step=lambda _, b: seen.append(b))
    assert len(seen) == 40
    assert sum(seen[-5:]) / 5 < seen[0] - 2
    assert held_out_bits(model.eval(), text, TINY.context, 8) == pytest.approx(sum(seen[-5:]) / 5, abs=0.5)


def test_a_run_that_was_stopped_ends_the_same(text, tmp_path, monkeypatch):
    whole = Gpt(TINY)
    train(whole, text, PLAN, TINY.context)
    monkeypatch.setattr(gpt_training, "CHECKPOINT_S", 0.0)

    def stop(step: int, bits: float) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Gpt(TINY), text, PLAN, TINY.context, tmp_path / "x.checkpoint", stop)
    resumed, steps = Gpt(TINY, seed=5), []
    train(resumed, text, PLAN, TINY.context, tmp_path / "x.checkpoint", lambda step, _: steps.append(step))
    assert steps[0] == 7  # the sixth was saved; the seventh was stopped before it could be
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_rate_warms_up_and_ends_at_zero():
    assert [Plan(warmup=4).rate_at(step) for step in (0, 3, 4)] == pytest.approx([5e-4, 2e-3, 2e-3])
    assert PLAN.rate_at(PLAN.steps) == pytest.approx(0.0)
    assert math.isclose(Plan(steps=200, warmup=100).rate_at(150), 1e-3)


def test_trained_once_per_key(corpus, tmp_path):
    steps: list[int] = []

    def get(plan: Plan) -> Path:
        return trained(TINY, plan, corpus, on_step=lambda step, _: steps.append(step), folder=tmp_path).path

    assert get(PLAN) == get(PLAN)
    assert len(steps) == PLAN.steps
    assert get(Plan(steps=12, batch=4, warmup=2, seed=1)) != get(PLAN)
    assert len(steps) == 2 * PLAN.steps
    assert not list(tmp_path.glob("*.checkpoint"))
