"""Baselines of the training bench are what their papers say; runs are seeded; claims follow from the seeds."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import training_runs, training_tuning, training_why
from bench.corpus import Corpus
from bench.gpt import Gpt, GptConfig, block_linears
from bench.gpt_training import Plan, _rate, train
from bench.training_memory import LayerMemory, WideAdamW
from bench.training_methods import (
    FORKS,
    LAZY,
    METHODS,
    PATTERNS,
    SrSte,
    SSte,
    Static,
    soft_threshold,
    transposable_mask,
)
from bench.training_record import PAGE, Record, claims, draw, mean_and_interval
from bench.training_runs import Run, Setting, model_bytes, runs_of, step_times
from bench.training_tuning import Trial, best, settings, tuned
from bench.training_workers import jobs_for, side_by_side
from stoicc.nn import SlopeLinear

BASELINES = ("dense", "sr-ste", "s-ste", "transposable")
TINY = GptConfig(width=64, layers=1, heads=2, context=16)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(training_runs, "CONFIG", TINY)
    monkeypatch.setattr(training_runs, "EVALUATION", 32)
    names = [f"file{index}.py" for index in range(60)]  # enough that every split has some
    for name in names:
        (tmp_path / name).write_bytes(f"for each in range({name}):\n    pass\n".encode() * 12)
    return Corpus(tmp_path, tuple(names))


def is_two_of_four(weight, dim=1):
    return int(weight.ne(0).unflatten(dim, (-1, 4)).sum(dim + 1).max()) <= 2


def weights_of(model):
    return [
        layer.to_dense() if isinstance(layer, SlopeLinear) else layer.weight.detach()
        for name, layer in model.blocks.named_modules()
        if isinstance(layer, SlopeLinear) or isinstance(getattr(layer, "weight", None), torch.Tensor)
        if name.endswith(("qkv", "out", "fc", "proj"))
    ]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_a_2_4_model(name, corpus):
    plan = training_runs.plan_for(3, 0, Setting())
    model, _, optimizer = training_runs._made(name, plan, Setting())
    before = [weight.clone() for weight in weights_of(model)]
    train(model, corpus.text("train"), plan, TINY.context, optimizer=optimizer)
    weights = weights_of(model.eval())
    assert len(weights) == 4
    assert all(is_two_of_four(weight) for weight in weights) == (name != "dense")
    assert not any(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    if name == "transposable":
        assert all(is_two_of_four(weight, 0) for weight in weights)


def test_the_gradient_of_sr_ste_is_the_dense_one_with_decay_of_what_is_masked():
    layer = nn.Linear(8, 4, bias=False)
    nn.utils.parametrize.register_parametrization(layer, "weight", SrSte(0.5))
    x = torch.randn(3, 8)
    layer(x).sum().backward()
    [raw] = layer.parameters()
    masked = raw.detach().where(layer.weight.detach() == 0, 0)
    torch.testing.assert_close(raw.grad, torch.ones(3, 4).T @ x + 0.5 * masked)


def test_what_takes_slope_apart_has_its_mask_and_exact_gradients():
    layer = nn.Linear(8, 4, bias=False)
    slope = SlopeLinear.of(layer)
    nn.utils.parametrize.register_parametrization(layer, "weight", Static(layer.weight))
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    weight = slope.to_dense()
    assert torch.equal(layer.weight, weight)
    torch.testing.assert_close(x.grad, torch.ones(3, 4) @ weight)
    [raw] = layer.parameters()
    torch.testing.assert_close(raw.grad, (torch.ones(3, 4).T @ x.detach()).where(weight != 0, 0))
    raw.data += 10 * (weight == 0)  # what it dropped does not come back
    assert torch.equal(layer.weight, weight)


def test_adapters_fall_from_their_own_rate_to_zero():
    plan = Plan(100, rate=0.5, warmup=10)
    own = {"own_rate": 0.01, "joins_at": 80}
    assert [_rate(own, plan, step) for step in (80, 90, 99)] == pytest.approx([0.01, 0.005, 0.0005])
    assert _rate({}, plan, 10) == 0.5
    assert plan.rate_at(99) < 1e-3 * plan.rate  # which is why they have one


def test_soft_thresholds_are_continuous_and_the_scale_is_the_best():
    weight = torch.randn(16, 32)
    soft = soft_threshold(weight)
    assert is_two_of_four(soft)
    assert soft_threshold(torch.tensor([[1.0, -5.0, 2.0, 3.0]])).tolist() == [[0.0, -3.0, 0.0, 1.0]]
    assert (soft_threshold(weight + 1e-4) - soft).abs().max() < 3e-4
    scale = SSte(weight).scale
    loss = [(weight - s * soft).square().sum() for s in (scale * 0.99, scale, scale * 1.01)]
    assert loss[1] == min(loss)


def test_transposable_masks_are_the_best_of_all():
    assert PATTERNS.shape == (90, 16)
    weight = torch.randn(8, 12)
    mask = transposable_mask(weight)
    assert is_two_of_four(mask)
    assert is_two_of_four(mask, 0)
    block, kept = weight[4:, 4:8].abs(), mask[4:, 4:8]
    assert math.isclose(block[kept].sum(), max(block[p.view(4, 4).bool()].sum() for p in PATTERNS), rel_tol=1e-6)


def test_a_fork_whose_adapters_stand_still_is_the_run_itself(corpus, tmp_path, monkeypatch):
    def bits(rate):
        setting = Setting(adapter_rates=dict.fromkeys(FORKS, rate))
        runs = runs_of("slope", 20, 0, setting, corpus, "held-out", tmp_path / "cache")
        return {run.name: run.bits for run in runs}

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *args: None)  # gradients of adapters count in its norm
    still = bits(0.0)
    assert list(still) == ["slope", *FORKS]
    assert still["slope"] == still[LAZY] == still["lazy, 10%"]
    moved = bits(0.1)
    assert moved["slope"] == still["slope"]
    assert len({moved[name] for name in ("slope", LAZY, "lazy, 10%")}) == 3
    assert moved["lazy, schedule's rate"] == still["lazy, schedule's rate"] != still["slope"]
    monkeypatch.setattr(training_runs, "VERSION", 0)
    monkeypatch.setattr(SlopeLinear, "adapting", property(lambda self: False, lambda self, value: None), raising=False)
    assert len(set(bits(0.1).values())) == 1


@pytest.mark.slow
def test_runs_side_by_side_are_those_of_one_process(tmp_path):
    names = ["one.py", *(f"file{index}.py" for index in range(60))]
    for name in names:
        (tmp_path / name).write_bytes(f"for each in range({name}):\n    pass\n".encode() * 12)
    corpus = Corpus(tmp_path, tuple(names))
    jobs = jobs_for({"dense": Setting(), "sr-ste": Setting(options={"lambda": 0.1})}, 2, (0,), corpus, tmp_path / "a")
    assert not list(side_by_side(jobs * 9, 1, lambda job: False))[4:]  # those that had begun
    found = {job.name: runs for job, runs, _ in side_by_side(jobs, 2)}
    assert found.keys() == {"dense", "sr-ste"}
    for job in jobs:
        alone = runs_of(job.name, 2, 0, job.setting, corpus, "held-out", tmp_path / "b")
        assert alone[0].bits == pytest.approx(found[job.name][0].bits, rel=1e-3)  # by one thread or by several


def test_a_finished_run_comes_from_the_cache(corpus, tmp_path, monkeypatch):
    first = runs_of("dense", 6, 0, Setting(), corpus, "held-out", tmp_path / "cache")
    monkeypatch.setattr(training_runs, "_trained", None)
    assert runs_of("dense", 6, 0, Setting(), corpus, "held-out", tmp_path / "cache")[0].bits == first[0].bits
    assert first[0].curve
    with pytest.raises(TypeError):
        runs_of("dense", 6, 1, Setting(), corpus, "held-out", tmp_path / "cache")


def test_every_method_is_tuned_with_the_same_effort(corpus, tmp_path, monkeypatch):
    def runs(name, steps, seed, setting, corpus, split):
        assert (seed, split) == (100, "calibration")
        bits = abs(setting.rate - 6e-3) + sum(
            str(value) in ("random", "0.3", "0.02") for value in setting.options.values()
        )
        forks = {of: abs(rate - {LAZY: 1e-3}.get(of, 3e-3)) for of, rate in setting.adapter_rates.items()}
        return [Run(name, seed, bits, []), *(Run(of, seed, gap, []) for of, gap in forks.items())]

    monkeypatch.setattr(training_tuning, "runs_of", runs)
    for name in (name for name, method in METHODS.items() if not method.like):
        trials = tuned(name, corpus, lambda trial: None)
        assert len([trial for trial in trials if trial.name == name]) in (7, 8)
        assert best(trials, name).rate == 6e-3
        assert {trial.setting.rate for trial in trials} == set(training_tuning.RATES)
    chosen = settings(tuned("slope", corpus, lambda trial: None) + [Trial(n, Setting(0.5), 1.0) for n in BASELINES])
    assert chosen["slope"].adapter_rates == {LAZY: 1e-3, "lazy, 10%": 3e-3}
    assert chosen["static"].rate == chosen["slope"].rate == 6e-3
    assert chosen["sr-ste"].rate == 0.5
    assert Trial.of({"name": "dense", "setting": {"rate": 1.0}, "bits": 2.0}).setting.rate == 1.0


def test_memory_and_times_of_every_method(corpus):
    held = {name: model_bytes(name, Setting(), corpus) for name in METHODS}
    dense = sum(parameter.nbytes for parameter in Gpt(TINY).parameters())
    assert 4 * dense <= held["dense"] < 4.1 * dense  # weights, gradients and two moments, and steps
    inner = sum(layer.weight.nbytes for layer in block_linears(Gpt(TINY)).values())
    assert held["slope"] < held["dense"] - 1.7 * inner
    assert {name for name in METHODS if held[name] < held["dense"]} == {"slope", "throughout"}, held
    times = step_times({name: Setting() for name in METHODS}, corpus, rounds=5)
    assert times.keys() == METHODS.keys()
    assert min(times.values()) > 0


def test_wide_adam_is_adam():
    ours, theirs = (nn.Linear(6, 5) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    wide = WideAdamW(ours.parameters(), lr=0.01)
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for seed in range(4):
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
        for layer, optimizer in ((ours, wide), (theirs, plain)):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def record():
    bits = {"dense": (2.0, 2.1, 2.2), "slope": (2.3, 2.5, 2.5), LAZY: (2.2, 2.3, 2.4), "sr-ste": (2.29, 2.41, 2.5)}
    bits["static"] = (2.4, 2.6, 2.6)
    runs = [
        Run(name, seed, value, [(1, 4.0), (2, value)]) for name, of in bits.items() for seed, value in enumerate(of)
    ]
    return Record(
        "A model.",
        {name: Setting(options={"lambda": 0.002}, adapter_rates={LAZY: 0.003}) for name in METHODS},
        runs,
        dict.fromkeys(METHODS, 1.0),
        dict.fromkeys(METHODS, 100),
        LayerMemory(256, 8, 425984, 475136, 786432, 73728, 81920, 131072),
        {"dense": 1.0},
        {"threads": 2, "cpu": "x", "torch": "2", "python": "3"},
        [Trial("s-ste", Setting(rate, {"decay": 0.1}), bits) for rate, bits in ((0.1, 2.5), (0.2, 2.4))],
    )


def test_claims_follow_from_the_seeds():
    found = {claim.what: claim for claim in claims(record())}
    ahead = found["SLoPe with lazy adapters ahead of extended SR-STE (published)"]
    assert ahead.gap == pytest.approx(0.1)
    assert ahead.verdict == "holds"
    assert found["SLoPe with lazy adapters behind dense (published)"].gap == pytest.approx(0.2)
    assert found["lazy adapters help SLoPe (published)"].verdict == "open: within the interval"
    swapped = replace(
        record(), runs=[replace(r, name={"sr-ste": LAZY, LAZY: "sr-ste"}.get(r.name, r.name)) for r in record().runs]
    )
    assert claims(swapped)[0].verdict == "**fails**"
    assert mean_and_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5))
    assert mean_and_interval([1.0])[1] == math.inf


def test_a_record_comes_back_and_is_shown(tmp_path):
    record().write(tmp_path / "training.json")
    found = Record.read(tmp_path / "training.json")
    assert found == record()
    pages = {name: page(found) for name, page in PAGE.items()}
    lazy = next(line for line in pages["rows"].splitlines() if line.startswith("| SLoPe, adapters in the last 1% |"))
    assert "| 2.3000 | 0.2484 | 2.2000, 2.3000, 2.4000 | +0.2000 |" in lazy
    assert lazy.endswith("| adapters' rate 0.003 |")
    assert "0.5625x of the dense weight" in pages["layer"]
    assert "+0.1000" in pages["claims"]
    assert pages["trials"].endswith("| S-STE (s-ste) | 0.1, decay 0.1: 2.5000; 0.2, decay 0.1: **2.4000** |")


def test_what_slope_consists_of_follows_from_the_seeds_too():
    pages = {name: page(record()) for name, page in training_why.PAGE.items()}
    assert "| the same mask without the second prune: every gradient exact | -0.1000 | 0.0000 | costs |" in pages["why"]
    assert "(published) | +0.1333 | 0.1434 | nothing beyond the interval |" in pages["why"]
    assert len(pages["why"].splitlines()) == 2 + 4  # what was not run is left out
    assert pages["last"].startswith("The last 1% are 1 of 2 steps, 1,024 bytes of text")


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw(record(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
