"""Triton helpers of small floats: codes to fp32, exactly.

A code is moved to where an fp16 has its exponent and mantissa. It then is the value divided by a power
of two, also where both are subnormal.
"""

import triton
import triton.language as tl


@triton.jit
def e4m3(codes):
    """fp8 codes of kind e4m3 as fp32."""
    word = codes.to(tl.uint16)
    return (((word & 128) << 8) | ((word & 127) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def e5m2(codes):
    """fp8 codes of kind e5m2 as fp32."""
    return (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e2m1_at(words, AT: tl.constexpr):
    """The 4-bit float at bit AT of each word, as fp32."""
    code = words >> AT
    half = (((code & 8) << 12) | ((code & 7) << 9)).to(tl.uint16)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def e2m1(words):
    """`[R, W]` uint32 -> `[R, 8 * W]` fp32: the eight 4-bit floats of each word, lowest first."""
    even = tl.join(tl.join(e2m1_at(words, 0), e2m1_at(words, 16)), tl.join(e2m1_at(words, 8), e2m1_at(words, 24)))
    odd = tl.join(tl.join(e2m1_at(words, 4), e2m1_at(words, 20)), tl.join(e2m1_at(words, 12), e2m1_at(words, 28)))
    return tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1] * 8))


@triton.jit
def e8m0(codes):
    """Exponents as fp32; 0 is 2**-127, a subnormal."""
    word = codes.to(tl.uint32) << 23
    return tl.where(word == 0, 0x00400000, word).to(tl.uint32).to(tl.float32, bitcast=True)
