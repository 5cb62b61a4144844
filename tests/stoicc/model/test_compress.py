"""stoicc.compress: layers become kernels, each calibrated on what the compressed ones before it produce."""

import copy

import pytest
import torch
from torch import Tensor, nn

import stoicc
from stoicc.ops import CompressedWeight, Statistics
from stoicc.ops.lookup import operators
from tests.models import Transformer, kernels_of, record_of, token_batches

PRUNE = {"nm_magnitude": {"n": 2, "m": 4}}
QUANTIZE = {"group_absmax": {"bits": 4, "group_size": 32}}

Seen = list[tuple[Tensor, Statistics]]


@pytest.fixture
def model() -> Transformer:
    return Transformer()


@pytest.fixture
def batches() -> list[Tensor]:
    return token_batches()


@pytest.fixture
def seen(monkeypatch):
    """Weights and statistics that the operator `spy`, which only prunes 2:4, was called with."""
    calls: Seen = []

    def spy(weight: Tensor | CompressedWeight, statistics: Statistics) -> CompressedWeight:
        calls.append((CompressedWeight.of(weight).values(), statistics))
        return stoicc.ops.nm_magnitude(weight)

    monkeypatch.setattr(stoicc.ops, "spy", spy, raising=False)
    monkeypatch.setattr(stoicc.ops, "__all__", [*stoicc.ops.__all__, "spy"])
    operators.cache_clear()
    yield calls
    operators.cache_clear()


def snapshot(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    return dict(model.named_modules()), {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: tuple[dict[str, nn.Module], dict[str, Tensor]]) -> None:
    modules, values = before
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("calibrated", [True, False])
def test_every_layer_is_what_the_operators_make_of_it(model, batches, calibrated):
    dense = copy.deepcopy(model)
    assert stoicc.compress(model, [PRUNE, QUANTIZE], batches if calibrated else None) is model
    kernels = kernels_of(model)
    assert len(kernels) == 13
    for name, kernel in kernels.items():
        layer = dense.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        expected = stoicc.ops.group_absmax(stoicc.ops.nm_magnitude(layer.weight), 4, 32)
        assert torch.equal(kernel.to_dense(), expected.dense())
        layer.weight.data = expected.dense()
        assert torch.equal(kernel.get_buffer("bias"), layer.bias)
    torch.testing.assert_close(model(batches[0]), dense(batches[0]), rtol=1e-4, atol=1e-4)


def test_a_layer_sees_what_the_compressed_layers_before_it_produce(model, batches, seen):
    dense = copy.deepcopy(model)
    stoicc.compress(model, ["spy"], batches)
    reference = stoicc.ops.collect(model, batches, list(kernels_of(model)))
    assert len(seen) == 13
    for weight, statistics in seen:
        name = next(n for n, m in dense.named_modules() if isinstance(m, nn.Linear) and torch.equal(m.weight, weight))
        torch.testing.assert_close(statistics.gram, reference[name].gram, rtol=1e-4, atol=1e-4)
    for first, second in ((0, 1), (1, 2)):  # q, k and v share one object, and o has its own
        assert seen[first][1] is seen[second][1]
    assert seen[2][1] is not seen[3][1]


def test_without_sequential_a_layer_sees_the_dense_model(model, batches, seen):
    reference = stoicc.ops.collect(model, batches)
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    stoicc.compress(model, ["spy"], batches, sequential=False)
    for weight, statistics in seen:
        name = next(name for name, own in weights.items() if torch.equal(own, weight))
        torch.testing.assert_close(statistics.gram, reference[name].gram)


def test_a_run_for_a_stage_ends_at_the_stage(model, batches):
    calls = {"blocks.0.up": 0, "head": 0}
    for name in calls:

        def count(module, args, name=name):
            calls[name] += 1

        model.get_submodule(name.replace(".up", ".norm2")).register_forward_pre_hook(count)
    stoicc.compress(model, {"rules": [{"layers": "blocks.0.[qko]", "steps": [PRUNE]}]}, batches)
    assert calls == {"blocks.0.up": 4, "head": 4}  # three batches of the survey, one to try the result


def test_the_error_of_a_layer_is_that_of_its_output(model, batches):
    inputs = [model.embedding(ids) for ids in batches]
    x = torch.cat([model.blocks[0].norm(each).flatten(0, 1) for each in inputs]).double()
    weight = model.get_parameter("blocks.0.q.weight").detach().double()
    stoicc.compress(model, [PRUNE], batches)
    lost = x @ (weight - model.blocks[0].q.to_dense().double()).T
    record = record_of(model.blocks[0].q)
    assert record.error == pytest.approx((lost.norm() / (x @ weight.T).norm()).item(), rel=1e-4)
    assert record.steps == ("nm_magnitude(n=2, m=4)",)
    assert record.seconds > 0


def test_rules_choose_layers_and_the_first_that_names_one_takes_it(model, batches):
    recipe = stoicc.Recipe(
        [
            stoicc.Rule("blocks.*", [PRUNE], exclude=["*.v", "*.out"]),
            stoicc.Rule(r"re:blocks\.[0-9]+\.(v|up)", [QUANTIZE], compile={"tile": (32, 32)}),
        ]
    )
    stoicc.compress(model, recipe, batches)
    kernels = kernels_of(model)
    assert {type(module) for name, module in model.named_modules() if name.endswith(("out", "head"))} == {nn.Linear}
    of_rule = {name: record_of(kernel).steps[0].partition("(")[0] for name, kernel in kernels.items()}
    assert {name for name, step in of_rule.items() if step == "group_absmax"} == {"blocks.0.v", "blocks.1.v"}
    assert len(of_rule) == 10
    assert kernels["blocks.0.v"].program.tile == (32, 32)


def test_in_place_false_leaves_the_model(model, batches):
    before = snapshot(model)
    compressed = stoicc.compress(model, [PRUNE], batches, in_place=False)
    assert_unchanged(model, before)
    assert len(kernels_of(compressed)) == 13
    assert compressed.get_parameter("embedding.weight") is not model.embedding.weight


def test_layers_of_one_weight_stay_one(batches):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    model.append(model[0])
    x = torch.randn(5, 64)
    stoicc.compress(model, [PRUNE], [x])
    first, second = kernels_of(model).values()
    assert model[3] is model[0] is first
    assert torch.equal(first.to_dense(), second.to_dense())
    assert not torch.equal(first.get_buffer("bias"), second.get_buffer("bias"))
    assert len(stoicc.report(model).rows) == 2


def test_a_weight_of_an_embedding_is_refused_or_untied(batches):
    model = Transformer(tied=True)
    before = snapshot(model)
    with pytest.raises(stoicc.InputError, match=r"layer head: expected a weight of linear layers alone, found it shar"):
        stoicc.compress(model, [PRUNE], batches)
    assert_unchanged(model, before)
    stoicc.compress(model, {"rules": [{"layers": "head", "steps": [PRUNE]}], "untie": True}, batches)
    assert torch.equal(model.embedding.weight, before[1]["embedding.weight"])
    assert list(kernels_of(model)) == ["head"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of the dense model's own run
@pytest.mark.parametrize("padding", [False, True])
def test_torch_encoders_call_their_kernels(padding):
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    batch: dict[str, Tensor] = {"src": torch.randn(2, 8, 64)}
    if padding:
        batch["src_key_padding_mask"] = torch.arange(8) >= torch.tensor([[8], [5]])
    with torch.no_grad():
        expected = model(**batch)
        compressed = stoicc.compress(model, {"rules": [{"layers": "*", "compile": {"tile": [32, 32]}}]}, [batch])
        assert len(kernels_of(compressed)) == 4
        got = compressed(**batch)
    valid = slice(None) if not padding else ~batch["src_key_padding_mask"]
    torch.testing.assert_close(got[valid], expected[valid], rtol=1e-4, atol=1e-4)


def test_batches_may_be_mappings_tuples_or_a_function_of_the_model(model, batches):
    expected = stoicc.compress(copy.deepcopy(model), [PRUNE], batches)
    for calibration in (
        [{"ids": ids} for ids in batches],
        [(ids,) for ids in batches],
        (ids for ids in batches),
        lambda m: [m(ids) for ids in batches],
    ):
        other = stoicc.compress(copy.deepcopy(model), [PRUNE], calibration)
        errors = [[record_of(kernel).error for kernel in kernels_of(each).values()] for each in (expected, other)]
        assert errors[0] == pytest.approx(errors[1])


def test_training_flags_and_gradients_are_left_alone(model, batches):
    model.train()
    model.blocks[1].eval()
    stoicc.compress(model, {"rules": [{"layers": "*.up", "steps": [PRUNE]}]}, batches)
    assert model.training
    assert model.blocks[0].q.training
    assert not model.blocks[1].norm.training
    model(batches[0]).sum().backward()
    assert model.embedding.weight.grad is not None


def test_dead_channels_are_noted(batches):
    model = nn.Sequential(nn.Linear(64, 64))
    x = torch.randn(9, 64)
    x[:, [3, 17]] = 0
    stoicc.compress(model, [PRUNE], [x])
    assert record_of(model[0]).notes == ("2 of 64 input channels are 0 in every sample",)
    assert "0: 2 of 64 input channels are 0 in every sample" in str(stoicc.report(model))


class Stop(Exception):
    """Raised by a test in the middle of a run."""


BROKEN = [
    ([{"nm_magnitude": {}}, "unknown"], "step 2, operator: expected one of .*, found 'unknown'"),
    ({"rules": [{"layers": "encoder.*"}]}, r"rule 1: expected patterns that name a linear layer, found none for enc"),
    ({"rules": [{"layers": "*"}, {"layers": "*.ups"}]}, r"rule 2: .*found none for \*.ups; the model has blocks.0.q"),
    ([{"group_absmax": {"bits": 9, "group_size": 32}}], r"layer blocks.0.q: ops.group_absmax: expected 2 to 8"),
    ({"rules": [{"layers": "*", "compile": {"pipeline": "nonsense"}}]}, r"layer blocks.0.q: .*nonsense"),
]


@pytest.mark.parametrize(("recipe", "message"), BROKEN, ids=range(len(BROKEN)))
def test_a_recipe_that_cannot_be_used_is_one_sentence(model, batches, recipe, message):
    before = snapshot(model)
    with pytest.raises(stoicc.StoiccError, match=message):
        stoicc.compress(model, recipe, batches)
    assert_unchanged(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_that_is_not_finite_names_its_place(value):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    before = snapshot(model)
    batches = [torch.randn(4, 16) for _ in range(3)]
    batches[2][1, 7] = value
    message = rf"calibration, layer 0, batch 2: expected finite inputs, found {value} at sample 1, channel 7; leave"
    with pytest.raises(stoicc.InputError, match=message):
        stoicc.compress(model, [PRUNE], batches)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.zeros(2, 12, dtype=torch.int64), r"calibration: expected batches or a function of the model, found Ten"),
        ([], r"calibration: expected batches that reach a layer of the recipe, found none"),
        (lambda model: None, r"calibration: expected batches that reach a layer of the recipe, found none"),
    ],
)
def test_calibration_that_is_none_is_one_sentence(model, calibration, message):
    before = snapshot(model)
    with pytest.raises(stoicc.InputError, match=message):
        stoicc.compress(model, [PRUNE], calibration)
    assert_unchanged(model, before)


def test_a_layer_that_no_batch_calls_has_no_statistics(model, batches, seen):
    model.unused = nn.Linear(64, 64)
    before = snapshot(model)
    with pytest.raises(stoicc.InputError, match=r"layer unused: operator spy: expected statistics of the layer's inp"):
        stoicc.compress(model, ["spy"], batches)
    assert_unchanged(model, before)
    stoicc.compress(model, [PRUNE], batches)
    assert record_of(model.unused).error is None


def test_a_weight_that_is_not_finite_is_named(model, batches):
    with torch.no_grad():
        model.blocks[1].down.weight[3, 5] = float("nan")
    with pytest.raises(stoicc.InputError, match=r"layer blocks.1.down: weight: expected finite .* row 3, column 5"):
        stoicc.compress(model, [PRUNE])
    assert not kernels_of(model)


def test_a_stop_in_the_middle_leaves_the_model(model, batches):
    before = snapshot(model)
    calls = 0

    def stop(module, args):
        nonlocal calls
        calls += 1
        if calls == 20:
            raise Stop

    handle = model.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        stoicc.compress(model, [PRUNE], batches)
    handle.remove()
    assert calls == 20
    assert_unchanged(model, before)


class Reads(nn.Module):
    """A model that multiplies by a layer's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) @ self.second.weight


def test_a_model_that_reads_weights_is_left_as_it_was():
    model = Reads()
    before = snapshot(model)
    with pytest.raises(stoicc.InputError, match=r"compressed model: expected it to run as before, found AttributeEr"):
        stoicc.compress(model, [PRUNE], [torch.randn(3, 16)])
    assert_unchanged(model, before)


def test_models_that_have_nothing_to_compress():
    for model, message in (
        (nn.ReLU(), "model ReLU: expected linear layers inside, found none"),
        (nn.Linear(4, 4), "found a single one; use stoicc.compile"),
        (torch.zeros(4, 4), "compress: expected a torch.nn.Module, found Tensor"),
    ):
        with pytest.raises(stoicc.InputError, match=message):
            stoicc.compress(model, [PRUNE])  # type: ignore[arg-type]


def test_the_progress_bar_is_asked_for(model, capsys):
    stoicc.compress(model, [PRUNE], progress=True)
    shown = capsys.readouterr().err
    assert "compressed" in shown
    assert "13/13" in shown
    stoicc.compress(Transformer(), [PRUNE])
    assert capsys.readouterr().err == ""
