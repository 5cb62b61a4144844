"""Reads the textual form of the tile IR; the grammar is in `stoicc.ir.printer`.

The parser checks that the text is well formed. Whether the module makes sense is for
`stoicc.ir.verify` to say.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

from stoicc.ir.errors import ParseError
from stoicc.ir.printer import FORMAT, PASS, WORD
from stoicc.ir.schedule import Regime, Schedule, TileCsr, WorkItem
from stoicc.ir.types import Beside, Module, Pool, Segment, TileProgram

_T = TypeVar("_T")

_MOST = 1 << 28
"""More integers than this in one list are a mistake, not a module."""

_STRING = r'"(?:[^"\\\n]|\\.)*"'
_COMMENT = re.compile(rf"({_STRING})|//[^\n]*")
_SPACE = re.compile(r"\s*")
_RUN = r"-?\d+(?:\s*x\s*\d+|\s*\.\.\s*-?\d+)?"
_INTS = re.compile(rf"{_RUN}(?:\s*,\s*{_RUN})*", re.ASCII)
_SEGMENT_RUN = r"%-?\d+(?:\s*x\s*\d+)?"
_SEGMENT_RUNS = re.compile(rf"{_SEGMENT_RUN}(?:\s*,\s*{_SEGMENT_RUN})*", re.ASCII)
_PARTS = re.compile(r"(-?\d+)(?:\s*(x|\.\.)\s*(-?\d+))?", re.ASCII)
_INT = re.compile(r"-?\d+", re.ASCII)
_DIGEST = re.compile("[0-9A-Za-z]+")


def parse(text: str) -> Module:
    """A module from its exact text.

    Raises:
        ParseError: the text is not tile IR, or it is elided; with line, column and a caret.
    """
    reader = _Reader(text)
    program = _program(reader)
    schedule = _schedule(reader) if reader.peek("schedule") else None
    reader.end()
    return Module(program, schedule)


def parse_program(text: str) -> TileProgram:
    """A tile program from its exact text; ParseError as for `parse`."""
    reader = _Reader(text)
    program = _program(reader)
    reader.end()
    return program


def parse_schedule(text: str) -> Schedule:
    """A schedule from its exact text; ParseError as for `parse`."""
    reader = _Reader(text)
    schedule = _schedule(reader)
    reader.end()
    return schedule


class _Reader:
    """A place in a text, and the tokens that may stand there."""

    def __init__(self, text: str) -> None:
        self.original = text
        # blanks in place of comments keep every position
        self.text = _COMMENT.sub(lambda m: m.group(1) or " " * len(m.group()), text)
        self.at = 0
        self._skip()

    def fail(self, expected: str, way_out: str = "correct the text", at: int | None = None) -> NoReturn:
        """Raise a ParseError at `at` (default: here)."""
        place = self.at if at is None else at
        if self.text.startswith("...", place):
            expected, way_out = "exact text", "this text is elided: print it with exact=True"
        line = self.text.count("\n", 0, place) + 1
        start = self.text.rfind("\n", 0, place) + 1
        stop = self.text.find("\n", place)
        shown = self.original[start : stop if stop >= 0 else len(self.text)]
        raise ParseError(f"expected {expected}, found {self._found(place)}; {way_out}", line, place - start + 1, shown)

    def end(self) -> None:
        if self.at < len(self.text):
            self.fail("the end of the text")

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.at)
        if found is not None:
            self.at = found.end()
            self._skip()
        return found

    def peek(self, keyword: str) -> bool:
        return re.compile(rf"{keyword}\b").match(self.text, self.at) is not None

    def take(self, token: str) -> bool:
        """Step over a keyword or punctuation mark where it stands here."""
        pattern = rf"{re.escape(token)}\b" if token[-1].isalnum() else re.escape(token)
        return self.match(re.compile(pattern)) is not None

    def expect(self, token: str) -> None:
        if not self.take(token):
            self.fail(repr(token))

    def string(self) -> str | None:
        at = self.at
        found = self.match(re.compile(_STRING))
        if found is None:
            return None
        try:
            return str(json.loads(found.group()))
        except ValueError:
            self.fail("a JSON string", at=at)

    def word(self, what: str, pattern: str = WORD) -> str:
        quoted = self.string()
        if quoted is not None:
            return quoted
        found = self.match(re.compile(pattern, re.ASCII))
        return found.group() if found else self.fail(what)

    def integer(self, what: str) -> int:
        found = self.match(_INT)
        return int(found.group()) if found else self.fail(what)

    def segment(self) -> int:
        self.expect("%")
        return self.integer("the number of a segment")

    def list(self, entry: Callable[[], _T]) -> tuple[_T, ...]:
        entries = [entry()]
        while self.take(","):
            entries.append(entry())
        return tuple(entries)

    def ints(self) -> tuple[int, ...]:
        """One or more runs of integers."""
        at, found = self.at, self.match(_INTS)
        if found is None:
            self.fail("an integer")
        if self.take(","):
            self.fail("an integer")
        return tuple(self._expand(found.group(), at))

    def segments(self) -> tuple[int, ...]:
        """One or more runs of segments, as in a map row."""
        at, found = self.at, self.match(_SEGMENT_RUNS)
        if found is None:
            self.fail("a string of symbols, or runs such as %0 x4")
        if self.take(","):
            self.fail("a segment such as %0")
        return tuple(self._expand(found.group(), at))

    def _expand(self, runs: str, at: int) -> Iterator[int]:
        total = 0
        for run in _PARTS.finditer(runs):
            value, kind, other = run.groups()
            if kind is None:
                yield int(value)
                continue
            first, last = int(value), int(other)
            length = last if kind == "x" else last - first + 1
            total += length
            if length < 1 or total > _MOST:
                self.fail("a run of 1 or more integers, and fewer than 2**28 in all", at=at + run.start())
            yield from (first,) * length if kind == "x" else range(first, last + 1)

    def _found(self, place: int) -> str:
        token = re.compile(rf"{_STRING}|\.\.\.|[\w.\-]+|\S").match(self.text, place)
        return repr(token.group()) if token else "the end of the text"

    def _skip(self) -> None:
        space = _SPACE.match(self.text, self.at)
        assert space is not None, "the pattern matches the empty string"
        self.at = space.end()


# -- program -------------------------------------------------------------------------------


def _program(reader: _Reader) -> TileProgram:
    reader.expect("program")
    name = reader.word("the name of the program")
    reader.expect(":")
    dtype = reader.word("a dtype")
    at = reader.at
    shape = _extents(reader)
    if len(shape) != 2:
        reader.fail("a shape of two extents", at=at)
    reader.expect("tile")
    tile = _tile(reader)
    reader.expect("{")
    segments: list[Segment] = []
    symbols: dict[str, int] = {}
    while reader.take("segment"):
        segments.append(_segment(reader, len(segments), symbols))
    tile_map = _map(reader, symbols)
    beside = _beside(reader) if reader.take("beside") else Beside()
    reader.expect("}")
    return TileProgram(name, (shape[0], shape[1]), tile, dtype, tuple(segments), tile_map, beside)


def _tile(reader: _Reader) -> tuple[int, int]:
    rows = reader.integer("a tile such as 64x64")
    found = reader.match(re.compile(r"x\s*(-?\d+)", re.ASCII))
    return (rows, int(found.group(1))) if found else reader.fail("a tile such as 64x64")


def _segment(reader: _Reader, number: int, symbols: dict[str, int]) -> Segment:
    at = reader.at
    if reader.segment() != number:
        reader.fail(f"segment %{number}, in order", at=at)
    at, symbol = reader.at, reader.string()
    if symbol is not None:
        if len(symbol) != 1 or symbol in symbols:
            reader.fail("one symbol that no other segment has", at=at)
        symbols[symbol] = number
    reader.expect(":")
    fmt = reader.word("a format", FORMAT)
    reader.expect("count")
    count = reader.integer("a count of tiles")
    sizes = reader.ints() if reader.take("bytes") else ()
    pools: list[Pool] = []
    while reader.take("pool"):
        pools.append(_pool(reader))
    return Segment(fmt, count, tuple(pools), sizes)


def _pool(reader: _Reader) -> Pool:
    name = reader.word("the name of a pool")
    reader.expect(":")
    dtype = reader.word("a dtype")
    shape = _extents(reader)
    reader.expect("#")
    digest = reader.word("a content hash", _DIGEST.pattern)
    return Pool(name, dtype, shape, digest)


def _extents(reader: _Reader) -> tuple[int, ...]:
    reader.expect("[")
    if reader.take("]"):
        return ()
    extents = reader.list(lambda: reader.integer("an extent"))
    reader.expect("]")
    return extents


def _map(reader: _Reader, symbols: dict[str, int]) -> tuple[int, ...]:
    if not reader.peek("map"):
        reader.fail("'segment' or 'map'")
    reader.expect("map")
    if not reader.take("{"):
        return reader.ints() if _INT.match(reader.text, reader.at) else ()
    tiles: list[int] = []
    rows = 0
    while not reader.take("}"):
        first, last, at = _row_label(reader)
        if first != rows or last < first:
            reader.fail(f"tile row {rows}, in order", at=at)
        reader.expect(":")
        tiles.extend(_row(reader, symbols) * (last - first + 1))
        rows = last + 1
    return tuple(tiles)


def _row_label(reader: _Reader) -> tuple[int, int, int]:
    """First and last tile row of a map line, and where they stand."""
    if reader.take("row"):
        at = reader.at
        first = reader.integer("a tile row")
        return first, first, at
    if not reader.take("rows"):
        reader.fail("'row', 'rows' or '}'")
    at = reader.at
    first = reader.integer("a tile row")
    reader.expect("..")
    return first, reader.integer("a tile row"), at


def _row(reader: _Reader, symbols: dict[str, int]) -> tuple[int, ...]:
    at, text = reader.at, reader.string()
    if text is None:
        return reader.segments()
    for place, symbol in enumerate(text):
        if symbol not in symbols:
            reader.fail(f"a symbol of a segment ({''.join(symbols) or 'none has one'})", at=at + 1 + place)
    return tuple(symbols[symbol] for symbol in text)


def _beside(reader: _Reader) -> Beside:
    values: dict[str, Any] = {}
    known = [field.name for field in fields(Beside)]
    reader.expect("{")
    while not reader.take("}"):
        at, name = reader.at, reader.word("a name or '}'")
        if name not in known or name in values:
            _unknown(reader, name, known, at)
        if name == "activation":
            values[name] = reader.word("an activation")
        elif name == "low_rank":
            left = _pool(reader)
            reader.expect(",")
            values[name] = (left, _pool(reader))
        else:
            values[name] = _pool(reader)
    return Beside(**values)


# -- schedule ------------------------------------------------------------------------------


def _schedule(reader: _Reader) -> Schedule:
    reader.expect("schedule")
    reader.expect("{")
    values: dict[str, Any] = {"live": (), "row_order": (), "csrs": [], "items": []}
    seen: set[str] = set()
    while not reader.take("}"):
        at, name = reader.at, reader.word("a name or '}'", r"[a-z_]+")
        if name not in _PARSERS or name in seen:
            _unknown(reader, name, list(_PARSERS), at)
        field, entry = _PARSERS[name]
        if isinstance(values.get(field), list):
            values[field].append(entry(reader))
        else:
            values[field] = entry(reader)
            seen.add(name)
    return Schedule(**{field: tuple(value) for field, value in values.items()})


def _csr(reader: _Reader) -> TileCsr:
    segment = reader.segment()
    reader.expect(":")
    row_ptr = reader.ints() if reader.take("row_ptr") else ()
    col_idx = reader.ints() if reader.take("col_idx") else ()
    return TileCsr(segment, row_ptr, col_idx)


def _item(reader: _Reader) -> WorkItem:
    reader.expect("row")
    row, part, parts = reader.integer("a tile row"), 0, 1
    if reader.take("part"):
        part = reader.integer("a part")
        reader.expect("/")
        parts = reader.integer("a number of parts")
    reader.expect(":")
    ranges: list[tuple[int, int]] = []
    while reader.take("["):
        begin = reader.integer("a tile")
        reader.expect(",")
        ranges.append((begin, reader.integer("a tile")))
        reader.expect(")")
    return WorkItem(row, part, parts, tuple(ranges))


def _regime(reader: _Reader) -> Regime:
    executor = reader.word("an executor")
    if not reader.take("up"):
        return Regime(executor)
    reader.expect("to")
    return Regime(executor, reader.integer("a batch size"))


def _launch(reader: _Reader) -> tuple[str, int]:
    name = reader.word("a launch parameter")
    reader.expect("=")
    return name, reader.integer("the parameter's value")


_PARSERS: dict[str, tuple[str, Callable[[_Reader], Any]]] = {
    "live": ("live", lambda r: r.list(r.segment)),
    "order": ("row_order", lambda r: r.ints()),
    "csr": ("csrs", _csr),
    "item": ("items", _item),
    "bins": ("bin_ptr", lambda r: r.ints()),
    "prologue": ("prologue", lambda r: r.list(lambda: r.word("a name"))),
    "epilogue": ("epilogue", lambda r: r.list(lambda: r.word("a name"))),
    "regimes": ("regimes", lambda r: r.list(lambda: _regime(r))),
    "launch": ("launch", lambda r: r.list(lambda: _launch(r))),
    "applied": ("applied", lambda r: r.list(lambda: r.word("a pass", PASS))),
}
"""Keyword -> field of Schedule, and what reads it."""


def _unknown(reader: _Reader, name: str, known: list[str], at: int) -> NoReturn:
    near = difflib.get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near and name not in known else "correct the text"
    reader.fail(f"one of {', '.join(known)}, each at most once", hint, at)
