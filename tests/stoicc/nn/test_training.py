"""Models that train sparse: conversion, the schedule, resuming, several processes, and the kernels afterwards."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import stoicc
from stoicc.ir.errors import InputError
from stoicc.nn import SlopeLinear, SlopeSchedule, compile_trained, sparsify_for_training
from stoicc.nn.kept import COLUMN
from tests.models import Transformer, token_batches

RECIPE = {"layers": "blocks.*", "rank": 4}


def sparse(recipe=RECIPE, seed=0):
    torch.manual_seed(seed)
    return sparsify_for_training(Transformer(), recipe)


def train(model, steps, state=None, until=None):
    """Steps on one batch each; from a saved state, and up to a step where it is saved."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = SlopeSchedule(model, steps, repack_every=3, lazy=0.2)
    if state is not None:
        found = torch.load(io.BytesIO(state), weights_only=True)
        for part, saved in zip((model, optimizer, schedule), found, strict=True):
            part.load_state_dict(saved)
    while schedule.position < (until or steps):
        ids = torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(schedule.position))
        logits = model(ids[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    saved = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, schedule)], saved)
    return saved.getvalue()


def layer(model, name="blocks.0.q"):
    return model.get_submodule(name)


def same(a, b):
    state = b.state_dict()
    return all(torch.equal(value, state[name]) for name, value in a.state_dict().items())


def test_layers_become_sparse_and_draw_their_own_masks():
    model = sparse([{"layers": "*.q", "mask": "random", "n": 1, "m": 2}, {"layers": "*.up", "rank": 0.125}])
    first, second = (layer(model, f"blocks.{index}.q") for index in (0, 1))
    assert (first.n, first.m, first.left) == (1, 2, None)
    assert not torch.equal(first.places & COLUMN, second.places & COLUMN)
    assert layer(model, "blocks.0.up").left.shape == (128, 8)
    assert type(layer(model, "blocks.0.down")) is nn.Linear
    assert same(sparse([{"layers": "*.q", "mask": "random"}]), sparse([{"layers": "*.q", "mask": "random"}]))


def test_a_layer_starts_from_the_dense_weights():
    torch.manual_seed(0)
    dense = Transformer()
    model = sparse()
    weight, kept = layer(dense).weight, layer(model).to_dense()
    assert torch.equal(kept[kept != 0], weight[kept != 0])
    assert torch.equal(layer(model).bias, layer(dense).bias)


def test_it_learns_and_adapters_join_for_the_last_steps():
    model = sparse()
    ids = token_batches(1)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = SlopeSchedule(model, 40, repack_every=10, lazy=0.05)
    assert schedule.adapters_from == 38
    losses = []
    for step in range(40):
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        joined = {factor.grad is not None for factor in schedule.adapters[::2]}
        assert joined == {step >= 38}
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(bool(factor.ne(0).any()) for factor in schedule.adapters)
    assert len(schedule.adapters) == 2 * 12


@pytest.mark.parametrize("stop", [4, 9])
def test_a_run_that_stopped_goes_on_bit_for_bit(stop):
    whole = sparse()
    train(whole, 10)
    state = train(sparse(), 10, until=stop)
    resumed = sparse(seed=1)
    train(resumed, 10, state)
    assert same(whole, resumed)


def test_no_step_repacks_more_than_its_share(monkeypatch):
    model, seen = sparse(), []
    monkeypatch.setattr(SlopeLinear, "repack", lambda self, part, parts: seen.append((part, parts)))
    schedule = SlopeSchedule(model, 300)
    layers = sum(isinstance(module, SlopeLinear) for module in model.modules())
    for _ in range(200):
        schedule.step()
    assert seen[::layers] == [(step % 100, 100) for step in range(200)]
    assert len(seen) == 200 * layers


def test_lazy_zero_never_adapts():
    model = sparse()
    schedule = SlopeSchedule(model, 2, lazy=0)
    schedule.step()
    schedule.step()
    assert not layer(model).adapting


def _process(rank, results):
    dist.init_process_group("gloo", init_method=f"file://{results}/store", rank=rank, world_size=2)
    try:
        model = DistributedDataParallel(sparse(seed=rank), find_unused_parameters=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = SlopeSchedule(model, 4, repack_every=2, lazy=0.5)
        for step in range(4):
            ids = torch.randint(0, 48, (4, 9), generator=torch.Generator().manual_seed(step))[rank * 2 : rank * 2 + 2]
            nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        torch.save(model.module.state_dict(), f"{results}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_train_one_model(tmp_path):
    spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    alone = sparse(seed=0)
    optimizer, schedule = torch.optim.SGD(alone.parameters(), lr=0.1), SlopeSchedule(alone, 4, 2, lazy=0.5)
    for step in range(4):
        ids = torch.randint(0, 48, (4, 9), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(alone(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(value, first[name], atol=1e-5, rtol=1e-4)


def test_a_trained_model_serves_from_kernels_and_folders(tmp_path):
    model = sparse()
    train(model, 5)
    assert layer(model).adapting
    ids = token_batches(1)[0]
    with torch.no_grad():
        expected = model(ids)
        served = compile_trained(copy.deepcopy(model))(ids)
        torch.testing.assert_close(served, expected, atol=1e-4, rtol=1e-3)
        compiled = compile_trained(model)
        stoicc.save_model(compiled, tmp_path / "model")
        loaded = stoicc.load_model(Transformer(), tmp_path / "model")
        assert torch.equal(loaded(ids), served)
    assert "slope(" in str(layer(compiled).record)
    assert "nv24" in str(stoicc.report(compiled))


def test_what_cannot_be_done_leaves_the_model_as_it_was():
    model = Transformer(width=60)
    before = dict(model.named_modules())
    with pytest.raises(InputError, match=r"layer blocks.0.q: slope: expected rows of whole groups of 8"):
        sparsify_for_training(model, {"layers": "blocks.*", "m": 8})
    with pytest.raises(InputError, match=r"slope: expected layers, exclude, n, .* found .*'k': 2.*; correct"):
        sparsify_for_training(model, {"k": 2})
    with pytest.raises(InputError, match=r"expected patterns that name a linear layer, found none for nothing"):
        sparsify_for_training(model, {"layers": "nothing"})
    with pytest.raises(InputError, match=r"sparsify_for_training: expected a torch.nn.Module, found str"):
        sparsify_for_training("model", {})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"model Transformer: expected SlopeLinear layers inside, found none"):
        compile_trained(model)
    with pytest.raises(InputError, match=r"slope schedule, model Transformer: expected SlopeLinear layers, found none"):
        SlopeSchedule(model, 10)
    assert dict(model.named_modules()) == before


def test_a_weight_with_two_biases_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(InputError, match=r"layer 0: expected one bias for a weight that several layers share, found 2"):
        sparsify_for_training(model, {})


def test_a_schedule_refuses_numbers_and_states_that_do_not_fit():
    model = sparse()
    with pytest.raises(InputError, match=r"slope schedule: expected steps >= 1, .* found 0, 100 and 0.01; correct"):
        SlopeSchedule(model, 0)
    with pytest.raises(InputError, match=r"slope schedule: expected a state of 9 steps, repacked every 100, found 8"):
        SlopeSchedule(model, 9).load_state_dict(SlopeSchedule(model, 8).state_dict())
