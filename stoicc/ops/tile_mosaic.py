"""Mosaics of dense and n:m tiles: the sparsity that a budget asks for, where it costs least."""

import torch
from torch import Tensor

from stoicc.ir.errors import InputError
from stoicc.ops._choosing import Pattern, check_sparsity, nm_largest
from stoicc.ops._hessian import invert
from stoicc.ops._inputs import seen_by_tiles
from stoicc.ops.graph import CompressedWeight
from stoicc.ops.lowering import Lowered, lower
from stoicc.ops.nm_magnitude import nm_magnitude
from stoicc.ops.sparsegpt import sparsegpt
from stoicc.ops.statistics import Statistics
from stoicc.ops.wanda import wanda
from stoicc.tiling import check_tile, grid_of, to_tiles
from stoicc.weights import on_cpu

METHODS = ("magnitude", "wanda", "sparsegpt")


@on_cpu
def tile_mosaic(
    weight: Tensor | CompressedWeight,
    statistics: Statistics | None = None,
    sparsity: float = 0.25,
    method: str = "wanda",
    n: int = 2,
    m: int = 4,
    tile: tuple[int, int] = (64, 64),
) -> CompressedWeight:
    """Prune n:m in the tiles where that costs least, and leave the others dense.

    The space of PATCH (2025), dense and 2:4 tiles at any sparsity between 0 and 50%. Tiles are chosen by
    what pruning takes from them, per weight dropped: the sum of w_ij**2 * h_j over the weights that go, with
    h_j = 1 for "magnitude", the mean of x_j**2 for "wanda" and 1 / [H^-1]_jj for "sparsegpt".

    Args:
        weight: `[M, K]`, or an operator's result (for "sparsegpt" one that is not quantized).
        statistics: of the layer's inputs; with a gram matrix for "sparsegpt", none for "magnitude".
        sparsity: share of all weights to drop, 0 to 1 - n/m; tiles are whole, so it is met within half a tile.
        method: what prunes the chosen tiles: "magnitude", "wanda" or "sparsegpt" (where all weights answer).
        n, m: weights kept and group size; m divides the tile's columns.
        tile: the tile shape.

    Raises:
        InputError: a method, sparsity or pattern that is none, or statistics that are missing or do not fit.
    """
    who = "ops.tile_mosaic"
    if method not in METHODS:
        raise InputError(f"{who}: expected method {', '.join(METHODS)}, found {method!r}")
    rows_by_columns = check_tile(tile)
    pattern = Pattern.of(who, 0.0, n, m)
    if rows_by_columns[1] % m:
        raise InputError(f"{who}: expected an m that divides the tile's {tile[1]} columns, found {m}; change the tile")
    share = check_sparsity(who, sparsity, pattern.sparsity)
    if statistics is None and method != "magnitude":
        raise InputError(f"{who}: expected statistics for method {method!r}, found none; or choose 'magnitude'")
    compressed = CompressedWeight.of(weight)
    state = lower(compressed)
    scores = state.values.double().square() * _importance(who, state, statistics, method)
    where = _cheapest(scores, nm_largest(scores, n, m), share, rows_by_columns)
    if statistics is None or method == "magnitude":
        return nm_magnitude(compressed, n, m, where, rows_by_columns)
    prune = wanda if method == "wanda" else sparsegpt
    return prune(compressed, statistics, n=n, m=m, where=where, tile=rows_by_columns)


def _importance(who: str, state: Lowered, statistics: Statistics | None, method: str) -> Tensor:
    """h_j, `[K]` float64 (or a one that broadcasts)."""
    if statistics is None or method == "magnitude":
        return torch.ones((), dtype=torch.float64)
    inputs = seen_by_tiles(who, state, statistics, gram=method == "sparsegpt")
    if method == "wanda":
        return inputs.mean_square.double()
    inverse = invert(who, inputs, 0.01)
    return (1 / inverse.upper.double().square().sum(0)).masked_fill(inverse.dead, 0)


def _cheapest(scores: Tensor, kept: Tensor, share: float, tile: tuple[int, int]) -> Tensor:
    """Bool `[tile rows, tile columns]`: the tiles to prune, so that about this share of all weights goes."""
    losses = to_tiles(scores.masked_fill(kept, 0), tile).sum((1, 2))
    dropped = to_tiles((~kept).double(), tile).sum((1, 2))
    order = (losses / dropped.clamp_min(1)).argsort(stable=True)
    so_far = torch.cat((torch.zeros(1, dtype=torch.float64), dropped[order].cumsum(0)))
    count = int((so_far - share * kept.numel()).abs().argmin())
    chosen = torch.zeros(len(order), dtype=torch.bool).index_fill_(0, order[:count], True)
    return chosen.view(grid_of((kept.shape[0], kept.shape[1]), tile))
