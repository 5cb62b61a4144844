"""The C of a format that a kernel takes, and what it has to be for the loops that walk its units."""

from dataclasses import replace

from stoicc.codegen.cpu.layouts import VECTOR_COLUMNS
from stoicc.ir.errors import FormatError
from stoicc.ir.format import Tile, TileFormat, TileMac, TilePairs

VNNI = ("amx", "avx512bf16", "vnni")
"""Instruction sets that add four products of bytes in 32 bits."""
IN_WORDS = ("avx512", "avx2")
"""Those that add two, in 16 bits."""


def tile_code(fmt: TileFormat, tile: Tile, dtype: str, isa: str) -> TileMac | None:
    """A format's C for an instruction set, without digits where it cannot multiply those; None where it has none."""
    code = fmt.tile_mac(tile, dtype)
    if code is not None and code.in_vectors is not None and not on_matrix_units(dtype, isa):
        code = code.in_vectors
    if code is None or isa in VNNI or (isa in IN_WORDS and code.code_bits <= 5):
        return code
    return replace(code, digits="")


def on_matrix_units(dtype: str, isa: str) -> bool:
    """Whether pairs of a weight's dtype are multiplied on matrix units."""
    return isa == "amx" and dtype == "bf16"


def check_units(fmt: TileFormat, code: TileMac, tile: Tile, dtype: str, isa: str) -> None:
    """FormatError where units of bf16 products in vectors are of columns that no loop walks."""
    if code.picks is not None and code.picks.columns != VECTOR_COLUMNS:
        raise FormatError(
            f"format {fmt}: expected picks in units of {VECTOR_COLUMNS} columns, found {code.picks.columns}"
        )
    if code.pairs is not None and (code.pairs.columns % 32 or tile[1] % code.pairs.columns):
        raise FormatError(
            f"format {fmt}: expected pairs in units of 32, 64, .. columns that divide the tile's {tile[1]}, found "
            f"{code.pairs.columns}"
        )
    if code.pairs is not None and code.pairs.picked and on_matrix_units(dtype, isa):
        raise FormatError(
            f"format {fmt}: expected pairs that pick in in_vectors, found them where matrix units take pairs; move them"
        )
    for name, units in (("pairs", code.pairs), ("dots", code.dots)):
        if units is not None:
            _check_picked(fmt, name, units)
    if code.pairs is not None and code.pairs.whole:
        raise FormatError(f"format {fmt}: expected pairs in units, found the whole tile; move them to dots")
    if code.dots is None:
        return
    if code.dots.whole and (code.dots.ordered or code.dots.apart or code.dots.picked or code.dots.most < 8):
        raise FormatError(
            f"format {fmt}: expected dots of a whole tile to serve 8 entries and to be neither ordered, apart nor "
            "picked, found one of these; leave it out"
        )
    if code.pairs is None:
        raise FormatError(f"format {fmt}: expected pairs beside its dots, found none; a larger batch takes those")
    if code.dots.columns % 16 or tile[1] % code.dots.columns:
        raise FormatError(
            f"format {fmt}: expected dots in units of 16, 32, .. columns that divide the tile's {tile[1]}, found "
            f"{code.dots.columns}"
        )


def _check_picked(fmt: TileFormat, name: str, units: TilePairs) -> None:
    if units.picked and units.columns != VECTOR_COLUMNS:
        raise FormatError(
            f"format {fmt}: expected picked {name} in units of {VECTOR_COLUMNS} columns, found {units.columns}"
        )
    if units.picked % 2 or not 0 <= units.picked <= VECTOR_COLUMNS:
        raise FormatError(
            f"format {fmt}: expected {name} that pick 2, 4, .. {VECTOR_COLUMNS} columns, found {units.picked}"
        )
