"""C code of a format with outliers: the C of its values, then weights that stand apart, one of each row at a time."""

from dataclasses import replace
from string import Template

import torch

from stoicc.codegen.cpu.plane_types import C_TYPES
from stoicc.ir.dtypes import DTYPE_NAMES, TORCH_DTYPES
from stoicc.ir.format import Planes, Tile, TileFormat, TileMac, TilePairs

_OWN = ("counts", "columns", "columns_ptr", "outliers", "outliers_ptr")

_TILE = Template("""\
INLINE void {name}(
    $arguments,
    const uint8_t *counts, const uint8_t *columns, const int64_t count, const $T *outliers, const int64_t same,
    const $x *x, float *acc, const int nb)
{
    ahead(columns, 64);
    ahead(outliers, 128);
    {name}_values($given, x, acc, nb);
$floats
    for (int strip = 0; strip < STRIPS; strip++, counts += LANES, acc += LANES * nb) {
        uint32_t rows;
        for (int i = 0; (rows = rows_above(counts, i)); i++) {
            $T apart[LANES] __attribute__((aligned(64)));
            spread_$T(rows, outliers, apart);
            multiply_add_apart(vf_load_$T(apart), rows, columns, $entries, acc, nb);
            columns += __builtin_popcount(rows);
            outliers += __builtin_popcount(rows);
        }
    }
}
""")
_FLOATS = {"x": "float", "floats": "", "entries": "x"}
_DIGITS = {
    "x": "int8_t",
    "floats": "    float entries[BK * nb] __attribute__((aligned(64)));\n    digit_floats(x, nb, entries);",
    "entries": "entries",
}

_PAIRS = Template("""\
INLINE void {name}(
    $arguments,
    const uint8_t *counts, const uint8_t *columns, const int64_t count, const bf16 *outliers, const int64_t same,
    const int unit, bf16 *pairs)
{
    enum { SIZE = $columns, UNITS = BK / SIZE }; /* of the values; a unit with outliers is a strip */
    int at = 0;
    for (int i = 0; i < UNITS; i++) {
        bf16 *to = pairs + i * SIZE * LANES;
        $call
    }
    for (int row = 0; row < unit * LANES; row++)
        at += counts[row];
    uint32_t rows;
    for (int i = 0; (rows = rows_above(counts + unit * LANES, i)); i++)
        for (; rows; rows &= rows - 1, at++) {
            const int k = columns[at], row = __builtin_ctz(rows);
            pairs[k / 2 * (2 * LANES) + 2 * row + k % 2] = outliers[at];
        }
}
""")

_DOTS = Template("""\
INLINE $returns {name}(
    $arguments,
    const uint8_t *counts, const uint8_t *columns, const int64_t count, const bf16 *outliers, const int64_t same,
    const int unit, bf16 *pairs)
{
    $give{name}_values($given, unit, pairs);
}
""")

_APART = Template("""\
INLINE void {name}(
    $arguments,
    const uint8_t *counts, const uint8_t *columns, const int64_t count, const bf16 *outliers, const int64_t same,
    const int strip, const bf16 *x, float *acc, const int nb, int64_t *place)
{
    uint32_t rows;
    counts += strip * LANES;
    for (int i = 0; (rows = rows_above(counts, i)); i += 2) { /* two outliers of each row */
        const uint32_t also = rows_above(counts, i + 1);
        const int64_t at = *place, then = at + __builtin_popcount(rows);
        add_dots_apart(rows, columns + at, outliers + at, also, columns + then, outliers + then, x, acc, nb);
        *place = then + __builtin_popcount(also);
    }
}
""")

_DECODE = Template("""\
static void {name}(
    $arguments,
    const uint8_t *counts, const uint8_t *columns, const int64_t count, const $T *outliers, const int64_t same,
    $T *out, const int64_t stride)
{
    {name}_values($given, out, stride);
    for (int strip = 0; strip < BM / 16; strip++, counts += 16, out += 16 * stride) {
        uint32_t rows;
        for (int i = 0; (rows = rows_above(counts, i)); i++)
            for (; rows; rows &= rows - 1)
                out[__builtin_ctz(rows) * stride + *columns++] = *outliers++;
    }
}
""")


def outlier_mac(values: TileFormat, tile: Tile, dtype: str) -> TileMac | None:
    """The C of a format of values, and what is added for outliers, whose places hold zeros; None where it has none.

    Integer matrix units take no x from which an outlier's product could be had: there are no octets.
    """
    code, planes = values.tile_mac(tile, dtype), values.planes(tile, dtype)
    if code is None:
        return None
    inner, unpack_values = code.pack, code.unpack
    zero = inner({p.name: torch.zeros(1, *p.shape, dtype=TORCH_DTYPES[p.dtype]) for p in planes})
    names = {
        "T": dtype,
        "arguments": ", ".join(f"const {C_TYPES[DTYPE_NAMES[zero[p.name].dtype]]} *{p.name}" for p in planes),
        "given": ", ".join(p.name for p in planes),
    }
    canonical = ", ".join(f"const {C_TYPES[p.dtype]} *{p.name}" for p in planes)

    def function(template: Template, text: str, **more: str) -> str:
        return text.replace("{name}", "{name}_values") + "\n" + template.substitute({**names, **more})

    def pack(planes: Planes) -> Planes:
        own = {name: planes[name] for name in _OWN}
        return {**inner({name: plane for name, plane in planes.items() if name not in _OWN}), **own}

    def unpack(packed: Planes, tile: Tile) -> Planes:
        assert unpack_values is not None
        own = {name: packed[name] for name in _OWN if name in packed}
        return {**unpack_values({n: plane for n, plane in packed.items() if n not in _OWN}, tile), **own}

    pairs = code.pairs
    if pairs is not None:
        pairs = pairs.in_units(pairs.columns)
        call = "{name}_values(" + names["given"] + ", unit * UNITS + i, to)"
        call = f"vp_scale(to, SIZE, {call});" if pairs.scaled else f"{call};"
        source = function(_PAIRS, pairs.source, columns=str(pairs.columns), call=call)
        pairs = TilePairs(source, tile[1], least=pairs.least, least_blocked=48)
    dots = code.units
    if dots is not None:
        returns = {"returns": "vfloat", "give": "return "} if dots.scaled else {"returns": "void", "give": ""}
        dots = replace(dots, source=function(_DOTS, dots.source, **returns), apart=_APART.substitute(names))
        dots = replace(dots, least_in_vectors=1)
    return TileMac(
        function(_TILE, code.source, **_FLOATS),
        pack,
        function(_DECODE, code.decode, arguments=canonical) if code.decode else "",
        function(_TILE, code.digits, **_DIGITS) if code.digits else "",
        pairs,
        unpack=unpack if unpack_values is not None else None,
        dots=dots,
        code_bits=code.code_bits,
    )
