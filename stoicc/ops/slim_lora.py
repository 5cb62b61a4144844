"""SLiM-LoRA: a low-rank adapter that weighs the error of each input channel by its activations."""

import torch
from torch import Tensor

from stoicc.ops._adapter import adapted, check_rank, error_of
from stoicc.ops._inputs import checked_statistics
from stoicc.ops.graph import CompressedWeight
from stoicc.ops.statistics import Statistics
from stoicc.weights import on_cpu


@on_cpu
def slim_lora(
    weight: Tensor | CompressedWeight,
    statistics: Statistics,
    rank: int | None = None,
    original: Tensor | None = None,
) -> CompressedWeight:
    """Add the rank-r product L R that minimises ||F(W - W_c - L R)||, F(W) = W diag(s).

    s is mean|x_j| plus its smallest positive value, so that F can be inverted with dead channels too. F is
    additive, so the answer is exact: the truncated SVD of F(W - W_c), R then divided by s. Source:
    Mozaffari et al. 2025, SLiM (ICML 2025, arXiv 2410.09615), Section 3.3.

    Args:
        weight: `[M, K]`, pruned or quantized.
        statistics: of the layer's inputs, as they come (in the order of the source); no gram matrix is needed.
        rank: 1 to min(M, K); default a tenth of it.
        original: W; default the weight that the expression starts from.

    Returns:
        The weight with factors L `[M, r]` and R `[r, K]` in its dtype, in the order of the source.

    Raises:
        InputError: a rank that the layer cannot have, statistics of another layer, an original that
            does not fit, or no error.
    """
    compressed = CompressedWeight.of(weight)
    error = error_of("ops.slim_lora", compressed, original)
    rank = check_rank("ops.slim_lora", rank, (error.shape[0], error.shape[1]))
    saliency = channel_saliency(checked_statistics("ops.slim_lora", statistics, error.shape[1]))
    return adapted(compressed, error, rank, saliency, "SLiM-LoRA")


def channel_saliency(statistics: Statistics) -> Tensor:
    """s `[K]` float32, positive; 1 where every channel is dead."""
    mean = statistics.mean_absolute.float()
    positive = mean[mean > 0]
    return mean + positive.min() if positive.numel() else torch.ones_like(mean)
