"""Formats of zeros over formats of codes: text, bytes, products of operators, sentences."""

import pytest
import torch

import stoicc
from stoicc.formats import _kept
from stoicc.formats.bitmap import Bitmap
from stoicc.formats.dense import Dense
from stoicc.formats.fp8 import Fp8
from stoicc.formats.int4 import Int4
from stoicc.formats.int8 import Int8
from stoicc.formats.masked import Masked
from stoicc.formats.nm import Nm
from stoicc.ir import parse, print_module
from stoicc.ir.dtypes import bits
from stoicc.ir.registry import REGISTRY, find_format
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
    own = 4 * 4 + 2 * 8  # where strips and runs begin
    assert sizes["masked<mask=nv24>"] == sizes["int4_nv24"] + own


@pytest.mark.parametrize("width", [2, 4, 8])
def test_runs_of_codes_by_hand(width):
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 1 << width, (2, 32, 8), generator=generator).to(torch.uint8)
    kept = torch.rand(codes.shape, generator=generator) < 0.5
    planes = _kept.pack(codes, kept, width)
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
    back, where = _kept.unpack(planes, width)
    assert torch.equal(where, kept)
    assert torch.equal(back, codes.where(kept, 0))


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
