"""Group AbsMax quantization: one scale (and zero point) per group of weights along K."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from stoicc.formats._affine import GroupGrid, absmax
from stoicc.ir.errors import InputError
from stoicc.ops.graph import CompressedWeight, Quantize
from stoicc.tiling import as_bool_map, check_tile, grid_of, row_blocks, spread_tile_mask
from stoicc.weights import on_cpu


@dataclass(frozen=True)
class GroupAbsMax:
    """Options; group_size 0 is one group a row."""

    bits: int = 4
    group_size: int = 64
    zero_points: bool = False


@on_cpu
def group_absmax(
    weight: Tensor | CompressedWeight,
    bits: int = 4,
    group_size: int = 64,
    zero_points: bool = False,
    where: Tensor | None = None,
    tile: tuple[int, int] = (64, 64),
) -> CompressedWeight:
    """Quantize to `bits`-bit codes: scale = max|w| / (2**(bits-1) - 1) over each group.

    Source: absmax quantization as in Dettmers et al. 2022 (arXiv 2208.07339), per group of a row.
    With zero points the scale is (max - min) / (2**bits - 1), over a range that includes 0.

    Args:
        weight: `[M, K]`, or an operator's result; pruned weights stay exactly zero.
        bits: 2 to 8 (formats in the core hold 4 and 8).
        group_size: weights along K that share a scale; 0 for the whole row. The last group of
            a row may be shorter.
        where: bool per tile; groups outside it take no part in a scale.
        tile: the tile shape that `where` speaks of.

    Raises:
        InputError: bits, a group size or a mask that cannot be used.
    """
    check_groups("ops.group_absmax", bits, group_size)
    compressed = CompressedWeight.of(weight)
    values = compressed.values()
    shape = (values.shape[0], values.shape[1])
    # A group that ends with the row, and may not meet the tile, is the row.
    whole_row = group_size > shape[1] or (group_size == shape[1] and shape[1] % 64 != 0)
    config = GroupAbsMax(bits, 0 if whole_row else group_size, bool(zero_points))
    touched = torch.ones(shape, dtype=torch.bool)
    if where is not None:
        mask = as_bool_map(where, grid_of(shape, check_tile(tile)), "ops.group_absmax, where")
        touched = spread_tile_mask(mask, shape, tile)
    node = group_codes(values, touched, config)
    return compressed.then(node, tile if where is not None else None)


def check_groups(who: str, bits: object, group_size: object) -> None:
    """InputError where codes of so many bits in such groups are none."""
    whole = isinstance(bits, int) and isinstance(group_size, int)
    if not whole or not 2 <= bits <= 8 or group_size < 0:  # type: ignore[operator]
        raise InputError(f"{who}: expected 2 to 8 bits and group_size >= 0, found bits={bits}, group_size={group_size}")


def group_codes(values: Tensor, touched: Tensor, config: GroupAbsMax) -> Quantize:
    """Codes and scales of the touched weights; a block of rows is one wide tile of whole groups."""
    shape = (values.shape[0], values.shape[1])
    size = config.group_size or shape[1]
    groups = -(-shape[1] // size)
    codes = torch.empty(shape, dtype=torch.uint8)
    scales = torch.empty(shape[0], groups, dtype=values.dtype)
    zeros = torch.empty(shape[0], groups, dtype=torch.uint8) if config.zero_points else None
    grid = GroupGrid.of(size, groups * size, "group_absmax")
    for rows in row_blocks(shape):
        block = torch.where(touched[rows], values[rows], torch.zeros((), dtype=values.dtype))
        wide = pad(block, (0, groups * size - shape[1]))[None]
        found = absmax(wide, torch.zeros(1, dtype=torch.int64), grid, config.bits, size, config.zero_points)
        codes[rows], scales[rows] = found.codes[0][:, : shape[1]], found.scales[0]
        if zeros is not None and found.zeros is not None:
            zeros[rows] = found.zeros[0]
    what = f"int{config.bits} AbsMax, group {config.group_size or 'row'}{', zero points' * config.zero_points}"
    return Quantize(codes, scales, zeros, config.bits, config.group_size, touched, what)
