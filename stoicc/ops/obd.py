"""Optimal Brain Damage: drop by curvature, with a Hessian taken as diagonal."""

from torch import Tensor

from stoicc.ir.errors import InputError
from stoicc.ops._choosing import all_but, check_scope, check_sparsity, dead_channels, pruned_first
from stoicc.ops._inputs import seen_by_tiles
from stoicc.ops.graph import CompressedWeight, Prune
from stoicc.ops.lowering import lower
from stoicc.ops.statistics import Statistics
from stoicc.weights import on_cpu


@on_cpu
def obd(
    weight: Tensor | CompressedWeight, statistics: Statistics, sparsity: float = 0.5, scope: str = "layer"
) -> CompressedWeight:
    """Drop the weights of least saliency H_jj w_ij**2 / 2 (LeCun, Denker and Solla 1989).

    H = X^T X is the Hessian of the layer's squared output error, the same for every row, so only
    its diagonal, the channels' sums of squares, is used.

    Args:
        weight: `[M, K]`, or an operator's result; what it pruned counts as dropped.
        statistics: of the layer's inputs; no gram matrix is needed.
        sparsity: share of the weights to drop, 0 to 1; the count is rounded.
        scope: weights are compared in the whole "layer" or within a "row" (which is Wanda's rule).

    Raises:
        InputError: statistics of another layer, or a sparsity or scope that is none.
    """
    share = check_sparsity("ops.obd", sparsity)
    check_scope("ops.obd", scope, ("layer", "row"))
    compressed = CompressedWeight.of(weight)
    state = lower(compressed)
    inputs = seen_by_tiles("ops.obd", state, statistics)
    scores = pruned_first(obd_saliency(state.values, inputs.square), state.kept)
    rows = scores.reshape(1, -1) if scope == "layer" else scores
    kept = all_but(rows, round(share * rows.shape[1])).view(scores.shape)
    return compressed.then(Prune(kept, f"OBD {share:.1%} of the {scope}{dead_channels(inputs)}"))


def obd_saliency(parameters: Tensor, diagonal: Tensor) -> Tensor:
    """H_ii w_i**2 / 2 in float64; `diagonal` is that of any Hessian and broadcasts to `parameters`."""
    return diagonal.double() * parameters.double().square() / 2


@on_cpu
def obd_prune(parameters: Tensor, hessian: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Set the `count` parameters of least saliency to zero, whatever the model and its Hessian.

    Args:
        parameters: `[P]` floats, a flattened model at a minimum of its loss.
        hessian: `[P, P]`, or its diagonal `[P]`.

    Returns:
        The parameters in float64, and the indices of those deleted in the order of deletion.

    Raises:
        InputError: shapes that do not fit, or a count that is too large.
    """
    check_flat("ops.obd_prune", parameters, hessian, count, diagonal=True)
    diagonal = hessian.diagonal() if hessian.ndim == 2 else hessian
    order = obd_saliency(parameters, diagonal).argsort(stable=True)[:count]
    return parameters.detach().cpu().double().index_fill(0, order, 0.0), order


def check_flat(who: str, parameters: Tensor, hessian: Tensor, count: int, diagonal: bool = False) -> None:
    """InputError where a flattened model, its Hessian and a count of deletions do not fit."""
    size = parameters.shape[0] if parameters.ndim == 1 else -1
    if hessian.shape != (size, size) and not (diagonal and hessian.shape == (size,)):
        raise InputError(
            f"{who}: expected flat parameters [P] and a Hessian [P, P], found {list(parameters.shape)} and "
            f"{list(hessian.shape)}"
        )
    if not bool(parameters.isfinite().all()) or not bool(hessian.isfinite().all()):
        raise InputError(f"{who}: expected finite parameters and Hessian, found NaN or infinity")
    if not isinstance(count, int) or not 0 <= count <= size:
        raise InputError(f"{who}: expected a count from 0 to {size}, the parameters there are, found {count!r}")
