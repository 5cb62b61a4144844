"""Width pruning: coupled layers lose the same channels, and what the model computes is that of zeros in their place."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stoicc
from stoicc import Width
from stoicc.model.calibration import Calibration
from stoicc.model.layers import Surgery
from stoicc.model.width import find_coupled, prune_width
from stoicc.model.width_rule import named_by
from tests.models import Transformer, kernels_of, record_of, token_batches

MLP = {"producers": "blocks.{}.up", "consumers": "blocks.{}.down", "keep": 0.75}
HEADS = {
    "producers": ["blocks.{}.q", "blocks.{}.k", "blocks.{}.v"],
    "consumers": "blocks.{}.out",
    "keep": 0.5,
    "group": 16,
    "remove": False,
}
RESIDUAL = {
    "producers": ["embedding", "*.out", "*.down"],
    "consumers": ["*.[qkv]", "*.up", "head"],
    "through": ["*norm*"],
    "keep": 0.5,
}


class Gated(nn.Module):
    """A perceptron whose activation is not 0 at 0, and a product of two that is."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 8, bias=False)
        self.activation = activation

    def forward(self, x):
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8, bias=False)

    def forward(self, x):
        return self.down(self.up(x).sigmoid())


def by_hand(model, x, keep):
    """The model with rows of `up` at zero, those with the least norm in the input of `down`."""
    seen: dict[str, torch.Tensor] = {}
    hook = model.down.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    model(x)
    hook.remove()
    dropped = seen["x"].norm(dim=0).argsort()[: 32 - keep]
    with torch.no_grad():
        for name, layer in model.named_children():
            if name in ("up", "gate"):
                layer.weight[dropped], layer.bias[dropped] = 0, 0
    return model


@pytest.mark.parametrize("model", [Plain(), Gated(F.silu), Gated(torch.sigmoid)], ids=["bias", "silu", "sigmoid"])
@pytest.mark.parametrize("remove", [True, False])
def test_the_result_is_the_model_with_zeros_in_place_of_the_least_active(model, remove):
    x = torch.randn(50, 16)
    rule = {"producers": ["up", "gate"], "consumers": ["down"], "keep": 0.25, "remove": remove}
    expected = by_hand(copy.deepcopy(model), x, 8)(x)
    pruned: Any = stoicc.compress(model, {"width": [rule]}, [x], in_place=False)
    torch.testing.assert_close(pruned(x), expected, rtol=1e-4, atol=1e-5)
    shapes = [tuple(layer.weight.shape) for layer in (pruned.up, pruned.down)]
    assert shapes == ([(8, 16), (8, 8)] if remove else [(32, 16), (8, 32)])
    assert (pruned.up.out_features, pruned.down.in_features) == ((8, 8) if remove else (32, 32))
    zeros = (pruned.down.weight == 0).all(0).sum()
    assert zeros == (0 if remove else 24)
    assert model.up.weight.shape == (32, 16)


def test_heads_go_as_a_whole_and_their_tiles_with_them():
    model: Any = Transformer()
    batches = token_batches()
    seen = stoicc.ops.collect(model, batches, ["blocks.0.out"])["blocks.0.out"]
    best = seen.square.view(4, 16).sum(1).argsort(descending=True)[:2].sort().values
    rules = {"width": [HEADS], "rules": [{"layers": "blocks.*", "compile": {"tile": [16, 16]}}]}
    stoicc.compress(model, rules, batches)
    kept = model.blocks[0].v.to_dense().view(4, 16, 64).any(-1).all(-1).nonzero().flatten()
    assert torch.equal(kept, best)
    assert torch.equal(model.blocks[0].out.to_dense().view(64, 4, 16).any(-1).all(0).nonzero().flatten(), best)
    row = next(row for row in stoicc.report(model).rows if row.name == "blocks.0.out")
    assert dict(row.formats) == {"dense": 8, "empty": 8}


def test_the_residual_stream_goes_through_norms():
    model: Any = Transformer()
    batches = token_batches()
    stoicc.compress(model, {"width": [RESIDUAL, MLP]}, batches)
    assert model.embedding.weight.shape == (48, 32)
    assert model.blocks[0].norm.normalized_shape == (32,)
    assert model.blocks[1].up.weight.shape == (96, 32)
    assert model.blocks[1].down.weight.shape == (32, 96)
    assert model(batches[0]).shape == (2, 12, 48)


def test_layers_are_compressed_after_they_were_narrowed(tmp_path):
    dense, batches = Transformer(), token_batches()
    steps = ["wanda", {"group_absmax": {"group_size": 32}}]
    recipe = {"width": [MLP], "rules": [{"layers": "blocks.*", "steps": steps}]}
    model: Any = stoicc.compress(copy.deepcopy(dense), recipe, batches, resume=tmp_path / "run")
    assert model.blocks[0].up.program.shape == (96, 64)
    assert record_of(model.blocks[0].down).narrowed_from == (64, 128)
    assert record_of(model.blocks[0].q).narrowed_from is None
    report = stoicc.report(model)
    assert report.dense_bytes == 4 * 2 * 8 * 64 * 64
    assert "96 x 64 of 128 x 64" in str(report)
    again = stoicc.compress(copy.deepcopy(dense), recipe, batches, resume=tmp_path / "run")
    assert str(stoicc.report(again)) == str(report)
    stoicc.save_model(model, tmp_path / "saved")
    loaded: Any = stoicc.load_model(Transformer(), tmp_path / "saved")
    assert torch.equal(loaded(batches[0]), model(batches[0]))


def test_plain_layers_that_were_narrowed_are_saved_and_loaded(tmp_path):
    model: Any = Transformer()
    batches = token_batches()
    stoicc.compress(model, {"width": [RESIDUAL], "rules": [{"layers": "blocks.0.q"}]}, batches)
    stoicc.save_model(model, tmp_path)
    with torch.device("meta"):
        empty = Transformer()
    loaded: Any = stoicc.load_model(empty, tmp_path)
    assert torch.equal(loaded(batches[0]), model(batches[0]))
    assert loaded.blocks[0].norm2.normalized_shape == (32,)
    with pytest.raises(stoicc.InputError, match=r"expected .* as saved in .*, found \[.*\]; give a model of the same"):
        stoicc.load_model(Transformer(width=32), tmp_path)


def test_one_module_at_two_names_is_cut_once():
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), nn.Linear(16, 16), shared, nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(20, 16)
    stoicc.compress(model, {"width": [{"producers": "0", "consumers": ["2", "5"], "keep": 0.5}]}, [x])
    assert model[3] is model[0]
    assert model(x).shape == (20, 4)


def test_braces_stand_for_the_same_text():
    names = ["a.0.up", "a.1.up", "a.x.up2", "b.0.up"]
    assert named_by(["a.{}.up"], names) == {"a.0.up": "0", "a.1.up": "1"}
    assert named_by(["*.up", "b.*"], names) == {"a.0.up": "", "a.1.up": "", "b.0.up": ""}
    model = Transformer()
    found = find_coupled(model, Width.of(HEADS), "width 1")
    assert [(each.producers, each.consumers) for each in found] == [
        ((f"blocks.{i}.q", f"blocks.{i}.k", f"blocks.{i}.v"), (f"blocks.{i}.out",)) for i in (0, 1)
    ]


BROKEN = [
    ({"producers": "none.*"}, r"width 1: expected producers that name a layer, found none for none.\*"),
    ({"consumers": "blocks.{}.norm2"}, "width 1, consumers: expected nn.Linear, found LayerNorm at blocks.0.norm2"),
    ({"consumers": "blocks.{}.out"}, "width 1: expected 128 channels as blocks.0.up makes, found 64 in blocks.0.out"),
    ({"consumers": "block{}.down"}, "expected consumers for blocks.0.up, found none with '0' for {}"),
    ({"group": 48}, "width 1: expected a group that divides 128 channels, found 48"),
    ({"keep": 1.5}, "recipe, width 1, width: expected keep over 0 and below 1, .* found 1.5"),
    ({"keep": None}, "expected keep over 0 and below 1, .* found None"),
    ({"group": 0}, "expected a group of at least 1 channel, found 0"),
    ({"remove": 1}, "expected remove to be true or false, found 1"),
    ({"consumers": []}, "expected patterns of producers and consumers, found none of one of them"),
    ({"producers": 5}, "recipe, width 1, producers: expected patterns on module names, found 5"),
    ({"widen": 5}, "width: expected producers, consumers, keep, .* found"),
    ({"through": "*.norm", "remove": False}, "expected remove with norms in `through`, found remove: false"),
    (
        {"producers": "blocks.{}.q", "consumers": "blocks.{}.down", "keep": 0.5},
        "expected 64 channels as blocks.0.q makes, found 128 in blocks.0.down",
    ),
    (
        {"producers": "blocks.{}.q", "consumers": "blocks.{}.out", "remove": False},
        r"expected channels of blocks.0.out that come from blocks.0.q alone, .*; couple what makes it",
    ),
    (
        {**HEADS, "remove": True},
        r"expected blocks.0.out to see what zeros in place of the channels give, .* set remove: false",
    ),
    (
        {**RESIDUAL, "consumers": ["*.[qkv]", "*.up"]},
        r"expected the model to run without these channels, found RuntimeError: .*; couple all layers",
    ),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=range(len(BROKEN)))
def test_layers_that_are_not_coupled_so_are_refused(change, message):
    model: Any = Transformer()
    batches = token_batches()
    modules = dict(model.named_modules())
    with pytest.raises(stoicc.InputError, match=message):
        stoicc.compress(model, {"width": [{**MLP, **change}]}, batches)
    assert dict(model.named_modules()) == modules
    assert not kernels_of(model)


def test_what_a_rule_lacks_and_two_rules_on_one_layer():
    model: Any = Transformer()
    batches = token_batches()
    with pytest.raises(stoicc.InputError, match="width: expected keep, found none"):
        stoicc.compress(model, {"width": [{"producers": "a", "consumers": "b"}]}, batches)
    with pytest.raises(stoicc.InputError, match=r"width 2: expected rows that no other rule prunes, found blocks.0.up"):
        stoicc.compress(model, {"width": [MLP, MLP]}, batches)
    with pytest.raises(stoicc.InputError, match=r"width: expected calibration batches to score channels with"):
        prune_width(model, [Width.of(MLP)], None, Surgery(model))
    with pytest.raises(stoicc.InputError, match=r"calibration of layer blocks.0.down: expected at least one sample"):
        prune_width(model, [Width.of(MLP)], Calibration(lambda m: None), Surgery(model))
