"""The inspector: lossless by default, cheapest format that holds each tile, maps, refusals."""

from typing import ClassVar

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

import stoicc
from stoicc.codes import held_codes
from stoicc.formats.dense import Dense
from stoicc.ir.dtypes import TORCH_DTYPES, bits
from stoicc.ir.registry import REGISTRY, find_format
from stoicc.ir.types import Module
from stoicc.ir.verify import verify, verify_pools
from stoicc.ops.graph import Prune
from stoicc.ops.lowering import lower


def formats_of(tiled):
    return {segment.format: segment.count for segment in tiled.program.segments}


@st.composite
def matrices(draw):
    """A matrix of mixed tiles: zeros, 2:4, ternary, a few negative zeros, dense."""
    rows, columns = draw(st.sampled_from([1, 7, 16, 31, 64, 97])), draw(st.sampled_from([1, 13, 16, 33, 64, 131]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    weight = torch.randn(rows, columns, generator=generator)
    for row in range(0, rows, 16):
        for column in range(0, columns, 16):
            block = weight[row : row + 16, column : column + 16]
            match draw(st.sampled_from(["zero", "2:4", "ternary", "negative zero", "dense"])):
                case "zero":
                    block.zero_()
                case "2:4":
                    block[:, ::2] = 0
                case "ternary":
                    block.copy_(block.sign() * 0.5)
                case "negative zero":
                    block.fill_(-0.0)
    return weight.to(TORCH_DTYPES[draw(st.sampled_from(["f32", "f16", "bf16"]))])


@given(matrices(), st.sampled_from([(16, 16), (32, 16), (64, 64)]))
def test_compiled_matrix_is_the_given_one_bit_for_bit(weight, tile):
    tiled = stoicc.inspect(weight, tile=tile)
    verify(Module(tiled.program))
    verify_pools(tiled.program, tiled.pools)
    assert torch.equal(bits(tiled.to_dense()), bits(weight))


def test_cheapest_format_that_holds_the_tile():
    weight = torch.randn(64, 64 * 5)
    weight[:, :64] = 0
    weight[:, 64:128] = stoicc.ops.nm_magnitude(weight[:, 64:128]).dense()
    weight[:, 128:192] = weight[:, 128:192].sign()
    weight[:, 192:256] = stoicc.ops.nm_magnitude(weight[:, 192:256]).dense().sign() * torch.randint(1, 8, (64, 64))
    tiled = stoicc.inspect(weight)
    assert [tiled.program.segments[i].format for i in tiled.program.tile_map] == [
        "empty",
        "nv24",
        "int2",
        "int4_nv24",
        "dense",
    ]


def test_negative_zero_is_a_weight():
    weight = torch.zeros(16, 16)
    weight[3, 5] = -0.0
    assert "empty" not in formats_of(stoicc.inspect(weight, tile=(16, 16)))
    crowded = torch.zeros(16, 16)
    crowded[0, :3] = torch.tensor([1.5, -0.0, 2.7])
    assert formats_of(stoicc.inspect(crowded, ["empty", "nv24", "dense"], (16, 16))) == {"dense": 1}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("group_size", [16, 64, 128, 0])
@pytest.mark.parametrize("bits_", [4, 8])
def test_operators_survive_lowering_bit_for_bit(dtype, zero_points, group_size, bits_):
    weight = torch.randn(130, 333, generator=torch.Generator().manual_seed(1)).to(TORCH_DTYPES[dtype])
    for source in (weight, stoicc.ops.nm_magnitude(weight)):
        compressed = stoicc.ops.group_absmax(source, bits_, group_size, zero_points)
        tiled = stoicc.inspect(compressed)
        assert torch.equal(bits(tiled.to_dense()), bits(compressed.dense()))
        held = find_one(tiled)
        assert held.startswith("int4_nv24" if bits_ == 4 and source is not weight else f"int{bits_}")


def find_one(tiled):
    (only,) = formats_of(tiled)
    return only


def test_quantized_tiles_among_others():
    weight = torch.randn(200, 300)
    where = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) < 0.5
    compressed = stoicc.ops.group_absmax(weight, 4, 128, where=where)
    tiled = stoicc.inspect(compressed)
    assert formats_of(tiled) == {"int4<group_size=128>": int(where.sum()), "dense": int((~where).sum())}
    assert torch.equal(tiled.to_dense(), compressed.dense())


def test_tile_map_is_exact_or_refused():
    weight = torch.randn(128, 128)
    weight[:64, :64] = stoicc.ops.nm_magnitude(weight[:64, :64]).dense()
    tiled = stoicc.inspect(weight, tile_map=[["nv24", "dense"], ["dense", "dense"]])
    assert formats_of(tiled) == {"nv24": 1, "dense": 3}
    assert torch.equal(tiled.to_dense(), weight)
    weight[76, 64 + 4 : 64 + 8] = 1.0
    with pytest.raises(
        stoicc.FormatError,
        match=r"format nv24, tile \(1, 1\): expected at most 2 non-zeros in 4, found \d at row \d+, columns \d+-\d+",
    ):
        stoicc.inspect(weight, tile_map=[["nv24", "dense"], ["dense", "nv24"]])


def test_tile_map_may_approximate_on_request():
    weight = torch.randn(128, 256)
    kinds = [["nv24", "int4<group_size=128>", "int4<group_size=128>", "empty"], ["dense", "int8", "int4_nv24", "dense"]]
    tiled = stoicc.inspect(weight, tile_map=kinds, approximate=True)
    back = tiled.to_dense()
    assert [tiled.program.segments[i].format for i in tiled.program.tile_map] == [*kinds[0], *kinds[1]]
    assert torch.equal(back[:64, :64], stoicc.ops.nm_magnitude(weight[:64, :64]).dense())
    assert torch.equal(back[64:, :64], weight[64:, :64])
    assert not back[:64, 192:].any()
    error = (back[:64, 64:192] - weight[:64, 64:192]).norm() / weight[:64, 64:192].norm()
    assert 0.05 < error < 0.2


@pytest.mark.parametrize("make", [np.array, scipy.sparse.csr_matrix, scipy.sparse.csc_array, torch.from_numpy])
def test_weights_of_other_libraries(make):
    values = np.zeros((40, 50), dtype=np.float32)
    values[3, 4:20] = 1.5
    assert torch.equal(stoicc.inspect(make(values)).to_dense(), torch.from_numpy(values))


def test_a_transposed_view_and_a_sparse_tensor():
    weight = torch.randn(50, 40)
    assert torch.equal(stoicc.inspect(weight.T).to_dense(), weight.T)
    assert torch.equal(stoicc.inspect(weight.to_sparse()).to_dense(), weight)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.randn(4), {}, r"weight: expected a matrix \[out, in\], found 1-D of shape \[4\]"),
        (torch.randn(2, 3, 4), {}, r"found 3-D of shape \[2, 3, 4\]"),
        (torch.zeros(0, 4), {}, r"expected at least one row and column, found shape \[0, 4\]"),
        (torch.ones(4, 4).long(), {}, r"expected dtype f32, f16, bf16, found torch.int64"),
        (torch.ones(4, 4).double(), {}, r"expected dtype f32, f16, bf16, found torch.float64"),
        (np.ones((4, 4)), {}, r"expected dtype f32, f16, bf16, found float64"),
        ([[1.0]], {}, r"expected a torch tensor, numpy array, scipy sparse matrix or operator's result, found list"),
        (torch.tensor([[0.0, float("nan")]]), {}, r"expected finite values, found nan at row 0, column 1"),
        (
            torch.full((200, 3), 1.0).index_fill(0, torch.tensor([130]), float("-inf")),
            {},
            r"found -inf at row 130, column 0",
        ),
        (torch.ones(4, 4), {"tile": (48, 64)}, r"tile: expected two of 16, 32, 64, 128, 256, found \(48, 64\)"),
        (torch.ones(4, 4), {"formats": []}, r"expected at least one format, found none"),
        (torch.randn(4, 4), {"formats": ["nv24"]}, r"format nv24, tile \(0, 0\): expected at most 2 non-zeros in 4"),
        (torch.randn(4, 4), {"formats": ["empty"]}, r"format empty, tile \(0, 0\): expected only zeros, found"),
        (
            torch.randn(64, 64),
            {"formats": ["int4"]},
            r"format int4, tile \(0, 0\): expected every weight to be a 4-bit code",
        ),
        (
            torch.ones(4, 4),
            {"tile_map": [["dense", "dense"]]},
            r"tile_map: expected one format for each tile of the grid",
        ),
        (torch.ones(4, 4), {"tile_map": [["denze"]]}, r"format 'denze': .* did you mean dense"),
        (torch.ones(4, 4), {"bias": torch.ones(5)}, r"bias: expected a tensor of \[4\] floats, found \[5\]"),
        (torch.ones(4, 4), {"bias": torch.full((4,), float("nan"))}, r"bias: expected finite values, found nan"),
        (
            torch.ones(4, 4),
            {"activation": "swish"},
            r"activation: expected one of relu, gelu, gelu_tanh, silu, found 'swish'",
        ),
    ],
)
def test_bad_input_is_one_clear_sentence(weight, options, message):
    with pytest.raises(stoicc.StoiccError, match=message):
        stoicc.inspect(weight, **options)


def test_operators_name_their_tile():
    compressed = stoicc.ops.nm_magnitude(torch.randn(64, 64), where=torch.ones(2, 2, dtype=torch.bool), tile=(32, 32))
    assert stoicc.inspect(compressed).program.tile == (32, 32)
    with pytest.raises(
        stoicc.InputError, match=r"tile: expected \(32, 32\), the tile of the operators, found \(64, 64\)"
    ):
        stoicc.inspect(compressed, tile=(64, 64))


def test_scales_of_two_operators_cannot_share_a_group():
    weight = torch.randn(64, 128)
    left = torch.tensor([[True, False]])
    compressed = stoicc.ops.group_absmax(weight, 4, 0, where=left)
    compressed = stoicc.ops.group_absmax(compressed, 4, 0, where=~left)
    tiled = stoicc.inspect(compressed)
    assert formats_of(tiled) == {"int4<group_size=0>": 1, "bitmap": 1}  # codes of 8 are zeros
    assert torch.equal(tiled.to_dense(), compressed.dense())


def test_unstructured_zeros_are_a_bitmap_where_that_is_smaller_and_padding_counts_as_weights():
    weight = torch.randn(150, 200, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert formats_of(stoicc.inspect(weight)) == {"dense": 12}
    zero = torch.rand(150, 200, generator=torch.Generator().manual_seed(6))
    pruned = weight.where(zero > 0.5, 0)
    tiled = stoicc.inspect(stoicc.ops.CompressedWeight.of(weight).then(Prune(zero > 0.5, "by hand")))
    assert formats_of(tiled) == {"bitmap": 12}
    assert torch.equal(bits(tiled.to_dense()), bits(pruned))
    (segment,) = tiled.program.segments
    assert sum(segment.tile_bytes) == 12 * (4096 // 8 + 4 * 4) + 2 * int((pruned != 0).sum())
    assert formats_of(stoicc.inspect(weight.where(zero > 0.03, 0))) == {"dense": 12}
    assert formats_of(stoicc.inspect(stoicc.ops.nm_magnitude(weight))) == {"nv24": 12}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("text", ["int4", "int8", "int4<zero_points=true>", "int8<zero_points=true>", "int4_nv24"])
def test_the_largest_weights_do_not_overflow_their_scale(dtype, text):
    top = torch.finfo(TORCH_DTYPES[dtype]).max
    weight = torch.zeros(64, 64).to(TORCH_DTYPES[dtype])
    weight[:, 0], weight[:, 1] = top, -top
    tiled = stoicc.inspect(weight, tile_map=[[text]], approximate=True)
    assert tiled.to_dense().isfinite().all()
    assert (tiled.to_dense()[:, 0].double() / top > 0.4).all()


@pytest.mark.parametrize(
    ("group_size", "zero_points", "message"),
    [(96, False, "divides the tile's 64 columns"), (48, True, "divides the tile's"), (7, False, "divides the tile's")],
)
def test_groups_that_do_not_meet_the_tile_are_refused(group_size, zero_points, message):
    compressed = stoicc.ops.group_absmax(torch.randn(150, 300), 4, group_size, zero_points)
    with pytest.raises(stoicc.FormatError, match=message):
        stoicc.inspect(compressed)


def test_a_group_as_long_as_the_row_is_the_row():
    compressed = stoicc.ops.group_absmax(torch.randn(150, 300), 4, 300)
    assert find_one(stoicc.inspect(compressed)) == "int4<group_size=0>"


def test_codes_that_no_format_holds_are_said_so():
    lowered = lower(stoicc.ops.group_absmax(torch.randn(64, 64), 5))
    with pytest.raises(stoicc.FormatError, match="expected one that holds 5-bit codes, found none; quantize to 2, 3"):
        held_codes(lowered, [find_format("dense"), find_format("int4")])
    four = stoicc.ops.group_absmax(torch.randn(64, 64), 4)
    with pytest.raises(stoicc.FormatError, match="expected codes of its own kind, found 4-bit codes in groups of 64"):
        stoicc.inspect(four, ["int8"])


def test_floats_go_to_codes_only_where_no_rounding_is_hidden():
    weight = (torch.randint(-3, 4, (64, 1)).float() * torch.ones(1, 256) * 1.37).bfloat16()
    x = torch.rand(3, 256)
    kernel = stoicc.compile(weight, target="cpu")
    expected = x.double() @ weight.double().T
    assert (kernel(x).double() - expected).norm() < 1e-6 * expected.norm()


def test_ties_keep_the_lower_column_in_formats_and_operators_alike():
    weight = torch.randint(-2, 3, (64, 64)).float()
    tiled = stoicc.inspect(weight, tile_map=[["nv24"]], approximate=True)
    assert torch.equal(tiled.to_dense().abs(), stoicc.ops.nm_magnitude(weight).dense().abs())
    ones = stoicc.inspect(torch.ones(64, 64), tile_map=[["nv24"]], approximate=True).to_dense()
    assert torch.equal(ones, torch.tensor([1.0, 1, 0, 0]).repeat(64, 16))


def test_equal_formats_under_two_texts_are_one():
    weight = torch.randn(64, 128)
    tiled = stoicc.inspect(weight, tile_map=[["int4", "int4<group_size=64>"]], approximate=True)
    assert formats_of(tiled) == {"int4": 2}


def test_a_format_that_changes_its_input_is_refused():
    class Careless(Dense):
        name: ClassVar[str] = "careless"

        def encode(self, tiles):
            return {"values": tiles.mul_(2)}

    stoicc.register_format(Careless())
    try:
        with pytest.raises(stoicc.FormatError, match="careless: expected encode to leave its tiles alone"):
            stoicc.inspect(torch.randn(64, 64), ["careless"])
    finally:
        REGISTRY.unregister("careless")


def test_a_format_that_is_not_the_registered_one_is_refused():
    class Double(Dense):
        pass

    with pytest.raises(stoicc.FormatError, match="expected the registered class of that name, found another"):
        stoicc.inspect(torch.randn(64, 64), [Double()])


def test_numpy_arrays_of_other_orders():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    for array in (np.asfortranarray(values), values.astype(">f4"), values[::-1][::-1]):
        assert torch.equal(stoicc.inspect(array).to_dense(), torch.from_numpy(values))
    with pytest.raises(stoicc.InputError, match="found a masked array"):
        stoicc.inspect(np.ma.masked_array(values, values > 3))
