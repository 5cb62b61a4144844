"""Naive-LoRA: a low-rank adapter for what compression took from a weight."""

from torch import Tensor

from stoicc.ops._adapter import adapted, check_rank, error_of
from stoicc.ops.graph import CompressedWeight
from stoicc.weights import on_cpu


@on_cpu
def naive_lora(
    weight: Tensor | CompressedWeight, rank: int | None = None, original: Tensor | None = None
) -> CompressedWeight:
    """Add the rank-r product L R nearest to the error E = W - W_c: its truncated SVD (Eckart and Young 1936).

    Source: the baseline of Mozaffari et al. 2025, SLiM (arXiv 2410.09615), Section 3.3. The least error in the
    weights, not in the layer's output: `slim_lora` weighs input channels.

    Args:
        weight: `[M, K]`, pruned or quantized.
        rank: 1 to min(M, K); default a tenth of it.
        original: W; default the weight that the expression starts from.

    Returns:
        The weight with factors L `[M, r]` and R `[r, K]` in its dtype, in the order of the source.

    Raises:
        InputError: a rank that the layer cannot have, an original that does not fit, or no error.
    """
    compressed = CompressedWeight.of(weight)
    error = error_of("ops.naive_lora", compressed, original)
    rank = check_rank("ops.naive_lora", rank, (error.shape[0], error.shape[1]))
    return adapted(compressed, error, rank, None, "Naive-LoRA")
