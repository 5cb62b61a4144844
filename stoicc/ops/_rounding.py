"""Rounding inside a sweep: to codes on a grid per group of columns, kept as they are decided, or to small floats."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stoicc.formats._affine import finite_scale
from stoicc.formats._table import nearest_float, power_scales
from stoicc.ir.errors import InputError
from stoicc.ir.lattice import SmallFloat
from stoicc.ops._uniform import check_bits, steps
from stoicc.ops.graph import Quantize

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)
"""Shares of a group's range that are tried where it may be clipped."""


@dataclass(frozen=True)
class CodeOptions:
    """Checked options of a grid.

    Attributes:
        group_size: columns that share a scale, 0 for the row.
        clip: let a group's range be narrower than its weights where that lowers their squared error.
    """

    bits: int = 4
    group_size: int = 128
    zero_points: bool = False
    clip: bool = True

    @staticmethod
    def of(who: str, bits: int, group_size: int, columns: int, zero_points: bool, clip: bool) -> "CodeOptions":
        """InputError where bits or group size are none. A group that ends with the row and may not meet a tile is 0."""
        check_bits(bits, who)
        if not isinstance(group_size, int) or group_size < 0:
            raise InputError(f"{who}: expected group_size >= 0 (0 is the whole row), found {group_size!r}")
        whole_row = group_size > columns or (group_size == columns and columns % 64 != 0)
        return CodeOptions(bits, 0 if whole_row else group_size, bool(zero_points), bool(clip))

    def __str__(self) -> str:
        return f"int{self.bits}, group {self.group_size or 'row'}{', zero points' * self.zero_points}"


@dataclass(frozen=True, eq=False)
class ToCodes:
    """Codes (code - zero) * scale for K columns of M weights, found group by group.

    Attributes:
        importance: `[K]`, what a squared error counts where a range is chosen.
        columns: `[K]` int64, the column of the weight that the sweep meets at each step.
        codes: uint8 `[K, M]`, in the order of the weight.
        scales: `[groups, M]` in the weight's dtype.
        zeros: uint8 `[groups, M]`, or None where codes are symmetric.
        found: the grids are there already, and `begin` leaves them.
    """

    options: CodeOptions
    importance: Tensor
    columns: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    found: bool = False

    @staticmethod
    def empty(options: CodeOptions, weight: Tensor, importance: Tensor) -> "ToCodes":
        """Room for the codes of a weight `[M, K]`."""
        rows, columns = weight.shape
        groups = -(-columns // (options.group_size or columns))
        codes = torch.zeros(columns, rows, dtype=torch.uint8)
        scales = torch.zeros(groups, rows, dtype=weight.dtype)
        zeros = torch.zeros(groups, rows, dtype=torch.uint8) if options.zero_points else None
        return ToCodes(options, importance, torch.arange(columns), codes, scales, zeros)

    @property
    def span(self) -> int:
        """Columns that share a grid."""
        return 1 if self.found else self.options.group_size or len(self.codes)

    def begin(self, column: int, values: Tensor) -> None:
        """The grid with the least squared error of the group from `column` on, from its weights `[columns, M]`."""
        group = column // self.span
        best = torch.full_like(values[0], torch.inf)
        importance = self.importance[column : column + len(values), None]
        for ratio in RATIOS if self.options.clip else RATIOS[:1]:
            scale, zero = self._grid(values, ratio)
            error = ((self._nearest(values, scale, zero)[1] - values).square_() * importance).sum(0)
            better = error < best
            best = torch.where(better, error, best)
            self.scales[group] = torch.where(better, scale, self.scales[group])
            if self.zeros is not None:
                self.zeros[group] = torch.where(better, zero.to(torch.uint8), self.zeros[group])

    def round(self, column: int, values: Tensor) -> Tensor:
        """Codes of one column `[M]`, kept; and what they stand for."""
        place = int(self.columns[column])
        group = place // (self.options.group_size or len(self.codes))
        zero = self._middle() if self.zeros is None else self.zeros[group].to(values.dtype)
        codes, rounded = self._nearest(values, self.scales[group], zero)
        self.codes[place] = codes.to(torch.uint8)
        return rounded

    def node(self, what: str) -> Quantize:
        """All weights as these codes."""
        zeros = None if self.zeros is None else self.zeros.T.contiguous()
        codes, scales = self.codes.T.contiguous(), self.scales.T.contiguous()
        everywhere = torch.ones(codes.shape, dtype=torch.bool)
        return Quantize(codes, scales, zeros, self.options.bits, self.options.group_size, everywhere, what)

    def _middle(self) -> Tensor:
        return torch.tensor(float(1 << (self.options.bits - 1)))

    def _grid(self, values: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        """Scales `[M]` in the weight's dtype and zero points over a share of the range of `[columns, M]`."""
        dtype, bits = self.scales.dtype, self.options.bits
        if self.zeros is None:
            return finite_scale(
                values.abs().amax(0).float() * (ratio / steps(bits)), dtype, steps(bits)
            ), self._middle()
        levels = (1 << bits) - 1
        low, high = (ratio * each.float() for each in (values.amin(0).clamp_max(0), values.amax(0).clamp_min(0)))
        scale = finite_scale(high / levels - low / levels, dtype, levels)
        return scale, torch.where(scale != 0, -low / scale.float(), 0.0).round_().clamp_(0, levels)

    def _nearest(self, values: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes, and (code - zero) * scale in fp32, rounded once to the weight's dtype."""
        step = scale.float()
        lowest = 1 if self.zeros is None else 0
        codes = (
            torch.where(step != 0, values / step, 0.0).round_().add_(zero).clamp_(lowest, (1 << self.options.bits) - 1)
        )
        return codes, ((codes - zero).float() * step).to(scale.dtype).to(values.dtype)


@dataclass(frozen=True, eq=False)
class ToFloats:
    """Small floats times a power of two for each group of columns: of the published one and its double the better.

    Attributes:
        importance: `[K]`, what a squared error counts where a power is chosen.
        scales: fp32 `[groups, M]`.
        dtype: of the weight.
    """

    kind: SmallFloat
    span: int
    importance: Tensor
    scales: Tensor
    dtype: torch.dtype

    @staticmethod
    def empty(kind: SmallFloat, group_size: int, weight: Tensor, importance: Tensor) -> "ToFloats":
        """Room for the scales of a weight `[M, K]`."""
        scales = torch.ones(-(-weight.shape[1] // group_size), weight.shape[0])
        return ToFloats(kind, group_size, importance, scales, weight.dtype)

    def begin(self, column: int, values: Tensor) -> None:
        """The power with the least squared error of the group from `column` on, from its weights `[columns, M]`."""
        importance = self.importance[column : column + len(values), None]
        least = power_scales(values.abs().amax(0).float(), self.kind, self.dtype)
        errors = [
            ((self._nearest(values, scale) - values).square_() * importance).sum(0) for scale in (least, 2 * least)
        ]
        self.scales[column // self.span] = torch.where(errors[1] < errors[0], 2 * least, least)

    def round(self, column: int, values: Tensor) -> Tensor:
        """What one column `[M]` becomes."""
        return self._nearest(values, self.scales[column // self.span])

    def _nearest(self, values: Tensor, scale: Tensor) -> Tensor:
        return (nearest_float(values.float() / scale, self.kind) * scale).to(self.dtype).to(values.dtype)
