"""Text of the ring: copies that know nothing of formats, several tiles ahead.

With `mma` a tile's slot is free as soon as all warps are past it, and the copy that goes there is STAGES - 1 tiles
ahead. With `wgmma` the last product of a tile may still be reading its slot then: copies are one tile less ahead.
"""

from stoicc.codegen.gluon.blobs import SIZE_BITS
from stoicc.codegen.gluon.register_order import CHUNK
from stoicc.codegen.gluon.shape import LANES, Shape
from stoicc.codegen.triton.text import function


def ahead(shape: Shape) -> str:
    """How many tiles copies are ahead of products."""
    return "STAGES - LAG" if shape.wgmma else "STAGES - 1"


def start_copy(shape: Shape) -> str:
    """Text of `start_copy`: rounds of 16 bytes a thread, those that no format present has left out."""
    round_words, sizes = shape.threads * CHUNK, sorted({loop.blob.chunks for loop in shape.loops})
    block = "x_rows + column * " + str(shape.words)
    lines = [
        '"""Start copying a tile and its columns of x to a slot of the rings."""',
        f"column = descriptor >> {SIZE_BITS}",
    ]
    if shape.prologue:
        lines = ['"""Start copying a tile to a slot of the ring."""']
    elif shape.tail:
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
    return function("start_copy", copied(shape, "slot"), lines, "gluon.jit")


def copied(shape: Shape, slot: str) -> str:
    """Arguments of `start_copy`, x's among them where it is copied as it is."""
    x = [] if shape.prologue else ["x_rows", "x_words"]
    given = ["ring", *([] if shape.prologue else ["blocks"]), slot, "weights", *x, "descriptor"]
    return ", ".join([*given, *([] if shape.prologue else ["K"])])


def next_tile(shape: Shape) -> str:
    """Text of `next_tile`: wait for tile t, start the copy of the one STAGES - 1 further on."""
    distance = ahead(shape)
    free = "those before t - 1" if shape.wgmma else "tile t - 1"
    lines = [
        f'"""Wait for tile t and start copying the one {distance} after it; the descriptor and place of the next."""',
        f"await_copies({distance} - 1)" if shape.wgmma else "async_copy.wait_group(STAGES - 2)",
        f"barrier()  # tile t is there for all warps, and all are done with {free}, whose slot is free",
        f"ahead = t + ({distance})",
        "if ahead < end:  # a short row does not fetch past its end",
        f"    start_copy({copied(shape, 'ahead & (STAGES - 1)')})",
        "async_copy.commit_group()",
        f"weights += (descriptor & {(1 << SIZE_BITS) - 1}) * {CHUNK}",
        "return gl.load(descriptors + ahead + 1), weights",
    ]
    constants = ["STAGES: gl.constexpr", *(["LAG: gl.constexpr"] if shape.wgmma else [])]
    return function("next_tile", ", ".join([*taken(shape), *constants]), lines, "gluon.jit")


def taken(shape: Shape) -> list[str]:
    """Arguments of `next_tile` before its constants."""
    if shape.prologue:
        return ["ring", "t", "end", "weights", "descriptors", "descriptor"]
    return ["ring", "blocks", "t", "end", "weights", "x_rows", "x_words", "descriptors", "descriptor", "K"]
