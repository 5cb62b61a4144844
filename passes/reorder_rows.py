"""reorder-rows: permute the rows of a weight so that what it stores gathers in fewer tiles."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from stoicc.passes.base import WeightPass, WeightView
from stoicc.passes.row_similarity import similarity_graph, spanning_order

ALIKE = 0.5
"""Jaccard similarity to its tile row that a row needs before tile rows are filled up with others."""

WINDOW = 4096
"""Patterns, next in the order of similarity, that a tile row is filled from."""

INDEX_BYTES = 4
"""What the permutation costs per row of y."""


@dataclass(frozen=True)
class ReorderRows(WeightPass):
    """Rows that store something at the same tile columns come together; the executor's store puts y back.

    The permutation is taken where the tiles, in the bytes of the formats that they would have, and the
    permutation itself take less than the share `1 - min_saving` of the bytes before. Else the weight
    stays as it is, as dense, grouped and uniformly random ones do.

    The source, and how alike rows are found: `stoicc.passes.row_similarity`.
    """

    name: ClassVar[str] = "reorder-rows"
    min_saving: float = 0.1

    def __post_init__(self) -> None:
        number = isinstance(self.min_saving, (int, float)) and not isinstance(self.min_saving, bool)
        self.check("min_saving", number and 0 <= self.min_saving < 1, "a share of the bytes from 0, below 1")

    def row_order(self, weight: WeightView) -> NDArray[np.int64] | None:
        height = weight.tile[0]
        before, least = stored_tiles(weight.occupied, height), fewest_tiles(weight.occupied, height)
        if before - least <= self.min_saving * before:
            return None
        order = gathered(weight.occupied, height)
        if stored_tiles(weight.occupied[order], height) >= before:
            return None
        now = weight.payload(None)
        then = weight.payload(order) + INDEX_BYTES * order.size
        return order if then < (1 - self.min_saving) * now else None


def stored_tiles(occupied: NDArray[np.bool_], height: int) -> int:
    """Tiles that store something, of rows `[M, tile columns]` in this order."""
    return int(np.logical_or.reduceat(occupied, np.arange(0, len(occupied), height), axis=0).sum())


def fewest_tiles(occupied: NDArray[np.bool_], height: int) -> int:
    """A number of non-empty tiles that no order of the rows goes below."""
    return int((-(-occupied.sum(axis=0) // height)).sum())


def gathered(occupied: NDArray[np.bool_], height: int) -> NDArray[np.int64]:
    """An order of the rows in which those of like patterns share tile rows of `height`.

    Args:
        occupied: `[M, tile columns]`, where a row stores something.

    Returns:
        int64 `[M]`: the row that comes to stand at each place; rows of a tile row in natural order.
    """
    patterns, member = np.unique(occupied, axis=0, return_inverse=True)
    member = member.reshape(-1)
    counts = np.bincount(member, minlength=len(patterns))
    rows, start = np.argsort(member, kind="stable"), np.concatenate([[0], np.cumsum(counts)[:-1]])
    tile_rows = []
    for filled in _fill(patterns, counts, spanning_order(similarity_graph(patterns)), height):
        taken = [rows[start[pattern] : start[pattern] + copies] for pattern, copies in filled]
        for pattern, copies in filled:
            start[pattern] += copies
        tile_rows.append(np.sort(np.concatenate(taken)))
    # what is left for the last tile row, which may be lower than the others, stays last
    whole = sorted((lines for lines in tile_rows if lines.size == height), key=lambda lines: int(lines[0]))
    return np.concatenate([*whole, *(lines for lines in tile_rows if lines.size < height)]).astype(np.int64)


Filled = list[tuple[int, int]]
"""What a tile row is filled with: patterns, and how many rows of each."""


def _fill(
    patterns: NDArray[np.bool_], counts: NDArray[np.int64], order: NDArray[np.int64], height: int
) -> list[Filled]:
    """All rows in tile rows: first of alike patterns only, then of what these leave."""
    left, tile_rows = counts.copy(), list[Filled]()
    for least in (ALIKE, 0.0):
        waiting = order[left[order] > 0]
        while waiting.size:
            near, far = waiting[:WINDOW], waiting[WINDOW:]
            window = _Window(np.ascontiguousarray(patterns[near].T), left[near])
            # a window is read anew when half of it is used up, so that it costs little per tile row
            while window.waiting.sum() > (near.size // 2 if far.size else 0):
                filled = window.grow(height, least)
                if least and sum(copies for _, copies in filled) < height:
                    window.waiting[[pattern for pattern, _ in filled]] = False
                else:
                    window.take(filled)
                    tile_rows.append([(int(near[pattern]), copies) for pattern, copies in filled])
            left[near] = window.left
            waiting = np.concatenate([near[window.waiting], far])
    return tile_rows


class _Window:
    """Patterns that tile rows are filled from: `columns` `[tile columns, W]`, and how many rows are left of each."""

    def __init__(self, columns: NDArray[np.bool_], left: NDArray[np.int64]) -> None:
        self.columns, self.left = columns, left
        self.sizes = columns.sum(axis=0, dtype=np.int32)
        self.waiting = np.ones(len(left), dtype=bool)

    def take(self, filled: Filled) -> None:
        """Rows that a tile row has now; a pattern without any left waits no more."""
        for pattern, copies in filled:
            self.left[pattern] -= copies
            self.waiting[pattern] = self.left[pattern] > 0

    def grow(self, height: int, least: float) -> Filled:
        """A tile row from the first pattern on: always the row next that is most like what is there.

        A pattern whose Jaccard similarity to the tile row is below `least` does not join.
        """
        union, common = np.zeros(len(self.columns), dtype=bool), np.zeros_like(self.sizes)
        free, filled = self.waiting.copy(), list[tuple[int, int]]()
        pick, room = int(free.argmax()), height
        while True:
            copies = min(int(self.left[pick]), room)
            filled.append((pick, copies))
            room -= copies
            free[pick] = False
            if not room or not free.any():
                return filled
            fresh = self.columns[:, pick] & ~union
            union |= fresh
            common += self.columns[fresh].sum(axis=0, dtype=np.int32)
            outside = self.sizes - common
            # of patterns that are equally alike, one that adds fewer tiles
            score = common / np.maximum(union.sum() + outside, 1) - 1e-6 * outside
            score[~free] = -np.inf
            pick = int(score.argmax())
            if least and score[pick] < least:
                return filled
