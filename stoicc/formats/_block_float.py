"""What fp8, mxfp4 and nvfp4 share: small floats times a scale of a block of weights along K."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from stoicc.formats._affine import GroupGrid, share
from stoicc.ir.dtypes import TORCH_DTYPES, bits
from stoicc.ir.errors import FormatError
from stoicc.ir.format import Approximation, Planes, Tile, TileFormat, squared_error


@dataclass(frozen=True)
class BlockFloat(TileFormat):
    """Base of the formats of small floats; a subclass says what codes and scales are."""

    @abstractmethod
    def grid(self, columns: int) -> GroupGrid:
        """Where blocks of scales fall on a tile of so many columns."""

    @abstractmethod
    def nearest(self, tiles: Tensor, slots: Tensor) -> Planes:
        """The published conversion of tiles `[T, BM, BK]`; tiles of equal slots share what is shared."""

    @abstractmethod
    def exact(self, tiles: Tensor, slots: Tensor) -> Planes:
        """Planes that give the tiles back bit for bit wherever some scale of those tried does."""

    @abstractmethod
    def values(self, planes: Planes) -> tuple[Tensor, Tensor]:
        """Codes as fp32 `[T, BM, BK]`, and what they are multiplied by in fp32 `[T, BM, blocks]`."""

    def product(self, planes: Planes) -> Tensor:
        """`[T, BM, BK]` in fp32, before weights are rounded to their dtype."""
        codes, scales = self.values(planes)
        return (codes.unflatten(2, (scales.shape[2], -1)) * scales[..., None]).flatten(2)

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        return self.product(planes).to(TORCH_DTYPES[dtype])

    def encode(self, tiles: Tensor) -> Planes:
        return self.exact(tiles, torch.arange(tiles.shape[0]))

    def encode_shared(self, tiles: Tensor, slots: Tensor) -> Planes:
        return self.exact(tiles, slots)

    def reject(self, tiles: Tensor) -> Tensor:
        return self.reject_shared(tiles, torch.arange(tiles.shape[0]))

    def reject_shared(self, tiles: Tensor, slots: Tensor) -> Tensor:
        """True where no tried scale is exact in fp32; the first rows are tried before whole tiles are."""
        rejected = self._inexact(tiles[:, :1], slots)
        left = (~rejected).nonzero().flatten()
        if left.numel():
            rejected[left] = self._inexact(tiles[left], slots[left])
        shared = GroupGrid.of(0, tiles.shape[2], self.name)
        return share(rejected.to(torch.uint8).view(-1, 1, 1), slots, shared, "amax").bool().flatten()

    def approximate(self, tiles: Tensor, slots: Tensor, statistics: Tensor | None = None) -> Approximation:
        planes = self.nearest(tiles, slots)
        return Approximation(planes, squared_error(tiles, self.product(planes).to(tiles.dtype), statistics))

    def why(self, tile: Tensor) -> str:
        wrong = self._differs(tile[None], torch.zeros(1, dtype=torch.int64))[0].nonzero()
        if not len(wrong):
            return "expected one scale for all that share it, found tiles that disagree; pass approximate=True"
        row, column = wrong[0].tolist()
        return (
            f"expected every weight to be a code of {self} times its block's scale bit for bit, found "
            f"{tile[row, column].item():g} at row {row}, column {column}; pass approximate=True or add 'dense'"
        )

    def _inexact(self, tiles: Tensor, slots: Tensor) -> Tensor:
        return self._differs(tiles, slots).flatten(1).any(1)

    def _differs(self, tiles: Tensor, slots: Tensor) -> Tensor:
        return bits(self.product(self.exact(tiles, slots))) != bits(tiles.float())


def block_amax(tiles: Tensor, slots: Tensor, grid: GroupGrid) -> Tensor:
    """The largest magnitude of each block, over the tiles that share its scale: fp32 `[T, BM, blocks]`."""
    return share(tiles.float().abs().unflatten(2, (grid.per_tile, -1)).amax(3), slots, grid, "amax")


def scaled(tiles: Tensor, scales: Tensor) -> Tensor:
    """Tiles over their blocks' scales, fp32 `[T, BM, BK]`; zeros keep their sign where a scale is 0."""
    blocks, step = tiles.float().unflatten(2, (scales.shape[2], -1)), scales[..., None]
    return torch.where(step != 0, blocks / step, blocks).flatten(2)


def whole_blocks(name: str, columns: int, size: int) -> GroupGrid:
    """The grid of a format whose blocks have one size; FormatError where the tile does not hold whole ones."""
    if columns % size:
        raise FormatError(
            f"format {name}: expected tiles of a multiple of {size} columns, the block of its scales, found {columns}; "
            "choose a wider tile"
        )
    return GroupGrid.of(size, columns, name)
