"""Scheduled module -> text of one Gluon module: the same text for the same class of kernel.

The kernel has one program per work item and batch block, as the portable dialect's. Its tiles come through a ring in
shared memory: a copy that knows nothing of formats fetches blob after blob with `cp.async`, several tiles
ahead, while one loop per format consumes them; slots go on turning where one loop ends and the next
begins. Without split-K and low rank the epilogue ends that kernel; with either, parts go to a workspace and the
portable dialect's `reduce_kernel`, plain Triton, adds them in order and ends the work.

A class is what the text depends on: that of the portable dialect, and the warps of a program.
"""

import hashlib
import textwrap
from dataclasses import dataclass

from stoicc.codegen.gluon import fragments, warpgroup
from stoicc.codegen.gluon.blobs import SIZE_BITS, GluonLoop
from stoicc.codegen.gluon.consumers import loop_lines, start_sums
from stoicc.codegen.gluon.epilogue import epilogue_lines, parts_lines
from stoicc.codegen.gluon.prologue import input_functions, start_inputs
from stoicc.codegen.gluon.register_order import CHUNK
from stoicc.codegen.gluon.ring import ahead, copied, next_tile, start_copy
from stoicc.codegen.gluon.shape import ITEM_HEAD, LANES, Shape
from stoicc.codegen.triton import sources
from stoicc.codegen.triton.emit import epilogue_arguments, prologue_arguments, reduce_kernel
from stoicc.codegen.triton.loops import scheduled
from stoicc.codegen.triton.text import kernel
from stoicc.ir.types import Module


@dataclass(frozen=True)
class EmittedGluon:
    """The text of a kernel class and what a launcher has to know about it.

    Attributes:
        name: a readable name with a hash of the text; names the cache file.
        split: parts go to the workspace, and `reduce_kernel` ends the work: split-K, or a low-rank product to add.
        epilogue: argument names of y's side that occur.
        warps: of a program of `tiles_kernel`.
        slot_bytes: shared memory that a tile takes in the ring.
    """

    source: str
    name: str
    split: bool
    loops: tuple[GluonLoop, ...]
    epilogue: tuple[str, ...]
    warps: int
    slot_bytes: int


def emit(
    module: Module, loops: tuple[GluonLoop, ...], warps: int, wgmma: bool = False, prologue: bool = False
) -> EmittedGluon:
    """The kernels of one module for programs of this many warps (BM / 16, or half of it where BM is 128).

    With `prologue` x is scaled and permuted in them, without it has been.
    """
    epilogue = epilogue_arguments(module.tiles.beside)
    split = scheduled(module).max_parts > 1 or "low_rank_left" in epilogue
    shape = Shape.of(module, loops, warps, wgmma, prologue_arguments(module.tiles.beside) if prologue else ())
    inputs = input_functions(shape) if shape.prologue else []
    kernels = [start_copy(shape), next_tile(shape), *inputs, _tiles_kernel(module, shape, epilogue, split)]
    if split:
        kernels.append(reduce_kernel(module, epilogue))
    decodes = [loop.fragment.decode for loop in loops if loop.fragment.decode is not None]
    imports, functions = sources.inline([*_functions_used(shape), *decodes])
    head = [
        f'"""{_about(module, shape, split)}\n\nEmitted by stoicc; edit the schedule or the format, not this file.\n"""'
    ]
    head += ["", *(["import triton", "import triton.language as tl"] if split else [])]
    head += ["from triton.experimental import gluon", "from triton.experimental.gluon import language as gl"]
    head += ["from triton.experimental.gluon.language.nvidia.ampere import async_copy", "", *imports]
    head += ["from stoicc.codegen.gluon.compat import barrier, copy_async"]
    text = "\n".join(head) + "\n\n\n" + "\n\n\n".join([*functions, *kernels]) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    tile = module.tiles.tile
    how = f"w{warps}" + ("_wgmma" if wgmma else "") + ("_x" if shape.prologue else "")
    names = [*dict.fromkeys(loop.name for loop in loops), f"{tile[0]}x{tile[1]}", module.tiles.dtype, how]
    return EmittedGluon(text, f"g_{'_'.join(names)}_{digest}", split, loops, epilogue, warps, shape.slot_words * 4)


LAG = "LAG: gl.constexpr = 2 if STAGES > 2 else 1  # slots behind which copies are: a product may be on its way"


# ---- the kernel -----------------------------------------------------------------------------


def _tiles_kernel(module: Module, shape: Shape, epilogue: tuple[str, ...], split: bool) -> str:
    rows, mtiles, warps = shape.tile[0], shape.mtiles, shape.warps
    lines = [
        '"""One program: a work item times BN rows of the batch; sums are [m-tile, n-tile, warp, lane, register]."""',
        *([LAG] if shape.wgmma else []),
        "RN: gl.constexpr = BN // 8",
        f"L: gl.constexpr = sums_layout({mtiles}, RN, {warps})",
        "batch_blocks = gl.cdiv(N, BN)",
        f"item = items + (gl.program_id(0) // batch_blocks) * {ITEM_HEAD + len(shape.loops)}",
        "first_n = (gl.program_id(0) % batch_blocks) * BN",
        "t = gl.load(item + 2)",
        "end = gl.load(item + 3)",
        f"weights = tiles + gl.load(item + 4).to(gl.int64) * {CHUNK}",
        "",
        "# past the batch, its last row is read again",
        *(start_inputs(shape) if shape.prologue else _start_rows(shape)),
        f"ring = gl.allocate_shared_memory(gl.int32, [STAGES, {shape.slot_words}], "
        "gl.SwizzledSharedLayout(1, 1, 1, order=[0]))",
        *([] if shape.prologue else [_slots_of_blocks(shape)]),
        "descriptor = gl.load(descriptors + t)",
        f"for ahead in gl.static_range({ahead(shape)}):",
        "    if t + ahead < end:",
        f"        start_copy({copied(shape, '(t + ahead) & (STAGES - 1)')})",
        "    async_copy.commit_group()",
        f"    weights += (descriptor & {(1 << SIZE_BITS) - 1}) * {CHUNK}",
        "    descriptor = gl.load(descriptors + (t + ahead + 1))",
        f"acc = {start_sums(shape)}",
    ]
    for number, loop in enumerate(shape.loops):
        lines += ["", *loop_lines(shape, loop, number)]
    done = ["barrier()  # no warp's product reads x any more"] if shape.wgmma else []
    lines += ["", "async_copy.wait_group(0)", *done, *_ordered(shape)]
    if split:
        lines += parts_lines(rows)
        arguments = ["x", "parts", "items", "descriptors", "tiles", *shape.prologue]
    else:
        lines += ["row = gl.load(item)", *epilogue_lines(module, epilogue)]
        arguments = ["x", "y", "items", "descriptors", "tiles", *shape.prologue, *epilogue]
    sizes = ["K", "N"] if split else ["M", "K", "N"]
    return kernel("tiles_kernel", [*arguments, *sizes, "BN: gl.constexpr", "STAGES: gl.constexpr"], lines, "gluon.jit")


def _start_rows(shape: Shape) -> list[str]:
    """Pointers to x's rows, which are copied as they are."""
    return [
        f"X: gl.constexpr = gl.BlockedLayout([1, {CHUNK}], [{LANES // 8}, 8], [{shape.warps}, 1], [1, 0])",
        "n = gl.minimum(first_n + gl.arange(0, BN, gl.SliceLayout(1, X)), N - 1)",
        f"x_words = gl.arange(0, {shape.words}, gl.SliceLayout(0, X))",
        f"x_rows = x + (n.to(gl.int64) * (K // 8) * {CHUNK})[:, None] + x_words[None, :]",
    ]


def _slots_of_blocks(shape: Shape) -> str:
    """Slots for blocks of x that are copied."""
    layout = "block_layout()" if shape.wgmma else f"gl.SwizzledSharedLayout({CHUNK}, 1, 8, order=[1, 0])"
    return f"blocks = gl.allocate_shared_memory(gl.int32, [STAGES, BN, {shape.words}], {layout})"


def _ordered(shape: Shape) -> list[str]:
    """Sums from registers to `[BM, BN]` in a layout whose rows are neighbours in y."""
    rows = shape.tile[0]
    return [
        "# (m-tile, n-tile, warp, g, t, upper half, element) -> (m-tile, warp, upper half, g), (n-tile, t, element)",
        f"acc = acc.reshape([{shape.mtiles}, RN, {shape.warps}, 8, 4, 2, 2]).permute([0, 2, 5, 3, 1, 4, 6])",
        f"Y: gl.constexpr = gl.BlockedLayout([{rows // 16}, 1], [16, 2], [1, {shape.warps}], [0, 1])",
        f"acc = gl.convert_layout(acc.reshape([{rows}, BN]), Y)",
        "n = first_n + gl.arange(0, BN, gl.SliceLayout(0, Y))",
    ]


# ---- text -----------------------------------------------------------------------------------


def _functions_used(shape: Shape) -> list[object]:
    """Device functions of the dialect that the text calls; their helpers come with them."""
    dense, sparse = fragments.multiply, fragments.multiply_sparse
    used: list[object] = [fragments.sums_layout, fragments.load_columns]
    if shape.wgmma:
        dense, sparse = warpgroup.multiply_group, warpgroup.multiply_group_sparse
        names = ("block_layout", "await_copies", "start_sums", "await_products")
        used = [fragments.sums_layout, *(getattr(warpgroup, name) for name in names)]
    used += [fragments.take_halves] if "column_permutation" in shape.prologue else []
    used += [fragments.scale_halves] if "input_scale" in shape.prologue else []
    for loop in shape.loops:
        fragment = loop.fragment
        used.append(sparse if fragment.sparse else dense)
        if fragment.sparse:
            used += [warpgroup.load_positions, warpgroup.own_registers] if shape.wgmma else [fragments.load_words]
        if fragment.decode is None:
            used.append(fragments.load_vectors)
        else:
            used.append(fragments.four_words if loop.blob.width == 4 else fragments.two_words)
        if fragment.groups:
            used.append(fragments.load_scales)
        if fragment.zero_points:
            used += [fragments.load_pairs, fragments.less_zeros]
    return list(dict.fromkeys(used))


def _about(module: Module, shape: Shape, split: bool) -> str:
    formats = ", ".join(loop.text for loop in shape.loops) or "nothing"
    tile = module.tiles.tile
    about = f"y = W x for W in tiles of {formats}: {tile[0]}x{tile[1]} tiles, {module.tiles.dtype} weights and x."
    lines = textwrap.wrap(about, 100)
    lines.append("On NVIDIA tensor cores through Gluon; tiles are blobs in register order.")
    if shape.prologue:
        lines.append("x is scaled or permuted on its way to shared memory.")
    if shape.wgmma:
        lines.append("Products are wgmma, of warpgroups on Hopper: never on silicon.")
    if split:
        lines.append("tiles_kernel leaves fp32 parts in a workspace, reduce_kernel adds them in order.")
    lines += ["", "Launch: tiles_kernel with len(items) * cdiv(N, BN) programs" + ("," if split else ".")]
    if split:
        lines[-1] += " then reduce_kernel with (tile rows) * cdiv(N, BN)."
    widths = "64 to 256" if shape.wgmma else "8 to 128"
    lines.append(f"num_warps: {shape.warps}. BN: a power of two from {widths}. STAGES: 2, 4 or 8 slots of the ring.")
    for module_of in (fragments, *([warpgroup] if shape.wgmma else [])):
        lines += ["", str(module_of.__doc__).split("\n\n", 1)[1].rstrip()]
    return "\n".join(lines)
