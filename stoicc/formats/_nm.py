"""2:4 structure shared by the formats that keep two of four consecutive weights along K.

Positions of a group of four are one nibble: first kept column in bits 0-1, second in bits 2-3,
ascending. A byte holds two groups, the earlier one in the low nibble. A group with fewer than two
non-zeros keeps its lowest free columns as explicit zeros, so positions are always legal and the
encoding of a tile is unique.
"""

from itertools import combinations

import torch
from torch import Tensor

from stoicc.ir.dtypes import bits


def _positions_of_mask() -> Tensor:
    """`[16, 2]` int64: for a 4-bit mask of non-zeros, the two columns that are kept."""
    table = torch.zeros(16, 2, dtype=torch.int64)
    for mask in range(16):
        fitting = [pair for pair in combinations(range(4), 2) if mask & ~(1 << pair[0] | 1 << pair[1]) == 0]
        table[mask] = torch.tensor(fitting[0] if fitting else (0, 1))
    return table


POSITIONS = _positions_of_mask()
NIBBLES = (POSITIONS[:, 0] | POSITIONS[:, 1] << 2).to(torch.uint8)
OVERFULL = torch.tensor([mask.bit_count() > 2 for mask in range(16)])


def group_masks(kept: Tensor) -> Tensor:
    """Bool `[..., K]` -> int32 `[..., K / 4]`: the 4-bit mask of each group of four.

    Four bool bytes read as one int32 have a bit at 0, 8, 16 and 24; one multiplication brings
    them to the top four bits, with no two products in the same place.
    """
    return (kept.contiguous().view(torch.int32) * 0x10204080 >> 28) & 15


def overfull(kept: Tensor) -> Tensor:
    """Bool `[T]` from bool `[T, BM, BK]`: tiles where a group of four keeps more than two."""
    masks = group_masks(kept).flatten(1)
    return OVERFULL.index_select(0, masks.flatten()).view(masks.shape).any(1)


def top2(magnitude: Tensor) -> Tensor:
    """Bool `[..., K]`: the two largest of each group of four (ties: the lower column)."""
    return largest(magnitude, 2, 4)


def largest(magnitude: Tensor, n: int, m: int) -> Tensor:
    """Bool `[..., K]`, K a multiple of m: the n largest of each group of m (ties: the lower column).

    The rank of a weight is how many of its group beat it; equal ones to its left do too.
    """
    groups = magnitude.unflatten(-1, (magnitude.shape[-1] // m, m))
    kept = torch.zeros_like(groups, dtype=torch.bool)
    if m > 16:  # comparing all pairs costs m**2; above this a sort is faster
        order = groups.argsort(dim=-1, descending=True, stable=True)
        return kept.scatter_(-1, order[..., :n], True).flatten(-2)
    lanes = groups.unbind(-1)
    for column, lane in enumerate(lanes):
        rank = torch.zeros(lane.shape, dtype=torch.uint8)
        for other, rival in enumerate(lanes):
            if other != column:
                rank += rival >= lane if other < column else rival > lane
        kept[..., column] = rank < n
    return kept.flatten(-2)


def compress(values: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Values `[..., K]` and group masks `[..., K/4]` -> kept `[..., K/2]`, positions u8 `[..., K/8]`."""
    flat = masks.flatten()
    positions = POSITIONS.index_select(0, flat).view(*masks.shape, 2)
    kept = values.unflatten(-1, (values.shape[-1] // 4, 4)).gather(-1, positions).flatten(-2)
    nibbles = NIBBLES.index_select(0, flat).view(*masks.shape[:-1], masks.shape[-1] // 2, 2)
    return kept, nibbles[..., 0] | nibbles[..., 1] << 4


def expand(kept: Tensor, positions: Tensor, fill: Tensor) -> Tensor:
    """The inverse of `compress`: kept `[..., K/2]` at their positions in a copy of `fill [..., K]`."""
    nibbles = torch.stack((positions & 15, positions >> 4), -1).flatten(-2)
    columns = torch.stack((nibbles & 3, nibbles >> 2), -1).long()
    groups = fill.clone().unflatten(-1, (fill.shape[-1] // 4, 4))
    return groups.scatter_(-1, columns, kept.unflatten(-1, (kept.shape[-1] // 2, 2))).flatten(-2)


def first_overfull(tile: Tensor) -> str:
    """Describe the first group of four of a tile `[BM, BK]` with more than two non-zeros."""
    counts = bits(tile).ne(0).unflatten(-1, (-1, 4)).sum(-1)
    row, group = (counts > 2).nonzero()[0].tolist()
    return (
        f"expected at most 2 non-zeros in 4, found {counts[row, group].item()} "
        f"at row {row}, columns {4 * group}-{4 * group + 3}"
    )
