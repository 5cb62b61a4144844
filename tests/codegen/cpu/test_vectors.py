"""bf16 products in vectors (`avx512bf16`): every format in every form of x, in one kernel and alone."""

import itertools
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

import stoicc
from stoicc.codegen.cpu.emit import emit
from stoicc.codegen.cpu.layouts import BLOCKED_ENTRIES
from stoicc.codegen.cpu.plan import classify
from stoicc.formats.dense import Dense
from stoicc.formats.int4 import Int4
from stoicc.formats.int4_nv24 import Int4Nv24
from stoicc.formats.nv24 import Nv24
from stoicc.formats.outlier import Outlier
from stoicc.ir.format import Tile, TileMac
from stoicc.ir.registry import REGISTRY
from stoicc.testing import check_format
from tests.codegen.cpu.mosaics import BOUNDS, mosaic, need, relative_error, run
from tests.codegen.cpu.unrounded import build

ISA = "avx512bf16"
FORMATS = (
    *("dense", "nv24", "int8", "int4", "int4<zero_points=true>", "int4_nv24", "int4_nv24<zero_points=true>", "int2"),
    *("int3<zero_points=true>", "bitmap", "nm", "nm<n=3, m=16>", "fp8", "fp8<kind=e5m2>", "mxfp4", "nvfp4", "outlier"),
    *("group_sparse", "group_sparse<group_size=64>", "masked<values=int8>", "masked<mask=nv24, values=fp8>"),
    *("masked<mask=nm, values=int4>", "masked<mask=nv24, values=int8>", "masked<mask=nm<n=1, m=4>, values=int2>"),
    *("masked<mask=nm<n=4, m=16>, values=mxfp4>", "masked<values=int4<zero_points=true>>", "masked<values=mxfp4>"),
    *(
        "masked<values=int2>",
        "int2<zero_points=true>",
        "outlier<values=int8>",
        "outlier<values=fp8>",
        "outlier<values=int4_nv24>",
    ),
    *("group_sparse<group_size=32>", "group_sparse<zero_points=true>", "group_sparse<group_size=8>"),
)
BESIDE = ("bias", "output_scale", "low_rank", "row_permutation", "column_permutation")


def compiled(formats: tuple[str, ...], tile: tuple[int, int] = (64, 64), rows: int = 70) -> stoicc.Kernel:
    """A weight whose tile columns have these formats, in turn."""
    generator = torch.Generator().manual_seed(len(formats))
    weight = torch.randn(rows, tile[1] * len(formats) + 5, generator=generator).bfloat16()
    weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    tile_map = [[*formats, "dense"]] * -(-rows // tile[0])
    return stoicc.compile(weight, tile=tile, tile_map=tile_map, approximate=True, target="cpu")


def products(kernel: stoicc.Kernel, x: torch.Tensor) -> torch.Tensor:
    return run(kernel.executor("tiles"), x, "bf16", kernel.program.shape[0])


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_at_every_batch(fmt, monkeypatch):
    need(ISA, monkeypatch)
    kernel = compiled((fmt, fmt))
    held, kernel_class = kernel.to_dense().double(), classify(kernel.ir, torch.bfloat16, ISA)
    assert kernel_class.pairs
    least = kernel_class.least_blocked
    for batch in (1, 2, 3, 4, 5, 7, 8, 9, 16, 21, least - 1, least, least + 11):
        x = torch.randn(batch, held.shape[1]).bfloat16()
        assert relative_error(products(kernel, x), x.double() @ held.T) < BOUNDS["bf16"], batch


def test_all_formats_in_one_kernel(monkeypatch):
    need(ISA, monkeypatch)
    kernel = compiled(FORMATS)
    held = kernel.to_dense().double()
    least = classify(kernel.ir, torch.bfloat16, ISA).least_blocked
    for batch in (1, 2, 3, 6, 17, 33, least, least + 1):
        x = torch.randn(batch, held.shape[1]).bfloat16()
        assert relative_error(products(kernel, x), x.double() @ held.T) < BOUNDS["bf16"], batch


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("tile", [(64, 64), (48, 32), (16, 128), (80, 96)])
@pytest.mark.parametrize("formats", [("empty", "nv24"), ("dense", "nv24", "int4_nv24<group_size=32>")])
def test_all_that_is_fused(formats, tile, parts, monkeypatch):
    """Odd strips, rows in parts, and more entries than are multiplied at a time."""
    need(ISA, monkeypatch)
    case = mosaic((3 * tile[0] + 7, 5 * tile[1] + 3), formats, "bf16", tile, BESIDE, "gelu", parts, bins=2)
    for x_dtype in (torch.bfloat16, torch.float32):
        kernel = classify(case.module, x_dtype, ISA)
        assert kernel.pairs == (x_dtype is torch.bfloat16)
        executor = build(case)
        for batch in (1, 6, 17, 64, 200, BLOCKED_ENTRIES + 3):
            x = torch.randn(batch, case.weight.shape[1]).to(x_dtype)
            y = run(executor, x, "bf16", case.weight.shape[0])
            assert relative_error(y, case.expected(x)) < BOUNDS["bf16"], (x_dtype, batch)


def test_the_same_bits_for_any_number_of_threads(monkeypatch):
    need(ISA, monkeypatch)
    kernel = compiled(("dense", "nv24", "int4", "bitmap"), rows=500)
    before = torch.get_num_threads()
    try:
        for batch in (1, 4, 250):
            x, found = torch.randn(batch, kernel.in_features).bfloat16(), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(products(kernel, x))
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_x_that_is_not_finite_beside_formats_that_take_digits(batch, monkeypatch):
    """Some formats multiply pairs, and those that take digits find x as floats."""
    need(ISA, monkeypatch)
    kernel = compiled(("dense", "int8", "int4", "nv24"))
    assert classify(kernel.ir, torch.bfloat16, ISA).only_pairs > batch or batch > 2
    held = kernel.to_dense().double()
    x = torch.randn(batch, held.shape[1]).bfloat16()
    x[0, 64 + 3], x[0, 3] = torch.inf, -torch.inf
    y, kept = products(kernel, x), (held[:, [3, 67]] != 0).all(1)  # zero times infinity is NaN, but for 2:4
    reference = x.double() @ held.T
    assert torch.equal(y[0][kept].isfinite(), reference[0][kept].isfinite())
    assert torch.equal(y[0][kept].isposinf(), reference[0][kept].isposinf())
    assert relative_error(y[1:], reference[1:]) < BOUNDS["bf16"]


@pytest.mark.parametrize("tile", [(32, 32), (16, 64), (64, 128), (32, 256)])
def test_outliers_in_tiles_of_any_width(tile, monkeypatch):
    """Of a row without an outlier no column is read: were it infinite, zero times that would be no number."""
    need(ISA, monkeypatch)
    kernel = compiled(("outlier<share=0.03>",) * 2, tile)
    held = kernel.to_dense().double()
    for batch in (1, 2, 4, 8, 13):
        x = torch.randn(batch, held.shape[1]).bfloat16()
        assert relative_error(products(kernel, x), x.double() @ held.T) < BOUNDS["bf16"], batch
        x[-1, 0] = torch.inf
        y, whole = products(kernel, x)[-1], held[:, 0].ne(0) & held[:, 0].abs().lt(1)  # none of them apart
        assert torch.equal(y[whole].isposinf(), held[whole, 0] > 0), batch


def test_which_form_is_taken_when():
    """Every pair of formats: pairs are there before they are all there is, and then before the blocked loop nest."""
    for pair in itertools.combinations(FORMATS, 2):
        kernel = classify(compiled(pair, rows=16).ir, torch.bfloat16, ISA)
        assert 1 <= kernel.least_pairs <= kernel.only_pairs <= kernel.least_blocked, pair
        assert kernel.floats == (kernel.only_pairs > 1)


def test_text_has_what_it_needs():
    """2:4 and dense tiles take pairs at any batch: no floats; codes take digits at batch 1, and floats if need be."""
    text = emit(classify(compiled(("dense", "nv24")).ir, torch.bfloat16, ISA))
    assert "pack_chunk" not in text
    assert "vp_pick" in text
    coded = emit(classify(compiled(("dense", "int4")).ir, torch.bfloat16, ISA))
    assert "pack_digits" in coded
    assert "pack_chunk" in coded
    assert "call->batch >= 2" in coded
    assert "ahead_if(nb >= 2, codes" in coded


class Spread(Dense):
    """Pairs whose code asks ahead where it likes: in a loop of its own, and under a condition without braces."""

    name: ClassVar[str] = "add"  # and a name that functions of the vocabulary begin with

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        if code.pairs is None:
            return code
        text = code.pairs.source.replace(
            "        ahead(values, 64);", "        if (k % 64 == 0)\n            ahead(values, 64);"
        )
        helper = "INLINE void look_ahead(const bf16 *p)\n{\n    ahead(p, 64);\n}\n\n"
        text = text.replace("    values += unit", "    look_ahead(values);\n    values += unit")
        return replace(code, source=helper + code.source, pairs=replace(code.pairs, source=text))


class WidePicks(Nv24):
    """Picks in units that kernels do not walk."""

    name: ClassVar[str] = "wide_picks"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        return replace(code, picks=code.picks and replace(code.picks, columns=64))


class NarrowDots(Int4):
    """Units for a batch of few that no loop walks."""

    name: ClassVar[str] = "narrow_dots"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        code = super().tile_mac(tile, dtype)
        return code and replace(code, dots=code.dots and replace(code.dots, columns=8))


class NarrowPickedDots(Int4Nv24):
    """Units for one entry or two in which lanes would pick of more columns than there are."""

    name: ClassVar[str] = "narrow_picked_dots"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        code = super().tile_mac(tile, dtype)
        return code and replace(code, dots=code.dots and replace(code.dots, columns=16))


class WholeInOrder(Int4):
    """A function of a whole tile that would be called for units in their order."""

    name: ClassVar[str] = "whole_in_order"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        code = super().tile_mac(tile, dtype)
        return code and replace(code, dots=code.dots and replace(code.dots, whole=True, ordered=True))


class OddPicks(Int4Nv24):
    """Units for one entry or two whose weights do not come two by two."""

    name: ClassVar[str] = "odd_picks"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        code = super().tile_mac(tile, dtype)
        return code and replace(code, dots=code.dots and replace(code.dots, picked=15))


class NarrowPairs(Dense):
    """Units for a large batch that no loop walks."""

    name: ClassVar[str] = "narrow_pairs"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        return replace(code, pairs=code.pairs and replace(code.pairs, columns=16))


class OnlyDots(Int4):
    """Units for a batch of few and none for a larger one."""

    name: ClassVar[str] = "only_dots"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        code = super().tile_mac(tile, dtype)
        return code and replace(code, pairs=None)


class DenseDots(Dense):
    """Units for a batch of few of as many columns as those for a larger one, in a text that leaves it open."""

    name: ClassVar[str] = "dense_dots"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        return replace(code, dots=code.pairs and replace(code.pairs, columns=16))


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (WidePicks, "picks in units of 32 columns, found 64"),
        (NarrowPickedDots, "picked dots in units of 32 columns, found 16"),
        (WholeInOrder, "dots of a whole tile to serve 8 entries and to be neither ordered"),
        (OddPicks, "dots that pick 2, 4, .. 32 columns, found 15"),
        (NarrowPairs, "pairs in units of 32, 64, .. columns that divide the tile's 64, found 16"),
        (OnlyDots, "pairs beside its dots, found none"),
        (NarrowDots, "dots in units of 16, 32, .. columns that divide the tile's 64, found 8"),
    ],
)
def test_units_that_no_loop_walks_are_refused(cls, said, monkeypatch):
    need(ISA, monkeypatch)
    fmt = stoicc.register_format(cls())
    try:
        with pytest.raises(stoicc.FormatError, match=said):
            products(compiled((fmt.name, fmt.name)), torch.randn(1, 133).bfloat16())
    finally:
        REGISTRY.unregister(fmt.name)


@pytest.mark.parametrize("cls", [Spread, DenseDots])
def test_formats_of_users(cls, monkeypatch):
    need(ISA, monkeypatch)
    fmt = stoicc.register_format(cls())
    try:
        kernel = compiled((fmt.name, fmt.name))
        held = kernel.to_dense().double()
        for batch in (1, 5, 9, 200):
            x = torch.randn(batch, held.shape[1]).bfloat16()
            assert relative_error(products(kernel, x), x.double() @ held.T) < BOUNDS["bf16"], batch
    finally:
        REGISTRY.unregister(fmt.name)


class NoPairs(Dense):
    """Right but in pairs, where nothing is multiplied."""

    name: ClassVar[str] = "no_pairs"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        text = code.pairs.source.replace("vp_load(values)", "vi_set1(0)") if code.pairs else ""
        return replace(code, pairs=code.pairs and replace(code.pairs, source=text))


class NoPicks(Nv24):
    """Right but where lanes pick their columns of x, which are all the first of four."""

    name: ClassVar[str] = "no_picks"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        text = code.picks.source.replace("vp_columns(place, g)", "vi_set1(0)") if code.picks else ""
        return replace(code, picks=code.picks and replace(code.picks, source=text))


class NotBlocked(Dense):
    """Right but where tiles are unpacked once for all entries."""

    name: ClassVar[str] = "not_blocked"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        text = code.pairs.source.replace("vp_load(values)", "vi_set1(0)") if code.pairs else ""
        late = code.pairs and replace(code.pairs, source=text, least_in_vectors=16, least_blocked=16)
        return replace(code, pairs=late)


class Later(Int4):
    """Codes that a batch of few finds after a strip, not in units: nowhere, here."""

    name: ClassVar[str] = "later"
    ordered: ClassVar[bool] = False

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        code = super().tile_mac(tile, dtype)
        if code is None or code.dots is None:
            return code
        planes = "const int32_t *codes, const bf16 *scales, "
        apart = "const int strip, const bf16 *x, float *acc, const int nb, int64_t *place)\n{\n}\n"
        text = code.dots.source.replace("vi_load(codes)", "vi_set1(0)")
        dots = replace(code.dots, source=text, apart=f"INLINE void {{name}}({planes}{apart}")
        if self.ordered:
            dots = replace(dots, ordered=True, source=dots.source.replace("*pairs)", "*pairs, int64_t *place)"))
        return replace(code, dots=dots)


class Ordered(Later):
    """And units that come in order."""

    name: ClassVar[str] = "ordered"
    ordered: ClassVar[bool] = True


@pytest.mark.parametrize("cls", [Later, Ordered])
@pytest.mark.parametrize("fmt", ["outlier<values={}>", "masked<values={}>"])
def test_formats_are_not_composed_with_units_that_are_not_all_there_is(fmt, cls, monkeypatch):
    need(ISA, monkeypatch)
    values = stoicc.register_format(cls())
    try:
        kernel = compiled((fmt.format(values.name),) * 2)
        held = kernel.to_dense().double()
        for batch in (1, 3, 8):
            x = torch.randn(batch, held.shape[1]).bfloat16()
            assert relative_error(products(kernel, x), x.double() @ held.T) < BOUNDS["bf16"], batch
    finally:
        REGISTRY.unregister(values.name)


class NoDots(Int4):
    """Right but for a few entries, which find no codes."""

    name: ClassVar[str] = "no_dots"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        code = super().tile_mac(tile, dtype)
        text = code.dots.source.replace("vi_load(codes)", "vi_set1(0)") if code and code.dots else ""
        return code and replace(code, dots=code.dots and replace(code.dots, source=text))


class NoneApart(Outlier):
    """Right but for a few entries, which are not multiplied with what stands apart."""

    name: ClassVar[str] = "none_apart"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        code = super().tile_mac(tile, dtype)
        text = code.dots.apart.replace("rows_above(counts, i)", "0") if code and code.dots else ""
        return code and replace(code, dots=code.dots and replace(code.dots, apart=text))


@pytest.mark.parametrize(
    ("cls", "where"),
    [
        (NoPairs, "a batch of 1 "),
        (NoPicks, "a batch of 1 "),
        (NotBlocked, "a batch of 16 "),
        (NoDots, "a batch of [23] "),
        (NoneApart, "a batch of 1 "),
    ],
)
def test_every_form_is_under_contract(cls, where, monkeypatch):
    need(ISA, monkeypatch)
    fmt = stoicc.register_format(cls())
    try:
        with pytest.raises(stoicc.FormatError, match=rf"C multiply equals decode \(bf16\): .* times {where}are far"):
            check_format(fmt, (64, 64), ("bf16",))
    finally:
        REGISTRY.unregister(fmt.name)
