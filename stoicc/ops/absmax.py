"""AbsMax quantization: one scale for the whole matrix, or one a row."""

import torch
from torch import Tensor

from stoicc.ir.errors import InputError
from stoicc.ops._uniform import check_bits, one_range, one_scale, touched_weights
from stoicc.ops.graph import CompressedWeight
from stoicc.ops.group_absmax import group_absmax
from stoicc.tiling import row_blocks
from stoicc.weights import on_cpu


@on_cpu
def absmax(
    weight: Tensor | CompressedWeight,
    bits: int = 4,
    per: str = "tensor",
    zero_points: bool = False,
    where: Tensor | None = None,
    tile: tuple[int, int] = (64, 64),
) -> CompressedWeight:
    """Quantize to `bits`-bit codes: scale = max|w| / (2**(bits-1) - 1) over the tensor or over each row.

    Source: absmax quantization as in Dettmers et al. 2022 (arXiv 2208.07339). Groups of a row are
    `group_absmax`; a better scale for the whole tensor is `slim_quant`. With zero points the scale is
    (max - min) / (2**bits - 1), over a range that includes 0.

    Args:
        weight: `[M, K]`, or an operator's result; pruned weights stay exactly zero.
        bits: 2 to 8.
        per: "tensor" or "row".
        zero_points: min-max codes in place of symmetric ones.
        where: bool per tile; weights outside it take no part in a scale.
        tile: the tile shape that `where` speaks of.

    Raises:
        InputError: bits, `per` or a mask that cannot be used.
    """
    check_bits(bits, "ops.absmax")
    if per not in ("tensor", "row"):
        raise InputError(f"ops.absmax: expected per 'tensor' or 'row', found {per!r}; group_absmax has groups of a row")
    if per == "row":
        return group_absmax(weight, bits, 0, zero_points, where=where, tile=tile)
    compressed = CompressedWeight.of(weight)
    values = compressed.values()
    shape = (values.shape[0], values.shape[1])
    touched = touched_weights(where, shape, tile, "ops.absmax")
    ranges = [_range(values[rows], touched[rows]) for rows in row_blocks(shape)]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if zero_points:
        node = one_range(values, touched, low, high, bits, f"int{bits} AbsMax, tensor, zero points")
    else:
        node = one_scale(values, touched, max(-low, high), bits, f"int{bits} AbsMax, tensor")
    return compressed.then(node, tile if where is not None else None)


def _range(values: Tensor, touched: Tensor) -> tuple[float, float]:
    """The least and the largest touched weight, and 0."""
    low, high = torch.where(touched, values, torch.zeros((), dtype=values.dtype)).aminmax()
    return min(low.item(), 0.0), max(high.item(), 0.0)
