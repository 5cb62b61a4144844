"""Text of what x meets on its way into the launch: its columns in the order of the tiles, scaled in fp32.

Copies of 16 bytes can neither gather nor scale. A kernel with either takes its block of x through registers instead:
while tile t is multiplied the columns of tile t + 1 are on their way from memory, and are stored when it is done. Two
slots hold them, whatever the ring has. Every tile row does this anew, which is little for a small batch; a large one
is prepared once, by launches before (`inputs.py`).
"""

from stoicc.codegen.gluon.blobs import SIZE_BITS
from stoicc.codegen.gluon.register_order import CHUNK
from stoicc.codegen.gluon.shape import LANES, Shape
from stoicc.codegen.triton.text import function

SLOTS = 2
"""Blocks of x: the one that is multiplied and the next."""


def start_inputs(shape: Shape) -> list[str]:
    """Lines that load the columns of an item's first tile; those of the others follow one tile ahead."""
    return [
        f"X: gl.constexpr = gl.BlockedLayout([1, 1], [1, {LANES}], [{shape.warps}, 1], [1, 0])",
        "n = gl.minimum(first_n + gl.arange(0, BN, gl.SliceLayout(1, X)), N - 1)",
        f"x_words = gl.arange(0, {shape.words}, gl.SliceLayout(0, X))",
        f"x_rows = x + (n.to(gl.int64) * (K // 8) * {CHUNK})[:, None]",
        f"blocks = gl.allocate_shared_memory(gl.int32, [{SLOTS}, BN, {shape.words}], "
        f"gl.SwizzledSharedLayout({CHUNK}, 1, 8, order=[1, 0]))",
        f"column = gl.load(descriptors + t) >> {SIZE_BITS}",
        f"arriving = load_inputs(x_rows, x_words, column, t < end, {_tables(shape)}, K)",
        f"blocks.index(t & {SLOTS - 1}).store(arriving)",
        f"column = gl.load(descriptors + t + 1) >> {SIZE_BITS}",
    ]


def begin_tile(shape: Shape) -> list[str]:
    """Lines before the products of a tile."""
    given = f"x_rows, x_words, t, end, column, descriptors, {_tables(shape)}, K"
    return ["arriving, column = next_inputs(", f"    {given}", ")"]


def end_tile() -> list[str]:
    """Lines after them: the slot was that of tile t - 1, which all warps are done with."""
    return [f"blocks.index((t + 1) & {SLOTS - 1}).store(arriving)"]


def input_functions(shape: Shape) -> list[str]:
    """Texts of `load_inputs` and `next_inputs`."""
    steps = ["in their order"] if "column_permutation" in shape.prologue else []
    steps += ["scaled in fp32"] if "input_scale" in shape.prologue else []
    lines = [
        f'"""Columns of x under one tile, {" and ".join(steps)}, two in a word `[BN, BK / 2]`; zeros past K."""',
        f"k = column * {2 * shape.words} + 2 * x_words",
        "real = there & (k < K)",
    ]
    if "column_permutation" in shape.prologue:
        lines += [
            "first = gl.load(column_permutation + k, mask=real, other=0)",
            "second = gl.load(column_permutation + k + 1, mask=real, other=0)",
            "low = gl.load(x_rows + (first // 2)[None, :], mask=real[None, :], other=0)",
            "high = gl.load(x_rows + (second // 2)[None, :], mask=real[None, :], other=0)",
            "words = take_halves(low, high, (first & 1)[None, :], (second & 1)[None, :])",
        ]
    else:
        lines.append("words = gl.load(x_rows + (k // 2)[None, :], mask=real[None, :], other=0)")
    if "input_scale" in shape.prologue:
        lines += [
            "scale0 = gl.load(input_scale + k, mask=real, other=0.0)[None, :]",
            "scale1 = gl.load(input_scale + k + 1, mask=real, other=0.0)[None, :]",
            "words = scale_halves(words, scale0, scale1)",
        ]
    load = ", ".join(["x_rows", "x_words", "column", "there", *shape.prologue, "K"])
    following = [
        '"""Start loading the columns of x under tile t + 1; the tile column of the one after it."""',
        f"words = load_inputs(x_rows, x_words, column, t + 1 < end, {_tables(shape)}, K)",
        f"return words, gl.load(descriptors + t + 2) >> {SIZE_BITS}",
    ]
    after = ", ".join(["x_rows", "x_words", "t", "end", "column", "descriptors", *shape.prologue, "K"])
    return [
        function("load_inputs", load, [*lines, "return words"], "gluon.jit"),
        function("next_inputs", after, following, "gluon.jit"),
    ]


def _tables(shape: Shape) -> str:
    return ", ".join(shape.prologue)
