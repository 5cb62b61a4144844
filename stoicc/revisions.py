"""Planes of formats whose layout changed since they were saved: read as they are now, or refused.

A format counts the layouts of its planes (`TileFormat.revision`). A file names the count of each format that it
holds; one that names none was written when it stood at 1.
"""

import json
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from stoicc.ir.digest import digest
from stoicc.ir.errors import InputError, VerifyError
from stoicc.ir.format import Planes, TileFormat
from stoicc.ir.planes import pool_name
from stoicc.ir.revisions import revisions, with_inner
from stoicc.ir.types import Module, Segment, TileProgram
from stoicc.pools import Pools, describe


def print_revisions(program: TileProgram) -> str:
    """As a file holds them."""
    return json.dumps(revisions(program))


def migrated(module: Module, pools: Pools, written: str | None, where: str) -> tuple[Module, dict[str, Tensor]]:
    """The module and its pools in the layouts of today.

    Args:
        written: what `print_revisions` gave when they were saved; None from a file without it.
        where: for the sentence of an error.

    Raises:
        InputError: planes of a layout that a format cannot read, or of one that is newer than this version.
        VerifyError: planes that would be migrated are not what was saved.
    """
    counts = _parsed(written, where)
    segments, pools = list(module.tiles.segments), dict(pools)
    for index, segment in enumerate(segments):
        fmt = segment.resolve()
        old = [part for part in with_inner(fmt) if counts.get(part.name, 1) != part.revision]
        if old:
            planes = None
            if old == [fmt] and counts.get(fmt.name, 1) < fmt.revision:
                held = _take(index, segment, pools, where)
                planes = fmt.migrate(held, module.tiles.tile, module.tiles.dtype, counts.get(fmt.name, 1))
            if planes is None:
                raise _unreadable(old[-1], counts.get(old[-1].name, 1), where)
            new = {pool_name(index, plane): tensor for plane, tensor in planes.items()}
            segments[index] = replace(segment, pools=tuple(describe(name, tensor) for name, tensor in new.items()))
            pools |= new
    return replace(module, tiles=replace(module.tiles, segments=tuple(segments))), pools


def _take(index: int, segment: Segment, pools: dict[str, Tensor], where: str) -> Planes:
    """A segment's planes out of the pools, if they are what was saved."""
    for pool in segment.pools:
        if pool.name not in pools or digest(pools[pool.name]) != pool.digest:
            raise VerifyError(
                f"{where}, pool {pool.name}: expected it as it was saved, found it changed; save it again"
            )
    return {pool.name.removeprefix(pool_name(index, "")): pools.pop(pool.name) for pool in segment.pools}


def _parsed(written: str | None, where: str) -> Mapping[str, int]:
    try:
        found = json.loads(written or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(count, int) for count in found.values()):
        raise InputError(f"{where}: expected revisions of formats by name, found {written!r}; save it again")
    return found


def _unreadable(fmt: TileFormat, found: int, where: str) -> InputError:
    return InputError(
        f"{where}: expected planes of format {fmt.name} in revision {fmt.revision}, found revision {found}, which is "
        "laid out otherwise; load it with the version of stoicc that saved it, or compile the weight again"
    )
