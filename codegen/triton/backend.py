"""The Triton backend: executors that launch emitted kernels."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from stoicc.codegen.executor import Backend, Executor, Pools
from stoicc.codegen.triton import build
from stoicc.codegen.triton.dense_once import DenseOnce
from stoicc.codegen.triton.emit import Emitted, emit_tiles, prologue_arguments
from stoicc.codegen.triton.interpreter import interpreting, repair
from stoicc.codegen.triton.launch import (
    TRITON_DOTS,
    LaunchConfig,
    beside_tensors,
    device_of,
    dot_dtype,
    dot_precision,
    kept_bytes,
    low_rank_bytes,
    low_rank_product,
    right_factors,
    rows_of_a_piece,
)
from stoicc.codegen.triton.loops import item_table, loop_tensors, scheduled
from stoicc.codegen.triton.transposed import TransposedTiles
from stoicc.codegen.triton.vendor import Vendor
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.errors import CodegenError
from stoicc.ir.format import Tile, TileFormat
from stoicc.ir.library import library_copy
from stoicc.ir.schedule import EXECUTORS
from stoicc.ir.types import Module

ON_X = {"scaled": "input_scale", "permuted": "column_permutation"}
"""What happens to x, by the argument that says how."""


class TritonBackend(Backend):
    """Portable Triton on GPUs; on CPU tensors under `TRITON_INTERPRET=1`, for tests."""

    name: ClassVar[str] = "triton"
    device_type: ClassVar[str] = "cuda"
    code: ClassVar[str] = "a Triton decode (decode_block)"

    def has_code(self, fmt: TileFormat, tile: Tile, dtype: str) -> bool:
        return not fmt.planes(tile, dtype) or fmt.decode_block(tile, dtype) is not None

    def reads_sources(self, kind: str) -> bool:
        return kind == "transposed"

    def available(self) -> str | None:
        if interpreting() or torch.cuda.is_available():
            return None
        return "no CUDA or ROCm device that torch can see"

    @property
    def runs_on_cpu(self) -> bool:
        """Whether kernels run on CPU tensors in this process: in the interpreter."""
        return interpreting()

    def build(self, module: Module, pools: Pools, kind: str, on_missing: str) -> Executor:
        if kind not in (*EXECUTORS, "transposed"):
            raise CodegenError(f"backend triton: expected an executor of {', '.join(EXECUTORS)}, found {kind!r}")
        check_tile(module)
        repair()
        if kind == "transposed":
            return TransposedTiles(module, pools, on_missing)
        if kind == "dense-once":
            return DenseOnce(module, pools, on_missing)
        if kind == "vendor":
            return Vendor(module, pools, on_missing)
        device = device_of(pools)
        if _why_portable(module, device) is not None:
            return Tiles(module, pools, on_missing)
        from stoicc.codegen.gluon.executor import GluonTiles

        return GluonTiles(module, pools, capability_of(device), lambda found: Tiles(module, found, on_missing))

    def dialect(self, module: Module, device: torch.device) -> str:
        if device.type != "cuda":  # not moved to the GPU yet, where alone it runs
            device = torch.device("cuda")
        why = _why_portable(module, device)
        if why is not None:
            return f"portable Triton: {why}{_other_executors(module)}"
        dtype, capability = module.tiles.dtype, capability_of(device)
        first = f"Gluon on the tensor cores of sm_{capability} for {dtype} inputs, portable Triton for others"
        return first + _inputs(module, capability) + _warpgroups(module, capability) + _other_executors(module)

    def emit(self, module: Module, x_dtype: torch.dtype) -> str:
        """One text for every input dtype: the launcher says what the dot's operands are."""
        check_tile(module)
        return emit_tiles(module).source


def _inputs(module: Module, capability: int) -> str:
    """Where x is scaled and permuted, if it is."""
    from stoicc.codegen.gluon.inputs import padded
    from stoicc.codegen.gluon.launch import prologue_batch

    there, columns = prologue_arguments(module.tiles.beside), module.tiles.shape[1]
    done = [done for done, name in ON_X.items() if name in there]
    if padded(columns) != columns:
        return f"; x is {' and '.join([*done, f'padded to {padded(columns)} columns'])} before the launch"
    if not there:
        return ""
    what = " and ".join(done)
    asked = dict(scheduled(module).launch).get("prologue")
    if asked is not None:
        return f"; x is {what} {'in the launch' if asked else 'before it'}, as the schedule says"
    most = prologue_batch(module, capability)
    return f"; x is {what} in the launch up to a batch of {most}, before it above: predicted to take less"


def _warpgroups(module: Module, capability: int) -> str:
    """What became of `wgmma` where a schedule asks for it."""
    launch = dict(scheduled(module).launch)
    if not launch.get("wgmma"):
        return ""
    from stoicc.codegen.gluon.launch import WGMMA_BLOCKS, without_wgmma

    why = without_wgmma(capability, WGMMA_BLOCKS[0], launch)
    if why is not None:
        return f"; no wgmma: {why}"
    return f"; wgmma for batches of {WGMMA_BLOCKS[0]} and more, which no GPU has confirmed"


def _other_executors(module: Module) -> str:
    """Which batches go to something else than tiles, and to what."""
    whats = {
        "dense-once": "dense-once: panels are decoded for the vendor's GEMM",
        "vendor": "the vendor's library: "
        + ("every tile is 2:4" if library_copy(module.tiles) == "2:4" else "it keeps a dense copy"),
    }
    predicted = any(step.startswith("regimes") and "tiles=auto" in step for step in scheduled(module).applied)
    why = ", from where on it is predicted to be faster" if predicted else ""
    found, above = "", 0
    for regime in scheduled(module).regimes:
        if regime.executor in whats:
            upto = "" if regime.max_batch is None else f" to {regime.max_batch}"
            found += f"; batches from {above + 1}{upto} in {whats[regime.executor]}{why}"
        above = regime.max_batch or above
    return found


def capability_of(device: torch.device) -> int:
    """Compute capability of an NVIDIA device, as `major * 10 + minor`."""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _why_portable(module: Module, device: torch.device) -> str | None:
    """Why the Gluon dialect does not run a module on this device, in one clause; None where it does."""
    if interpreting():
        return "Triton's interpreter has no Gluon"
    if device.type != "cuda" or torch.version.hip:
        return "Gluon's tensor cores are NVIDIA's"
    if dict(scheduled(module).launch).get("gluon") == 0:
        return "the schedule says gluon = 0"
    from stoicc.codegen.gluon.launch import unsupported

    return unsupported(module, TORCH_DTYPES[module.tiles.dtype], capability_of(device))


def check_tile(module: Module) -> None:
    """CodegenError unless both sides of the tile are powers of two of at least 16."""
    for extent in module.tiles.tile:
        if extent < 16 or extent & (extent - 1):
            raise CodegenError(
                f"backend triton, tile {module.tiles.tile[0]}x{module.tiles.tile[1]}: expected sides that are powers "
                f"of two from 16 up, found {extent}; choose another tile"
            )


@dataclass(frozen=True)
class Sizes:
    """Numbers of one weight that a launch needs."""

    rows: int
    columns: int
    tile_rows: int
    slots: int
    rank: int


class Tiles(Executor):
    """Multiplies tile by tile from the payload: one launch, and one more to add split-K parts.

    A low-rank product R x is one `torch.mm` before. Where split-K parts would not fit the
    workspace bound, the batch runs in pieces.
    """

    def __init__(self, module: Module, pools: Pools, on_missing: str) -> None:
        schedule = scheduled(module)
        self._emitted: Emitted = emit_tiles(module, on_missing)
        self.source = self._emitted.source
        self._kernels: ModuleType = build.load(self._emitted.name, self.source)
        self._module, self._device = module, device_of(pools)
        self._beside = beside_tensors(module, pools)
        self._rights = right_factors(self._beside, module.tiles.dtype)
        self._items, self._row_slots = item_table(schedule, self._device)
        self._loops: dict[str, Tensor] = {}
        for loop in self._emitted.loops:
            self._loops |= loop_tensors(module, loop, pools, self._device)
        rank = self._beside["low_rank_left"].shape[1] if "low_rank_left" in self._beside else 0
        (rows, columns), tile_rows = module.tiles.shape, module.tiles.grid[0]
        self._sizes = Sizes(rows, columns, tile_rows, int(self._row_slots[-1]), rank)
        self._launch: Mapping[str, int] = dict(schedule.launch)
        self._owned = {t.data_ptr() for t in pools.values()}

    @property
    def resident_bytes(self) -> int:
        tables = (self._loops, self._beside, self._rights)
        return kept_bytes([self._items, self._row_slots, *(t for table in tables for t in table.values())], self._owned)

    def workspace_bytes(self, batch: int, x_dtype: torch.dtype) -> int:
        parts = self._slot_bytes() * self._piece(batch) if self._emitted.split else 0
        return low_rank_bytes(batch, self._sizes.rank) + parts

    def run(self, x: Tensor, out: Tensor, workspace: Tensor) -> None:
        if self._items.device != x.device:  # no pools: nothing said on which device
            self._items, self._row_slots = self._items.to(x.device), self._row_slots.to(x.device)
        held = low_rank_bytes(x.shape[0], self._sizes.rank)
        tables = {name: self._beside[name] for name in self._emitted.epilogue if name in self._beside}
        if self._sizes.rank:
            product = workspace[: x.shape[0] * self._sizes.rank * 4].view(torch.float32).view(x.shape[0], -1)
            low_rank_product(x, self._rights, product)
        step = self._piece(x.shape[0]) if self._emitted.split else x.shape[0]
        for begin in range(0, x.shape[0], step):
            piece = slice(begin, begin + step)
            if self._sizes.rank:
                tables["low_rank_product"] = product[piece]
            self._run_piece(x[piece], out[piece], workspace[held:], tables)

    def _run_piece(self, x: Tensor, out: Tensor, workspace: Tensor, tables: dict[str, Tensor]) -> None:
        config = LaunchConfig.choose(x.shape[0], x.dtype, self._module.tiles.tile, self._launch)
        blocks = -(-x.shape[0] // config.block_n)
        sizes: dict[str, Any] = {"M": self._sizes.rows, "K": self._sizes.columns, "N": x.shape[0]}
        dot = TRITON_DOTS[dot_dtype(x.dtype, "input_scale" in self._emitted.prologue)]
        rank = {"RANK": self._sizes.rank} if self._sizes.rank else {}
        constants = {"BN": config.block_n, "DOT": dot, "PRECISION": dot_precision(x.dtype), **config.options()}
        prologue = {name: self._beside[name] for name in self._emitted.prologue}
        grid = (self._items.shape[0] * blocks,)
        if not self._emitted.split:
            self._kernels.tiles_kernel[grid](
                x=x, y=out, items=self._items, **prologue, **self._loops, **tables, **sizes, **rank, **constants
            )
            return
        parts = workspace[: self._slot_bytes() * x.shape[0]].view(torch.float32)
        rows = sizes.pop("M")
        self._kernels.tiles_kernel[grid](
            x=x, parts=parts, items=self._items, **prologue, **self._loops, **sizes, **constants
        )
        sizes = {"M": rows, "N": x.shape[0]}
        self._kernels.reduce_kernel[(self._sizes.tile_rows * blocks,)](
            parts=parts, y=out, row_slots=self._row_slots, **tables, **sizes, **rank, **constants
        )

    def _slot_bytes(self) -> int:
        """Bytes of all parts for one row of x."""
        return self._sizes.slots * self._module.tiles.tile[0] * 4

    def _piece(self, batch: int) -> int:
        """Rows of x whose parts fit the workspace bound, in whole rounds."""
        return rows_of_a_piece(batch, self._slot_bytes())
