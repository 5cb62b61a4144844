"""Compile a kernel of this dialect for a GPU that is not there, with the arguments to run it.

`compile_for` is the door for whoever reads or executes the machine code without a GPU: tests that
emulate PTX, tables of instructions.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from stoicc.codegen.executor import Pools
from stoicc.codegen.gluon.blobs import Buffers, make_buffers
from stoicc.codegen.gluon.emit import EmittedGluon, emit
from stoicc.codegen.gluon.inputs import Inputs, padded
from stoicc.codegen.gluon.launch import GluonConfig, loops_of, unsupported
from stoicc.codegen.triton import build
from stoicc.codegen.triton.compile_check import POINTERS, Machine, parse_target, read_cubin
from stoicc.codegen.triton.launch import (
    TRITON_DOTS,
    beside_tensors,
    dot_precision,
    low_rank_product,
    right_factors,
)
from stoicc.codegen.triton.loops import scheduled
from stoicc.ir.dtypes import DTYPE_NAMES, output_dtype
from stoicc.ir.errors import CodegenError
from stoicc.ir.types import Module

Argument = Tensor | int


@dataclass(frozen=True, eq=False)
class CompiledKernel:
    """One kernel of a class on one target.

    Attributes:
        name: `tiles_kernel` or `reduce_kernel`; the entry point of its PTX.
        asm: texts and binaries by stage: "ttgir", "llir", "ptx", "cubin" and what else Triton keeps.
        arguments: names of the PTX entry's parameters, in order; Triton appends two pointers that these
            kernels do not read (scratch memory and a profiler's).
        warps: of a program; `32 * warps` threads.
        shared: bytes of dynamic shared memory.
        target: `sm_80`, `sm_90`, ...
    """

    name: str
    asm: dict[str, Any]
    arguments: tuple[str, ...]
    warps: int
    shared: int
    target: str

    @property
    def ptx(self) -> str:
        return str(self.asm["ptx"])

    @property
    def cubin(self) -> bytes:
        return bytes(self.asm["cubin"])

    def machine(self) -> Machine:
        """What the machine code says: registers, spills, loads, instructions of each loop."""
        return read_cubin(self.name, self.target, self.cubin, self.shared, self.warps)


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch: programs of a one-dimensional grid, and arguments in the order of the PTX entry.

    A tensor stands for its address; an int is an i32.
    """

    kernel: CompiledKernel
    grid: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, eq=False)
class Compiled:
    """A module compiled for one target, input dtype and batch regime.

    Attributes:
        source: the emitted text.
        kernels: in launch order; the second is there under split-K.
        config: launch constants.
    """

    module: Module
    emitted: EmittedGluon
    config: GluonConfig
    kernels: tuple[CompiledKernel, ...]

    @property
    def source(self) -> str:
        return self.emitted.source

    def launches(self, x: Tensor, pools: Pools, out: Tensor) -> tuple[Launch, ...]:
        """What to run for x `[N, K]` into out `[N, M]`; poison out first to see that all of it is written.

        The first launch's "parts" and the second's are one tensor of NaN: the workspace.
        """
        schedule = scheduled(self.module)
        buffers = make_buffers(self.module, schedule, self.emitted.loops, pools)
        named = tensors_of(self.module, buffers, pools, x) | {"y": out}
        inputs = Inputs.of(beside_tensors(self.module, pools), x.shape[1])
        named["x"] = (
            inputs.prepare(x, x.new_empty(x.shape[0], inputs.width)) if inputs and not self.config.prologue else x
        )
        named |= inputs.tables()
        if self.emitted.split:
            slots = int(buffers.row_slots[-1])
            named["parts"] = torch.full((slots, x.shape[0], self.module.tiles.tile[0]), torch.nan, dtype=torch.float32)
        batch, config = x.shape[0], self.config
        programs = {
            "tiles_kernel": len(schedule.items) * -(-batch // config.block_n),
            "reduce_kernel": self.module.tiles.grid[0] * -(-batch // config.reduce_n(self.module.tiles.tile[0])),
        }
        return tuple(
            Launch(kernel, programs[kernel.name], tuple(named[name] for name in kernel.arguments))
            for kernel in self.kernels
        )


def compile_for(
    module: Module, x_dtype: torch.dtype, batch: int, arch: str, config: GluonConfig | None = None
) -> Compiled:
    """Compile a scheduled module for x of this dtype and about this many rows.

    Args:
        arch: `sm_80`, `sm_90`, ...
        config: launch constants; default: what a launch would choose.

    Raises:
        CodegenError: the dialect does not run this module.
    """
    target = parse_target(arch)
    if (why := unsupported(module, x_dtype, int(target.arch))) is not None:
        raise CodegenError(f"gluon, module {module.tiles.name}: {why}; the portable dialect runs it")
    loops = loops_of(module)
    launch = dict(scheduled(module).launch)
    config = config or GluonConfig.choose(batch, module, loops, int(target.arch), launch)
    emitted = emit(module, loops, config.num_warps, config.wgmma, config.prologue)
    kernels = build.load(emitted.name, emitted.source)
    types = argument_types(module, x_dtype)
    names = ["tiles_kernel", "reduce_kernel"] if emitted.split else ["tiles_kernel"]
    return Compiled(
        module, emitted, config, tuple(_compile(getattr(kernels, n), n, module, types, arch, config) for n in names)
    )


def argument_types(module: Module, x_dtype: torch.dtype) -> dict[str, str]:
    """Triton's type of every argument that a kernel of this dialect may have."""
    program = module.tiles
    dtypes = {"x": "i32", "y": DTYPE_NAMES[output_dtype(program.dtype, x_dtype)], "parts": "f32", "tiles": "i32"}
    dtypes |= {"items": "i32", "descriptors": "i32", "row_slots": "i32", "low_rank_product": "f32"}
    dtypes |= {"column_permutation": "i32", "input_scale": "f32"}
    for name in ("bias", "row_permutation", "output_scale"):
        if (pool := getattr(program.beside, name)) is not None:
            dtypes[name] = pool.dtype
    if program.beside.low_rank is not None:
        dtypes["low_rank_left"] = program.beside.low_rank[0].dtype
    return {n: POINTERS[dtype] for n, dtype in dtypes.items()} | dict.fromkeys(("M", "K", "N", "RANK"), "i32")


def tensors_of(module: Module, buffers: Buffers, pools: Pools, x: Tensor) -> dict[str, Argument]:
    """Arguments by name, but for x, y and the workspace."""
    rows, columns = module.tiles.shape
    beside = beside_tensors(module, pools)
    named: dict[str, Argument] = {n: t for n, t in beside.items() if n != "low_rank_right"}
    if "low_rank_left" in beside:
        rank = beside["low_rank_left"].shape[1]
        product = torch.empty(x.shape[0], rank, dtype=torch.float32, device=x.device)
        named["low_rank_product"] = low_rank_product(x, right_factors(beside, module.tiles.dtype), product)
        named["RANK"] = rank
    named |= {"tiles": buffers.blobs, "descriptors": buffers.descriptors, "items": buffers.items}
    return named | {"row_slots": buffers.row_slots, "M": rows, "K": padded(columns), "N": x.shape[0]}


def _compile(
    kernel: Any, name: str, module: Module, types: dict[str, str], arch: str, config: GluonConfig
) -> CompiledKernel:
    is_gluon = name == "tiles_kernel"
    launched: dict[str, Any] = {"BN": config.block_n, "STAGES": config.stages}
    if not is_gluon:  # DOT is not read there
        launched = {
            "BN": config.reduce_n(module.tiles.tile[0]),
            "DOT": TRITON_DOTS[torch.float32],
            "PRECISION": dot_precision(torch.float32),
        }
    names = kernel.arg_names
    constants = {n: value for n, value in launched.items() if n in names}
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    extents = {"M": module.tiles.shape[0], "K": padded(module.tiles.shape[1])}
    whole = [n for n in names if signature[n].startswith("*") or extents.get(n, 1) % 16 == 0]
    source = (GluonASTSource if is_gluon else ASTSource)(
        kernel,
        signature,
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in whole},
    )
    compiled = triton.compile(source, target=parse_target(arch), options=config.options())
    arguments = tuple(n for n in names if n not in constants)
    return CompiledKernel(name, compiled.asm, arguments, config.num_warps, compiled.metadata.shared, arch)
