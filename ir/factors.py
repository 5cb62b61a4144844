"""Low-rank factors as tensors: floats as they are, or codes with a scale per group of each row."""

from collections.abc import Mapping

import torch
from torch import Tensor

from stoicc.ir.types import CodedFactor, Pool


def stored_bits(bits: int) -> int:
    """Bits that a code of 2 to 8 takes in memory: codes do not cross bytes."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes `[rows, columns]` -> bytes `[rows, bytes]`, the first code of a byte in its lowest bits."""
    width = stored_bits(bits)
    each = 8 // width
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each)).unflatten(1, (-1, each))
    packed = filled[..., 0].clone()
    for place in range(1, each):
        packed |= filled[..., place] << place * width
    return packed


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_codes`."""
    width = stored_bits(bits)
    parts = [packed >> place * width & (1 << width) - 1 for place in range(8 // width)]
    return torch.stack(parts, -1).flatten(1)[:, :columns].contiguous()


def factor_values(factor: Pool | CodedFactor, pools: Mapping[str, Tensor]) -> Tensor:
    """A factor `[rows, columns]` in its dtype: (code - 2**(bits - 1)) * scale in fp32, rounded once."""
    if isinstance(factor, Pool):
        return pools[factor.name]
    scales = pools[factor.scales.name]
    steps = unpack_codes(pools[factor.codes.name], factor.bits, factor.columns).float() - float(1 << (factor.bits - 1))
    spread = scales.float().repeat_interleave(factor.group_size or factor.columns, 1)[:, : factor.columns]
    return (steps * spread).to(scales.dtype)
