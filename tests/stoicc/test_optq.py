"""OPTQ: its sweep equals a naive one, and its codes lose less of the output than rounding does."""

import pytest
import torch

import stoicc
from stoicc.ops import Statistics
from stoicc.ops.graph import Quantize
from tests.stoicc.reference_ops import output_error, problem
from tests.survives import assert_survives


def grid(group, bits, zero_points):
    """Scale in float32 and zero point of each row of a group, by the definition."""
    if not zero_points:
        return (group.abs().amax(1) / (2 ** (bits - 1) - 1)).float(), torch.full((len(group),), 2.0 ** (bits - 1))
    low, high = group.amin(1).clamp_max(0), group.amax(1).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).float()
    return scale, (-low / scale).round().float()


def naive(weight, hessian, order, bits, group_size, zero_points, static):
    """OPTQ by its definition, in float64: H^-1 of the columns still to come is computed anew for each."""
    values, rounded = weight.double().clone(), torch.empty_like(weight)
    codes, grids = torch.empty(weight.shape, dtype=torch.uint8), {}
    for step, column in enumerate(order.tolist()):
        rest = order[step:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        group = column // group_size
        if group not in grids:
            source = weight.double() if static else values
            grids[group] = grid(source[:, group * group_size : (group + 1) * group_size], bits, zero_points)
        scale, zero = grids[group]
        codes[:, column] = code = ((values[:, column] / scale).round() + zero).clamp(int(not zero_points), 2**bits - 1)
        rounded[:, column] = (code.float() - zero) * scale
        error = (values[:, column] - rounded[:, column]) / inverse[0, 0]
        values[:, rest] -= error[:, None] * inverse[0]
    return codes, rounded


def node_of(compressed):
    *_, (_, node, _) = compressed.nodes()
    assert isinstance(node, Quantize)
    return node


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, 100), (2, 150), (8, 60)])
def test_it_is_the_naive_one(bits, group_size, zero_points, activation_order):
    weight, statistics = problem(6, 150)
    found = stoicc.ops.optq(weight, statistics, bits, group_size, zero_points, activation_order, clip=False)
    order = statistics.square.argsort(descending=True) if activation_order else torch.arange(150)
    hessian = statistics.hessian(0.01)
    codes, values = naive(weight, hessian, order, bits, group_size, zero_points, activation_order)
    assert (node_of(found).codes == codes).float().mean() > 0.995  # a weight halfway between two codes may go elsewhere
    if torch.equal(node_of(found).codes, codes):
        torch.testing.assert_close(found.dense(), values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
def test_it_loses_less_of_the_output_than_rounding(bits, zero_points):
    weight, statistics = problem(64, 256, samples=800, dtype=torch.float32)
    found = stoicc.ops.optq(weight, statistics, bits, 64, zero_points)
    plain = stoicc.ops.group_absmax(weight, bits, 64, zero_points)
    errors = [output_error(weight, each.dense(), statistics) for each in (found, plain)]
    assert errors[0] < 0.6 * errors[1]


def test_clipping_and_order_help():
    weight, statistics = problem(64, 256, samples=800, dtype=torch.float32)
    errors = [
        output_error(weight, stoicc.ops.optq(weight, statistics, 3, 64, **options).dense(), statistics)
        for options in ({"activation_order": True}, {}, {"clip": False})
    ]
    assert errors == sorted(errors)


def test_in_activation_order_it_does_not_matter_how_columns_stand():
    weight, statistics = problem(6, 64)
    columns = torch.randperm(64)
    found = stoicc.ops.optq(weight, statistics, 3, 0, activation_order=True)
    moved = stoicc.ops.optq(weight[:, columns], statistics.select(columns), 3, 0, activation_order=True)
    assert torch.equal(moved.dense(), found.dense()[:, columns])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_codes_keep_to_their_levels(bits):
    weight, statistics = problem(16, 128, dtype=torch.float32)
    codes = node_of(stoicc.ops.optq(weight, statistics, bits)).codes.int() - 2 ** (bits - 1)
    assert codes.abs().max() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("activation_order", [False, True])
def test_pruned_weights_stay_exactly_zero_and_others_answer(activation_order):
    weight, statistics = problem(64, 256, samples=800, dtype=torch.float32)
    pruned = stoicc.ops.wanda(weight, statistics, n=2, m=4)
    found = stoicc.ops.optq(pruned, statistics, zero_points=True, activation_order=activation_order)
    assert not found.dense()[pruned.dense() == 0].any()
    found = stoicc.ops.optq(pruned, statistics, activation_order=activation_order)
    rounded = stoicc.ops.group_absmax(pruned, 4, 128)
    errors = [output_error(pruned.dense(), each.dense(), statistics) for each in (found, rounded)]
    assert errors[0] < 0.8 * errors[1]
    assert_survives(found, "int4_nv24<group_size=128>")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "formats"),
    [
        ({}, ("int4<group_size=128>",)),
        ({"bits": 8, "group_size": 0}, ("int8<group_size=0>",)),
        ({"bits": 3, "activation_order": True}, ()),
        ({"bits": 2, "group_size": 32, "zero_points": True}, ()),
        ({"group_size": 16, "zero_points": True}, ("int4<group_size=16, zero_points=true>",)),
    ],
    ids=str,
)
def test_results_survive_lowering(dtype, options, formats):
    weight, statistics = problem(70, 200, samples=400, dtype=torch.float32)
    assert_survives(stoicc.ops.optq(weight.to(dtype), statistics, **options), *formats)


def test_statistics_follow_permutations_and_scales():
    weight, statistics = problem(6, 64)
    columns, scale = torch.randperm(64), 2.0 ** torch.randint(-2, 3, (64,))
    stored = stoicc.ops.scale(stoicc.ops.permute(weight, columns=columns), scale)
    plain = stoicc.ops.optq((weight / scale)[:, columns], statistics.scaled(scale).select(columns), group_size=16)
    assert torch.equal(stoicc.ops.optq(stored, statistics, group_size=16).values(), plain.values())


def test_dead_channels_are_rounded_and_move_nothing():
    weight, x = torch.randn(6, 64), torch.randn(100, 64)
    x[:, 5] = 0
    found = stoicc.ops.optq(weight, Statistics.of(x), group_size=0, clip=False)
    node = node_of(found)
    scale = weight.abs().amax(1) / 7
    assert torch.equal(node.codes[:, 5].float() - 8, (weight[:, 5] / scale).round())
    assert "1 of 64 input channels dead" in str(found)
    assert stoicc.ops.optq(weight, Statistics.of(torch.zeros(3, 64))).dense().isfinite().all()


@pytest.mark.parametrize("weight", [torch.zeros(16, 32), torch.full((16, 32), 3e38), torch.full((16, 32), 1e-45)])
def test_extremes_of_the_range(weight):
    for zero_points in (False, True):
        found = stoicc.ops.optq(weight, STATISTICS, zero_points=zero_points).dense()
        assert found.isfinite().all()
        assert not found[weight == 0].any()


STATISTICS = Statistics.of(torch.randn(40, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, r"ops.optq: expected 2 to 8 bits, found 9"),
        ({"group_size": -4}, r"ops.optq: expected group_size >= 0 \(0 is the whole row\), found -4"),
        ({"damping": -1}, r"ops.optq: expected a finite damping >= 0"),
        ({"statistics": Statistics.of(torch.randn(9, 32), gram=False)}, r"ops.optq: .* collect with gram=True"),
        ({"statistics": Statistics.of(torch.randn(9, 33))}, r"ops.optq: .* the weight's 32 input channels, found 33"),
        ({"weight": stoicc.ops.group_absmax(torch.randn(4, 32))}, r"ops.optq: .* not quantized yet, found codes"),
    ],
)
def test_misuse_is_one_clear_sentence(options, message):
    with pytest.raises(stoicc.InputError, match=message):
        stoicc.ops.optq(**{"weight": torch.randn(4, 32), "statistics": STATISTICS, **options})
