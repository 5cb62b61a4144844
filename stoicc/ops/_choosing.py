"""What pruning operators share: checked options, statistics as tiles see them, and exact counts."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from stoicc.formats._nm import largest
from stoicc.ir.errors import InputError
from stoicc.ops.graph import CompressedWeight
from stoicc.ops.lowering import Lowered, lower
from stoicc.ops.statistics import Statistics
from stoicc.tiling import row_blocks


@dataclass(frozen=True)
class Pattern:
    """How much is dropped: a share of the weights, or all but n of every m along K."""

    sparsity: float = 0.5
    n: int | None = None
    m: int | None = None

    @staticmethod
    def of(who: str, sparsity: object, n: object = None, m: object = None) -> "Pattern":
        """A checked pattern; InputError where it is none."""
        if n is not None or m is not None:
            if not (isinstance(n, int) and isinstance(m, int)) or not 0 <= n <= m or m < 1:
                raise InputError(f"{who}: expected 0 <= n <= m with m >= 1, found {n}:{m}")
            return Pattern(1 - n / m, n, m)
        return Pattern(check_sparsity(who, sparsity))

    def __str__(self) -> str:
        return f"{self.sparsity:.1%}" if self.m is None else f"{self.n}:{self.m}"


def check_sparsity(who: str, sparsity: object, most: float = 1.0) -> float:
    """A share of weights to drop, from 0 to `most`, or InputError."""
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity <= most:
        raise InputError(f"{who}: expected a sparsity from 0 to {most:g}, the share to drop, found {sparsity!r}")
    return float(sparsity)


def check_scope(who: str, scope: str, known: tuple[str, ...]) -> None:
    """InputError where a scope is none of the known ones."""
    if scope not in known:
        raise InputError(f"{who}: expected scope {', '.join(known)}, found {scope!r}")


def unquantized(who: str, weight: Tensor | CompressedWeight) -> tuple[CompressedWeight, Lowered]:
    """A weight whose values may still move, and its lowered state."""
    compressed = CompressedWeight.of(weight)
    state = lower(compressed)
    if state.sheets:
        raise InputError(
            f"{who}: expected a weight that is not quantized yet, found codes, and this moves weights; quantize "
            "afterwards, or in its sweep where it takes bits"
        )
    return compressed, state


def dead_channels(statistics: Statistics) -> str:
    """ ", 3 of 64 input channels dead" where some were 0 in every sample: their weights cost nothing."""
    dead = int(statistics.dead.sum())
    return f", {dead} of {statistics.columns} input channels dead" if dead else ""


def pruned_first(scores: Tensor, kept: Tensor | None) -> Tensor:
    """Scores (>= 0) with -1 where an operator before pruned, so that what it dropped stays dropped."""
    return scores if kept is None else torch.where(kept, scores, -torch.ones((), dtype=scores.dtype))


def nm_largest(scores: Tensor, n: int, m: int) -> Tensor:
    """Bool `[..., K]`: the n largest scores of each m along K, ties to the lower column.

    A shorter last group keeps at most n.
    """
    columns = scores.shape[-1]
    return largest(pad(scores, (0, -columns % m), value=-2.0), n, m)[..., :columns]


def all_but(scores: Tensor, drop: int) -> Tensor:
    """Bool `[R, K]`: all but the `drop` smallest scores of each row; of equal ones the last are dropped.

    A selection in linear time: a sort of each row takes several times longer.
    """
    if drop <= 0 or drop >= scores.shape[1]:
        return torch.full(scores.shape, drop <= 0, dtype=torch.bool)
    kept = torch.empty(scores.shape, dtype=torch.bool)
    for rows in row_blocks((scores.shape[0], scores.shape[1])):
        kept[rows] = _all_but(scores[rows], drop)
    return kept


def _all_but(scores: Tensor, drop: int) -> Tensor:
    threshold = scores.kthvalue(drop, dim=1, keepdim=True).values
    kept = scores >= threshold
    excess = drop - (~kept).sum(1)  # of those that equal the threshold, so many go
    equal = scores == threshold
    equals = equal.sum(1)
    plain = excess == equals
    kept[plain] &= ~equal[plain]
    tied = ~plain
    if bool(tied.any()):
        stays = (equals - excess)[tied, None]
        kept[tied] &= ~equal[tied] | (equal[tied].cumsum(1, dtype=torch.int32) <= stays)
    return kept
