"""Small floats as codes: the tables of the OCP and NVIDIA formats, rounding to them, and scales of blocks.

Sources: OCP 8-bit Floating Point Specification (OFP8) 1.0, tables 1 and 2; OCP Microscaling Formats (MX)
Specification 1.0, sections 5.3.3 and 6.3; NVIDIA, Introducing NVFP4 (2025), and the CUDA types of cuda_fp4.h.
"""

from functools import cache

import torch
from torch import Tensor

from stoicc.ir.dtypes import bits
from stoicc.ir.lattice import SmallFloat

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of e2m1 by the low three bits of a code; the fourth is the sign."""
E2M1_MAX = E2M1[-1]
FP8_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
FP8_MAX = {kind: torch.finfo(dtype).max for kind, dtype in FP8_DTYPES.items()}
SMALL_FLOATS = {
    "e2m1": SmallFloat(1, 0, E2M1_MAX),
    "e4m3": SmallFloat(3, -6, FP8_MAX["e4m3"]),
    "e5m2": SmallFloat(2, -14, FP8_MAX["e5m2"]),
}
"""The three as a sweep rounds to them."""


@cache
def e2m1_values() -> Tensor:
    """The sixteen values of e2m1 by their code, fp32 `[16]`."""
    magnitudes = torch.tensor(E2M1)
    return torch.cat((magnitudes, -magnitudes))


def fp4_values(codes: Tensor) -> Tensor:
    """e2m1 codes u8 -> fp32."""
    return e2m1_values().to(codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


def fp4_codes(values: Tensor) -> Tensor:
    """fp32 -> the nearest e2m1 codes u8, ties to the even code; beyond the largest magnitude, the largest."""
    magnitude = values.abs()
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for code in range(1, len(E2M1)):
        middle = (E2M1[code - 1] + E2M1[code]) / 2
        codes += (magnitude >= middle) if code % 2 == 0 else (magnitude > middle)
    return codes | values.signbit().to(torch.uint8) << 3


def fp8_values(codes: Tensor, kind: str) -> Tensor:
    """fp8 codes u8 -> fp32."""
    return codes.contiguous().view(FP8_DTYPES[kind]).float()


def fp8_codes(values: Tensor, kind: str) -> Tensor:
    """fp32 -> the nearest fp8 codes u8, ties to even; beyond the largest magnitude, the largest."""
    most = FP8_MAX[kind]
    return values.clamp(-most, most).to(FP8_DTYPES[kind]).view(torch.uint8)


def nearest_float(values: Tensor, kind: SmallFloat) -> Tensor:
    """The nearest small floats to fp32 values, ties to even."""
    exponents = floor_exponent(values.abs()).clamp_min_(kind.lowest) - kind.mantissa
    step = ((exponents + 127) << 23).view(torch.float32)
    return (values / step).round_().mul_(step).clamp_(-kind.most, kind.most)


def power_scales(top: Tensor, kind: SmallFloat, dtype: torch.dtype) -> Tensor:
    """Powers of two, 1.0 for 0.0, by which `top` has the exponent of the largest small float; normal in a dtype."""
    ends = torch.tensor([kind.most, torch.finfo(dtype).tiny, torch.finfo(dtype).max])
    largest, low, high = floor_exponent(ends).tolist()
    exponents = (floor_exponent(top) - largest).clamp(max(low, -126), high)
    return torch.where(top > 0, ((exponents + 127) << 23).view(torch.float32), 1.0)


def e8m0_values(codes: Tensor) -> Tensor:
    """Exponents u8 (127 more than the power of two) -> fp32; 0 is 2**-127, a subnormal."""
    words = codes.to(torch.int32) << 23
    return torch.where(words == 0, 1 << 22, words).view(torch.float32)


def floor_exponent(values: Tensor) -> Tensor:
    """floor(log2) of positive fp32 as int32; 0.0 and subnormals give -127."""
    return (bits(values.float()) >> 23) - 127


def exact_power(top: Tensor, most: float) -> Tensor:
    """A power of two by which magnitudes up to `top` fit a format whose largest is `most`; 0.0 for 0.0."""
    largest = floor_exponent(torch.tensor(most)).item()
    exponents = (floor_exponent(top) - largest).clamp(-126, 127)
    power = ((exponents + 127) << 23).view(torch.float32)
    return torch.where(top > 0, torch.where(top / power > most, 2 * power, power), 0.0)
