"""The inspector: from a weight matrix to a tile program and its pools.

Tile rows are taken in chunks of a few million weights, so that temporaries stay small; within a
chunk everything is batched over tiles. Each tile gets the cheapest allowed format (in bytes) that
holds it bit for bit, or the format that the user's tile map names.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stoicc.choosing import Chooser
from stoicc.codes import held_codes
from stoicc.formats import formats as registered
from stoicc.ir.dtypes import DTYPE_NAMES
from stoicc.ir.errors import FormatError, InputError
from stoicc.ir.format import TileFormat
from stoicc.ir.types import Module
from stoicc.ir.verify import verify
from stoicc.ops.graph import CompressedWeight
from stoicc.ops.lowering import Lowered, lower
from stoicc.passes import WeightPass
from stoicc.pools import PoolBuilder, TiledWeight, beside_pools
from stoicc.reordering import run_weight_passes
from stoicc.tiling import check_tile, grid_of
from stoicc.weights import FormatLike, TileMap, as_formats, as_matrix, as_tile_map, on_cpu


def inspect(
    weight: object,
    formats: Sequence[FormatLike] | None = None,
    tile: tuple[int, int] | None = None,
    tile_map: TileMap | None = None,
    *,
    approximate: bool = False,
    name: str = "weight",
    bias: Tensor | None = None,
    activation: str | None = None,
) -> TiledWeight:
    """Cut a weight in tiles and give every tile a format.

    Lossless by default: the tiles decode to the given weight bit for bit, and each tile has the
    cheapest format (in bytes) of `formats` that holds it.

    Args:
        weight: `[M, K]` torch tensor, numpy array, scipy sparse matrix (f32, f16, bf16), or an
            operator's result.
        formats: formats to choose from, by text (`"int4<group_size=128>"`) or as objects;
            default: every registered one that is `by_default`.
        tile: (BM, BK), powers of two from 16 to 256; default the operators' tile, else
            (64, 128) for codes in groups of 128 and more, else (64, 64).
        tile_map: a format for each tile, `[tile rows][tile columns]` of texts or formats; in
            place of `formats`.
        approximate: let a tile map change values (prune, quantize) where a tile does not fit.
        name: what the program is called in its text.
        bias: `[M]`, added by the executor.
        activation: one of `stoicc.ir.types.ACTIVATIONS`, applied last.

    Raises:
        InputError: a weight, tile or map that cannot be used.
        FormatError: a tile that no allowed format holds, or an unknown format.
    """
    return inspect_for(
        everything,
        weight,
        formats,
        tile,
        tile_map,
        approximate=approximate,
        name=name,
        bias=bias,
        activation=activation,
    )


LOW, TALL = 64, 128
"""Rows of tiles by default, and of those that GPUs multiply with the fewest instructions."""

Usable = Callable[[TileFormat, tuple[int, int], str], bool]
"""Whether a format at a tile shape and dtype may be chosen by default."""


def everything(fmt: TileFormat, tile: tuple[int, int], dtype: str) -> bool:
    """Any registered format may be chosen."""
    return True


@on_cpu
def inspect_for(
    usable: Usable,
    weight: object,
    formats: Sequence[FormatLike] | None,
    tile: tuple[int, int] | None,
    tile_map: TileMap | None,
    *,
    approximate: bool,
    name: str,
    bias: Tensor | None,
    activation: str | None,
    passes: Sequence[WeightPass] = (),
    importance: Tensor | None = None,
    rows: int = LOW,
) -> TiledWeight:
    """As `inspect`, where the default formats are those that `usable` admits (that a target runs).

    `passes` may reorder the rows before the weight is cut in tiles. `importance [K]` is what an error in each column
    counts where tiles are approximated. `rows` is the height of tiles where nobody says what it is.
    """
    if tile_map is not None and formats is not None:
        raise InputError("inspect: expected formats or a tile_map, found both; the map names the formats")
    if approximate and tile_map is None:
        raise InputError("inspect: expected a tile_map with approximate=True, found none; without one it is lossless")
    lowered = lower(weight) if isinstance(weight, CompressedWeight) else Lowered(as_matrix(weight))
    lowered = held_codes(lowered, as_formats(registered()))
    shape = (lowered.values.shape[0], lowered.values.shape[1])
    chosen_tile = _tile(tile, weight.tile if isinstance(weight, CompressedWeight) else None, lowered, rows)
    requested = None
    if tile_map is not None and passes:
        raise InputError(
            f"inspect: expected no tile_map with {passes[0].name}, found one; the map names tiles by where they "
            "stand: reorder the weight with stoicc.ops.permute and map that"
        )
    if tile_map is not None:
        named, numbers = as_tile_map(tile_map, grid_of(shape, chosen_tile))
        allowed = _by_cost(named, chosen_tile, DTYPE_NAMES[lowered.values.dtype])
        requested = torch.tensor([allowed.index(fmt) for fmt in named])[numbers]
    else:
        allowed = _candidates(formats, lowered, chosen_tile, usable)
    lowered = run_weight_passes(passes, lowered, chosen_tile, allowed)
    chooser = Chooser(lowered, chosen_tile, allowed, requested, approximate, importance)
    beside = beside_pools(lowered, bias, activation)
    builder = PoolBuilder(name, shape, chosen_tile, DTYPE_NAMES[lowered.values.dtype], allowed)
    for chunk in chooser.chunks():
        builder.add(chunk.choice, {i: chooser.encode(chunk, i) for i in chunk.choice.unique().tolist()})
    tiled = replace(builder.finish(beside), lowering=lowered.steps)
    verify(Module(tiled.program))
    return tiled


def inspect_tall(usable: Usable, weight: object, formats: Sequence[FormatLike] | None, **options: Any) -> TiledWeight:
    """As `inspect_for` without a tile or a map, in tiles of TALL rows where these take no more bytes than others would.

    Tensor cores issue fewer instructions for such tiles (`python -m bench.sass`); a matrix that mixes formats may need
    lower ones to hold as much in cheap formats, and bytes are what a small batch waits for.
    """

    def inspected(rows: int) -> TiledWeight:
        return inspect_for(usable, weight, formats, None, None, approximate=False, rows=rows, **options)

    shape: tuple[int, ...] = getattr(weight, "shape", ())
    dtype = str(getattr(weight, "dtype", "16"))  # of an expression, inside
    marked = isinstance(weight, CompressedWeight) and weight.tile is not None
    if marked or len(shape) != 2 or shape[0] % TALL or not dtype.endswith("16"):
        return inspected(LOW)
    tall = inspected(TALL)
    low = inspected(LOW)
    return tall if tall.program.dtype != "f32" and _payload(tall) <= _payload(low) else low


def _payload(tiled: TiledWeight) -> int:
    return sum(pool.nbytes for pool in tiled.pools.values())


def _tile(tile: tuple[int, int] | None, marked: tuple[int, int] | None, lowered: Lowered, rows: int) -> tuple[int, int]:
    """The tile to use; operators that worked on tiles say which.

    Where scales are shared by 128 columns or more, tiles are as wide: a group's sums are scaled once.
    """
    wide = bool(lowered.sheets) and all(sheet.group_size and sheet.group_size % 128 == 0 for sheet in lowered.sheets)
    chosen = check_tile(tile if tile is not None else marked or (rows, 128 if wide else 64))
    if marked is not None and chosen != marked:
        raise InputError(f"tile: expected {marked}, the tile of the operators, found {chosen}; leave tile out")
    return chosen


def _candidates(
    formats: Sequence[FormatLike] | None, lowered: Lowered, tile: tuple[int, int], usable: Usable
) -> tuple[TileFormat, ...]:
    """The formats to choose from, cheapest first, with variants that hold the operators' codes."""
    dtype = DTYPE_NAMES[lowered.values.dtype]
    if formats is not None:
        chosen = as_formats(formats)
    else:
        chosen = tuple(fmt for fmt in as_formats(registered()) if fmt.by_default)
        for sheet in lowered.sheets:
            variants = [fmt.for_codes(sheet.bits, sheet.group_size, sheet.zeros is not None) for fmt in chosen]
            fitting = [fmt for fmt in variants if fmt is not None]
            for fmt in fitting:
                fmt.planes(tile, dtype)  # refuses groups that do not meet the tile
            chosen = tuple(dict.fromkeys((*chosen, *fitting)))
        chosen = tuple(fmt for fmt in chosen if _meets(fmt, tile, dtype) and usable(fmt, tile, dtype))
    if not chosen:
        raise FormatError("formats: expected at least one format, found none; leave formats out to allow all")
    return _by_cost(chosen, tile, dtype)


def _by_cost(formats: Sequence[TileFormat], tile: tuple[int, int], dtype: str) -> tuple[TileFormat, ...]:
    """Cheapest first; the one order of segments, so that equal mixes share a compiled kernel."""
    return tuple(sorted(formats, key=lambda fmt: (fmt.cost(tile, dtype).bytes, str(fmt))))


def _meets(fmt: TileFormat, tile: tuple[int, int], dtype: str) -> bool:
    """Whether a format's parameters suit the tile at all (a default group may be too long)."""
    try:
        fmt.cost(tile, dtype)
    except FormatError:
        return False
    return True
