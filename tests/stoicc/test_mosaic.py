"""The sweep over a mosaic: uniform maps are OPTQ and SparseGPT, mixed ones hold what every tile was given."""

import pytest
import torch

import stoicc
from stoicc.ops import Statistics
from tests.stoicc.reference_ops import output_error, problem

FORMATS = ["empty", "int2<zero_points=true>", "int3", "int4_nv24", "int4", "int8", "nv24", "dense"]


@pytest.fixture
def layer(rng):
    weight, statistics = problem(96, 160, dtype=torch.float32)
    return weight.bfloat16(), statistics


def mixed(rows=2, columns=3):
    return [[FORMATS[(3 * i + 2 * j + i * j) % len(FORMATS)] for j in range(columns)] for i in range(rows)]


@pytest.mark.parametrize(("fmt", "bits"), [("int3", 3), ("int4", 4), ("int8", 8)])
def test_one_format_of_codes_is_optq(layer, fmt, bits):
    weight, statistics = layer
    found = stoicc.ops.mosaic(weight, statistics, [[fmt] * 3] * 2).dense()
    assert torch.equal(found, stoicc.ops.optq(weight, statistics, bits, 64).dense())


@pytest.mark.parametrize(("fmt", "bits"), [("nv24", None), ("int4_nv24", 4)])
def test_one_format_of_half_the_weights_is_sparsegpt(layer, fmt, bits):
    weight, statistics = layer
    found = stoicc.ops.mosaic(weight, statistics, [[fmt] * 3] * 2).dense().double()
    joint = stoicc.ops.sparsegpt(weight, statistics, n=2, m=4, bits=bits, group_size=64).dense().double()
    assert abs((found != 0).double().mean() - (joint != 0).double().mean()) < 0.01
    errors = [output_error(weight, each, statistics) for each in (found, joint)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)  # blocks of 64 columns and of 128


def test_every_tile_has_its_format_and_codes_are_carried(layer):
    weight, statistics = layer
    tile_map = mixed()
    found = stoicc.ops.mosaic(weight, statistics, tile_map)
    kernel = stoicc.compile(found, FORMATS, target="reference")
    segments = [segment.format for segment in kernel.program.segments]
    assert [[segments[at] for at in row] for row in kernel.program.map_array()] == tile_map
    assert torch.equal(kernel.to_dense(), found.dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", ["mxfp4", "fp8<group_size=64>", "fp8<kind=e5m2, group_size=32>"])
def test_small_floats_are_swept_and_held(layer, fmt, dtype):
    weight, statistics = layer
    weight = weight.to(dtype) * 0.01
    tile_map = [[fmt, "int8", "dense"], ["empty", fmt, fmt]]
    found = stoicc.ops.mosaic(weight, statistics, tile_map)
    kernel = stoicc.compile(found, ["empty", fmt, "int8", "dense"], target="reference")
    segments = [segment.format for segment in kernel.program.segments]
    assert [[segments[at] for at in row] for row in kernel.program.map_array()] == tile_map
    assert torch.equal(kernel.to_dense(), found.dense())
    swept = stoicc.ops.mosaic(weight, statistics, [[fmt] * 3] * 2).dense()
    alone = stoicc.compile(weight, tile_map=[[fmt] * 3] * 2, approximate=True, target="reference").to_dense()
    assert output_error(weight, swept, statistics) < 0.8 * output_error(weight, alone, statistics)


def test_the_columns_to_come_answer(layer):
    weight, statistics = layer
    tile_map = [["int4_nv24", "int3", "int4"], ["int3", "int4_nv24", "int8"]]
    swept = stoicc.ops.mosaic(weight, statistics, tile_map).dense()
    alone = stoicc.compile(weight, tile_map=tile_map, approximate=True, target="reference").to_dense()
    assert output_error(weight, swept, statistics) < 0.5 * output_error(weight, alone, statistics)


def test_what_was_pruned_stays_pruned(layer):
    weight, statistics = layer
    pruned = stoicc.ops.magnitude(weight, 0.3)
    found = stoicc.ops.mosaic(pruned, statistics, mixed()).dense()
    assert not found[pruned.dense() == 0].any()


def test_a_permuted_weight_is_swept_in_its_own_order(layer):
    weight, statistics = layer
    order = torch.randperm(160)
    found = stoicc.ops.mosaic(stoicc.ops.permute(weight, columns=order), statistics, [["int4"] * 3] * 2).dense()
    plain = stoicc.ops.mosaic(weight[:, order].contiguous(), statistics.select(order), [["int4"] * 3] * 2).dense()
    assert torch.equal(found[:, order], plain)


def test_formats_whose_weights_depend_on_each_other_are_refused(layer):
    weight, statistics = layer
    with pytest.raises(
        stoicc.InputError, match=r"ops\.mosaic: expected formats .* one by one, found nvfp4 .* leave it"
    ):
        stoicc.ops.mosaic(weight, statistics, [["nvfp4"] * 3] * 2)
    with pytest.raises(stoicc.InputError, match="found int4<group_size=128> on tiles"):
        stoicc.ops.mosaic(weight, statistics, [["int4<group_size=128>"] * 3] * 2)


def test_a_gram_matrix_is_needed(layer):
    weight, statistics = layer
    diagonal = Statistics(10, statistics.total, statistics.absolute, statistics.square)
    with pytest.raises(stoicc.InputError, match=r"ops\.mosaic: expected statistics with a gram matrix"):
        stoicc.ops.mosaic(weight, diagonal, mixed())
