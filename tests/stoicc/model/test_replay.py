"""Stages go on where earlier ones ended: results are those of whole runs, at the cost of a few."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stoicc
from stoicc.model import compress as compressing
from stoicc.model.replay import Replay
from tests.models import Transformer, kernels_of, record_of, token_batches

STEPS = ["wanda", {"slim_lora": {"rank": 4}}]
WIDTH = 64


class Whole(Replay):
    """Every run starts at the model's input."""

    def over(self, model: nn.Module) -> Any:
        return nullcontext()


class Mlp(nn.Module):
    """A block of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Skipping(nn.Module):
    """What early blocks return is read again by late ones."""

    def __init__(self) -> None:
        super().__init__()
        self.downs, self.ups = (nn.ModuleList(Mlp() for _ in range(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for block in self.downs:
            x = block(x)
            seen.append(x)
        for block in self.ups:
            x = block(x + seen.pop().tanh())
        return x


class Shared(nn.Module):
    """One block, called again and again, with others between."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.others = Mlp(), nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for other in self.others:
            x = other(self.block(x))
        return x


class Writing(nn.Module):
    """A block that changes its input and returns nothing, as the model knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()

    def forward(self, x: Tensor) -> None:
        x += self.inner(x)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Writing() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.blocks:
            block(x)
            x *= 1.5
        return x


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()
        self.forward = self.named

    def named(self, x: Tensor) -> dict[str, Tensor | str]:
        return {"x": self.inner(x), "name": "block"}


class Named(nn.Module):
    """Blocks with a forward of their own that returns a mapping, of which the model changes a value in place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Wrapped() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)["x"]
            x += 1
        return x


MODELS: dict[str, tuple[Any, Any]] = {
    "transformer": (Transformer, token_batches),
    "skips": (Skipping, None),
    "shared": (Shared, None),
    "in-place": (InPlace, None),
    "mappings": (Named, None),
    "flat": (lambda: nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU()))), None),
    "torch": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True), 3), None),
}


def case(name: str) -> tuple[Any, list[Tensor]]:
    torch.manual_seed(0)
    model, batches = MODELS[name]
    return model(), batches() if batches else [torch.randn(3, 5, WIDTH) for _ in range(2)]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    kernels, others = kernels_of(one), kernels_of(other)
    assert kernels
    for name, kernel in kernels.items():
        assert record_of(kernel).error == record_of(others[name]).error
        assert torch.equal(kernel.to_dense(), others[name].to_dense())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor")
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_results_are_those_of_whole_runs(name, sequential, monkeypatch):
    model, batches = case(name)
    other = case(name)[0]
    stoicc.compress(model, STEPS, batches, sequential=sequential)
    monkeypatch.setattr(compressing, "Replay", Whole)
    stoicc.compress(other, STEPS, batches, sequential=sequential)
    assert_same(model, other)
    own = [module for module in model.modules() if "forward" in module.__dict__]
    assert [module.__dict__["forward"] for module in own] == [module.named for module in own]


def calls_of_a_block(blocks: int, sequential: bool) -> list[int]:
    """How often each block runs while its model is compressed."""
    torch.manual_seed(0)
    model = Transformer(blocks=blocks)
    counts = [0] * blocks
    for index, block in enumerate(model.blocks):

        def count(module, args, index=index):
            counts[index] += 1

        block.get_submodule("norm").register_forward_pre_hook(count)
    stoicc.compress(model, ["wanda"], token_batches(2), sequential=sequential)
    return counts


@pytest.mark.parametrize("sequential", [True, False])
def test_how_often_a_block_runs_does_not_depend_on_how_many_there_are(sequential):
    """Survey, its four stages and the first of the next block: six runs of two batches; one to try the result."""
    assert calls_of_a_block(4, sequential)[:3] == calls_of_a_block(8, sequential)[:3] == [13, 13, 13]
    assert calls_of_a_block(8, sequential)[3:] == [13] * 5


@pytest.fixture
def held(monkeypatch) -> list[list[str]]:
    """After each stage, the modules whose values the first batch still holds."""
    found: list[list[str]] = []

    class Seen(Replay):
        def settle(self, layers):
            super().settle(layers)
            copies = [(path[-1][0], copy) for (run, path), copy in self._copies.items() if run == 0]
            found.append([name for name, copy in copies if any(type(leaf) is Tensor for leaf, _ in copy.leaves)])

    monkeypatch.setattr(compressing, "Replay", Seen)
    return found


def test_values_that_the_next_block_took_over_are_let_go(held):
    stoicc.compress(Transformer(blocks=5), ["wanda"], token_batches(2))
    assert held[-1] == ["blocks.4"]
    assert max(map(len, held)) == 1


def test_values_that_later_blocks_read_are_kept(held):
    model, batches = case("skips")
    stoicc.compress(model, STEPS, batches)
    assert held[4] == ["downs.1"]  # the blocks before it seemed to be done with
    assert held[-1][:3] == ["downs.0", "downs.1", "downs.2"]


def test_a_value_beside_what_blocks_return_is_noticed(monkeypatch):
    """Each block leaves something for the next one, which is missing where it does not run."""

    class Leaving(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            total = sum(notes)
            notes.append(x.mean())
            return super().forward(x + total)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Leaving() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            notes.clear()
            for block in self.blocks:
                x = block(x)
            return x

    notes: list[Tensor] = []
    torch.manual_seed(0)
    model, batches = Model(), [torch.rand(3, 5, WIDTH) + 1 for _ in range(2)]
    for sequential in (True, False):
        one, other = copy.deepcopy(model), copy.deepcopy(model)
        with pytest.warns(UserWarning, match=r"found that layer blocks\.\d\.\w+ sees something else if those"):
            stoicc.compress(one, STEPS, batches, sequential=sequential)
        with monkeypatch.context() as patch:
            patch.setattr(compressing, "Replay", Whole)
            stoicc.compress(other, STEPS, batches, sequential=sequential)
        assert_same(one, other)


def test_a_function_runs_on_the_dense_model_and_to_try_the_result():
    model, batches = case("transformer")
    expected, runs = stoicc.compress(copy.deepcopy(model), STEPS, batches), []

    def function(model: nn.Module) -> None:
        runs.append(model)
        for ids in batches:
            model(ids=ids)

    stoicc.compress(model, STEPS, function)
    assert len(runs) == 2
    assert_same(model, expected)


class Clamping(nn.Module):
    """A model that changes its input, and a mapping that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Mlp(), Mlp())

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        x = features.pop("x")
        x -= 0.3
        features["y"] = self.blocks(x)
        return features


def test_a_function_may_use_its_tensors_again():
    torch.manual_seed(0)
    model, batches = Clamping(), [torch.randn(3, 5, WIDTH) for _ in range(2)]
    other, shared = copy.deepcopy(model), torch.empty(3, 5, WIDTH)

    def function(model: nn.Module) -> None:
        for x in batches:
            model({"x": shared.copy_(x)})

    stoicc.compress(model, STEPS, function)
    stoicc.compress(other.blocks, STEPS, [x - 0.3 for x in batches])
    assert_same(model.blocks, other.blocks)


class Note:
    """An argument that may be anything."""


def test_a_function_whose_calls_cannot_be_repeated_runs_for_every_stage():
    model, batches = case("skips")
    expected, runs = stoicc.compress(copy.deepcopy(model), STEPS, batches), []
    plain = type(model).forward
    type_with_note = type("Noted", (Skipping,), {"forward": lambda self, x, note: plain(self, x)})
    model.__class__ = type_with_note

    def function(model: nn.Module) -> None:
        runs.append(model)
        for x in batches:
            model(x, Note())

    stoicc.compress(model, STEPS, function)
    assert len(runs) > 12  # survey, a stage for each layer, one that was repeated, one to try the result
    assert_same(model, expected)


def test_a_function_that_calls_parts_of_the_model_runs_for_every_stage():
    model, batches = case("transformer")
    runs = []

    def function(model: Any) -> None:
        runs.append(model)
        for ids in batches:
            model.blocks[1](model.blocks[0](model.embedding(ids)))

    stoicc.compress(model, {"rules": [{"layers": "blocks.*", "steps": STEPS}]}, function)
    assert len(runs) == 10
    assert len(kernels_of(model)) == 12
