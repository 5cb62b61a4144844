"""Blobs, unpacked to canonical planes when somebody asks for those.

A weight lives once on a GPU: after its planes have been packed, `stoicc.buffers` lets go of those that blobs
hold, and this gives them back, whole or a run of entries at a time. Planes that tiles share (scales of a row, say) are
small and stay where they are.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from stoicc.codegen.executor import PackedPlanes, Pools
from stoicc.codegen.gluon.blobs import PACK_TILES, Buffers, GluonLoop
from stoicc.codegen.gluon.register_order import CHUNK, unpack
from stoicc.ir.format import PlaneKind, Planes
from stoicc.ir.planes import pool_name
from stoicc.ir.types import Module, TileProgram


class PackedBlobs(PackedPlanes):
    """The planes of which blobs hold every entry.

    Args:
        pools: those that the blobs were packed from; the shared ones among them are kept.
    """

    def __init__(self, module: Module, loops: tuple[GluonLoop, ...], buffers: Buffers, pools: Pools) -> None:
        self._program, self._blobs = module.tiles, buffers.blobs
        self._loops = {loop.segment: (loop, place) for loop, place in zip(loops, buffers.places, strict=True)}
        self._own = {segment: own_planes(module.tiles, segment) for segment in self._loops}
        self.names = frozenset(pool_name(segment, name) for segment, own in self._own.items() for name in own)
        self.others = {name: pool for name, pool in pools.items() if name not in self.names}

    @property
    def nbytes(self) -> int:
        return self._blobs.nbytes

    def whole(self) -> dict[str, Tensor]:
        return {
            pool_name(segment, name): plane
            for segment, (_, place) in self._loops.items()
            for name, plane in self._unpacked(segment, 0, len(place)).items()
        }

    def entries(self, segment: int, ranges: Mapping[str, tuple[int, int]]) -> Planes | None:
        if segment not in self._loops:
            return None
        own = self._own[segment]
        found = {
            name: self.others[pool_name(segment, name)][first:last]
            for name, (first, last) in ranges.items()
            if name not in own
        }
        tiles = {ranges[name] for name in ranges if name in own}
        for first, last in tiles:  # planes of a tile are asked for by the same tiles
            unpacked = self._unpacked(segment, first, last)
            found |= {name: unpacked[name] for name in ranges if name in own and ranges[name] == (first, last)}
        return found

    def _unpacked(self, segment: int, first: int, last: int) -> Planes:
        """Planes of their own tiles [first, last) of a segment: new tensors, no views."""
        (loop, place), program = self._loops[segment], self._program
        chunks, pieces = self._blobs.view(-1, CHUNK), []
        with torch.inference_mode(False), torch.no_grad():  # what an edit could not be counted of is of no use
            for begin in range(first, max(last, first + 1), PACK_TILES):
                rows = place[begin : min(begin + PACK_TILES, last), None] + np.arange(loop.blob.chunks)
                packed = chunks[torch.from_numpy(rows.ravel()).to(chunks.device)].view(-1, loop.blob.words)
                pieces.append(loop.fragment.planes(unpack(packed, loop.blob, program.dtype), program.tile))
            return {name: torch.cat([piece[name] for piece in pieces]) for name in self._own[segment]}


def own_planes(program: TileProgram, segment: int) -> tuple[str, ...]:
    """Names of a segment's planes that have an entry for each tile."""
    planes = program.segments[segment].resolve().planes(program.tile, program.dtype)
    return tuple(plane.name for plane in planes if plane.kind is PlaneKind.TILE)
