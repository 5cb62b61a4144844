"""Optimal Brain Surgeon, exact: delete the weight that costs least once all the others have moved."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stoicc.ops._choosing import check_scope, check_sparsity, unquantized
from stoicc.ops._hessian import invert, positive_inverse
from stoicc.ops._inputs import seen_by_tiles
from stoicc.ops.graph import CompressedWeight, Prune, Update
from stoicc.ops.obd import check_flat
from stoicc.ops.statistics import Statistics
from stoicc.weights import on_cpu

CHUNK = 1 << 24
"""Numbers of inverse Hessians held at a time: K x K for each row in work."""


@on_cpu
def obs(
    weight: Tensor | CompressedWeight,
    statistics: Statistics,
    sparsity: float = 0.5,
    scope: str = "row",
    damping: float = 0.01,
) -> CompressedWeight:
    """Optimal Brain Surgeon on a layer (Hassibi and Stork 1992; by rows as in Frantar and Alistarh 2022).

    With H = X^T X rows do not interact: each is pruned greedily by w_q**2 / (2 [H^-1]_qq), its other weights
    move by -(w_q / [H^-1]_qq) H^-1[:, q], and its H^-1 is downdated. Exact, in float64, and
    O(M K**3): for layers of some hundred columns; `sparsegpt` is for the others.

    Args:
        weight: `[M, K]`, or an operator's result that is not quantized; what was pruned stays pruned.
        statistics: of the layer's inputs, with a gram matrix.
        sparsity: share of the weights to drop, 0 to 1; the count is rounded.
        scope: each "row" loses the same share, or the greedy choice goes over the whole "layer".
        damping: share of the mean of H's diagonal that is added to it; raised where H is not
            positive definite with it, which the result then says.

    Raises:
        InputError: a quantized weight, statistics of another layer or without a gram matrix, or
            options that are none.
    """
    share = check_sparsity("ops.obs", sparsity)
    check_scope("ops.obs", scope, ("row", "layer"))
    compressed, state = unquantized("ops.obs", weight)
    inputs = seen_by_tiles("ops.obs", state, statistics, gram=True)
    inverse = invert("ops.obs", inputs, damping)
    rows = _Rows(state.values.double(), inverse.full(), state.kept, inverse.dead)
    height, width = state.values.shape
    if scope == "row":
        counts = torch.full((height,), round(share * width))
    else:
        every = rows.remove(torch.full((height,), width))
        counts = _greedy_counts(every.losses, round(share * height * width))
    removed = rows.remove(counts)
    what = f"OBS {share:.1%} of the {scope}, {inverse.said}"
    return compressed.then(Update(removed.values.to(state.values.dtype), what)).then(Prune(removed.kept, what))


@on_cpu
def obs_prune(parameters: Tensor, hessian: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Delete `count` parameters one by one, moving the rest, whatever the model and its Hessian.

    Args:
        parameters: `[P]` floats, a flattened model at a minimum of its loss.
        hessian: `[P, P]`, symmetric positive definite (add a little to its diagonal where it is not).

    Returns:
        The parameters in float64, and the indices of those deleted in the order of deletion.

    Raises:
        InputError: shapes that do not fit, a count that is too large, or a Hessian that is not
            positive definite.
    """
    check_flat("ops.obs_prune", parameters, hessian, count)
    inverse = positive_inverse("ops.obs_prune", hessian.detach().cpu().double())
    nothing = torch.zeros(inverse.shape[0], dtype=torch.bool)
    removed = _Rows(parameters.detach().cpu().double()[None], inverse, None, nothing).remove(torch.tensor([count]))
    return removed.values[0], removed.order[0, :count]


@dataclass(frozen=True, eq=False)
class _Removed:
    """Weights `[M, K]` after some deletions, and per row what went, in order, at what loss (0 beyond the count)."""

    values: Tensor
    kept: Tensor
    order: Tensor
    losses: Tensor


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows that share one inverse Hessian, each a quadratic problem of its own.

    Attributes:
        values: `[M, K]` float64.
        inverse: `[K, K]` float64.
        kept: False where a weight is gone already; those are taken out of every row first.
        dead: bool `[K]`, channels whose weights cost nothing.
    """

    values: Tensor
    inverse: Tensor
    kept: Tensor | None
    dead: Tensor

    def remove(self, counts: Tensor) -> _Removed:
        """Delete `counts[i]` weights of row i (at least those that are gone already), greedily."""
        if self.kept is not None:
            counts = torch.maximum(counts, (~self.kept).sum(1))
        height = max(1, CHUNK // self.inverse.numel())
        starts = range(0, len(counts), height)
        parts = [self._remove(slice(start, start + height), counts[start : start + height]) for start in starts]
        return _Removed(*(torch.cat(fields) for fields in zip(*parts, strict=True)))

    def _remove(self, rows: slice, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = self.values[rows].clone()
        inverse = self.inverse.expand(len(values), -1, -1).clone()
        gone = torch.zeros_like(values, dtype=torch.bool) if self.kept is None else ~self.kept[rows]
        alive = torch.ones_like(gone)
        order, losses = torch.zeros_like(values, dtype=torch.int64), torch.zeros_like(values)
        each = torch.arange(len(values))
        for step in range(int(counts.max()) if len(counts) else 0):
            active = counts > step
            diagonal = torch.where(alive, inverse.diagonal(dim1=1, dim2=2), 1.0)
            loss = values.square() / (2 * diagonal)
            loss = loss.masked_fill(self.dead, 0.0).masked_fill(gone, -1.0).masked_fill(~alive, torch.inf)
            index = loss.argmin(1)
            order[:, step] = index
            losses[:, step] = torch.where(active, loss[each, index].clamp_min(0), 0.0)
            column = inverse[each, index] / diagonal[each, index, None] * active[:, None]
            values -= values[each, index, None] * column
            inverse.baddbmm_(column[:, :, None], inverse[each, index][:, None], alpha=-1)
            alive[each[active], index[active]] = False
        return values * alive, alive, order, losses


def _greedy_counts(losses: Tensor, total: int) -> Tensor:
    """How many deletions of each row are among the `total` that a greedy choice over all rows makes.

    `losses` `[M, K]` are in each row's own order of deletion. A deletion waits for those before it,
    so what counts is the largest loss so far.
    """
    so_far = losses.cummax(1).values.flatten()
    chosen = so_far.argsort(stable=True)[:total]
    return torch.bincount(chosen // losses.shape[1], minlength=losses.shape[0])
