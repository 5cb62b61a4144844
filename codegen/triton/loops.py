"""What a kernel needs from each live segment: its decode, its planes, and where entries stand.

One `FormatLoop` is one loop of the emitted kernel. `loops_of` reads them off a scheduled module;
the emitter turns them into text, the launcher into tensors, and both use the names given here.
"""

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stoicc.ir.errors import CodegenError
from stoicc.ir.format import Plane, PlaneKind, TritonDecode
from stoicc.ir.planes import plane_slots, pool_name, tile_coordinates, tile_planes
from stoicc.ir.schedule import Schedule, csr_rows
from stoicc.ir.types import Module

Pools = Mapping[str, Tensor]

KERNEL_NAMES = frozenset(
    "tl triton load_x add_product tiles_kernel reduce_kernel load_h transposed_kernel h order e x y parts items "
    "row_slots panel rows M K N RANK BN DOT PRECISION row_permutation column_permutation input_scale output_scale "
    "low_rank_left low_rank_product bias blocks item n acc first column w block slot part row m there start r "
    "left product t top k".split()
)
"""What emitted kernels call their own functions, arguments and locals."""


@triton.jit
def decode_values(values, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of a format without a device decode, made dense when the kernel was loaded."""
    return tl.load(values + tl.arange(0, BM)[:, None] * BK + tl.arange(0, BK)[None, :])


@dataclass(frozen=True)
class PlaneUse:
    """A plane as a kernel argument; `slots` names the array of shared entries, or of offsets."""

    name: str
    plane: Plane
    slots: str | None = None


@dataclass(frozen=True)
class FormatLoop:
    """One loop of a kernel: a csr, the decode of its format and the planes it reads.

    Attributes:
        index: which csr, and which range of a work item; a csr whose format stores nothing has no loop.
        segment: the segment of the program.
        prefix: what the loop's arguments start with.
        text: the format in words, for a comment.
        dense: tiles are made dense when the executor is built (the format has no device decode).
    """

    index: int
    segment: int
    prefix: str
    text: str
    decode: TritonDecode
    planes: tuple[PlaneUse, ...]
    dense: bool = False

    @property
    def columns(self) -> str:
        return f"{self.prefix}_columns"


def scheduled(module: Module) -> Schedule:
    """The module's schedule with work items, or CodegenError."""
    schedule = module.schedule
    if schedule is None or (schedule.live and not schedule.csrs):
        raise CodegenError(
            f"module {module.tiles.name}: expected a schedule with a csr per live segment, found none; "
            "run a pipeline that has build-csr"
        )
    return schedule if schedule.items else schedule.split_k(1)


def loops_of(module: Module, on_missing: str = "dense") -> tuple[FormatLoop, ...]:
    """The loops of a module's kernel, in csr order.

    Raises:
        CodegenError: a format has no Triton decode and `on_missing` is "error".
    """
    program, loops, csrs = module.tiles, [], scheduled(module).csrs
    formats = [program.segments[csr.segment].resolve() for csr in csrs]
    decodes = [fmt.decode_block(program.tile, program.dtype) for fmt in formats]
    taken = {*KERNEL_NAMES, *(decode.function.fn.__name__ for decode in decodes if decode is not None)}
    for index, (csr, fmt, decode) in enumerate(zip(csrs, formats, decodes, strict=True)):
        planes = fmt.planes(program.tile, program.dtype)
        if not planes:
            continue
        if decode is None and on_missing != "dense":
            raise CodegenError(
                f"format {fmt}: expected a Triton decode, found none; give it a decode_block or pass on_missing='dense'"
            )
        dense = decode is None
        if decode is None:
            decode, planes = TritonDecode(decode_values), (Plane("values", program.dtype, program.tile),)
        prefix = _free(re.sub(r"\W", "_", fmt.name), _loop_names, taken)
        loops.append(FormatLoop(index, csr.segment, prefix, str(fmt), decode, _uses(prefix, planes, taken), dense))
    return tuple(loops)


def _free(name: str, names_of: Callable[[str], list[str]], taken: set[str]) -> str:
    """The name, numbered where one of the names that come with it is taken; takes them all."""
    candidates = (name if number == 1 else f"{name}_{number}" for number in itertools.count(1))
    free = next(candidate for candidate in candidates if taken.isdisjoint(names_of(candidate)))
    taken.update(names_of(free))
    return free


def _loop_names(prefix: str) -> list[str]:
    """Names that come with the prefix of a loop."""
    return [f"{prefix}_columns", f"decode_{prefix}_kernel", f"{prefix}_first", f"{prefix}_rows", f"{prefix}_tiles"]


def _plane_names(name: str) -> list[str]:
    """Names that come with a plane's argument: where its entries stand, and one entry."""
    return [name, *(f"{name}_{kind}" for kind in ("slots", "slot", "ptr", "begin", "count"))]


def _uses(prefix: str, planes: tuple[Plane, ...], taken: set[str]) -> tuple[PlaneUse, ...]:
    """Planes that are shared alike (scales and zeros, say) read one array of slots.

    A plane's argument is `<prefix>_<plane>`; it is numbered where the kernel has that name already.
    """
    slots: dict[int, str] = {}
    uses = []
    for plane in planes:
        name = _free(re.sub(r"\W", "_", f"{prefix}_{plane.name}"), _plane_names, taken)
        if plane.kind is PlaneKind.GROUP:
            uses.append(PlaneUse(name, plane, slots.setdefault(plane.span, f"{name}_slots")))
        elif plane.kind is PlaneKind.RAGGED:
            uses.append(PlaneUse(name, plane, f"{name}_ptr"))
        else:
            uses.append(PlaneUse(name, plane))
    return tuple(uses)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself where it is contiguous and starts at a multiple of 16 bytes, else a copy that is.

    Kernels read planes of bytes as words and take pointers to be aligned.
    """
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def loop_tensors(module: Module, loop: FormatLoop, pools: Pools, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a loop by argument name; indices are int32, planes are the pools themselves."""
    csr = scheduled(module).csrs[loop.index]
    tensors = {loop.columns: _indices(csr.col_idx, device)}
    if loop.dense:
        fmt = module.tiles.segments[loop.segment].resolve()
        planes = tile_planes(module.tiles, loop.segment, pools)
        tensors[loop.planes[0].name] = aligned(fmt.decode(planes, module.tiles.tile, module.tiles.dtype))
        return tensors
    rows, columns = tile_coordinates(module.tiles, loop.segment)
    for use in loop.planes:
        pool = pool_name(loop.segment, use.plane.name)
        tensors[use.name] = aligned(pools[pool])
        if use.plane.kind is PlaneKind.GROUP and use.slots is not None:
            tensors[use.slots] = _indices(plane_slots(use.plane, rows, columns), device)
        elif use.slots is not None:
            tensors[use.slots] = aligned(pools[f"{pool}_ptr"])
    return tensors


def loop_arguments(loop: FormatLoop) -> list[str]:
    """Argument names of a loop: the keys of `loop_tensors`, in the order of the kernel's signature."""
    return list(dict.fromkeys([loop.columns, *(n for use in loop.planes for n in (use.name, use.slots) if n)]))


def item_table(schedule: Schedule, device: torch.device) -> tuple[Tensor, Tensor]:
    """Work items as int32 `[items, 2 + 2 * csrs]`, and where each tile row's parts start `[rows + 1]`.

    An item is (tile row, slot, first tile and tile count of each csr). Slots number the parts of
    all rows in row and part order, whatever the order in which items run.
    """
    rows = len(schedule.row_order)
    parts = torch.zeros(rows + 1, dtype=torch.int64)
    for item in schedule.items:
        parts[item.row + 1] = item.parts
    starts = parts.cumsum(0)
    table = [
        [item.row, int(starts[item.row]) + item.part, *(n for begin, end in item.ranges for n in (begin, end - begin))]
        for item in schedule.items
    ]
    return _indices(table, device), starts.to(device=device, dtype=torch.int32)


def tile_rows(module: Module, loop: FormatLoop, device: torch.device) -> Tensor:
    """The tile row of each tile of a loop, int32."""
    return _indices(csr_rows(scheduled(module).csrs[loop.index]), device)


def _indices(values: object, device: torch.device) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32).to(device)
