"""What one weight of a format may be, whatever its neighbours are: what a sweep over columns rounds to."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SmallFloat:
    """Floats with few bits: subnormals, and no infinities.

    Attributes:
        mantissa: bits after the leading one.
        lowest: exponent of the smallest normal.
        most: the largest magnitude; what is beyond it becomes that.
    """

    mantissa: int
    lowest: int
    most: float


@dataclass(frozen=True, slots=True)
class Lattice:
    """Weights of a tile, one at a time: dropped ones are zero, kept ones are codes times a scale, or floats.

    Attributes:
        bits: width of a code, (code - zero) * scale; None where kept weights are no codes.
        floats: what kept weights are times a power of two; None, and no bits: floats in the weight's dtype.
        group_size: weights along K that share a scale; it divides the tile's columns. Only read with codes or floats.
        zero_points: codes with a zero point per group; otherwise the zero is 2**(bits - 1).
        keep: (n, m) where at most n of every m consecutive weights along K are kept; None where all may be.
    """

    bits: int | None = None
    group_size: int = 0
    zero_points: bool = False
    keep: tuple[int, int] | None = None
    floats: SmallFloat | None = None
