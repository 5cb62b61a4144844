"""Blobs hold what the instructions take: every lane, register and half, against the figures of the PTX ISA."""

import pytest
import torch
from torch import Tensor

from stoicc.codegen.gluon.register_order import BlobLayout, pack, unpack
from stoicc.formats import formats
from stoicc.ir.dtypes import TORCH_DTYPES, bits
from stoicc.ir.fragment import Fragment, Operands, Planes
from stoicc.ir.registry import find_format

TILES = 3
FORMATS = (
    "dense", "nv24", "int8<group_size=64>", "int8<group_size=32, zero_points=true>", "int4<group_size=64>",
    "int4<group_size=32, zero_points=true>", "int4_nv24<group_size=64>", "int4_nv24<group_size=32, zero_points=true>",
)  # fmt: skip


def fragment_of(text: str, tile: tuple[int, int], dtype: str) -> tuple[Fragment, Planes]:
    """A format's fragment, and planes of random tiles that it holds."""
    fmt = find_format(text)
    fragment = fmt.fragment(tile, dtype)
    assert fragment is not None
    tiles = torch.randn(TILES, *tile).to(TORCH_DTYPES[dtype])
    return fragment, fmt.approximate(tiles, torch.arange(TILES)).planes


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("tile", [(64, 64), (128, 64), (64, 128), (128, 256)])
@pytest.mark.parametrize("text", FORMATS)
def test_planes_come_back_bit_for_bit(text: str, tile: tuple[int, int], dtype: str) -> None:
    fragment, planes = fragment_of(text, tile, dtype)
    layout = BlobLayout.of(fragment, tile)
    blobs = pack(fragment.operands(planes, tile), layout)
    assert blobs.dtype == torch.int32
    assert blobs.shape == (TILES, layout.words)
    back = fragment.planes(unpack(blobs, layout, dtype), tile)
    assert back.keys() == planes.keys()
    for name, plane in planes.items():
        assert (back[name].dtype, back[name].shape) == (plane.dtype, plane.shape)
        assert torch.equal(bits(back[name]), bits(plane)), name


def test_a_blob_has_no_bytes_but_the_payload() -> None:
    """bf16 tiles of 64x64: 16, 9, 8, 4 and 3 bits a weight, and 16 a group of 64."""
    for text, per_weight in (("dense", 16), ("nv24", 9), ("int8<group_size=64>", 8.25), ("int4<group_size=64>", 4.25),
                             ("int4_nv24<group_size=64>", 3.25)):  # fmt: skip
        fragment, _ = fragment_of(text, (64, 64), "bf16")
        assert BlobLayout.of(fragment, (64, 64)).words * 32 == per_weight * 64 * 64, text


def words_of(values: Tensor, tile: tuple[int, int], **described: object) -> tuple[Tensor, BlobLayout]:
    """The blob of one tile of operands."""
    width = values.element_size() * 8 if values.dtype == torch.int16 else 4
    sparse = "positions" in described
    layout = BlobLayout.of(Fragment(width, dict, dict, sparse=sparse), tile)  # type: ignore[arg-type]
    return pack(Operands(values[None], **described), layout)[0], layout  # type: ignore[arg-type]


def test_operands_of_16_bits_stand_where_mma_takes_them() -> None:
    """`mma.m16n8k16`: register r of lane 4 g + t holds row g + 8 (r % 2), columns 2 t + 8 (r // 2) and the next."""
    values = torch.arange(64 * 64, dtype=torch.int16).view(64, 64)
    blob, _ = words_of(values, (64, 64))
    words = blob.view(torch.int16).view(4, 4, 32, 4, 2)  # fragment of 16 columns, m-tile, lane, register, half
    for fragment, mtile, lane, register, half in ((0, 0, 0, 0, 0), (3, 2, 13, 1, 1), (1, 3, 31, 2, 0), (2, 1, 6, 3, 1)):
        g, t = lane // 4, lane % 4
        row = 16 * mtile + g + 8 * (register % 2)
        column = 16 * fragment + 2 * t + 8 * (register // 2) + half
        assert words[fragment, mtile, lane, register, half] == values[row, column]


def test_codes_of_4_bits_stand_where_the_docstring_says() -> None:
    """Element h of register r at bit 16 h + 4 r of a lane's word."""
    values = torch.randint(0, 16, (64, 64), dtype=torch.uint8)
    blob, _ = words_of(values, (64, 64))
    words = blob.view(4, 32, 4)  # m-tile, lane, fragment
    for mtile, lane, fragment, register, half in ((0, 0, 0, 0, 0), (2, 13, 3, 1, 1), (3, 31, 1, 2, 0), (1, 6, 2, 3, 1)):
        row = 16 * mtile + lane // 4 + 8 * (register % 2)
        column = 16 * fragment + 2 * (lane % 4) + 8 * (register // 2) + half
        code = int(words[mtile, lane, fragment]) >> (16 * half + 4 * register) & 15
        assert code == values[row, column]


def test_positions_stand_where_mma_sp_takes_them() -> None:
    """Lane 4 g + t: row g below, row g + 8 above, columns 16 t .. 16 t + 15."""
    positions = torch.randint(0, 256, (1, 64, 8), dtype=torch.uint8)
    blob, layout = words_of(torch.zeros(64, 32, dtype=torch.int16), (64, 64), positions=positions)
    words = blob[layout.positions : layout.scales].view(4, 32)
    for mtile, lane in ((0, 0), (1, 7), (3, 30)):
        g, t = lane // 4, lane % 4
        for upper in (0, 1):
            found = int(words[mtile, lane]) >> 16 * upper & 0xFFFF
            low, high = positions[0, 16 * mtile + g + 8 * upper, 2 * t : 2 * t + 2].tolist()
            assert found == low | high << 8


@pytest.mark.parametrize("name", formats())
def test_a_fragment_is_of_16_bit_floats_alone(name: str) -> None:
    assert find_format(name).fragment((64, 64), "f32") is None
