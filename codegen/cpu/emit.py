"""From a kernel class to one readable C file: the same text for the same class."""

import re
from importlib.metadata import PackageNotFoundError, version
from string import Template

from stoicc.codegen.cpu import blocked, driver, forms, groups, simd
from stoicc.codegen.cpu.layouts import LEAST_OCTETS, digit_bytes
from stoicc.codegen.cpu.plan import FormatPart, KernelClass, member
from stoicc.codegen.cpu.plane_types import C_TYPES
from stoicc.ir.format import PlaneKind

Field = tuple[str, str]
"""A member of `struct weight`: its C declaration without the name, and the name."""


def emit(kernel: KernelClass, stoicc_version: str | None = None) -> str:
    """The C text of a kernel class.

    Args:
        stoicc_version: what the header comment says; default: the installed version.
    """
    functions = [
        *(_tile_functions(part, kernel) for part in kernel.parts),
        _structs(kernel),
        _call(kernel),
        driver.PADDED,
        driver.WHOLE_BLOCKS * kernel.tiled_pairs,
        forms.pack(kernel),
        *(forms.add_tiles(part, kernel) for part in kernel.parts),
        driver.ACTIVATIONS[name] if (name := kernel.has("activation")) else "",
        _finish(kernel),
        _run_item(kernel),
        blocked.functions(kernel, _width(kernel), _width(kernel, "call->batch")) if kernel.blocked else "",
        groups.functions(kernel) if kernel.blocked else "",
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
        more=_form_constants(kernel),
    )
    return "\n".join(
        [
            _header(kernel, stoicc_version or _installed()),
            _preamble(kernel),
            constants,
            simd.definitions(kernel.isa, body),
            "",
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
        ("int64_t ", "even"),
        ("const int32_t *", "bin_ptr"),
        ("const struct item *", "items"),
    ]
    if kernel.split:
        members += [("int64_t ", "split_rows"), ("int64_t ", "partials"), ("const struct split *", "splits")]
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
    if kernel.has("low_rank") is not None:
        members.append(("int64_t ", "term_rows"))
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


_INLINING = (
    "/* nb and column are constants at every call: the compiler makes one version for each. */",
    "#define INLINE static inline __attribute__((always_inline))",
    "#define NOINLINE __attribute__((noinline))",
)


def _preamble(kernel: KernelClass) -> str:
    maths = ("#include <math.h>",) * (kernel.has("activation") is not None)
    openmp = ("#include <omp.h>",) * bool(kernel.blocked)
    lines = (*simd.includes(kernel.isa), *maths, *openmp, "#include <stdint.h>", "#include <string.h>", "")
    return "\n".join((*lines, *_INLINING, ""))


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


def _form_constants(kernel: KernelClass) -> str:
    text = ""
    if kernel.digits:
        text += driver.DIGIT_CONSTANTS.substitute(bytes=digit_bytes(kernel.tile[1]), most=kernel.most_digits)
    if kernel.octets:
        text += driver.OCTET_CONSTANTS.substitute(least=LEAST_OCTETS, most=kernel.most_octets)
    if kernel.pairs:
        text += driver.PAIR_CONSTANTS.substitute(least=kernel.least_pairs)
    return text + (blocked.constants(kernel) if kernel.blocked else "")


def _call(kernel: KernelClass) -> str:
    members = "    float *floats;\n" * kernel.floats
    members += "    int8_t *digits;\n" * kernel.digits
    members += "    bf16 *pairs;\n" * kernel.pairs
    members += "    int8_t *octets;\n" * kernel.octets
    if kernel.has("low_rank") is not None:
        members += "    const float *term; /* L (R x), by the kernels of its factors: [entry][row] */\n"
    members += "    float *partials; /* sums of parts of rows */\n" * kernel.split
    return driver.CALL.substitute(members=members)


def _tile_functions(part: FormatPart, kernel: KernelClass) -> str:
    least = kernel.least_ahead(part)
    texts = [_asking_from(least, part.code.source).replace("{name}", f"{part.name}_tile")]
    if kernel.takes_digits(part):
        texts.append(_asking_from(least, part.code.digits).replace("{name}", f"{part.name}_digits"))
    if kernel.pairs and part.code.pairs:
        whole = kernel.walked(part) and kernel.dots_of(part).whole
        codes = {} if whole else {"pairs": kernel.pairs_of(part)}
        codes |= {"dots": kernel.dots_of(part)} if kernel.has_dots(part) else {}
        for form, code in codes.items():
            # of units, `dots.add_dots` asks for what comes: it knows nb
            units = re.sub(r"\bahead\(", "ahead_if(0, ", code.source) if least else code.source
            text = _asking_from(least, code.source) if code.whole else units
            texts.append(text.replace("{name}", f"{part.name}_{form}"))
            texts += [code.apart.replace("{name}", f"{part.name}_apart")] * bool(code.apart)
    if kernel.octets and part.code.octets:
        texts.append(part.code.octets.source.replace("{name}", f"{part.name}_octets"))
    if kernel.blocked == "floats" and part.code.floats:
        texts.append(part.code.floats.source.replace("{name}", f"{part.name}_floats"))
    return "\n".join(texts)


def _asking_from(least: int, text: str) -> str:
    """C of a format whose functions of nb batch entries ask for what is read later from `least` entries on."""
    if not least:
        return text
    ahead = f"ahead_if(nb >= {least}, "
    return re.sub(r"const int nb\)\n\{\n.*?\n\}\n", lambda body: re.sub(r"\bahead\(", ahead, body[0]), text, flags=re.S)


def _finish(kernel: KernelClass) -> str:
    steps = ""
    if kernel.has("output_scale") is not None:
        steps += driver.OUTPUT_SCALE
    if kernel.has("low_rank") is not None:
        steps += driver.LOW_RANK_INDEX + driver.ADD_LOW_RANK
        steps += driver.ADD_LOW_THIRDS.substitute(least=kernel.least_pairs) * kernel.thirds
    if kernel.has("bias") is not None:
        steps += driver.BIAS
    indexed = kernel.has("output_scale") is not None or kernel.has("bias") is not None
    steps = driver.STRIP_INDEX * indexed + steps
    if activation := kernel.has("activation"):
        steps += driver.ACTIVATE.substitute(activation=activation)
    store = driver.STORE if kernel.has("row_permutation") is None else driver.SCATTER
    names = {"out": C_TYPES[kernel.out_dtype], "out_name": kernel.out_dtype}
    return driver.FINISH.substitute(
        names, wide=_wide(kernel), width=_width(kernel), steps=steps, store=store.substitute(names)
    )


def _wide(kernel: KernelClass) -> str:
    """Batch entries of a block of sums, as a C expression."""
    return "call->pairs ? 16 : WIDE" if kernel.tiled_pairs else "WIDE"


def _width(kernel: KernelClass, entries: str = "count", call: str = "call->") -> str:
    """Batch entries with those that fill the last block, as a C expression."""
    floats = f"padded({entries})"
    return f"({call}pairs ? whole_blocks({entries}) : {floats})" if kernel.tiled_pairs else floats


def _run_item(kernel: KernelClass) -> str:
    acc, then = "sums", "the epilogue"
    if kernel.split:
        entries = _width(kernel, "call->batch")
        acc = f"item->partial < 0 ? sums : call->partials + (item->partial * {entries} + first) * SUMS"
        then = "the epilogue, unless it is a part of a row"
    return driver.RUN_ITEM.substitute(
        then=then,
        out=C_TYPES[kernel.out_dtype],
        width=_width(kernel),
        acc=acc,
        adds=_adds(kernel),
        condition="if (item->partial < 0)\n            " if kernel.split else "",
    )


def _adds(kernel: KernelClass) -> str:
    """Calls that add each format's tiles to the sums, in the form of x that this call has."""
    lines = []
    for part in kernel.parts:
        code, span = part.code, f"w, item->{part.name}_begin, item->{part.name}_end"
        ways = []
        if kernel.octets and code.octets:
            octets = "call->octets + first / CHUNK * w->tile_columns * octet_bytes(CHUNK)"
            ways.append(("octets", f"add_{part.name}_octets({span}, {octets}, count, $wide, width, acc);"))
        if kernel.pairs:
            pairs = "call->pairs + first * w->tile_columns * BK"
            entries = "count" if kernel.tiled_pairs else "width"
            ways.append((_when_pairs(part, kernel), f"add_{part.name}_pairs({span}, {pairs}, {entries}, acc);"))
        if kernel.takes_digits(part):
            digits = "call->digits + first * w->tile_columns * DIGIT_BYTES"
            ways.append(("digits", f"add_{part.name}_digits({span}, {digits}, width, acc);"))
        floats = "call->floats + first * w->tile_columns * COLUMNS"
        ways.append(("", f"add_{part.name}_tiles({span}, {floats}, width, acc);"))
        always = next(i for i, (form, _) in enumerate(ways) if not form)
        ways = ways[: always + 1]
        for i, (form, line) in enumerate(ways):
            condition = f"if (call->{form})" if form else ""
            lines += [" ".join(["else"] * (i > 0) + [condition] * bool(form))] * (i > 0 or bool(form))
            lines.append("    " * (len(ways) > 1) + line.replace("$wide", _wide(kernel)))
    return "".join(f"        {line}\n" for line in lines)


def _when_pairs(part: FormatPart, kernel: KernelClass) -> str:
    """Which calls multiply a part's tiles and pairs, as a condition on `struct call`; none: all of them."""
    if kernel.tiled_pairs:
        return "pairs"
    least = max(kernel.least_pairs, kernel.dots_of(part).least_in_vectors)
    return "" if least == 1 else "pairs" if least == kernel.least_pairs else f"pairs && call->batch >= {least}"


def _join_parts(kernel: KernelClass) -> str:
    if not kernel.split:
        return ""
    return driver.JOIN_PARTS.substitute(
        out=C_TYPES[kernel.out_dtype], width=_width(kernel), entries=_width(kernel, "call->batch")
    )


def _run(kernel: KernelClass) -> str:
    return driver.RUN.substitute(
        x=C_TYPES[kernel.x_dtype],
        out=C_TYPES[kernel.out_dtype],
        areas="".join(f"    {line}\n" for line in _areas(kernel)),
        pack=_packs(kernel),
        begin=_tiles(driver.TILES_BEGIN, kernel) + (groups.loop(kernel) if kernel.blocked else ""),
        end=_tiles(driver.TILES_END, kernel),
        join=driver.RUN_JOIN * kernel.split,
    )


def _tiles(text: Template, kernel: KernelClass) -> str:
    """What takes or gives back the matrix units, in calls that use them."""
    forms = ["call.octets"] * kernel.octets + ["call.pairs"] * kernel.tiled_pairs
    return text.substitute(used=" || ".join(forms)) if forms else ""


def _areas(kernel: KernelClass) -> list[str]:
    """Lines that cut the workspace in areas, as `scratch_bytes` of the plan counts them."""
    lines = ["char *area = workspace;"] + ["int without = 0;"] * (kernel.digits or kernel.octets)
    if kernel.has("low_rank") is not None:
        terms = f"(batch >= {kernel.least_pairs} ? 3 : 1) * " * kernel.thirds
        lines += [
            "call.term = (const float *)area;",
            f"area += ({terms}batch * w->term_rows * sizeof(float) + 63) / 64 * 64;",
        ]
    if kernel.octets:
        lines += [
            "if (batch >= LEAST_OCTETS && batch <= MOST_OCTETS) {",
            "    call.octets = (int8_t *)area;",
            "    area += (batch / CHUNK * octet_bytes(CHUNK) + octet_bytes(batch % CHUNK)) * w->tile_columns;",
            "}",
        ]
    floats = [
        "call.floats = (float *)area;",
        "area += padded(batch) * w->tile_columns * COLUMNS * sizeof(float);",
    ]
    if kernel.digits:
        floats += [
            "if (batch <= MOST_DIGITS) {",
            "    call.digits = (int8_t *)area;",
            "    area += (padded(batch) * w->tile_columns * DIGIT_BYTES + 63) / 64 * 64;",
            "}",
        ]
    if kernel.pairs:
        entries = "whole_blocks" if kernel.tiled_pairs else "padded"
        otherwise = ["} else {"] if kernel.tiled_pairs else ["}", f"if (batch < {kernel.only_pairs}) {{"]
        if not kernel.floats:
            otherwise, floats = [], []
        lines += [
            "if (batch >= LEAST_PAIRS) {",
            "    call.pairs = (bf16 *)area;",
            f"    area += {entries}(batch) * w->tile_columns * BK * sizeof(bf16);",
            *otherwise,
            *(f"    {line}" for line in floats if line),
            "}",
        ]
    else:
        lines += [line for line in floats if line]
    if kernel.split:
        lines.append("call.partials = (float *)area;")
    if kernel.blocked:
        lines += [f"area += w->partials * {_width(kernel, 'batch', 'call.')} * SUMS * sizeof(float);"] * kernel.split
        lines += groups.PREPARE
    return lines


def _packs(kernel: KernelClass) -> str:
    """Loops that pack x in the forms that this call takes."""
    octets = kernel.octets and all(part.code.octets for part in kernel.parts)
    vectors = kernel.pairs and not kernel.tiled_pairs  # where some parts take pairs whatever the others take
    others = [part for part in kernel.parts if not vectors or kernel.dots_of(part).least_in_vectors > 1]
    digits = kernel.digits and all(map(kernel.takes_digits, others))
    without = "!call.pairs" if kernel.tiled_pairs else "call.floats"
    unless = [without] * kernel.pairs + ["!call.digits"] * digits + ["!call.octets"] * octets
    floats = driver.PACK_FLOATS * kernel.floats
    if unless and floats:
        indented = "".join(f"    {line}\n" for line in floats.splitlines())
        floats = f"        if ({' && '.join(unless)}) {{\n{indented}        }}\n"
    pack = driver.PACK_PAIRS if kernel.tiled_pairs else driver.PACK_PAIR_CHUNKS
    pairs = pack.substitute(unless=" && !call.octets" * octets) if kernel.pairs else ""
    return driver.PACK_OCTETS * kernel.octets + pairs + driver.PACK_DIGITS * kernel.digits + floats
