"""h W on a GPU, in the portable dialect: a program owns a tile column and BN rows of h, and walks the column's tiles.

The payload is that of the forward kernels, in the same order: a csc says which tiles stand in a column, and where.
"""

import textwrap
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stoicc.codegen.executor import Executor, Pools
from stoicc.codegen.triton import build
from stoicc.codegen.triton.emit import (
    CONSTEXPRS,
    Emitted,
    assemble,
    class_name,
    decode_call,
    entry_lines,
    formats_of,
    shape_of,
)
from stoicc.codegen.triton.launch import TRITON_DOTS, LaunchConfig, dot_dtype, dot_precision, kept_bytes
from stoicc.codegen.triton.loops import FormatLoop, aligned, loops_of, scheduled
from stoicc.codegen.triton.text import function, kernel
from stoicc.ir.errors import CodegenError
from stoicc.ir.format import PlaneKind
from stoicc.ir.planes import PlaneSource, plane_slots, pool_name, tile_coordinates, tile_planes
from stoicc.ir.schedule import Transposed
from stoicc.ir.types import Module


def emit_transposed(module: Module, on_missing: str = "dense") -> Emitted:
    """The kernel of h W for a class; the same text for every schedule of it."""
    loops = loops_of(module, on_missing)
    about = f"y = h W, by tile columns, for W in tiles of {formats_of(loops)}: {shape_of(module)}."
    lines = textwrap.wrap(about, 100)
    lines += ["", "Launch: transposed_kernel with (tile columns) * cdiv(N, BN) programs."]
    lines += ["DOT: the dtype of h.", 'PRECISION: "ieee" for h in fp32, else "tf32".']
    text = assemble(module, loops, [_load_h(module), _ADD_PRODUCT, _kernel(module, loops)], "\n".join(lines))
    return Emitted(text, f"{class_name(module, loops, text)}_transposed", False, loops, (), ())


def _load_h(module: Module) -> str:
    """Text of `load_h`: the `[BN, BM]` block of h that meets a tile row."""
    rows = module.tiles.tile[0]
    tail = module.tiles.shape[0] % rows != 0
    mask = "(n < N)[:, None] & (m < M)[None, :]" if tail else "(n < N)[:, None]"
    past = "past the batch and past M" if tail else "past the batch"
    lines = [
        f'"""Columns of h under one tile row, `[BN, {rows}]`; zeros {past}."""',
        f"m = row * {rows} + tl.arange(0, {rows})",
        f"block = tl.load(h + n.to(tl.int64)[:, None] * M + m[None, :], mask={mask}, other=0.0)",
        "return block.to(DOT)",
    ]
    return function("load_h", "h, row, n, N, M, DOT: tl.constexpr", lines)


_ADD_PRODUCT = function(
    "add_product",
    "w, block, acc, DOT: tl.constexpr, PRECISION: tl.constexpr",
    [
        '"""Sums `[BN, BK]` plus a block of h times a tile; fp32 operands keep fewer registers the other way round."""',
        "if DOT == tl.float32:",
        "    acc = tl.trans(tl.dot(tl.trans(w), tl.trans(block), tl.trans(acc), input_precision=PRECISION))",
        "else:",
        "    acc = tl.dot(block, w, acc, input_precision=PRECISION)",
        "return acc",
    ],
)


def _kernel(module: Module, loops: tuple[FormatLoop, ...]) -> str:
    columns = module.tiles.tile[1]
    lines = [
        '"""One program: a tile column times BN rows of h."""',
        "blocks = tl.cdiv(N, BN)",
        "column = tl.load(order + tl.program_id(0) // blocks)",
        "n = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)",
        f"acc = tl.zeros((BN, {columns}), tl.float32)",
    ]
    for loop in loops:
        lines += ["", *_loop(module, loop)]
    lines += [
        "",
        f"k = column * {columns} + tl.arange(0, {columns})",
        "there = (n < N)[:, None] & (k < K)[None, :]",
        "tl.store(y + n.to(tl.int64)[:, None] * K + k[None, :], acc.to(y.dtype.element_ty), mask=there)",
    ]
    arguments = ["h", "y", "order", *(name for loop in loops for name in transposed_arguments(loop))]
    return kernel("transposed_kernel", [*arguments, "M", "K", "N", *CONSTEXPRS], lines)


def _loop(module: Module, loop: FormatLoop) -> list[str]:
    """The loop of one format over the tiles of the column."""
    first, rows, tiles = index_names(loop)
    body = [
        f"t = tl.load({tiles} + e).to(tl.int64)",
        f"row = tl.load({rows} + e)",
        *entry_lines(loop, "t"),
        *decode_call(module, loop, "t"),
        "block = load_h(h, row, n, N, M, DOT)",
        "acc = add_product(w.to(DOT), block, acc, DOT, PRECISION)",
    ]
    bounds = f"tl.load({first} + column), tl.load({first} + column + 1)"
    return [f"# {loop.text}", f"for e in range({bounds}):", *(f"    {line}" for line in body)]


def index_names(loop: FormatLoop) -> tuple[str, str, str]:
    """Arguments of a loop for its csc: where a column starts, and the tile row and payload tile of each entry."""
    return f"{loop.prefix}_first", f"{loop.prefix}_rows", f"{loop.prefix}_tiles"


def transposed_arguments(loop: FormatLoop) -> list[str]:
    """Argument names of a loop, in the order of the kernel's signature."""
    planes = [name for use in loop.planes for name in (use.name, use.slots) if name]
    return list(dict.fromkeys([*index_names(loop), *planes]))


class TransposedTiles(Executor):
    """The product of the tiles alone: x is h `[N, M]` in the order of tile rows, out `[N, K]` of the same dtype.

    It keeps indices, and asks for the planes at each call: what another executor has packed is unpacked for the call.
    """

    def __init__(self, module: Module, pools: Pools, on_missing: str) -> None:
        self._module, self._pools = module, pools
        self._emitted = emit_transposed(module, on_missing)
        self.source = self._emitted.source
        self._kernels: ModuleType = build.load(self._emitted.name, self.source)
        self._indices: dict[str, Tensor] = {}
        transposed = columns_of(module)
        self._add("order", transposed.column_order)
        for loop in self._emitted.loops:
            csc = transposed.cscs[loop.index]
            for name, values in zip(index_names(loop), (csc.col_ptr, csc.row_idx, csc.tiles), strict=True):
                self._add(name, values)
            for use in loop.planes:
                if use.plane.kind is PlaneKind.GROUP and use.slots is not None:
                    self._add(use.slots, plane_slots(use.plane, *tile_coordinates(module.tiles, loop.segment)))

    def run(self, x: Tensor, out: Tensor, workspace: Tensor) -> None:
        self._indices = {name: index.to(x.device) for name, index in self._indices.items()}
        pools = self._pools.whole() if isinstance(self._pools, PlaneSource) else self._pools
        planes: dict[str, Tensor] = {}
        for loop in self._emitted.loops:
            planes |= self._planes(loop, pools)
        (rows, columns), batch = self._module.tiles.shape, x.shape[0]
        config = LaunchConfig.choose(batch, x.dtype, self._module.tiles.tile, dict(scheduled(self._module).launch))
        constants: dict[str, Any] = {
            "BN": config.block_n,
            "DOT": TRITON_DOTS[dot_dtype(x.dtype, scaled=False)],
            "PRECISION": dot_precision(x.dtype),
            **config.options(),
        }
        grid = (self._module.tiles.grid[1] * -(-batch // config.block_n),)
        self._kernels.transposed_kernel[grid](
            h=x, y=out, **self._indices, **planes, M=rows, K=columns, N=batch, **constants
        )

    @property
    def resident_bytes(self) -> int:
        return kept_bytes(self._indices.values(), ())

    @property
    def transient_bytes(self) -> int:
        return self._pools.unpacked_bytes if isinstance(self._pools, PlaneSource) else 0

    def _add(self, name: str, values: object) -> None:
        self._indices[name] = torch.as_tensor(values, dtype=torch.int32)

    def _planes(self, loop: FormatLoop, pools: Pools) -> dict[str, Tensor]:
        """The planes of a loop, and offsets of those that are ragged, by argument name."""
        program = self._module.tiles
        if loop.dense:
            planes = tile_planes(program, loop.segment, pools)
            dense = program.segments[loop.segment].resolve().decode(planes, program.tile, program.dtype)
            return {loop.planes[0].name: aligned(dense)}
        found = {}
        for use in loop.planes:
            pool = pool_name(loop.segment, use.plane.name)
            found[use.name] = aligned(pools[pool])
            if use.plane.kind is PlaneKind.RAGGED and use.slots is not None:
                found[use.slots] = aligned(pools[f"{pool}_ptr"])
        return found


def columns_of(module: Module) -> Transposed:
    """The module's transposed schedule, or CodegenError."""
    transposed = scheduled(module).transposed
    if transposed is None:
        raise CodegenError(
            f"module {module.tiles.name}: expected a transposed schedule, found none; run a pipeline that has build-csc"
        )
    return transposed
