"""The planes of a format of values but for its codes, which a composed format has elsewhere, as its C reads them."""

from dataclasses import dataclass

import torch

from stoicc.codegen.cpu.plane_types import C_TYPES
from stoicc.ir.dtypes import DTYPE_NAMES, TORCH_DTYPES
from stoicc.ir.format import Planes, Tile, TileFormat, TileMac


@dataclass(frozen=True)
class Beside:
    """What stands beside the codes `[plane]` of a format of values, whose C is `code`.

    Attributes:
        zeros: the canonical planes of a tile of zeros, those of codes among them.
        packed: the same as `code` packs them.
    """

    values: TileFormat
    plane: str
    code: TileMac
    tile: Tile
    dtype: str
    zeros: Planes
    packed: Planes

    @staticmethod
    def of(values: TileFormat, plane: str, code: TileMac, tile: Tile, dtype: str) -> "Beside":
        encoded = values.encode(torch.zeros(1, *tile, dtype=TORCH_DTYPES[dtype]))
        zeros = {name: entry.contiguous() for name, entry in encoded.items()}
        return Beside(values, plane, code, tile, dtype, zeros, code.pack(zeros))

    @property
    def names(self) -> list[str]:
        return [plane.name for plane in self.values.planes(self.tile, self.dtype) if plane.name != self.plane]

    @property
    def parameters(self) -> list[str]:
        """C of parameters for packed planes."""
        return [f"const {C_TYPES[DTYPE_NAMES[self.packed[name].dtype]]} *{name}" for name in self.names]

    @property
    def canonical_parameters(self) -> list[str]:
        planes = self.values.planes(self.tile, self.dtype)
        return [f"const {C_TYPES[plane.dtype]} *{plane.name}" for plane in planes if plane.name != self.plane]

    def flip(self, bits: int) -> int:
        """The bits in which a packed code differs from what it is in the canonical plane."""
        code, packed = (planes[self.plane].view(torch.uint8).flatten()[0] for planes in (self.zeros, self.packed))
        return int(code ^ packed) & (1 << bits) - 1

    def arguments(self, codes: str) -> str:
        """C of the arguments for a function of the format of values, with `codes` for its codes."""
        planes = self.values.planes(self.tile, self.dtype)
        return ", ".join(codes if plane.name == self.plane else plane.name for plane in planes)

    def pack(self, planes: Planes) -> Planes:
        """The planes beside the codes of any number of entries, packed."""
        side = self.code.pack({self.plane: self.zeros[self.plane], **{name: planes[name] for name in self.names}})
        return {name: side[name] for name in self.names}

    def unpack(self, packed: Planes) -> Planes:
        assert self.code.unpack is not None
        filled = {self.plane: self.packed[self.plane], **{name: packed[name] for name in self.names}}
        side = self.code.unpack(filled, self.tile)
        return {name: side[name] for name in self.names}
