"""The emitted text, the errors, and formats that a user brings."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import stoicc
from stoicc.codegen.cache import write_sum
from stoicc.codegen.cpu import simd
from stoicc.codegen.cpu.backend import CpuBackend
from stoicc.codegen.cpu.build import _pick_openmp, instruction_set, load
from stoicc.codegen.cpu.emit import emit
from stoicc.codegen.cpu.plan import classify
from stoicc.ir.errors import CodegenError, FormatError
from stoicc.ir.format import Plane, PlaneKind, Planes, Tile, TileFormat, TileMac
from stoicc.ir.registry import REGISTRY, register_format
from stoicc.ir.schedule import Schedule, TileCsr
from stoicc.ir.types import Module, Pool, Segment, TileProgram
from tests.codegen.cpu.mosaics import BOUNDS, mosaic, relative_error, run


def small(**options):
    return mosaic((70, 130), ("empty", "dense", "nv24", "int4<zero_points=true>"), "bf16", (64, 64), **options)


def test_the_c_of_a_mosaic(golden):
    case = small(beside=("bias", "low_rank"), activation="gelu", parts=2)
    golden(emit(classify(case.module, torch.bfloat16, "avx512"), "0.0"))


@pytest.mark.parametrize(("isa", "fmt"), [("vnni", "int4<zero_points=true>"), ("amx", "nv24"), ("avx512bf16", "nv24")])
def test_the_c_of_one_format(golden, isa, fmt):
    case = mosaic((70, 130), (fmt,), "bf16", (64, 64))
    golden(emit(classify(case.module, torch.bfloat16, isa), "0.0"), f"test_the_c_of_{fmt.partition('<')[0]}_{isa}")


@pytest.mark.parametrize(("isa", "fmt"), [("avx512", "masked"), ("avx512", "outlier"), ("avx2", "group_sparse")])
def test_the_c_of_composed_formats(golden, isa, fmt):
    weight = torch.randn(70, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[:, ::3] = 0
    kernel = stoicc.compile(weight, tile_map=[[fmt] * 3] * 2, approximate=True, target="cpu")
    golden(emit(classify(kernel.ir, torch.bfloat16, isa), "0.0"), f"test_the_c_of_{fmt}_{isa}")


@pytest.mark.parametrize("isa", simd.ISAS)
def test_text_depends_on_the_class_alone(isa):
    first = mosaic((70, 130), ("dense", "nv24"), "f32")
    second = mosaic((5, 9), ("dense", "nv24"), "f32", seed=1)
    texts = {emit(classify(case.module, torch.float32, isa)) for case in (first, first, second)}
    assert len(texts) == 1


def test_only_what_is_used_is_emitted(monkeypatch):
    monkeypatch.setenv("STOICC_CPU_ISA", "portable")
    text = CpuBackend().emit(mosaic((40, 40), ("dense",), "f32").module, torch.float32)
    assert "vf_load_f32" in text
    assert not any(name in text for name in ("vf_nibble", "vf_pick4", "bf16", "partial", "low_rank", "math.h"))


@pytest.mark.parametrize("isa", simd.ISAS)
def test_every_instruction_set_has_the_same_vocabulary(isa):
    for header in ("avx512", "common", "kept"):
        assert simd.vocabulary(isa).keys() >= simd.defined(header).keys()


@pytest.mark.parametrize("isa", simd.ISAS)
def test_definitions_stand_once_and_before_their_uses(isa):
    known = simd.vocabulary(isa)
    text = simd.definitions(isa, " ".join(known))
    places = [text.index(definition.text) for definition in known.values()]
    assert len(set(places)) == len(known)
    for name, definition in known.items():
        assert all(text.index(known[used].text) < text.index(definition.text) for used in definition.uses), name


def test_comments_may_name_one_another(monkeypatch):
    text = """\
/* The other way about: `down`. */
static inline int up(int i)
{
    return i + 1; /* not down(i) */
}

/* The other way about: `up`. */
static inline int down(int i)
{
    return i - 1;
}
"""
    monkeypatch.setitem(simd._HEADERS, "tests", ("tests",))
    monkeypatch.setattr(simd, "files", lambda package: _Text(text))
    assert list(simd.vocabulary("tests")) == ["up", "down"]
    assert "int up(" not in simd.definitions("tests", "down(1)")


class _Text:
    """Stands for a header, at any path."""

    def __init__(self, text: str) -> None:
        self._text = text

    def joinpath(self, name: str) -> "_Text":
        return self

    def read_text(self) -> str:
        return self._text


def test_forced_instruction_set(monkeypatch):
    monkeypatch.setenv("STOICC_CPU_ISA", "portable")
    assert instruction_set() == "portable"
    assert "SIMD     portable" in CpuBackend().emit(small().module, torch.bfloat16)
    monkeypatch.setenv("STOICC_CPU_ISA", "mmx")
    with pytest.raises(CodegenError, match=r"STOICC_CPU_ISA: expected one of .*portable on this machine, found 'mmx'"):
        instruction_set()


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    assert CpuBackend().available() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert CpuBackend().available() == "no C compiler (gcc, cc or clang)"
    with pytest.raises(CodegenError, match="expected a C compiler, found no C compiler"):
        load("int x;", "nothing", "portable")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert CpuBackend().available() == "no C compiler (CC is 'no-such-compiler')"


def test_text_that_does_not_compile(monkeypatch, tmp_path):
    monkeypatch.setenv("STOICC_CACHE_DIR", str(tmp_path))
    with pytest.raises(CodegenError, match=r"expected the emitted C to compile, found .*error.*; look at the file"):
        load("int x = ;", "broken", "portable")
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock"] == [".c"]


def test_a_class_is_built_once(monkeypatch, tmp_path):
    monkeypatch.setenv("STOICC_CACHE_DIR", str(tmp_path))
    load("int answer(void) { return 42; }", "once", "portable")
    monkeypatch.setattr("stoicc.codegen.cpu.build._compile", None)  # a second build would call it
    assert load("int answer(void) { return 42; }", "once", "portable").answer() == 42


@pytest.mark.parametrize("damage", ["truncated", "no library, as noted"])
def test_a_damaged_library_is_built_again(monkeypatch, tmp_path, damage):
    monkeypatch.setenv("STOICC_CACHE_DIR", str(tmp_path))
    source = f"int answer(void) {{ return 42; }} /* {damage} */"
    monkeypatch.setattr("stoicc.codegen.cpu.build.ctypes.CDLL", lambda path: path)  # a mapped file must not change
    library = Path(load(source, "damaged", "portable"))
    library.write_bytes(library.read_bytes()[:5000])
    if damage != "truncated":
        library.write_bytes(b"no library")
        write_sum(library)
    monkeypatch.undo()
    monkeypatch.setenv("STOICC_CACHE_DIR", str(tmp_path))
    assert load(source, "damaged", "portable").answer() == 42


def test_a_library_that_is_there_is_loaded_without_writing(monkeypatch, tmp_path):
    monkeypatch.setenv("STOICC_CACHE_DIR", str(tmp_path))
    load("int answer(void) { return 43; }", "read_only", "portable")
    for name in ("locked", "write_whole", "write_sum", "move_whole"):
        monkeypatch.setattr(f"stoicc.codegen.cpu.build.{name}", None)
    assert load("int answer(void) { return 43; }", "read_only", "portable").answer() == 43


def test_a_compiler_that_says_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("STOICC_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(CodegenError, match=r"cpu backend, false: .*, found exit status 1 and no message; look at"):
        load("int x;", "silent", "portable")
    monkeypatch.setenv("CC", "true")
    with pytest.raises(CodegenError, match=r"cpu backend, true: .*, found no library and no message; look at"):
        load("int x;", "silent", "portable")
    monkeypatch.setenv("CC", "gcc '")
    with pytest.raises(CodegenError, match=r"found no C compiler \(CC is \"gcc '\"\); install gcc or set CC"):
        load("int x;", "silent", "portable")


def test_torchs_own_openmp_comes_before_others():
    own = f"{Path(torch.__file__).parent}/lib/libgomp-1.so"
    lines = [f"7f00-7f01 r-xp 00000000 08:01 42    {path}" for path in ("/a/libgomp.so.1", own, "/a/libcomplex.so")]
    assert _pick_openmp(lines) == own
    assert _pick_openmp(lines[:1]) == "/a/libgomp.so.1"
    assert _pick_openmp(lines[2:]) is None


def test_float64_goes_to_the_reference():
    case = small()
    with pytest.raises(CodegenError, match="expected x of 16 or 32 bits, found f64; use the reference"):
        CpuBackend().emit(case.module, torch.float64)
    executor = CpuBackend().build(case.module, case.pools, "dense-once", "error")
    with pytest.raises(CodegenError, match="expected x of 16 or 32 bits, found f64"):
        executor.run(torch.ones(1, 130).double(), torch.ones(1, 70).double(), torch.empty(0, dtype=torch.uint8))


def test_a_schedule_must_be_there_and_fuse_all_that_is_beside_the_tiles():
    case = small(beside=("bias",))
    with pytest.raises(CodegenError, match="expected a schedule, found none; run a pipeline first"):
        CpuBackend().emit(Module(case.module.tiles), torch.bfloat16)
    bare = replace(case.module, schedule=replace(case.module.schedule, epilogue=()))
    with pytest.raises(CodegenError, match="expected bias in the schedule's prologue or epilogue, found it in neither"):
        CpuBackend().build(bare, case.pools, "tiles", "error")


def test_unknown_executor():
    case = small()
    with pytest.raises(CodegenError, match="expected executor 'tiles' or 'dense-once', found 'magic'"):
        CpuBackend().build(case.module, case.pools, "magic", "error")


@dataclass(frozen=True)
class Halved(TileFormat):
    """Values divided by two; has no C code."""

    name: ClassVar[str] = "halved"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return (Plane("half", dtype, tile),)

    def encode(self, tiles: Tensor) -> Planes:
        return {"half": tiles / 2}

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        return planes["half"] * 2


@dataclass(frozen=True)
class Listed(TileFormat):
    """Non-zeros of a tile as values and places: planes whose length differs from tile to tile."""

    name: ClassVar[str] = "listed"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return (Plane("values", dtype, (), PlaneKind.RAGGED), Plane("places", "i32", (), PlaneKind.RAGGED))

    def encode(self, tiles: Tensor) -> Planes:
        tile, place = tiles.flatten(1).nonzero(as_tuple=True)
        ptr = torch.searchsorted(tile, torch.arange(tiles.shape[0] + 1))
        values = {"values": tiles.flatten(1)[tile, place], "places": place.int()}
        return {**values, "values_ptr": ptr, "places_ptr": ptr}

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        ptr = planes["values_ptr"]
        owner = torch.repeat_interleave(torch.arange(ptr.numel() - 1), ptr.diff())
        tiles = planes["values"].new_zeros(ptr.numel() - 1, tile[0] * tile[1])
        tiles[owner, planes["places"].long()] = planes["values"]
        return tiles.view(-1, *tile)

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        return TileMac("""\
INLINE void {name}(
    const float *values, int64_t count, const int32_t *places, int64_t same, const float *x, float *acc, const int nb)
{
    for (int64_t i = 0; i < count; i++) {
        int row = places[i] / BK, k = places[i] % BK;
        for (int n = 0; n < nb; n++)
            acc[(row / LANES * nb + n) * LANES + row % LANES] += values[i] * x[(k / 4 * nb + n) * 4 + k % 4];
    }
}
""")


PLANE_NAMES = ("t", "acc", "w", "n", "x", "column", "columns", "ptr", "values_ptr")


@dataclass(frozen=True)
class Sums(TileFormat):
    """A tile as the sum of many planes whose names a kernel might use itself."""

    name: ClassVar[str] = "sums"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return tuple(Plane(name, dtype, tile) for name in PLANE_NAMES)

    def encode(self, tiles: Tensor) -> Planes:
        return {name: tiles / len(PLANE_NAMES) for name in PLANE_NAMES}

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        return sum(planes.values(), torch.zeros(()))

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        pointers = ", ".join(f"const float *p{i}" for i in range(len(PLANE_NAMES)))
        total = " + ".join(f"p{i}[at]" for i in range(len(PLANE_NAMES)))
        multiply = f"""\
INLINE void {{name}}({pointers}, const float *x, float *acc, const int nb)
{{
    for (int at = 0; at < BM * BK; at++)
        for (int n = 0; n < nb; n++)
            acc[(at / BK / LANES * nb + n) * LANES + at / BK % LANES] +=
                ({total}) * x[(at % BK / 4 * nb + n) * 4 + at % BK % 4];
}}
"""
        decode = f"""\
static void {{name}}({pointers}, float *out, const int64_t stride)
{{
    for (int at = 0; at < BM * BK; at++)
        out[at / BK * stride + at % BK] = {total};
}}
"""
        return TileMac(multiply, decode=decode)


class ScaledSums(Sums):
    """The same under another name that the vocabulary knows."""

    name: ClassVar[str] = "scaled_sums"


class Bin(Sums):
    """The same under a name that makes `bin_ptr` of `ptr`."""

    name: ClassVar[str] = "bin"


OWN = (Halved(), Listed(), Sums(), ScaledSums(), Bin())


@pytest.fixture
def own_formats():
    for fmt in OWN:
        register_format(fmt)
    yield
    for fmt in OWN:
        REGISTRY.unregister(fmt.name)


def hand_made(fmt: TileFormat, tiles: Tensor) -> tuple[Module, dict[str, Tensor]]:
    """One tile row of tiles `[T, BM, BK]` in one format."""
    count, rows, columns = tiles.shape
    pools = {f"p0_{name}": plane for name, plane in fmt.encode(tiles).items()}
    described = tuple(Pool(name, "f32", tuple(pool.shape), "") for name, pool in pools.items())
    segment = Segment(str(fmt), count, described)
    program = TileProgram("w", (rows, columns * count), (rows, columns), "f32", (segment,), (0,) * count)
    csr = TileCsr(0, (0, count), tuple(range(count)))
    return Module(program, Schedule((0,), (0,), (csr,)).split_k(1)), pools


@pytest.mark.usefixtures("own_formats")
def test_a_format_without_c_code_is_an_error_or_dense_by_choice():
    tiles = torch.randn(3, 32, 16)
    module, pools = hand_made(Halved(), tiles)
    with pytest.raises(FormatError, match=r"format halved: expected C code \(tile_mac\) for 32x16 tiles of f32, found"):
        CpuBackend().build(module, pools, "tiles", "error")
    executor = CpuBackend().build(module, pools, "tiles", "dense")
    assert "halved" not in executor.source
    assert "dense (materialised)" in executor.source
    x = torch.randn(5, 48)
    expected = x.double() @ torch.cat(list(tiles.double()), 1).T
    assert relative_error(run(executor, x, "f32", 32), expected) < BOUNDS["f32"]


@pytest.mark.usefixtures("own_formats")
def test_ragged_planes_come_as_a_pointer_and_a_count():
    torch.manual_seed(0)
    tiles = torch.randn(4, 32, 16) * (torch.rand(4, 32, 16) < torch.tensor([0.1, 0.0, 0.5, 0.02]).view(4, 1, 1))
    module, pools = hand_made(Listed(), tiles)
    executor = CpuBackend().build(module, pools, "tiles", "error")
    x = torch.randn(3, 64)
    expected = x.double() @ torch.cat(list(tiles.double()), 1).T
    assert relative_error(run(executor, x, "f32", 32), expected) < BOUNDS["f32"]


@pytest.mark.usefixtures("own_formats")
@pytest.mark.parametrize("fmt", [Sums(), ScaledSums(), Bin()], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("kind", ["tiles", "dense-once"])
def test_formats_and_planes_may_have_any_names(fmt, kind):
    torch.manual_seed(0)
    tiles = torch.randn(3, 32, 16)
    module, pools = hand_made(fmt, tiles)
    executor = CpuBackend().build(module, pools, kind, "error")
    x = torch.randn(5, 48)
    expected = x.double() @ torch.cat(list(tiles.double()), 1).T
    assert executor.source
    assert relative_error(run(executor, x, "f32", 32), expected) < BOUNDS["f32"]


def test_packed_planes_are_counted(monkeypatch):
    monkeypatch.setenv("STOICC_CPU_ISA", "portable")  # others may have x in another form
    case = mosaic((64, 64), ("dense",), "bf16", (64, 64))
    executor = CpuBackend().build(case.module, case.pools, "tiles", "error")
    assert 64 * 64 * 2 <= executor.resident_bytes < 64 * 64 * 2 + 256
    assert executor.workspace_bytes(1, torch.bfloat16) == 64 * 4 + 64
    assert np.all([executor.workspace_bytes(n, torch.bfloat16) > 0 for n in range(1, 9)])
