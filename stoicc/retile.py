"""Cutting a tiled weight in tiles of another shape, where nothing has to be guessed back from floats."""

from dataclasses import replace

from stoicc.codegen.reference import decode_tiles
from stoicc.inspector import inspect
from stoicc.ir.errors import FormatError, InputError
from stoicc.ir.format import TileFormat
from stoicc.ir.registry import find_format
from stoicc.ir.types import TileProgram
from stoicc.kernel import Kernel
from stoicc.pools import TiledWeight
from stoicc.tiling import check_tile

FALLBACK = "dense"
"""The format of a tile whose old tiles had several, none of which holds it alone."""


def retile(weight: TiledWeight | Kernel, tile: tuple[int, int]) -> TiledWeight:
    """The same matrix in tiles of another shape, bit for bit.

    A tile takes the cheapest of the formats that the weight has now, or dense. What stands beside
    the tiles is kept as it is.

    Args:
        tile: (BM, BK), as in `stoicc.inspect`.

    Raises:
        InputError: the weight holds quantized codes, whose tiles stay as they are (`fixed_tile`).
    """
    tiled = weight.tiled() if isinstance(weight, Kernel) else weight
    program, tile = tiled.program, check_tile(tile)
    if tile == program.tile:
        return tiled
    reason = fixed_tile(program)
    if reason is not None:
        raise InputError(f"retile {program.name}: expected tile {program.tile}, found {tile}; {reason}")
    formats = dict.fromkeys([*(segment.format for segment in program.segments), FALLBACK])
    suited = [text for text in formats if _suits(find_format(text), tile, program.dtype)]
    anew = inspect(decode_tiles(program, tiled.pools), suited, tile, name=program.name)
    beside = {pool.name: tiled.pools[pool.name] for pool in program.beside.pools()}
    return TiledWeight(replace(anew.program, beside=program.beside), {**anew.pools, **beside})


def fixed_tile(program: TileProgram) -> str | None:
    """Why the tile shape of a program cannot change, as one clause; None where it can.

    A tile that is codes in one part and floats in another has no format, and codes without the
    operator that made them would be guesses.
    """
    coded = [segment.format for segment in program.segments if segment.resolve().planes_hold_codes]
    if not coded:
        return None
    return f"the codes of {', '.join(coded)} keep the tiles they have; inspect the operator's result at another tile"


def _suits(fmt: TileFormat, tile: tuple[int, int], dtype: str) -> bool:
    """Whether a format's parameters go with a tile shape at all."""
    try:
        fmt.planes(tile, dtype)
    except FormatError:
        return False
    return True
