"""Group AbsMax quantization: one scale (and zero point) per group of weights along K."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from stoicc.formats._affine import GroupGrid, absmax
from stoicc.ir.errors import InputError
from stoicc.ops.graph import CompressedWeight, Quantize
from stoicc.tiling import as_bool_map, check_tile, grid_of, spread_tile_mask


@dataclass(frozen=True)
class GroupAbsMax:
    """Options; group_size 0 is one group a row."""

    bits: int = 4
    group_size: int = 64
    zero_points: bool = False


def group_absmax(
    weight: Tensor | CompressedWeight,
    bits: int = 4,
    group_size: int = 64,
    zero_points: bool = False,
    where: Tensor | None = None,
    tile: tuple[int, int] = (64, 64),
) -> CompressedWeight:
    """Quantize to `bits`-bit codes: scale = max|w| / (2**(bits-1) - 1) over each group.

    With zero points the scale is (max - min) / (2**bits - 1), over a range that includes 0.

    Args:
        weight: `[M, K]`, or an operator's result; pruned weights stay exactly zero.
        bits: 2 to 8 (formats in the core hold 4 and 8).
        group_size: weights along K that share a scale; 0 for the whole row. The last group of
            a row may be shorter.
        where: bool per tile; groups outside it take no part in a scale.
        tile: the tile shape that `where` speaks of.
    """
    config = GroupAbsMax(bits, group_size, zero_points)
    if not 2 <= bits <= 8 or group_size < 0:
        raise InputError(
            f"ops.group_absmax: expected 2 to 8 bits and group_size >= 0, found bits={bits}, group_size={group_size}"
        )
    compressed = CompressedWeight.of(weight)
    values = compressed.values()
    shape = (values.shape[0], values.shape[1])
    touched = torch.ones(shape, dtype=torch.bool)
    if where is not None:
        mask = as_bool_map(where, grid_of(shape, check_tile(tile)), "ops.group_absmax, where")
        touched = spread_tile_mask(mask, shape, tile)
    node = _quantize(values, touched, config)
    return compressed.then(node, tile if where is not None else None)


def _quantize(values: Tensor, touched: Tensor, config: GroupAbsMax) -> Quantize:
    """Codes and scales of the touched weights; one long row of groups, as a single wide tile."""
    columns = values.shape[1]
    size = config.group_size or columns
    rows = pad(torch.where(touched, values, torch.zeros((), dtype=values.dtype)), (0, -columns % size))
    grid = GroupGrid.of(size, rows.shape[1], "group_absmax")
    codes = absmax(rows[None], torch.zeros(1, dtype=torch.int64), grid, config.bits, size, config.zero_points)
    zeros = None if codes.zeros is None else codes.zeros[0]
    what = f"int{config.bits} AbsMax, group {config.group_size or 'row'}{', zero points' * config.zero_points}"
    return Quantize(
        codes.codes[0][:, :columns], codes.scales[0], zeros, config.bits, config.group_size, touched, what
    )
