"""Every rule of the verifier, by a small module that only this rule refuses."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given

from stoicc.ir import VerifyError, digest, failures, parse, verify, verify_pools, verify_runnable, verify_schedule
from stoicc.ir.format import Plane, PlaneKind, TileFormat
from stoicc.ir.registry import REGISTRY, register_format
from stoicc.ir.rules_program import PROGRAM_RULES
from stoicc.ir.rules_schedule import SCHEDULE_RULES
from stoicc.ir.schedule import Regime, Transposed
from stoicc.ir.types import Beside, Module, Pool, TileProgram
from stoicc.passes import Pipeline
from stoicc.passes.base import scheduled
from tests.ir.modules import full_beside, make_program, modules

SHAPE = (200, 300)
BASE = Pipeline.parse("drop-empty,build-csr,split-k{parts=2},balance{bins=3},fuse-epilogue,regimes{tiles=8}").run(
    Module(make_program(SHAPE, beside=full_beside(SHAPE)))
)
Change = Callable[[Module], Module]


def tiles(**fields: Any) -> Change:
    return lambda m: replace(m, tiles=replace(m.tiles, **fields))


def beside(**fields: Any) -> Change:
    return lambda m: replace(m, tiles=replace(m.tiles, beside=replace(m.tiles.beside, **fields)))


def schedule(**fields: Any) -> Change:
    return lambda m: replace(m, schedule=replace(scheduled(m), **fields))


def segment(index: int, **fields: Any) -> Change:
    def change(module: Module) -> Module:
        segments = list(module.tiles.segments)
        segments[index] = replace(segments[index], **fields)
        return replace(module, tiles=replace(module.tiles, segments=tuple(segments)))

    return change


def pool(index: int, place: int, **fields: Any) -> Change:
    def change(module: Module) -> Module:
        pools = list(module.tiles.segments[index].pools)
        pools[place] = replace(pools[place], **fields)
        return segment(index, pools=tuple(pools))(module)

    return change


def item(index: int, **fields: Any) -> Change:
    items = list(scheduled(BASE).items)
    items[index] = replace(items[index], **fields)
    return schedule(items=tuple(items))


def csr(index: int, **fields: Any) -> Change:
    csrs = list(scheduled(BASE).csrs)
    csrs[index] = replace(csrs[index], **fields)
    return schedule(csrs=tuple(csrs))


_TRANSPOSED = scheduled(Pipeline.parse("build-csc{bins=3}").run(BASE)).transposed or Transposed((), (), ())
_CSCS = _TRANSPOSED.cscs


def transposed(**fields: Any) -> Change:
    return schedule(transposed=replace(_TRANSPOSED, **fields))


_DENSE_TWICE = Module(make_program((64, 128), formats=["dense", "dense"], tile_map=[0, 1]))
_MAP, _ITEMS, _CSRS = BASE.tiles.tile_map, scheduled(BASE).items, scheduled(BASE).csrs
_SWAPPED = (_ITEMS[1], _ITEMS[0], *_ITEMS[2:])
_LEFT, _RIGHT = Pool("left", "bf16", (200, 4), "b2"), Pool("right", "bf16", (4, 300), "b3")
_BIAS = Pool("bias", "f32", (200,), "b1")

BROKEN: list[tuple[str, Change, str]] = [
    ("shape", tiles(shape=(0, 300)), r"program 'w': expected a shape \[M, K\] of at least \[1, 1\], found \[0, 300\]"),
    ("tile", tiles(tile=(64, 48)), "expected a tile of powers of two from 16 to 256, found 64x48"),
    ("tile", tiles(tile=(512, 64)), "found 512x64"),
    ("dtype", tiles(dtype="f64"), "expected dtype f32 or f16 or bf16, found 'f64'"),
    ("map-length", tiles(tile_map=_MAP[:-1]), "expected a tile map of 4 x 5 = 20 tiles, found 19"),
    ("map-index", tiles(tile_map=(*_MAP[:7], 4, *_MAP[8:])), r"tile \(1, 2\): expected one of 4 segments, found %4"),
    ("map-index", tiles(tile_map=(-1, *_MAP[1:])), r"tile \(0, 0\): expected one of 4 segments, found %-1"),
    ("segment-format", segment(1, format="nv42"), "segment %1, format nv42: expected .* did you mean nv24"),
    (
        "segment-unique",
        lambda _: _DENSE_TWICE,
        "segment %1, format dense: expected one segment per format, found .* %0",
    ),
    (
        "segment-count",
        segment(1, count=3),
        "segment %1, format nv24: expected a count of 2, as in the tile map, found 3",
    ),
    ("tile-bytes", segment(1, tile_bytes=(4,)), "expected bytes >= 0 of each of its 2 tiles, found 1 of at least 4"),
    ("tile-bytes", segment(1, tile_bytes=(4, -1)), "found 2 of at least -1"),
    (
        "segment-planes",
        segment(2, format="int4<group_size=96>"),
        "expected a format that fits tiles of 64x64, found none",
    ),
    (
        "segment-pools",
        segment(1, pools=BASE.tiles.segments[1].pools[:1]),
        "pools p1_values, p1_positions, found p1_values",
    ),
    ("segment-pools", segment(3, pools=(Pool("p3_x", "u8", (1,), "0"),)), "expected pools none, found p3_x"),
    ("pool-type", pool(1, 1, dtype="i8"), r"pool p1_positions: expected u8\[2, 64, 8\], found i8\[2, 64, 8\]"),
    (
        "pool-type",
        pool(0, 0, shape=(3, 64, 64)),
        r"pool p0_values: expected bf16\[4, 64, 64\], found bf16\[3, 64, 64\]",
    ),
    ("pool-type", pool(2, 1, shape=(9, 64, 1)), r"pool p2_scales: expected bf16\[6, 64, 1\]"),
    (
        "pool-unique",
        beside(bias=replace(_BIAS, name="left")),
        "pool left: expected a name of its own for every pool, found 2",
    ),
    (
        "beside-bias",
        beside(bias=replace(_BIAS, shape=(199,))),
        r"bias: expected f32 or bf16 of shape \[200\], found f32\[199\]",
    ),
    ("beside-bias", beside(bias=replace(_BIAS, dtype="i32")), r"found i32\[200\]"),
    ("beside-scale", beside(input_scale=Pool("s", "f32", (200,), "0")), r"input_scale: expected .* of shape \[300\]"),
    ("beside-scale", beside(output_scale=Pool("s", "u8", (200,), "0")), r"output_scale: expected .*, found u8\[200\]"),
    ("beside-permutation", beside(row_permutation=Pool("r", "i64", (200,), "0")), r"expected i32 of shape \[200\]"),
    ("beside-permutation", beside(column_permutation=Pool("r", "i32", (200,), "0")), r"expected i32 of shape \[300\]"),
    ("beside-low-rank", beside(low_rank=(_LEFT, replace(_RIGHT, shape=(5, 300)))), r"found \[200, 4\] and \[5, 300\]"),
    ("beside-low-rank", beside(low_rank=(_RIGHT, _LEFT)), r"factors \[200, r\] and \[r, 300\] with r >= 1"),
    ("beside-low-rank", beside(low_rank=(_LEFT, replace(_RIGHT, dtype="f32"))), "both factors in one of f32, bf16"),
    ("beside-activation", beside(activation="tanh"), "expected one of relu, gelu, gelu_tanh, silu, found 'tanh'"),
    ("live-index", schedule(live=(0, 1, 2, 4)), r"live: expected segments of 0 to 3, each once, found \[0, 1, 2, 4\]"),
    ("live-index", schedule(live=(0, 1, 2, 2)), r"found \[0, 1, 2, 2\]"),
    (
        "live-complete",
        schedule(live=(0, 1), csrs=_CSRS[:2], items=tuple(replace(i, ranges=i.ranges[:2]) for i in _ITEMS)),
        r"segment %2, format int4<group_size=128>: expected every segment that stores .*, found live \[0, 1\]",
    ),
    ("row-order", schedule(row_order=(0, 0, 2, 3)), "expected each of 4 tile rows once, found 4 entries"),
    ("csr-segments", schedule(csrs=_CSRS[:2]), r"expected one csr per live segment, \[0, 1, 2\], found \[0, 1\]"),
    ("csr-segments", schedule(csrs=()), r"found \[\]"),
    (
        "csr-tiles",
        csr(1, row_ptr=(0, 1, 2, 2, 2)),
        r"csr %1, format nv24, tile row 0: expected row_ptr\[1\] = 2 .*, found 1",
    ),
    (
        "csr-tiles",
        csr(1, row_ptr=(0, 2, 2, 2)),
        r"tile row 3: expected row_ptr\[4\] = 2 as in the tile map, found nothing",
    ),
    ("csr-tiles", csr(0, col_idx=(0, 1, 3, 2)), r"format dense, tile \(1, 2\): expected col_idx\[2\] = 2 .*, found 3"),
    (
        "item-ranges",
        item(3, ranges=((0, 0),)),
        r"item 3 \(tile row 1\): expected a tile range of each of 3 csrs, found 1",
    ),
    (
        "item-ranges",
        schedule(csrs=(), applied=(), items=tuple(replace(i, ranges=()) for i in _ITEMS)),
        "expected no items before there is a csr",
    ),
    (
        "item-parts",
        schedule(items=_SWAPPED),
        "item 0, tile row 0: expected its parts 0 to 1 of 2, .* found part 1/2 of row 0",
    ),
    (
        "item-parts",
        schedule(items=_ITEMS[2:], bin_ptr=(0, 6)),
        "tile row 0: expected its parts .*, found part 0/2 of row 1",
    ),
    ("item-parts", schedule(items=_ITEMS[:-1], bin_ptr=(0, 7)), "item 6, tile row 3"),
    ("item-parts", schedule(items=_ITEMS[:-2], bin_ptr=(0, 6)), "item 6, tile row 3: expected .*, found no item"),
    ("item-parts", schedule(items=(*_ITEMS, _ITEMS[0]), bin_ptr=(0, 9)), "items: expected 8 items, found 9"),
    ("item-parts", item(0, parts=0), "item 0, tile row 0"),
    ("item-coverage", item(2, ranges=((0, 1), *_ITEMS[2].ranges[1:])), r"tile row 1, part 1/2\), csr %0, format dense"),
    (
        "item-coverage",
        item(7, ranges=(*_ITEMS[7].ranges[:2], (7, 8))),
        r"cover tiles \[5, 9\) of the row once, found \[7, 8\)",
    ),
    ("item-coverage", item(0, ranges=((1, 0), *_ITEMS[0].ranges[1:])), r"found \[1, 0\)"),
    ("bins", schedule(bin_ptr=(0, 3, 7)), "expected ascending bounds from 0 to 8 items, found 3 bounds from 0 to 7"),
    ("bins", schedule(bin_ptr=(0, 3, 3, 8)), "found 4 bounds from 0 to 8"),
    ("bins", schedule(bin_ptr=()), "found 0 bounds from nothing to nothing"),
    (
        "fused",
        schedule(prologue=("input_scale",)),
        "prologue: expected all of what stands .*, found input_scale; run fuse-ep",
    ),
    (
        "fused",
        schedule(applied=("build-csr",), epilogue=("bias", "low_rank")),
        "epilogue: expected some of what .*, found bias, low",
    ),
    (
        "fused",
        beside(activation=None),
        "in the order output_scale, low_rank, bias, row_permutation, found .*activation",
    ),
    ("regimes", schedule(regimes=(Regime("tilez"),)), "expected one of tiles, dense-once, vendor, found 'tilez'"),
    (
        "regimes",
        schedule(regimes=(Regime("tiles", 8), Regime("dense-once", 8))),
        "ascending, only the last one open, found 8, 8",
    ),
    ("regimes", schedule(regimes=(Regime("tiles"), Regime("dense-once", 8))), "found open, 8"),
    ("regimes", schedule(regimes=(Regime("tiles", 0), Regime("dense-once"))), "batch limits from 1, .* found 0, open"),
    ("regimes", schedule(regimes=(Regime("tiles", -3),)), "found -3"),
    ("program-values", tiles(name=7), "program, name and dtype: expected text"),
    (
        "program-values",
        segment(1, count=2.0),
        "count and bytes: expected whole numbers of at most 18 digits, found 2.0",
    ),
    ("program-values", beside(bias=replace(_BIAS, shape=(10**18,))), "pool bias, shape: .*, found one of 60 bits"),
    ("schedule-values", schedule(bin_ptr=(0, 10**20)), "schedule, bins: expected whole numbers of at most 18 digits"),
    ("schedule-values", schedule(applied=(5,)), "schedule, applied: expected text"),
    ("launch", schedule(launch=(("num_warps", 4), ("block_n", 16))), "expected parameters by name, each once, sorted"),
    ("launch", schedule(launch=(("block_n", 24),)), "launch, block_n: expected one of 16, 32, 64, 128, 256, found 24"),
    (
        "launch",
        schedule(launch=(("bogus", 3),)),
        "launch: expected one of block_n, gluon, num_stages, num_warps, prologue, threads, wgmma, found 'bogus'",
    ),
    ("schedule-values", transposed(bin_ptr=(0, "5")), "transposed, bins: expected whole numbers"),
    ("column-order", transposed(column_order=(0, 1, 2, 3, 3)), "order: expected each of 5 tile columns once, found 5"),
    (
        "csc-segments",
        transposed(cscs=_CSCS[:2]),
        r"one csc per live segment, \[0, 1, 2\], found \[0, 1\]; run build-csc",
    ),
    (
        "csc-tiles",
        transposed(cscs=(replace(_CSCS[0], tiles=_CSCS[0].tiles[::-1]), *_CSCS[1:])),
        r"csc %0, format dense: expected tiles\[\d\] = \d as in the tile map, found \d",
    ),
    (
        "csc-tiles",
        transposed(cscs=(*_CSCS[:2], replace(_CSCS[2], col_ptr=_CSCS[2].col_ptr[:-1]))),
        r"expected col_ptr\[5\] = \d as in the tile map, found nothing",
    ),
    ("column-bins", transposed(bin_ptr=(0, 2, 2, 5)), "ascending bounds from 0 to 5 tile columns, found 4 bounds"),
]


@pytest.mark.parametrize(("rule", "change", "message"), BROKEN, ids=[f"{b[0]}-{i}" for i, b in enumerate(BROKEN)])
def test_one_rule_refuses(rule, change, message):
    broken = change(BASE)
    with pytest.raises(VerifyError, match=message) as caught:
        verify(broken)
    assert str(caught.value).endswith(f"(rule {rule})")
    # what cannot be judged without this rule carries its error; no other rule has one of its own
    assert {str(error) for error in failures(broken).values()} == {str(caught.value)}


def test_every_rule_has_a_module_that_breaks_it():
    assert {rule.name for rule in (*PROGRAM_RULES, *SCHEDULE_RULES)} == {rule for rule, _, _ in BROKEN}


def test_rules_need_only_earlier_rules():
    seen: set[str] = set()
    for rule in (*PROGRAM_RULES, *SCHEDULE_RULES):
        assert set(rule.needs) <= seen
        seen.add(rule.name)


@given(modules())
def test_good_modules_pass(module):
    verify(module)
    assert failures(module) == {}


def test_verify_schedule_looks_at_the_schedule_alone():
    verify_schedule(tiles(dtype="f64")(BASE))
    verify_schedule(Module(BASE.tiles))
    with pytest.raises(VerifyError, match=r"rule launch\)$"):
        verify_schedule(schedule(launch=(("b", 1), ("a", 1)))(BASE))


def test_parsed_text_is_verified_like_any_module():
    with pytest.raises(VerifyError, match="rule map-length"):
        verify(parse('program "w" : f32[64, 64] tile 64x64 { map 0, 0 }'))


def test_runnable_modules_say_all_that_an_executor_needs():
    verify_runnable(BASE)
    bare = Module(make_program())
    with pytest.raises(VerifyError, match="program 'w', schedule: expected work items, found none; run build-csr"):
        verify_runnable(bare)
    with pytest.raises(VerifyError, match="expected work items"):
        verify_runnable(Pipeline.parse("drop-empty").run(bare))
    verify_runnable(Pipeline.parse("build-csr").run(bare))
    with pytest.raises(
        VerifyError, match=r"expected input_scale, .*, bias, .* in the prologue or epilogue, found it left out"
    ):
        verify_runnable(Pipeline.parse("build-csr").run(Module(BASE.tiles)))


# -- planes of other kinds -----------------------------------------------------------------


@dataclass(frozen=True)
class Runs(TileFormat):
    """A format with a ragged plane and one entry for the whole matrix."""

    name: ClassVar[str] = "test_runs"

    def planes(self, tile, dtype):
        return (Plane("kept", dtype, (), PlaneKind.RAGGED), Plane("table", "f32", (16,), PlaneKind.MATRIX))

    def encode(self, tiles):
        raise NotImplementedError

    def decode(self, planes, tile, dtype):
        raise NotImplementedError


@pytest.fixture
def ragged():
    register_format(Runs())
    pools = (
        Pool("p0_kept", "f32", (7,), "0"),
        Pool("p0_kept_ptr", "i64", (3,), "0"),
        Pool("p0_table", "f32", (1, 16), "0"),
    )
    program = make_program((64, 128), formats=["dense"], dtype="f32")
    first = replace(program.segments[0], format="test_runs", pools=pools, tile_bytes=(20, 8))
    yield replace(program, segments=(first,))
    REGISTRY.unregister("test_runs")


def test_ragged_and_matrix_planes_pass(ragged):
    verify(Pipeline.parse("drop-empty,order{by=cost},build-csr,split-k{parts=2}").run(Module(ragged)))


@pytest.mark.parametrize(
    ("place", "fields", "message"),
    [
        (0, {"dtype": "u8"}, r"pool p0_kept: expected f32\[7\], found u8\[7\]"),
        (0, {"shape": (7, 1)}, r"pool p0_kept: expected f32\[7\], found f32\[7, 1\]"),
        (1, {"shape": (2,)}, r"pool p0_kept_ptr: expected i32 or i64\[3\], found i64\[2\]"),
        (
            1,
            {"name": "p0_offsets"},
            "expected pools p0_kept, p0_kept_ptr, p0_table, found p0_kept, p0_offsets, p0_table",
        ),
        (2, {"shape": (2, 16)}, r"pool p0_table: expected f32\[1, 16\]"),
    ],
)
def test_ragged_and_matrix_planes_are_checked(ragged, place, fields, message):
    with pytest.raises(VerifyError, match=message):
        verify(pool(0, place, **fields)(Module(ragged)))


@pytest.mark.parametrize("ptr", [[0, 5, 8], [1, 5, 7], [0, 8, 7]])
def test_offsets_are_checked(ragged, ptr):
    pools = {"p0_kept": torch.ones(7), "p0_kept_ptr": torch.tensor([0, 5, 7]), "p0_table": torch.ones(1, 16)}
    verify_pools(ragged, pools, contents=False)
    pools["p0_kept_ptr"] = torch.tensor(ptr)
    with pytest.raises(VerifyError, match="pool p0_kept_ptr: expected ascending offsets from 0 to 7"):
        verify_pools(ragged, pools, contents=False)


# -- pools and digests ---------------------------------------------------------------------


def permuted_program() -> tuple[TileProgram, dict[str, torch.Tensor]]:
    pools = {"p0_values": torch.ones(2, 64, 64), "order": torch.arange(128, dtype=torch.int32).flip(0)}
    order = Pool("order", "i32", (128,), digest(pools["order"]))
    program = make_program((64, 128), formats=["dense"], dtype="f32", beside=Beside(column_permutation=order))
    return pool(0, 0, digest=digest(pools["p0_values"]))(Module(program)).tiles, pools


def test_matching_pools_pass():
    program, pools = permuted_program()
    verify_pools(program, {**pools, "another": torch.ones(1)})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "p0_values",
            None,
            "program 'w', pool p0_values: expected a tensor of this name, found order; pass every pool",
        ),
        (
            "p0_values",
            torch.ones(2, 64, 64).half(),
            r"expected torch.float32 of shape \[2, 64, 64\], found torch.float16",
        ),
        ("p0_values", torch.ones(1, 64, 64), r"found torch.float32 of shape \[1, 64, 64\]"),
        ("p0_values", torch.zeros(2, 64, 64), r"pool p0_values: expected content #[0-9a-f]{16}, found #"),
    ],
)
def test_wrong_pools_are_named(name, tensor, message):
    program, pools = permuted_program()
    pools = {**pools, name: tensor} if tensor is not None else {key: pools[key] for key in pools if key != name}
    with pytest.raises(VerifyError, match=message):
        verify_pools(program, pools)


@pytest.mark.parametrize(("value", "found"), [(3, "an entry twice"), (128, "out of range"), (-1, "out of range")])
def test_permutations_are_permutations(value, found):
    program, pools = permuted_program()
    pools["order"][0] = value
    with pytest.raises(
        VerifyError, match=rf"beside column_permutation, pool order: expected a permutation .*, found .*{found}"
    ):
        verify_pools(program, pools, contents=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64])
def test_digest_reads_bits_dtype_and_shape(dtype):
    values = torch.arange(12).to(dtype)
    assert digest(values) == digest(values.clone())
    assert len(digest(values)) == 16
    others = [values.view(3, 4), values.flip(0), values[:11], values.to(torch.float64)]
    assert len({digest(values), *map(digest, others)}) == 5


def test_digest_is_of_contents_not_of_strides():
    values = torch.arange(12.0).view(3, 4)
    assert digest(values.t()) == digest(values.t().contiguous())
    assert digest(values.t()) != digest(values)


def test_digest_tells_zeros_apart_and_takes_none():
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    assert digest(torch.empty(0, 4)) != digest(torch.empty(4, 0))
    assert digest(torch.nn.Parameter(torch.ones(2))) == digest(torch.ones(2))
