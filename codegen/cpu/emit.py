"""From a kernel class to one readable C file: the same text for the same class."""

from importlib.metadata import PackageNotFoundError, version

from stoicc.codegen.cpu import driver, simd
from stoicc.codegen.cpu.plan import C_TYPES, FormatPart, KernelClass, member
from stoicc.ir.format import PlaneKind

Field = tuple[str, str]
"""A member of `struct weight`: its C declaration without the name, and the name."""
_LEAST_FETCH, _MOST_FETCH = 64, 8192
"""Bytes of a plane's entry that are worth asking for ahead: larger tiles are long streams of their own."""


def emit(kernel: KernelClass, stoicc_version: str | None = None) -> str:
    """The C text of a kernel class.

    Args:
        stoicc_version: what the header comment says; default: the installed version.
    """
    functions = [
        *(_tile_function(part) for part in kernel.parts),
        _structs(kernel),
        driver.PADDED,
        _pack_x(kernel),
        _multiply_right(kernel),
        *(_add_tiles(part, kernel.wide) for part in kernel.parts),
        _activation(kernel),
        _finish(kernel),
        _run_item(kernel),
        _join_parts(kernel),
        _run(kernel),
    ]
    body = "\n".join(text for text in functions if text)
    constants = driver.CONSTANTS.substitute(
        rows=kernel.tile[0],
        columns=kernel.tile[1],
        padded=kernel.columns,
        strips=kernel.strips,
        wide=kernel.wide,
        chunk=kernel.chunk,
    )
    return "\n".join(
        [
            _header(kernel, stoicc_version or _installed()),
            _preamble(kernel),
            simd.definitions(kernel.isa, body),
            "",
            constants,
            body,
        ]
    )


def fields(kernel: KernelClass) -> tuple[Field, ...]:
    """Members of `struct weight`, in order; each is 8 bytes: an int64_t or a pointer."""
    members: list[Field] = [
        ("int64_t ", "rows"),
        ("int64_t ", "columns"),
        ("int64_t ", "tile_columns"),
        ("int64_t ", "streamed"),
        ("int64_t ", "bins"),
        ("const int32_t *", "bin_ptr"),
        ("const struct item *", "items"),
    ]
    if kernel.split:
        members += [("int64_t ", "split_rows"), ("const struct split *", "splits")]
    for part in kernel.parts:
        members.append(("const int32_t *", f"{part.name}_tile_column"))
        for plane in part.planes:
            members.append((f"const {C_TYPES[plane.dtype]} *", member(part.name, plane.name)))
            if plane.kind is PlaneKind.GROUP:
                members.append(("const int32_t *", member(part.name, plane.name, "entry")))
            if plane.kind is PlaneKind.RAGGED:
                members.append(("const int64_t *", member(part.name, plane.name, "ptr")))
    members += _beside_fields(kernel)
    return tuple(members)


def _beside_fields(kernel: KernelClass) -> list[Field]:
    members: list[Field] = []
    if kernel.has("column_permutation") is not None:
        members.append(("const int32_t *", "input_column"))
    if kernel.has("input_scale") is not None:
        members.append(("const float *", "input_scale"))
    if kernel.has("output_scale") is not None:
        members.append(("const float *", "output_scale"))
    factors = kernel.has("low_rank")
    if factors is not None:
        left, right = factors.split()
        members += [("int64_t ", "rank"), (f"const {C_TYPES[left]} *", "left"), (f"const {C_TYPES[right]} *", "right")]
    if kernel.has("bias") is not None:
        members.append(("const float *", "bias"))
    if kernel.has("row_permutation") is not None:
        members.append(("const int32_t *", "output_row"))
    return members


def formula(kernel: KernelClass) -> str:
    """What the kernel computes, on one line, in the terms of `stoicc.ir.types`."""
    matrix = " ".join(
        symbol
        for what, symbol in (
            ("row_permutation", "P_r"),
            ("output_scale", "S_o"),
            ("", "W"),
            ("input_scale", "S_i"),
            ("column_permutation", "P_c"),
        )
        if not what or kernel.has(what) is not None
    )
    text = f"{matrix} x"
    text += " + L (R x)" if kernel.has("low_rank") is not None else ""
    text += " + b" if kernel.has("bias") is not None else ""
    activation = kernel.has("activation")
    return f"y = {activation}({text})" if activation else f"y = {text}"


def _installed() -> str:
    try:
        return version("stoicc")
    except PackageNotFoundError:
        return "(not installed)"


def _header(kernel: KernelClass, stoicc_version: str) -> str:
    rows, columns = kernel.tile
    listed = [f"{part.format}{' (materialised)' * part.materialised}" for part in kernel.parts] or ["none"]
    formats = "\n *          ".join(listed)
    return f"""\
/* {formula(kernel)}, by stoicc {stoicc_version}.
 *
 * tiles    {rows} x {columns} in the formats
 *          {formats}
 * numbers  {kernel.dtype} weights, {kernel.x_dtype} x, sums in fp32, {kernel.out_dtype} y
 * rows     {"some cut in parts along K (split-K)" if kernel.split else "each in one work item"}
 * SIMD     {kernel.isa}, sixteen lanes
 */
"""


def _preamble(kernel: KernelClass) -> str:
    maths = ("#include <math.h>",) if kernel.has("activation") else ()
    lines = (*simd.includes(kernel.isa), *maths, "#include <stdint.h>", "#include <string.h>")
    inline = "/* nb and column are constants at every call: the compiler makes one version for each. */\n"
    return "\n".join(lines) + f"\n\n{inline}#define INLINE static inline __attribute__((always_inline))\n"


def _structs(kernel: KernelClass) -> str:
    ranges = "".join(f"    int32_t {part.name}_begin, {part.name}_end;\n" for part in kernel.parts)
    text = ""
    partial = ""
    if kernel.split:
        partial = "    int32_t partial; /* where a part of a row leaves its sums; -1: the item is a whole row */\n"
        text += "/* A tile row that is cut in parts: its partial sums are neighbours. */\n"
        text += "struct split {\n    int32_t row, partial, parts;\n};\n\n"
    text += f"/* A work item: a tile row{' or a part of one' * kernel.split}, and its tiles of each format. */\n"
    text += f"struct item {{\n    int32_t row;\n{partial}{ranges}}};\n\n"
    members = "".join(f"    {declaration}{name};\n" for declaration, name in fields(kernel))
    return f"{text}struct weight {{\n{members}}};\n"


def _tile_function(part: FormatPart) -> str:
    return part.code.source.replace("{name}", f"{part.name}_tile")


def _pack_x(kernel: KernelClass) -> str:
    permuted = kernel.has("column_permutation") is not None
    source = "from[w->input_column[column + k]]" if permuted else "from[k]"
    value = f"{kernel.x_dtype}_to_float({source})"
    if kernel.has("input_scale") is not None:
        value += " * w->input_scale[column + k]"
    return driver.PACK_X.substitute(x=C_TYPES[kernel.x_dtype], value=value, offset="" if permuted else " + column")


def _multiply_right(kernel: KernelClass) -> str:
    factors = kernel.has("low_rank")
    if factors is None:
        return ""
    right = factors.split()[1]
    return driver.LOW_RANK.substitute(
        x=C_TYPES[kernel.x_dtype], x_name=kernel.x_dtype, right=C_TYPES[right], right_name=right
    )


def _add_tiles(part: FormatPart, wide: int) -> str:
    pointers, fetches, arguments = [], [], []
    for plane in part.planes:
        base, local = f"w->{member(part.name, plane.name)}", f"plane_{plane.name}"
        declaration = f"        const {C_TYPES[plane.dtype]} *{local} = "
        arguments.append(local)
        if plane.kind is PlaneKind.RAGGED:
            ptr = f"w->{member(part.name, plane.name, 'ptr')}"
            pointers.append(f"{declaration}{base} + {ptr}[t]{f' * {plane.elements}' * (plane.elements > 1)};")
            arguments.append(f"{ptr}[t + 1] - {ptr}[t]")
            continue
        shared = f"w->{member(part.name, plane.name, 'entry')}[t]"
        entry = {PlaneKind.TILE: "t", PlaneKind.GROUP: shared, PlaneKind.MATRIX: ""}[plane.kind]
        pointers.append(f"{declaration}{base}{f' + (int64_t){entry} * {plane.elements}' if entry else ''};")
        if plane.kind is PlaneKind.TILE and _LEAST_FETCH <= plane.bytes <= _MOST_FETCH:
            fetches.append(f"            fetch({local} + {2 * plane.elements}, {plane.bytes});")
    if fetches:
        several = len(fetches) > 1
        pointers.append(f"        if (w->streamed){' {' * several} /* two tiles ahead */")
        pointers += [*fetches, *["        }"] * several]
    names = {"name": part.name, "arguments": ", ".join(arguments)}
    widths = [nb for nb in (4, 2, 1) if nb < wide]
    tails = [driver.TAIL.substitute(names, nb=nb, first="" if nb == widths[0] else "else ") for nb in widths]
    return driver.ADD_TILES.substitute(
        names, format=str(part.format), pointers="\n".join(pointers), tails="".join(tails)
    )


def _activation(kernel: KernelClass) -> str:
    return driver.ACTIVATIONS[name] if (name := kernel.has("activation")) else ""


def _finish(kernel: KernelClass) -> str:
    steps = ""
    if kernel.has("output_scale") is not None:
        steps += driver.OUTPUT_SCALE
    factors = kernel.has("low_rank")
    if factors is not None:
        steps += driver.ADD_LOW_RANK.substitute(left=factors.split()[0])
    if kernel.has("bias") is not None:
        steps += driver.BIAS
    steps = driver.STRIP_INDEX + steps if steps else steps
    if activation := kernel.has("activation"):
        steps += driver.ACTIVATE.substitute(activation=activation)
    store = driver.STORE if kernel.has("row_permutation") is None else driver.SCATTER
    names = {"out": C_TYPES[kernel.out_dtype], "out_name": kernel.out_dtype, "inner": _inner(kernel, "const float *")}
    return driver.FINISH.substitute(names, steps=steps, store=store.substitute(names))


def _inner(kernel: KernelClass, declaration: str = "") -> str:
    """The low-rank inner product as one more parameter or argument, where there is one."""
    return f", {declaration}inner" if kernel.has("low_rank") is not None else ""


def _run_item(kernel: KernelClass) -> str:
    panel = "packed + first * w->tile_columns * COLUMNS"
    adds = "".join(
        f"        add_{p.name}_tiles(w, item->{p.name}_begin, item->{p.name}_end, {panel}, width, acc);\n"
        for p in kernel.parts
    )
    acc, then = "sums", "the epilogue"
    if kernel.split:
        acc = "item->partial < 0 ? sums : partials + (item->partial * padded(batch) + first) * SUMS"
        then = "the epilogue, unless it is a part of a row"
    return driver.RUN_ITEM.substitute(
        then=then,
        out=C_TYPES[kernel.out_dtype],
        parameters=(", float *partials" if kernel.split else "") + _inner(kernel, "const float *"),
        acc=acc,
        adds=adds,
        condition="if (item->partial < 0)\n            " if kernel.split else "",
        inner=_inner(kernel),
    )


def _join_parts(kernel: KernelClass) -> str:
    if not kernel.split:
        return ""
    return driver.JOIN_PARTS.substitute(
        out=C_TYPES[kernel.out_dtype], parameters=_inner(kernel, "const float *"), inner=_inner(kernel)
    )


def _run(kernel: KernelClass) -> str:
    low_rank = kernel.has("low_rank") is not None
    areas, end = "", "packed + padded(batch) * w->tile_columns * COLUMNS"
    if low_rank:
        areas += f"    float *inner = {end};\n"
        end = "inner + batch * w->rank"
    if kernel.split:
        areas += f"    float *partials = {end};\n"
    return driver.RUN.substitute(
        x=C_TYPES[kernel.x_dtype],
        out=C_TYPES[kernel.out_dtype],
        areas=areas,
        nowait=" nowait" if low_rank else "",
        low_rank=driver.RUN_LOW_RANK if low_rank else "",
        arguments=(", partials" if kernel.split else "") + _inner(kernel),
        join=driver.RUN_JOIN.substitute(inner=_inner(kernel)) if kernel.split else "",
    )
