"""Why a tile has its format: what each other one would have cost in bytes, time and error."""

import math
from dataclasses import dataclass

from stoicc.codegen.reference import decode_tiles
from stoicc.ir.errors import InputError
from stoicc.ir.planes import PlaneSource
from stoicc.ir.types import TileProgram
from stoicc.ops._output import squared_output
from stoicc.policy.budget import CANDIDATES
from stoicc.policy.choose import Choice, relative
from stoicc.policy.seconds import Clock, tile_seconds
from stoicc.policy.table import TileTable, measure, why_not
from stoicc.tiling import to_tiles
from stoicc.weights import as_formats, on_cpu


@dataclass(frozen=True)
class FormatCost:
    """What a tile would cost in one format.

    Attributes:
        bytes: of the tile.
        time_us: that it adds to a call, as the cost model predicts.
        error: ||X E^T|| / ||X W^T||, with E the tile's error and W the whole weight; infinite where the tile
            cannot have the format.
    """

    format: str
    bytes: float
    time_us: float
    error: float


@dataclass(frozen=True, repr=False)
class Explanation:
    """A tile's formats, cheapest first; prints as a table.

    Attributes:
        row, column: of the tile in the grid.
        format: that the tile has.
        batch: rows of x that times are for.
        basis: what errors are measured with, in words.
        refused: formats that no tile could have, and why, in words.
    """

    row: int
    column: int
    format: str
    costs: tuple[FormatCost, ...]
    batch: int
    basis: str
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [
            f"tile ({self.row}, {self.column}): {self.format}; {self.basis}",
            f"  {'format':28s} {'bytes':>9s} {f'us, batch {self.batch}':>14s} {'error':>11s}",
        ]
        for cost in self.costs:
            mark, error = "*" if cost.format == self.format else " ", "cannot" if math.isinf(cost.error) else ""
            lines.append(
                f"{mark} {cost.format:28s} {cost.bytes:9,.0f} {cost.time_us:14.4f} {error or f'{cost.error:.3e}':>11s}"
            )
        lines += [f"  {name:28s} refused: {reason}" for name, reason in self.refused]
        return "\n".join(lines)

    __repr__ = __str__


@on_cpu
def explain(
    program: TileProgram, pools: PlaneSource, choice: Choice | None, row: int, column: int, backend: str, batch: int
) -> Explanation:
    """See `Kernel.explain`."""
    rows, columns = program.grid
    for what, at, extent in (("row", row, rows), ("column", column, columns)):
        if not isinstance(at, int) or not 0 <= at < extent:
            raise InputError(f"explain: expected a tile {what} from 0 to {extent - 1}, found {at!r}")
    number, format_ = row * columns + column, program.segments[int(program.map_array()[row, column])].format
    if choice is not None:
        table, energy, refused = choice.table, choice.energy, choice.refused
        basis = "errors are those that its budget weighed"
    else:
        number, table, energy, refused = _own_table(program, pools, row, column, format_)
        basis = "no budget: errors are those of what the kernel holds, all inputs alike"
    times = tile_seconds(table.formats, program.shape, program.tile, program.dtype, Clock.of(backend, batch)).per_tile
    costs = tuple(
        FormatCost(str(fmt), float(sizes), float(seconds * 1e6), relative(float(error), energy))
        for fmt, sizes, seconds, error in zip(
            table.formats, table.bytes[number], times, table.errors[number], strict=True
        )
    )
    return Explanation(row, column, format_, costs, batch, basis, refused)


def _own_table(
    program: TileProgram, pools: PlaneSource, row: int, column: int, own: str
) -> tuple[int, TileTable, float, tuple[tuple[str, str], ...]]:
    """The table of one tile of a kernel that no budget made: of the candidates that tiles can have alone."""
    values = decode_tiles(program, pools)
    tile = to_tiles(values, program.tile)[row * program.grid[1] + column]
    formats = dict.fromkeys(as_formats((own, *CANDIDATES)))
    why = {fmt: why_not(fmt, program.tile, program.dtype) for fmt in formats}
    alone = [fmt for fmt, reason in why.items() if reason is None]
    refused = tuple((str(fmt), reason) for fmt, reason in why.items() if reason is not None)
    return 0, measure(tile, alone, program.tile, None), squared_output(values, None), refused
