"""An operator's codes, cut in tiles: from `CodeSheet` (per matrix) to `TileCodes` (per tile)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stoicc.formats._affine import GroupGrid
from stoicc.ir.errors import FormatError
from stoicc.ir.format import TileCodes, TileFormat
from stoicc.ops.lowering import CodeSheet, Lowered
from stoicc.tiling import grid_of, to_tiles


def held_codes(lowered: Lowered, formats: Sequence[TileFormat]) -> Lowered:
    """Codes of widths that none of the formats has, as codes of the next width that one has: the same weights.

    Raises:
        FormatError: no format holds codes as wide.
    """
    sheets, steps = [], list(lowered.steps)
    for sheet in lowered.sheets:
        able = (
            bits
            for bits in range(sheet.bits, 9)
            if any(fmt.for_codes(bits, sheet.group_size, sheet.zeros is not None) is not None for fmt in formats)
        )
        bits = next(able, None)
        if bits is None:
            raise FormatError(
                f"formats: expected one that holds {sheet.bits}-bit codes, found none; quantize to 2, 3, 4 or 8 bits, "
                "or register a format whose for_codes takes them"
            )
        if bits != sheet.bits:
            steps.append(f"{sheet.bits}-bit codes: held as {bits}-bit codes, no format has {sheet.bits}")
        sheets.append(_widened(sheet, bits))
    return replace(lowered, sheets=tuple(sheets), steps=tuple(steps))


def _widened(sheet: CodeSheet, bits: int) -> CodeSheet:
    """The same weights in wider codes: symmetric codes move with their zero, others stay as they are."""
    if bits == sheet.bits:
        return sheet
    shift = 0 if sheet.zeros is not None else (1 << (bits - 1)) - (1 << (sheet.bits - 1))
    return replace(sheet, codes=sheet.codes + shift, bits=bits)


def tile_codes(sheet: CodeSheet, lines: slice, tile: tuple[int, int]) -> tuple[TileCodes, Tensor]:
    """The codes of the rows `lines` (whole tile rows), and which tiles the sheet quantizes.

    Raises:
        FormatError: groups of scales that do not meet the tile's columns.
    """
    codes = to_tiles(sheet.codes[lines], tile, 1 << (sheet.bits - 1) if sheet.zeros is None else 0)
    scales = _tile_groups(sheet, sheet.scales[lines], tile)
    zeros = None
    if sheet.zeros is not None:
        zeros = _tile_groups(sheet, sheet.zeros[lines], tile)
        _fill_tail(codes, zeros, sheet.codes.shape[1])
    # A tile at the seam of a stack may be quantized in part: it keeps its values instead.
    held = to_tiles(sheet.where[lines], tile, fill=True).flatten(1).all(1)
    return TileCodes(codes, scales, zeros, sheet.bits, sheet.group_size), held


def _tile_groups(sheet: CodeSheet, values: Tensor, tile: tuple[int, int]) -> Tensor:
    """Per group `[m, G]` -> per tile `[T, BM, groups]`; a shared one is repeated for each tile."""
    grid = GroupGrid.of(sheet.group_size, tile[1], f"int{sheet.bits}")
    columns = grid_of((1, sheet.codes.shape[1]), tile)[1]
    if grid.span != 1:
        values = values.repeat_interleave(grid.span or columns, 1)[:, :columns]
    return to_tiles(values, (tile[0], grid.per_tile))


def _fill_tail(codes: Tensor, zeros: Tensor, columns: int) -> None:
    """Let the padded columns of the last tile column mean 0.0: the code of their zero point."""
    width = codes.shape[2]
    count = -(-columns // width)
    valid = columns - (count - 1) * width
    last = codes[count - 1 :: count]
    fill = zeros[count - 1 :: count].repeat_interleave(width // zeros.shape[2], 2)
    last[:, :, valid:] = fill[:, :, valid:]


def quantized_by_any(codes: list[tuple[TileCodes, Tensor]], tiles: int) -> Tensor:
    """Bool `[T]`: tiles that some sheet quantizes."""
    quantized = torch.zeros(tiles, dtype=torch.bool)
    for _, held in codes:
        quantized |= held
    return quantized
