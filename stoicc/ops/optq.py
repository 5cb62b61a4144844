"""OPTQ (GPTQ): quantize in one sweep over the columns, the weights to come making up for the rounding."""

from dataclasses import replace

import torch
from torch import Tensor

from stoicc.ops._choosing import unquantized
from stoicc.ops._hessian import invert
from stoicc.ops._inputs import seen_by_tiles
from stoicc.ops._rounding import CodeOptions, ToCodes
from stoicc.ops._sweep import Sweep
from stoicc.ops.graph import CompressedWeight
from stoicc.ops.statistics import Statistics
from stoicc.weights import on_cpu


@on_cpu
def optq(
    weight: Tensor | CompressedWeight,
    statistics: Statistics,
    bits: int = 4,
    group_size: int = 128,
    zero_points: bool = False,
    activation_order: bool = False,
    clip: bool = True,
    damping: float = 0.01,
) -> CompressedWeight:
    """Quantize column by column, and let the columns to come answer (Frantar et al. 2023, arXiv 2210.17323).

    H = X^T X + damping * mean(diagonal) * I. A group's scale is found when the sweep reaches it, from weights
    that have answered already. The work is in the dtype of the statistics.

    Args:
        weight: `[M, K]`, or an operator's result that is not quantized; pruned weights stay exactly zero.
        statistics: of the layer's inputs, with a gram matrix.
        bits: 2 to 8.
        group_size: weights along K that share a scale; 0 for the whole row.
        zero_points: scale and zero point over the range of a group; otherwise codes are symmetric.
        activation_order: columns with the largest inputs first. Groups stay as the weight has them, so
            their scales are found before the sweep, and kernels are the same.
        clip: a group's range may be narrower than its weights, down to 30%, where that lowers their squared
            error, each column's counted by 1 / [H^-1]_jj.
        damping: raised where H is not positive definite with it, which the result then says.

    Raises:
        InputError: a quantized weight, statistics of another layer or without a gram matrix, or
            options that are none.
    """
    compressed, state = unquantized("ops.optq", weight)
    values = state.values
    options = CodeOptions.of("ops.optq", bits, group_size, values.shape[1], zero_points, clip)
    inputs = seen_by_tiles("ops.optq", state, statistics, gram=True)
    order = inputs.square.argsort(descending=True, stable=True) if activation_order else torch.arange(values.shape[1])
    inverse = invert("ops.optq", inputs.select(order) if activation_order else inputs, damping)
    importance = torch.empty_like(inputs.square).index_copy_(0, order, inverse.upper.diagonal() ** -2)
    codes = ToCodes.empty(options, values, importance)
    if activation_order:
        codes = _all_grids(codes, values.T.to(importance.dtype), order)
    gone = None if state.kept is None else ~state.kept[:, order].T
    Sweep(inverse, codes, gone=gone).run(values[:, order])
    first = ", largest inputs first" * activation_order
    return compressed.then(codes.node(f"OPTQ {options}{first}, {inverse.said}"))


def _all_grids(codes: ToCodes, weights: Tensor, order: Tensor) -> ToCodes:
    """The grids of all groups, from the weights `[K, M]` as they are; the sweep then goes in any order."""
    for start in range(0, len(weights), codes.span):
        codes.begin(start, weights[start : start + codes.span])
    return replace(codes, columns=order, found=True)
