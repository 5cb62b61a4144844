"""Adapter quantization: the low-rank factors of a weight as codes with group scales."""

import torch
from torch import Tensor

from stoicc.ir.errors import InputError
from stoicc.ops.graph import CompressedWeight, QuantizeLowRank
from stoicc.ops.group_absmax import GroupAbsMax, check_groups, group_codes
from stoicc.ops.lowering import lower
from stoicc.weights import on_cpu


@on_cpu
def quantize_adapter(weight: Tensor | CompressedWeight, bits: int = 4, group_size: int = 128) -> CompressedWeight:
    """Group AbsMax on both factors: L `[M, r]` in groups along r, R `[r, K]` in groups along K.

    Source: adapter quantization of Mozaffari et al. 2025, SLiM (arXiv 2410.09615), Section 3.3, which takes
    4 bits and groups of 128.

    Args:
        weight: a weight with low-rank factors.
        bits: 2 to 8.
        group_size: weights of a row of a factor that share a scale; 0 for the whole row.

    Raises:
        InputError: no factors, or bits or a group size that cannot be used.
    """
    check_groups("ops.quantize_adapter", bits, group_size)
    compressed = CompressedWeight.of(weight)
    factors = lower(compressed).low_rank
    if factors is None:
        raise InputError(
            "ops.quantize_adapter: expected a weight with low-rank factors, found none; slim_lora or naive_lora first"
        )
    config = GroupAbsMax(bits, group_size)
    left, right = (group_codes(factor, torch.ones(factor.shape, dtype=torch.bool), config) for factor in factors)
    return compressed.then(QuantizeLowRank(left, right, f"int{bits} AbsMax, group {group_size or 'row'}"))
