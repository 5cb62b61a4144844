"""Options as text: every type goes both ways, and what would not come back is refused."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoicc.formats.dense import Dense
from stoicc.formats.int4 import Int4
from stoicc.ir import FormatError, PassError, register_format
from stoicc.ir.options import print_options, read_options, split_options
from stoicc.ir.registry import REGISTRY, find_format
from stoicc.passes import parse_pass
from stoicc.passes.balance import Balance
from stoicc.passes.order import Order
from stoicc.passes.regimes import Regimes
from stoicc.passes.split_k import SplitK


@dataclass(frozen=True)
class Every:
    whole: int = 1
    real: float = 0.5
    flag: bool = False
    text: str = "a"
    choice: Literal["low", "high", 3] = "low"
    auto: int | Literal["auto"] = "auto"
    maybe: float | None = None
    words: str | None = None


_WHOLE = st.integers(-(10**18) + 1, 10**18 - 1)
_TEXT = st.text(st.characters(exclude_characters=",<>{}", exclude_categories=["C", "Z"]), max_size=5)


@given(
    st.builds(
        Every,
        whole=_WHOLE,
        real=st.floats(allow_nan=False),
        flag=st.booleans(),
        text=_TEXT,
        choice=st.sampled_from(["low", "high", 3]),
        auto=_WHOLE | st.just("auto"),
        maybe=st.none() | st.floats(allow_nan=False),
        words=st.none() | _TEXT.filter(lambda text: text != "none"),
    )
)
def test_every_type_goes_both_ways(every):
    text = ", ".join(print_options(every, "it", FormatError))
    assert read_options(Every, split_options(text, "it", FormatError), "it", FormatError) == every


def test_only_what_differs_is_printed_and_the_first_where_asked():
    assert print_options(Every(flag=True, maybe=2.0), "it", FormatError) == ["flag=true", "maybe=2.0"]
    assert print_options(Every(), "it", FormatError, first=True) == ["whole=1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("whole=1.5", "it, option whole: expected int, found '1.5'; correct the value"),
        ("whole=1000000000000000000", "it, option whole: expected int, found '1000"),
        ("whole=" + "9" * 5000, "it, option whole: expected int, found '999"),
        ("flag=True", "it, option flag: expected bool, found 'True'"),
        ("choice=mid", "it, option choice: expected low or high or 3, found 'mid'"),
        ("auto=some", "it, option auto: expected int or auto, found 'some'"),
        ("maybe=no", "it, option maybe: expected float or none, found 'no'"),
        ("size=1", "it: expected one of the options whole, real, .*, found 'size'; correct the name"),
        ("whole=1, whole=2", "it: expected every option once, found 'whole' twice"),
        ("whole", "it: expected option=value, found 'whole'"),
    ],
)
def test_wrong_text_is_named(options, message):
    with pytest.raises(PassError, match=message) as caught:
        read_options(Every, split_options(options, "it", PassError), "it", PassError)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "a,b"},
        {"text": "a>"},
        {"text": "{"},
        {"text": " a"},
        {"words": "none"},
        {"whole": True, "text": "b"} | {"whole": 2.5},
        {"auto": True},
        {"auto": 10**18},
        {"flag": 2},
        {"real": float("nan")},
        {"maybe": "2"},
    ],
    ids=str,
)
def test_what_would_not_read_back_is_refused_when_printed(fields):
    with pytest.raises(FormatError, match=r"that reads back from its text, found .*; correct the value"):
        print_options(Every(**fields), "it", FormatError)


@dataclass(frozen=True)
class Labelled(Dense):
    name: ClassVar[str] = "test_labelled"
    label: str = ""
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.limit == 0:
            raise ValueError("no room")


def test_a_format_prints_and_reads_options_of_any_of_these_types():
    register_format(Labelled())
    try:
        labelled = Labelled("per row", 0.25)
        assert str(labelled) == "test_labelled<label=per row, limit=0.25>"
        assert find_format(str(labelled)) == labelled
        with pytest.raises(FormatError, match=r"format test_labelled: expected options that it takes, .*: no room"):
            find_format("test_labelled<limit=0>")
    finally:
        REGISTRY.unregister("test_labelled")
    for label in ("a,b", "a>b"):
        with pytest.raises(FormatError, match="format test_labelled, option label: expected str that reads back"):
            str(Labelled(label))
    with pytest.raises(FormatError, match="format int4, option group_size: expected int that reads back"):
        str(Int4(2.5))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [True, 2.5, "many", 10**20, -1])
@pytest.mark.parametrize("make", [SplitK, Balance, Regimes, lambda value: SplitK(1, value), Order])
def test_passes_refuse_values_that_their_text_cannot_say(make, value):
    with pytest.raises(PassError, match=r"pass [\w-]+, option \w+: expected .*, found .*; correct the value"):
        make(value)


def test_a_number_of_too_many_digits_is_refused_in_a_pipeline():
    with pytest.raises(PassError, match="pass split-k, option parts: expected int or auto or balance, found '1000"):
        parse_pass(f"split-k{{parts={10**20}}}")
