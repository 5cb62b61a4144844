"""The compiled kernel: a tile program, its schedule, its payload, and executors made on demand."""

from collections.abc import Callable
from os import PathLike
from typing import Any, Self

import torch
from torch import Tensor, nn

from stoicc.codegen.executor import Executor
from stoicc.dispatch import execute, new_handle
from stoicc.ir.dtypes import output_dtype
from stoicc.ir.errors import InputError
from stoicc.ir.schedule import Schedule
from stoicc.ir.types import Module, TileProgram
from stoicc.ir.verify import verify, verify_runnable
from stoicc.pools import Pools, TiledWeight, effective_matrix
from stoicc.stats import KernelStats, kernel_stats
from stoicc.targets import backend_for, backend_named, check_target


class Kernel(nn.Module):
    """A weight matrix compiled to executors; call it like `F.linear`.

    The canonical planes are buffers, so `.to`, `state_dict` and `copy.deepcopy` work as for any
    module. Executors are built when a batch regime is first met, and again after the buffers
    moved or changed.

    Attributes:
        target: as given to `stoicc.compile`.
        device: where the pools are, and x is expected.
    """

    def __init__(self, module: Module, pools: Pools, target: str = "auto", on_missing: str = "error") -> None:
        super().__init__()
        verify(module)
        verify_runnable(module)
        if on_missing not in ("error", "dense"):
            raise InputError(f"on_missing: expected 'error' or 'dense', found {on_missing!r}")
        self._module = module
        self.target = check_target(target)
        self.on_missing = on_missing
        for name, pool in pools.items():
            self.register_buffer(name, pool)
        self._executors: dict[tuple[str, str], Executor] = {}
        self._settle()
        self._handle = new_handle(self)
        self.register_load_state_dict_post_hook(_forget_executors)

    # -- reading ---------------------------------------------------------------------------

    @property
    def ir(self) -> Module:
        """The tile program and its schedule; prints as text that `stoicc.ir.parse` reads."""
        return self._module

    @property
    def program(self) -> TileProgram:
        """The tile program."""
        return self._module.tiles

    @property
    def schedule(self) -> Schedule:
        """The schedule; edit it with its methods and pass it to `stoicc.compile(kernel, schedule=...)`."""
        assert self._module.schedule is not None  # verified at construction
        return self._module.schedule

    @property
    def pools(self) -> dict[str, Tensor]:
        """The canonical pools by name."""
        return dict(self.named_buffers(recurse=False))

    @property
    def out_features(self) -> int:
        return self.program.shape[0]

    @property
    def in_features(self) -> int:
        return self.program.shape[1]

    @property
    def source(self) -> str:
        """The emitted source of the tiles executor, for inputs of the weight's own dtype."""
        return self.executor("tiles").source

    def to_dense(self) -> Tensor:
        """The matrix `[M, K]` that the kernel holds; see `TiledWeight.to_dense`."""
        return effective_matrix(self.program, self.pools)

    def tiled(self) -> TiledWeight:
        """The tile program and its pools, as `stoicc.inspect` gave them."""
        return TiledWeight(self.program, self.pools)

    def stats(self) -> KernelStats:
        """Tiles and bytes per format, bytes per weight, what is resident, and the byte bound."""
        return kernel_stats(self.program, self.pools, self._executors)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file with the pools and the exact IR text; `stoicc.load` reads it."""
        from stoicc.io import save

        save(self, path)

    def extra_repr(self) -> str:
        formats = ", ".join(f"{segment.format} x{segment.count}" for segment in self.program.segments)
        return f"{self.in_features} -> {self.out_features}, {self.program.dtype}, {formats}"

    # -- running ---------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T (+ what stands beside the tiles).

        Args:
            x: `[..., K]` on the kernel's device; any strides; see `stoicc.ir.dtypes.output_dtype`
                for dtypes. float64 runs on the reference executor.

        Returns:
            `[..., M]`, contiguous.
        """
        self._check_input(x)
        flat = x.reshape(-1, self.in_features).contiguous()
        if flat.shape[0] == 0:
            return x.new_empty(*x.shape[:-1], self.out_features, dtype=output_dtype(self.program.dtype, x.dtype))
        on_reference = self._backend == "reference" or x.dtype == torch.float64
        kind = "reference" if on_reference else self.schedule.regime(flat.shape[0])
        return execute(kind, flat, None, self._handle).view(*x.shape[:-1], self.out_features)

    def executor(self, kind: str) -> Executor:
        """The executor of a kind ("tiles", "dense-once", "reference"), built on first use."""
        backend = "reference" if kind == "reference" else self._backend
        key = (backend, kind)
        if key not in self._executors:
            self._executors[key] = backend_named(backend).build(self._module, self.pools, kind, self.on_missing)
        return self._executors[key]

    def input_gradient(self, grad: Tensor) -> Tensor:
        """dL/dx `[N, K]` from dL/dy `[N, M]`, through the decoded matrix."""
        if self.program.beside.activation is not None:
            raise InputError(
                f"kernel {self.program.name}: expected no gradient through a fused {self.program.beside.activation}, "
                "found x.requires_grad; compile without activation and apply it outside, or use torch.no_grad()"
            )
        return grad @ self.to_dense().to(grad.dtype)

    # -- nn.Module -------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype != tensor.dtype:
                # The dtype is part of the compiled structure: `.half()` moves, never converts.
                return tensor.to(result.device)
            return result

        self._executors.clear()
        applied: Self = super()._apply(moved, recurse)
        self._settle()
        return applied

    def __deepcopy__(self, memo: dict[int, Any]) -> "Kernel":
        copied = Kernel(
            self._module, {name: pool.clone() for name, pool in self.pools.items()}, self.target, self.on_missing
        )
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        """Executors hold machine code and addresses; a copy makes its own."""
        return Kernel, (self._module, self.pools, self.target, self.on_missing)

    def _settle(self) -> None:
        """Look up once what every call asks: where the pools are, and which backend serves them."""
        self.device = next((pool.device for pool in self.buffers()), torch.device("cpu"))
        self._backend = backend_for(self.target, self.device.type).name

    def _check_input(self, x: Tensor) -> None:
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise InputError(
                f"kernel {self.program.name}: expected x of shape [..., {self.in_features}], found {list(x.shape)}"
            )
        if x.device != self.device:
            raise InputError(
                f"kernel {self.program.name}: expected x on {self.device}, found {x.device}; "
                "move one of them with .to(...)"
            )
        output_dtype(self.program.dtype, x.dtype)


def _forget_executors(kernel: nn.Module, incompatible: object) -> None:
    """New values in the buffers: repacked planes are stale."""
    assert isinstance(kernel, Kernel)
    kernel._executors.clear()
