"""Wanda: prune by |weight| times the norm of its input channel, within a row."""

from torch import Tensor

from stoicc.ir.errors import InputError
from stoicc.ops._choosing import Pattern, all_but, dead_channels, nm_largest, pruned_first
from stoicc.ops._inputs import seen_by_tiles
from stoicc.ops._uniform import touched_weights
from stoicc.ops.graph import CompressedWeight, Prune
from stoicc.ops.lowering import lower
from stoicc.ops.statistics import Statistics
from stoicc.weights import on_cpu


@on_cpu
def wanda(
    weight: Tensor | CompressedWeight,
    statistics: Statistics,
    sparsity: float = 0.5,
    n: int | None = None,
    m: int | None = None,
    where: Tensor | None = None,
    tile: tuple[int, int] = (64, 64),
) -> CompressedWeight:
    """Drop the smallest |W_ij| * ||X_j||_2 of each row (Sun et al. 2023, arXiv 2306.11695).

    Args:
        weight: `[M, K]`, or an operator's result; codes stay codes, and what was pruned stays pruned.
        statistics: of the layer's inputs; no gram matrix is needed.
        sparsity: share of each row to drop, 0 to 1; not used with n:m.
        n, m: keep n of every m consecutive weights instead. A shorter last group keeps at most n.
        where: bool per tile: with n:m, other tiles are left as they are.
        tile: the tile shape that `where` speaks of.

    Returns:
        The weight with a mask; no weight moves.

    Raises:
        InputError: statistics of another layer, or a pattern or mask that is none.
    """
    pattern = Pattern.of("ops.wanda", sparsity, n, m)
    compressed = CompressedWeight.of(weight)
    state = lower(compressed)
    shape = (state.values.shape[0], state.values.shape[1])
    if where is not None and pattern.m is None:
        raise InputError(
            "ops.wanda: expected n and m with where, found a sparsity; magnitude and sparsegpt prune tiles"
        )
    inputs = seen_by_tiles("ops.wanda", state, statistics)
    scores = pruned_first(wanda_scores(state.values, inputs), state.kept)
    if pattern.n is None or pattern.m is None:
        kept = all_but(scores, round(pattern.sparsity * shape[1]))
    else:
        kept = nm_largest(scores, pattern.n, pattern.m)
    if where is not None:
        kept |= ~touched_weights(where, shape, tile, "ops.wanda")
    return compressed.then(Prune(kept, f"Wanda {pattern}{dead_channels(inputs)}"), None if where is None else tile)


def wanda_scores(values: Tensor, statistics: Statistics) -> Tensor:
    """|W_ij| * ||X_j||_2, `[M, K]` float32; the norm is per sample, so that float32 cannot overflow sooner."""
    return values.float().abs() * statistics.mean_square.sqrt().float()
