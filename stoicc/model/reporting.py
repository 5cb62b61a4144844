"""A model's kernels as a table: what each layer became, and what that cost."""

from dataclasses import dataclass
from math import prod
from os import PathLike
from pathlib import Path

from torch import nn

from stoicc.ir.errors import InputError
from stoicc.kernel import Kernel
from stoicc.model.saving import read_kernels
from stoicc.record import LayerRecord


@dataclass(frozen=True)
class LayerRow:
    """One kernel of a model.

    Attributes:
        shape: `(M, K)`.
        formats: tiles by format.
        bytes: of all planes and of what stands beside them.
        dense_bytes: of the dense weight, with the rows and columns that width pruning took out.
    """

    name: str
    shape: tuple[int, int]
    formats: tuple[tuple[str, int], ...]
    bytes: int
    dense_bytes: int
    record: LayerRecord | None = None

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.bytes / (self.shape[0] * self.shape[1])

    @property
    def shares(self) -> str:
        """Formats with their share of the tiles, the largest first."""
        total = sum(count for _, count in self.formats)
        ordered = sorted(self.formats, key=lambda entry: -entry[1])
        return ", ".join(name if count == total else f"{name} {count / total:.0%}" for name, count in ordered)


@dataclass(frozen=True, repr=False)
class Report:
    """The kernels of a model; `str()` is a table, a row per layer."""

    rows: tuple[LayerRow, ...]

    @property
    def bytes(self) -> int:
        """Of all kernels."""
        return sum(row.bytes for row in self.rows)

    @property
    def dense_bytes(self) -> int:
        """Of the dense weights that they replace."""
        return sum(row.dense_bytes for row in self.rows)

    def __str__(self) -> str:
        header = ("layer", "shape", "operators", "formats", "bits/w", "bytes", "error", "s")
        table = [header, *(_cells(row) for row in self.rows), self._total()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        text = ("layer", "operators", "formats")
        sides = [f"{'<' if title in text else '>'}{width}" for title, width in zip(header, widths, strict=True)]
        lines = ["  ".join(f"{cell:{side}}" for cell, side in zip(line, sides, strict=True)) for line in table]
        notes = [f"{row.name}: {note}" for row in self.rows if row.record for note in row.record.notes]
        return "\n".join(line.rstrip() for line in [*lines, *notes])

    __repr__ = __str__

    def _total(self) -> tuple[str, ...]:
        weights = sum(row.shape[0] * row.shape[1] for row in self.rows)
        seconds = sum(row.record.seconds for row in self.rows if row.record is not None)
        bits = f"{8 * self.bytes / weights:.2f}" if weights else ""
        name = f"all {len(self.rows)}, dense {self.dense_bytes:,d} bytes"
        return (name, "", "", "", bits, f"{self.bytes:,d}", "", f"{seconds:.1f}")


def report(model: nn.Module) -> Report:
    """A row for each kernel of a model, in its order; a kernel that stands at several names is one row.

    Raises:
        InputError: a model without kernels.
    """
    rows = [row_of(name, module) for name, module in model.named_modules() if isinstance(module, Kernel)]
    if not rows:
        raise InputError(
            f"report: expected a model with compiled layers, found none in {type(model).__name__}; see stoicc.compress"
        )
    return Report(tuple(rows))


def report_folder(folder: str | PathLike[str]) -> Report:
    """The table of a model that `save_model` wrote.

    Raises:
        InputError: no such folder, or a damaged one.
    """
    kernels = {kernel: name for name, kernel in reversed(read_kernels(Path(folder), on_missing="dense").items())}
    return Report(tuple(row_of(name, kernel) for kernel, name in reversed(kernels.items())))


def row_of(name: str, kernel: Kernel) -> LayerRow:
    """What a kernel holds, and what was noted about it."""
    stats = kernel.stats()
    formats = tuple((entry.format, entry.tiles) for entry in stats.formats)
    stored = stats.payload_bytes + stats.beside_bytes
    shape, dense = kernel.program.shape, stats.dense_bytes
    if kernel.record is not None and kernel.record.narrowed_from is not None:
        dense = dense // prod(shape) * prod(kernel.record.narrowed_from)
    return LayerRow(name, shape, formats, stored, dense, kernel.record)


def _cells(row: LayerRow) -> tuple[str, ...]:
    record = row.record
    return (
        row.name,
        " of ".join(f"{shape[0]} x {shape[1]}" for shape in (row.shape, record and record.narrowed_from) if shape),
        " > ".join(record.steps) if record is not None else "",
        row.shares,
        f"{row.bits:.2f}",
        f"{row.bytes:,d}",
        f"{record.error:.4f}" if record is not None and record.error is not None else "",
        f"{record.seconds:.1f}" if record is not None else "",
    )
