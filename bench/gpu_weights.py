"""Large weights with random payload, made on the GPU: what times are taken on.

Times depend on how many tiles of which format there are and where, not on the values (as long as
they are not all zero), so planes are drawn directly instead of encoding a weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import stoicc.formats  # noqa: F401  (registers the formats)
from stoicc.codegen.executor import Executor
from stoicc.codegen.triton.backend import TritonBackend
from stoicc.ir.dtypes import DTYPE_NAMES, TORCH_DTYPES
from stoicc.ir.format import Plane, PlaneKind
from stoicc.ir.planes import entry_count, pool_name
from stoicc.ir.registry import find_format
from stoicc.ir.types import Module, Pool, Segment, TileProgram
from stoicc.passes import default_pipeline

TILE = (64, 64)

MOSAIC = (("empty", 0.02), ("int4_nv24", 0.13), ("nv24", 0.05), ("int4", 0.60), ("dense", 0.20))
"""A mosaic such as a budget would choose, as shares of the tiles."""


@dataclass(frozen=True, eq=False)
class RandomWeight:
    """A scheduled module and its pools on one device."""

    module: Module
    pools: dict[str, Tensor]

    @property
    def payload_bytes(self) -> int:
        return sum(pool.nbytes for pool in self.pools.values())

    def executor(self, kind: str) -> Executor:
        return TritonBackend().build(self.module, self.pools, kind, "error")

    def copy(self) -> "RandomWeight":
        """The same weight at other addresses."""
        return RandomWeight(self.module, {name: pool.clone() for name, pool in self.pools.items()})


def random_weight(
    shape: tuple[int, int],
    shares: Sequence[tuple[str, float]],
    dtype: str,
    device: torch.device,
    seed: int = 0,
    tile: tuple[int, int] = TILE,
) -> RandomWeight:
    """A weight `[M, K]` whose tiles have formats at random, in the given shares."""
    grid = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    cuts = np.cumsum([share for _, share in shares])[:-1]
    chosen = np.searchsorted(cuts, np.random.default_rng(seed).random(grid), side="right")
    generator = torch.Generator(device).manual_seed(seed)
    segments, pools = [], {}
    for index, (text, _) in enumerate(shares):
        rows, columns = np.nonzero(chosen == index)
        described = []
        for plane in find_format(text).planes(tile, dtype):
            name = pool_name(index, plane.name)
            pools[name] = random_plane(plane, text, entry_count(plane, rows, columns), generator)
            described.append(Pool(name, DTYPE_NAMES[pools[name].dtype], tuple(pools[name].shape), f"{index:016x}"))
        segments.append(Segment(text, rows.size, tuple(described)))
    program = TileProgram("random", shape, tile, dtype, tuple(segments), tuple(int(c) for c in chosen.ravel()))
    return RandomWeight(default_pipeline("triton").run(Module(program)), pools)


def random_plane(plane: Plane, text: str, entries: int, generator: torch.Generator) -> Tensor:
    """`[entries, *shape]` of legal random values: any floats and codes, 2:4 positions that ascend."""
    assert plane.kind is not PlaneKind.RAGGED, f"format {text}: planes of variable length cannot be drawn here"
    shape, device = (entries, *plane.shape), generator.device
    dtype = TORCH_DTYPES[plane.dtype]
    if dtype.is_floating_point:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02, generator=generator)
    if plane.name == "positions":
        legal = torch.tensor([low | high << 2 for high in range(4) for low in range(high)], device=device)
        pairs = legal.to(torch.uint8)[torch.randint(0, 6, (2, *shape), device=device, generator=generator)]
        return pairs[0] | pairs[1] << 4
    most = 16 if plane.name == "zeros" and text.startswith("int4") else 256
    return torch.randint(0, most, shape, dtype=dtype, device=device, generator=generator)
