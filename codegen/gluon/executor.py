"""The executor of the Gluon dialect: launches on the GPU where the blobs are."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stoicc.codegen.executor import Executor, Pools
from stoicc.codegen.gluon.blobs import make_buffers
from stoicc.codegen.gluon.emit import EmittedGluon, emit
from stoicc.codegen.gluon.inputs import Inputs
from stoicc.codegen.gluon.launch import GluonConfig, loops_of
from stoicc.codegen.gluon.packed import PackedBlobs
from stoicc.codegen.triton import build
from stoicc.codegen.triton.launch import (
    TRITON_DOTS,
    beside_tensors,
    dot_precision,
    kept_bytes,
    low_rank_bytes,
    low_rank_product,
    right_factors,
    rows_of_a_piece,
)
from stoicc.codegen.triton.loops import scheduled
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.types import Module


class GluonTiles(Executor):
    """Multiplies x of the weight's dtype on tensor cores; any other x goes to the portable executor.

    One launch, and one more where parts of split-K or a low-rank product are added. R x is one `torch.mm` before. What
    scales or permutes x is in that launch for a small batch, and one operation each before it for a large one.
    Blobs are the payload in register order; the canonical pools need not stay beside them. The portable executor reads
    those: it is built when such an x comes, from the pools or, where they are gone, from unpacked copies.

    Args:
        capability: of the device, as `major * 10 + minor`.
        portable: builds what runs other inputs.
    """

    def __init__(self, module: Module, pools: Pools, capability: int, portable: Callable[[Pools], Executor]) -> None:
        schedule = scheduled(module)
        self._module, self._capability, self._make_portable = module, capability, portable
        self._portable: Executor | None = None
        self._copies = 0
        self._loops = loops_of(module)
        self._buffers = make_buffers(module, schedule, self._loops, pools)
        self._packed = PackedBlobs(module, self._loops, self._buffers, pools)
        self._pools = {name: weakref.ref(pools[name]) for name in self._packed.names}
        self._beside = beside_tensors(module, pools)
        self._inputs = Inputs.of(self._beside, module.tiles.shape[1])
        self._rights = right_factors(self._beside, module.tiles.dtype)
        self._dtype = TORCH_DTYPES[module.tiles.dtype]
        self._launch = dict(schedule.launch)
        self._owned = {t.data_ptr() for t in pools.values()}
        self._slot_bytes = int(self._buffers.row_slots[-1]) * module.tiles.tile[0] * 4
        self._built: dict[tuple[int, bool, bool], tuple[EmittedGluon, ModuleType]] = {}
        self.source = self._kernels(16)[0].source

    @property
    def resident_bytes(self) -> int:
        held = self._buffers
        own: list[Tensor | None] = [held.blobs, held.descriptors, held.items, held.row_slots, self._inputs.scale]
        own += [*self._beside.values(), *self._rights.values()]
        portable = self._copies + (self._portable.resident_bytes if self._portable else 0)
        return kept_bytes(own, self._owned) + portable

    @property
    def packed(self) -> PackedBlobs:
        return self._packed

    def workspace_bytes(self, batch: int, x_dtype: torch.dtype) -> int:
        if x_dtype != self._dtype:
            return self._other().workspace_bytes(batch, x_dtype)
        emitted, _ = self._kernels(batch)
        parts = self._slot_bytes * rows_of_a_piece(batch, self._slot_bytes) if emitted.split else 0
        prepared = 0 if self._config(batch).prologue else self._inputs.bytes(batch)
        return low_rank_bytes(batch, self._rank) + prepared + parts

    def run(self, x: Tensor, out: Tensor, workspace: Tensor) -> None:
        if x.dtype != self._dtype:
            self._other().run(x, out, workspace)
            return
        if x.data_ptr() % 16:  # a view into a row; copies to shared memory take 16 bytes at a time
            x = x.clone()
        batch = x.shape[0]
        held = low_rank_bytes(batch, self._rank)
        product = workspace[: batch * self._rank * 4].view(torch.float32).view(batch, -1) if self._rank else None
        if product is not None:
            low_rank_product(x, self._rights, product)
        inside = self._config(batch).prologue
        if self._inputs and not inside:
            size = batch * self._inputs.width * x.element_size()
            x = self._inputs.prepare(x, workspace[held : held + size].view(x.dtype).view(batch, -1))
            held += self._inputs.bytes(batch)
        emitted, _ = self._kernels(batch)
        step = rows_of_a_piece(batch, self._slot_bytes) if emitted.split else batch
        for begin in range(0, batch, step):
            piece = slice(begin, begin + step)
            left = None if product is None else product[piece]
            self._run_piece(x[piece], out[piece], workspace[held:], left, inside)

    def _run_piece(self, x: Tensor, out: Tensor, workspace: Tensor, product: Tensor | None, inside: bool) -> None:
        """Rows of x, padded; `inside` says that the kernel scales and permutes them."""
        config = replace(self._config(x.shape[0]), prologue=inside)
        emitted, kernels = self._kernels_of(config)
        rows, (batch, columns) = self._module.tiles.shape[0], x.shape
        held = self._buffers
        tables: dict[str, Any] = {n: self._beside[n] for n in emitted.epilogue if n in self._beside}
        if product is not None:
            tables |= {"low_rank_product": product, "RANK": self._rank}
        given: dict[str, Any] = {
            "x": x.view(torch.int32), "tiles": held.blobs, "items": held.items, "descriptors": held.descriptors,
            "K": columns, "N": batch, "BN": config.block_n, "STAGES": config.stages, **config.options(),
            **(self._inputs.tables() if inside else {}),
        }  # fmt: skip
        grid = (held.items.shape[0] * -(-batch // config.block_n),)
        if not emitted.split:
            kernels.tiles_kernel[grid](y=out, M=rows, **tables, **given)
            return
        parts, tile_rows = workspace[: self._slot_bytes * batch].view(torch.float32), self._module.tiles.tile[0]
        kernels.tiles_kernel[grid](parts=parts, **given)
        kernels.reduce_kernel[(self._module.tiles.grid[0] * -(-batch // config.reduce_n(tile_rows)),)](
            parts=parts, y=out, row_slots=held.row_slots, **tables, M=rows, N=batch, BN=config.reduce_n(tile_rows),
            DOT=TRITON_DOTS[torch.float32], PRECISION=dot_precision(torch.float32), **config.options(),
        )  # fmt: skip

    def _other(self) -> Executor:
        """What runs other inputs."""
        if self._portable is None:
            held = {name: pool() for name, pool in self._pools.items()}
            there = {name: pool for name, pool in held.items() if pool is not None}
            copies = {} if len(there) == len(held) else self._packed.whole()
            self._portable = self._make_portable({**self._packed.others, **copies, **there})
            self._copies = sum(pool.nbytes for name, pool in copies.items() if name not in there)
        return self._portable

    @property
    def _rank(self) -> int:
        return self._beside["low_rank_left"].shape[1] if "low_rank_left" in self._beside else 0

    def _config(self, batch: int) -> GluonConfig:
        return GluonConfig.choose(batch, self._module, self._loops, self._capability, self._launch)

    def _kernels(self, batch: int) -> tuple[EmittedGluon, ModuleType]:
        return self._kernels_of(self._config(batch))

    def _kernels_of(self, config: GluonConfig) -> tuple[EmittedGluon, ModuleType]:
        """The text depends on the warps of a program, the kind of product and where x is prepared."""
        key = config.num_warps, config.wgmma, config.prologue
        if key not in self._built:
            emitted = emit(self._module, self._loops, *key)
            self._built[key] = emitted, build.load(emitted.name, emitted.source)
        return self._built[key]
