"""The invariants of a schedule, one rule each; all vectorised over tiles."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stoicc.ir.rules import Rule, broken, check_numbers, check_texts, rule
from stoicc.ir.rules_program import stores_something
from stoicc.ir.schedule import EPILOGUE, EXECUTORS, LAUNCH, PROLOGUE, Schedule, csr_rows
from stoicc.ir.types import Module

SCHEDULE_RULES: list[Rule] = []

_NEEDED = ("map-index", "segment-planes")
"""Program rules without which a schedule cannot be read."""


@rule(SCHEDULE_RULES, "schedule-values")
def _values(module: Module) -> None:
    """Every name is text and every number an integer that the parser reads back."""
    schedule = _schedule(module)
    items = schedule.items
    check_numbers("schedule, live", schedule.live)
    check_numbers("schedule, order", schedule.row_order)
    for csr in schedule.csrs:
        check_numbers("schedule, csr", (csr.segment, *csr.row_ptr, *csr.col_idx))
    check_numbers("schedule, items", [number for item in items for number in (item.row, item.part, item.parts)])
    check_numbers("schedule, items", [number for item in items for span in item.ranges for number in span])
    check_numbers("schedule, bins", schedule.bin_ptr)
    if schedule.transposed is not None:
        check_numbers("schedule, transposed, order", schedule.transposed.column_order)
        check_numbers("schedule, transposed, bins", schedule.transposed.bin_ptr)
        for csc in schedule.transposed.cscs:
            check_numbers("schedule, transposed, csc", (csc.segment, *csc.col_ptr, *csc.row_idx, *csc.tiles))
    check_numbers("schedule, regimes", [r.max_batch for r in schedule.regimes if r.max_batch is not None])
    check_numbers("schedule, launch", [value for _, value in schedule.launch])
    check_texts("schedule, prologue and epilogue", (*schedule.prologue, *schedule.epilogue))
    check_texts("schedule, regimes", [regime.executor for regime in schedule.regimes])
    check_texts("schedule, launch", [name for name, _ in schedule.launch])
    check_texts("schedule, applied", schedule.applied)


@rule(SCHEDULE_RULES, "live-index", "segment-planes", "schedule-values")
def _live_index(module: Module) -> None:
    live, segments = _schedule(module).live, len(module.tiles.segments)
    wrong = [segment for segment in live if not 0 <= segment < segments]
    if wrong or len(set(live)) != len(live):
        raise broken(
            "schedule, live", f"segments of 0 to {segments - 1}, each once", list(live), "name the segments again"
        )


@rule(SCHEDULE_RULES, "live-complete", "live-index")
def _live_complete(module: Module) -> None:
    for index, segment in enumerate(module.tiles.segments):
        if index not in _schedule(module).live and stores_something(module.tiles, index) and segment.count:
            raise broken(
                f"schedule, segment %{index}, format {segment.format}",
                "every segment that stores something to be live",
                f"live {list(_schedule(module).live)}",
                "only segments without payload may be dropped",
            )


@rule(SCHEDULE_RULES, "row-order", "schedule-values", *_NEEDED)
def _row_order(module: Module) -> None:
    rows, order = module.tiles.grid[0], _schedule(module).row_order
    if not np.array_equal(np.sort(np.asarray(order, dtype=np.int64)), np.arange(rows)):
        raise broken(
            "schedule, order",
            f"each of {rows} tile rows once",
            f"{len(order)} entries",
            "give a permutation of the rows",
        )


@rule(SCHEDULE_RULES, "csr-segments", "live-index")
def _csr_segments(module: Module) -> None:
    schedule = _schedule(module)
    segments = tuple(csr.segment for csr in schedule.csrs)
    if segments != schedule.live and (segments or "build-csr" in _ran(schedule)):
        raise broken(
            "schedule, csr", f"one csr per live segment, {list(schedule.live)}", list(segments), "run build-csr again"
        )


@rule(SCHEDULE_RULES, "csr-tiles", "csr-segments", "map-index")
def _csr_tiles(module: Module) -> None:
    tile_map = module.tiles.map_array()
    for csr in _schedule(module).csrs:
        where = f"schedule, csr %{csr.segment}, format {module.tiles.segments[csr.segment].format}"
        member = tile_map == csr.segment
        row_ptr = np.concatenate([[0], np.cumsum(member.sum(axis=1))])
        if not _same(csr.row_ptr, row_ptr):
            row = _first_difference(csr.row_ptr, row_ptr)
            raise broken(
                f"{where}, tile row {max(row - 1, 0)}",
                f"row_ptr[{row}] = {_at(row_ptr, row)} as in the tile map",
                _at(csr.row_ptr, row),
                "run build-csr again",
            )
        columns = np.nonzero(member)[1]
        if not _same(csr.col_idx, columns):
            tile = _first_difference(csr.col_idx, columns)
            row = int(csr_rows(csr)[tile]) if tile < columns.size else -1
            raise broken(
                f"{where}, tile ({row}, {_at(columns, tile)})",
                f"col_idx[{tile}] = {_at(columns, tile)} as in the tile map",
                _at(csr.col_idx, tile),
                "run build-csr again",
            )


@rule(SCHEDULE_RULES, "item-ranges", "csr-segments")
def _item_ranges(module: Module) -> None:
    schedule = _schedule(module)
    for index, item in enumerate(schedule.items):
        if len(item.ranges) != len(schedule.csrs) or any(len(span) != 2 for span in item.ranges):
            raise broken(
                f"schedule, item {index} (tile row {item.row})",
                f"a tile range of each of {len(schedule.csrs)} csrs",
                len(item.ranges),
                "run build-csr again",
            )
    if schedule.items and schedule.live and not schedule.csrs:
        raise broken("schedule, items", "no items before there is a csr", len(schedule.items), "run build-csr first")


@rule(SCHEDULE_RULES, "item-parts", "row-order")
def _item_parts(module: Module) -> None:
    """Items follow the row order; those of a row are neighbours, parts 0 .. parts-1."""
    schedule, place = _schedule(module), 0
    if not schedule.items and not schedule.csrs:
        return
    for row in schedule.row_order:
        parts = max(schedule.items[place].parts, 1) if place < len(schedule.items) else 1
        found = [(item.row, item.part, item.parts) for item in schedule.items[place : place + parts]]
        # as many as there are, not as many as the item says: that may be any number
        if len(found) != parts or found != [(row, part, parts) for part in range(len(found))]:
            raise broken(
                f"schedule, item {place}, tile row {row}",
                f"its parts 0 to {parts - 1} of {parts}, in run order",
                ", ".join(f"part {part}/{of} of row {r}" for r, part, of in found[:4]) or "no item",
                "run split-k again",
            )
        place += parts
    if place != len(schedule.items):
        raise broken("schedule, items", f"{place} items", len(schedule.items), "run split-k again")


@rule(SCHEDULE_RULES, "item-coverage", "item-ranges", "item-parts", "csr-tiles")
def _item_coverage(module: Module) -> None:
    """The items of a row cut the row's tiles of each csr in consecutive ranges."""
    schedule = _schedule(module)
    if not schedule.csrs:
        return
    row = np.array([item.row for item in schedule.items])
    first = np.array([item.part == 0 for item in schedule.items])
    last = np.array([item.part == item.parts - 1 for item in schedule.items])
    ranges = np.array([item.ranges for item in schedule.items], dtype=np.int64)
    for index, csr in enumerate(schedule.csrs):
        row_ptr = np.asarray(csr.row_ptr)
        begin, end = ranges[:, index, 0], ranges[:, index, 1]
        begins = np.where(first, row_ptr[row], np.roll(end, 1))
        wrong = np.nonzero((begin != begins) | (end < begin) | (last & (end != row_ptr[row + 1])))[0]
        if wrong.size:
            item = schedule.items[int(wrong[0])]
            raise broken(
                f"schedule, item {wrong[0]} (tile row {item.row}, part {item.part}/{item.parts}), "
                f"csr %{csr.segment}, format {module.tiles.segments[csr.segment].format}",
                f"consecutive ranges that cover tiles [{row_ptr[item.row]}, {row_ptr[item.row + 1]}) of the row once",
                f"[{item.ranges[index][0]}, {item.ranges[index][1]})",
                "run split-k again",
            )


@rule(SCHEDULE_RULES, "bins", "schedule-values")
def _bins(module: Module) -> None:
    schedule = _schedule(module)
    if not schedule.items and schedule.bin_ptr in ((), (0,)):
        return
    ptr = np.asarray(schedule.bin_ptr, dtype=np.int64)
    if ptr.size < 2 or ptr[0] != 0 or ptr[-1] != len(schedule.items) or (np.diff(ptr) < 1).any():
        raise broken(
            "schedule, bins",
            f"ascending bounds from 0 to {len(schedule.items)} items",
            f"{ptr.size} bounds from {_at(ptr, 0)} to {_at(ptr, ptr.size - 1)}",
            "run balance again",
        )


@rule(SCHEDULE_RULES, "fused", "program-values", "schedule-values")
def _fused(module: Module) -> None:
    """Prologue and epilogue name what is there, in their one legal order, and in the end all of it."""
    schedule, complete = _schedule(module), "fuse-epilogue" in _ran(_schedule(module))
    for place, names, legal in (("prologue", schedule.prologue, PROLOGUE), ("epilogue", schedule.epilogue, EPILOGUE)):
        there = [name for name in legal if getattr(module.tiles.beside, name) is not None]
        if list(names) != [name for name in there if complete or name in names]:
            kind = "all" if complete else "some"
            raise broken(
                f"schedule, {place}",
                f"{kind} of what stands beside the tiles, in the order {', '.join(there) or 'none'}",
                ", ".join(names) or "none",
                "run fuse-epilogue again",
            )


@rule(SCHEDULE_RULES, "regimes", "schedule-values")
def _regimes(module: Module) -> None:
    regimes = _schedule(module).regimes
    for regime in regimes:
        if regime.executor not in EXECUTORS:
            raise broken(
                "schedule, regimes", f"one of {', '.join(EXECUTORS)}", repr(regime.executor), "name a known executor"
            )
    limits = [regime.max_batch for regime in regimes]
    bounded = [limit for limit in limits[:-1] if limit is not None] + ([limits[-1]] if limits and limits[-1] else [])
    ascending = all(a < b for a, b in zip([0, *bounded], bounded, strict=False))
    if None in limits[:-1] or 0 in limits or not ascending:
        raise broken(
            "schedule, regimes",
            "batch limits from 1, ascending, only the last one open",
            ", ".join("open" if limit is None else str(limit) for limit in limits),
            "set the regimes again",
        )


@rule(SCHEDULE_RULES, "launch", "schedule-values")
def _launch(module: Module) -> None:
    launch = _schedule(module).launch
    names = [name for name, _ in launch]
    if names != sorted(set(names)):
        raise broken("schedule, launch", "parameters by name, each once, sorted", names, "use Schedule.launch_with")
    for name, value in launch:
        if name not in LAUNCH:
            raise broken("schedule, launch", f"one of {', '.join(LAUNCH)}", repr(name), "use Schedule.launch_with")
        if value not in LAUNCH[name]:
            allowed = ", ".join(map(str, LAUNCH[name]))
            raise broken(f"schedule, launch, {name}", f"one of {allowed}", value, "use Schedule.launch_with")


# -- transposed ----------------------------------------------------------------------------


@rule(SCHEDULE_RULES, "column-order", "schedule-values", *_NEEDED)
def _column_order(module: Module) -> None:
    transposed, columns = _schedule(module).transposed, module.tiles.grid[1]
    if transposed is None:
        return
    order = np.asarray(transposed.column_order, dtype=np.int64)
    if not np.array_equal(np.sort(order), np.arange(columns)):
        raise broken(
            "schedule, transposed, order",
            f"each of {columns} tile columns once",
            f"{order.size} entries",
            "run build-csc again",
        )


@rule(SCHEDULE_RULES, "csc-segments", "live-index")
def _csc_segments(module: Module) -> None:
    schedule = _schedule(module)
    if schedule.transposed is None:
        return
    segments = tuple(csc.segment for csc in schedule.transposed.cscs)
    if segments != schedule.live:
        raise broken(
            "schedule, transposed, csc",
            f"one csc per live segment, {list(schedule.live)}",
            list(segments),
            "run build-csc again",
        )


@rule(SCHEDULE_RULES, "csc-tiles", "csc-segments", "map-index")
def _csc_tiles(module: Module) -> None:
    transposed, tile_map = _schedule(module).transposed, module.tiles.map_array()
    for csc in transposed.cscs if transposed is not None else ():
        member = tile_map == csc.segment
        columns, rows = np.nonzero(member.T)
        payload = np.cumsum(member).reshape(member.shape) - 1
        expected = {
            "col_ptr": np.concatenate([[0], np.cumsum(member.sum(axis=0))]),
            "row_idx": rows,
            "tiles": payload[rows, columns],
        }
        for name, values in expected.items():
            found = getattr(csc, name)
            if not _same(found, values):
                at = _first_difference(found, values)
                raise broken(
                    f"schedule, transposed, csc %{csc.segment}, format {module.tiles.segments[csc.segment].format}",
                    f"{name}[{at}] = {_at(values, at)} as in the tile map",
                    _at(found, at),
                    "run build-csc again",
                )


@rule(SCHEDULE_RULES, "column-bins", "column-order")
def _column_bins(module: Module) -> None:
    transposed, columns = _schedule(module).transposed, module.tiles.grid[1]
    if transposed is None:
        return
    ptr = np.asarray(transposed.bin_ptr, dtype=np.int64)
    if ptr.size < 2 or ptr[0] != 0 or ptr[-1] != columns or (np.diff(ptr) < 1).any():
        raise broken(
            "schedule, transposed, bins",
            f"ascending bounds from 0 to {columns} tile columns",
            f"{ptr.size} bounds from {_at(ptr, 0)} to {_at(ptr, ptr.size - 1)}",
            "run build-csc again",
        )


# -- helpers -------------------------------------------------------------------------------


def _schedule(module: Module) -> Schedule:
    assert module.schedule is not None, "schedule rules run on scheduled modules only"
    return module.schedule


def _ran(schedule: Schedule) -> set[str]:
    return {text.partition("{")[0] for text in schedule.applied}


def _same(found: Sequence[int], expected: NDArray[np.int64]) -> bool:
    return len(found) == expected.size and bool(np.array_equal(np.asarray(found), expected))


def _first_difference(found: Sequence[int], expected: NDArray[np.int64]) -> int:
    shared = min(len(found), expected.size)
    differs = np.nonzero(np.asarray(found[:shared]) != expected[:shared])[0]
    return int(differs[0]) if differs.size else shared


def _at(values: Sequence[int] | NDArray[np.int64], index: int) -> str:
    return str(values[index]) if 0 <= index < len(values) else "nothing"
