"""The textual form of the tile IR; `stoicc.ir.parser` reads it back.

    module   = program schedule?
    program  = 'program' STRING ':' word '[' int ',' int ']' 'tile' int 'x' int '{' segment* map beside? '}'
    segment  = 'segment' '%'int STRING? ':' format 'count' int ('bytes' ints)? ('pool' pool)*
    pool     = word ':' word '[' (int (',' int)*)? ']' '#'word
    map      = 'map' '{' line* '}'  |  'map' ints
    line     = 'row' int ':' tiles  |  'rows' int '..' int ':' tiles
    tiles    = STRING  |  '%'int ('x'int)? (',' '%'int ('x'int)?)*
    beside   = 'beside' '{' ('low_rank' factor ',' factor | 'activation' word | name pool)* '}'
    factor   = pool  |  '(' 'bits' int 'group' int 'columns' int pool ',' pool ')'
    schedule = 'schedule' '{' ('live' segs)? ('order' ints)? csr* item* ('bins' ints)? ('prologue' words)?
               ('epilogue' words)? ('regimes' regime (',' regime)*)? ('launch' word '=' int (',' ...)*)?
               transposed? ('applied' pass (',' pass)*)? '}'
    csr      = 'csr' '%'int ':' ('row_ptr' ints)? ('col_idx' ints)?
    item     = 'item' 'row' int ('part' int '/' int)? ':' ('[' int ',' int ')')*
    regime   = word ('up' 'to' int)?
    transposed = 'transposed' '{' ('order' ints)? csc* ('bins' ints)? '}'
    csc      = 'csc' '%'int ':' ('col_ptr' ints)? ('row_idx' ints)? ('tiles' ints)?
    ints     = run (',' run)*       run = int | int 'x'int | int '..' int
    word, format, pass = NAME, NAME<options>, NAME{options}  |  STRING
    STRING is a JSON string; whitespace and // comments may stand between any two tokens.

A run `v xN` is v repeated N times; `a..b` counts up from a and includes b. The STRING of a
segment is its symbol in the map; a row's STRING has one symbol per tile, other rows are runs of
segments. `part 0/1` of an item is left out. An item's `[b, e)` are tile ranges, one per csr.

A module that takes more than a screen is *elided*: `...` stands for what is left out, with a
count and a content hash of all of it. The parser refuses `...`; exact mode leaves nothing out.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence

from stoicc.ir.schedule import Schedule, TileCsc, TileCsr, Transposed, WorkItem
from stoicc.ir.types import Beside, CodedFactor, Module, Pool, Segment, TileProgram

WORD = r"[A-Za-z_][\w.\-]*"
_OPTIONS = r"[^<>\"\n/]"
FORMAT = rf"[A-Za-z_]\w*(?:<{_OPTIONS}*(?:<{_OPTIONS}*>{_OPTIONS}*)*>)?"
PASS = r"[A-Za-z_][\w\-]*(?:\{[^{}\"\n/]*\})?"
SYMBOLS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

_PROGRAM_LINES, _SCHEDULE_LINES, _WIDTH = 32, 28, 160
"""A program, or a schedule, of at most so many lines is printed exactly by default."""

_ROW_SYMBOLS = 96
"""Longest map row that is printed symbol by symbol."""


def print_module(module: Module, exact: bool = False) -> str:
    """The text of a module; `parse(print_module(m, exact=True)) == m`.

    Without `exact` a small module is printed exactly too, and a large one elided to about a screen.
    """
    texts = [print_program(module.tiles, exact)]
    if module.schedule is not None:
        texts.append(print_schedule(module.schedule, exact))
    return "\n".join(texts)


def print_program(program: TileProgram, exact: bool = False) -> str:
    """The text of a tile program; see `print_module`."""
    if exact:
        return "\n".join(_program(program, _Exact()))
    if len(program.tile_map) <= 4096:
        lines = list(_program(program, _Exact()))
        if _fits(lines, _PROGRAM_LINES):
            return "\n".join(lines)
    return "\n".join(_program(program, _Elided()))


def print_schedule(schedule: Schedule, exact: bool = False) -> str:
    """The text of a schedule; see `print_module`."""
    if exact:
        return "\n".join(_schedule(schedule, _Exact()))
    if len(schedule.items) <= _SCHEDULE_LINES and sum(len(csr.col_idx) for csr in schedule.csrs) <= 4096:
        lines = list(_schedule(schedule, _Exact()))
        if _fits(lines, _SCHEDULE_LINES):
            return "\n".join(lines)
    return "\n".join(_schedule(schedule, _Elided()))


# -- exact and elided ----------------------------------------------------------------------


class _Exact:
    """Leaves nothing out."""

    elides = False

    def ints(self, values: Sequence[int]) -> str:
        return ", ".join(_runs(values))

    def block(self, lines: Sequence[str], most: int, what: str) -> Iterable[str]:
        return lines

    def runs(self, runs: Sequence[str], what: str) -> str:
        return ", ".join(runs)


class _Elided(_Exact):
    """Leaves out the middle of what is long, and says how much and with which content hash."""

    elides = True

    def ints(self, values: Sequence[int]) -> str:
        runs = list(itertools.islice(_runs(values), 13))
        if len(runs) < 13:
            return ", ".join(runs)
        return f"{', '.join(runs[:8])}, ... to {values[-1]} ({len(values)} in all, #{_hash(values)})"

    def block(self, lines: Sequence[str], most: int, what: str) -> Iterable[str]:
        if len(lines) <= most:
            return lines
        indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
        left_out = f"{indent}... {len(lines) - most + 1} more {what} (#{_hash(lines)})"
        return (*lines[: most - 2], left_out, lines[-1])

    def runs(self, runs: Sequence[str], what: str) -> str:
        if len(runs) <= 12:
            return ", ".join(runs)
        return f"{', '.join(runs[:8])}, ... {len(runs) - 9} more {what} (#{_hash(runs)}), {runs[-1]}"


def _fits(lines: Sequence[str], most: int) -> bool:
    return len(lines) <= most and max(map(len, lines)) <= _WIDTH


def _hash(content: Sequence[object]) -> str:
    return hashlib.blake2b(repr(tuple(content)).encode(), digest_size=4).hexdigest()


# -- program -------------------------------------------------------------------------------


def _program(program: TileProgram, style: _Exact) -> Iterator[str]:
    (rows, columns), (tile_rows, tile_columns) = program.shape, program.tile
    head = f"program {json.dumps(program.name)} : {_word(program.dtype)}[{rows}, {columns}]"
    yield f"{head} tile {tile_rows}x{tile_columns} {{"
    symbols = _symbols(program)
    lines = [line for i, seg in enumerate(program.segments) for line in _segment(i, seg, symbols.get(i), style)]
    yield from style.block(lines, 14, "lines of segments")
    yield from _map(program, symbols, style)
    if program.beside != Beside():
        yield from ("  beside {", *_beside(program.beside), "  }")
    yield "}"


def _symbols(program: TileProgram) -> dict[int, str]:
    """A symbol per segment: `.` for the first that stores nothing, else by number; none if too many."""
    if len(program.segments) > len(SYMBOLS):
        return {}
    bare = next((i for i, segment in enumerate(program.segments) if not segment.pools), None)
    return {i: "." if i == bare else SYMBOLS[i] for i in range(len(program.segments))}


def _segment(index: int, segment: Segment, symbol: str | None, style: _Exact) -> Iterator[str]:
    shown = "" if symbol is None else f" {json.dumps(symbol)}"
    size = f" bytes {style.ints(segment.tile_bytes)}" if segment.tile_bytes else ""
    yield f"  segment %{index}{shown} : {_word(segment.format, FORMAT)} count {segment.count}{size}"
    for pool in segment.pools:
        yield f"    pool {_pool(pool)}"


def _pool(pool: Pool) -> str:
    extents = ", ".join(str(extent) for extent in pool.shape)
    return f"{_word(pool.name)} : {_word(pool.dtype)}[{extents}] #{_word(pool.digest, '[0-9A-Za-z]+')}"


def _factor(factor: Pool | CodedFactor) -> str:
    if isinstance(factor, Pool):
        return _pool(factor)
    numbers = f"bits {factor.bits} group {factor.group_size} columns {factor.columns}"
    return f"({numbers} {_pool(factor.codes)}, {_pool(factor.scales)})"


def _map(program: TileProgram, symbols: dict[int, str], style: _Exact) -> Iterator[str]:
    if not _is_grid(program):
        yield f"  map {style.ints(program.tile_map)}".rstrip()
        return
    rows, columns = program.grid
    tiles = (program.tile_map[row * columns : (row + 1) * columns] for row in range(rows))
    lines, first = [], 0
    for row, group in itertools.groupby(tiles):
        last = first + sum(1 for _ in group) - 1
        label = f"row {first}" if last == first else f"rows {first}..{last}"
        lines.append((label, row))
        first = last + 1
    width = max(len(label) for label, _ in lines)
    shown = [f"    {label:<{width}} : {_tiles(row, symbols, style)}" for label, row in lines]
    yield "  map {"
    yield from style.block(shown, 7, "different rows")
    yield "  }"


def _is_grid(program: TileProgram) -> bool:
    """Whether the map has a tile for every place of the grid (a broken program is printed too)."""
    if min(*program.shape, *program.tile) < 1:
        return False
    rows, columns = program.grid
    return rows * columns == len(program.tile_map)


def _tiles(row: Sequence[int], symbols: dict[int, str], style: _Exact) -> str:
    if len(row) <= _ROW_SYMBOLS and all(segment in symbols for segment in row):
        return json.dumps("".join(symbols[segment] for segment in row))
    runs = [(segment, sum(1 for _ in group)) for segment, group in itertools.groupby(row)]
    return style.runs([f"%{segment} x{count}" if count > 1 else f"%{segment}" for segment, count in runs], "runs")


def _beside(beside: Beside) -> Iterator[str]:
    for name in ("bias", "low_rank", "row_permutation", "column_permutation", "input_scale", "output_scale"):
        value = getattr(beside, name)
        if isinstance(value, Pool):
            yield f"    {name} {_pool(value)}"
        elif value is not None:
            yield f"    {name} {_factor(value[0])}, {_factor(value[1])}"
    if beside.activation is not None:
        yield f"    activation {_word(beside.activation)}"


# -- schedule ------------------------------------------------------------------------------


def _schedule(schedule: Schedule, style: _Exact) -> Iterator[str]:
    yield "schedule {"
    if schedule.live:
        yield f"  live {style.runs([f'%{segment}' for segment in schedule.live], 'segments')}"
    if schedule.row_order:
        yield f"  order {style.ints(schedule.row_order)}"
    csrs = [line for csr in schedule.csrs for line in _csr(csr, style)]
    yield from style.block(csrs, 7, "csrs")
    if style.elides and len(schedule.items) > 6:
        # only what is shown is formatted: a schedule may have very many items
        yield from (_item(item, style) for item in schedule.items[:4])
        yield f"  ... {len(schedule.items) - 5} more items (#{_hash(schedule.items)})"
        yield _item(schedule.items[-1], style)
    else:
        yield from (_item(item, style) for item in schedule.items)
    if schedule.bin_ptr:
        yield f"  bins {style.ints(schedule.bin_ptr)}"
    yield from _short_lists(schedule, style)
    if schedule.transposed is not None:
        yield from _transposed(schedule.transposed, style)
    if schedule.applied:
        yield f"  applied {style.runs([_word(text, PASS) for text in schedule.applied], 'entries')}"
    yield "}"


def _short_lists(schedule: Schedule, style: _Exact) -> Iterator[str]:
    limits = [
        _word(regime.executor) if regime.max_batch is None else f"{_word(regime.executor)} up to {regime.max_batch}"
        for regime in schedule.regimes
    ]
    for label, entries in (
        ("prologue", [_word(name) for name in schedule.prologue]),
        ("epilogue", [_word(name) for name in schedule.epilogue]),
        ("regimes", limits),
        ("launch", [f"{_word(name)} = {value}" for name, value in schedule.launch]),
    ):
        if entries:
            yield f"  {label} {style.runs(entries, 'entries')}"


def _csr(csr: TileCsr, style: _Exact) -> Iterator[str]:
    lists = {"row_ptr": csr.row_ptr, "col_idx": csr.col_idx}
    yield from _tile_lists(f"  csr %{csr.segment} :", len(csr.col_idx), lists, style)


def _transposed(transposed: Transposed, style: _Exact) -> Iterator[str]:
    yield "  transposed {"
    if transposed.column_order:
        yield f"    order {style.ints(transposed.column_order)}"
    cscs = [line for csc in transposed.cscs for line in _csc(csc, style)]
    yield from style.block(cscs, 7, "cscs")
    if transposed.bin_ptr:
        yield f"    bins {style.ints(transposed.bin_ptr)}"
    yield "  }"


def _csc(csc: TileCsc, style: _Exact) -> Iterator[str]:
    lists = {"col_ptr": csc.col_ptr, "row_idx": csc.row_idx, "tiles": csc.tiles}
    yield from _tile_lists(f"    csc %{csc.segment} :", len(csc.tiles), lists, style)


def _tile_lists(head: str, count: int, lists: dict[str, tuple[int, ...]], style: _Exact) -> Iterator[str]:
    """Where the tiles of a segment stand: on one line where that is short, elided to a hash where the style says so."""
    if style.elides:
        yield f"{head} ... {count} tiles (#{_hash(tuple(lists.values()))})"
        return
    parts = [f"{name} {style.ints(values)}" for name, values in lists.items() if values]
    line, indent = " ".join([head, *parts]), head[: len(head) - len(head.lstrip())]
    yield from [line] if len(line) <= 100 else [head, *(f"{indent}  {part}" for part in parts)]


def _item(item: WorkItem, style: _Exact) -> str:
    part = "" if (item.part, item.parts) == (0, 1) else f" part {item.part}/{item.parts}"
    ranges = [f"[{begin}, {end})" for begin, end in item.ranges]
    if style.elides and len(ranges) > 8:
        ranges = [*ranges[:6], f"... {len(ranges) - 6} more (#{_hash(ranges)})"]
    return " ".join([f"  item row {item.row}{part} :", *ranges])


# -- words and numbers ---------------------------------------------------------------------


def _word(text: str, pattern: str = WORD) -> str:
    """The text as it is where it is a plain word of its kind, else as a JSON string."""
    return text if re.fullmatch(pattern, text, re.ASCII) else json.dumps(text)


def _runs(values: Sequence[int]) -> Iterator[str]:
    """Integers as runs: `v xN` for 3 and more alike, `a..b` for 3 and more that count up by one."""
    start, count = 0, len(values)
    while start < count:
        step = values[start + 1] - values[start] if start + 1 < count else None
        end = start + 1
        while step in (0, 1) and end < count and values[end] - values[end - 1] == step:
            end += 1
        if end - start < 3:
            end = start + 1
            yield str(values[start])
        elif step == 0:
            yield f"{values[start]} x{end - start}"
        else:
            yield f"{values[start]}..{values[end - 1]}"
        start = end
