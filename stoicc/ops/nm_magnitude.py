"""N:M magnitude pruning: keep the n largest magnitudes of every m weights along K."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from stoicc.formats._nm import largest
from stoicc.ir.errors import InputError
from stoicc.ops.graph import CompressedWeight, Prune
from stoicc.tiling import as_bool_map, check_tile, grid_of, row_blocks, spread_tile_mask
from stoicc.weights import on_cpu


@dataclass(frozen=True)
class NmMagnitude:
    """Options: n of m are kept; n = 0 drops everything (an empty tile, with `where`)."""

    n: int = 2
    m: int = 4


@on_cpu
def nm_magnitude(
    weight: Tensor | CompressedWeight,
    n: int = 2,
    m: int = 4,
    where: Tensor | None = None,
    tile: tuple[int, int] = (64, 64),
) -> CompressedWeight:
    """Prune by magnitude in groups of m consecutive weights of a row (Mishra et al. 2021, arXiv 2104.08378).

    Args:
        weight: `[M, K]`, or an operator's result.
        n, m: weights kept and group size; 0 <= n <= m. A shorter last group keeps at most n.
        where: bool per tile `[tile rows, tile columns]`; other tiles are left as they are.
        tile: the tile shape that `where` speaks of.

    Returns:
        The weight with a mask; ties keep the lower column.

    Raises:
        InputError: an n:m that is none, or a mask that does not fit the tile grid.
    """
    config = NmMagnitude(n, m)
    if not (isinstance(n, int) and isinstance(m, int)) or not 0 <= n <= m or m < 1:
        raise InputError(f"ops.nm_magnitude: expected 0 <= n <= m with m >= 1, found {n}:{m}")
    compressed = CompressedWeight.of(weight)
    values = compressed.values()
    kept = nm_mask(values, config)
    if where is None:
        return compressed.then(Prune(kept, f"{n}:{m} magnitude"))
    shape = (values.shape[0], values.shape[1])
    mask = as_bool_map(where, grid_of(shape, check_tile(tile)), "ops.nm_magnitude, where")
    return compressed.then(Prune(kept | ~spread_tile_mask(mask, shape, tile), f"{n}:{m} magnitude"), tile)


def nm_mask(values: Tensor, config: NmMagnitude) -> Tensor:
    """Bool `[M, K]`: True for the n largest magnitudes of each group of m along K."""
    columns = values.shape[1]
    kept = torch.empty(values.shape, dtype=torch.bool)
    for rows in row_blocks((values.shape[0], columns)):
        magnitude = pad(values[rows].float().abs(), (0, -columns % config.m), value=-1.0)
        kept[rows] = largest(magnitude, config.n, config.m)[:, :columns]
    return kept
