"""Text from anywhere: one sentence, soon, and never an error of Python's or numpy's own."""

import re
import time
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stoicc.ir import ParseError, StoiccError, VerifyError, parse, print_module, verify
from stoicc.ir.schedule import TileCsr
from stoicc.ir.types import Module
from stoicc.passes import Pipeline, run_text
from tests.ir.modules import make_program
from tests.ir.test_text import GOOD

HUGE, DIGITS = "9" * 17, "9" * 5000


@pytest.mark.parametrize(
    ("good", "bad", "kind", "message"),
    [
        ('row 0 : "0."', 'rows 0..9999999999 : "0."', ParseError, "expected at most 2.*24 entries in all runs"),
        ("order 0", "order 0..260000000", ParseError, "expected at most 2.*24 entries in all runs"),
        ("order 0", "order 0 x9000000, 0 x9000000", ParseError, "expected at most 2.*24 entries in all runs"),
        ('row 0 : "0."', "row 0 : %0 x9000000, %0 x9000000", ParseError, "expected at most 2.*24 entries in all runs"),
        ("tile 64x64", f"tile 64x{DIGITS}", ParseError, "expected a whole number of at most 18 digits"),
        ('row 0 : "0."', f"row 0 : %{DIGITS}", ParseError, "expected a whole number of at most 18 digits"),
        ("bins 0, 1", f"bins 0, -{DIGITS}", ParseError, "expected a whole number of at most 18 digits"),
        ("empty count 1", f"empty count 1 bytes {HUGE}{HUGE}", ParseError, "expected a whole number of at most 18"),
        ("up to 8", f"up to {DIGITS}", ParseError, "expected a whole number of at most 18 digits"),
        ('row 0 : "0."', f"row 0 : %{HUGE}, %0", VerifyError, rf"tile \(0, 0\): .*, found %{HUGE}"),
        ("[64, 128]", f"[{HUGE}, {HUGE}]", VerifyError, "rule map-length"),
        ("order 0", f"order {HUGE}", VerifyError, "rule row-order"),
        ("bins 0, 1", f"bins 0, {HUGE}", VerifyError, "rule bins"),
        ("row_ptr 0, 1", f"row_ptr 0, {HUGE}", VerifyError, "rule csr-tiles"),
        ("item row 0", f"item row 0 part 0/{HUGE}", VerifyError, f"expected its parts 0 to {HUGE[:-1]}8 of {HUGE}"),
        ("item row 0", f"item row {HUGE}", VerifyError, "rule item-parts"),
        ("[0, 1)", f"[0, {HUGE})", VerifyError, "rule item-coverage"),
        ("live %0", f"live %{HUGE}", VerifyError, "rule live-index"),
        (": dense", ": dens", VerifyError, "segment %0, format dens: .* did you mean dense"),
        (
            ": dense",
            f": int4<group_size={DIGITS}>",
            VerifyError,
            "segment %0, .*option group_size: expected int, found",
        ),
        (": dense", f': "{"x" * 90_000}"', VerifyError, "segment %0, format xxx.* expected the text of a registered"),
        (": dense", ': "a\\nb"', VerifyError, r"segment %0, format a\\nb: expected"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_what_is_too_large_or_unknown_is_named(good, bad, kind, message):
    assert GOOD.count(good) == 1
    start = time.perf_counter()
    with pytest.raises(kind, match=message) as caught:
        verify(parse(GOOD.replace(good, bad)))
    assert time.perf_counter() - start < 1
    assert len(str(caught.value)) < 1200
    assert str(caught.value).count("\n") == (2 if kind is ParseError else 0)


@pytest.mark.parametrize(
    "text",
    [
        '"' + '\\"' * 40_000,
        '"' * 80_001,
        "/" * 80_000,
        "program " + " " * 80_000 + "\x01",
        '"\\' * 40_000,
        "{" * 80_000,
    ],
    ids=["escapes", "quotes", "slashes", "blanks", "backslashes", "braces"],
)
def test_long_lines_are_read_once_and_shown_in_part(text):
    start = time.perf_counter()
    with pytest.raises(ParseError) as caught:
        parse(text)
    assert time.perf_counter() - start < 1
    assert len(str(caught.value)) < 600


def test_the_caret_stands_under_the_fault_in_a_long_line():
    before, after = " " * 500, "m" * 500
    with pytest.raises(ParseError, match="column 509") as caught:
        parse(f"program {before}[{after}")
    shown, caret = str(caught.value).split("\n")[1:]
    assert shown.startswith("  ...")
    assert shown.endswith("m...")
    assert len(shown) == 168
    assert shown[caret.index("^")] == "["


@pytest.mark.parametrize("text", ["a," * 40_000, "order{" * 20_000, "balance," * 3000 + "build-csr"])
def test_long_pipelines_are_refused_soon(text):
    start = time.perf_counter()
    with pytest.raises(StoiccError) as caught:
        Pipeline.parse(text)
    assert time.perf_counter() - start < 2
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "name", ['"', "a\nb", "\\", "// no comment", "%0 }", "Gewicht ü 重み \U0001f600", "\x00\x7f\u2028", ""]
)
def test_names_of_any_text_read_back(name):
    program = make_program(name=name)
    text = print_module(Module(program), exact=True)
    verify(parse(text))
    assert parse(text).tiles == program
    assert text.isascii()


@pytest.mark.parametrize("name", [None, 5, b"w", "\ud83d\ude00"])
def test_names_that_are_no_text_are_refused(name):
    with pytest.raises(VerifyError, match=r"program, name and dtype: expected text .*program-values"):
        verify(Module(replace(make_program(), name=name)))


@pytest.mark.parametrize("number", [10**18, 10**30, 1.5, "3", None, True])
def test_numbers_that_the_parser_would_not_read_are_refused(number):
    program = make_program()
    with pytest.raises(VerifyError, match="tile map: expected whole numbers of at most 18 digits, found"):
        verify(Module(replace(program, tile_map=(*program.tile_map[1:], number))))
    scheduled = Pipeline.parse("build-csr").run(Module(program))
    assert scheduled.schedule is not None
    csrs = tuple(TileCsr(csr.segment, (*csr.row_ptr[:-1], number), csr.col_idx) for csr in scheduled.schedule.csrs)
    with pytest.raises(VerifyError, match="schedule, csr: expected whole numbers of at most 18 digits, found"):
        verify(replace(scheduled, schedule=replace(scheduled.schedule, csrs=csrs)))


_TOKENS = re.compile(r'"[^"]*"|\w+|\S|\s+')
_SPARE = [
    "",
    "0",
    "-1",
    "7",
    "64",
    HUGE,
    DIGITS,
    "..",
    " x",
    "%",
    '"',
    "{",
    "}",
    "// ",
    "\n",
    "é",
    "0 x99999999",
    "2..4",
]
_SPARE += sorted({*_TOKENS.findall(GOOD)})
_PIPELINES = ["build-csr", "drop-empty,order{by=cost},build-csr,split-k{parts=3},balance{bins=2},fuse-epilogue"]


@given(
    st.lists(st.tuples(st.integers(0, 200), st.sampled_from(_SPARE)), min_size=1, max_size=3),
    st.sampled_from(_PIPELINES),
)
@example([(0, '"')], _PIPELINES[0])
def test_a_changed_program_runs_or_gets_a_sentence(changes, pipeline):
    tokens = _TOKENS.findall(GOOD)
    for place, token in changes:
        tokens[place % len(tokens)] = token
    try:
        message = run_text("".join(tokens), pipeline)
    except StoiccError as error:
        message = str(error)
    assert 0 < len(message) < 8000
