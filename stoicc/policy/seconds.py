"""Predicted time of a tile in each format, from the cost model of the target."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stoicc.device_constants import cost_model
from stoicc.ir.format import Plane, PlaneKind, TileFormat
from stoicc.ir.planes import entry_count, pool_name
from stoicc.ir.types import Beside, Module, Pool, Segment, TileProgram
from stoicc.passes import default_pipeline, initial_schedule
from stoicc.passes.cost_model import CostModel


@dataclass(frozen=True, eq=False)
class TileSeconds:
    """Seconds of one call: `fixed` whatever the formats are, and `[F]` more for each tile of each."""

    fixed: float
    per_tile: NDArray[np.float64]


def tile_seconds(
    formats: tuple[TileFormat, ...], shape: tuple[int, int], tile: tuple[int, int], dtype: str, clock: "Clock"
) -> TileSeconds:
    """Predict the whole matrix in one format after the other; a tile's share of what each adds is its time."""
    nothing = clock.seconds(_uniform("empty", shape, tile, dtype))
    tiles = -(-shape[0] // tile[0]) * -(-shape[1] // tile[1])
    found = []
    for fmt in formats:
        if fmt.planes(tile, dtype):
            found.append(max(clock.seconds(_uniform(str(fmt), shape, tile, dtype)) - nothing, 0.0) / tiles)
        else:
            found.append(0.0)
    return TileSeconds(nothing, np.array(found))


@dataclass(frozen=True)
class Clock:
    """Predicts calls at one batch.

    Attributes:
        model: of the device, with measured constants where they are stored.
        target: of the pipeline: "cpu" or "triton".
    """

    model: CostModel
    target: str
    batch: int
    threads: int

    @staticmethod
    def of(target: str, batch: int, measure: bool = False) -> "Clock":
        """The clock of a pipeline's target; the reference backend is timed as a CPU. `measure`: see `cost_model`."""
        import torch

        name = "triton" if target == "triton" else "cpu"
        return Clock(cost_model(name, measure=measure), name, batch, torch.get_num_threads())

    def seconds(self, program: TileProgram) -> float:
        """Of one call, scheduled as the target's pipeline does."""
        module = Module(program, initial_schedule(program))
        scheduled = default_pipeline(self.target).run(module)
        return self.model.predict(scheduled, self.batch, program.dtype, self.threads).seconds


def program_of(
    formats: tuple[TileFormat, ...],
    choice: NDArray[np.int64],
    shape: tuple[int, int],
    tile: tuple[int, int],
    dtype: str,
) -> TileProgram:
    """A program of these tiles without contents, for predictions."""
    used, numbers = np.unique(choice, return_inverse=True)
    grid = -(-shape[0] // tile[0]), -(-shape[1] // tile[1])
    tile_map = numbers.reshape(grid)
    segments = tuple(_segment(formats[index], number, tile_map, tile, dtype) for number, index in enumerate(used))
    return TileProgram("budget", shape, tile, dtype, segments, tuple(tile_map.ravel().tolist()), Beside())


def _uniform(text: str, shape: tuple[int, int], tile: tuple[int, int], dtype: str) -> TileProgram:
    fmt = Segment(text, 0).resolve()
    tiles = -(-shape[0] // tile[0]) * -(-shape[1] // tile[1])
    return program_of((fmt,), np.zeros(tiles, dtype=np.int64), shape, tile, dtype)


def _segment(fmt: TileFormat, number: int, tile_map: NDArray[np.int64], tile: tuple[int, int], dtype: str) -> Segment:
    rows, columns = np.nonzero(tile_map == number)
    planes = fmt.planes(tile, dtype)
    pools = tuple(pool for plane in planes for pool in _pools(plane, number, rows, columns))
    ragged = any(plane.kind is PlaneKind.RAGGED for plane in planes)
    sizes = (round(fmt.cost(tile, dtype).bytes),) * len(rows) if ragged else ()
    return replace(Segment(str(fmt), len(rows), pools), tile_bytes=sizes)


def _pools(plane: Plane, number: int, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> list[Pool]:
    name, count = pool_name(number, plane.name), entry_count(plane, rows, columns)
    if plane.kind is PlaneKind.RAGGED:
        return [
            Pool(name, plane.dtype, (0, *plane.shape), ""),
            Pool(f"{name}_ptr", "i64", (len(rows) + 1,), ""),
        ]
    return [Pool(name, plane.dtype, (count, *plane.shape), "")]
