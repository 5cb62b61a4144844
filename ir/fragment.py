"""The tensor-core capability of a format: its tiles as operands of NVIDIA's `mma` instructions.

A format says which bits a tile's operands have; where they stand in a packed tile is the backend's
business (`codegen/gluon/register_order.py`), so that a format never deals with lanes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Planes = dict[str, Tensor]
Tile = tuple[int, int]

FRAGMENT_BITS = (4, 8, 16)
"""Widths of an operand as it is stored: a code of 4 or 8 bits, or the 16-bit value itself."""


@dataclass(frozen=True)
class Operands:
    """A batch of T tiles as matrices, rows along M.

    Attributes:
        values: `[T, BM, C]`, uint8 codes, or int16 bit patterns of 16-bit floats. C = BK; for sparse
            operands BK / 2, the two kept of each four columns.
        positions: uint8 `[T, BM, BK / 8]`, sparse operands only: a nibble for each four columns, the first
            kept column in its lower two bits and the second, larger one above; the earlier four in the
            lower nibble of a byte.
        scales: `[T, BM, G]` in the weight's dtype, what a row's sums over each of G equal runs of columns are
            multiplied by in fp32; None where operands are the weights themselves.
        zeros: uint8 `[T, BM, G]`: zero points of codes; None where `decode` has taken them off.
    """

    values: Tensor
    positions: Tensor | None = None
    scales: Tensor | None = None
    zeros: Tensor | None = None


@dataclass(frozen=True)
class Fragment:
    """A format's code for NVIDIA tensor cores (the Gluon dialect).

    A warp multiplies 16 rows of a tile at a time. Its operand for 16 columns (32 where sparse) is a *fragment*: four
    32-bit registers in each lane, two 16-bit floats in each. Packed, a lane finds the operands of one fragment in
    `bits` / 4 neighbouring words: element h (0, 1) of register r at bit `16 * h + bits * (r % n)` of word `r // n`, for
    n = 16 / `bits`. `decode` turns those words into the fragment.

    Attributes:
        bits: of a stored operand, one of FRAGMENT_BITS.
        operands: canonical planes, one entry per tile, and the tile's shape -> matrices.
        planes: the exact inverse of `operands`, one entry per tile in every plane.
        sparse: 2:4 operands, multiplied by `mma.sp`.
        groups: runs of columns in a tile with a scale of their own; 0: nothing is scaled after the product.
        zero_points: `operands` gives zero points. They are stored less half the range of a code, and taken
            off what `decode` returns.
        decode: `@gluon.jit` function `(*words, DTYPE, **constants)`, None for 16 bits. Each argument of words is
            an int32 `[MT, W, 32, 4]` whose last axis repeats the word for the four registers, so that a
            function may compute register by register (`words >> register`, say). Returns int32 of that shape:
            the fragment, two floats of DTYPE ("f16" or "bf16") in each. Codes that are scaled afterwards
            come back less half their range, exactly.
        constants: further constexpr arguments of `decode`.
    """

    bits: int
    operands: Callable[[Planes, Tile], Operands]
    planes: Callable[[Operands, Tile], Planes]
    sparse: bool = False
    groups: int = 0
    zero_points: bool = False
    decode: Any = None
    constants: tuple[tuple[str, int | float | bool], ...] = ()
