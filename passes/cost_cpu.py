"""The cost model of a CPU: measured constants of its executors, and what a schedule makes of them.

A call of the tiles executor is predicted as

    call + packing of x + (when the last thread is done with its bins) + joining of split rows

where an item takes the measured seconds of its tiles by format, dtype, tile shape and batch, and what the
executor waits for their bytes where these come from beyond the cache. Threads take the next bin when they are
free, as they do in the executor, and are together no faster than the cores and the memory that they share. A
call of the dense-once executor is predicted as

    call + reading and decoding of every tile + multiply-adds at the measured rate of the BLAS
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from stoicc.ir.format import TileFormat
from stoicc.ir.registry import find_format
from stoicc.ir.schedule import Schedule
from stoicc.ir.types import Module, Segment, TileProgram
from stoicc.passes.cost_model import CostModel, Prediction, bin_loads, checked, item_tiles, makespan
from stoicc.passes.costs import segment_cost

Curve = Mapping[int, float]
"""A quantity by batch, by threads or by working set in bytes, at the points where it was measured."""

Key = tuple[str, str, int, int]
"""What tile seconds are measured for: format text, weight dtype, BM, BK."""


@dataclass(frozen=True)
class CpuConstants:
    """What was measured on a device; every rate of compute is that of one thread.

    Attributes:
        source: "measured", or "built-in" for the defaults of this file.
        call: seconds of a call that does nothing, by threads.
        bandwidth: by threads, bytes read per second by working set in bytes; smaller sets than the smallest are
            read within the time of `tiles`, which is measured in cache.
        tiles: by key, seconds of a tile by batch.
        exposed: by "<format>|<dtype>", how much of the time to read a tile from beyond the cache comes on top of that
            of its arithmetic: 0 where the two overlap, 1 where they do not.
        items: by weight dtype, seconds of a work item per row of its tile by batch: sums cleared, y written.
        pack: by dtype of x, seconds per column of x by batch.
        join: seconds per row of each part of a split tile row, by batch.
        join_call: seconds that a call takes longer where any tile row is split, by threads.
        speedup: by threads, how much faster than one a kernel runs that is bound by compute.
        decode: by key, seconds per weight that dense-once decodes.
        decode_speedup: as `speedup`, for decoding, which writes as much as it computes.
        gemm: by dtype of x, by threads, seconds per multiply-add of dense-once by batch.
        gemm_call: by dtype of x, by threads, seconds that a call of dense-once takes besides, by batch
            (one point where it was measured to be alike at all).
    """

    source: str
    call: Curve
    bandwidth: Mapping[int, Curve]
    tiles: Mapping[Key, Curve]
    exposed: Mapping[str, float]
    items: Mapping[str, Curve]
    pack: Mapping[str, Curve]
    join: Curve
    join_call: Curve
    speedup: Curve
    decode: Mapping[Key, float]
    decode_speedup: Curve
    gemm: Mapping[str, Mapping[int, Curve]]
    gemm_call: Mapping[str, Mapping[int, Curve]]

    def joined(
        self, tiles: Mapping[Key, Curve], exposed: Mapping[str, float], decode: Mapping[Key, float]
    ) -> "CpuConstants":
        """The same constants and those of formats that were met since."""
        return replace(
            self,
            tiles={**self.tiles, **tiles},
            exposed={**self.exposed, **exposed},
            decode={**self.decode, **decode},
        )


Measure = Callable[[TileFormat, str, tuple[int, int]], "CpuConstants | None"]
"""Measures a format at a dtype and tile shape when it is first met: new constants, or None where it cannot."""


@dataclass
class CpuCostModel(CostModel):
    """Predicts from constants; formats without any are measured by `measure`, or estimated from `TileFormat.cost`.

    Attributes:
        constants: of the device.
        measure: called once for each format, dtype and tile shape that the constants do not hold.
        beside_bytes: what else is read between two calls, such as a model's other layers. 0: the weight
            stays in the cache that it fits.
    """

    constants: CpuConstants
    measure: Measure | None = None
    beside_bytes: int = 0
    target: str = "cpu"
    margin: ClassVar[float] = 1.15
    """A BLAS on large weights out of the cache is foretold too fast: `python -m bench.crossover` shows the picks."""
    uneven: ClassVar[float] = 0.04
    """By how much threads end apart that would end together: one is woken later, or shares its core. But a thread that
    is free takes the next bin, so by no more than half a bin: 16 bins take up to a tenth longer than 50."""
    _refused: set[Key] = field(default_factory=set, repr=False)

    def predict(self, module: Module, batch: int, x_dtype: str, threads: int = 1) -> Prediction:
        schedule = checked(module, batch, threads)
        if schedule.regime(batch) == "dense-once":
            return self._dense_once(module, batch, x_dtype, threads)
        return self._tiles(module, schedule, batch, x_dtype, threads)

    # -- executors -------------------------------------------------------------------------

    def _tiles(self, module: Module, schedule: Schedule, batch: int, x_dtype: str, threads: int) -> Prediction:
        program, constants = module.tiles, self.constants
        threads = min(threads, dict(schedule.launch).get("threads", threads))
        counts = item_tiles(schedule)
        segments = [program.segments[csr.segment] for csr in schedule.csrs]
        tile_seconds = np.array([self._tile_seconds(program, segment, batch) for segment in segments])
        tile_bytes = np.array([segment_cost(program, segment) for segment in segments])
        tile_seconds += [self._rereading(program, batch) * bool(segment.pools) for segment in segments]
        own = program.tile[0] * for_batch(constants.items[_known(program.dtype, constants.items)], batch)
        compute, item_bytes = counts @ tile_seconds + own, counts @ tile_bytes
        payload = float(item_bytes.sum())
        waiting = counts @ (tile_bytes * [self._exposed(program, segment) for segment in segments])
        alone = self._bandwidth(payload, 1)
        loads = np.maximum(compute + waiting / alone, item_bytes / alone)
        bins = bin_loads(schedule, loads)
        # what no distribution over threads can beat: the cores together, and the memory that they share
        workers = max(1, min(threads, len(bins)))
        speedup, shared = at(constants.speedup, workers), self._bandwidth(payload, workers)
        read = max(payload, float(waiting.sum())) / shared
        bound = max(float(loads.sum()) / workers, float(compute.sum()) / speedup + float(waiting.sum()) / shared, read)
        beside = for_batch(constants.pack[_known(x_dtype, constants.pack)], batch) * program.grid[1] * program.tile[1]
        beside += self._low_rank(program, batch)
        parts = sum(1 for item in schedule.items if item.parts > 1)
        call = at(constants.call, threads) + (at(constants.join_call, threads) if parts else 0.0)
        return Prediction.of(
            bytes=read,
            compute=bound - read,
            imbalance=self._imbalance(bins, workers, bound, 1 - alone / shared if alone < shared < math.inf else 0.0),
            reduction=self._reduction(program, parts, batch, threads),
            overhead=call + beside / speedup,
        )

    def _imbalance(self, bins: NDArray[np.float64], workers: int, bound: float, left: float) -> float:
        """How long after `bound` the last thread is done with its bins.

        Args:
            left: the share of the memory's rate that one thread leaves unused. Where memory is the bound, that much of
                the time is lost in which the last thread reads alone.
        """
        end, filled = makespan(bins, workers), bins[bins > 0]
        apart = min(self.uneven * end, float(filled.mean()) / 2) if len(filled) else 0.0
        most = max(0.0, float(bins.sum()) - bound)  # one thread alone would take no longer
        return min(most, max(0.0, end + apart - bound, apart * left))

    def _dense_once(self, module: Module, batch: int, x_dtype: str, threads: int) -> Prediction:
        program, constants = module.tiles, self.constants
        area = program.tile[0] * program.tile[1]
        decode = sum(segment.count * area * self._decode_seconds(program, segment) for segment in program.segments)
        payload = sum(segment.count * segment_cost(program, segment) for segment in program.segments)
        reading = payload / self._bandwidth(payload, threads)
        macs = program.shape[0] * program.shape[1] * batch
        if program.beside.low_rank is not None:
            macs += program.beside.low_rank[0].shape[1] * sum(program.shape) * batch
        dtype = _known(x_dtype, constants.gemm)
        seconds, call = (
            at({count: at(curve, batch) for count, curve in curves[dtype].items()}, threads)
            for curves in (constants.gemm, constants.gemm_call)
        )
        return Prediction.of(
            bytes=reading,
            decode=decode / at(constants.decode_speedup, threads),
            gemm=macs * seconds,
            overhead=at(constants.call, threads) + call,
        )

    # -- pieces ----------------------------------------------------------------------------

    def _tile_seconds(self, program: TileProgram, segment: Segment, batch: int) -> float:
        """Seconds of one tile in cache, on one thread."""
        fmt = segment.resolve()
        if not fmt.planes(program.tile, program.dtype):
            return 0.0
        self._meet(fmt, program)
        key = (str(fmt), program.dtype, *program.tile)
        curve = self.constants.tiles.get(key)
        if curve is not None:
            return for_batch(curve, batch)
        nearest = nearest_key(key, self.constants.tiles)
        scale = program.tile[0] * program.tile[1] / (nearest[2] * nearest[3])
        return scale * for_batch(self.constants.tiles[nearest], batch) * _work_ratio(fmt, nearest, program, batch)

    def _decode_seconds(self, program: TileProgram, segment: Segment) -> float:
        """Seconds per weight that dense-once decodes; of a format that nobody measured, those of the slowest."""
        fmt = segment.resolve()
        if fmt.planes(program.tile, program.dtype):
            self._meet(fmt, program)
        known = self.constants.decode
        key = nearest_key((str(fmt), program.dtype, *program.tile), known)
        if key[0].partition("<")[0] != fmt.name:
            return max(known.values())
        return known[key]

    def _meet(self, fmt: TileFormat, program: TileProgram) -> None:
        """Measure a format that is new to the constants, once."""
        key = (str(fmt), program.dtype, *program.tile)
        if self.measure is None or key in self.constants.tiles or key in self._refused:
            return
        measured = self.measure(fmt, program.dtype, program.tile)
        if measured is None:
            self._refused.add(key)
        else:
            self.constants = measured

    def _exposed(self, program: TileProgram, segment: Segment) -> float:
        """How much of the time to read a format's bytes is added to its arithmetic."""
        name, _, _ = segment.format.partition("<")
        names = (f"{segment.format}|{program.dtype}", f"{name}|{program.dtype}")
        return next((self.constants.exposed[known] for known in names if known in self.constants.exposed), 1.0)

    def _rereading(self, program: TileProgram, batch: int) -> float:
        """Seconds that a tile waits for its columns of x, where x is more than the innermost caches hold.

        Each tile row reads all of x again. With bf16 weights several rows share what is in the cache.
        """
        x_bytes = 4 * batch * program.shape[1]
        curve = self.constants.bandwidth[min(self.constants.bandwidth)]
        if program.dtype == "bf16" or x_bytes < min(curve):
            return 0.0
        return 4 * batch * program.tile[1] / by_size(curve, x_bytes)

    def _bandwidth(self, payload: float, threads: int) -> float:
        """Bytes a second that all threads read together; infinite for a set within the innermost cache."""
        by_threads = self.constants.bandwidth
        working_set = payload + self.beside_bytes
        if working_set < min(min(curve) for curve in by_threads.values()):
            return math.inf
        return at({count: by_size(curve, working_set) for count, curve in by_threads.items()}, threads)

    def _reduction(self, program: TileProgram, parts: int, batch: int, threads: int) -> float:
        """Adding partial sums of split rows: each part is written once and read once."""
        rows = parts * program.tile[0]
        return rows * for_batch(self.constants.join, batch) / at(self.constants.speedup, threads)

    def _low_rank(self, program: TileProgram, batch: int) -> float:
        """Two thin products in fp32, at the rate of dense tiles."""
        if program.beside.low_rank is None:
            return 0.0
        rank = program.beside.low_rank[0].shape[1]
        key = nearest_key(("dense", "f32", *program.tile), self.constants.tiles)
        return rank * sum(program.shape) * for_batch(self.constants.tiles[key], batch) / (key[2] * key[3])


# -- curves ------------------------------------------------------------------------------------


def at(curve: Curve, point: float) -> float:
    """A curve's value: on the line between the neighbours of a point, level outside."""
    points = sorted(curve)
    return float(np.interp(point, points, [curve[p] for p in points]))


def for_batch(curve: Curve, batch: int) -> float:
    """Seconds by batch; in proportion to the batch past the last one that was measured."""
    last = max(curve)
    return curve[last] * batch / last if batch > last else at(curve, batch)


def by_size(curve: Curve, size: float) -> float:
    """A curve over sizes in bytes, its lines drawn over their logarithm."""
    points = sorted(curve)
    return float(np.interp(math.log2(max(size, 1.0)), [math.log2(p) for p in points], [curve[p] for p in points]))


def nearest_key(key: Key, known: Iterable[Key]) -> Key:
    """The measured key most like one that is not: its format, dtype, options and shape count, in this order."""
    return min(known, key=lambda other: _unlike(key, other))


def _unlike(key: Key, other: Key) -> tuple[bool, bool, bool, float]:
    shape = abs(math.log(key[2] / other[2])) + abs(math.log(key[3] / other[3]))
    same_name = key[0].partition("<")[0] == other[0].partition("<")[0]
    return not same_name, key[1] != other[1], key[0] != other[0], shape


def _known(dtype: str, known: Mapping[str, object]) -> str:
    """This dtype, or else f32 or what there is."""
    return next(name for name in (dtype, "f32", *known) if name in known)


def _work_ratio(fmt: TileFormat, key: Key, program: TileProgram, batch: int) -> float:
    """What a weight of a format costs to one of the measured format: multiply-adds and decode operations."""
    if fmt.name == key[0].partition("<")[0]:
        return 1.0
    shape = (key[2], key[3])
    own, other = fmt.cost(program.tile, program.dtype), find_format(key[0]).cost(shape, key[1])
    work = (own.macs * batch + own.decode_ops) / (program.tile[0] * program.tile[1])
    return work / max((other.macs * batch + other.decode_ops) / (shape[0] * shape[1]), 1e-9)
