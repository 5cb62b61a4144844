"""What a kernel holds, counted: tiles and bytes per format, and the speed that bytes allow."""

from dataclasses import dataclass
from math import prod

from stoicc.ir.dtypes import itemsize
from stoicc.ir.types import Pool, TileProgram


@dataclass(frozen=True)
class FormatStats:
    """Tiles and payload bytes of one format."""

    format: str
    tiles: int
    bytes: int


@dataclass(frozen=True, repr=False)
class KernelStats:
    """Counts of one kernel; `str()` is a table.

    Attributes:
        formats: per format, in segment order.
        payload_bytes: canonical planes of all tiles, padding of tail tiles included.
        beside_bytes: bias, factors, scales and permutations.
        packed_bytes: what executors keep, once they have run: planes in SIMD order, work items. The
            canonical planes that they packed are let go, unless somebody holds them.
        resident_bytes: all that the kernel holds now: buffers and packed_bytes.
        scratch_bytes: the most that one call took beside that so far, and gave back.
        dense_bytes: the same matrix stored dense in the weight's dtype.
        padding: share of the tiles' area that lies outside the matrix.
        bytes_per_weight: payload and beside, over M x K.
        byte_bound: how much faster than a dense read the payload can be read at best.
        dialect: on GPUs, which dialect of Triton multiplies and why; "" elsewhere.
    """

    formats: tuple[FormatStats, ...]
    payload_bytes: int
    beside_bytes: int
    packed_bytes: int
    resident_bytes: int
    scratch_bytes: int
    dense_bytes: int
    padding: float
    bytes_per_weight: float
    byte_bound: float
    dialect: str = ""

    def __str__(self) -> str:
        tiles = sum(entry.tiles for entry in self.formats)
        rows = [(entry.format, f"{entry.tiles:d}", f"{entry.tiles / tiles:.1%}", entry.bytes) for entry in self.formats]
        rows.append(("bias, scales, factors, orders", "", "", self.beside_bytes))
        lines = [f"{'format':30s} {'tiles':>8s} {'share':>7s} {'bytes':>13s}"]
        lines += [f"{name:30s} {count:>8s} {share:>7s} {size:13,d}" for name, count, share, size in rows]
        lines.append(
            f"{self.bytes_per_weight:.3f} bytes per weight; the bytes allow {self.byte_bound:.2f}x of dense speed"
        )
        if self.packed_bytes:
            lines.append(
                f"resident {self.resident_bytes:,d} bytes, {self.packed_bytes:,d} of them packed for executors; "
                f"scratch of a call {self.scratch_bytes:,d}"
            )
        if self.dialect:
            lines.append(f"runs in {self.dialect}")
        if self.padding > 0.05:
            lines.append(f"{self.padding:.0%} of the tiles' area is padding; a smaller tile wastes less")
        return "\n".join(lines)

    __repr__ = __str__


def kernel_stats(program: TileProgram, packed: int, resident: int, scratch: int, dialect: str = "") -> KernelStats:
    """Count a program's pools; what executors keep, all that is held, scratch and the dialect come from the kernel."""
    formats = tuple(
        FormatStats(segment.format, segment.count, sum(map(_nbytes, segment.pools))) for segment in program.segments
    )
    payload = sum(entry.bytes for entry in formats)
    beside = sum(map(_nbytes, program.beside.pools()))
    weights = program.shape[0] * program.shape[1]
    dense = weights * itemsize(program.dtype)
    return KernelStats(
        formats,
        payload,
        beside,
        packed,
        resident,
        scratch,
        dense,
        1 - weights / (program.grid[0] * program.tile[0] * program.grid[1] * program.tile[1]),
        (payload + beside) / weights,
        dense / (payload + beside) if payload + beside else float("inf"),
        dialect,
    )


def _nbytes(pool: Pool) -> int:
    return prod(pool.shape) * itemsize(pool.dtype)
