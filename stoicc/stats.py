"""What a kernel holds, counted: tiles and bytes per format, and the speed that bytes allow."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from stoicc.codegen.executor import Executor
from stoicc.ir.dtypes import itemsize
from stoicc.ir.types import TileProgram


@dataclass(frozen=True)
class FormatStats:
    """Tiles and payload bytes of one format."""

    format: str
    tiles: int
    bytes: int


@dataclass(frozen=True)
class KernelStats:
    """Counts of one kernel; `str()` is a table.

    Attributes:
        formats: per format, in segment order.
        payload_bytes: canonical planes of all tiles.
        beside_bytes: bias, factors, scales and permutations.
        packed_bytes: repacked planes that executors keep beside the canonical ones.
        dense_bytes: the same matrix stored dense in the weight's dtype.
        bytes_per_weight: payload and beside, over M x K.
        byte_bound: how much faster than a dense read the payload can be read at best.
    """

    formats: tuple[FormatStats, ...]
    payload_bytes: int
    beside_bytes: int
    packed_bytes: int
    dense_bytes: int
    bytes_per_weight: float
    byte_bound: float

    def __str__(self) -> str:
        tiles = sum(entry.tiles for entry in self.formats)
        lines = [f"{'format':28s} {'tiles':>8s} {'share':>7s} {'bytes':>12s}"]
        lines += [
            f"{entry.format:28s} {entry.tiles:8d} {entry.tiles / tiles:7.1%} {entry.bytes:12,d}"
            for entry in self.formats
        ]
        lines.append(f"{'beside the tiles':28s} {'':8s} {'':7s} {self.beside_bytes:12,d}")
        lines.append(f"{'repacked for executors':28s} {'':8s} {'':7s} {self.packed_bytes:12,d}")
        lines.append(
            f"{self.bytes_per_weight:.3f} bytes per weight; at most {self.byte_bound:.2f}x a dense read "
            f"({self.dense_bytes:,d} bytes)"
        )
        return "\n".join(lines)


def kernel_stats(program: TileProgram, pools: Mapping[str, Tensor], executors: Mapping[str, Executor]) -> KernelStats:
    """Count a program's pools and what its executors keep."""
    formats = tuple(
        FormatStats(segment.format, segment.count, sum(pools[pool.name].nbytes for pool in segment.pools))
        for segment in program.segments
    )
    payload = sum(entry.bytes for entry in formats)
    beside = sum(pools[pool.name].nbytes for pool in program.beside.pools())
    weights = program.shape[0] * program.shape[1]
    dense = weights * itemsize(program.dtype)
    return KernelStats(
        formats,
        payload,
        beside,
        sum(executor.resident_bytes for executor in executors.values()),
        dense,
        (payload + beside) / weights,
        dense / (payload + beside) if payload + beside else float("inf"),
    )
