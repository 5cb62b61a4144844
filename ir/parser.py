"""Reads the textual form of the tile IR; the grammar is in `stoicc.ir.printer`.

The parser checks that the text is well formed. Whether the module makes sense is for
`stoicc.ir.verify` to say.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NoReturn

from stoicc.ir.printer import FORMAT, PASS
from stoicc.ir.reader import INT, Reader
from stoicc.ir.schedule import Regime, Schedule, TileCsc, TileCsr, Transposed, WorkItem
from stoicc.ir.types import Beside, CodedFactor, Module, Pool, Segment, TileProgram

_DIGEST = re.compile("[0-9A-Za-z]+")


def parse(text: str) -> Module:
    """A module from its exact text.

    Raises:
        ParseError: the text is not tile IR, or it is elided; with line, column and a caret.
    """
    reader = Reader(text)
    program = _program(reader)
    schedule = _schedule(reader) if reader.peek("schedule") else None
    reader.end()
    return Module(program, schedule)


def parse_program(text: str) -> TileProgram:
    """A tile program from its exact text; ParseError as for `parse`."""
    reader = Reader(text)
    program = _program(reader)
    reader.end()
    return program


def parse_schedule(text: str) -> Schedule:
    """A schedule from its exact text; ParseError as for `parse`."""
    reader = Reader(text)
    schedule = _schedule(reader)
    reader.end()
    return schedule


# -- program -------------------------------------------------------------------------------


def _program(reader: Reader) -> TileProgram:
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


def _tile(reader: Reader) -> tuple[int, int]:
    rows = reader.integer("a tile such as 64x64")
    if reader.match(re.compile("x")) is None:
        reader.fail("a tile such as 64x64")
    return rows, reader.integer("a tile such as 64x64")


def _segment(reader: Reader, number: int, symbols: dict[str, int]) -> Segment:
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


def _pool(reader: Reader) -> Pool:
    name = reader.word("the name of a pool")
    reader.expect(":")
    dtype = reader.word("a dtype")
    shape = _extents(reader)
    reader.expect("#")
    digest = reader.word("a content hash", _DIGEST.pattern)
    return Pool(name, dtype, shape, digest)


def _factor(reader: Reader) -> Pool | CodedFactor:
    if not reader.take("("):
        return _pool(reader)
    numbers = []
    for name in ("bits", "group", "columns"):
        reader.expect(name)
        numbers.append(reader.integer(name))
    codes = _pool(reader)
    reader.expect(",")
    scales = _pool(reader)
    reader.expect(")")
    return CodedFactor(codes, scales, *numbers)


def _extents(reader: Reader) -> tuple[int, ...]:
    reader.expect("[")
    if reader.take("]"):
        return ()
    extents = reader.list(lambda: reader.integer("an extent"))
    reader.expect("]")
    return extents


def _map(reader: Reader, symbols: dict[str, int]) -> tuple[int, ...]:
    if not reader.peek("map"):
        reader.fail("'segment' or 'map'")
    reader.expect("map")
    if not reader.take("{"):
        return reader.ints() if INT.match(reader.text, reader.at) else ()
    tiles: list[int] = []
    rows = 0
    while not reader.take("}"):
        first, last, at = _row_label(reader)
        if first != rows or last < first:
            reader.fail(f"tile row {rows}, in order", at=at)
        reader.expect(":")
        row = _row(reader, symbols)
        if last > first:
            reader.repeat(len(row) * (last - first + 1), at)
        # without tiles there is nothing to repeat, however often
        tiles.extend(row * (last - first + 1) if row else ())
        rows = last + 1
    return tuple(tiles)


def _row_label(reader: Reader) -> tuple[int, int, int]:
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


def _row(reader: Reader, symbols: dict[str, int]) -> tuple[int, ...]:
    at, text = reader.at, reader.string()
    if text is None:
        return reader.segments()
    for place, symbol in enumerate(text):
        if symbol not in symbols:
            reader.fail(f"a symbol of a segment ({''.join(symbols)[:80] or 'none has one'})", at=at + 1 + place)
    return tuple(symbols[symbol] for symbol in text)


def _beside(reader: Reader) -> Beside:
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
            left = _factor(reader)
            reader.expect(",")
            values[name] = (left, _factor(reader))
        else:
            values[name] = _pool(reader)
    return Beside(**values)


# -- schedule ------------------------------------------------------------------------------


def _schedule(reader: Reader) -> Schedule:
    reader.expect("schedule")
    reader.expect("{")
    return Schedule(**_fields(reader, _PARSERS, {"live": (), "row_order": (), "csrs": [], "items": []}))


def _transposed(reader: Reader) -> Transposed:
    reader.expect("{")
    return Transposed(**_fields(reader, _TRANSPOSED_PARSERS, {"column_order": (), "cscs": [], "bin_ptr": ()}))


def _fields(reader: Reader, parsers: "Parsers", values: dict[str, Any]) -> dict[str, Any]:
    """Keywords and what they say, up to a brace: added to a list, or in place of what the field is otherwise."""
    seen: set[str] = set()
    while not reader.take("}"):
        at, name = reader.at, reader.word("a name or '}'", r"[a-z_]+")
        if name not in parsers or name in seen:
            _unknown(reader, name, list(parsers), at)
        field, entry = parsers[name]
        if isinstance(values.get(field), list):
            values[field].append(entry(reader))
        else:
            values[field] = entry(reader)
            seen.add(name)
    return {field: tuple(value) if isinstance(value, list) else value for field, value in values.items()}


def _csr(reader: Reader) -> TileCsr:
    segment = reader.segment()
    reader.expect(":")
    row_ptr = reader.ints() if reader.take("row_ptr") else ()
    col_idx = reader.ints() if reader.take("col_idx") else ()
    return TileCsr(segment, row_ptr, col_idx)


def _csc(reader: Reader) -> TileCsc:
    segment = reader.segment()
    reader.expect(":")
    lists = [reader.ints() if reader.take(name) else () for name in ("col_ptr", "row_idx", "tiles")]
    return TileCsc(segment, *lists)


def _item(reader: Reader) -> WorkItem:
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


def _regime(reader: Reader) -> Regime:
    executor = reader.word("an executor")
    if not reader.take("up"):
        return Regime(executor)
    reader.expect("to")
    return Regime(executor, reader.integer("a batch size"))


def _launch(reader: Reader) -> tuple[str, int]:
    name = reader.word("a launch parameter")
    reader.expect("=")
    return name, reader.integer("the parameter's value")


Parsers = dict[str, tuple[str, Callable[[Reader], Any]]]

_PARSERS: Parsers = {
    "live": ("live", lambda r: r.list(r.segment)),
    "order": ("row_order", lambda r: r.ints()),
    "csr": ("csrs", _csr),
    "item": ("items", _item),
    "bins": ("bin_ptr", lambda r: r.ints()),
    "prologue": ("prologue", lambda r: r.list(lambda: r.word("a name"))),
    "epilogue": ("epilogue", lambda r: r.list(lambda: r.word("a name"))),
    "regimes": ("regimes", lambda r: r.list(lambda: _regime(r))),
    "launch": ("launch", lambda r: r.list(lambda: _launch(r))),
    "transposed": ("transposed", _transposed),
    "applied": ("applied", lambda r: r.list(lambda: r.word("a pass", PASS))),
}
"""Keyword -> field of Schedule, and what reads it."""

_TRANSPOSED_PARSERS: Parsers = {
    "order": ("column_order", lambda r: r.ints()),
    "csc": ("cscs", _csc),
    "bins": ("bin_ptr", lambda r: r.ints()),
}
"""Keyword -> field of Transposed, and what reads it."""


def _unknown(reader: Reader, name: str, known: list[str], at: int) -> NoReturn:
    near = difflib.get_close_matches(name[:64], known, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near and name not in known else "correct the text"
    reader.fail(f"one of {', '.join(known)}, each at most once", hint, at)
