"""Tensor-core operands of affine codes: codes less half their range as 16-bit floats, exactly.

A code becomes a float without a conversion: put below the bits of a power of two whose last place is 1, it
*is* that power plus the code. One fused multiply-add takes off the power and half the range. bf16 has 7 bits
below its first, so 128 + code holds 4 bits and, with the top bit told apart, 8; fp16 has 10. Nothing here
rests on subnormal numbers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from stoicc.formats._affine import pack_nibbles, unpack_nibbles
from stoicc.ir.fragment import Fragment, Operands, Planes, Tile

# ---- 4 bits ---------------------------------------------------------------------------------


@gluon.constexpr_function
def nibbles_asm(DTYPE):
    """Registers $0-3 from the nibbles of word $4: nibble r of each half is register r, less 8."""
    text = "{ .reg .b32 u, one, less; "
    if DTYPE == "bf16":  # 0x4300 is 128: (128 + code) * 1 - 136
        text += "mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308; "
        for r in range(4):
            text += f"shr.u32 u, $4, {4 * r}; lop3.b32 $0, u, 0x000f000f, 0x43004300, 0xEA; ".replace("$0", f"${r}")
            text += f"fma.rn.bf16x2 ${r}, ${r}, one, less; "
        return text + "}"
    # 0x6400 is 1024: 1024 + code less 1032, and (1024 + 16 * code) / 16 less 72
    text += "mov.b32 less, 0xE408E408; mov.b32 one, 0x2C002C00; .reg .b32 sixteenth; mov.b32 sixteenth, 0xD480D480; "
    for r, word in enumerate(("$4", "$4", "u", "u")):
        if r == 2:
            text += "shr.u32 u, $4, 8; "
        if r % 2 == 0:
            text += f"lop3.b32 ${r}, {word}, 0x000f000f, 0x64006400, 0xEA; add.rn.f16x2 ${r}, ${r}, less; "
        else:
            text += f"lop3.b32 ${r}, {word}, 0x00f000f0, 0x64006400, 0xEA; "
            text += f"fma.rn.f16x2 ${r}, ${r}, one, sixteenth; "
    return text + "}"


@gluon.jit
def nibble_fragment(word, DTYPE: gl.constexpr):
    """Eight 4-bit codes less 8."""
    asm: gl.constexpr = nibbles_asm(DTYPE)
    return gl.inline_asm_elementwise(asm, "=&r,=&r,=&r,=&r,r,r,r,r", [word], gl.int32, True, 4)


# ---- 8 bits ---------------------------------------------------------------------------------


@gluon.constexpr_function
def octets_asm(DTYPE):
    """Registers $0-3 from the bytes of words $4 and $8: bytes 0 and 2 of a word, then 1 and 3, less 128."""
    if DTYPE == "bf16":  # 0x4300 is 128, 0x4380 is 256: (128 + low 7 bits) less 128 where the top bit is set, else 256
        text = "{ .reg .b32 u, top, one; mov.b32 one, 0xBF80BF80; "
        for r, word in enumerate(("$4", "$4", "$8", "$8")):
            source = word
            if r % 2:
                text += f"shr.u32 u, {word}, 8; "
                source = "u"
            text += f"lop3.b32 ${r}, {source}, 0x007f007f, 0x43004300, 0xEA; "
            text += f"lop3.b32 top, {source}, 0x00800080, 0x43804380, 0x6A; "  # (source & 0x80) ^ 256
            text += f"fma.rn.bf16x2 ${r}, top, one, ${r}; "
        return text + "}"
    text = "{ .reg .b32 less, high; mov.b32 less, 0xE480E480; mov.b32 high, 0x64646464; "  # 1024 + code less 1152
    for r, word in enumerate(("$4", "$4", "$8", "$8")):
        text += f"prmt.b32 ${r}, {word}, high, {'0x4341' if r % 2 else '0x4240'}; add.rn.f16x2 ${r}, ${r}, less; "
    return text + "}"


@gluon.jit
def octet_fragment(word0, word1, DTYPE: gl.constexpr):
    """Eight 8-bit codes less 128."""
    asm: gl.constexpr = octets_asm(DTYPE)
    return gl.inline_asm_elementwise(asm, "=&r,=&r,=&r,=&r" + ",r" * 8, [word0, word1], gl.int32, True, 4)


# ---- planes ---------------------------------------------------------------------------------


def affine_fragment(
    bits: int, tile: Tile, dtype: str, groups: int, zero_points: bool, sparse: bool = False
) -> Fragment | None:
    """The fragment of codes in planes `codes`, `scales`, and `positions` and `zeros` where there are any.

    None where the weights are no 16-bit floats, or a group of scales is narrower than what one product sums.
    """
    if dtype not in ("f16", "bf16") or tile[1] // groups % 32:
        return None

    def operands(planes: Planes, tile: Tile) -> Operands:
        codes = unpack_nibbles(planes["codes"]) if bits == 4 else planes["codes"]
        return Operands(codes, planes.get("positions"), planes["scales"], planes.get("zeros"))

    def planes(operands: Operands, tile: Tile) -> Planes:
        codes = pack_nibbles(operands.values) if bits == 4 else operands.values
        found = {
            "codes": codes,
            "positions": operands.positions,
            "scales": operands.scales,
            "zeros": operands.zeros,
        }
        return {name: plane for name, plane in found.items() if plane is not None}

    decode = nibble_fragment if bits == 4 else octet_fragment
    return Fragment(bits, operands, planes, sparse, groups, zero_points, decode)
