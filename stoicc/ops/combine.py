"""Operators that do not choose anything: low-rank terms, permutations, scales and stacks."""

import torch
from torch import Tensor

from stoicc.ir.errors import InputError
from stoicc.ops.graph import CompressedWeight, LowRank, Permute, Scale
from stoicc.ops.lowering import lower
from stoicc.weights import on_cpu


@on_cpu
def low_rank(weight: Tensor | CompressedWeight, left: Tensor, right: Tensor) -> CompressedWeight:
    """W + left @ right, the product kept as factors.

    Args:
        weight: `[M, K]`.
        left, right: `[M, r]` and `[r, K]` floats, in the row and column order of the source.

    Raises:
        InputError: factors of another shape or dtype, or that are not finite.
    """
    compressed = CompressedWeight.of(weight)
    rows, columns = compressed.shape
    factors = (left, right)
    shapes = [list(f.shape) if isinstance(f, Tensor) else type(f).__name__ for f in factors]
    fits = all(isinstance(f, Tensor) and f.ndim == 2 and f.is_floating_point() for f in factors)
    if not fits or not 0 < left.shape[1] == right.shape[0] or (left.shape[0], right.shape[1]) != (rows, columns):
        raise InputError(
            f"ops.low_rank: expected float factors [{rows}, r] and [r, {columns}] with r >= 1, "
            f"found {shapes[0]} and {shapes[1]}"
        )
    for what, factor in zip(("left", "right"), factors, strict=True):
        if not bool(factor.isfinite().all()):
            raise InputError(f"ops.low_rank: expected finite {what}, found {factor[~factor.isfinite()][0].item()}")
    return compressed.then(LowRank(left.detach().cpu().clone(), right.detach().cpu().clone(), f"rank {left.shape[1]}"))


@on_cpu
def permute(
    weight: Tensor | CompressedWeight, rows: Tensor | None = None, columns: Tensor | None = None
) -> CompressedWeight:
    """Reorder rows and columns before tiling; results keep the order of the source.

    Args:
        weight: `[M, K]`, not quantized yet.
        rows, columns: integer permutations; entry i names the row (column) that comes to stand at i.

    Raises:
        InputError: not a permutation, or a weight that is quantized already.
    """
    compressed = CompressedWeight.of(weight)
    orders: list[Tensor | None] = []
    for what, permutation, extent in zip(("rows", "columns"), (rows, columns), compressed.shape, strict=True):
        if permutation is None:
            orders.append(None)
            continue
        order = torch.as_tensor(permutation).cpu()
        if order.is_floating_point() or not torch.equal(order.long().sort().values, torch.arange(extent)):
            raise InputError(f"ops.permute: expected {what} to be a permutation of {extent}, found repeats or gaps")
        orders.append(order.long().clone())
    if lower(compressed).sheets:
        raise InputError("ops.permute: expected a weight that is not quantized yet, found codes; permute first")
    return compressed.then(Permute(orders[0], orders[1]))


@on_cpu
def scale(
    weight: Tensor | CompressedWeight, input_scale: Tensor | None = None, output_scale: Tensor | None = None
) -> CompressedWeight:
    """Divide columns by `input_scale [K]` and rows by `output_scale [M]`; the executor multiplies back.

    So that what follows (quantization) sees a matrix that is easier to compress, as AWQ and
    SLiM-Quant-O do. Scales are float32, positive and finite, in the order of the source.

    Raises:
        InputError: scales that do not fit, or that take a weight out of its dtype's range.
    """
    compressed = CompressedWeight.of(weight)
    state = lower(compressed)
    if state.sheets:
        raise InputError("ops.scale: expected a weight that is not quantized yet, found codes; scale first")
    vectors: list[Tensor | None] = []
    for what, vector, extent in zip(
        ("output_scale", "input_scale"), (output_scale, input_scale), state.values.shape, strict=True
    ):
        if vector is None:
            vectors.append(None)
            continue
        own = torch.as_tensor(vector).detach().to("cpu", torch.float32, copy=True)
        if own.shape != (extent,) or not bool(((own > 0) & own.isfinite()).all()):
            raise InputError(f"ops.scale: expected {what} of {extent} positive finite values, found {list(own.shape)}")
        vectors.append(own)
    scaled = compressed.then(Scale(vectors[1], vectors[0]))
    after = lower(scaled).values
    if not bool(after.isfinite().all()) or bool(((after == 0) & (state.values != 0)).any()):
        raise InputError(
            f"ops.scale: expected scales that keep the weight in the range of {after.dtype}, found some that "
            "overflow it or make it vanish; bring them nearer to 1"
        )
    return scaled


@on_cpu
def stack(*weights: Tensor | CompressedWeight) -> CompressedWeight:
    """Weights of equal K below each other, as one matrix (q, k and v in one launch).

    A tile across the seam of a quantized part and another keeps its values instead of codes;
    heights that are multiples of the tile avoid that.

    Raises:
        InputError: weights whose K, dtype, column permutation or input scale differ.
    """
    stacked = CompressedWeight.stack([CompressedWeight.of(weight) for weight in weights])
    lower(stacked)  # shapes that disagree are refused here, not when it is compiled
    return stacked
