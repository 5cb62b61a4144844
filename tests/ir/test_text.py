"""The textual IR: exact where it says so, short where it must be, and precise about what is wrong."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoicc.ir import ParseError, parse, parse_program, parse_schedule, print_module, print_program, print_schedule
from stoicc.ir.schedule import Regime, Schedule, TileCsc, TileCsr, Transposed, WorkItem
from stoicc.ir.types import Beside, CodedFactor, Module, Pool, Segment, TileProgram
from stoicc.passes import Pipeline, default_pipeline
from tests.ir.modules import full_beside, make_program, modules

LARGE = [
    make_program((4096, 11008)),
    make_program((2000, 2000), (16, 16)),
    make_program((64, 100_000), tile_map=[i % 4 for i in range(1563)]),
    make_program((100_000, 64), tile_map=[i % 4 for i in range(1563)], beside=full_beside((100_000, 64))),
    make_program(
        (1000, 1000), (16, 16), [f"int4<group_size={16 << i}>" for i in range(40)], beside=full_beside((1000, 1000))
    ),
]


@given(modules())
def test_exact_text_reads_back(module):
    assert parse(print_module(module, exact=True)) == module


@given(modules())
def test_default_text_reads_back_or_says_that_it_is_elided(module):
    text = str(module)
    if "..." in text.replace(repr(module.tiles.name), ""):
        if text != print_module(module, exact=True):
            with pytest.raises(ParseError, match=r"this text is elided: print it with .*exact=True"):
                parse(text)
    else:
        assert parse(text) == module


_INTS = st.lists(st.integers(-2, 3), max_size=12).map(tuple)
_TEXTS = st.text(max_size=6)
_POOLS = st.builds(Pool, _TEXTS, _TEXTS, _INTS, _TEXTS)
_CODED = st.builds(CodedFactor, _POOLS, _POOLS, *[st.integers(-1, 300)] * 3)
_BESIDE = st.builds(
    Beside,
    bias=st.none() | _POOLS,
    low_rank=st.none() | st.tuples(_POOLS, _POOLS) | st.tuples(_CODED, _CODED),
    activation=st.none() | _TEXTS,
)
_PROGRAMS = st.builds(
    TileProgram,
    _TEXTS,
    st.tuples(st.integers(-1, 40), st.integers(-1, 40)),
    st.tuples(st.integers(-1, 16), st.integers(-1, 16)),
    _TEXTS,
    st.lists(
        st.builds(Segment, _TEXTS, st.integers(-1, 9), st.lists(_POOLS, max_size=2).map(tuple), _INTS), max_size=3
    ).map(tuple),
    _INTS,
    _BESIDE,
)
_RANGES = st.lists(st.tuples(st.integers(-1, 9), st.integers(-1, 9)), max_size=2).map(tuple)
_WORDS = st.lists(_TEXTS, max_size=2).map(tuple)
_SCHEDULES = st.builds(
    Schedule,
    live=_INTS.map(lambda values: tuple(map(abs, values))),
    row_order=_INTS,
    csrs=st.lists(st.builds(TileCsr, st.integers(0, 3), _INTS, _INTS), max_size=2).map(tuple),
    items=st.lists(
        st.builds(WorkItem, st.integers(-1, 3), st.integers(0, 2), st.integers(0, 2), _RANGES), max_size=3
    ).map(tuple),
    bin_ptr=_INTS,
    prologue=_WORDS,
    epilogue=_WORDS,
    regimes=st.lists(st.builds(Regime, _TEXTS, st.none() | st.integers(-1, 9)), max_size=2).map(tuple),
    launch=st.lists(st.tuples(_TEXTS, st.integers(-1, 9)), max_size=2).map(tuple),
    transposed=st.none()
    | st.builds(
        Transposed,
        _INTS,
        st.lists(st.builds(TileCsc, st.integers(0, 3), _INTS, _INTS, _INTS), max_size=2).map(tuple),
        _INTS,
    ),
    applied=_WORDS,
)


@given(_PROGRAMS, st.none() | _SCHEDULES)
def test_even_broken_modules_read_back(program, schedule):
    """The printer helps to look at what the verifier refuses, so no name or number may trip it."""
    module = Module(program, schedule)
    assert parse(print_module(module, exact=True)) == module


def test_parts_read_back_alone():
    module = Pipeline.parse("build-csr").run(Module(make_program()))
    assert parse_program(str(module.tiles)) == module.tiles
    assert parse_schedule(str(module.schedule)) == module.schedule
    assert parse_program(print_program(module.tiles, exact=True)) == module.tiles
    assert parse_schedule(print_schedule(module.schedule, exact=True)) == module.schedule


def test_small_module_prints_whole(golden):
    module = default_pipeline("cpu", cores=16).run(Module(make_program(beside=full_beside((200, 300)))))
    golden(str(module))
    assert parse(str(module)) == module


def test_large_module_prints_elided(golden):
    golden(str(default_pipeline("triton").run(Module(LARGE[0]))))


@pytest.mark.parametrize("program", LARGE, ids=lambda p: f"{p.shape[0]}x{p.shape[1]}")
@pytest.mark.parametrize("target", [None, "cpu", "triton"])
def test_default_text_is_about_a_screen(program, target):
    module = Module(program) if target is None else default_pipeline(target).run(Module(program))
    lines = str(module).splitlines()
    assert len(lines) <= 62
    assert max(map(len, lines)) <= 240
    assert "..." in str(module)


def test_elided_text_changes_with_what_it_leaves_out():
    program = make_program((4096, 4096))
    tile_map = list(program.tile_map)
    tile_map[2000] = (tile_map[2000] + 1) % 4
    assert str(replace(program, tile_map=tuple(tile_map))) != str(program)


def test_long_lists_are_runs():
    program = make_program((64 * 64, 64 * 128), formats=["dense"])
    text = print_module(Pipeline.parse("build-csr").run(Module(program)), exact=True)
    assert "rows 0..63 : %0 x128" in text
    assert "order 0..63" in text
    assert "col_idx 0..127, 0..127" in text


def test_comments_and_layout_do_not_matter():
    module = Pipeline.parse("build-csr").run(Module(make_program()))
    words = str(module).split("\n")
    noisy = "// head\n" + " // at the end of a line\n\n".join(words)
    assert parse(noisy) == module
    assert parse(" ".join(words)) == module


def test_slashes_in_a_string_are_no_comment():
    program = make_program(name='a // "b" // c')
    assert parse(str(program)).tiles == program


# -- parse errors --------------------------------------------------------------------------

GOOD = """\
program "w" : bf16[64, 128] tile 64x64 {
  segment %0 "0" : dense count 1
    pool p0_values : bf16[1, 64, 64] #ab12
  segment %1 "." : empty count 1
  map {
    row 0 : "0."
  }
  beside {
    activation gelu
  }
}
schedule {
  live %0
  order 0
  csr %0 : row_ptr 0, 1 col_idx 0
  item row 0 : [0, 1)
  bins 0, 1
  regimes tiles up to 8, dense-once
  applied build-csr
}
"""

FAULTS = [
    ("program", "progam", 1, 1, r"expected 'program', found 'progam'; correct the text"),
    ("64, 128]", "64, 128, 3]", 1, 19, "expected a shape of two extents"),
    ("64x64", "64", 1, 37, "expected a tile such as 64x64, found '{'"),
    ("segment %1", "segment %3", 4, 11, "expected segment %1, in order, found '%'"),
    ('"." : empty', '"0" : empty', 4, 14, "expected one symbol that no other segment has"),
    ("count 1\n    pool", "cuont 1\n    pool", 2, 26, "expected 'count', found 'cuont'"),
    ("#ab12", "ab12", 3, 38, "expected '#', found 'ab12'"),
    ("#ab12", "#-", 3, 39, "expected a content hash"),
    ("bf16[1, 64, 64]", "bf16[1, 64, ]", 3, 34, r"expected an extent, found '\]'"),
    ("  map {", "  mop {", 5, 3, "expected 'segment' or 'map', found 'mop'"),
    ('row 0 : "0."', 'row 1 : "0."', 6, 9, "expected tile row 0, in order, found '1'"),
    ('"0."', '"0x"', 6, 15, r"expected a symbol of a segment \(0\.\)"),
    ('"0."', "%0, x2", 6, 17, "expected a segment such as %0, found 'x2'"),
    ('"0."', "0 1", 6, 13, "expected a string of symbols, or runs such as %0 x4, found '0'"),
    ('"0."', "%0 x0", 6, 14, "expected a run of 1 or more integers"),
    ('"0."', "%0 x999999999", 6, 14, r"expected at most 2\*\*24 entries in all runs"),
    ("activation gelu", "activatoin gelu", 9, 5, r"expected one of bias, .*; did you mean activation\?"),
    ("activation gelu", "activation gelu activation relu", 9, 21, "each at most once"),
    ("activation gelu", "activation ;", 9, 16, "expected an activation, found ';'"),
    ("order 0", "ordre 0", 14, 3, r"did you mean order\?"),
    ("order 0", "order 0,", 15, 3, "expected an integer, found 'csr'"),
    ("order 0", "order 3..1", 14, 9, "expected a run of 1 or more integers"),
    ("order 0", "order ... (5 more)", 14, 9, r"expected exact text, found '\.\.\.'; .*print it with .*exact=True"),
    ("order 0", "order", 15, 3, "expected an integer, found 'csr'"),
    ("[0, 1)", "[0, 1]", 16, 21, r"expected '\)', found '\]'"),
    ("up to 8", "up 8", 18, 20, "expected 'to', found '8'"),
    ("live %0", "live 0", 13, 8, "expected '%', found '0'"),
    ("applied build-csr\n}\n", "applied build-csr\n", 20, 1, "expected a name or '}', found the end of the text"),
    ("applied build-csr\n}\n", "applied build-csr\n}\nmore", 21, 1, "expected the end of the text, found 'more'"),
    ('"w"', '"\\q"', 1, 9, "expected a JSON string"),
    ('"w"', "7", 1, 9, "expected the name of the program, found '7'"),
]


def test_the_text_that_the_faults_are_put_in_is_good():
    assert str(parse(GOOD)) + "\n" == GOOD


@pytest.mark.parametrize(("good", "bad", "line", "column", "message"), FAULTS)
def test_parse_error_points_at_the_fault(good, bad, line, column, message):
    assert GOOD.count(good) >= 1
    text = GOOD.replace(good, bad, 1)
    with pytest.raises(ParseError, match=message) as caught:
        parse(text)
    assert (caught.value.line, caught.value.column) == (line, column)
    shown, caret = str(caught.value).split("\n")[1:]
    assert shown == "  " + [*text.split("\n"), ""][line - 1]
    assert caret == "  " + " " * (column - 1) + "^"


def test_parse_error_shows_the_line_with_its_comment():
    with pytest.raises(ParseError) as caught:
        parse("program // a comment\n  [ // here\n")
    assert str(caught.value).endswith("\n    [ // here\n    ^")
