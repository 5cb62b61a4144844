"""The sweep of SparseGPT and OPTQ: columns from left to right, the error of each spread over those to come.

With H^-1 = U^T U, U upper triangular, row j of U over U_jj is how the columns after j answer best to a
change of column j while those before it are fixed; and U_jj**2 is the diagonal of H^-1 by then.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stoicc.ops._choosing import all_but, nm_largest, pruned_first
from stoicc.ops._hessian import InverseHessian

BLOCK = 128
"""Columns that are brought up to date one by one; those beyond wait for one product a block."""


class MaskRule(Protocol):
    """What says which weights stay, `span` columns at a time."""

    @property
    def span(self) -> int:
        """Columns that are decided on together."""

    def keep(self, first: int, scores: Tensor) -> Tensor:
        """Bool `[columns, M]` from scores `[columns, M]` of columns from `first` on."""


@dataclass(frozen=True)
class ShareOfRow:
    """Drop a share of each row in every block; over all blocks the count is that of the whole row."""

    sparsity: float
    span: int = BLOCK

    def keep(self, first: int, scores: Tensor) -> Tensor:
        drop = round(self.sparsity * (first + len(scores))) - round(self.sparsity * first)
        return all_but(scores.T.contiguous(), drop).T


@dataclass(frozen=True)
class OfEach:
    """Keep n of every m columns."""

    n: int
    span: int

    def keep(self, first: int, scores: Tensor) -> Tensor:
        return nm_largest(scores.T, self.n, self.span).T


@dataclass(frozen=True, eq=False)
class Given:
    """Keep what a mask `[K, M]` says."""

    kept: Tensor
    span: int = BLOCK

    def keep(self, first: int, scores: Tensor) -> Tensor:
        return self.kept[first : first + len(scores)]


class Rounding(Protocol):
    """Where a weight that stays ends up: in the weight's dtype, or on a grid of codes."""

    @property
    def span(self) -> int:
        """Columns that share a grid; 1 where there is none."""

    def begin(self, column: int, values: Tensor) -> None:
        """Find the grid of the group that starts at this column from its weights `[columns, M]`, dropped ones 0."""

    def round(self, column: int, values: Tensor) -> Tensor:
        """The nearest values `[M]` to these, in their dtype."""


@dataclass(frozen=True)
class ToDtype:
    """Weights as floats: what the weight's dtype cannot hold is an error to be spread, too."""

    dtype: torch.dtype
    span: int = 1

    def begin(self, column: int, values: Tensor) -> None:
        """Nothing to find."""

    def round(self, column: int, values: Tensor) -> Tensor:
        return values.to(self.dtype).to(values.dtype)


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep over a weight.

    Attributes:
        inverse: of the inputs' Hessian, in the order of the columns; its dtype is that of the work.
        rounding: of the weights that stay.
        rule: which weights stay; None for all of them.
        gone: bool `[K, M]`: weights that an operator before this one pruned, which stay at zero and count.
        fixed: bool `[K, M]`: weights that the rule does not drop.
    """

    inverse: InverseHessian
    rounding: Rounding
    rule: MaskRule | None = None
    gone: Tensor | None = None
    fixed: Tensor | None = None

    def run(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """New values in the dtype of the work, and which are kept, both `[M, K]`; `values [M, K]` is left alone."""
        upper = self.inverse.upper
        work = values.T.to(upper.dtype, memory_format=torch.contiguous_format, copy=True)
        work = work.contiguous()  # a column is one run of memory
        kept = torch.ones(work.shape, dtype=torch.bool) if self.gone is None else ~self.gone
        for block in blocks(len(work), 1 if self.rule is None else self.rule.span, self.rounding.span):
            errors = self.block(work, kept, block)
            work[block.stop :].addmm_(upper[block, block.stop :].T, errors, alpha=-1)
        return work.T, kept.T

    def block(self, work: Tensor, kept: Tensor, block: slice) -> Tensor:
        """Sweep over one block in place; each column's error over U_jj, `[columns, M]`."""
        upper, current = self.inverse.upper[block, block], work[block]
        errors = torch.empty_like(current)
        for index, column in enumerate(range(block.start, block.stop)):
            if self.rule is not None and column % self.rule.span == 0:
                decided = slice(column, min(column + self.rule.span, block.stop))
                kept[decided] &= self._keep(self.rule, work, decided)
            if self.rounding.span > 1 and column % self.rounding.span == 0:
                group = slice(column, column + self.rounding.span)
                stays = kept[group] if self.rule is None else kept[group] & self._keep(self.rule, work, group)
                self.rounding.begin(column, work[group] * stays)
            rounded = self.rounding.round(column, current[index] * kept[column])
            errors[index] = (current[index] - rounded) / upper[index, index]
            current[index] = rounded
            current[index + 1 :].addr_(upper[index, index + 1 :], errors[index], alpha=-1)
        return errors

    def _keep(self, rule: MaskRule, work: Tensor, columns: slice) -> Tensor:
        """What the rule keeps of these columns, by w**2 / U_jj**2; weights of dead channels cost nothing."""
        diagonal = self.inverse.upper.diagonal()[columns, None]
        scores = (work[columns] / diagonal).square_().masked_fill_(self.inverse.dead[columns, None], 0)
        kept = rule.keep(columns.start, pruned_first(scores, None if self.gone is None else ~self.gone[columns]))
        return kept if self.fixed is None else kept | self.fixed[columns]


def blocks(columns: int, rule: int, grid: int) -> Iterator[slice]:
    """Blocks of about `BLOCK` columns that no span of a rule or of a grid crosses the wrong way.

    A rule decides on whole spans within a block. A grid is found where a block starts, or lies in one.
    """
    rule, grid = min(rule, columns), min(grid, columns)
    whole = math.lcm(rule, grid)
    if grid > BLOCK and grid % rule == 0:
        step = max(rule, BLOCK // rule * rule)  # a long group is cut in several blocks
    else:
        whole = step = whole * max(1, BLOCK // whole)
    for start in range(0, columns, whole):
        stop = min(start + whole, columns)
        yield from (slice(first, min(first + step, stop)) for first in range(start, stop, step))
