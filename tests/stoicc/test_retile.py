"""The same matrix in tiles of another shape."""

import pytest
import torch

import stoicc
from stoicc.retile import fixed_tile, retile


@pytest.fixture
def weight():
    values = torch.randn(130, 200).bfloat16()
    values[:64, 64:128] = 0
    values[64:] = stoicc.ops.nm_magnitude(values[64:].clone()).dense()
    return values


@pytest.mark.parametrize("tile", [(32, 64), (64, 128), (128, 32), (16, 16)])
def test_the_matrix_stays_bit_for_bit(weight, tile):
    tiled = stoicc.inspect(weight, tile=(64, 64))
    anew = retile(tiled, tile)
    assert anew.program.tile == tile
    assert torch.equal(anew.to_dense().view(torch.int16), weight.view(torch.int16))
    assert {s.format for s in anew.program.segments} <= {s.format for s in tiled.program.segments} | {"dense"}


def test_smaller_tiles_equal_those_of_the_inspector(weight):
    kernel = stoicc.compile(weight, ["empty", "nv24", "dense"])
    assert retile(kernel, (32, 32)).program == stoicc.inspect(weight, ["empty", "nv24", "dense"], (32, 32)).program


def test_what_stands_beside_the_tiles_is_kept(weight):
    bias, order = torch.randn(130), torch.randperm(130)
    compressed = stoicc.ops.scale(stoicc.ops.permute(weight, order), input_scale=torch.rand(200) + 0.5)
    kernel = stoicc.compile(compressed, ["dense"], bias=bias, activation="relu")
    anew = stoicc.compile(retile(kernel, (32, 128)))
    assert anew.program.beside == kernel.program.beside
    x = torch.randn(3, 200).bfloat16()
    torch.testing.assert_close(anew(x), kernel(x), rtol=2e-2, atol=2e-2)


def test_the_same_tile_is_the_same_weight(weight):
    tiled = stoicc.inspect(stoicc.ops.group_absmax(weight))
    assert retile(tiled, (64, 64)) is tiled


def test_codes_keep_their_tiles(weight):
    tiled = stoicc.inspect(stoicc.ops.group_absmax(weight, 4, 64))
    assert "the codes of int4" in str(fixed_tile(tiled.program))
    with pytest.raises(
        stoicc.InputError, match=r"retile weight: expected tile \(64, 64\), found \(32, 32\); the codes"
    ):
        retile(tiled, (32, 32))
