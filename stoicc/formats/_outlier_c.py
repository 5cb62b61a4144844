"""C code of a format with outliers: the C of its values, then the weights that stand apart, one by one."""

from dataclasses import replace
from string import Template

import torch

from stoicc.codegen.cpu.plan import C_TYPES
from stoicc.ir.dtypes import DTYPE_NAMES, TORCH_DTYPES
from stoicc.ir.format import Planes, Tile, TileFormat, TileMac

_OWN = ("counts", "columns", "columns_ptr", "outliers", "outliers_ptr")

_TILE = Template("""\
INLINE void {name}(
    $arguments,
    const uint8_t *counts, const uint8_t *columns, const int64_t count, const $T *outliers, const int64_t same,
    const $x *x, float *acc, const int nb)
{
    {name}_values($given, x, acc, nb);
    for (int row = 0; row < BM; row++) {
        float *sums = acc + (row / LANES * nb * LANES + row % LANES);
        for (int left = counts[row]; left; left--) {
            const int k = *columns++;
            const float weight = ${T}_to_float(*outliers++);
            #pragma GCC unroll 8
            for (int n = 0; n < nb; n++)
                sums[n * LANES] += weight * $entry;
        }
    }
}
""")
_FLOATS = "x[k / 4 * 4 * nb + 4 * n + k % 4]"
_DIGITS = "digit_value(x + (k / 16 * nb + n) * 48 + k % 16, digit_units(x, nb)[n])"

_PAIRS = Template("""\
INLINE void {name}(
    $arguments,
    const uint8_t *counts, const uint8_t *columns, const int64_t count, const bf16 *outliers, const int64_t same,
    const int unit, bf16 *pairs)
{
    enum { SIZE = $columns, UNITS = BK / SIZE };
    const int strip = unit / UNITS, first = unit % UNITS * SIZE;
    int at = 0;
    $call
    for (int row = 0; row < strip * LANES; row++)
        at += counts[row];
    for (int row = 0; row < LANES; row++)
        for (int left = counts[strip * LANES + row]; left; left--, at++) {
            const int k = columns[at] - first;
            if (k >= 0 && k < SIZE)
                pairs[k / 2 * (2 * LANES) + 2 * row + k % 2] = outliers[at];
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
    for (int row = 0; row < BM; row++, out += stride)
        for (int left = counts[row]; left; left--)
            out[*columns++] = *outliers++;
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
        call = "{name}_values(" + names["given"] + ", unit, pairs)"
        call = f"vp_scale(pairs, SIZE, {call});" if pairs.scaled else f"{call};"
        source = function(_PAIRS, pairs.source, columns=str(pairs.columns), call=call)
        pairs = replace(pairs, source=source, scaled=False)
    return TileMac(
        function(_TILE, code.source, x="float", entry=_FLOATS),
        pack,
        function(_DECODE, code.decode, arguments=canonical) if code.decode else "",
        function(_TILE, code.digits, x="int8_t", entry=_DIGITS) if code.digits else "",
        pairs,
        unpack=unpack if unpack_values is not None else None,
    )
