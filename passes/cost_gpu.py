"""The cost model of a GPU: bytes, issue slots of the compiled code, tensor cores, occupancy and waves.

Programs of the tiles kernel are work items times blocks of the batch. As many run on an SM as registers,
shared memory and warps let (occupancy); the programs that an SM holds share its part of the bandwidth, of
the issue slots and of the tensor cores. A program ends when its bytes are read, its instructions issued and its
products done, whichever takes longest;
the next one takes its place. What the last programs leave idle is `imbalance`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stoicc.ir.dtypes import itemsize
from stoicc.ir.library import library_copy, library_matrix
from stoicc.ir.schedule import EVERYWHERE, EXECUTORS, Schedule
from stoicc.ir.types import Module, TileProgram
from stoicc.passes.cost_model import CostModel, Prediction, checked, item_tiles, makespan
from stoicc.passes.costs import segment_cost

LATENCY_S = 0.7e-6
"""From a load to its data under load, about: what bytes in flight have to cover (Little's law)."""

INSTRUCTIONS_PER_WEIGHT = 0.1
"""Warp instructions per weight of a tile where no compiled code is known: what the emitted loops have at batch 16."""

GEMM_SHARE = 0.7
"""Share of a device's peak that a vendor's GEMM of a large batch reaches, about."""

TILES_SHARE = 0.6
"""Share of it for tiles: a guess below the library's until a GPU has measured, so that no kernel of ours is predicted
to beat a dense GEMM at its own work."""

MMA_SHARES = {"sm_90": 0.5}
"""The same for `mma` where `wgmma` alone reaches the peak: below the 0.63 that `mma.sync` reaches there in published
microbenchmarks (arXiv 2501.12084)."""

SPARSE_GAINS = {"sm_80": 1.1, "sm_90": 1.2}
"""How much faster than cuBLAS cuSPARSELt multiplies a large 2:4 matrix, as users report it (CUDALibrarySamples issue
203 for Hopper); 1 where nothing is known. Tiles are given no more."""


VENDOR_BATCH = 128
"""Batch from which a library is considered: it keeps a copy of its own, and what it does below is not modelled."""


@dataclass(frozen=True)
class Gpu:
    """Constants of one device; `sources` says of each whether it is published, measured, or derived from those.

    Attributes:
        architecture: as `stoicc.codegen.triton.compile_check` names it.
        sms: streaming multiprocessors.
        instructions: warp instructions a second that all SMs issue.
        bandwidth: bytes a second from memory.
        flops: by dtype of x, operations a second of dense products.
        registers, shared, warps: of an SM: 32-bit registers, bytes of shared memory, resident warps.
        launch: seconds between two kernels of a stream.
    """

    name: str
    architecture: str
    sms: int
    instructions: float
    bandwidth: float
    flops: Mapping[str, float]
    shared: int
    warps: int
    registers: int = 65536
    launch: float = 3e-6
    sources: Mapping[str, str] = field(default_factory=dict)


_PUBLISHED = {"sms": "published", "flops": "published", "shared": "published", "warps": "published"}

GPUS = {
    gpu.name: gpu
    for gpu in (
        # Measured on one H200: a copy moves 4.3e12 bytes a second (4.8e12 published) and about 1.05e12 warp
        # instructions issue a second, which is 132 SMs x 4 schedulers x 1.98 GHz. The rest: NVIDIA's H200 data sheet.
        Gpu(
            "H200",
            "sm_90",
            sms=132,
            instructions=1.05e12,
            bandwidth=4.3e12,
            flops={"bf16": 989e12, "f16": 989e12, "f32": 67e12},
            shared=228 << 10,
            warps=64,
            sources={**_PUBLISHED, "instructions": "measured", "bandwidth": "measured"},
        ),
        # NVIDIA's H100 data sheet (SXM5, 80 GB); instructions: 132 SMs x 4 schedulers x 1.98 GHz
        Gpu(
            "H100",
            "sm_90",
            sms=132,
            instructions=132 * 4 * 1.98e9,
            bandwidth=3.35e12,
            flops={"bf16": 989e12, "f16": 989e12, "f32": 67e12},
            shared=228 << 10,
            warps=64,
            sources={**_PUBLISHED, "instructions": "derived", "bandwidth": "published"},
        ),
        # NVIDIA's A100 data sheet (SXM4, 80 GB); instructions: 108 SMs x 4 schedulers x 1.41 GHz
        Gpu(
            "A100",
            "sm_80",
            sms=108,
            instructions=108 * 4 * 1.41e9,
            bandwidth=2.039e12,
            flops={"bf16": 312e12, "f16": 312e12, "f32": 19.5e12},
            shared=164 << 10,
            warps=64,
            sources={**_PUBLISHED, "instructions": "derived", "bandwidth": "published"},
        ),
        # NVIDIA's L40S data sheet and Ada whitepaper; instructions: 142 SMs x 4 schedulers x 2.52 GHz
        Gpu(
            "L40S",
            "sm_89",
            sms=142,
            instructions=142 * 4 * 2.52e9,
            bandwidth=864e9,
            flops={"bf16": 362e12, "f16": 362e12, "f32": 91.6e12},
            shared=100 << 10,
            warps=48,
            sources={**_PUBLISHED, "instructions": "derived", "bandwidth": "published"},
        ),
    )
}
"""Known devices by a part of the name that the driver gives them."""


@dataclass(frozen=True)
class KernelCode:
    """What compiled code says of a tiles kernel.

    Attributes:
        registers: per thread.
        shared: bytes of a program.
        warps: of a program.
        block_n: rows of the batch of a program.
        tile_instructions: warp instructions that a program issues for a tile of each csr.
        fixed_instructions: those outside of its loops.
        wgmma: products are those of warpgroups.
        launches_before: that scale and permute x, where the kernel does not.
    """

    registers: int
    shared: int
    warps: int
    block_n: int
    tile_instructions: tuple[float, ...]
    fixed_instructions: float = 0.0
    wgmma: bool = False
    launches_before: int = 0


Code = Callable[[Module, int, str], "KernelCode | None"]
"""The compiled code of a module's tiles kernel for a batch and a dtype of x; None where it cannot be had."""


@dataclass
class GpuCostModel(CostModel):
    """Predicts from a device's constants and the code of the kernel.

    Attributes:
        gpu: the device.
        code: compiles a module's kernel, no GPU needed; None estimates instructions by the size of tiles.
    """

    gpu: Gpu
    code: Code | None = None
    target: str = "triton"

    def predict(self, module: Module, batch: int, x_dtype: str, threads: int = 1) -> Prediction:
        schedule = checked(module, batch, threads)
        if (kind := schedule.regime(batch)) != "tiles":
            return (self._vendor if kind == "vendor" else self._dense_once)(module, batch, x_dtype)
        found = self.code(module, batch, x_dtype) if self.code is not None else None
        return self._tiles(module, schedule, batch, found or estimated_code(module, batch), x_dtype)

    def executors(self, module: Module, batch: int) -> tuple[str, ...]:
        """As everywhere, and for a large batch of a matrix that has one a vendor's library."""
        return EXECUTORS if batch >= VENDOR_BATCH and library_matrix(module.tiles) is not None else EVERYWHERE

    def _tiles(self, module: Module, schedule: Schedule, batch: int, code: KernelCode, x_dtype: str) -> Prediction:
        program, gpu = module.tiles, self.gpu
        counts = item_tiles(schedule)
        tile_bytes = np.array([segment_cost(program, program.segments[csr.segment]) for csr in schedule.csrs])
        blocks = -(-batch // code.block_n)
        issued = np.repeat(counts @ np.array(code.tile_instructions) + code.fixed_instructions, blocks)
        # blocks of the batch read the same tiles, all but the first from the L2 cache
        read = np.repeat(counts @ tile_bytes / blocks, blocks)
        held = min(occupancy(gpu, code), -(-len(read) // gpu.sms))
        bandwidth = gpu.bandwidth * self._reach(code, held, float(read.sum()) / max(int(counts.sum()), 1))
        slots = gpu.sms * max(held, 1)
        products = np.repeat(counts @ self._products(module, schedule, code, x_dtype), blocks)
        loads = np.maximum(np.maximum(read / bandwidth, issued / gpu.instructions), products) * slots
        busy = float(loads.sum()) / slots
        reading = float(read.sum()) / bandwidth
        return Prediction.of(
            bytes=min(reading, busy),
            compute=busy - min(reading, busy),
            imbalance=max(0.0, makespan(loads, slots) - busy),
            reduction=self._reduction(module, schedule, batch),
            overhead=gpu.launch * (1 if program.beside.low_rank is None else 2) + self._before(program, code, batch),
        )

    def _products(self, module: Module, schedule: Schedule, code: KernelCode, x_dtype: str) -> NDArray[np.float64]:
        """Seconds of all tensor cores for a tile of each csr and a block of the batch."""
        program, gpu = module.tiles, self.gpu
        share = TILES_SHARE if code.wgmma else MMA_SHARES.get(gpu.architecture, TILES_SHARE)
        peak = gpu.flops.get(x_dtype, gpu.flops["f32"]) * share
        flops = 2 * program.tile[0] * program.tile[1] * code.block_n
        gains = []
        for csr in schedule.csrs:
            fragment = program.segments[csr.segment].resolve().fragment(program.tile, program.dtype)
            sparse = fragment is not None and fragment.sparse
            gains.append(SPARSE_GAINS.get(gpu.architecture, 1.0) if sparse else 1.0)
        return flops / (peak * np.array(gains))

    def _before(self, program: TileProgram, code: KernelCode, batch: int) -> float:
        """Launches that read x and write it as the tiles meet it."""
        moved = 2 * batch * program.shape[1] * itemsize(program.dtype)
        return code.launches_before * (self.gpu.launch + moved / self.gpu.bandwidth)

    def _reach(self, code: KernelCode, held: int, tile_bytes: float) -> float:
        """Share of the bandwidth that the loads in flight can use: of a program, its pipeline's buffers or one tile."""
        in_flight = max(held, 1) * max(code.shared, tile_bytes)
        return float(min(1.0, max(in_flight * self.gpu.sms / (LATENCY_S * self.gpu.bandwidth), 1e-3)))

    def _reduction(self, module: Module, schedule: Schedule, batch: int) -> float:
        """A second launch that reads the sums that parts wrote."""
        parts = sum(1 for item in schedule.items if item.parts > 1)
        traffic = 2 * 4 * parts * module.tiles.tile[0] * batch
        return traffic / self.gpu.bandwidth + (self.gpu.launch if parts else 0.0)

    def _vendor(self, module: Module, batch: int, x_dtype: str) -> Prediction:
        """The product of a library that has the matrix in its own form."""
        program, gpu = module.tiles, self.gpu
        sparse, weights = library_copy(program) == "2:4", program.shape[0] * program.shape[1]
        gain = SPARSE_GAINS.get(gpu.architecture, 1.0) if sparse else 1.0
        stored = weights * itemsize(x_dtype) * (9 / 16 if sparse else 1)
        product = 2 * weights * batch / (gpu.flops.get(x_dtype, gpu.flops["f32"]) * GEMM_SHARE * gain)
        return Prediction.of(gemm=max(product, stored / gpu.bandwidth), overhead=gpu.launch)

    def _dense_once(self, module: Module, batch: int, x_dtype: str) -> Prediction:
        program, gpu = module.tiles, self.gpu
        payload = sum(segment.count * segment_cost(program, segment) for segment in program.segments)
        weights = program.shape[0] * program.shape[1]
        panels = weights * itemsize(x_dtype)
        product = 2 * weights * batch / (gpu.flops.get(x_dtype, gpu.flops["f32"]) * GEMM_SHARE)
        empty = any(segment.count and not segment.pools for segment in program.segments)
        return Prediction.of(
            bytes=payload / gpu.bandwidth,
            decode=panels * (2 if empty else 1) / gpu.bandwidth,  # zeros first, where some tiles have none
            gemm=max(product, panels / gpu.bandwidth),
            overhead=2 * gpu.launch,
        )


def occupancy(gpu: Gpu, code: KernelCode) -> int:
    """Programs that an SM holds at a time, at least 1: by registers (given out in 256 a warp), shared memory and warps.

    1 KB of shared memory of each program is the driver's, since sm_80.
    """
    registers = -(-code.registers * 32 // 256) * 256 * code.warps
    shared = code.shared + 1024
    return max(1, min(gpu.registers // max(registers, 1), gpu.shared // shared, gpu.warps // code.warps, 32))


def estimated_code(module: Module, batch: int) -> KernelCode:
    """A kernel as the backend would launch it, its instructions by the size of tiles."""
    assert module.schedule is not None
    block_n = dict(module.schedule.launch).get("block_n", min(128, max(16, 1 << (batch - 1).bit_length())))
    per_tile = module.tiles.tile[0] * module.tiles.tile[1] * INSTRUCTIONS_PER_WEIGHT * max(1.0, block_n / 16 / 2)
    return KernelCode(128, 48 << 10, 4, block_n, (per_tile,) * len(module.schedule.csrs), 500.0)
