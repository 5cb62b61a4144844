"""A format of zeros over a format of codes: positions from one, values from the other.

`masked<mask=nm<n=2, m=8>, values=int4<group_size=128>>` stores 4-bit codes of two of eight weights, one bit a weight
for where they stand, and the scales of int4. Any format with `keep` is a mask, any with `elements` gives values; both
are asked through the doors of TileFormat alone.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from stoicc.formats import _kept, _kept_c, _kept_rows_c
from stoicc.formats._kept import KeptRuns
from stoicc.formats._kept_device import decode_kept, decode_kept_2, decode_rows, decode_rows_2
from stoicc.formats._kept_rows import KeptRows
from stoicc.formats.bitmap import Bitmap
from stoicc.formats.int4 import Int4
from stoicc.ir.dtypes import DTYPE_NAMES, TORCH_DTYPES, bits
from stoicc.ir.errors import FormatError
from stoicc.ir.format import (
    Approximation,
    Elements,
    Plane,
    Planes,
    Tile,
    TileCodes,
    TileCost,
    TileFormat,
    TileMac,
    TritonDecode,
    nonzero_codes,
    squared_error,
    tile_shape,
)
from stoicc.ir.lattice import Lattice
from stoicc.ir.registry import register_format

_MASK, _VALUES = Bitmap(), Int4()
_OWN = ("masks", "starts", "codes", "codes_ptr")


@dataclass(frozen=True)
class Masked(TileFormat):
    """Masks, the codes of what is kept, and what else the format of values stores.

    Where the mask keeps n of every m and lanes can pick (`_kept_rows.py`), every row has as many codes, those of kept
    zeros among them. Elsewhere the codes of what is not zero are runs (`_kept.py`). A -0.0 is kept where the values
    have one.

    Attributes:
        mask: which weights may be kept.
        values: how those that are no zeros are stored; groups of scales are those of the whole tile.
    """

    name: ClassVar[str] = "masked"
    by_default: ClassVar[bool] = False  # it would win by bytes where the format of values alone is faster
    revision: ClassVar[int] = 2
    mask: TileFormat = _MASK
    values: TileFormat = _VALUES

    def __post_init__(self) -> None:
        if self.mask.keep(torch.zeros(1, 16, 64)) is None:
            raise FormatError(
                f"format masked: expected a mask that says which weights it keeps, found {self.mask}; use bitmap, nm, "
                "nv24 or a format of yours with `keep`"
            )

    def elements_of(self, tile: Tile, dtype: str) -> Elements:
        """How the values are stored; FormatError where they are not one code for each weight."""
        _kept.check_tile(self.name, tile)
        self.mask.planes(tile, dtype)  # refuses groups that do not meet the tile
        elements = self.values.elements(tile, dtype)
        if elements is None:
            raise FormatError(
                f"format masked: expected values with one code of 2, 4 or 8 bits for each weight, found {self.values}; "
                "use int2, int4, int8, fp8, mxfp4, nvfp4 or a format of yours with `elements`"
            )
        return elements

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        elements = self.elements_of(tile, dtype)
        own = self._layout(elements, tile).planes(tile)
        return (*own, *(plane for plane in self.values.planes(tile, dtype) if plane.name != elements.plane))

    def encode(self, tiles: Tensor) -> Planes:
        return self.encode_shared(tiles, torch.arange(tiles.shape[0]))

    def encode_shared(self, tiles: Tensor, slots: Tensor) -> Planes:
        return self._keep(self.values.encode_shared(tiles, slots), bits(tiles).ne(0), DTYPE_NAMES[tiles.dtype])

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        elements = self.elements_of(tile, dtype)
        codes, kept = self._layout(elements, tile).unpack(planes)
        whole = {name: plane for name, plane in planes.items() if name not in _OWN}
        values = self.values.decode({elements.plane: _kept.pack_rows(codes, elements.bits), **whole}, tile, dtype)
        return values.where(kept, 0)

    def migrate(self, planes: Planes, tile: Tile, dtype: str, revision: int) -> Planes | None:
        """Revision 1 had runs of codes for every mask, without those of kept zeros."""
        elements = self.elements_of(tile, dtype)
        layout, runs = self._layout(elements, tile), KeptRuns(elements.bits)
        if layout == runs:
            return planes
        codes, kept = runs.unpack(planes)
        if elements.zeros is not None and len(planes[elements.zeros]) != len(codes):
            return None  # tiles share zero points, and nothing here says which
        rest = {name: plane for name, plane in planes.items() if name not in _OWN}
        zero = self._codes_of_zero(elements, rest, tile, dtype)
        return {**layout.pack(codes.where(kept, zero), kept), **rest}

    def reject(self, tiles: Tensor) -> Tensor:
        return self._outside(bits(tiles).ne(0)) | self.values.reject(tiles)

    def reject_shared(self, tiles: Tensor, slots: Tensor) -> Tensor:
        return self._outside(bits(tiles).ne(0)) | self.values.reject_shared(tiles, slots)

    def why(self, tile: Tensor) -> str:
        owner = self.mask if self._outside(bits(tile[None]).ne(0)).any() else self.values
        return owner.why(tile)

    def tile_bytes(self, tiles: Tensor, dtype: str) -> Tensor:
        elements, fixed = self.elements_of(tile_shape(tiles), dtype), super().tile_bytes(tiles, dtype)
        if isinstance(self._layout(elements, tile_shape(tiles)), KeptRows):
            return fixed
        runs = _kept.run_bytes(_kept.in_blocks(bits(tiles).ne(0)), elements.bits).flatten(1).sum(1)
        return runs.double() + fixed

    def cost(self, tile: Tile, dtype: str) -> TileCost:
        """Products are of kept weights alone where lanes of a CPU pick their columns."""
        rows, whole = self._layout(self.elements_of(tile, dtype), tile), super().cost(tile, dtype)
        return replace(whole, macs=whole.macs * rows.n // rows.m) if isinstance(rows, KeptRows) else whole

    def keep(self, importance: Tensor) -> Tensor | None:
        return self.mask.keep(importance)

    def lattice(self, tile: Tile) -> Lattice | None:
        """That of the values where the mask keeps weights; None where either is unknown."""
        mask, values = self.mask.lattice(tile), self.values.lattice(tile)
        if mask is None or values is None or mask != Lattice(keep=mask.keep) or values.keep is not None:
            return None
        return replace(values, keep=mask.keep)

    # -- lossy doors, and codes of operators -------------------------------------------------

    def approximate(self, tiles: Tensor, slots: Tensor, statistics: Tensor | None = None) -> Approximation:
        """Zeros where the mask drops the least of a group, then the nearest planes of what is left."""
        importance = tiles.float().abs()
        importance = importance if statistics is None else importance * statistics[:, None, :].sqrt()
        kept = self.mask.keep(importance.where(bits(tiles).ne(0), 0))
        assert kept is not None
        held = tiles.where(kept, 0)
        whole, dtype = self.values.approximate(held, slots, statistics).planes, DTYPE_NAMES[tiles.dtype]
        back = self.values.decode(whole, tile_shape(tiles), dtype).where(kept & bits(held).ne(0), 0)
        return Approximation(self._keep(whole, bits(back).ne(0), dtype), squared_error(tiles, back, statistics))

    @property
    def planes_hold_codes(self) -> bool:
        return self.values.planes_hold_codes

    def reject_codes(self, codes: TileCodes) -> Tensor:
        return self.values.reject_codes(codes) | self._outside(nonzero_codes(codes))

    def from_planes(self, codes: TileCodes) -> Planes:
        return self._keep(self.values.from_planes(codes), nonzero_codes(codes), DTYPE_NAMES[codes.scales.dtype])

    @property
    def bits(self) -> Any:
        """Width of the codes of the values, for those who quantize for them; `group_size`, `zero_points` likewise."""
        return getattr(self.values, "bits")  # noqa: B009 (not every format has it)

    @property
    def group_size(self) -> Any:
        return getattr(self.values, "group_size")  # noqa: B009

    @property
    def zero_points(self) -> Any:
        return getattr(self.values, "zero_points")  # noqa: B009

    # -- devices -----------------------------------------------------------------------------

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode | None:
        elements, beside = self.elements_of(tile, dtype), len(self.values.planes(tile, dtype)) - 1
        if elements.values is None or beside not in (1, 2):
            return None
        constants = {"VALUES": elements.values.function, "BITS": elements.bits, "GROUPS": elements.groups}
        rows = self._layout(elements, tile)
        if isinstance(rows, KeptRows):
            return TritonDecode((decode_rows, decode_rows_2)[beside - 1], {**constants, "N": rows.n, "M": rows.m})
        return TritonDecode((decode_kept, decode_kept_2)[beside - 1], constants)

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        elements = self.elements_of(tile, dtype)
        rows = self._layout(elements, tile)
        if isinstance(rows, KeptRows):
            return _kept_rows_c.picked_mac(self.values, elements, rows, tile, dtype)
        return _kept_c.masked_mac(self.values, elements, tile, dtype)

    # -- help --------------------------------------------------------------------------------

    def _layout(self, elements: Elements, tile: Tile) -> KeptRows | KeptRuns:
        """How masks and codes are stored."""
        mask = self.mask.lattice(tile)
        return KeptRows.of(None if mask is None else mask.keep, elements, tile) or KeptRuns(elements.bits)

    def _outside(self, nonzero: Tensor) -> Tensor:
        """Bool `[T]`: tiles with a weight where the mask keeps none."""
        kept = self.mask.keep(nonzero.float())
        assert kept is not None
        return (nonzero & ~kept).flatten(1).any(1)

    def _keep(self, whole: Planes, kept: Tensor, dtype: str) -> Planes:
        """Of the planes of values the codes of what is kept, and all others as they are."""
        tile = tile_shape(kept)
        elements = self.elements_of(tile, dtype)
        rest = dict(whole)
        codes = _kept.unpack_rows(rest.pop(elements.plane), elements.bits)
        layout = self._layout(elements, tile)
        if isinstance(layout, KeptRows):  # which hold codes of zeros as well
            codes = codes.where(kept, self._codes_of_zero(elements, rest, tile, dtype))
        return {**layout.pack(codes, kept), **rest}

    def _codes_of_zero(self, elements: Elements, rest: Planes, tile: Tile, dtype: str) -> Tensor:
        """What is a zero in tiles with these planes beside their codes: u8 `[T or 1, BM, BK]`."""
        if elements.zeros is not None:
            return rest[elements.zeros].repeat_interleave(tile[1] // elements.groups, 2)
        encoded = self.values.encode(torch.zeros(1, *tile, dtype=TORCH_DTYPES[dtype]))
        return _kept.unpack_rows(encoded[elements.plane], elements.bits)


register_format(Masked())
