"""Scheduled module -> text of one Triton module: the same text for the same class of kernel.

A class is what the text depends on: formats present, tile, weight dtype, what stands beside the
tiles, whether K has a tail and whether rows are split. Shapes, pools and batch are arguments.

The emitted kernel has one program per work item and batch block, and one loop per format: BN rows of
x are the M operand of `tl.dot`, the weight tile, transposed, the N operand; sums are `[BN, BM]`. (The
other way round Hopper takes `wgmma` with decoded operands in registers, each of which is moved once
more.) Without split-K the epilogue ends that kernel; with it, parts go to a workspace in fp32 and a
second kernel adds them in order, so that a result never depends on the order in which programs run.
"""

import hashlib
import textwrap
from dataclasses import dataclass
from typing import Any

from stoicc.codegen.triton import sources
from stoicc.codegen.triton.loops import FormatLoop, loop_arguments, loops_of, scheduled
from stoicc.codegen.triton.text import function, kernel, wrap
from stoicc.ir.format import PlaneKind
from stoicc.ir.types import Beside, Module

TRITON_DTYPES = {
    "f32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16", "u8": "tl.uint8", "i8": "tl.int8",
    "i16": "tl.int16", "i32": "tl.int32", "i64": "tl.int64",
}  # fmt: skip

ACTIVATIONS = {
    "relu": "tl.where(acc < 0, 0.0, acc)  # keeps NaN, as torch does",
    "gelu": "0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))",
    "gelu_tanh": "acc * tl.sigmoid(1.5957691216057308 * (acc + 0.044715 * acc * acc * acc))",
    "silu": "acc * tl.sigmoid(acc)",
}

TABLES = ("row_permutation", "output_scale", "low_rank_left", "low_rank_product", "bias")
"""Arguments that the epilogue may read, in the order of the kernel's signature."""


@dataclass(frozen=True)
class Emitted:
    """The text of a kernel class and what a launcher has to know about it.

    Attributes:
        name: a readable name with a hash of the text; names the cache file.
        split: parts go to the workspace, and `reduce_kernel` ends the work.
        prologue, epilogue: argument names of x's side and of y's side that occur.
    """

    source: str
    name: str
    split: bool
    loops: tuple[FormatLoop, ...]
    prologue: tuple[str, ...]
    epilogue: tuple[str, ...]


def emit_tiles(module: Module, on_missing: str = "dense") -> Emitted:
    """The kernels of the `tiles` executor (see the module docstring)."""
    loops = loops_of(module, on_missing)
    prologue, epilogue = prologue_arguments(module.tiles.beside), epilogue_arguments(module.tiles.beside)
    split = scheduled(module).max_parts > 1
    kernels = [_tiles_kernel(module, loops, prologue, epilogue, split)]
    if split:
        kernels.append(reduce_kernel(module, epilogue))
    text = assemble(module, loops, [_load_x(module, prologue), _ADD_PRODUCT, *kernels], _about(module, loops, split))
    return Emitted(text, class_name(module, loops, text), split, loops, prologue, epilogue)


def emit_decode(module: Module, on_missing: str = "dense") -> Emitted:
    """One decode kernel per format, `decode_<prefix>_kernel`: tiles to a dense panel of tile rows."""
    loops = loops_of(module, on_missing)
    about = f"Writes tiles of {formats_of(loops)} ({shape_of(module)}) to a panel of dense rows, one program a tile."
    about = "\n".join(textwrap.wrap(about, 100))
    text = assemble(module, loops, [_decode_kernel(module, loop) for loop in loops], about)
    return Emitted(text, f"{class_name(module, loops, text)}_dense", False, loops, (), ())


def prologue_arguments(beside: Beside) -> tuple[str, ...]:
    """What the load of x folds in, by argument name."""
    return tuple(n for n in ("column_permutation", "input_scale") if getattr(beside, n) is not None)


def epilogue_arguments(beside: Beside) -> tuple[str, ...]:
    """What the epilogue reads, by argument name."""
    there = {"low_rank_left": beside.low_rank, "low_rank_product": beside.low_rank}
    return tuple(n for n in TABLES if there.get(n, getattr(beside, n, None)) is not None)


def assemble(module: Module, loops: tuple[FormatLoop, ...], kernels: list[str], about: str) -> str:
    imports, functions = sources.inline(function for loop in loops for function in _functions(loop))
    head = [f'"""{about}\n\nEmitted by stoicc; edit the schedule or the format, not this file.\n"""', ""]
    lines = [*head, "import triton", "import triton.language as tl", *imports]
    return "\n".join(lines) + "\n\n\n" + "\n\n\n".join([*functions, *kernels]) + "\n"


def _about(module: Module, loops: tuple[FormatLoop, ...], split: bool) -> str:
    names = [*prologue_arguments(module.tiles.beside), *epilogue_arguments(module.tiles.beside)]
    beside = [n.removesuffix("_left") for n in names if n != "low_rank_product"]
    beside += [module.tiles.beside.activation] if module.tiles.beside.activation else []
    lines = textwrap.wrap(f"y = W x for W in tiles of {formats_of(loops)}: {shape_of(module)}.", 100)
    if beside:
        lines += textwrap.wrap(f"Beside the tiles: {', '.join(beside)}.", 100)
    if split:
        lines.append("Split-K: tiles_kernel leaves fp32 parts in a workspace, reduce_kernel adds them in order.")
    lines += ["", "Launch: tiles_kernel with len(items) * cdiv(N, BN) programs"]
    lines[-1] += ", then reduce_kernel with (tile rows) * cdiv(N, BN)." if split else "."
    scaled = "input_scale" in names and module.tiles.dtype == "f16"
    lines.append("BN: a power of two from 16 to 128. num_warps: 4 or 8.")
    lines.append(
        f"DOT: the dtype of x{', but tl.float32 for fp16, whose range the scaled x may leave' if scaled else ''}."
    )
    lines.append('PRECISION: "ieee" for x in fp32, else "tf32".')
    return "\n".join(lines)


def shape_of(module: Module) -> str:
    tile = module.tiles.tile
    return f"{tile[0]}x{tile[1]} tiles, {module.tiles.dtype} weights"


def formats_of(loops: tuple[FormatLoop, ...]) -> str:
    return ", ".join(loop.text for loop in loops) or "nothing"


def class_name(module: Module, loops: tuple[FormatLoop, ...], text: str) -> str:
    tile = module.tiles.tile
    readable = "_".join([*(loop.prefix for loop in loops), f"{tile[0]}x{tile[1]}", module.tiles.dtype])
    return f"k_{readable}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


# ---- the load of x --------------------------------------------------------------------------


def _load_x(module: Module, prologue: tuple[str, ...]) -> str:
    """Text of `load_x`: the `[BN, BK]` block of x that meets a tile column."""
    _, columns = module.tiles.tile
    tail = module.tiles.shape[1] % columns != 0
    lines = [f"k = column * {columns} + tl.arange(0, {columns})"]
    if tail:
        lines.append("real = k < K")
    guard = ", mask=real, other=0" if tail else ""
    if "column_permutation" in prologue:
        lines.append(f"k = tl.load(column_permutation + k{guard})")
    mask = "(n < N)[:, None] & real[None, :]" if tail else "(n < N)[:, None]"
    lines.append(f"block = tl.load(x + n.to(tl.int64)[:, None] * K + k[None, :], mask={mask}, other=0.0)")
    if "input_scale" in prologue:
        lines.append(f"scale = tl.load(input_scale + k{guard}).to(tl.float32)")
        lines.append("block = block * scale[None, :]")
    lines.append("return block.to(DOT)")
    arguments = ", ".join(["x", "column", "n", "N", "K", *prologue, "DOT: tl.constexpr"])
    past = "past the batch and past K" if tail else "past the batch"
    doc = f'"""Columns of x under one tile column, `[BN, {columns}]`; zeros {past}."""'
    return function("load_x", arguments, [doc, *lines])


_ADD_PRODUCT = function(
    "add_product",
    "w, block, acc, DOT: tl.constexpr, PRECISION: tl.constexpr",
    [
        '"""Sums `[BN, BM]` plus a block of x times a tile; fp32 operands keep fewer registers the other way round."""',
        "if DOT == tl.float32:",
        "    acc = tl.trans(tl.dot(w, tl.trans(block), tl.trans(acc), input_precision=PRECISION))",
        "else:",
        "    acc = tl.dot(block, tl.trans(w), acc, input_precision=PRECISION)",
        "return acc",
    ],
)

# ---- kernels --------------------------------------------------------------------------------

CONSTEXPRS = ["BN: tl.constexpr", "DOT: tl.constexpr", "PRECISION: tl.constexpr"]


def _tiles_kernel(
    module: Module, loops: tuple[FormatLoop, ...], prologue: tuple[str, ...], epilogue: tuple[str, ...], split: bool
) -> str:
    (rows, _), csrs = module.tiles.tile, len(scheduled(module).csrs)
    lines = [
        f'"""One program: a work item (row, slot, {csrs} x (first, count)) times BN rows of the batch."""',
        "blocks = tl.cdiv(N, BN)",
        f"item = items + (tl.program_id(0) // blocks) * {2 + 2 * csrs}",
        "n = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)",
        f"acc = tl.zeros((BN, {rows}), tl.float32)",
    ]
    for loop in loops:
        lines += ["", *_loop(module, loop, prologue)]
    if split:
        lines += ["", *_store_parts(rows)]
        arguments = ["x", "parts", "items", *prologue, *(n for loop in loops for n in loop_arguments(loop))]
    else:
        lines += ["", "row = tl.load(item)", *_epilogue(module, epilogue)]
        arguments = ["x", "y", "items", *prologue, *(n for loop in loops for n in loop_arguments(loop)), *epilogue]
    sizes = ["K", "N"] if split else ["M", "K", "N", *(["RANK"] if "low_rank_left" in epilogue else [])]
    return kernel("tiles_kernel", [*arguments, *sizes, *CONSTEXPRS], lines)


def _loop(module: Module, loop: FormatLoop, prologue: tuple[str, ...]) -> list[str]:
    """The loop of one format: pointers move to the item's first tile, then step tile by tile."""
    at = 2 + 2 * loop.index
    lines = [f"# {loop.text}", f"first = tl.load(item + {at}).to(tl.int64)", f"{loop.columns} += first"]
    lines += [line for name, step in _steps(loop) for line in [f"{name} += first{_times(step)}"]]
    body = [
        f"column = tl.load({loop.columns} + t)",
        *entry_lines(loop, "t"),
        *decode_call(module, loop, "t"),
        f"block = load_x({', '.join(['x', 'column', 'n', 'N', 'K', *prologue, 'DOT'])})",
        "acc = add_product(w.to(DOT), block, acc, DOT, PRECISION)",
    ]
    return [*lines, f"for t in range(tl.load(item + {at + 1})):", *(f"    {line}" for line in body)]


def _steps(loop: FormatLoop) -> list[tuple[str, int]]:
    """Pointers that advance by a fixed number of elements for each tile."""
    steps = [(use.name, use.plane.entry_elements) for use in loop.planes if use.plane.kind is PlaneKind.TILE]
    return steps + [(slots, 1) for slots in dict.fromkeys(use.slots for use in loop.planes if use.slots)]


def entry_lines(loop: FormatLoop, tile: str) -> list[str]:
    """Lines that find this tile's entry in planes that are shared or ragged."""
    lines = [
        f"{slots[: -len('_slots')]}_slot = tl.load({slots} + {tile}).to(tl.int64)"
        for slots in dict.fromkeys(u.slots for u in loop.planes if u.slots and u.plane.kind is PlaneKind.GROUP)
    ]
    for use in loop.planes:
        if use.plane.kind is PlaneKind.RAGGED:
            lines.append(f"{use.name}_begin = tl.load({use.slots} + {tile}).to(tl.int64)")
            lines.append(f"{use.name}_count = (tl.load({use.slots} + {tile} + 1) - {use.name}_begin).to(tl.int32)")
    return lines


def decode_call(module: Module, loop: FormatLoop, tile: str) -> list[str]:
    """Lines of `w = decode(...)` for one tile."""
    arguments = []
    for use in loop.planes:
        elements = use.plane.entry_elements
        if use.plane.kind is PlaneKind.TILE:
            arguments.append(f"{use.name} + {tile}{_times(elements)}")
        elif use.plane.kind is PlaneKind.GROUP and use.slots is not None:
            arguments.append(f"{use.name} + {use.slots[: -len('_slots')]}_slot{_times(elements)}")
        elif use.plane.kind is PlaneKind.RAGGED:
            arguments += [f"{use.name} + {use.name}_begin", f"{use.name}_count"]
        else:
            arguments.append(use.name)
    rows, columns = module.tiles.tile
    constants = [f"{name}={_constant(value)}" for name, value in loop.decode.constants.items()]
    arguments += [str(rows), str(columns), TRITON_DTYPES[module.tiles.dtype], *constants]
    name = loop.decode.function.fn.__name__
    line = f"w = {name}({', '.join(arguments)})"
    if len(line) <= 100:
        return [line]
    return [f"w = {name}(", *(f"    {part}" for part in wrap(arguments, 96)), ")"]


def _functions(loop: FormatLoop) -> list[Any]:
    """A decode, after those that are passed to it."""
    return [value for value in loop.decode.constants.values() if hasattr(value, "fn")] + [loop.decode.function]


def _constant(value: Any) -> str:
    return str(value.fn.__name__) if hasattr(value, "fn") else repr(value)


def _store_parts(rows: int) -> list[str]:
    return [
        "slot = tl.load(item + 1).to(tl.int64)",
        f"part = parts + (slot * N + n)[:, None] * {rows} + tl.arange(0, {rows})[None, :]",
        "tl.store(part, acc, mask=(n < N)[:, None])",
    ]


def reduce_kernel(module: Module, epilogue: tuple[str, ...]) -> str:
    """Text of the kernel that adds split-K parts `[slot, N, BM]` and ends the work."""
    rows, _ = module.tiles.tile
    lines = [
        '"""One program: one tile row times BN rows of the batch; adds the row\'s parts in order."""',
        "blocks = tl.cdiv(N, BN)",
        "row = tl.program_id(0) // blocks",
        "n = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)",
        f"acc = tl.zeros((BN, {rows}), tl.float32)",
        "slot = tl.load(row_slots + row).to(tl.int64)",
        f"parts += (slot * N + n)[:, None] * {rows} + tl.arange(0, {rows})[None, :]",
        "for _ in range(tl.load(row_slots + row + 1) - tl.load(row_slots + row)):",
        "    acc += tl.load(parts, mask=(n < N)[:, None], other=0.0)",
        f"    parts += N.to(tl.int64) * {rows}",
        "",
        *_epilogue(module, epilogue),
    ]
    sizes = ["M", "N", *(["RANK"] if "low_rank_left" in epilogue else [])]
    return kernel("reduce_kernel", ["parts", "y", "row_slots", *epilogue, *sizes, *CONSTEXPRS], lines)


def _epilogue(module: Module, epilogue: tuple[str, ...]) -> list[str]:
    """From `acc` and `row` to y: scale, low rank, bias, activation, permutation, cast."""
    rows, _ = module.tiles.tile
    lines = [f"m = row * {rows} + tl.arange(0, {rows})", "there = m < M"]
    if "row_permutation" in epilogue:
        lines.append("m = tl.load(row_permutation + m, mask=there, other=0)")
    if "output_scale" in epilogue:
        lines.append("acc *= tl.load(output_scale + m, mask=there, other=0.0).to(tl.float32)[None, :]")
    if "low_rank_left" in epilogue:
        lines += _low_rank()
    if "bias" in epilogue:
        lines.append("acc += tl.load(bias + m, mask=there, other=0.0).to(tl.float32)[None, :]")
    if module.tiles.beside.activation is not None:
        lines.append(f"acc = {ACTIVATIONS[module.tiles.beside.activation]}")
    return [
        *lines,
        "y += n.to(tl.int64)[:, None] * M + m[None, :]",
        "tl.store(y, acc.to(y.dtype.element_ty), mask=(n < N)[:, None] & there[None, :])",
    ]


def _low_rank() -> list[str]:
    return [
        "for start in range(0, RANK, 16):",
        "    r = start + tl.arange(0, 16)",
        "    left = tl.load(",
        "        low_rank_left + m.to(tl.int64)[None, :] * RANK + r[:, None],",
        "        mask=there[None, :] & (r < RANK)[:, None],",
        "        other=0.0,",
        "    )",
        "    product = tl.load(",
        "        low_rank_product + n.to(tl.int64)[:, None] * RANK + r[None, :],",
        "        mask=(n < N)[:, None] & (r < RANK)[None, :],",
        "        other=0.0,",
        "    )",
        "    acc = tl.dot(product, left.to(tl.float32), acc, input_precision=PRECISION)",
    ]


def _decode_kernel(module: Module, loop: FormatLoop) -> str:
    rows, columns = module.tiles.tile
    lines = [
        '"""One program: tile `first + program`, to a panel `[M, K]` whose first tile row is `top`."""',
        f"# {loop.text}",
        "t = first + tl.program_id(0).to(tl.int64)",
        f"m = (tl.load(rows + t) - top) * {rows} + tl.arange(0, {rows})",
        f"k = tl.load({loop.columns} + t) * {columns} + tl.arange(0, {columns})",
        *entry_lines(loop, "t"),
        *decode_call(module, loop, "t"),
        "there = (m < M)[:, None] & (k < K)[None, :]",
        "tl.store(panel + m.to(tl.int64)[:, None] * K + k[None, :], w.to(panel.dtype.element_ty), mask=there)",
    ]
    arguments = ["panel", "rows", *loop_arguments(loop), "first", "top", "M", "K"]
    return kernel(f"decode_{loop.prefix}_kernel", arguments, lines)


def _times(elements: int) -> str:
    return "" if elements == 1 else f" * {elements}"
