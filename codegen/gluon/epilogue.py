"""From the sums of a tile row `[BM, BN]` in fp32 to y, or to a part of split-K: text of the Gluon dialect."""

from stoicc.ir.types import Module

ACTIVATIONS = {
    "relu": "gl.where(acc < 0, 0.0, acc)  # keeps NaN, as torch does",
    "gelu": "0.5 * acc * (1.0 + gl.erf(acc * 0.7071067811865476))",
    "gelu_tanh": "acc / (1.0 + gl.exp(-1.5957691216057308 * (acc + 0.044715 * acc * acc * acc)))",
    "silu": "acc / (1.0 + gl.exp(-acc))",
}


def epilogue_lines(module: Module, epilogue: tuple[str, ...]) -> list[str]:
    """From `acc`, `row`, `n` and the layout `Y` to y: scale, bias, activation, permutation, cast."""
    rows, _ = module.tiles.tile
    lines = [f"m = row * {rows} + gl.arange(0, {rows}, gl.SliceLayout(1, Y))", "there = m < M"]
    if "row_permutation" in epilogue:
        lines.append("m = gl.load(row_permutation + m, mask=there, other=0)")
    if "output_scale" in epilogue:
        lines.append("acc *= gl.load(output_scale + m, mask=there, other=0.0).to(gl.float32)[:, None]")
    if "bias" in epilogue:
        lines.append("acc += gl.load(bias + m, mask=there, other=0.0).to(gl.float32)[:, None]")
    if module.tiles.beside.activation is not None:
        lines.append(f"acc = {ACTIVATIONS[module.tiles.beside.activation]}")
    return [
        *lines,
        "y += n.to(gl.int64)[None, :] * M + m[:, None]",
        "gl.store(y, acc.to(y.dtype.element_ty), mask=there[:, None] & (n < N)[None, :])",
    ]


def parts_lines(rows: int) -> list[str]:
    """Store a part where `reduce_kernel` of the portable dialect finds it."""
    return [
        "slot = gl.load(item + 1).to(gl.int64)",
        f"part = parts + (slot * N + n)[None, :] * {rows} + gl.arange(0, {rows}, gl.SliceLayout(1, Y))[:, None]",
        "gl.store(part, acc, mask=(n < N)[None, :])",
    ]
