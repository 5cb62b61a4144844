"""The CPU backend: kernels in C, and panels decoded once for the BLAS at a large batch."""

import ctypes
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from stoicc.codegen.cpu.bind import Binding
from stoicc.codegen.cpu.build import instruction_set, load, missing_compiler
from stoicc.codegen.cpu.dense_once import DenseOnceExecutor
from stoicc.codegen.cpu.emit import emit
from stoicc.codegen.cpu.plan import KernelClass, classify
from stoicc.codegen.executor import Backend, Executor, PackedPlanes, Pools
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.errors import CodegenError
from stoicc.ir.format import Tile, TileFormat
from stoicc.ir.types import Module

_ALIGNMENT = 64
_BYTES_PER_THREAD = 1 << 16
"""Payload bytes times batch below which another thread costs more than it brings."""
WORKSPACE_BYTES = 64 << 20
"""Scratch of one call, beyond which a batch runs in pieces; a piece of the least size may need more."""
_REMEMBERED = 64
"""Batch sizes whose workspace is remembered."""


class TilesExecutor(Executor):
    """One weight bound to its C kernel; a library is built for each dtype of x when first met."""

    def __init__(self, module: Module, pools: Pools, on_missing: str) -> None:
        self._module, self._on_missing = module, on_missing
        self._isa = instruction_set()
        own = self._classify(TORCH_DTYPES[module.tiles.dtype])
        self._binding = Binding(own, module, pools)
        self._classes: dict[torch.dtype, KernelClass] = {}
        self._functions: dict[torch.dtype, Any] = {}
        self._workspaces: dict[tuple[int, torch.dtype, int], int] = {}
        floats = self._scratch(replace(own, x_dtype="f32"), own.chunk)
        self._piece = max(1, WORKSPACE_BYTES // floats) * own.chunk  # in whole chunks, whatever the dtype of x
        self.source = emit(own)

    def run(self, x: Tensor, out: Tensor, workspace: Tensor) -> None:
        run = self._functions.get(x.dtype) or self._function(x.dtype)
        scratch = workspace.data_ptr()
        batch, piece = x.shape[0], self._piece
        x_row, out_row = (tensor.shape[1] * tensor.element_size() for tensor in (x, out))
        for first in range(0, batch, piece):
            count = min(piece, batch - first)
            run(
                self._binding.address,
                x.data_ptr() + first * x_row,
                out.data_ptr() + first * out_row,
                scratch + -scratch % _ALIGNMENT,
                count,
                min(torch.get_num_threads(), self._binding.bins, 1 + self._binding.bytes * count // _BYTES_PER_THREAD),
            )

    def workspace_bytes(self, batch: int, x_dtype: torch.dtype) -> int:
        asked = batch, x_dtype, torch.get_num_threads()
        if asked not in self._workspaces:
            if len(self._workspaces) == _REMEMBERED:
                self._workspaces.clear()
            if x_dtype not in self._classes:
                self._classes[x_dtype] = self._classify(x_dtype)
            self._workspaces[asked] = self._scratch(self._classes[x_dtype], min(batch, self._piece)) + _ALIGNMENT
        return self._workspaces[asked]

    def _scratch(self, kernel: KernelClass, batch: int) -> int:
        binding = self._binding
        threads = min(torch.get_num_threads(), binding.bins)
        return kernel.scratch_bytes(batch, self._module.tiles.grid[1], binding.rank, binding.partials, threads)

    @property
    def resident_bytes(self) -> int:
        return self._binding.own_bytes

    @property
    def packed(self) -> PackedPlanes:
        return self._binding.packed

    def _classify(self, x_dtype: torch.dtype) -> KernelClass:
        return classify(self._module, x_dtype, self._isa, self._on_missing)

    def _function(self, x_dtype: torch.dtype) -> Any:
        kernel = self._classify(x_dtype)
        function = load(emit(kernel), kernel.label, self._isa).stoicc_run
        pointer = ctypes.c_void_p
        function.argtypes = (pointer, pointer, pointer, pointer, ctypes.c_int64, ctypes.c_int)
        function.restype = None
        self._functions[x_dtype] = function
        return function


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
        return kind == "dense-once"

    def build(self, module: Module, pools: Pools, kind: str, on_missing: str) -> Executor:
        if kind == "tiles":
            return TilesExecutor(module, pools, on_missing)
        if kind == "dense-once":
            return DenseOnceExecutor(module, pools)
        raise CodegenError(f"cpu backend: expected executor 'tiles' or 'dense-once', found {kind!r}")

    def emit(self, module: Module, x_dtype: torch.dtype) -> str:
        return emit(classify(module, x_dtype, instruction_set(), "dense"))
