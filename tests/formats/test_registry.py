"""The door of formats: names, options, near matches."""

from typing import ClassVar

import pytest

import stoicc
from stoicc.formats.dense import Dense
from stoicc.formats.int4 import Int4
from stoicc.ir.format import Plane
from stoicc.ir.registry import find_format


def test_text_round_trip():
    assert find_format("int4<group_size=128, zero_points=true>") == Int4(128, True)
    assert str(Int4(128, True)) == "int4<group_size=128, zero_points=true>"
    assert str(Int4()) == "int4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "int5",
            r"format 'int5': expected a registered format, found an unknown name; "
            r"did you mean int8 or int4 or int3\?",
        ),
        ("zzz", r"known formats are bitmap, dense, empty"),
        ("int4<groups=3>", r"expected one of the options group_size, zero_points, found 'groups'"),
        ("int4<group_size=abc>", r"option group_size: expected int, found 'abc'"),
        ("int4<zero_points=yes>", r"option zero_points: expected bool, found 'yes'"),
        ("int4<group_size>", r"expected option=value, found 'group_size'"),
        ("int4<<", r"expected name or name<option=value, ...>"),
    ],
)
def test_unknown_formats(text, message):
    with pytest.raises(stoicc.FormatError, match=message):
        find_format(text)


def test_register_refuses_another_class_of_a_known_name():
    class Other(Dense):
        pass

    with pytest.raises(stoicc.FormatError, match=r"expected a new name, found 'dense' which Dense holds"):
        stoicc.register_format(Other())
    with pytest.raises(stoicc.FormatError, match=r"expected an instance of a TileFormat subclass"):
        stoicc.register_format(Other)  # type: ignore[arg-type]


def test_a_group_that_does_not_meet_the_tile_is_refused():
    with pytest.raises(stoicc.FormatError, match=r"divides the tile's 64 columns, is a multiple of them, or 0"):
        Int4(96).planes((64, 64), "bf16")


def test_register_refuses_what_would_break_every_compile():
    class Fp8(Dense):
        name: ClassVar[str] = "fp8"

        def planes(self, tile, dtype):
            return (Plane("values", "fp8", tile),)

    with pytest.raises(stoicc.FormatError, match=r"expected planes of f64, .*found 'fp8' for plane 'values' of fp8"):
        stoicc.register_format(Fp8())
    with pytest.raises(stoicc.FormatError, match=r"expected Int4\(\) with default options, found int4<group_size=128>"):
        stoicc.register_format(Int4(group_size=128))


def test_register_refuses_a_revision_that_counts_nothing():
    class Zeroth(Dense):
        name: ClassVar[str] = "zeroth"
        revision: ClassVar[int] = 0

    with pytest.raises(stoicc.FormatError, match=r"expected a revision of 1, 2, .., found 0 for zeroth"):
        stoicc.register_format(Zeroth())
