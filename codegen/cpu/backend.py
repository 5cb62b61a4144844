"""The CPU backend: kernels in C, and panels decoded once for the BLAS at a large batch."""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from stoicc.codegen.cpu.adapter import Adapter
from stoicc.codegen.cpu.bind import Binding
from stoicc.codegen.cpu.build import instruction_set, load, missing_compiler
from stoicc.codegen.cpu.decode import can_decode
from stoicc.codegen.cpu.dense_once import DenseOnceExecutor
from stoicc.codegen.cpu.emit import emit
from stoicc.codegen.cpu.factors import held_factor
from stoicc.codegen.cpu.packed_factors import PackedFactor, WithFactors
from stoicc.codegen.cpu.plan import KernelClass, classify
from stoicc.codegen.cpu.scratch import ALIGNMENT, give, take
from stoicc.codegen.cpu.transposed import TransposedExecutor
from stoicc.codegen.executor import Backend, Executor, PackedPlanes, Pools
from stoicc.codegen.reference import TransposedReference
from stoicc.ir.dtypes import DTYPE_NAMES, TORCH_DTYPES, output_dtype
from stoicc.ir.errors import CodegenError
from stoicc.ir.format import Tile, TileFormat
from stoicc.ir.types import Module

_BYTES_PER_THREAD = 1 << 16
"""Payload bytes times batch below which another thread costs more than it brings."""
WORKSPACE_BYTES = 64 << 20
"""Scratch of one call, beyond which a batch runs in pieces; a piece of the least size may need more."""
_ANY = 1 << 30
_REMEMBERED = 64
"""Batch sizes whose workspace is remembered."""


class TilesExecutor(Executor):
    """One weight bound to its C kernel; a library is built for each dtype of x when first met.

    With `out_dtype`, y is of that dtype whatever x is.
    """

    def __init__(self, module: Module, pools: Pools, on_missing: str, out_dtype: torch.dtype | None = None) -> None:
        self._module, self._on_missing, self._out_dtype = module, on_missing, out_dtype
        self._isa = instruction_set()
        schedule = module.schedule
        self._most_threads = dict(schedule.launch if schedule else ()).get("threads", _ANY)
        own = self._classify(TORCH_DTYPES[module.tiles.dtype])
        self._binding = Binding(own, module, pools)
        self._classes: dict[torch.dtype, KernelClass] = {}
        self._functions: dict[torch.dtype, Any] = {}
        self._workspaces: dict[tuple[int, torch.dtype, int], int] = {}
        self._adapter: Adapter | None = None
        self._packed: PackedPlanes = self._binding.packed
        if module.tiles.beside.low_rank is not None:
            self._adapter = _adapter(own, module, pools)
            self._packed = _with_factors(self._binding, self._adapter, module, pools)
        floats = self._scratch(replace(own, x_dtype="f32"), own.chunk)
        self._piece = max(1, WORKSPACE_BYTES // floats) * own.chunk  # in whole chunks, whatever the dtype of x
        self.source = emit(own)

    def run(self, x: Tensor, out: Tensor, workspace: Tensor) -> None:
        self.launch(x.dtype, x.data_ptr(), out.data_ptr(), workspace.data_ptr(), x.shape[0])

    def launch(self, x_dtype: torch.dtype, x: int, out: int, scratch: int, batch: int) -> None:
        """As `run`, with addresses of x `[batch, K]`, out `[batch, M]` and a workspace."""
        run = self._functions.get(x_dtype) or self._function(x_dtype)
        scratch += -scratch % ALIGNMENT
        if batch <= self._piece and self._adapter is None:  # beside a weight from memory, each line of Python costs
            run(self._binding.address, x, out, scratch, batch, self._threads(batch))
            return
        y_dtype = output_dtype(self._module.tiles.dtype, x_dtype) if self._out_dtype is None else self._out_dtype
        rows, columns = self._module.tiles.shape
        for first in range(0, batch, self._piece):
            count = min(self._piece, batch - first)
            entries = x + first * columns * x_dtype.itemsize
            if self._adapter is not None:
                self._adapter.launch(x_dtype, entries, scratch, count)
            y = out + first * rows * y_dtype.itemsize
            run(self._binding.address, entries, y, scratch, count, self._threads(count))

    def prepared(self, shape: torch.Size, x_dtype: torch.dtype) -> Callable[[Tensor], Tensor | None] | None:
        batch = shape[:-1].numel()
        if batch == 0:
            return None
        at_once = batch <= self._piece and self._adapter is None
        run, address = self._functions.get(x_dtype) or self._function(x_dtype), self._binding.address
        y_shape = (*shape[:-1], self._module.tiles.shape[0])
        y_dtype = output_dtype(self._module.tiles.dtype, x_dtype) if self._out_dtype is None else self._out_dtype
        nbytes, threads, asked = self.workspace_bytes(batch, x_dtype), self._threads(batch), torch.get_num_threads()
        threads_now, empty = torch.get_num_threads, torch.empty

        def call(x: Tensor) -> Tensor | None:
            if threads_now() != asked:
                return None
            y, workspace = empty(y_shape, dtype=y_dtype), take(nbytes)
            at = workspace.data_ptr()
            if at_once:
                run(address, x.data_ptr(), y.data_ptr(), at + -at % ALIGNMENT, batch, threads)
            else:
                self.launch(x_dtype, x.data_ptr(), y.data_ptr(), at, batch)
            give(workspace)
            return y

        return call

    def _threads(self, batch: int) -> int:
        """Threads that a batch is worth."""
        binding = self._binding
        return min(
            torch.get_num_threads(), self._most_threads, binding.bins, 1 + binding.bytes * batch // _BYTES_PER_THREAD
        )

    def workspace_bytes(self, batch: int, x_dtype: torch.dtype) -> int:
        asked = batch, x_dtype, torch.get_num_threads()
        if asked not in self._workspaces:
            if len(self._workspaces) == _REMEMBERED:
                self._workspaces.clear()
            if x_dtype not in self._classes:
                self._classes[x_dtype] = self._classify(x_dtype)
            self._workspaces[asked] = self._scratch(self._classes[x_dtype], min(batch, self._piece)) + ALIGNMENT
        return self._workspaces[asked]

    def _scratch(self, kernel: KernelClass, batch: int) -> int:
        binding = self._binding
        threads = min(torch.get_num_threads(), binding.bins)
        own = kernel.scratch_bytes(batch, self._module.tiles.grid[1], binding.partials, threads)
        if self._adapter is None:
            return own
        x_dtype = TORCH_DTYPES[kernel.x_dtype]
        after_term = self._adapter.term_bytes(batch, x_dtype) + own
        return max(after_term, self._adapter.workspace_bytes(batch, x_dtype))

    @property
    def resident_bytes(self) -> int:
        return self._binding.own_bytes + (0 if self._adapter is None else self._adapter.resident_bytes)

    @property
    def packed(self) -> PackedPlanes:
        return self._packed

    def _classify(self, x_dtype: torch.dtype) -> KernelClass:
        return classify(self._module, x_dtype, self._isa, self._on_missing, self._out_dtype)

    def _function(self, x_dtype: torch.dtype) -> Any:
        kernel = self._classify(x_dtype)
        function = load(emit(kernel), kernel.label, self._isa).stoicc_run
        pointer = ctypes.c_void_p
        function.argtypes = (pointer, pointer, pointer, pointer, ctypes.c_int64, ctypes.c_int)
        function.restype = None
        self._functions[x_dtype] = function
        return function


def _adapter(kernel: KernelClass, module: Module, pools: Pools) -> Adapter:
    """The low-rank factors of a weight, its rows in the order of W."""
    program = module.tiles
    assert program.beside.low_rank is not None
    left, right = (held_factor(factor, pools) for factor in program.beside.low_rank)
    if program.beside.row_permutation is not None:
        left = left.ordered(pools[program.beside.row_permutation.name].long())

    def terms(x_dtype: torch.dtype, batch: int) -> int:
        return replace(kernel, x_dtype=DTYPE_NAMES[x_dtype]).terms(batch)

    def build(factor: Module, own: Pools) -> TilesExecutor:
        return TilesExecutor(factor, own, "error", torch.float32)

    return Adapter(left, right, program.grid[0] * program.tile[0], terms, build)


def _with_factors(binding: Binding, adapter: Adapter, module: Module, pools: Pools) -> PackedPlanes:
    """The planes and the factors that kernels hold."""
    program = module.tiles
    assert program.beside.low_rank is not None
    (left, right), programs, packed = program.beside.low_rank, adapter.programs, adapter.packed
    factors = (
        PackedFactor(left, programs[0], packed[0], program.shape[0], binding.output_row),
        PackedFactor(right, programs[1], packed[1], programs[1].shape[0]),
    )
    return WithFactors(binding.packed, factors, pools)


class CpuBackend(Backend):
    """C kernels with explicit SIMD, compiled by the system's compiler."""

    name: ClassVar[str] = "cpu"
    device_type: ClassVar[str] = "cpu"
    code: ClassVar[str] = "a C multiply (tile_mac)"

    def has_code(self, fmt: TileFormat, tile: Tile, dtype: str) -> bool:
        return not fmt.planes(tile, dtype) or fmt.tile_mac(tile, dtype) is not None

    def available(self) -> str | None:
        return missing_compiler()

    def reads_sources(self, kind: str) -> bool:
        return kind in ("dense-once", "transposed")

    def build(self, module: Module, pools: Pools, kind: str, on_missing: str) -> Executor:
        if kind == "tiles":
            return TilesExecutor(module, pools, on_missing)
        if kind == "dense-once":
            return DenseOnceExecutor(module, pools)
        if kind == "transposed":
            return TransposedExecutor(module, pools) if can_decode(module) else TransposedReference(module, pools)
        raise CodegenError(f"cpu backend: expected executor 'tiles' or 'dense-once', found {kind!r}; name one of them")

    def emit(self, module: Module, x_dtype: torch.dtype) -> str:
        return emit(classify(module, x_dtype, instruction_set(), "dense"))
