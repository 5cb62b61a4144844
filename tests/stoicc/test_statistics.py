"""Statistics of layers: sums that merge, hooks that come off, and what a sequential run sees."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import stoicc
from stoicc.ops.statistics import Collector, Statistics, all_reduce, collect, merge, sequentially

ROOT = Path(__file__).parents[2]
FIELDS = ("total", "absolute", "square", "gram")


class Block(nn.Module):
    """An attention-like block: q, k and v share an input; the last is called by keyword."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(width, 2 * width)
        self.unused = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.q(x).sigmoid() * self.k(x) + self.v(x)
        return self.out(input=self.dropout(mixed))


@pytest.fixture
def model() -> nn.Module:
    return Block()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return [torch.randn(2, 5, 12), torch.randn(7, 12), torch.randn(1, 1, 12)]


def same(one: Statistics, other: Statistics) -> bool:
    return one.samples == other.samples and all(torch.equal(getattr(one, f), getattr(other, f)) for f in FIELDS)


def close(one: Statistics, other: Statistics) -> None:
    assert one.samples == other.samples
    for field in FIELDS:
        torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=1e-5, atol=1e-4)


def test_a_batch_becomes_its_sums():
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    x[..., 2] = 0
    flat = x.reshape(12, 6)
    found = Statistics.of(x, dtype=torch.float64)
    assert found.samples == 12
    assert found.columns == 6
    torch.testing.assert_close(found.gram, flat.T @ flat)
    torch.testing.assert_close(found.mean, flat.mean(0))
    torch.testing.assert_close(found.mean_absolute, flat.abs().mean(0))
    torch.testing.assert_close(found.mean_square, flat.square().mean(0))
    torch.testing.assert_close(found.norm, flat.norm(dim=0))
    assert found.dead.tolist() == [False, False, True, False, False, False]
    ridge = 0.1 * flat.square().sum(0).mean() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(found.hessian(0.1), flat.T @ flat + ridge)
    assert Statistics.of(x, gram=False).gram is None
    torch.testing.assert_close(Statistics.of(x, gram=False, dtype=torch.float64).square, found.square)


def test_low_precision_inputs_are_summed_in_float32():
    x = torch.full((4096, 2), 1.0 + 2**-5, dtype=torch.bfloat16)  # every sum of squares is exact in fp32, in any order
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Statistics.of(x)
    assert found.gram is not None
    assert found.gram.dtype is torch.float32
    assert found.gram[0, 1].item() == 4096 * (1.0 + 2**-5) ** 2


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 2**31))
def test_merging_equals_collecting_in_one_go(sizes, seed):
    parts = [
        torch.randint(-3, 4, (n, 5), generator=torch.Generator().manual_seed(seed + i)).float()
        for i, n in enumerate(sizes)
    ]
    whole = Statistics.of(torch.cat(parts))
    assert same(sum((Statistics.of(p) for p in parts[1:]), start=Statistics.of(parts[0])), whole)


def test_permuted_and_scaled_inputs():
    x, order, scale = torch.randn(40, 6), torch.randperm(6), torch.rand(6) + 0.5
    close(Statistics.of(x).select(order), Statistics.of(x[:, order]))
    close(Statistics.of(x).scaled(scale), Statistics.of(x * scale))


def test_collect_sees_what_each_layer_sees(model, batches):
    found = collect(model, iter(batches))
    assert list(found) == ["q", "k", "v", "out"]  # `unused` is not called
    x = torch.cat([batch.reshape(-1, 12) for batch in batches])
    close(found["q"], Statistics.of(x))
    with torch.no_grad():
        inner = model.q(x).sigmoid() * model.k(x) + model.v(x)  # no dropout: calibration runs in eval mode
    close(found["out"], Statistics.of(inner))
    assert list(collect(model, batches, ["out"], gram=False)) == ["out"]


def test_batches_are_tensors_tuples_or_mappings(model, batches):
    plain = collect(model, batches)
    for other in ([(batch,) for batch in batches], [{"x": batch} for batch in batches]):
        assert same(collect(model, other)["out"], plain["out"])


def test_the_model_is_left_as_it_was_after_an_error_too(model, batches):
    model.out.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect(model, batches)
    bad = batches[1].clone()
    bad[3, 4] = float("nan")
    for run in (collect, lambda *args: list(sequentially(*args))):
        message = r"calibration of layer q, batch 1: expected finite inputs, found nan at sample 3, channel 4; leave"
        with pytest.raises(stoicc.InputError, match=message):
            run(model, [batches[0], bad])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model(batches[0]).requires_grad


def test_a_refused_batch_leaves_the_sums():
    collector = Collector(name="h.0")
    collector.add(torch.ones(2, 3))
    with pytest.raises(stoicc.InputError, match=r"layer h.0, batch 1: expected finite inputs, found inf at sample 0"):
        collector.add(torch.tensor([[1.0, float("inf"), 0.0]]))
    assert same(collector.statistics(), Statistics.of(torch.ones(2, 3)))


def test_sequentially_a_layer_sees_what_compressed_layers_produce(model, batches):
    x = torch.cat([batch.reshape(-1, 12) for batch in batches])
    seen = []
    for group in sequentially(model, batches):
        seen.append(list(group))
        if "q" in group:
            assert group["q"] is group["k"] is group["v"]
            close(group["q"], Statistics.of(x))
            model.k = stoicc.compile(stoicc.ops.nm_magnitude(model.k.weight), bias=model.k.bias, target="reference")
        else:
            inner = model.q(x).sigmoid() * model.k(x) + model.v(x)
            close(group["out"], Statistics.of(inner))
    assert seen == [["q", "k", "v"], ["out"]]


class Fickle(nn.Module):
    """b shares a's input in the first batch only; c shares it always; d is first called in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor, turn: int) -> torch.Tensor:
        y = self.a(x) + self.b(x if turn == 0 else x + 1) + self.c(x)
        return self.d(y) if turn else y


def test_layers_that_share_an_input_only_sometimes_are_told_apart():
    model, first, second = Fickle(), torch.randn(3, 4), torch.randn(5, 4)
    groups = list(sequentially(model, [(first, 0), (second, 1)]))
    assert [list(group) for group in groups] == [["a", "c"], ["b"], ["d"]]
    close(groups[0]["c"], Statistics.of(torch.cat((first, second))))
    close(groups[1]["b"], Statistics.of(torch.cat((first, second + 1))))
    assert groups[2]["d"].samples == 5


class InPlace(nn.Module):
    """Changes the tensor between two layers that are called with it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        y = self.a(x)
        return y + self.b(x.mul_(2))


def test_a_tensor_changed_in_place_is_another_input():
    x = torch.randn(6, 4)
    groups = list(sequentially(InPlace(), [x]))
    assert [list(group) for group in groups] == [["a"], ["b"]]
    close(groups[1]["b"], Statistics.of(2 * x))


def test_statistics_survive_a_file(model, batches, tmp_path):
    groups = list(sequentially(model, batches))
    found = {name: statistics for group in groups for name, statistics in group.items()}
    stoicc.ops.save_statistics(found, tmp_path / "s.safetensors")
    back = stoicc.ops.load_statistics(tmp_path / "s.safetensors")
    assert list(back) == list(found)
    assert all(same(back[name], found[name]) for name in found)
    assert back["q"] is back["v"]  # once on disk, once in memory
    plain = collect(model, batches[:1], gram=False)
    stoicc.ops.save_statistics(plain, tmp_path / "p.safetensors")
    assert stoicc.ops.load_statistics(tmp_path / "p.safetensors")["q"].gram is None


def test_runs_merge_layer_by_layer(model, batches):
    parts = [collect(model, [batch]) for batch in batches]
    merged = merge(*parts)
    close(merged["out"], collect(model, batches)["out"])
    assert merge({"a": parts[0]["q"]}, {"b": parts[0]["q"]}).keys() == {"a", "b"}


def test_without_processes_all_reduce_changes_nothing(model, batches):
    found = collect(model, batches, distributed=True)
    assert all_reduce(found)["q"] is found["q"]


WORKER = """
import sys, torch, torch.distributed as dist
from stoicc.ops.statistics import Statistics, all_reduce
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
shared = Statistics.of(torch.arange(6.0).view(2, 3) + 10 * rank)
reduced = all_reduce({"q": shared, "k": shared, "o": Statistics.of(torch.eye(2) * (rank + 1))})
whole = Statistics.of(torch.cat((torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3) + 10)))
assert reduced["q"] is reduced["k"] and list(reduced) == ["q", "k", "o"]
assert reduced["q"].samples == 4 and torch.equal(reduced["q"].gram, whole.gram)
assert torch.equal(shared.gram, Statistics.of(torch.arange(6.0).view(2, 3) + 10 * rank).gram)
assert reduced["o"].square.tolist() == [5.0, 5.0]
try:
    all_reduce({f"layer{rank}": shared})
except ValueError as error:
    assert "expected the same layers in every process" in str(error)
else:
    raise AssertionError("different layers were merged")
dist.barrier()
dist.destroy_process_group()
"""


def test_processes_sum_over_torch_distributed(tmp_path):
    command = [sys.executable, "-c", WORKER]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=ROOT) for rank in range(2)]
    assert [worker.wait(60) for worker in workers] == [0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, b: collect(m, b, ["k", "oout"]),
            r"expected names of the model's modules, found 'oout'; perhaps out",
        ),
        (lambda m, b: collect(m, b, "out"), r"expected a list of layer names, found 'out'; write \[...\] around it"),
        (lambda m, b: collect(nn.ReLU(), b), r"expected nn.Linear layers in ReLU, found none; name the layers"),
        (
            lambda m, b: collect(m, b, ["unused"]),
            r"layer unused: expected at least one sample, found none; run a batch",
        ),
        (lambda m, b: list(sequentially(m, b, ["unused"])), r"layer unused: expected at least one sample, found none"),
        (
            lambda m, b: list(sequentially(m, iter(b))),
            r"expected batches to run through again and again, found an iter",
        ),
        (
            lambda m, b: collect(m, b, dtype=torch.float16),
            r"expected dtype float32 or float64 for the sums, found torch.f",
        ),
        (lambda m, b: Statistics.of(torch.ones(2, 2).long()), r"batch 0: expected a float tensor of inputs \[..., K\]"),
        (
            lambda m, b: Statistics.of(torch.full((2, 2), 1e30)),
            r"expected sums in the range of torch.float32, found some",
        ),
        (lambda m, b: Statistics.of(b[0], gram=False).hessian(), r"expected a gram matrix X\^T X, found none; collect"),
        (
            lambda m, b: Statistics.of(b[0]) + Statistics.of(b[0][..., :3]),
            r"expected columns 12 in both to merge, found 3",
        ),
        (
            lambda m, b: Statistics.of(b[0]) + Statistics.of(b[0], gram=False),
            r"expected gram True in both to merge, found F",
        ),
        (
            lambda m, b: Statistics(2, torch.ones(3), torch.ones(2), torch.ones(3)),
            r"expected sums \[K\] and a gram matrix",
        ),
        (
            lambda m, b: Statistics.from_dict({"total": torch.ones(3)}),
            r"expected tensors samples, total, absolute, square",
        ),
        (lambda m, b: stoicc.ops.load_statistics("/nowhere"), r"statistics /nowhere: expected a safetensors file"),
        (lambda m, b: stoicc.ops.save_statistics(collect(m, b), "/nowhere/s"), r"expected a file that can be written"),
    ],
)
def test_misuse_is_one_clear_sentence(call, message, model, batches):
    with pytest.raises(stoicc.InputError, match=message):
        call(model, batches)


def test_batches_of_another_width_and_other_files_are_refused(tmp_path):
    collector = Collector()
    collector.add(torch.ones(2, 3))
    with pytest.raises(stoicc.InputError, match=r"calibration, batch 1: expected 3 channels, found 4"):
        collector.add(torch.ones(2, 4))
    stoicc.compile(torch.ones(16, 16), target="reference").save(tmp_path / "k.safetensors")
    with pytest.raises(stoicc.InputError, match=r"expected version 1 of a statistics file, found none"):
        stoicc.ops.load_statistics(tmp_path / "k.safetensors")
