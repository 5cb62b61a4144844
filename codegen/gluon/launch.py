"""Which modules this dialect runs, its consumer loops, and launch constants."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from stoicc.codegen.gluon.blobs import GluonLoop
from stoicc.codegen.gluon.inputs import RUN
from stoicc.codegen.gluon.register_order import CHUNK, STEP, BlobLayout
from stoicc.codegen.triton.emit import prologue_arguments
from stoicc.codegen.triton.loops import scheduled
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.fragment import Fragment
from stoicc.ir.types import Module

TILE_ROWS, TILE_COLUMNS = (64, 128), (64, 128, 256)
"""Tiles that four or eight warps share evenly, and whose positions fill whole words."""

BATCH_BLOCKS = (8, 16, 32, 64, 128)

WGMMA_BLOCKS = (64, 128, 256)
"""Rows of the batch that a program of warpgroups multiplies by."""

WGMMA_CAPABILITY = 90
HAS_WGMMA = hasattr(gl, "inline_asm")
"""Whether this Triton hands shared memory to inline assembly: 3.9 does."""

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one program may have, by compute capability."""

RING_BYTES = 76 << 10
"""Shared memory that a ring takes at most where it can: two programs an SM on an A100, three on an H200 (74 KB and
a little for the epilogue each)."""


PROLOGUE_BATCHES = (16, 64)
"""Rows of the batch up to which x is always, and is where the matrix is small, scaled and permuted in the kernel.

Every tile row does it anew there. In blocks of 16 rows that is 50 to 190 warp instructions for 64x64 weights, most of
which issue while an H200 waits for the weights; wider blocks take so many that launches before, of 3 us, take less
where the matrix is large."""
PROLOGUE_WORK = 8e9
"""Rows of the batch times weights up to which a matrix is small: 32 rows and 250 million weights, say."""

LEAST_CAPABILITY = 80
"""`mma.sp` and `cp.async` begin with sm_80."""


def unsupported(module: Module, x_dtype: torch.dtype, capability: int) -> str | None:
    """Why this dialect cannot multiply by this module on a GPU of a capability, in one clause; None where it can."""
    program = module.tiles
    if capability < LEAST_CAPABILITY:
        return f"sm_{capability} has no sparse tensor cores, which begin with sm_{LEAST_CAPABILITY}"
    if program.dtype not in ("f16", "bf16"):
        return f"weights are {program.dtype}, tensor cores take f16 and bf16"
    if x_dtype != TORCH_DTYPES[program.dtype]:
        return f"x is {str(x_dtype).removeprefix('torch.')}, operands of a tensor core have one dtype"
    rows, columns = program.tile
    if rows not in TILE_ROWS or columns not in TILE_COLUMNS:
        return f"tiles are {rows}x{columns}, four warps share tiles of 64 or 128 rows and 64, 128 or 256 columns"
    if program.beside.input_scale is not None and program.dtype == "f16":
        return "x is scaled, which may leave the range of f16"
    for csr in scheduled(module).csrs:
        fmt = program.segments[csr.segment].resolve()
        if fmt.planes(program.tile, program.dtype) and fmt.fragment(program.tile, program.dtype) is None:
            return f"format {fmt} has no fragment"
    loops = loops_of(module)
    if not loops:
        return "every tile is empty"
    least = 2 * _slot_bytes(loops, 4, BATCH_BLOCKS[0], columns)
    if least > shared_bytes(capability):
        return f"two slots of a ring take {least >> 10} KB, sm_{capability} has {shared_bytes(capability) >> 10}"
    return None


def shared_bytes(capability: int) -> int:
    """Shared memory that one program may have; of an unknown GPU, the least of those that are known."""
    return SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))


def loops_of(module: Module) -> tuple[GluonLoop, ...]:
    """The consumer loops of a module that `unsupported` lets through, in csr order."""
    program, loops = module.tiles, []
    for index, csr in enumerate(scheduled(module).csrs):
        fmt = program.segments[csr.segment].resolve()
        fragment = fmt.fragment(program.tile, program.dtype)
        if not fmt.planes(program.tile, program.dtype):
            continue
        assert fragment is not None, "unsupported() was not asked"
        layout = BlobLayout.of(fragment, program.tile)
        loops.append(GluonLoop(index, csr.segment, str(fmt), re.sub(r"\W", "_", fmt.name), fragment, layout))
    return tuple(loops)


@dataclass(frozen=True)
class GluonConfig:
    """Rows of the batch per program, warps per program, slots of the ring.

    Attributes:
        wgmma: whether products are `wgmma`.
        prologue: whether x is scaled and permuted in the kernel, and not by launches before it, as it is where its
            rows have to be padded.
    """

    block_n: int
    num_warps: int
    stages: int
    wgmma: bool = False
    prologue: bool = False

    @staticmethod
    def choose(
        batch: int,
        module: Module,
        loops: tuple[GluonLoop, ...],
        capability: int,
        launch: Mapping[str, int] | None = None,
    ) -> "GluonConfig":
        """Defaults for a batch of x on a GPU of this compute capability, and what a schedule says instead.

        A warp has registers for the sums of 16 rows and 128 of the batch, or 32 rows and 32; for fewer of the batch
        where sums are scaled and wide tiles or zero points are held beside them (`_most_rows`). The ring has 8 slots, 4
        or 2: as many as let more than one program live on an SM, and at least what fits.
        """
        given, (rows, columns) = launch or {}, module.tiles.tile
        if without_wgmma(capability, batch, given) is None:
            return _of_warpgroups(batch, module, loops, capability, given)
        most = min((_most_rows(loop.fragment, columns) for loop in loops), default=BATCH_BLOCKS[-1])
        block_n = min(given.get("block_n", next((n for n in BATCH_BLOCKS if batch <= n), most)), most)
        warps = 4 if rows == 64 or (block_n <= 32 and given.get("num_warps", 4) <= 4) else 8
        while 2 * _slot_bytes(loops, warps, block_n, columns) > shared_bytes(capability) and block_n > BATCH_BLOCKS[0]:
            block_n //= 2
        holds = _holds_inputs(loops, block_n, (rows, columns), warps)
        asked = given.get("prologue", holds and max(batch, block_n) <= prologue_rows(module))
        inside = bool(asked and prologue_arguments(module.tiles.beside)) and not module.tiles.shape[1] % RUN
        while inside and not _holds_inputs(loops, block_n, (rows, columns), warps):
            block_n //= 2
        slot = _slot_bytes(loops, warps, block_n, columns)
        fits = [n for n in (8, 4, 2) if n * slot <= shared_bytes(capability)]
        stages = next((n for n in fits if n * slot <= RING_BYTES), fits[-1] if fits else 2)
        wanted = given.get("num_stages")
        return GluonConfig(block_n, warps, wanted if wanted in fits else stages, prologue=inside)

    def reduce_n(self, tile_rows: int) -> int:
        """Rows of the batch of a program of `reduce_kernel`, whose low-rank product spills in wide blocks."""
        return min(self.block_n, 512 * self.num_warps // tile_rows)

    def options(self) -> dict[str, Any]:
        """Options of a Triton launch."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}


def prologue_rows(module: Module) -> int:
    """The largest batch for which x is scaled and permuted in the kernel, where it is and registers hold it."""
    rows, columns = module.tiles.shape
    always, most = PROLOGUE_BATCHES
    return max(n for n in BATCH_BLOCKS if n <= always or (n <= most and n * rows * columns <= PROLOGUE_WORK))


def prologue_batch(module: Module, capability: int) -> int:
    """The largest batch for which `choose` has x scaled and permuted in the kernel; 0 where there is none."""
    loops, launch = loops_of(module), dict(scheduled(module).launch)
    inside = (n for n in BATCH_BLOCKS if GluonConfig.choose(n, module, loops, capability, launch).prologue)
    return max(inside, default=0)


def without_wgmma(capability: int, batch: int, launch: Mapping[str, int]) -> str | None:
    """Why products of a batch are not `wgmma`, in one clause; None where they are."""
    if not launch.get("wgmma"):
        return "the schedule does not say wgmma = 1, and no GPU has confirmed it yet"
    if capability != WGMMA_CAPABILITY:
        return f"sm_{capability} has no wgmma, which sm_{WGMMA_CAPABILITY} alone has"
    if not HAS_WGMMA:
        return "this Triton passes no shared memory to inline assembly, which 3.9 does"
    if batch < WGMMA_BLOCKS[0]:
        return f"it begins at a batch of {WGMMA_BLOCKS[0]}"
    return None


def _of_warpgroups(
    batch: int, module: Module, loops: tuple[GluonLoop, ...], capability: int, given: Mapping[str, int]
) -> GluonConfig:
    """One warpgroup for tiles of 64 rows, two for 128; the widest block of x whose ring has four slots, or else two.

    Sums of 256 rows of the batch fill half of a thread's registers; sums that are scaled need as many beside them.
    """
    rows, columns = module.tiles.tile
    warps, most = (
        rows // 16,
        min((_most_rows(loop.fragment, columns, True) for loop in loops), default=WGMMA_BLOCKS[-1]),
    )
    wanted = given.get("block_n", next((n for n in WGMMA_BLOCKS if batch <= n), most))
    widths = [n for n in WGMMA_BLOCKS if n <= min(wanted, most)][::-1] or [WGMMA_BLOCKS[0]]
    choices = [(n, stages) for stages in (4, 2) for n in widths]
    fitting = [c for c in choices if c[1] * _slot_bytes(loops, warps, c[0], columns) <= shared_bytes(capability)]
    if not fitting:
        return GluonConfig.choose(batch, module, loops, capability, {**given, "wgmma": 0})
    return GluonConfig(fitting[0][0], warps, fitting[0][1], True)


def _most_rows(fragment: Fragment, columns: int, wgmma: bool = False) -> int:
    """Rows of the batch that a program has registers for in every loop; found by compiling, as tests hold."""
    if wgmma:
        return WGMMA_BLOCKS[-1] >> ((1 + (columns > 64)) if fragment.groups else 0)
    wide, wider = columns > 64, columns > 128
    halvings = (wide or fragment.zero_points) + (wider and fragment.zero_points) if fragment.groups else 0
    return BATCH_BLOCKS[-1] >> halvings


def _holds_inputs(loops: tuple[GluonLoop, ...], block_n: int, tile: tuple[int, int], warps: int) -> bool:
    """Whether a thread has registers for what a prologue keeps in every loop: the addresses of its rows of x and the
    columns that are on their way, besides the sums, twice where they are scaled. Found by compiling, as tests hold."""
    (rows, columns), scaled = tile, any(loop.fragment.groups for loop in loops)
    inputs = block_n // warps * (2 + columns // 2 // 32)
    sums = block_n * rows // (warps * 32) * (2 if scaled else 1)
    return inputs + sums <= (96 if scaled and columns > 128 else 112)


def slot_words(loops: tuple[GluonLoop, ...], warps: int) -> int:
    """Words of a slot: a power of two, as Gluon allocates, that holds the largest blob in whole rounds of copies."""
    largest = max([warps * 32 * CHUNK, *(loop.blob.words for loop in loops)])
    return 1 << (largest - 1).bit_length()


def _slot_bytes(loops: tuple[GluonLoop, ...], warps: int, block_n: int, columns: int) -> int:
    """Shared memory of a tile in the ring and the block of x that it meets."""
    return slot_words(loops, warps) * 4 + block_n * columns * 2


assert all(columns % STEP == 0 for columns in TILE_COLUMNS)
