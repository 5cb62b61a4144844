"""The numbers of a kernel class that its text is made of."""

from dataclasses import dataclass

from stoicc.codegen.gluon.blobs import GluonLoop
from stoicc.codegen.gluon.launch import slot_words
from stoicc.ir.types import Module

LANES = 32
ITEM_HEAD = 5
"""Columns of an item before its tile counts (`blobs.Buffers.items`)."""


@dataclass(frozen=True)
class Shape:
    """Attributes:
    mtiles: m-tiles of 16 rows that a warp multiplies.
    words: of x's block that a tile meets, along K.
    copies: rounds in which all threads copy 16 bytes each, for the largest blob.
    tail: K is no multiple of BK.
    wgmma: products are those of warpgroups, in flight while the next operands are loaded.
    prologue: names of what x meets on its way to shared memory, as arguments of the kernel; () copies x as it is.
    """

    tile: tuple[int, int]
    dtype: str
    warps: int
    mtiles: int
    words: int
    loops: tuple[GluonLoop, ...]
    copies: int
    tail: bool
    wgmma: bool
    prologue: tuple[str, ...] = ()

    @staticmethod
    def of(
        module: Module, loops: tuple[GluonLoop, ...], warps: int, wgmma: bool, prologue: tuple[str, ...] = ()
    ) -> "Shape":
        (rows, columns), threads = module.tiles.tile, warps * LANES
        copies = max((-(-loop.blob.chunks // threads) for loop in loops), default=1)
        tail, mtiles = module.tiles.shape[1] % columns != 0, rows // (16 * warps)
        dtype, words = module.tiles.dtype, columns // 2
        return Shape((rows, columns), dtype, warps, mtiles, words, loops, copies, tail, wgmma, prologue)

    @property
    def threads(self) -> int:
        return self.warps * LANES

    @property
    def slot_words(self) -> int:
        return slot_words(self.loops, self.warps)

    @property
    def quoted(self) -> str:
        """The dtype as an argument."""
        return f'"{self.dtype}"'
