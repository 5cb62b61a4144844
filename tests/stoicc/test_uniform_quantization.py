"""absmax and slim_quant: one scale for a tensor, and the clip that loses least."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stoicc
from stoicc.ops.graph import Quantize
from stoicc.ops.lowering import lower
from stoicc.ops.slim_quant import Density, best_clip
from stoicc.ops.statistics import Statistics
from tests.survives import assert_survives

SHAPES = {
    "normal": lambda shape: torch.randn(shape),
    "uniform": lambda shape: torch.rand(shape) - 0.5,
    "heavy": lambda shape: torch.randn(shape) / torch.rand(shape).clamp_min(1e-3),
    "two scales": lambda shape: torch.randn(shape) * torch.where(torch.rand(shape) < 0.03, 20.0, 1.0),
}


def squared_errors(weight, clips, bits):
    """||W - Q(W)||^2 in float64 for each clip, by the definition."""
    top = 2 ** (bits - 1) - 1
    steps, flat = clips.double()[:, None] / top, weight.double().flatten()
    return ((flat / steps).round_().clamp_(-top, top).mul_(steps) - flat).square_().sum(1)


def node_of(compressed):
    *_, (_, node, _) = compressed.nodes()
    assert isinstance(node, Quantize)
    return node


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", SHAPES)
def test_the_clip_is_within_one_percent_of_a_sweep(kind, bits):
    weight = SHAPES[kind]((64, 96))
    sweep = torch.linspace(1e-3, 1, 400, dtype=torch.float64) ** 2 * weight.abs().max().item()
    best = squared_errors(weight, sweep, bits).min()
    found = stoicc.ops.slim_quant(weight, bits=bits)
    error = (found.dense().double() - weight.double()).square().sum().item()
    assert error <= 1.01 * best
    density = Density.of(weight, torch.ones_like(weight, dtype=torch.bool))
    clips = torch.tensor([best_clip([(density, 1.0)], bits)[0]]), sweep
    assert density.error(clips[0], bits).item() <= 1.01 * density.error(clips[1], bits).min().item()


@given(st.integers(2, 8), st.floats(0.05, 1.5))
def test_e_of_alpha_is_the_error_that_weights_have(bits, share):
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(bits))
    clip = share * weight.abs().max().flatten()
    density = Density.of(weight, torch.ones_like(weight, dtype=torch.bool))
    torch.testing.assert_close(density.error(clip, bits), squared_errors(weight, clip, bits), rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_slim_quant_beats_absmax_where_there_are_outliers(dtype):
    weight = torch.randn(64, 128)
    weight[3, 5] = 12.0
    weight = weight.to(dtype)
    errors = [
        (compressed.dense().double() - weight.double()).norm()
        for compressed in (stoicc.ops.slim_quant(weight), stoicc.ops.absmax(weight))
    ]
    assert errors[0] < 0.4 * errors[1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_absmax_by_the_definition(bits, per):
    weight = torch.randn(9, 70)
    top = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(1, keepdim=True) if per == "row" else weight.abs().max()) / top
    expected = (weight / scale).round().clamp(-top, top) * scale
    torch.testing.assert_close(stoicc.ops.absmax(weight, bits, per).dense(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_zero_points_by_the_definition(bits, per):
    weight = torch.rand(9, 70) * 5 - 1  # from about -1 to about 4
    weight[0] = weight[0].abs()  # a row of one sign: its range begins at 0
    axes = 1 if per == "row" else (0, 1)
    low, high = weight.amin(axes, keepdim=True).clamp_max(0), weight.amax(axes, keepdim=True).clamp_min(0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    expected = ((weight / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale
    found = stoicc.ops.absmax(weight, bits, per, zero_points=True)
    torch.testing.assert_close(found.dense(), expected, rtol=1e-5, atol=1e-6)
    assert node_of(found).codes.max() == 2**bits - 1
    assert_survives(found, f"int{bits}<group_size=0, zero_points=true>")


@pytest.mark.parametrize("zero_points", [False, True])
def test_codes_of_other_widths_are_held_in_the_next_wider_format(zero_points):
    compressed = stoicc.ops.group_absmax(torch.randn(100, 200), 5, 64, zero_points)
    assert_survives(compressed, f"int8{'<zero_points=true>' * zero_points}")
    assert "5-bit codes: held as 8-bit codes, no format has 5" in stoicc.inspect(compressed).lowering


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_scale_survives_lowering(dtype, bits):
    weight = torch.randn(100, 200).to(dtype)
    for compressed in (stoicc.ops.slim_quant(weight, bits=bits), stoicc.ops.absmax(weight, bits)):
        node = node_of(compressed)
        assert node.scales.unique().numel() == 1
        assert (node.codes.int() - 2 ** (bits - 1)).abs().max() == 2 ** (bits - 1) - 1
        assert_survives(compressed, f"int{bits}<group_size=0>")


def test_pruned_weights_stay_zero_and_take_no_part_in_the_density():
    weight = torch.randn(64, 128)
    pruned = stoicc.ops.nm_magnitude(weight)
    found = stoicc.ops.slim_quant(pruned)
    assert not found.dense()[pruned.dense() == 0].any()
    assert_survives(found, "int4_nv24<group_size=0>")
    kept = pruned.dense()[pruned.dense() != 0].view(64, 64)
    assert node_of(found).scales[0] == node_of(stoicc.ops.slim_quant(kept)).scales[0]


def test_where_leaves_other_tiles_alone():
    weight = torch.randn(128, 128)
    weight[:64, :64] *= 100
    where = torch.tensor([[False, True], [True, True]])
    for quantize in (stoicc.ops.slim_quant, stoicc.ops.absmax):
        found = quantize(weight, where=where)
        assert torch.equal(found.dense()[:64, :64], weight[:64, :64])
        assert node_of(found).scales[0] < 1
        assert_survives(found, "int4<group_size=0>", "dense")


@pytest.mark.parametrize("weight", [torch.zeros(16, 32), torch.full((16, 32), 3e38), torch.full((16, 32), 1e-45)])
def test_extremes_of_the_range(weight):
    for compressed in (stoicc.ops.slim_quant(weight), stoicc.ops.absmax(weight)):
        values = compressed.dense()
        assert values.isfinite().all()
        assert not values[weight == 0].any()


def protected_case():
    """Two channels of large inputs and small weights, as where a norm feeds a layer."""
    weight = torch.randn(64, 200)
    weight[:, [17, 90]] /= 4
    x = torch.randn(300, 200)
    x[:, [17, 90]] *= 30
    return weight, x


def test_the_activation_aware_variant_protects_what_x_makes_large():
    weight, x = protected_case()
    plain, aware = stoicc.ops.slim_quant(weight), stoicc.ops.slim_quant(weight, Statistics.of(x), activation_aware=True)
    state = lower(aware)
    assert state.input_scale is not None
    assert (state.input_scale == 0.25).nonzero().flatten().tolist() == [17, 90]
    torch.testing.assert_close(state.values[:, 17] / 4, aware.dense()[:, 17])
    errors = [(x @ (compressed.dense() - weight).T).norm() for compressed in (aware, plain)]
    assert errors[0] < 0.6 * errors[1]
    assert_survives(aware, "int4<group_size=0>")


def test_the_activation_aware_variant_counts_in_the_order_of_the_source():
    weight, x = protected_case()
    columns = torch.randperm(200)
    scaled = stoicc.ops.scale(stoicc.ops.permute(weight, columns=columns), torch.rand(200) + 0.5)
    before = lower(scaled).input_scale
    after = lower(stoicc.ops.slim_quant(scaled, Statistics.of(x), activation_aware=True)).input_scale
    assert before is not None
    assert after is not None
    assert (after / before < 0.9).nonzero().flatten().tolist() == [17, 90]


def with_nan(x):
    statistics = Statistics.of(x)
    statistics.square[7] = float("nan")
    return statistics


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, x: stoicc.ops.absmax(w, 1), r"ops.absmax: expected 2 to 8 bits, found 1"),
        (lambda w, x: stoicc.ops.absmax(w, per="column"), r"expected per 'tensor' or 'row', found 'column'"),
        (lambda w, x: stoicc.ops.slim_quant(w, bits=9), r"ops.slim_quant: expected 2 to 8 bits, found 9"),
        (lambda w, x: stoicc.ops.slim_quant(w, where=torch.ones(2, 2)), r"slim_quant, where: expected a bool mask"),
        (lambda w, x: stoicc.ops.slim_quant(w, activation_aware=True), r"expected statistics with activation_aware"),
        (
            lambda w, x: stoicc.ops.slim_quant(w, x, activation_aware=True),
            r"ops.slim_quant: expected Statistics, found Tensor; Statistics.of\(x\) makes them",
        ),
        (
            lambda w, x: stoicc.ops.slim_quant(w, Statistics.of(x[:, 1:]), activation_aware=True),
            r"expected statistics of the weight's 8 input channels, found 7; collect them on this layer",
        ),
        (
            lambda w, x: stoicc.ops.slim_quant(w, with_nan(x), activation_aware=True),
            r"expected finite statistics, found sums of nan at input channel 7; leave out",
        ),
        (lambda w, x: stoicc.ops.slim_quant(w, share=0.0), r"expected 0 < share <= 1 and a positive boost, found 0.0"),
        (
            lambda w, x: stoicc.ops.slim_quant(stoicc.ops.absmax(w), Statistics.of(x), activation_aware=True),
            r"expected a weight that is not quantized yet, found codes; quantize once",
        ),
    ],
)
def test_misuse_is_one_clear_sentence(call, message):
    with pytest.raises(stoicc.InputError, match=message):
        call(torch.randn(8, 8), torch.randn(16, 8))
