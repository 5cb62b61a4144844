"""SLiM: quantize, prune, and make up for both with a low-rank adapter, in one operator."""

from torch import Tensor

from stoicc.ops.graph import CompressedWeight
from stoicc.ops.quantize_adapter import quantize_adapter
from stoicc.ops.slim_lora import slim_lora
from stoicc.ops.slim_quant import slim_quant
from stoicc.ops.statistics import Statistics
from stoicc.ops.wanda import wanda
from stoicc.weights import on_cpu


@on_cpu
def slim(
    weight: Tensor | CompressedWeight,
    calibration: Statistics | Tensor,
    bits: int | None = 4,
    n: int = 2,
    m: int = 4,
    sparsity: float | None = None,
    rank: int | None = None,
    adapter_bits: int | None = 4,
    activation_aware: bool = False,
) -> CompressedWeight:
    """SLiM-Quant, then Wanda on the quantized weights, then SLiM-LoRA on the joint error, its factors quantized.

    Source: Mozaffari et al. 2025, SLiM (ICML 2025, arXiv 2410.09615), Algorithm 1; with `adapter_bits` its
    SLiM-LoRA^Q, with `activation_aware` its SLiM-Quant-O.

    Args:
        weight: `[M, K]`, or an operator's result.
        calibration: statistics of the layer's inputs (no gram matrix is needed), or the inputs `[..., K]`.
        bits: of the weights, 2 to 8; None leaves them as they are.
        n, m: n of every m weights along K are kept.
        sparsity: share of each row to drop instead, 0 to 1.
        rank: of the adapter; default a tenth of the smaller extent.
        adapter_bits: of its factors, in groups of 128; None leaves them in the weight's dtype.
        activation_aware: the variant of SLiM-Quant that protects channels with large inputs.

    Returns:
        Codes with a mask in the tiles, and factors beside them: [W; R] x, then L (R x) is added.

    Raises:
        InputError: what the steps refuse.
    """
    statistics = Statistics.of(calibration, gram=False) if isinstance(calibration, Tensor) else calibration
    compressed = CompressedWeight.of(weight)
    if bits is not None:
        compressed = slim_quant(compressed, statistics, bits, activation_aware)
    if sparsity is None:
        compressed = wanda(compressed, statistics, n=n, m=m)
    else:
        compressed = wanda(compressed, statistics, sparsity)
    compressed = slim_lora(compressed, statistics, rank)
    return compressed if adapter_bits is None else quantize_adapter(compressed, adapter_bits)
