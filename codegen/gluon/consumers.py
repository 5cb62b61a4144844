"""Text of the consumer loops: one for each format, from blobs in the ring to sums in registers."""

from stoicc.codegen.gluon.blobs import GluonLoop
from stoicc.codegen.gluon.prologue import SLOTS, begin_tile, end_tile
from stoicc.codegen.gluon.register_order import STEP
from stoicc.codegen.gluon.ring import taken
from stoicc.codegen.gluon.shape import ITEM_HEAD, LANES, Shape


def loop_lines(shape: Shape, loop: GluonLoop, number: int) -> list[str]:
    """The consumer loop of one format."""
    kind = "2:4 operands" if loop.fragment.sparse else "dense operands"
    stored = f"codes of {loop.fragment.bits} bits, " if loop.fragment.decode is not None else ""
    scaled = ", sums scaled by row in fp32" if loop.fragment.groups else ""
    lag = ", LAG" if shape.wgmma else ""
    lines = [
        "descriptor, weights = next_tile(",
        f"    {', '.join(taken(shape))}, STAGES{lag}",
        ")",
        *(begin_tile(shape) if shape.prologue else []),
        "tile = ring.index(t & (STAGES - 1))",
        f"block = blocks.index(t & {SLOTS - 1 if shape.prologue else '(STAGES - 1)'})",
        *_products(shape, loop),
        *(end_tile() if shape.prologue else []),
        "t += 1",
    ]
    turns = f"gl.load(item + {ITEM_HEAD + number})"
    head = [f"# {loop.text}: {stored}{kind}{scaled}"]
    if not shape.wgmma or loop.fragment.groups:
        return [*head, f"for _ in range({turns}):", *(f"    {line}" for line in lines)]
    # where sums may come from another loop, a wait that the path past this one reached too would have ptxas end
    # every product before the next
    end = [_awaited(shape, "acc", "0")]
    if len(shape.loops) > 1:
        end = ["if turns > 0:", f"    {end[0]}"]
    return [*head, f"turns = {turns}", "for _ in range(turns):", *(f"    {line}" for line in lines), *end]


def start_sums(shape: Shape) -> str:
    """Sums of nothing."""
    if shape.wgmma:
        return f"start_sums(L, {shape.mtiles}, RN, {shape.warps})"
    return f"gl.zeros([{shape.mtiles}, RN, {shape.warps}, 32, 4], gl.float32, L)"


def _products(shape: Shape, loop: GluonLoop) -> list[str]:
    """One tile times its columns of x: operands of 64 columns, then two steps of 32."""
    fragment, lines, opened = loop.fragment, [], False
    width = shape.tile[1] // fragment.groups if fragment.groups else 0  # columns that share a scale
    for step in range(shape.tile[1] // STEP):
        words, operands = _operands(shape, loop, step)
        lines += words
        for half in range(2):
            column = step * STEP + half * STEP // 2
            if width and not opened:
                lines.append(f"sums = {start_sums(shape)}")
                opened = True
            into, last = "sums" if width else "acc", column + STEP // 2 == shape.tile[1]
            lines += (_product_of_group if shape.wgmma else _product)(shape, loop, operands, column, into)
            ended = width and (column + STEP // 2) % width == 0
            if shape.wgmma:
                lines.append(_awaited(shape, into, "0" if ended else "LAG - 1" if last else "1"))
            if ended:
                lines.append(
                    f"acc += sums * {_row_words('load_scales', shape, loop, loop.blob.scales, column // width)}"
                )
                opened = False
    return lines


def _product(shape: Shape, loop: GluonLoop, operands: list[str], column: int, into: str) -> list[str]:
    """The product of 32 columns by `mma`."""
    half = column % STEP // (STEP // 2)
    lines = [f"b = load_columns(block, {column // 32}, L, RN, {shape.warps})"]
    if loop.fragment.sparse:
        call = f"multiply_sparse(a, b, positions, {into}, {half}, {shape.quoted})"
        return [*lines, f"a = {operands[half]}", f"{into} = {call}"]
    lines += [f"a0 = {operands[2 * half]}", f"a1 = {operands[2 * half + 1]}"]
    return [*lines, f"{into} = multiply(a0, a1, b, {into}, {shape.quoted})"]


def _product_of_group(shape: Shape, loop: GluonLoop, operands: list[str], column: int, into: str) -> list[str]:
    """The product of 32 columns by `wgmma`, started; registers of the one before are not its own."""
    half = column % STEP // (STEP // 2)
    given = f"{into}, {column // 32}, {shape.quoted}, {shape.mtiles}, RN"
    if loop.fragment.sparse:
        first = loop.blob.positions + column // STEP * loop.blob.mtiles * LANES
        lines = [] if half else [f"positions = load_positions(tile, {first}, {shape.mtiles}, {shape.warps})"]
        lines.append(f"a = {operands[half]}")
        return [*lines, f"{into} = multiply_group_sparse(a, own_registers(positions), block, {given})"]
    lines = [f"a0 = {operands[2 * half]}", f"a1 = {operands[2 * half + 1]}"]
    return [*lines, f"{into} = multiply_group(a0, a1, block, {given})"]


def _awaited(shape: Shape, into: str, newest: str) -> str:
    return f"{into} = await_products({into}, {newest}, {shape.mtiles}, RN)"


def _operands(shape: Shape, loop: GluonLoop, step: int) -> tuple[list[str], list[str]]:
    """Lines that load what 64 columns need, and an expression for each fragment."""
    blob, fragment = loop.blob, loop.fragment
    common = f"L, {shape.mtiles}, {shape.warps}"
    vector_words = blob.mtiles * LANES * blob.width
    at = [(step * blob.vectors + vector) * vector_words for vector in range(blob.vectors)]
    lines = []
    if fragment.sparse and not shape.wgmma:
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
    given = [shape.quoted, *(f"{name}={value!r}" for name, value in fragment.constants)]
    calls = []
    for begin in range(0, len(names), each):
        call = f"{fragment.decode.fn.__name__}({', '.join([*names[begin : begin + each], *given])})"
        column = step * STEP + begin // each * (32 if fragment.sparse else 16)
        calls.append(_less_zeros(shape, loop, call, column) if fragment.zero_points else call)
    return lines, calls


def _zeros(shape: Shape, loop: GluonLoop, step: int) -> list[str]:
    """Zero points of the groups that meet these 64 columns."""
    width = shape.tile[1] // loop.fragment.groups
    groups = dict.fromkeys(column // width for column in (step * STEP, step * STEP + STEP // 2))
    return [f"zeros{group} = {_row_words('load_pairs', shape, loop, loop.blob.zeros, group)}" for group in groups]


def _less_zeros(shape: Shape, loop: GluonLoop, call: str, column: int) -> str:
    group = column // (shape.tile[1] // loop.fragment.groups)
    return f"less_zeros({call}, zeros{group}, {shape.quoted})"


def _row_words(loader: str, shape: Shape, loop: GluonLoop, section: int, group: int) -> str:
    dtype = f"{shape.quoted}, " if loader == "load_scales" else ""
    return f"{loader}(tile, {section + group * loop.blob.mtiles * 8}, {dtype}L, {shape.mtiles}, {shape.warps})"
