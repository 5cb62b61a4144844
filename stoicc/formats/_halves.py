"""Triton helpers that decode with two 16-bit floats in a word: half the instructions of fp32 on NVIDIA's GPUs.

A code becomes a float without a conversion: below the bits of a power of two whose last place is 1 (128 in
bf16, 1024 in fp16) it *is* that power plus the code. Taking the power and the zero point off is exact, and the
product with the scale is rounded once, as fp32's is. Elsewhere than on NVIDIA's GPUs bf16 arithmetic is emulated, and
there is no `prmt`: `_device.py` decodes there, to the same bits.
"""

from typing import Any

import triton
import triton.language as tl

if triton.knobs.runtime.interpret:

    def packs_halves(dtype: Any) -> bool:
        """Whether these helpers decode to `dtype` where the kernel runs: never in the interpreter."""
        return False

else:

    @tl.core.builtin
    def packs_halves(dtype: Any, _semantic: Any = None) -> Any:
        """Whether these helpers decode to `dtype` where the kernel is compiled for."""
        bits = tl.core._unwrap_if_constexpr(dtype).primitive_bitwidth
        return tl.constexpr(_semantic.builder.options.backend_name == "cuda" and bits == 16)


@triton.jit
def power(DTYPE: tl.constexpr):
    """The power of two whose last place is 1, in both halves of a word."""
    return 0x43004300 if DTYPE == tl.bfloat16 else 0x64006400


@triton.jit
def minus_power(DTYPE: tl.constexpr):
    """The negative of `power`: a code put below it is taken off with it."""
    return 0xC300C300 if DTYPE == tl.bfloat16 else 0xE400E400


@triton.jit
def both_halves(values):
    """16-bit values as words with the value in either half."""
    return values.to(tl.uint32) * 0x00010001


@triton.jit
def add_halves(words, more, DTYPE: tl.constexpr):
    """The sums of two 16-bit floats and two others; bf16 has no addition of its own on sm_80."""
    BF16: tl.constexpr = "{ .reg .b32 one; mov.b32 one, 0x3F803F80; fma.rn.bf16x2 $0, $1, one, $2; }"
    F16: tl.constexpr = "add.rn.f16x2 $0, $1, $2;"
    return tl.inline_asm_elementwise(BF16 if DTYPE == tl.bfloat16 else F16, "=r,r,r", [words, more], tl.uint32, True, 1)


@triton.jit
def scale_halves(words, scales, GROUPS: tl.constexpr, DTYPE: tl.constexpr):
    """Words `[R, C / 2]` of two 16-bit floats times scales `[R, GROUPS, 1]`, rounded once: `[R, C]` in DTYPE."""
    BF16: tl.constexpr = "{ .reg .b32 none; mov.b32 none, 0x80008000; fma.rn.bf16x2 $0, $1, $2, none; }"
    F16: tl.constexpr = "mul.rn.f16x2 $0, $1, $2;"
    grouped = tl.reshape(words, (words.shape[0], GROUPS, words.shape[1] // GROUPS))
    factors = both_halves(scales.to(tl.uint16, bitcast=True))
    scaled = tl.inline_asm_elementwise(
        BF16 if DTYPE == tl.bfloat16 else F16, "=r,r,r", [grouped, factors], tl.uint32, True, 1
    )
    return two_columns(tl.reshape(scaled, words.shape), DTYPE)


@triton.jit
def two_columns(words, DTYPE: tl.constexpr):
    """`[R, W]` uint32 -> `[R, 2 * W]`: the halves of each word as 16-bit floats, lower first.

    The move is no instruction. The compiler takes it for an effect and looks no further back for the width in which
    operands of a product were loaded: narrower ones would go through shared memory by single words.
    """
    pairs = tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16)).to(DTYPE, bitcast=True)
    tile = tl.reshape(pairs, (words.shape[0], words.shape[1] * 2))
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], tile.dtype, False, 2)


@triton.jit
def pick_bytes(first, second, which):
    """Byte i of the result is the byte of `first` (0-3) or `second` (4-7) that nibble i of `which` names."""
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [first, second, which], tl.uint32, True, 1)


@triton.jit
def nibble_halves(words, DTYPE: tl.constexpr):
    """`[R, W]` uint32 -> `[R, 4 * W]`: the two 4-bit codes of each byte, lower first, as halves plus `power`."""
    upper = words >> 4
    even = tl.join(pick_bytes(words, upper, 0x4400), pick_bytes(words, upper, 0x6622))
    odd = tl.join(pick_bytes(words, upper, 0x5511), pick_bytes(words, upper, 0x7733))
    pairs = tl.join(even, odd) & 0x000F000F | power(DTYPE)
    return tl.reshape(pairs, (words.shape[0], words.shape[1] * 4))


@triton.jit
def octet_halves(words, DTYPE: tl.constexpr):
    """`[R, W]` uint32 -> `[R, 2 * W]`: the 8-bit codes of each word less 128, as halves."""
    if DTYPE == tl.bfloat16:  # 128 + the lower 7 bits, less 128 where the top bit is set and 256 where it is not
        low, top = below(words & 0x7F7F7F7F, 0x43434343), below(words & 0x80808080 ^ 0x80808080, 0xC3C3C3C3)
        values = add_halves(low, top, DTYPE)
    else:
        values = add_halves(below(words, 0x64646464), 0xE480E480, DTYPE)
    return values


@triton.jit
def below(words, UPPER: tl.constexpr):
    """`[R, W]` uint32 -> `[R, 2 * W]`: each byte as the lower one of a half, under a byte of UPPER."""
    pairs = tl.join(pick_bytes(words, UPPER, 0x4140), pick_bytes(words, UPPER, 0x4342))
    return tl.reshape(pairs, (words.shape[0], words.shape[1] * 2))


# ---- two of four ----------------------------------------------------------------------------


@triton.jit
def by_place(places, FIRST: tl.constexpr, LAST: tl.constexpr):
    """A byte of a table of eight for each of the four nibbles below bit 16."""
    return pick_bytes(tl.full(places.shape, FIRST, tl.uint32), tl.full(places.shape, LAST, tl.uint32), places)


@triton.jit
def group_choices(first, second):
    """`[R, W]` words of a byte for each of four groups -> `[R, 4 * W]`: `first`'s byte, and `second`'s above it."""
    early, late = pick_bytes(first, second, 0x5140), pick_bytes(first, second, 0x7362)
    pairs = tl.join(early, late)
    return tl.reshape(tl.join(pairs, pairs >> 16), (first.shape[0], first.shape[1] * 4))


@triton.jit
def spread_pairs(pairs, dropped, positions, BM: tl.constexpr, BK: tl.constexpr):
    """Pairs of kept 16-bit floats at their columns of each group of four: `[BM, BK / 2]`, `dropped` between them.

    A group's four columns are two words, each picked by bytes from the pair and `dropped`. What to pick follows from
    the kept columns (a, b), of which there are six: their nibble, moved to 1, 2 and 4 to 7, finds it in a table.

    Args:
        pairs: uint32 `[BM, BK / 4]`.
        dropped: uint32 `[BM, BK / 4]`; its lower half is used.
        positions: pointer to the nibbles.
    """
    # one word a thread, so that two threads share a row: as the operands of a product are held. The hint of 4 bytes
    # says so; one of no neighbours along K would have Triton 3.6 give each thread a row, and store tiles by 16 bits
    at = tl.arange(0, BM)[:, None] * (BK // 32) + tl.arange(0, BK // 32)[None, :]
    words = positions.to(tl.pointer_type(tl.uint32), bitcast=True)
    places = tl.load(tl.multiple_of(words + at, [4, 4]))
    # nibbles a + 4 b of (0, 1) (0, 2) (0, 3) (1, 2) (1, 3) (2, 3) become 4, 1, 5, 2, 6, 7
    places = (places + ((places >> 3) & 0x11111111)) & 0x77777777
    places = tl.reshape(tl.join(places, places >> 16), (BM, BK // 16))
    # 0x10 is the first of the pair, 0x32 the second, 0x54 the dropped one; tables by place, 0 first
    column0 = by_place(places, 0x54541054, 0x54541010)
    column1 = by_place(places, 0x54105454, 0x54105432)
    column2 = by_place(places, 0x54323254, 0x10545454)
    column3 = by_place(places, 0x54545454, 0x32323254)
    low = pick_bytes(pairs, dropped, group_choices(column0, column1))
    high = pick_bytes(pairs, dropped, group_choices(column2, column3))
    return tl.reshape(tl.join(low, high), (BM, BK // 2))
