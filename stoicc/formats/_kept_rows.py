"""The codes of the weights that are kept, where a mask keeps n of every m: each row has as many.

Rows need no offsets then, and the place of a code is known from the mask of its own group. A group of which fewer are
not zero keeps its lowest zeros as well, as codes of zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stoicc.formats import _mask, _nm
from stoicc.formats._kept import pack_rows, unpack_rows
from stoicc.ir.format import Elements, Plane, Planes, Tile

SIXTEEN = 16
"""Columns of x that lanes pick from, of which they take one or two times four."""


@dataclass(frozen=True)
class KeptRows:
    """Masks u8 `[BM, BK / 8]`, column c in bit c % 8 of byte c / 8, and codes u8 `[BM, BK * n / m * bits / 8]`."""

    n: int
    m: int
    bits: int

    @staticmethod
    def of(keep: tuple[int, int] | None, elements: Elements, tile: Tile) -> "KeptRows | None":
        """The layout for codes that lanes of a CPU can pick columns of x for, or None for all others.

        A lane picks four or eight of 16 columns, by positions that are no longer than the masks that they replace; the
        codes of a group of scales fill whole words.
        """
        if keep is None or not elements.in_lanes:
            return None
        n, m = keep
        size = tile[1] // elements.groups
        quarter = 4 * n == m and m in (4, 8, 16)
        if not (quarter or (n, m) == (2, 4)) or size % 32 or size * n // m * elements.bits % 32:
            return None
        return KeptRows(n, m, elements.bits)

    @property
    def quads(self) -> int:
        """Times four weights that are kept of 16 columns."""
        return 4 * self.n // self.m

    def planes(self, tile: Tile) -> tuple[Plane, ...]:
        rows, columns = tile
        return (
            Plane("masks", "u8", (rows, columns // 8)),
            Plane("codes", "u8", (rows, columns * self.n // self.m * self.bits // 8)),
        )

    def pack(self, codes: Tensor, kept: Tensor) -> Planes:
        """Codes u8 `[T, BM, BK]`, at most n of every m of them kept -> planes."""
        kept = _nm.largest(kept.to(torch.uint8), self.n, self.m)
        own = _mask.taken(codes, kept).view(*codes.shape[:2], codes.shape[2] * self.n // self.m)
        return {"masks": pack_rows(kept.to(torch.uint8), 1), "codes": pack_rows(own, self.bits)}

    def unpack(self, planes: Planes) -> tuple[Tensor, Tensor]:
        """The inverse of `pack`: codes u8 `[T, BM, BK]`, 0 where none is kept, and the kept ones as bool."""
        kept = unpack_rows(planes["masks"], 1).bool()
        own = unpack_rows(planes["codes"], self.bits)
        codes = torch.zeros_like(kept, dtype=torch.uint8)
        codes.view(-1).index_copy_(0, _mask.places(kept), own.flatten())
        return codes, kept
