"""Codes in SIMD lane order, and from there back to canonical planes, also what `_nm_c` packs.

Columns of a row are permuted inside whole words, a step for all words at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stoicc.codegen.cpu.lanes import from_lanes, to_lanes
from stoicc.formats._affine import pack_nibbles, unpack_nibbles
from stoicc.ir.format import Planes, Tile, TileMac

_EACH_NIBBLE_8 = -0x77777778
"""0x88888888 as an int32: codes are stored less 8, which in four bits is `^ 8`."""

Codes = Callable[[Planes, Tile, int], Planes]
"""Planes in lane order, the tile and its groups of scales -> canonical planes of codes (and positions)."""


def signed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes or zeros u8 as int8, less the symmetric zero 2**(bits - 1)."""
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def byte_lanes(codes: Tensor, groups: int) -> Tensor:
    """8-bit codes int8 `[entries, BM, C]` -> int32 `[entries, strips, words, 16]`, four codes a word."""
    return to_lanes(_grouped(codes, groups).contiguous().view(torch.int32).flatten(2))


def nibble_lanes(codes: Tensor, groups: int, order: Sequence[int]) -> Tensor:
    """4-bit codes u8 `[entries, BM, C]` -> int32 `[entries, strips, words, 16]`, eight codes a word.

    Codes become two's complement (less 8); nibble i of a word, from the lowest, holds its code
    `order[i]`. A group whose count is not a multiple of eight ends in a word that is not full.
    """
    nibbles = _grouped(codes ^ 8, groups)[..., list(order)]
    return to_lanes((nibbles[..., 0::2] | nibbles[..., 1::2] << 4).contiguous().view(torch.int32).flatten(2))


def _grouped(codes: Tensor, groups: int) -> Tensor:
    """`[entries, BM, C]` -> `[entries, BM, words, 8]`: each group padded to a multiple of eight codes."""
    grouped = codes.unflatten(2, (groups, -1))
    return torch.nn.functional.pad(grouped, (0, -grouped.shape[3] % 8)).flatten(2).unflatten(2, (-1, 8))


def scale_lanes(planes: Planes, bits: int) -> Planes:
    """Scales `[entries, BM, groups]` as `[entries, strips, groups, 16]`, zero points (if any) as int8 alike."""
    packed = {"scales": to_lanes(planes["scales"])}
    return {**packed, "zeros": to_lanes(signed(planes["zeros"], bits))} if "zeros" in planes else packed


def with_unpack(code: TileMac | None, codes: Codes, groups: int, bits: int) -> TileMac | None:
    """The code of an affine format, with the inverse of its packing."""

    def unpack(packed: Planes, tile: Tile) -> Planes:
        planes = {**codes(packed, tile, groups), "scales": from_lanes(packed["scales"], tile[0])}
        if "zeros" in packed:  # stored less half the range, as int8: bytes wrap
            planes["zeros"] = from_lanes(packed["zeros"], tile[0]).view(torch.uint8) + (1 << (bits - 1))
        return planes

    return None if code is None else replace(code, unpack=unpack)


def byte_codes(packed: Planes, tile: Tile, groups: int) -> Planes:
    """8-bit codes u8 `[entries, BM, BK]`."""
    return {"codes": _present(from_lanes(packed["codes"], tile[0]), groups, tile[1]) ^ 128}


def nibble_codes(packed: Planes, tile: Tile, groups: int) -> Planes:
    """4-bit codes u8 `[entries, BM, BK / 2]`."""
    words = _unshuffled(from_lanes(packed["codes"], tile[0]), 4) ^ _EACH_NIBBLE_8
    return {"codes": _present(words, groups, tile[1] // 2)}


def kept_codes(packed: Planes, tile: Tile, groups: int) -> Planes:
    """4-bit codes of two kept of four u8 `[entries, BM, BK / 4]`, and their positions."""
    words = from_lanes(packed["codes"], tile[0]) ^ _EACH_NIBBLE_8
    return {
        "codes": _present(words, groups, tile[1] // 4),
        "positions": positions(packed["positions"], tile, groups),
    }


def positions(packed: Tensor, tile: Tile, groups: int) -> Tensor:
    """2:4 positions u8 `[entries, BM, BK / 8]`."""
    words = _unshuffled(from_lanes(packed, tile[0]), 4)
    if tile[1] // groups % 8 == 0:
        return _present(words, groups, tile[1] // 8)
    return pack_nibbles(_present(unpack_nibbles(_as_bytes(words)), groups, tile[1] // 4))


def _present(words: Tensor, groups: int, elements: int) -> Tensor:
    """Of words `[entries, BM, n]` as bytes, those that the groups fill: u8 `[entries, BM, elements]`."""
    grouped = _as_bytes(words).unflatten(2, (groups, -1))
    return grouped[..., : elements // groups].flatten(2).contiguous()


def _as_bytes(words: Tensor) -> Tensor:
    """Contiguous words `[entries, BM, n]` as bytes; one word a row may have any stride, of which no view is made."""
    entries, rows, count = words.shape
    return words.flatten().view(torch.uint8).view(entries, rows, count * words.element_size())


def _fields(width: int, word: int) -> int:
    """The lower of each two neighbouring fields of `width` bits in a word, as a mask."""
    return sum(((1 << width) - 1) << at for at in range(0, word, 2 * width))


def _unshuffled(words: Tensor, width: int) -> Tensor:
    """Of fields of `width` bits, the even ones to the lower half of the word and the odd ones to the upper."""
    word = 8 * words.element_size()
    halves = []
    for half in (words, words >> width):
        half = half & _fields(width, word)
        for step in (width << i for i in range((word // width).bit_length() - 2)):
            half |= half >> step
            half &= _fields(2 * step, word)
        halves.append(half)
    return halves[0].bitwise_or_(halves[1] << word // 2)


def bf16_words(values: Tensor) -> str:
    """The bits of numbers in bf16, as an array in C has them."""
    return ", ".join(f"{word & 0xFFFF:#x}" for word in values.bfloat16().view(torch.int16).tolist())
