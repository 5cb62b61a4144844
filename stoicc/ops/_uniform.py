"""Uniform codes with one scale for the whole matrix: what absmax and slim_quant end in, and what sweeps round with."""

import torch
from torch import Tensor

from stoicc.formats._affine import finite_scale, quantize
from stoicc.ir.errors import InputError
from stoicc.ops.graph import Quantize
from stoicc.tiling import as_bool_map, check_tile, grid_of, row_blocks, spread_tile_mask


def check_bits(bits: object, operator: str) -> int:
    """Bits of a code that `Quantize` can carry, or InputError."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise InputError(f"{operator}: expected 2 to 8 bits, found {bits!r}; 4 and 8 suit every format")
    return bits


def touched_weights(where: object, shape: tuple[int, int], tile: tuple[int, int], operator: str) -> Tensor:
    """Bool `[M, K]`: the weights of the tiles that `where` names; all of them without one."""
    if where is None:
        return torch.ones(shape, dtype=torch.bool)
    mask = as_bool_map(where, grid_of(shape, check_tile(tile)), f"{operator}, where")
    return spread_tile_mask(mask, shape, tile)


def steps(bits: int) -> int:
    """The largest code's distance from zero, 2**(bits - 1) - 1: symmetric codes leave out -2**(bits - 1)."""
    return (1 << (bits - 1)) - 1


def one_scale(values: Tensor, touched: Tensor, clip: float, bits: int, what: str) -> Quantize:
    """All touched weights of `values [M, K]` on one grid of 2 * steps + 1 levels from -clip to clip.

    The scale is clip / steps, rounded to the weight's dtype.
    """
    scale = finite_scale(torch.tensor(clip / steps(bits)), values.dtype, steps(bits))
    return _on_one_grid(values, touched, scale, None, bits, what)


def one_range(values: Tensor, touched: Tensor, low: float, high: float, bits: int, what: str) -> Quantize:
    """All touched weights on one grid of 2**bits levels from low <= 0 to high >= 0, with a zero point."""
    levels = (1 << bits) - 1
    scale = finite_scale(torch.tensor(high / levels - low / levels), values.dtype, levels)
    zero = round(-low / scale.item()) if scale else 0
    return _on_one_grid(values, touched, scale, torch.tensor(min(zero, levels), dtype=torch.uint8), bits, what)


def _on_one_grid(values: Tensor, touched: Tensor, scale: Tensor, zero: Tensor | None, bits: int, what: str) -> Quantize:
    """Codes for a scale and zero point that are the same in every row.

    Formats hold them as a group that spans the row: 16 / K bits a weight in 16-bit dtypes, and no
    format of its own.
    """
    scales = scale.expand(values.shape[0], 1).clone()
    zeros = None if zero is None else zero.expand(values.shape[0], 1).clone()
    codes = torch.empty(values.shape, dtype=torch.uint8)
    for rows in row_blocks((values.shape[0], values.shape[1])):
        block = torch.where(touched[rows], values[rows], torch.zeros((), dtype=values.dtype))
        at = None if zeros is None else zeros[rows][None]
        codes[rows] = quantize(block[None], scales[rows][None], at, bits, 0, lowest=int(zero is None)).codes[0]
    return Quantize(codes, scales, zeros, bits, 0, touched, what)
