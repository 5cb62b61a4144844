"""Where one format for all tiles does about as well as a mosaic: then it is what a budget gives."""

import numpy as np
from numpy.typing import NDArray

from stoicc.policy.table import TileTable

PAYS = 0.95
"""A mosaic, or an order of the columns, has to leave at most this share of the squared error foretold without it.

What is foretold is not truer than that: in a trial on MiniLM a mosaic that promised a thousandth was worse than int8.
"""
SAME = 0.99
"""One format takes the bytes of a budget where it takes this share of them: with less, the rest would go unused."""


def one_format(table: TileTable, found: float, room: float, alone: NDArray[np.float64] | None = None) -> int | None:
    """The number of the format that all tiles have instead of a mosaic, or None where the mosaic pays.

    Args:
        found: the squared error of the mosaic.
        room: bytes that may be spent, those of `table.beside` as well.
        alone: `[F]`, the error with every tile in one format where columns stay as they are and nothing stands beside;
            None: as the table has it.
    """
    errors = table.errors.sum(0) if alone is None else alone
    costs = table.bytes.sum(0) + (table.beside if alone is None else 0)
    open_ = np.isfinite(errors) & (costs <= room * (1 + 1e-9)) & (costs >= SAME * room)
    if not open_.any():
        return None
    best = int(np.where(open_, errors, np.inf).argmin())
    return best if found >= PAYS * errors[best] else None
