"""The compiled kernel: a tile program, its schedule, its payload, and executors made on demand."""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from os import PathLike
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad as fwAD

from stoicc.buffers import Buffers, BufferSource
from stoicc.codegen.executor import Executor
from stoicc.codegen.gradient import trainable_pools
from stoicc.dispatch import execute, is_compiling, new_handle
from stoicc.gradients import module_for
from stoicc.ir.dtypes import TORCH_DTYPES, output_dtype
from stoicc.ir.errors import InputError
from stoicc.ir.schedule import Schedule
from stoicc.ir.types import Module, TileProgram
from stoicc.ir.verify import verify, verify_pools, verify_runnable
from stoicc.policy.choose import Choice
from stoicc.policy.explain import Explanation, explain
from stoicc.pools import Pools, TiledWeight, aligned, effective_matrix, structure_hash
from stoicc.ready import ReadyCalls
from stoicc.record import LayerRecord
from stoicc.stats import KernelStats, kernel_stats
from stoicc.targets import backend_for, backend_named, check_target
from stoicc.trained import Training, make_parameters, trained_as, training_of, watched_parameters

AUTOCAST = (torch.bfloat16, torch.float16, torch.float32)
"""Input dtypes that autocast may bring to the weight's dtype."""

EXECUTOR_OF = {"linear": "dense-once"}
"""What a backend calls the executor of a role, where that is another name."""


class Kernel(nn.Module):
    """A weight matrix compiled to executors; call it like `F.linear`.

    The canonical planes are buffers, so `.to`, `state_dict` and `copy.deepcopy` work as for any
    module. Executors are built when a batch regime is first met, and again after the buffers
    moved or changed.

    On a CPU the planes live once: they are packed for the SIMD units at the first call, and the buffers
    are let go unless somebody holds them. Asking for a buffer (`state_dict`, `.to`, `pools`, an attribute)
    brings all of them back, and the next call packs them anew. `to_dense`, `save`, copies, gradients
    and statistics read what is packed as it is.

    It is differentiable in x. `requires_grad_` makes parameters of what can be trained: the floats that formats keep,
    the bias, and low-rank factors; they train by optimizers of torch, the structure stays.

    Attributes:
        target: as given to `stoicc.compile`.
        device: where the pools are, and x is expected.
        record: what `stoicc.compress` did to the layer, or None; kept by copies and pickling.
        choice: what a budget chose between, or None without one; kept by copies and pickling.
    """

    def __init__(self, module: Module, pools: Pools, target: str = "auto", on_missing: str = "error") -> None:
        super().__init__()
        self._executors: dict[str, Executor] = {}
        self._ready = ReadyCalls()
        self._buffers = Buffers(dropped=partial(_forget, self._executors, self._ready), trained=self._parameters)
        verify(module)
        verify_runnable(module)
        verify_pools(module.tiles, pools, contents=False)
        if on_missing not in ("error", "dense"):
            raise InputError(f"on_missing: expected 'error' or 'dense', found {on_missing!r}")
        self._module = module
        self.target = check_target(target)
        self.on_missing = on_missing
        self.record: LayerRecord | None = None
        self.choice: Choice | None = None
        for pool in module.tiles.pools():
            self.register_buffer(pool.name, pools[pool.name])
        self._built_for: tuple[object, ...] = ()
        self._built_at: tuple[object, ...] = ()
        self._workspace_bytes = 0
        self._settle(torch.empty(0, device=next((pool.device for pool in pools.values()), "cpu")))
        self._handle = new_handle(self)

    # -- reading ---------------------------------------------------------------------------

    @property
    def ir(self) -> Module:
        """The tile program and its schedule; prints as text, a large one elided.

        `stoicc.ir.print_module(kernel.ir, exact=True)` is text that `stoicc.ir.parse` reads back.
        """
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
        """The canonical pools by name: the kernel's own buffers and parameters, to read or to edit."""
        self._store.restore()
        return self._store.real()

    @property
    def source_of_pools(self) -> BufferSource:
        """The canonical pools by name, for reading: planes that are packed are copies, and stay packed."""
        return BufferSource(self._store, self.device)

    @property
    def out_features(self) -> int:
        """M, the length of y."""
        return self.program.shape[0]

    @property
    def in_features(self) -> int:
        """K, the length of x."""
        return self.program.shape[1]

    @property
    def source(self) -> str:
        """The emitted source of the tiles executor, for inputs of the weight's own dtype."""
        return self.executor("tiles").source

    def to_dense(self) -> Tensor:
        """The matrix `[M, K]` that the kernel holds; see `TiledWeight.to_dense`.

        Codes are rounded once to the weight's dtype here. The C tiles multiply codes unrounded (but for a
        large batch on matrix units), so a product may differ from one with this matrix by that
        rounding (2**-9 of a bf16 weight).
        """
        return effective_matrix(self.program, self.source_of_pools)

    def tiled(self) -> TiledWeight:
        """The tile program and its pools, as `stoicc.inspect` gave them."""
        return TiledWeight(self.program, self.pools)

    def stats(self) -> KernelStats:
        """Tiles and bytes per format, bytes per weight, what is resident, and the byte bound."""
        with self._store.lock:
            held = sum(pool.nbytes for pool in self._store.real().values())
            executors = tuple(self._executors.values())
            packed = sum(executor.resident_bytes for executor in executors)
            if self._store.packed is not None and "tiles" not in self._executors:
                packed += self._store.packed.nbytes
        transient = max((executor.transient_bytes for executor in executors), default=0)
        dialect = backend_named(self._backend).dialect(self._module, self.device)
        return kernel_stats(self.program, packed, held + packed, self._workspace_bytes + transient, dialect)

    def explain(self, row: int, column: int, batch: int | None = None) -> Explanation:
        """Why tile (row, column) of the grid has its format: bytes, predicted time and error of each candidate.

        A kernel that a budget made shows what the budget weighed; any other, what its tile would lose in each
        format, all inputs alike. Times are for `batch` rows of x (default: the budget's, else 1), from the constants
        of `stoicc.cost_model` where they were measured, else built-in ones.

        Raises:
            InputError: no such tile.
        """
        rows = batch or (1 if self.choice is None else self.choice.batch)
        return explain(self.program, self.source_of_pools, self.choice, row, column, self._backend, rows)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file with the pools and the exact IR text; `stoicc.load` reads it."""
        from stoicc.io import save

        save(self, path)

    def extra_repr(self) -> str:
        """Shape, dtype and formats, for the repr of the model around it."""
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
        if not is_compiling():
            if (y := self._ready.call(x, self._store)) is not None:
                return y
        return self._looked_up(x)

    def _looked_up(self, x: Tensor) -> Tensor:
        """`forward` for an x of which nothing is known."""
        x = self._checked(x)
        flat = x if x.ndim == 2 and x.is_contiguous() else x.reshape(-1, self.in_features).contiguous()
        trained = watched_parameters(self) if self._parameters else []
        on_reference = self._backend == "reference" or x.dtype == torch.float64
        kind = "reference" if on_reference else "dense-once" if trained else self.schedule.regime(flat.shape[0])
        y = execute(kind, flat, None, self._handle, trained)
        if kind == "tiles" and not is_compiling():
            with self._store.lock:
                self._ready.remember(x, self._executors.get("tiles"), self._store, self._built_for)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], self.out_features)

    def executor(self, kind: str) -> Executor:
        """The executor of a kind, built on first use.

        Kinds are "tiles", "dense-once", on GPUs "vendor" and, for gradients, "transposed" and "linear" (without the
        activation); "reference", "reference-transposed" and "reference-linear" are those of the reference.
        """
        with self._store.lock:
            state, steps = self._store.state(), self._store.steps()
            if state != self._built_for:
                self.refresh()  # values or places changed: repacked planes and addresses are stale
                self._built_for, self._built_at = state, steps
            elif steps != self._built_at:  # of an optimizer: what asks for the values at each call has them
                for stale in [name for name in self._executors if not self._reads_sources(name)]:
                    del self._executors[stale]
                self._built_at = steps
            built = kind not in self._executors
            if built:
                self._executors[kind] = self._build(kind)
            if kind == "tiles" and self._store.packed is None:
                self._let_go(built)
            return self._executors[kind]

    def refresh(self) -> None:
        """Let executors be built anew: needed only after edits through `.data`, which torch does not count."""
        _forget(self._executors, self._ready)

    def note_workspace(self, nbytes: int) -> None:
        """Called with the workspace of each call, for `stats`."""
        if nbytes > self._workspace_bytes:  # `nn.Module` takes its time to set an attribute
            self._workspace_bytes = nbytes

    @property
    def _store(self) -> Buffers:
        return cast(Buffers, self._buffers)

    def _reads_sources(self, kind: str) -> bool:
        name, role = self._of(kind)
        return backend_named(name).reads_sources(EXECUTOR_OF.get(role, role))

    def _of(self, kind: str) -> tuple[str, str]:
        """The backend that a kind of executor comes from, and its role there."""
        if kind == "reference":
            return "reference", "tiles"
        role = kind.removeprefix("reference-")
        return self._backend if role == kind else "reference", role

    def _build(self, kind: str) -> Executor:
        name, role = self._of(kind)
        backend = backend_named(name)
        if self._reads_sources(kind):
            pools: Pools = self.source_of_pools
        else:
            self._store.restore()
            self._built_for = self._store.state()
            pools = {name: aligned(pool) for name, pool in self._store.real().items()}
        if self._store.packed is None:  # `assign=True` loads whatever it is given
            verify_pools(self.program, self._store.real(), contents=False)
        return backend.build(module_for(role, self._module), pools, EXECUTOR_OF.get(role, role), self.on_missing)

    def _let_go(self, built: bool) -> None:
        """Free the buffers that the tiles executor has packed, where nobody else can see them.

        They are packed again first unless that was done just now: whoever held them until a moment ago
        may have edited them in ways that torch does not count.
        """
        packed = self._executors["tiles"].packed
        if packed is None:
            return
        names = packed.names - (packed.apart & self._parameters.keys())
        if not names or not self._store.alone(names):
            return
        if not built:
            self._executors["tiles"] = self._build("tiles")
            packed = self._executors["tiles"].packed
            assert packed is not None
        self._store.let_go(packed, names)
        self._built_for = self._store.state()

    # -- training --------------------------------------------------------------------------

    def requires_grad_(self, requires_grad: bool = True, only: Iterable[str] | None = None) -> Self:
        """Make parameters of what can be trained, so that `parameters()` has it; False makes buffers of it again.

        Args:
            only: names of pools, of those in `trainable()`: the floats that formats keep (`p<segment>_values`),
                `bias`, `left` and `right`. Default: all of them.

        Raises:
            InputError: a name of something else.
        """
        make_parameters(self, requires_grad, only)
        return self

    def trainable(self) -> tuple[str, ...]:
        """Names of the pools that `requires_grad_` makes parameters of."""
        return trainable_pools(self.program)

    def trained_names(self) -> tuple[str, ...]:
        """Names of the pools that are parameters now."""
        return tuple(self._parameters)

    # -- nn.Module -------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        cast: list[torch.dtype] = []

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype == tensor.dtype:
                return result
            cast.append(result.dtype)  # the dtype is part of the compiled structure
            return tensor.to(result.device)

        applied: Self = super()._apply(moved, recurse)
        self._settle(moved(torch.empty(0, dtype=TORCH_DTYPES[self.program.dtype], device=self.device)))
        if cast:
            warnings.warn(
                f"kernel {self.program.name}: keeps its {self.program.dtype} weights, where a cast to {cast[-1]} was "
                "asked; compile the weight in that dtype",
                stacklevel=4,
            )
        return applied

    def __deepcopy__(self, memo: dict[int, Any]) -> "Kernel":
        pools = self.source_of_pools.whole()
        real = self._store.real()  # the others are copies already
        pools = {name: pool.clone() if name in real else pool for name, pool in pools.items()}
        copied = Kernel(self._module, pools, self.target, self.on_missing)
        copied.record, copied.choice = self.record, self.choice
        memo[id(self)] = copied
        return trained_as(copied, training_of(self))

    def get_extra_state(self) -> Tensor:
        """The structure that the buffers belong to: a hash of the program without its contents."""
        return torch.frombuffer(bytearray(structure_hash(self.program)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: `_load_from_state_dict` has compared it."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        found = state_dict.get(f"{prefix}_extra_state")
        if found is not None and bytes(found.tolist()) != structure_hash(self.program):
            raise InputError(
                f"kernel {self.program.name}: expected a state dict of the same tiles, formats and shape, found "
                "another's; values may change, structure may not: compile that weight, or load its artefact"
            )
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __reduce__(self) -> tuple[Any, ...]:
        """Executors hold machine code and addresses; a copy makes its own."""
        made = (self._module, self.source_of_pools.whole(), self.target, self.on_missing)
        return _remade, (made, training_of(self)), {"record": self.record, "choice": self.choice}

    def _settle(self, probe: Tensor) -> None:
        """Look up once what every call asks: where the pools are (with `probe`), and the backend."""
        self.device = probe.device
        self._backend = backend_for(self.target, self.device.type).name

    def _checked(self, x: Tensor) -> Tensor:
        """x, as it is or cast under autocast, where this kernel can take it; else InputError."""
        if not isinstance(x, Tensor) or x.layout is not torch.strided:
            found = type(x).__name__ if not isinstance(x, Tensor) else f"{x.layout}"
            raise InputError(f"kernel {self.program.name}: expected a dense tensor x, found {found}")
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise InputError(
                f"kernel {self.program.name}: expected x of shape [..., {self.in_features}], found {list(x.shape)}"
            )
        if x.device != self.device:
            raise InputError(
                f"kernel {self.program.name}: expected x on {self.device}, found {x.device}; "
                "move one of them with .to(...)"
            )
        if fwAD._current_level >= 0:
            raise InputError(
                f"kernel {self.program.name}: expected no forward-mode derivative, found one going on; "
                "use reverse mode (backward)"
            )
        if torch.is_autocast_enabled(x.device.type) and x.dtype in AUTOCAST:
            return x.to(TORCH_DTYPES[self.program.dtype])
        output_dtype(self.program.dtype, x.dtype)
        return x


def _forget(executors: dict[str, Executor], ready: ReadyCalls) -> None:
    """What was built for values or places that are others now."""
    executors.clear()
    ready.clear()


def _remade(made: tuple[Any, ...], training: Training) -> Kernel:
    return trained_as(Kernel(*made), training)
