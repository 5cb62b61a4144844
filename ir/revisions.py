"""Which layouts the planes of a program have."""

from collections.abc import Iterator
from dataclasses import fields

from stoicc.ir.format import TileFormat
from stoicc.ir.types import TileProgram


def with_inner(fmt: TileFormat) -> Iterator[TileFormat]:
    """A format and the formats among its options."""
    yield fmt
    for entry in fields(fmt):
        value = getattr(fmt, entry.name)
        if isinstance(value, TileFormat):
            yield from with_inner(value)


def revisions(program: TileProgram) -> dict[str, int]:
    """Of all formats of a program, those inside others included, the layouts that are not the first, by name."""
    used = (part for segment in program.segments for part in with_inner(segment.resolve()))
    return dict(sorted({part.name: part.revision for part in used if part.revision != 1}.items()))
