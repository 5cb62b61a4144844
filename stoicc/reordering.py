"""Passes on the weight: what they see of it, and what becomes of the order that they choose."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from stoicc.choosing import Chooser
from stoicc.ir.dtypes import bits
from stoicc.ir.errors import FormatError, PassError
from stoicc.ir.format import Tile, TileFormat
from stoicc.ops.lowering import Lowered, permuted_rows
from stoicc.passes import WeightPass, WeightView
from stoicc.tiling import row_blocks


def run_weight_passes(
    passes: Sequence[WeightPass], lowered: Lowered, tile: Tile, formats: tuple[TileFormat, ...]
) -> Lowered:
    """The weight with its rows in the order that the passes choose; what stands beside it follows.

    Args:
        formats: that tiles will be chosen from, cheapest first.

    Raises:
        PassError: a pass gave something that is no permutation of the rows.
    """
    for step in passes:
        order = step.row_order(_view(lowered, tile, formats))
        if order is not None:
            lowered = permuted_rows(lowered, _checked(order, lowered.values.shape[0], step))
    return lowered


def _view(lowered: Lowered, tile: Tile, formats: tuple[TileFormat, ...]) -> WeightView:
    def payload(order: NDArray[np.int64] | None) -> float:
        if order is None:
            return payload_bytes(lowered, tile, formats)
        try:
            return payload_bytes(permuted_rows(lowered, torch.from_numpy(order)), tile, formats)
        except FormatError:  # rows that fit where they are need not fit next to others
            return float("inf")

    return WeightView(occupied(lowered.values, tile[1]), tile, payload)


def occupied(values: Tensor, width: int) -> NDArray[np.bool_]:
    """Where a row `[M, K]` has a weight that is stored (not +0.0), by tile column: `[M, ceil(K / width)]`."""
    rows, columns = values.shape
    found = []
    for lines in row_blocks((rows, columns)):
        stored = bits(values[lines].contiguous()) != 0
        found.append(pad(stored, (0, -columns % width)).unflatten(1, (-1, width)).any(2))
    return torch.cat(found).numpy()


def payload_bytes(lowered: Lowered, tile: Tile, formats: tuple[TileFormat, ...]) -> float:
    """Bytes of all tiles, each in the format that the inspector would give it.

    Raises:
        FormatError: a tile that no format holds.
    """
    chooser = Chooser(lowered, tile, formats, None, False)
    return sum(chooser.payload(chunk) for chunk in chooser.chunks())


def _checked(order: NDArray[np.int64], rows: int, step: WeightPass) -> Tensor:
    found = np.asarray(order)
    if found.shape != (rows,) or found.dtype.kind != "i" or not np.array_equal(np.sort(found), np.arange(rows)):
        raise PassError(
            f"pass {step.name}: expected row_order to give a permutation of {rows} rows, found {found.dtype} of shape "
            f"{list(found.shape)}; name every row once, or return None to leave the weight as it is"
        )
    return torch.from_numpy(found.astype(np.int64))
