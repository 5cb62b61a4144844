"""Schedules: which tiles an executor visits, in which order, in which pieces.

    schedule   = Schedule(csrs: csr*, row_order: int*, items: item*, bin_ptr: int*,
                          prologue: text*, epilogue: text*, regimes: regime*,
                          launch: (text, int)*, transposed: transposed?, applied: text*)
    csr        = TileCsr(segment: int, row_ptr: int*, col_idx: int*)
    item       = WorkItem(row, part, parts, ranges: (begin, end)*)      one range per csr
    regime     = Regime(executor: text, max_batch: int?)
    transposed = Transposed(column_order: int*, cscs: csc*, bin_ptr: int*)
    csc        = TileCsc(segment: int, col_ptr: int*, row_idx: int*, tiles: int*)

Everything is frozen; the primitives (`order`, `split_k`, `balance`, `executor`, `launch_with`)
return new schedules. Passes decide *what* to do and call these to do it.

Tile t of a csr is entry t of its segment's pools: payload is in row-major order of the tiles, so
a row's tiles are the contiguous range `row_ptr[row] .. row_ptr[row + 1]`. The transposed schedule, for
gradients, visits the same tiles of the same pools by tile column, from the top.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stoicc.ir.errors import InputError, brief
from stoicc.ir.options import is_whole

LAUNCH: dict[str, tuple[int, ...]] = {
    "block_n": (16, 32, 64, 128, 256),
    "gluon": (0, 1),
    "num_stages": tuple(range(1, 9)),
    "num_warps": (1, 2, 4, 8, 16),
    "prologue": (0, 1),
    "threads": tuple(1 << bit for bit in range(11)),
    "wgmma": (0, 1),
}
"""Launch parameters and what they may be: rows of the batch, stages of the load pipeline and warps per program; `gluon`
is 0 where NVIDIA GPUs shall run the portable dialect too; `prologue` is 1 where x shall be scaled and permuted in the
launch that multiplies on tensor cores, and 0 where in launches before it; `threads` is the most that tiles run on, on
a CPU; `wgmma` is 1 where Hopper GPUs shall multiply large batches by warpgroups, which no GPU has confirmed yet."""


@dataclass(frozen=True, slots=True)
class TileCsr:
    """The tiles of one segment by tile row: tile t stands at tile column `col_idx[t]`."""

    segment: int
    row_ptr: tuple[int, ...]
    col_idx: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TileCsc:
    """The tiles of one segment by tile column: entry e stands at tile row `row_idx[e]` and is tile `tiles[e]`."""

    segment: int
    col_ptr: tuple[int, ...]
    row_idx: tuple[int, ...]
    tiles: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Transposed:
    """How the product with the transposed weight runs: tile columns, over the payload of the tile rows.

    Attributes:
        column_order: tile columns in the order in which they run.
        cscs: one for each live segment, in the order of the csrs.
        bin_ptr: columns `column_order[bin_ptr[b] : bin_ptr[b + 1]]` are one unit of thread scheduling.
    """

    column_order: tuple[int, ...]
    cscs: tuple[TileCsc, ...]
    bin_ptr: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WorkItem:
    """A tile row, or part `part` of `parts` of one; a tile range of each csr, in csr order."""

    row: int
    part: int
    parts: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def tiles(self) -> int:
        return sum(end - begin for begin, end in self.ranges)


@dataclass(frozen=True, slots=True)
class Regime:
    """The executor for batches up to `max_batch` (None: any larger batch).

    `tiles` multiplies tile by tile from the payload; `dense-once` decodes panels of tiles to a
    bounded scratch buffer on each call and hands them to the vendor's GEMM; `vendor` keeps a matrix of dense or of
    2:4 tiles alone in the form of an NVIDIA library (`stoicc.ir.library`), which needs nothing decoded.
    """

    executor: str
    max_batch: int | None = None


EXECUTORS = ("tiles", "dense-once", "vendor")
EVERYWHERE = EXECUTORS[:2]
"""Those that every backend has for every matrix."""
PROLOGUE = ("input_scale", "column_permutation")
EPILOGUE = ("output_scale", "low_rank", "bias", "activation", "row_permutation")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a tile program runs. Fields are filled by passes; see the module docstring.

    Attributes:
        live: segments with work to do, in the order in which an executor visits them.
        csrs: one csr per live segment (empty until `build-csr`).
        row_order: tile rows in the order in which they run.
        items: work items in run order.
        bin_ptr: items `bin_ptr[b] .. bin_ptr[b + 1]` are one unit of thread scheduling.
        prologue, epilogue: what is fused into the executor, in the order it is applied.
        regimes: executors by batch size, ascending.
        launch: launch parameters by name, for backends that know them.
        transposed: the schedule of the gradient of x, where `build-csc` has run.
        applied: the passes that ran, as pipeline text; what was changed by hand since is not in it.
    """

    live: tuple[int, ...]
    row_order: tuple[int, ...]
    csrs: tuple[TileCsr, ...] = ()
    items: tuple[WorkItem, ...] = ()
    bin_ptr: tuple[int, ...] = ()
    prologue: tuple[str, ...] = ()
    epilogue: tuple[str, ...] = ()
    regimes: tuple[Regime, ...] = ()
    launch: tuple[tuple[str, int], ...] = ()
    transposed: Transposed | None = None
    applied: tuple[str, ...] = ()

    # -- primitives ------------------------------------------------------------------------

    def order(self, rows: Sequence[int]) -> "Schedule":
        """The same schedule with tile rows run in this order (a permutation of them)."""
        if not all(map(is_whole, rows)) or sorted(rows) != list(range(len(self.row_order))):
            raise InputError(
                f"schedule.order: expected a permutation of {len(self.row_order)} tile rows, "
                f"found {len(rows)} entries; name every tile row once"
            )
        rank = np.empty(len(rows), dtype=np.int64)
        rank[np.asarray(rows, dtype=np.int64)] = np.arange(len(rows))
        items = tuple(sorted(self.items, key=lambda item: (rank[item.row], item.part)))
        return replace(self, row_order=tuple(int(r) for r in rows), items=items, bin_ptr=_one_bin_each(len(items)))

    def split_k(self, parts: int | Sequence[int], costs: Sequence[float] | None = None) -> "Schedule":
        """Cut every tile row into up to `parts` work items of about equal cost.

        Args:
            parts: the most parts of a tile row; 1 undoes a split. A list holds one number for each
                tile row, in natural order, so that only heavy rows are cut.
            costs: cost of one tile of each csr (default: all alike).
        """
        wanted = self._parts_of_rows(parts)
        if not self.csrs and self.live:
            raise InputError("schedule.split_k: expected a csr per live segment, found none; run build-csr first")
        weights = self._weights("split_k", costs)
        items = tuple(item for row in self.row_order for item in self._split_row(row, wanted[row], weights))
        return replace(self, items=items, bin_ptr=_one_bin_each(len(items)))

    def balance(self, bins: int, costs: Sequence[float] | None = None) -> "Schedule":
        """Group neighbouring items into at most `bins` bins of about equal cost."""
        _check_whole("balance", "bins", bins, "1 puts all items in one")
        weights = self._weights("balance", costs)
        loads = np.array([item_cost(item, weights) for item in self.items])
        return replace(self, bin_ptr=cut_evenly(loads, bins))

    def executor(self, kind: str, batch: int | None = None) -> "Schedule":
        """Use executor `kind` for batches up to `batch` (None: for every larger batch)."""
        if kind not in EXECUTORS:
            raise InputError(f"schedule.executor: expected one of {', '.join(EXECUTORS)}, found {kind!r}")
        if batch is not None:
            _check_whole("executor", "batch", batch, "None means every larger batch")
        others = tuple(r for r in self.regimes if (r.max_batch or np.inf) > (batch or np.inf))
        below = tuple(r for r in self.regimes if (r.max_batch or np.inf) < (batch or np.inf))
        if batch is not None:
            return replace(self, regimes=(Regime(kind, batch), *others))
        return replace(self, regimes=(*below, Regime(kind)))

    def launch_with(self, **parameters: int) -> "Schedule":
        """Set launch parameters (the names and values of LAUNCH).

        Raises:
            InputError: another name, or a value that no kernel can be launched with.
        """
        for name, value in parameters.items():
            if name not in LAUNCH:
                raise InputError(
                    f"schedule.launch_with: expected {', '.join(LAUNCH)}, found {brief(repr(name))}; name one of them"
                )
            if not is_whole(value) or value not in LAUNCH[name]:
                raise InputError(
                    f"schedule.launch_with: expected {name} to be one of {', '.join(map(str, LAUNCH[name]))}, "
                    f"found {brief(repr(value))}; give one of them"
                )
        return replace(self, launch=tuple(sorted({**dict(self.launch), **parameters}.items())))

    # -- reading ---------------------------------------------------------------------------

    @property
    def max_parts(self) -> int:
        """The most parts that any tile row is cut into."""
        return max((item.parts for item in self.items), default=1)

    def regime(self, batch: int) -> str:
        """The executor kind for a batch of this many rows of x."""
        for entry in self.regimes:
            if entry.max_batch is None or batch <= entry.max_batch:
                return entry.executor
        return EXECUTORS[0]

    def __str__(self) -> str:
        from stoicc.ir.printer import print_schedule

        return print_schedule(self)

    def _parts_of_rows(self, parts: int | Sequence[int]) -> Sequence[int]:
        """The most parts of each tile row, in natural order."""
        rows = len(self.row_order)
        if not isinstance(parts, (list, tuple)):
            _check_whole("split_k", "parts", parts, "1 means no split")
            assert is_whole(parts)  # as was checked
            return [parts] * rows
        if len(parts) != rows or not all(is_whole(count) and count >= 1 for count in parts):
            raise InputError(
                f"schedule.split_k: expected parts from 1 for each of {rows} tile rows, found {brief(repr(parts))}; "
                "give one whole number a tile row, or one for all"
            )
        return parts

    def _weights(self, where: str, costs: Sequence[float] | None) -> list[float]:
        """A cost per csr: those given, or all alike."""
        if costs is None:
            return [1.0] * len(self.csrs)
        try:
            weights = [float(cost) for cost in costs]
        except (TypeError, ValueError):
            weights = [-1.0]
        if len(weights) != len(self.csrs) or not all(0 <= weight < 1e30 for weight in weights):
            raise InputError(
                f"schedule.{where}: expected a cost of 0 or more for each of {len(self.csrs)} csrs, "
                f"found {brief(repr(costs))}; give what one tile of each csr costs"
            )
        return weights

    def _split_row(self, row: int, parts: int, costs: Sequence[float]) -> list[WorkItem]:
        spans = [(csr.row_ptr[row], csr.row_ptr[row + 1]) for csr in self.csrs]
        if parts == 1 or not spans:
            return [WorkItem(row, 0, 1, tuple(spans))]
        weight = np.concatenate([np.full(end - begin, cost) for (begin, end), cost in zip(spans, costs, strict=True)])
        cuts = cut_evenly(weight, parts) if weight.size else (0, 0)
        count = len(cuts) - 1
        return [WorkItem(row, part, count, tuple(_clip(spans, cuts[part], cuts[part + 1]))) for part in range(count)]


def item_cost(item: WorkItem, costs: Sequence[float]) -> float:
    """Cost of an item: tiles of each csr times what one of them costs."""
    return sum((end - begin) * cost for (begin, end), cost in zip(item.ranges, costs, strict=True))


def entry_slots(rows: NDArray[np.int64], columns: NDArray[np.int64], span: int) -> NDArray[np.int64]:
    """The shared entry of each tile, for a plane that `span` neighbours of a tile row share.

    Args:
        rows, columns: tile coordinates in row-major order, `[tiles]`.
        span: tile columns c with equal c // span share; 0 shares over the whole row.

    Returns:
        int64 `[tiles]`: entries numbered in order of first appearance, without gaps.
    """
    if rows.size == 0:
        return np.zeros(0, dtype=np.int64)
    block = columns // span if span else np.zeros_like(columns)
    fresh = (np.diff(rows) != 0) | (np.diff(block) != 0)
    return np.concatenate([[0], np.cumsum(fresh)]).astype(np.int64)


def csr_rows(csr: TileCsr) -> NDArray[np.int64]:
    """The tile row of each tile of a csr, `[tiles]`."""
    return np.repeat(np.arange(len(csr.row_ptr) - 1), np.diff(csr.row_ptr)).astype(np.int64)


def _check_whole(where: str, what: str, value: object, way_out: str, least: int = 1) -> None:
    if not is_whole(value) or value < least:
        raise InputError(
            f"schedule.{where}: expected {what} to be a whole number from {least}, "
            f"found {brief(repr(value))}; {way_out}"
        )


def _one_bin_each(items: int) -> tuple[int, ...]:
    return tuple(range(items + 1))


def cut_evenly(loads: NDArray[np.float64], parts: int) -> tuple[int, ...]:
    """Boundaries of at most `parts` non-empty contiguous runs of about equal total load.

    An entry belongs to the part of the total that its middle falls in, at a boundary to the part above; a part
    that no middle falls in is none. Takes no memory for `parts`, of which there may be any number.
    """
    total = np.concatenate([[0.0], np.cumsum(loads)])
    if total[-1] <= 0:
        return (0, loads.size) if loads.size else (0,)
    middle = (total[:-1] + total[1:]) / 2
    part = np.minimum(np.floor(middle * parts / total[-1]), parts - 1)
    return (0, *(int(cut) + 1 for cut in np.nonzero(np.diff(part))[0]), loads.size)


def _clip(spans: Sequence[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    """The part [begin, end) of the concatenated spans, as a range within each span."""
    ranges, start = [], 0
    for first, last in spans:
        low = min(max(begin - start, 0), last - first)
        high = min(max(end - start, 0), last - first)
        ranges.append((first + low, first + high))
        start += last - first
    return ranges
