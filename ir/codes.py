"""Codes of quantized tiles, and how formats of codes let others keep only some of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

if TYPE_CHECKING:
    from stoicc.ir.format import TritonDecode


@dataclass(frozen=True, slots=True)
class TileCodes:
    """Codes of a batch of tiles as a quantizing operator made them; nothing is guessed.

    A weight is `(code - zero) * scale`, with zero = 2**(bits - 1) where `zeros` is None.

    Attributes:
        codes: uint8 `[tiles, BM, BK]`, unsigned codes of `bits` bits.
        scales: `[tiles, BM, groups]` in the weight's dtype; groups = max(1, BK / group_size).
        zeros: uint8 `[tiles, BM, groups]`, or None for symmetric codes.
        bits: width of a code.
        group_size: weights along K that share a scale; 0 means the whole row.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int

    def select(self, chosen: Tensor) -> "TileCodes":
        zeros = None if self.zeros is None else self.zeros[chosen]
        return TileCodes(self.codes[chosen], self.scales[chosen], zeros, self.bits, self.group_size)


@dataclass(frozen=True)
class Elements:
    """How a format stores one code for each weight, so that a format of zeros can keep the codes of some only.

    Attributes:
        plane: u8 `[BM, BK * bits / 8]` (kind TILE), codes in the order of columns, the first in a byte's lowest bits.
        bits: of a code: 2, 4 or 8.
        values: the device decode of codes that are loaded already: a `@triton.jit` function `(codes, one pointer
            per other plane at this tile's entry..., BM, BK, DTYPE, GROUPS, BITS)` from uint32 `[BM, BK]` to the
            block in DTYPE, where GROUPS is `groups`. None: composed formats have no device decode either.
        groups: of columns that share a scale in a tile.
        zeros: the plane of zero points `[BM, groups]`, or None where one code is zero everywhere.
        lanes: order of the packed plane that `TileMac` code reads, without which composed formats have no C. "words":
            32-bit lanes of 16 rows, in which field i (`bits` wide) of byte b is column 4 i + b of those of the word.
            "columns": bytes, 16 rows of a column.
        in_lanes: whether `TileMac.in_lanes` says what codes mean one by one. Composed formats may keep codes in another
            order then, from which lanes of a CPU pick.
    """

    plane: str
    bits: int
    values: "TritonDecode | None" = None
    groups: int = 1
    zeros: str | None = None
    lanes: Literal["words", "columns"] | None = None
    in_lanes: bool = False


def nonzero_codes(codes: TileCodes) -> Tensor:
    """Bool `[T, BM, BK]`: where a code differs from its zero point."""
    if codes.zeros is None:
        return codes.codes != 1 << (codes.bits - 1)
    return (codes.codes.unflatten(2, (codes.zeros.shape[2], -1)) != codes.zeros[..., None]).flatten(2)
