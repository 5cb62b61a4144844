"""General n:m structure: at most n of every m consecutive weights along K are not zero.

One bit a weight says which are kept, as in bitmap; a tile keeps as many as any other, so that planes have one size.
2:4 with its own positions is nv24.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from stoicc.formats import _mask, _nm
from stoicc.formats._mask import ranks, woven
from stoicc.formats._nm_picked_c import can_pick, picked_mac
from stoicc.formats.bitmap import kept_decode, kept_dots, kept_mac, kept_pairs
from stoicc.ir.dtypes import bits
from stoicc.ir.errors import FormatError
from stoicc.ir.format import (
    Approximation,
    Plane,
    Planes,
    Tile,
    TileCost,
    TileFormat,
    TileMac,
    TritonDecode,
    squared_error,
)
from stoicc.ir.lattice import Lattice
from stoicc.ir.registry import register_format


@triton.jit
def decode_nm(
    masks, values, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, PAIRED: tl.constexpr, STRIP: tl.constexpr
):
    """Each kept weight from its place among the tile's, zeros between; STRIP of them in each strip."""
    starts = tl.arange(0, BM // 16)[:, None] * STRIP
    first, second, place, then = ranks(masks, starts, BM, BK, PAIRED)
    even = tl.load(values + place, mask=first != 0, other=0.0)
    odd = tl.load(values + then, mask=second != 0, other=0.0)
    return woven(even, odd, BM, BK, DTYPE)


@dataclass(frozen=True)
class Nm(TileFormat):
    """Masks i32 `[BM / 16, BK / 2]` and the kept values; a group with fewer keeps its lowest zeros as weights.

    Attributes:
        n: weights kept of each group.
        m: weights of a group; a tile holds whole groups.
    """

    name: ClassVar[str] = "nm"
    n: int = 2
    m: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise FormatError(f"format nm: expected 0 < n < m, found n={self.n}, m={self.m}; correct them")

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        _mask.check_tile(self.name, tile)
        if tile[1] % self.m:
            raise FormatError(
                f"format {self}: expected tiles of a multiple of {self.m} columns, found {tile[1]}; choose another tile"
            )
        return (
            Plane("masks", "i32", (tile[0] // _mask.ROWS, tile[1] // 2)),
            Plane("values", dtype, (tile[0] * tile[1] * self.n // self.m,)),
        )

    def encode(self, tiles: Tensor) -> Planes:
        paired = tiles.dtype == torch.bfloat16
        kept = _mask.in_order(_nm.largest(bits(tiles).ne(0).to(torch.uint8), self.n, self.m), paired)
        values = _mask.taken(_mask.in_order(tiles, paired), kept)
        stored = tiles.shape[1] * tiles.shape[2] * self.n // self.m
        return {"masks": _mask.pack_bits(kept), "values": values.view(tiles.shape[0], stored)}

    def cost(self, tile: Tile, dtype: str) -> TileCost:
        """Products are of kept weights alone where lanes of a CPU pick their columns."""
        share = self.n / self.m if can_pick(self.n, self.m, tile[1]) else 1
        return replace(super().cost(tile, dtype), macs=tile[0] * tile[1] * share)

    def lattice(self, tile: Tile) -> Lattice:
        return Lattice(keep=(self.n, self.m))

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        kept, values = _mask.unpack_bits(planes["masks"]), planes["values"]
        ordered = values.new_zeros(kept.shape).masked_scatter_(kept, values.contiguous())
        return _mask.as_tiles(ordered, values.dtype == torch.bfloat16)

    def reject(self, tiles: Tensor) -> Tensor:
        return (bits(tiles).ne(0).unflatten(2, (-1, self.m)).sum(3) > self.n).flatten(1).any(1)

    def why(self, tile: Tensor) -> str:
        counts = bits(tile).ne(0).unflatten(1, (-1, self.m)).sum(2)
        row, group = (counts > self.n).nonzero()[0].tolist()
        return (
            f"expected at most {self.n} non-zeros in {self.m}, found {counts[row, group].item()} at row {row}, columns "
            f"{self.m * group}-{self.m * group + self.m - 1}; prune first or add 'dense' to formats"
        )

    def approximate(self, tiles: Tensor, slots: Tensor, statistics: Tensor | None = None) -> Approximation:
        magnitude = tiles.float().abs()
        weighted = magnitude if statistics is None else magnitude * statistics[:, None, :].sqrt()
        held = tiles.where(_nm.largest(weighted, self.n, self.m), 0)
        return Approximation(self.encode(held), squared_error(tiles, held, statistics))

    def keep(self, importance: Tensor) -> Tensor:
        return _nm.largest(importance, self.n, self.m)

    def trainable(self, tile: Tile, dtype: str) -> tuple[str, ...]:
        return ("values",)

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode:
        strip = _mask.ROWS * tile[1] * self.n // self.m
        return TritonDecode(decode_nm, {"PAIRED": dtype == "bf16", "STRIP": strip})

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        strip = _mask.ROWS * tile[1] * self.n // self.m
        arguments = f"const int32_t *masks, const {dtype} *values"
        decode = kept_decode(arguments, f"(BM / 16) * {strip}", dtype, tile)
        return TileMac(
            kept_mac(arguments, f"STRIPS * {strip}", dtype),
            decode=decode,
            pairs=kept_pairs(arguments, f"strip * {strip}", tile) if dtype == "bf16" else None,
            unpack=lambda packed, tile: packed,
            dots=kept_dots(arguments, tile) if dtype == "bf16" else None,
            in_vectors=picked_mac(self.n, self.m, tile, dtype, decode),
        )


register_format(Nm())
