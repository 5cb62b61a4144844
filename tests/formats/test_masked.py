"""Formats of zeros over formats of codes: text, bytes, products of operators, sentences."""

from dataclasses import replace

import pytest
import torch

import stoicc
from stoicc.formats import _nm
from stoicc.formats._kept import KeptRuns
from stoicc.formats._kept_rows import KeptRows
from stoicc.formats.bitmap import Bitmap
from stoicc.formats.dense import Dense
from stoicc.formats.fp8 import Fp8
from stoicc.formats.int4 import Int4
from stoicc.formats.int8 import Int8
from stoicc.formats.masked import Masked
from stoicc.formats.nm import Nm
from stoicc.ir import parse, print_module
from stoicc.ir.dtypes import DTYPE_NAMES, bits
from stoicc.ir.errors import FormatError
from stoicc.ir.format import Approximation
from stoicc.ir.registry import REGISTRY, find_format
from stoicc.testing import check_format
from tests.products import assert_product


def pruned(density: float, shape: tuple[int, int] = (130, 200)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator)
    return weight.where(torch.rand(*shape, generator=generator) < density, 0)


@pytest.mark.parametrize(
    ("fmt", "text"),
    [
        (Masked(), "masked"),
        (Masked(values=Int8(group_size=32)), "masked<values=int8<group_size=32>>"),
        (Masked(Nm(1, 8), Int4(0, True)), "masked<mask=nm<n=1>, values=int4<group_size=0, zero_points=true>>"),
        (Masked(Masked(), Fp8("e5m2")), "masked<mask=masked, values=fp8<kind=e5m2>>"),
    ],
)
def test_text_of_formats_in_formats(fmt, text):
    assert str(fmt) == text
    assert find_format(text) == fmt
    assert find_format(f" masked < values = {fmt.values} , mask = {fmt.mask} > ".replace("< ", "<")) == fmt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("masked<values=int5>", r"format 'int5': expected a registered format, found an unknown name; did you mean"),
        ("masked<values=int4<groups=3>>", r"format int4: expected one of the options group_size, zero_points"),
        ("masked<values=int4<group_size=16>", r"expected name or name<option=value, ...>"),
        ("masked<values=int4>>", r"expected name or name<option=value, ...>"),
        ("masked<mask=int8>", r"masked: expected a mask that says which weights it keeps, found int8; use bitmap, nm"),
        ("int4<group_size=<16>>", r"option group_size: expected int, found '<16>'"),
    ],
)
def test_wrong_text(text, message):
    with pytest.raises(stoicc.FormatError, match=message):
        find_format(text)


def test_values_need_one_code_for_each_weight():
    message = r"format masked: expected values with one code of 2, 4 or 8 bits for each weight, found dense; use int2,"
    with pytest.raises(stoicc.FormatError, match=message):
        Masked(values=Dense()).planes((64, 64), "bf16")
    with pytest.raises(stoicc.FormatError, match=r"format masked: expected tiles of a multiple of 16 rows and of 4"):
        Masked().planes((8, 64), "bf16")


def test_an_operators_codes_are_held_as_they_are(tmp_path):
    weight = pruned(0.4)
    compressed = stoicc.ops.group_absmax(weight, 4, 64)
    kernel = stoicc.compile(compressed, ["masked", "int4"], target="cpu", tile=(64, 64))
    assert {entry.format for entry in kernel.stats().formats} == {"masked"}
    assert torch.equal(bits(kernel.to_dense()), bits(compressed.dense()))
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    assert_product(kernel(x), x, compressed.dense())
    kernel.save(tmp_path / "w.safetensors")
    loaded = stoicc.load(tmp_path / "w.safetensors")
    assert torch.equal(loaded(x), kernel(x))
    assert parse(print_module(kernel.ir, exact=True)) == kernel.ir


def test_codes_beside_floats_in_one_format():
    """Tiles of two sheets and of none, all in one format: runs are put back in tile order."""
    grid = torch.arange(12).view(3, 4)
    weight = pruned(0.5, (192, 256)).sign() * 0.5
    compressed = stoicc.ops.group_absmax(weight, 4, 64, where=grid % 3 == 1)
    tile_map = [["masked"] * 4] * 3
    kernel = stoicc.compile(compressed, tile_map=tile_map, tile=(64, 64), target="reference")
    assert torch.equal(bits(kernel.to_dense()), bits(compressed.dense()))


def test_chosen_only_where_it_is_named():
    compressed = stoicc.ops.group_absmax(pruned(0.2), 4, 64)
    assert "masked" not in {entry.format for entry in stoicc.compile(compressed).stats().formats}


def test_bytes_are_one_bit_a_weight_and_the_codes_of_what_is_kept():
    """At 2 of 4 and 4 bits these are the bytes of int4_nv24, whose positions take a bit a weight as well."""
    weight = stoicc.ops.group_absmax(stoicc.ops.nm_magnitude(torch.full((64, 64), 0.5)), 4, 64)
    sizes = {}
    for text in ("masked<mask=nv24>", "int4_nv24"):
        tiled = stoicc.inspect(weight, [text], tile=(64, 64))
        sizes[text] = sum(pool.numel() * pool.element_size() for pool in tiled.pools.values())
    assert sizes["masked<mask=nv24>"] == sizes["int4_nv24"]


@pytest.mark.parametrize("width", [2, 4, 8])
def test_runs_of_codes_by_hand(width):
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 1 << width, (2, 32, 8), generator=generator).to(torch.uint8)
    kept = torch.rand(codes.shape, generator=generator) < 0.5
    planes = KeptRuns(width).pack(codes, kept)
    stream, at = planes["codes"].tolist(), 0
    for tile in range(2):
        assert planes["codes_ptr"][tile] == at
        for strip in range(2):
            assert planes["starts"][tile, strip] == at - int(planes["codes_ptr"][tile])
            for block in range(2):
                mask, word = 0, 0
                for r in range(16):
                    for c in range(4):
                        if kept[tile, 16 * strip + r, 4 * block + c]:
                            word |= int(codes[tile, 16 * strip + r, 4 * block + c]) << width * mask.bit_count()
                            mask |= 1 << 4 * r + c
                assert int(planes["masks"][tile, strip, block]) & (1 << 64) - 1 == mask
                size = -(-mask.bit_count() * width // 8)
                assert sum(byte << 8 * i for i, byte in enumerate(stream[at : at + size])) == word
                at += size
    assert at == len(stream)
    back, where = KeptRuns(width).unpack(planes)
    assert torch.equal(where, kept)
    assert torch.equal(back, codes.where(kept, 0))


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 8), (4, 16), (2, 4)])
def test_rows_of_codes_by_hand(n, m, width):
    """Of a group with fewer weights the lowest zeros are kept as well."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 1 << width, (2, 16, 64), generator=generator).to(torch.uint8)
    kept = _nm.largest(torch.rand(codes.shape, generator=generator), n, m) & (torch.rand(codes.shape) < 0.7)
    rows = KeptRows(n, m, width)
    planes = rows.pack(codes, kept)
    assert [tuple(planes[plane.name].shape[1:]) for plane in rows.planes((16, 64))] == [
        (16, 8),
        (16, 8 * width * n // m),
    ]
    for tile in range(2):
        for row in range(16):
            mask, word, count = 0, 0, 0
            for group in range(0, 64, m):
                columns = range(group, group + m)
                own = [k for k in columns if kept[tile, row, k]]
                own = sorted(own + [k for k in columns if k not in own][: n - len(own)])
                for k in own:
                    mask |= 1 << k
                    word |= int(codes[tile, row, k]) << width * count
                    count += 1
            assert int.from_bytes(bytes(planes["masks"][tile, row].tolist()), "little") == mask
            assert int.from_bytes(bytes(planes["codes"][tile, row].tolist()), "little") == word
    back, where = rows.unpack(planes)
    assert torch.equal(where & kept, kept)
    assert bool(where.unflatten(2, (-1, m)).sum(3).eq(n).all())
    assert torch.equal(back, codes.where(where, 0))


@pytest.mark.parametrize(
    ("fmt", "rows"),
    [
        ("masked<mask=nm, values=int4>", True),
        ("masked<mask=nm<n=1, m=4>, values=int2>", True),
        ("masked<mask=nv24, values=int8<group_size=32>>", True),
        ("masked<mask=nm<n=4, m=16>, values=mxfp4>", True),
        ("masked<mask=nm, values=int4<zero_points=true>>", True),
        ("masked<mask=nm, values=int8<zero_points=true>>", False),  # a code less its zero point has nine bits
        ("masked<mask=nm, values=fp8>", True),
        ("masked<mask=nm<n=1>, values=int4>", False),  # two of sixteen columns
        ("masked<mask=nm<n=3>, values=int4>", False),  # positions would be longer than masks
        ("masked<mask=nm, values=int2<group_size=32>>", False),  # half a word of codes to a scale
        ("masked<mask=nm, values=int4<group_size=16>>", False),
        ("masked", False),
    ],
)
def test_rows_where_lanes_can_pick(fmt, rows):
    names = [plane.name for plane in find_format(fmt).planes((64, 64), "bf16")]
    assert ("starts" not in names) == rows


@pytest.mark.parametrize("fmt", ["masked<mask=nm>", "masked<mask=nv24, values=int2<zero_points=true>>"])
def test_lanes_of_rows_come_back(fmt):
    weight = pruned(0.2, (64, 256)).bfloat16()
    planes = find_format(fmt).approximate(weight.view(2, 32, 256), torch.arange(2)).planes
    code = find_format(fmt).tile_mac((32, 256), "bf16")
    assert code is not None
    assert code.unpack is not None
    back = code.unpack(code.pack(planes), (32, 256))
    assert planes.keys() == back.keys()
    assert all(torch.equal(planes[name].view(back[name].dtype), back[name]) for name in planes)


def test_a_mask_of_another_number_is_refused():
    fmt = find_format("masked<mask=nm>")
    planes = fmt.encode(torch.zeros(1, 16, 64))
    planes["masks"][0, 3, 2] = 7
    code = fmt.tile_mac((16, 64), "f32")
    assert code is not None
    with pytest.raises(FormatError, match="expected masks that keep 2 of each 8, found a group of another number"):
        code.pack(planes)


class Signs(Int8):
    """A user's format of codes: all that composing needs is inherited."""

    name = "signs"


def test_a_users_format_composes():
    stoicc.register_format(Signs())
    try:
        fmt = Masked(Bitmap(), Signs(group_size=0))
        weight = pruned(0.5).sign() * 0.25
        kernel = stoicc.compile(weight, [str(fmt)], target="cpu")
        assert str(fmt) == "masked<values=signs<group_size=0>>"
        assert torch.equal(kernel.to_dense(), weight)
    finally:
        REGISTRY.unregister("signs")


class Odd(Int4):
    """Approximates to odd multiples of a step: no weight comes back as zero."""

    name = "odd"

    def approximate(self, tiles, slots, statistics=None):
        found = super().approximate(tiles, slots, statistics)
        planes = found.planes | {"codes": found.planes["codes"] | 0x11}
        back = self.decode(planes, tuple(tiles.shape[1:]), DTYPE_NAMES[tiles.dtype])
        return Approximation(planes, (back.double() - tiles.double()).square().flatten(1).sum(1))


def test_zeros_that_are_kept_are_zeros_whatever_the_values_make_of_them():
    stoicc.register_format(Odd())
    try:
        weight = torch.randn(64, 64).where(torch.arange(64) % 8 == 3, 0)
        kernel = stoicc.compile(weight, tile_map=[["masked<mask=nm, values=odd>"]], approximate=True, target="cpu")
        assert torch.equal(kernel.to_dense() == 0, weight == 0)
    finally:
        REGISTRY.unregister("odd")


class NotInLanes(Int8):
    """Promises what its codes mean one by one, and does not say it."""

    name = "not_in_lanes"

    def tile_mac(self, tile, dtype):
        code = super().tile_mac(tile, dtype)
        return code and replace(code, in_lanes=None)


def test_codes_in_lanes_that_are_promised_have_to_be_there():
    stoicc.register_format(NotInLanes())
    try:
        with pytest.raises(FormatError, match="elements says that tile_mac has in_lanes, found none"):
            check_format("not_in_lanes", (16, 64), ("f32",))
        weight = stoicc.ops.nm_magnitude(pruned(1.0, (64, 64)).sign() * 0.25, 2, 8).dense()
        with pytest.raises(FormatError, match="expected code for target 'cpu', found none"):
            stoicc.compile(weight, ["masked<mask=nm, values=not_in_lanes>"], target="cpu")
    finally:
        REGISTRY.unregister("not_in_lanes")
