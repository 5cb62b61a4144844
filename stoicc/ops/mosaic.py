"""A sweep over a mosaic: every tile is rounded to the format that it was given, and the weights to come answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stoicc.ir.errors import InputError
from stoicc.ir.format import TileFormat
from stoicc.ir.lattice import Lattice
from stoicc.ops._choosing import unquantized
from stoicc.ops._hessian import InverseHessian, invert
from stoicc.ops._inputs import seen_by_tiles
from stoicc.ops._rounding import CodeOptions, ToCodes, ToFloats
from stoicc.ops._sweep import OfEach, Rounding, Sweep, ToDtype
from stoicc.ops.graph import CompressedWeight, Prune, Quantize, Update
from stoicc.ops.lowering import lower
from stoicc.ops.statistics import Statistics
from stoicc.tiling import check_tile, grid_of, spread_tile_mask
from stoicc.weights import FormatLike, as_tile_map, on_cpu


@on_cpu
def mosaic(
    weight: Tensor | CompressedWeight,
    statistics: Statistics,
    tile_map: Sequence[Sequence[FormatLike]],
    tile: tuple[int, int] = (64, 64),
    clip: bool = True,
    damping: float = 0.01,
) -> CompressedWeight:
    """Round every tile to its format in one sweep over the columns, and let the columns to come answer.

    The sweep of OPTQ and SparseGPT (Frantar et al. 2023, arXiv 2210.17323; Frantar and Alistarh 2023, arXiv
    2301.00774) with a rounding, and a choice of what is dropped, that differ from tile to tile. Codes, scales and
    zeros are those that the sweep decided on. H = X^T X + damping * mean(diagonal) * I.

    Args:
        weight: `[M, K]`, or an operator's result that is not quantized; what was pruned stays pruned.
        statistics: of the layer's inputs, with a gram matrix.
        tile_map: a format for each tile, `[tile rows][tile columns]` of texts or formats that have a lattice.
        tile: the tile shape of the map.
        clip, damping: as in `optq`.

    Raises:
        InputError: a quantized weight, statistics of another layer or without a gram matrix, or a format whose
            weights depend on one another (`TileFormat.lattice` is None).
    """
    compressed, state = unquantized("ops.mosaic", weight)
    check_tile(tile)
    inverse = invert("ops.mosaic", seen_by_tiles("ops.mosaic", state, statistics, gram=True), damping)
    return swept_mosaic(compressed, inverse, tile_map, tile, clip)


def swept_mosaic(
    weight: CompressedWeight,
    inverse: InverseHessian,
    tile_map: Sequence[Sequence[FormatLike]],
    tile: tuple[int, int],
    clip: bool = True,
) -> CompressedWeight:
    """As `mosaic`, with an inverse Hessian that is there already, in the order of the tiles."""
    state = lower(weight)
    shape = (state.values.shape[0], state.values.shape[1])
    formats, choice = as_tile_map(tile_map, grid_of(shape, tile))
    kept = torch.ones(shape, dtype=torch.bool).T if state.kept is None else state.kept.T.clone()
    lattices = [lattice_of("ops.mosaic", fmt, tile) for fmt in formats]
    swept = _Mosaic(inverse, lattices, choice, tile, clip).run(state.values, kept)
    what = f"mosaic of {', '.join(map(str, formats))}, {inverse.said}"
    result = weight.then(Update(swept.values, what), tile).then(Prune(kept.T, what), tile)
    for sheet in swept.sheets.values():
        result = result.then(sheet.node(choice, tile), tile)
    return result


def lattice_of(who: str, fmt: TileFormat, tile: tuple[int, int]) -> Lattice:
    """The lattice of a format at a tile shape, or InputError."""
    lattice = fmt.lattice(tile)
    if lattice is None:
        raise InputError(
            f"{who}: expected formats whose weights can be rounded one by one, found {fmt} on tiles of "
            f"{tile[0]} x {tile[1]}; leave it out, or choose without compensation"
        )
    return lattice


@dataclass(eq=False)
class _Sheet:
    """Codes of one kind, `[K, M]` as the sweep goes, and the formats whose tiles have them."""

    options: CodeOptions
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    formats: list[int] = field(default_factory=list)

    @staticmethod
    def empty(options: CodeOptions, weight: Tensor) -> "_Sheet":
        room = ToCodes.empty(options, weight, torch.empty(0))
        return _Sheet(options, room.codes, room.scales, room.zeros)

    def take(self, found: ToCodes, columns: slice, rows: Tensor) -> None:
        """Keep the codes that a block of columns found for these rows."""
        first = columns.start // self.options.group_size
        groups = slice(first, first + len(found.scales))
        self.codes[columns].index_copy_(1, rows, found.codes)
        self.scales[groups].index_copy_(1, rows, found.scales)
        if self.zeros is not None and found.zeros is not None:
            self.zeros[groups].index_copy_(1, rows, found.zeros)

    def node(self, choice: Tensor, tile: tuple[int, int]) -> Quantize:
        shape = (self.codes.shape[1], self.codes.shape[0])
        where = spread_tile_mask(torch.isin(choice, torch.tensor(self.formats)), shape, tile)
        zeros = None if self.zeros is None else self.zeros.T.contiguous()
        codes, scales = self.codes.T.contiguous(), self.scales.T.contiguous()
        options = self.options
        return Quantize(codes, scales, zeros, options.bits, options.group_size, where, f"mosaic, {options}")


@dataclass(frozen=True, eq=False)
class _Swept:
    """Attributes: values `[M, K]`; met `[M, K]`, the weights as they were when the sweep reached their tiles; codes."""

    values: Tensor
    met: Tensor
    sheets: dict[CodeOptions, _Sheet]


@dataclass(frozen=True, eq=False)
class _Mosaic:
    """The sweep: a tile column at a time, and in it one format after the other.

    Attributes:
        lattices: by number of the format.
        choice: int64 `[tile rows, tile columns]`, numbers of formats.
    """

    inverse: InverseHessian
    lattices: list[Lattice]
    choice: Tensor
    tile: tuple[int, int]
    clip: bool

    def run(self, values: Tensor, kept: Tensor) -> _Swept:
        """New values and codes; `kept [K, M]` is cleared where weights go."""
        upper = self.inverse.upper
        work = values.T.to(upper.dtype, memory_format=torch.contiguous_format, copy=True).contiguous()
        sheets, met = self._sheets(values), torch.empty_like(work)
        for column in range(self.choice.shape[1]):
            block = slice(column * self.tile[1], min((column + 1) * self.tile[1], len(work)))
            met[block] = work[block]
            errors = torch.empty_like(work[block])
            for index in self.choice[:, column].unique().tolist():
                rows = self._rows(column, index, values.shape[0])
                errors[:, rows] = self._tiles(index, block, rows, values, work, kept, sheets)
            work[block.stop :].addmm_(upper[block, block.stop :].T, errors, alpha=-1)
        return _Swept(work.T.to(values.dtype), met.T.to(values.dtype), sheets)

    def _tiles(
        self,
        index: int,
        block: slice,
        rows: Tensor,
        values: Tensor,
        work: Tensor,
        kept: Tensor,
        sheets: dict[CodeOptions, _Sheet],
    ) -> Tensor:
        """Sweep the tiles of one format in one tile column; each column's error over U_jj."""
        lattice, upper = self.lattices[index], self.inverse.upper[block, block]
        inside = InverseHessian(upper, self.inverse.dead[block], "")
        own, stays = work[block][:, rows], kept[block][:, rows]
        rule, gone = None, None if bool(stays.all()) else ~stays
        if lattice.keep is not None:
            n, m = lattice.keep
            rule = OfEach(n, m) if n else None
            stays &= n > 0
        options = self._options(lattice)
        codes: ToCodes | None = None
        rounding: Rounding = ToDtype(values.dtype)
        part, importance = values[rows, block], upper.diagonal() ** -2
        if options is not None:
            codes = rounding = ToCodes.empty(options, part, importance)
        elif lattice.floats is not None:
            rounding = ToFloats.empty(lattice.floats, lattice.group_size, part, importance)
        errors = Sweep(inside, rounding, rule, gone).block(own, stays, slice(0, len(own)))
        work[block].index_copy_(1, rows, own)
        kept[block].index_copy_(1, rows, stays)
        if codes is not None and options is not None:
            sheets[options].take(codes, block, rows)
        return errors

    def _rows(self, column: int, index: int, rows: int) -> Tensor:
        """The rows of the tiles of a column that have a format."""
        return (self.choice[:, column] == index).repeat_interleave(self.tile[0])[:rows].nonzero().flatten()

    def _options(self, lattice: Lattice) -> CodeOptions | None:
        if lattice.bits is None:
            return None
        return CodeOptions(lattice.bits, lattice.group_size, lattice.zero_points, self.clip)

    def _sheets(self, values: Tensor) -> dict[CodeOptions, _Sheet]:
        sheets: dict[CodeOptions, _Sheet] = {}
        for index, lattice in enumerate(self.lattices):
            options = self._options(lattice)
            if options is not None:
                sheets.setdefault(options, _Sheet.empty(options, values)).formats.append(index)
        return sheets
