"""What a batch of tiles loses in a format with a lattice, rounded as a sweep would round it."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from stoicc.formats._affine import finite_scale
from stoicc.formats._nm import largest
from stoicc.formats._table import nearest_float, power_scales
from stoicc.ir.lattice import Lattice, SmallFloat

RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of a group's range that are tried; the sweep tries more."""


def lattice_errors(
    tiles: Tensor, lattice: Lattice, weights: Tensor, dropped: Tensor, rows: Tensor | None = None
) -> Tensor:
    """Weighted squared errors `[T]` of tiles `[T, BM, BK]`, float64.

    Args:
        weights: `[T, BK]`, what a squared error in each column counts.
        dropped: `[T, BK]`, what the square of a weight that is dropped counts.
        rows: `[T, BM]`, what one in each row counts besides; None for one.
    """
    values, factor = tiles.float(), weights[:, None, :]
    lost = torch.zeros(tiles.shape[:2])
    if lattice.keep is not None:
        n, m = lattice.keep
        kept = torch.zeros_like(values, dtype=torch.bool) if n == 0 else _kept(values * factor.sqrt(), n, m)
        lost = (values.square() * dropped[:, None, :]).masked_fill_(kept, 0).sum(2)
        values = values * kept
    if lattice.bits is not None:
        lost = lost + _code_errors(values, lattice, factor, tiles.dtype)
    if lattice.floats is not None:
        lost = lost + _float_errors(values, lattice, lattice.floats, factor, tiles.dtype)
    by_row = lost if rows is None else lost * rows
    return by_row.sum(1, dtype=torch.float64)


def _kept(scores: Tensor, n: int, m: int) -> Tensor:
    columns = scores.shape[2]
    return largest(pad(scores.abs(), (0, -columns % m), value=-1.0), n, m)[..., :columns]


def _code_errors(values: Tensor, lattice: Lattice, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`[T, BM]`: the least weighted squared errors of groups over a few ranges, in sum."""
    assert lattice.bits is not None
    groups = values.unflatten(2, (-1, lattice.group_size))
    factor = factor.unflatten(2, (-1, lattice.group_size))
    if lattice.zero_points:
        levels = (1 << lattice.bits) - 1
        low, high = groups.amin(3, keepdim=True).clamp_max_(0), groups.amax(3, keepdim=True).clamp_min_(0)
        reach = high - low
    else:
        levels = (1 << (lattice.bits - 1)) - 1
        low, reach = None, groups.abs().amax(3, keepdim=True)
    best: Tensor | None = None
    for ratio in RATIOS:
        step = finite_scale(reach * (ratio / levels), dtype, levels).float()
        inverse = torch.where(step != 0, 1 / step, 0.0)
        codes = (groups * inverse).round_()
        if low is None:
            codes.clamp_(-levels, levels)
        else:
            zero = (-low * ratio * inverse).round_().clamp_(0, levels)
            codes = torch.minimum(torch.maximum(codes, -zero), levels - zero)
        errors = codes.mul_(step).sub_(groups).square_().mul_(factor).sum(3)
        best = errors if best is None else torch.minimum(best, errors)
    assert best is not None
    return best.sum(2)


def _float_errors(values: Tensor, lattice: Lattice, kind: SmallFloat, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`[T, BM]`: the least weighted squared errors of groups over two powers of two, in sum."""
    groups, factor = (each.unflatten(2, (-1, lattice.group_size)) for each in (values, factor))
    least = power_scales(groups.abs().amax(3, keepdim=True), kind, dtype)
    errors = [
        nearest_float(groups / scale, kind).mul_(scale).sub_(groups).square_().mul_(factor).sum(3)
        for scale in (least, 2 * least)
    ]
    return torch.minimum(*errors).sum(2)
