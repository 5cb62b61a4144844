"""What tiles cost, in bytes, for the passes that weigh them."""

import numpy as np
from numpy.typing import NDArray

from stoicc.ir.schedule import Schedule
from stoicc.ir.types import Segment, TileProgram


def segment_cost(program: TileProgram, segment: Segment) -> float:
    """Bytes of one tile of a segment; the mean where its tiles differ."""
    if segment.tile_bytes:
        return float(np.mean(segment.tile_bytes))
    return float(segment.resolve().cost(program.tile, program.dtype).bytes)


def tile_costs(program: TileProgram) -> NDArray[np.float64]:
    """Bytes of every tile, `[tile rows, tile columns]`."""
    tile_map = program.map_array()
    per_segment = np.array([segment_cost(program, segment) for segment in program.segments])
    costs: NDArray[np.float64] = per_segment[tile_map]
    for index, segment in enumerate(program.segments):
        if segment.tile_bytes:
            costs[tile_map == index] = segment.tile_bytes
    return costs


def csr_costs(program: TileProgram, schedule: Schedule) -> list[float]:
    """Bytes of one tile of each csr, in csr order: what `Schedule.split_k` and `balance` take."""
    return [segment_cost(program, program.segments[csr.segment]) for csr in schedule.csrs]


def row_costs(program: TileProgram, schedule: Schedule) -> NDArray[np.float64]:
    """Bytes that each tile row reads, `[tile rows]`: its tiles of all live segments."""
    live = np.isin(program.map_array(), schedule.live)
    costs: NDArray[np.float64] = np.where(live, tile_costs(program), 0.0).sum(axis=1)
    return costs
