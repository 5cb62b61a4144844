"""Operators that do not choose anything: low-rank terms, permutations, scales and stacks."""

import torch
from torch import Tensor

from stoicc.ir.errors import InputError
from stoicc.ops.graph import CompressedWeight, LowRank, Permute, Scale
from stoicc.ops.lowering import lower


def low_rank(weight: Tensor | CompressedWeight, left: Tensor, right: Tensor) -> CompressedWeight:
    """W + left @ right, the product kept as factors.

    Args:
        weight: `[M, K]`.
        left, right: `[M, r]` and `[r, K]`, in the row and column order of the source.
    """
    compressed = CompressedWeight.of(weight)
    rows, columns = compressed.shape
    if (
        left.ndim != 2
        or right.ndim != 2
        or (left.shape[0], right.shape[1]) != (rows, columns)
        or (left.shape[1] != right.shape[0] or not left.shape[1])
    ):
        raise InputError(
            f"ops.low_rank: expected factors [{rows}, r] and [r, {columns}] with r >= 1, "
            f"found {list(left.shape)} and {list(right.shape)}"
        )
    return compressed.then(LowRank(left.detach(), right.detach()))


def permute(
    weight: Tensor | CompressedWeight, rows: Tensor | None = None, columns: Tensor | None = None
) -> CompressedWeight:
    """Reorder rows and columns before tiling; results keep the order of the source.

    Args:
        weight: `[M, K]`, not quantized yet.
        rows, columns: int64 permutations; entry i names the row (column) that comes to stand at i.
    """
    compressed = CompressedWeight.of(weight)
    for what, permutation, extent in zip(("rows", "columns"), (rows, columns), compressed.shape, strict=True):
        if permutation is not None and not torch.equal(permutation.sort().values, torch.arange(extent)):
            raise InputError(f"ops.permute: expected {what} to be a permutation of {extent}, found repeats or gaps")
    if lower(compressed).sheets:
        raise InputError("ops.permute: expected a weight that is not quantized yet, found codes; permute first")
    return compressed.then(Permute(rows, columns))


def scale(
    weight: Tensor | CompressedWeight, input_scale: Tensor | None = None, output_scale: Tensor | None = None
) -> CompressedWeight:
    """Divide columns by `input_scale [K]` and rows by `output_scale [M]`; the executor multiplies back.

    So that what follows (quantization) sees a matrix that is easier to compress, as AWQ and
    SLiM-Quant-O do. Scales are float32, positive and finite, in the order of the source.
    """
    compressed = CompressedWeight.of(weight)
    state = lower(compressed)
    values, (state_rows, state_columns) = state.values, state.values.shape
    for what, vector, extent in (
        ("input_scale", input_scale, state_columns),
        ("output_scale", output_scale, state_rows),
    ):
        if vector is not None and (vector.shape != (extent,) or not bool((vector > 0).all() & vector.isfinite().all())):
            raise InputError(
                f"ops.scale: expected {what} of {extent} positive finite values, found {list(vector.shape)}"
            )
    if state.sheets:
        raise InputError("ops.scale: expected a weight that is not quantized yet, found codes; scale first")
    scaled = values.float()
    if input_scale is not None:
        order = state.column_permutation
        scaled = scaled / (input_scale if order is None else input_scale[order]).float()
    if output_scale is not None:
        order = state.row_permutation
        scaled = scaled / (output_scale if order is None else output_scale[order]).float()[:, None]
    as_float = [None if vector is None else vector.float() for vector in (input_scale, output_scale)]
    return compressed.then(Scale(as_float[0], as_float[1], scaled.to(values.dtype)))


def stack(*weights: Tensor | CompressedWeight) -> CompressedWeight:
    """Weights of equal K below each other, as one matrix (q, k and v in one launch)."""
    stacked = CompressedWeight.stack([CompressedWeight.of(weight) for weight in weights])
    lower(stacked)  # shapes that disagree are refused here, not when it is compiled
    return stacked
