"""Magnitude pruning: drop the smallest |w| of a layer, of each row, or the smallest tiles."""

import torch
from torch import Tensor

from stoicc.ops._choosing import all_but, check_scope, check_sparsity, pruned_first
from stoicc.ops.graph import CompressedWeight, Prune
from stoicc.ops.lowering import lower
from stoicc.tiling import check_tile, grid_of, spread_tile_mask, to_tiles
from stoicc.weights import on_cpu

__all__ = ["magnitude"]


@on_cpu
def magnitude(
    weight: Tensor | CompressedWeight,
    sparsity: float = 0.5,
    scope: str = "layer",
    tile: tuple[int, int] = (64, 64),
) -> CompressedWeight:
    """Drop the weights of least magnitude (Han et al. 2015, arXiv 1506.02626). N:M is `nm_magnitude`.

    Args:
        weight: `[M, K]`, or an operator's result; what it pruned counts as dropped.
        sparsity: share of the weights (of the tiles) to drop, 0 to 1; the count is rounded.
        scope: weights are compared in the whole "layer" or within a "row"; "tile" drops whole
            tiles, those of least mean square.
        tile: the tile shape of scope "tile".

    Returns:
        The weight with a mask; of equal magnitudes the later ones are dropped.

    Raises:
        InputError: a sparsity or scope that is none.
    """
    share = check_sparsity("ops.magnitude", sparsity)
    check_scope("ops.magnitude", scope, ("layer", "row", "tile"))
    compressed = CompressedWeight.of(weight)
    state = lower(compressed)
    what = f"magnitude {share:.1%} of the {scope}"
    if scope == "tile":
        kept = _kept_tiles(state.values, share, check_tile(tile))
        return compressed.then(Prune(kept, f"magnitude {share:.1%} of the tiles"), tile)
    scores = pruned_first(state.values.float().abs(), state.kept)
    rows = scores.reshape(1, -1) if scope == "layer" else scores
    kept = all_but(rows, round(share * rows.shape[1])).view(scores.shape)
    return compressed.then(Prune(kept, what))


def _kept_tiles(values: Tensor, share: float, tile: tuple[int, int]) -> Tensor:
    """Bool `[M, K]`: the tiles that stay; a tail tile counts with the weights that it has."""
    shape = (values.shape[0], values.shape[1])
    weights = to_tiles(torch.ones(shape), tile).sum((1, 2))
    scores = to_tiles(values.double().square(), tile).sum((1, 2)) / weights
    kept = all_but(scores[None], round(share * len(scores)))
    return spread_tile_mask(kept.view(grid_of(shape, tile)), shape, tile)
