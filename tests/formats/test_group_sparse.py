"""Groups of codes of which some are dropped: where they stand, and products that leave them out."""

import re

import pytest
import torch

import stoicc
from stoicc.formats.group_sparse import GroupSparse
from stoicc.ir.dtypes import bits
from stoicc.ir.errors import FormatError
from tests.codegen.cpu.mosaics import need
from tests.products import assert_product

EACH = torch.arange(2)
GROUPS = ["group_sparse", "group_sparse<group_size=8, zero_points=true>"]


@pytest.mark.parametrize("formats", [GROUPS, [*GROUPS, "dense", "empty"]], ids=["alone", "beside dense"])
def test_small_groups_on_matrix_units(formats, monkeypatch):
    need("amx", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 64 * len(formats), generator=generator).bfloat16()
    tiled = stoicc.inspect(weight, tile=(64, 64), tile_map=[formats] * 2, approximate=True)
    kernel = stoicc.compile(tiled, target="cpu")
    held = kernel.to_dense()
    for batch in (1, 7, 8, 17, 100):
        x = torch.randn(batch, weight.shape[1], generator=generator).bfloat16()
        assert_product(kernel(x), x, held, 4e-3)
    assert "LEAST_PAIRS = 8" in kernel.source  # few entries do not repay scaling a strip first


@pytest.mark.parametrize("zeros", [False, True])
def test_groups_by_hand(zeros):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-7, 8, (64, 64), generator=generator).float()
    weight[:, 0::16], weight[:, 1::16] = -7, 8 if zeros else 7
    kept = torch.rand(64, 4, generator=generator) < 0.4
    weight = weight.where(kept.repeat_interleave(16, 1), 0)
    fmt = GroupSparse(16, zeros)
    planes = fmt.encode(weight[None])
    assert torch.equal(bits(fmt.decode(planes, (64, 64), "f32")), bits(weight[None]))
    at = 0
    for group in range(4):
        rows = [row for row in range(64) if kept[row, group]]
        masks = [int(mask) & 0xFFFF for mask in planes["masks"][0, group]]
        assert [row for row in range(64) if masks[row // 16] >> row % 16 & 1] == rows
        words = planes["codes"][2 * at : 2 * (at + len(rows))].view(2, -1)
        for place, row in enumerate(rows):
            scale, zero = planes["scales"][at + place], int(planes["zeros"][at + place]) if zeros else 8
            for k in range(16):
                code = int(words[k // 8, place]) >> (k % 4 * 8 + k % 8 // 4 * 4) & 15
                assert (code - zero) * scale == weight[row, 16 * group + k]
        at += len(rows)
    assert len(planes["scales"]) == at == int(planes["scales_ptr"][-1])
    assert fmt.tile_bytes(weight[None], "f32").item() == at * (8 + 4 + zeros) + 4 * 4 * 2


def test_groups_with_the_most_energy_are_kept():
    tiles = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(4))
    for share in (0.25, 0.5):
        planes = GroupSparse(share=share).approximate(tiles, EACH).planes
        assert planes["scales_ptr"].diff().tolist() == [256 * share] * 2
    weight = torch.zeros(2, 64)
    weight[:, 16:32] = 1
    planes = GroupSparse(share=0.25).approximate(tiles, EACH, weight).planes
    assert torch.equal(planes["masks"][:, 1], torch.full((2, 4), -1, dtype=torch.int16))


def test_an_operators_codes_in_groups():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    weight[:, 16:32] = 0
    compressed = stoicc.ops.group_absmax(weight, 4, 16)
    kernel = stoicc.compile(compressed, ["group_sparse"], target="cpu")
    assert torch.equal(bits(kernel.to_dense()), bits(compressed.dense()))
    assert "group_sparse" not in str(stoicc.inspect(compressed).program)


def uneven(rows, columns, size, generator):
    """A weight of which groups are dropped, as many of each column as there may be: none to all of a tile's rows."""
    share = torch.rand(-(-rows // 64), columns // size, generator=generator)
    share[:, ::5], share[:, 1::5] = 0, 1
    kept = torch.rand(rows, columns // size, generator=generator) < share.repeat_interleave(64, 0)[:rows]
    return torch.randn(rows, columns, generator=generator).where(kept.repeat_interleave(size, 1), 0)


@pytest.mark.parametrize("isa", ["avx512bf16", "vnni", "avx2"])
@pytest.mark.parametrize(("size", "zeros"), [(8, True), (16, False), (64, True)])
def test_columns_of_groups_that_few_rows_or_none_keep(isa, size, zeros, monkeypatch):
    need(isa, monkeypatch)
    fmt = f"group_sparse<group_size={size}, share=1.0{', zero_points=true' * zeros}>"
    for dtype in (torch.bfloat16, torch.float32):
        weight = uneven(100, 256, size, torch.Generator().manual_seed(7)).to(dtype)
        tiled = stoicc.inspect(weight, tile=(64, 128), tile_map=[[fmt] * 2] * 2, approximate=True)
        kernel = stoicc.compile(tiled, target="cpu")
        held = kernel.to_dense()
        assert not held[weight == 0].any()
        for batch in (1, 3, 8, 70):
            x = torch.randn(batch, 256, generator=torch.Generator().manual_seed(batch)).to(dtype)
            y = torch.empty(batch, 100, dtype=dtype)
            tiles = kernel.executor("tiles")
            tiles.run(x, y, torch.empty(tiles.workspace_bytes(batch, dtype), dtype=torch.uint8))
            assert_product(y, x, held, 4e-3 if dtype == torch.bfloat16 else 1e-5)


def test_what_is_dropped_is_not_unpacked_for_a_large_batch(monkeypatch):
    need("avx512bf16", monkeypatch)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(8)).bfloat16()

    def source(options):
        tiled = stoicc.inspect(weight, tile=(64, 64), tile_map=[[f"group_sparse<{options}>"] * 2], approximate=True)
        return stoicc.compile(tiled, target="cpu").source

    assert not re.search(r"LEAST_BLOCKED|unpack_group_sparse|pairs_spread", source("group_size=64"))
    for options, least in (
        ("group_size=16", 96),
        ("group_size=16, share=0.9", 48),
        ("group_size=64, share=0.9", 64),  # little is dropped
        ("group_size=8", 16),  # too few columns for a product of pairs
    ):
        assert f"LEAST_BLOCKED = {least}," in source(options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GroupSparse(share=0.0), r"format group_sparse: expected a share above 0, at most 1, found 0.0"),
        (lambda: GroupSparse(12).planes((64, 64), "f32"), r"group_sparse: expected a group_size of 8, 16, .. that div"),
        (lambda: GroupSparse().planes((8, 64), "f32"), r"group_sparse: expected tiles of a multiple of 16 rows"),
    ],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(FormatError, match=message):
        call()
