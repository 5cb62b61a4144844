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

from stoicc.codegen.gluon import fragments
from stoicc.codegen.gluon.blobs import SIZE_BITS, GluonLoop
from stoicc.codegen.gluon.epilogue import epilogue_lines, parts_lines
from stoicc.codegen.gluon.launch import slot_words
from stoicc.codegen.gluon.register_order import CHUNK, STEP
from stoicc.codegen.triton import sources
from stoicc.codegen.triton.emit import epilogue_arguments, reduce_kernel
from stoicc.codegen.triton.loops import scheduled
from stoicc.codegen.triton.text import function, kernel
from stoicc.ir.types import Module

LANES = 32
ITEM_HEAD = 5
"""Columns of an item before its tile counts (`blobs.Buffers.items`)."""


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


def emit(module: Module, loops: tuple[GluonLoop, ...], warps: int) -> EmittedGluon:
    """The kernels of one module for programs of this many warps (BM / 16, or half of it where BM is 128)."""
    epilogue = epilogue_arguments(module.tiles.beside)
    split = scheduled(module).max_parts > 1 or "low_rank_left" in epilogue
    shape = _Shape.of(module, loops, warps)
    kernels = [_start_copy(shape), _next_tile(), _tiles_kernel(module, shape, epilogue, split)]
    if split:
        kernels.append(reduce_kernel(module, epilogue))
    decodes = [loop.fragment.decode for loop in loops if loop.fragment.decode is not None]
    imports, functions = sources.inline([*_functions_used(loops), *decodes])
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
    names = [*dict.fromkeys(loop.name for loop in loops), f"{tile[0]}x{tile[1]}", module.tiles.dtype, f"w{warps}"]
    return EmittedGluon(text, f"g_{'_'.join(names)}_{digest}", split, loops, epilogue, warps, shape.slot_words * 4)


@dataclass(frozen=True)
class _Shape:
    """Numbers of a class that the text is made of.

    Attributes:
        mtiles: m-tiles of 16 rows that a warp multiplies.
        words: of x's block that a tile meets, along K.
        copies: rounds in which all threads copy 16 bytes each, for the largest blob.
        tail: K is no multiple of BK.
    """

    tile: tuple[int, int]
    dtype: str
    warps: int
    mtiles: int
    words: int
    loops: tuple[GluonLoop, ...]
    copies: int
    tail: bool

    @staticmethod
    def of(module: Module, loops: tuple[GluonLoop, ...], warps: int) -> "_Shape":
        (rows, columns), threads = module.tiles.tile, warps * LANES
        copies = max((-(-loop.blob.chunks // threads) for loop in loops), default=1)
        tail = module.tiles.shape[1] % columns != 0
        return _Shape(
            (rows, columns), module.tiles.dtype, warps, rows // (16 * warps), columns // 2, loops, copies, tail
        )

    @property
    def threads(self) -> int:
        return self.warps * LANES

    @property
    def slot_words(self) -> int:
        return slot_words(self.loops, self.warps)


# ---- the ring -------------------------------------------------------------------------------


def _start_copy(shape: _Shape) -> str:
    """Text of `start_copy`: rounds of 16 bytes a thread, those that no format present has left out."""
    round_words, sizes = shape.threads * CHUNK, sorted({loop.blob.chunks for loop in shape.loops})
    block = "x_rows + column * " + str(shape.words)
    lines = [
        '"""Start copying a tile and its columns of x to a slot of the rings."""',
        f"column = descriptor >> {SIZE_BITS}",
    ]
    if shape.tail:
        lines.append(f"there = (column * {shape.words} + x_words < K // 8 * {CHUNK})[None, :]")
        lines.append(f"copy_async(blocks.index(slot), {block}, mask=there)")
    else:
        lines.append(f"copy_async(blocks.index(slot), {block})")
    lines += [
        "tile = ring.index(slot)",
        f"chunk = gl.arange(0, {round_words}, gl.BlockedLayout([{CHUNK}], [{LANES}], [{shape.warps}], [0]))",
        f"chunks = descriptor & {(1 << SIZE_BITS) - 1}",
    ]
    least = 0
    for number in range(shape.copies):
        begin, end = number * shape.threads, (number + 1) * shape.threads
        skipped = [size for size in sizes if size <= begin]
        if skipped and skipped[-1] > least:
            least = skipped[-1]
            lines.append(f"if chunks > {least}:  # the same in all threads")
        partial = any(begin < size < end for size in sizes)
        mask = f", mask=chunk < chunks * {CHUNK} - {number * round_words}" if partial else ""
        source = f"weights + (chunk + {number * round_words})" if number else "weights + chunk"
        line = f"copy_async(tile.slice({number * round_words}, {round_words}), {source}{mask})"
        lines.append(f"    {line}" if least else line)
    arguments = ["ring", "blocks", "slot", "weights", "x_rows", "x_words", "descriptor", "K"]
    return function("start_copy", ", ".join(arguments), lines, "gluon.jit")


def _next_tile() -> str:
    """Text of `next_tile`: wait for tile t, start the copy of the one STAGES - 1 further on."""
    lines = [
        '"""Wait for tile t and start copying the one STAGES - 1 after it; the descriptor and place of the next."""',
        "async_copy.wait_group(STAGES - 2)",
        "barrier()  # tile t is there for all warps, and all are done with tile t - 1, whose slot is free",
        "ahead = t + (STAGES - 1)",
        "if ahead < end:  # a short row does not fetch past its end",
        "    start_copy(ring, blocks, ahead & (STAGES - 1), weights, x_rows, x_words, descriptor, K)",
        "async_copy.commit_group()",
        f"weights += (descriptor & {(1 << SIZE_BITS) - 1}) * {CHUNK}",
        "return gl.load(descriptors + ahead + 1), weights",
    ]
    arguments = ["ring", "blocks", "t", "end", "weights", "x_rows", "x_words", "descriptors", "descriptor", "K"]
    return function("next_tile", ", ".join([*arguments, "STAGES: gl.constexpr"]), lines, "gluon.jit")


# ---- the kernel -----------------------------------------------------------------------------


def _tiles_kernel(module: Module, shape: _Shape, epilogue: tuple[str, ...], split: bool) -> str:
    rows, mtiles, warps, words = shape.tile[0], shape.mtiles, shape.warps, shape.words
    lines = [
        '"""One program: a work item times BN rows of the batch; sums are [m-tile, n-tile, warp, lane, register]."""',
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
        f"X: gl.constexpr = gl.BlockedLayout([1, {CHUNK}], [{LANES // 8}, 8], [{warps}, 1], [1, 0])",
        "n = gl.minimum(first_n + gl.arange(0, BN, gl.SliceLayout(1, X)), N - 1)",
        f"x_words = gl.arange(0, {words}, gl.SliceLayout(0, X))",
        f"x_rows = x + (n.to(gl.int64) * (K // 8) * {CHUNK})[:, None] + x_words[None, :]",
        f"ring = gl.allocate_shared_memory(gl.int32, [STAGES, {shape.slot_words}], "
        "gl.SwizzledSharedLayout(1, 1, 1, order=[0]))",
        f"blocks = gl.allocate_shared_memory(gl.int32, [STAGES, BN, {words}], "
        f"gl.SwizzledSharedLayout({CHUNK}, 1, 8, order=[1, 0]))",
        "descriptor = gl.load(descriptors + t)",
        "for ahead in gl.static_range(STAGES - 1):",
        "    if t + ahead < end:",
        "        start_copy(ring, blocks, (t + ahead) & (STAGES - 1), weights, x_rows, x_words, descriptor, K)",
        "    async_copy.commit_group()",
        f"    weights += (descriptor & {(1 << SIZE_BITS) - 1}) * {CHUNK}",
        "    descriptor = gl.load(descriptors + (t + ahead + 1))",
        f"acc = gl.zeros([{mtiles}, RN, {warps}, 32, 4], gl.float32, L)",
    ]
    for number, loop in enumerate(shape.loops):
        lines += ["", *_loop(shape, loop, number)]
    lines += ["", "async_copy.wait_group(0)", *_ordered(shape)]
    if split:
        lines += parts_lines(rows)
        arguments = ["x", "parts", "items", "descriptors", "tiles"]
    else:
        lines += ["row = gl.load(item)", *epilogue_lines(module, epilogue)]
        arguments = ["x", "y", "items", "descriptors", "tiles", *epilogue]
    sizes = ["K", "N"] if split else ["M", "K", "N"]
    return kernel("tiles_kernel", [*arguments, *sizes, "BN: gl.constexpr", "STAGES: gl.constexpr"], lines, "gluon.jit")


def _loop(shape: _Shape, loop: GluonLoop, number: int) -> list[str]:
    """The consumer loop of one format."""
    kind = "2:4 operands" if loop.fragment.sparse else "dense operands"
    stored = f"codes of {loop.fragment.bits} bits, " if loop.fragment.decode is not None else ""
    scaled = ", sums scaled by row in fp32" if loop.fragment.groups else ""
    lines = [
        "descriptor, weights = next_tile(",
        "    ring, blocks, t, end, weights, x_rows, x_words, descriptors, descriptor, K, STAGES",
        ")",
        "tile = ring.index(t & (STAGES - 1))",
        "block = blocks.index(t & (STAGES - 1))",
        *_products(shape, loop),
        "t += 1",
    ]
    head = [f"# {loop.text}: {stored}{kind}{scaled}", f"for _ in range(gl.load(item + {ITEM_HEAD + number})):"]
    return [*head, *(f"    {line}" for line in lines)]


def _products(shape: _Shape, loop: GluonLoop) -> list[str]:
    """One tile times its columns of x: operands of 64 columns, then two steps of 32."""
    fragment, lines, opened = loop.fragment, [], False
    width = shape.tile[1] // fragment.groups if fragment.groups else 0  # columns that share a scale
    for step in range(shape.tile[1] // STEP):
        words, operands = _operands(shape, loop, step)
        lines += words
        for half in range(2):
            column = step * STEP + half * STEP // 2
            if width and not opened:
                lines.append(f"sums = gl.zeros([{shape.mtiles}, RN, {shape.warps}, 32, 4], gl.float32, L)")
                opened = True
            into = "sums" if width else "acc"
            lines.append(f"b = load_columns(block, {column // 32}, L, RN, {shape.warps})")
            if fragment.sparse:
                lines.append(f"a = {operands[half]}")
                call = f"multiply_sparse(a, b, positions, {into}, {half}, {_quoted(shape)})"
            else:
                lines += [f"a0 = {operands[2 * half]}", f"a1 = {operands[2 * half + 1]}"]
                call = f"multiply(a0, a1, b, {into}, {_quoted(shape)})"
            lines.append(f"{into} = {call}")
            if width and (column + STEP // 2) % width == 0:
                lines.append(
                    f"acc += sums * {_row_words('load_scales', shape, loop, loop.blob.scales, column // width)}"
                )
                opened = False
    return lines


def _operands(shape: _Shape, loop: GluonLoop, step: int) -> tuple[list[str], list[str]]:
    """Lines that load what 64 columns need, and an expression for each fragment."""
    blob, fragment = loop.blob, loop.fragment
    common = f"L, {shape.mtiles}, {shape.warps}"
    vector_words = blob.mtiles * LANES * blob.width
    at = [(step * blob.vectors + vector) * vector_words for vector in range(blob.vectors)]
    lines = []
    if fragment.sparse:
        lines.append(f"positions = load_words(tile, {blob.positions + step * blob.mtiles * LANES}, {common})")
    if fragment.decode is None:
        return lines, [f"load_vectors(tile, {begin}, {common})" for begin in at]
    names = [f"word{index}" for index in range(blob.vectors * blob.width)]
    loader = "four_words" if blob.width == 4 else "two_words"
    for vector, begin in enumerate(at):
        loaded = names[vector * blob.width : (vector + 1) * blob.width]
        lines.append(f"{', '.join(loaded)} = {loader}(tile, {begin}, {common})")
    if fragment.zero_points:
        lines += _zeros(shape, loop, step)
    each = fragment.bits // 4
    given = [_quoted(shape), *(f"{name}={value!r}" for name, value in fragment.constants)]
    calls = []
    for begin in range(0, len(names), each):
        call = f"{fragment.decode.fn.__name__}({', '.join([*names[begin : begin + each], *given])})"
        column = step * STEP + begin // each * (32 if fragment.sparse else 16)
        calls.append(_less_zeros(shape, loop, call, column) if fragment.zero_points else call)
    return lines, calls


def _zeros(shape: _Shape, loop: GluonLoop, step: int) -> list[str]:
    """Zero points of the groups that meet these 64 columns."""
    width = shape.tile[1] // loop.fragment.groups
    groups = dict.fromkeys(column // width for column in (step * STEP, step * STEP + STEP // 2))
    return [f"zeros{group} = {_row_words('load_pairs', shape, loop, loop.blob.zeros, group)}" for group in groups]


def _less_zeros(shape: _Shape, loop: GluonLoop, call: str, column: int) -> str:
    group = column // (shape.tile[1] // loop.fragment.groups)
    return f"less_zeros({call}, zeros{group}, {_quoted(shape)})"


def _row_words(loader: str, shape: _Shape, loop: GluonLoop, section: int, group: int) -> str:
    dtype = f"{_quoted(shape)}, " if loader == "load_scales" else ""
    return f"{loader}(tile, {section + group * loop.blob.mtiles * 8}, {dtype}L, {shape.mtiles}, {shape.warps})"


def _ordered(shape: _Shape) -> list[str]:
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


def _functions_used(loops: tuple[GluonLoop, ...]) -> list[object]:
    """Device functions of `fragments` that the loops call; their helpers come with them."""
    used: list[object] = [fragments.sums_layout, fragments.load_columns]
    for loop in loops:
        fragment = loop.fragment
        used.append(fragments.multiply_sparse if fragment.sparse else fragments.multiply)
        if fragment.sparse:
            used.append(fragments.load_words)
        if fragment.decode is None:
            used.append(fragments.load_vectors)
        else:
            used.append(fragments.four_words if loop.blob.width == 4 else fragments.two_words)
        if fragment.groups:
            used.append(fragments.load_scales)
        if fragment.zero_points:
            used += [fragments.load_pairs, fragments.less_zeros]
    return list(dict.fromkeys(used))


def _about(module: Module, shape: _Shape, split: bool) -> str:
    formats = ", ".join(loop.text for loop in shape.loops) or "nothing"
    tile = module.tiles.tile
    about = f"y = W x for W in tiles of {formats}: {tile[0]}x{tile[1]} tiles, {module.tiles.dtype} weights and x."
    lines = textwrap.wrap(about, 100)
    lines.append("On NVIDIA tensor cores through Gluon; tiles are blobs in register order.")
    if split:
        lines.append("tiles_kernel leaves fp32 parts in a workspace, reduce_kernel adds them in order.")
    lines += ["", "Launch: tiles_kernel with len(items) * cdiv(N, BN) programs" + ("," if split else ".")]
    if split:
        lines[-1] += " then reduce_kernel with (tile rows) * cdiv(N, BN)."
    lines.append(f"num_warps: {shape.warps}. BN: a power of two from 8 to 128. STAGES: 2, 4 or 8 slots of the ring.")
    lines += ["", str(fragments.__doc__).split("\n\n", 1)[1].rstrip()]
    return "\n".join(lines)


def _quoted(shape: _Shape) -> str:
    return f'"{shape.dtype}"'
