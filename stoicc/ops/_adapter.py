"""What the adapter operators share: the error to make up for, the rank, and factors that a dtype can hold."""

import torch
from torch import Tensor

from stoicc.ir.errors import InputError
from stoicc.ops._svd import truncated_svd
from stoicc.ops.graph import CompressedWeight, LowRank, Source, Stack
from stoicc.ops.lowering import lower
from stoicc.weights import as_matrix

DEFAULT_SHARE = 0.1
"""Rank of an adapter over the smaller extent of its layer, as in SLiM."""

LEAST = 1e-15
"""Input channels that weigh less than this share of the heaviest are counted with it: squares stay in range."""


def error_of(who: str, compressed: CompressedWeight, original: object) -> Tensor:
    """W - W_c `[M, K]` in float32, in the row and column order of the source.

    Args:
        original: W; None for the weight that the expression starts from.

    Raises:
        InputError: nothing was compressed yet, or an original of another shape.
    """
    weight = _source(compressed) if original is None else as_matrix(original)
    dense = lower(compressed).dense()
    if weight.shape != dense.shape:
        raise InputError(f"{who}: expected an original of {list(dense.shape)}, found {list(weight.shape)}")
    error = weight.float() - dense.float()
    if original is None and not bool(error.any()):
        raise InputError(
            f"{who}: expected a weight that an operator changed, found no error to make up for; "
            "prune or quantize first, or pass original="
        )
    if not bool(error.isfinite().all()):
        raise InputError(f"{who}: expected a finite original, found NaN or infinity; repair the weight")
    return error


def _source(compressed: CompressedWeight) -> Tensor:
    """The weight before every operator but stacking, `[M, K]`."""
    done: dict[int, Tensor] = {}
    for index, node, inputs in compressed.nodes():
        match node:
            case Source(weight=weight):
                done[index] = weight
            case Stack():
                done[index] = torch.cat([done[i] for i in inputs])
            case _:
                done[index] = done[inputs[0]]
    return done[compressed.output]


def check_rank(who: str, rank: object, shape: tuple[int, int]) -> int:
    """A rank that the layer can have, by default a tenth of its smaller extent; else InputError."""
    most = min(shape)
    if rank is None:
        return max(1, round(DEFAULT_SHARE * most))
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
        raise InputError(
            f"{who}: expected a rank from 1 to {most}, the smaller extent of the layer {list(shape)}, found {rank!r}; "
            f"leave it out for {max(1, round(DEFAULT_SHARE * most))}"
        )
    return rank


def adapted(
    compressed: CompressedWeight, error: Tensor, rank: int, weights: Tensor | None, what: str
) -> CompressedWeight:
    """The weight with the rank-r factors that minimise ||(error - L R) diag(weights)||_F, in its dtype.

    The weights are positive, so that dividing R by them undoes the scaling and the answer is exact.
    """
    if weights is not None:
        weights = (weights / weights.max()).clamp_min(LEAST)
    found = truncated_svd(error if weights is None else error * weights, rank)
    left, right = found.left, found.right if weights is None else found.right / weights
    dtype = lower(compressed).values.dtype
    said = f"{what}, rank {rank}, leaves {found.error:.1%} of the squared error"
    return compressed.then(LowRank(*_in_range(left, right, dtype), said))


def _in_range(left: Tensor, right: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors rounded to a dtype; each pair of a column and a row is balanced first, by powers of two."""
    heights, widths = left.abs().amax(0), right.abs().amax(1)
    known = (heights > 0) & (widths > 0)
    shift = torch.where(known, (widths / torch.where(known, heights, 1.0)).sqrt().log2().round().exp2(), 1.0)
    return (left * shift).to(dtype).contiguous(), (right / shift[:, None]).to(dtype).contiguous()
