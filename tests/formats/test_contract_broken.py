"""Each promise of the contract: a format that breaks it, and the sentence that says so."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

import stoicc
from stoicc.formats.dense import Dense
from stoicc.ir.dtypes import TORCH_DTYPES, bits
from stoicc.ir.format import Approximation, Plane, PlaneKind, Planes, Tile, TileFormat, TileMac, TileOctets
from stoicc.ir.registry import REGISTRY, find_format
from stoicc.testing import CHECKS, check_format
from tests.codegen.cpu.mosaics import need

TILE = (16, 16)


@dataclass(frozen=True)
class Plain(TileFormat):
    """Any tile as it is, with no device code: what the broken ones change one thing of."""

    name: ClassVar[str] = "plain"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return (Plane("values", dtype, tile),)

    def encode(self, tiles: Tensor) -> Planes:
        return {"values": tiles.clone()}

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        return planes["values"].clone()


@dataclass(frozen=True)
class RowScale(TileFormat):
    """Signs, and one scale for a tile row (a GROUP plane)."""

    name: ClassVar[str] = "row_scale"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return (Plane("signs", "i8", tile), Plane("scale", dtype, (1,), PlaneKind.GROUP, 0))

    def encode(self, tiles: Tensor) -> Planes:
        return {"signs": tiles.sign().to(torch.int8), "scale": tiles.abs().amax((1, 2)).view(-1, 1)}

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        return planes["signs"].to(planes["scale"].dtype) * planes["scale"][:, :, None]


@dataclass(frozen=True)
class Runs(TileFormat):
    """A bitmap, and the non-zero groups of four columns (a RAGGED plane whose elements have a shape)."""

    name: ClassVar[str] = "runs"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return (Plane("mask", "u8", (tile[0], tile[1] // 4)), Plane("kept", dtype, (4,), PlaneKind.RAGGED))

    def encode(self, tiles: Tensor) -> Planes:
        groups = tiles.unflatten(2, (-1, 4))
        mask = bits(groups).ne(0).any(3)
        ptr = torch.cat((torch.zeros(1, dtype=torch.int64), mask.flatten(1).sum(1).cumsum(0)))
        return {"mask": mask.to(torch.uint8), "kept": groups[mask], "kept_ptr": ptr}

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        mask = planes["mask"].bool()
        groups = torch.zeros(*mask.shape, 4, dtype=TORCH_DTYPES[dtype])
        groups[mask] = planes["kept"]
        return groups.flatten(2)

    def tile_bytes(self, tiles: Tensor, dtype: str) -> Tensor:
        kept = bits(tiles).unflatten(2, (-1, 4)).ne(0).any(3).flatten(1).sum(1)
        return (tiles[:1].numel() / 4 + kept * 4 * tiles.itemsize).double()


@pytest.fixture
def register() -> Iterator[Callable[[type[TileFormat]], TileFormat]]:
    names = []

    def make(cls: type[TileFormat], **fields: Any) -> TileFormat:
        names.append(cls.name)
        return stoicc.register_format(cls(**fields))

    yield make
    for name in names:
        REGISTRY.unregister(name)


DEVICE_CODE = {
    "trained planes have gradients",
    "C follows planes that training changed",
    "C multiply equals decode",
    "C panel decode equals decode",
    "packed planes unpack to themselves",
    "tensor-core operands mean what decode gives",
    "Triton decode_block equals decode",
}
"""Promises that a format without device code has not made, and one without trained planes."""


@pytest.mark.parametrize("cls", [Plain, RowScale, Runs])
def test_what_they_change_is_whole(register, cls):
    assert set(CHECKS) - set(check_format(register(cls), TILE)) == DEVICE_CODE


# ---- planes ---------------------------------------------------------------------------------


class Dotted(Plain):
    name: ClassVar[str] = "dotted"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return (Plane("my.values", dtype, tile),)


class OddDtype(Plain):
    name: ClassVar[str] = "odd_dtype"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        # not at the tile that the registry tries
        return (Plane("values", dtype if tile == (64, 64) else "fp8", tile),)


class Twice(Plain):
    name: ClassVar[str] = "twice"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return (Plane("values", dtype, tile), Plane("values", dtype, tile))


class Extra(Plain):
    name: ClassVar[str] = "extra"

    def encode(self, tiles: Tensor) -> Planes:
        return {"values": tiles.clone(), "spare": tiles.clone()}


class Missing(Plain):
    name: ClassVar[str] = "missing"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return (*super().planes(tile, dtype), Plane("scale", dtype, (1,)))


class Misshapen(Plain):
    name: ClassVar[str] = "misshapen"

    def encode(self, tiles: Tensor) -> Planes:
        return {"values": tiles.flatten(1)}

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        return planes["values"].unflatten(1, tile).clone()


class NoOffsets(Runs):
    name: ClassVar[str] = "no_offsets"

    def encode(self, tiles: Tensor) -> Planes:
        planes = super().encode(tiles)
        return {"mask": planes["mask"], "kept": planes["kept"]}


class SumsFromOne(Runs):
    name: ClassVar[str] = "sums_from_one"

    def encode(self, tiles: Tensor) -> Planes:
        planes = super().encode(tiles)
        return {**planes, "kept_ptr": planes["kept_ptr"][1:]}


# ---- tiles ----------------------------------------------------------------------------------


class ZerosOnly(Plain):
    """Rejects all that would show what it decodes to."""

    name: ClassVar[str] = "zeros_only"

    def reject(self, tiles: Tensor) -> Tensor:
        return bits(tiles).ne(0).flatten(1).any(1)

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        return planes["values"] * 2


class WrongVerdict(Plain):
    name: ClassVar[str] = "wrong_verdict"

    def reject(self, tiles: Tensor) -> Tensor:
        return torch.zeros(tiles.shape, dtype=torch.bool)


class WrongDtype(Plain):
    name: ClassVar[str] = "wrong_dtype"

    def reject(self, tiles: Tensor) -> Tensor:
        return torch.zeros(len(tiles), dtype=torch.bool)

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        return planes["values"].double()


class EncodeInPlace(Plain):
    name: ClassVar[str] = "encode_in_place"

    def encode(self, tiles: Tensor) -> Planes:
        return {"values": tiles.mul_(1)}


class RejectInPlace(Plain):
    name: ClassVar[str] = "reject_in_place"

    def reject(self, tiles: Tensor) -> Tensor:
        return tiles.zero_().ne(0).flatten(1).any(1)


class DecodeInPlace(Plain):
    name: ClassVar[str] = "decode_in_place"

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        return planes["values"].mul_(1)


class ApproximateInPlace(Plain):
    name: ClassVar[str] = "approximate_in_place"

    def approximate(self, tiles: Tensor, slots: Tensor, statistics: Tensor | None = None) -> Approximation:
        return super().approximate(tiles.clamp_(-1, 1), slots, statistics)


class Raises(Plain):
    name: ClassVar[str] = "raises"

    def approximate(self, tiles: Tensor, slots: Tensor, statistics: Tensor | None = None) -> Approximation:
        raise KeyError("scale")


# ---- plane kinds ----------------------------------------------------------------------------


class Careless(RowScale):
    """Accepts tiles of one row whatever their scales are."""

    name: ClassVar[str] = "careless"

    def reject_shared(self, tiles: Tensor, slots: Tensor) -> Tensor:
        return self.reject(tiles)


class Averaging(Careless):
    """Makes the entries equal, and loses the values."""

    name: ClassVar[str] = "averaging"

    def encode_shared(self, tiles: Tensor, slots: Tensor) -> Planes:
        planes = self.encode(tiles)
        return {**planes, "scale": planes["scale"].mean(0, keepdim=True).expand(len(tiles), 1)}


class TensorScale(Plain):
    """A scale that each batch of tiles finds anew."""

    name: ClassVar[str] = "tensor_scale"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return (Plane("values", dtype, tile), Plane("scale", "f32", (1,), PlaneKind.MATRIX))

    def encode(self, tiles: Tensor) -> Planes:
        top = tiles.float().abs().amax() if len(tiles) else torch.tensor(0.0)
        return {"values": tiles.clone(), "scale": top.expand(len(tiles), 1)}


class DefaultBytes(Runs):
    name: ClassVar[str] = "default_bytes"
    tile_bytes = TileFormat.tile_bytes


class WrongBytes(Runs):
    """Counts elements of the run, and forgets that each has four values."""

    name: ClassVar[str] = "wrong_bytes"

    def tile_bytes(self, tiles: Tensor, dtype: str) -> Tensor:
        kept = bits(tiles).unflatten(2, (-1, 4)).ne(0).any(3).flatten(1).sum(1)
        return (tiles[:1].numel() / 4 + kept * tiles.itemsize).double()


# ---- device code ----------------------------------------------------------------------------


class WrongMultiply(Dense):
    """Drops the second of two batch entries: a product by the identity never meets that."""

    name: ClassVar[str] = "wrong_multiply"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        source = code.source.replace("const int nb)\n{", "const int nb)\n{\n    if (nb == 2) return;")
        assert source != code.source
        return TileMac(source, code.pack, code.decode)


class NoDigits(Dense):
    """Right with x in floats; with x in digits nothing is multiplied."""

    name: ClassVar[str] = "no_digits"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        digits = f"INLINE void {{name}}(const {dtype} *values, const int8_t *x, float *acc, const int nb)\n{{\n}}\n"
        return TileMac(code.source, code.pack, code.decode, digits)


class NoFloats(Dense):
    """Right but for a large batch on vector units, where tiles are unpacked to nothing."""

    name: ClassVar[str] = "no_floats"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        assert code.floats is not None
        signature, _, _ = code.floats.source.partition("\n{\n")
        nothing = "    memset(weights, 0, COLUMNS * LANES * sizeof *weights);\n"
        return replace(code, floats=replace(code.floats, source=f"{signature}\n{{\n{nothing}}}\n"))


class NoPairs(Dense):
    """Right but on matrix units, where nothing is multiplied."""

    name: ClassVar[str] = "no_pairs"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        if code.pairs is None:
            return code
        signature, _, _ = code.pairs.source.partition("\n{\n")
        nothing = "    memset(pairs, 0, BK * LANES * sizeof *pairs);\n"
        return replace(code, pairs=replace(code.pairs, source=f"{signature}\n{{\n{nothing}}}\n"))


class NoOctets(Dense):
    """Right but on integer matrix units, where nothing is multiplied."""

    name: ClassVar[str] = "no_octets"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        if tile[1] % 64:
            return code
        source = f"INLINE vfloat {{name}}(const {dtype} *values, const int unit, int8_t *octets)\n{{\n"
        source += "    memset(octets, 0, BK * LANES);\n    return vf_set1(1);\n}\n"
        return replace(code, octets=TileOctets(source, tile[1]))


class WrongColumn(Dense):
    name: ClassVar[str] = "wrong_column"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        return TileMac(code.source.replace("x + k * nb + i", "x + k * nb + (i ^ 1)"), code.pack, code.decode)


class WrongPanel(Dense):
    """A panel decode that nothing but a large batch meets."""

    name: ClassVar[str] = "wrong_panel"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        return TileMac(code.source, code.pack, code.decode.replace("row < BM", "row < BM - 1"))


class SignlessPanel(Dense):
    """A panel decode that drops the sign of zero: no product tells."""

    name: ClassVar[str] = "signless_panel"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        copy = "for (int k = 0; k < BK; k++) out[row * stride + k] = values[row * BK + k] + 0.0f;"
        decode = code.decode.replace("memcpy(out + row * stride, values + row * BK, BK * sizeof *out);", copy)
        assert copy in decode
        return TileMac(code.source, code.pack, decode)


class HalfUnpacked(Dense):
    """Gives the planes back in the order of rows that they were packed in."""

    name: ClassVar[str] = "half_unpacked"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        return replace(code, unpack=lambda packed, tile: {"values": packed["values"].view(-1, *tile)})


class SignlessUnpack(Dense):
    """Loses the sign of zero on the way back."""

    name: ClassVar[str] = "signless_unpack"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        assert code.unpack is not None
        inverse = code.unpack
        return replace(code, unpack=lambda packed, tile: {"values": inverse(packed, tile)["values"] + 0.0})


class UnpacksFromTheStart(Dense):
    """Right for all entries and wrong for some: it counts on the first."""

    name: ClassVar[str] = "unpacks_from_the_start"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        assert code.unpack is not None
        inverse = code.unpack

        def unpack(packed: Planes, tile: Tile) -> Planes:
            values = inverse(packed, tile)["values"]
            return {"values": values.roll(1, 0) if len(values) == 2 else values}

        return replace(code, unpack=unpack)


BROKEN = [
    (Dotted, r"planes are well declared \(f32\): expected plane names that are identifiers .*found 'my.values'"),
    (OddDtype, r"planes are well declared \(f32\): plane 'values': expected a dtype of f64, .*found 'fp8'"),
    (Twice, r"expected planes of different names, found 'values' twice"),
    (Extra, r"planes as declared \(f32\): encode returns the plane 'spare', which planes\(\) does not declare"),
    (Missing, r"encode does not return the plane 'scale' that planes\(\) declares"),
    (Misshapen, r"plane 'values' is declared \(16, 16\) per tile but encoded as \(3, 256\) for 3 of them"),
    (NoOffsets, r"encode does not return the plane 'kept_ptr' that planes\(\) declares"),
    (SumsFromOne, r"kept_ptr of 3 tiles is not 4 rising int64 offsets from 0"),
    (WrongVerdict, r"a verdict on each tile \(f32\): reject returns torch.bool \(3, 16, 16\), not a bool per tile"),
    (WrongDtype, r"decode returns torch.float64 \(3, 16, 16\) for tiles of torch.float32 \(3, 16, 16\)"),
    (
        ZerosOnly,
        r"more than zeros is held \(f32\): no sample but zeros is accepted \(tried zero, random, .*approximate",
    ),
    (EncodeInPlace, r"inputs are left alone \(f32\): encode changes the tiles that it was given; work on a copy"),
    (RejectInPlace, r"reject changes the tiles that it was given"),
    (DecodeInPlace, r"decode changes the plane 'values' that it was given"),
    (ApproximateInPlace, r"approximate changes the tiles that it was given"),
    (Raises, r"approximation tells its error \(f32\): raised KeyError: 'scale'"),
    (
        Careless,
        r"tiles that share planes agree \(f32\): .*reject_shared in one slot, but .*'scale' differ; reject them",
    ),
    (Averaging, r"accepted by reject_shared in one slot, but come back with other bits; reject them together"),
    (TensorScale, r"one entry for the matrix \(f32\): the MATRIX plane 'scale' differs from batch to batch of tiles"),
    (DefaultBytes, r"bytes as declared \(f32\): tile_bytes is the default, .*override tile_bytes to count each tile"),
    (
        WrongBytes,
        r"tile_bytes of random tiles says \[320.0, 320.0, 320.0\], their planes take \[1088.0, 1088.0, 1088.0\]",
    ),
    (
        WrongMultiply,
        r"C multiply equals decode \(f32\): random tiles times a batch of 2 are far from the product in float64",
    ),
    (WrongColumn, r"C multiply equals decode \(f32\): random tiles times the identity differ from decode"),
    (WrongPanel, r"C panel decode equals decode \(f32\): random tiles times the identity differ from decode"),
    (
        HalfUnpacked,
        r"packed planes unpack to themselves \(f32\): values of random tiles is packed and unpacked to other",
    ),
    (SignlessUnpack, r"packed planes unpack to themselves \(f32\): values of negative zero tiles .*other bits \(all"),
    (UnpacksFromTheStart, r"packed planes unpack to themselves \(f32\): values of random tiles .*\(a run of entries\)"),
    (SignlessPanel, r"C panel decode equals decode \(f32\): negative zero tiles are written with other bits"),
]


@pytest.mark.parametrize(("cls", "sentence"), BROKEN, ids=[cls.__name__ for cls, _ in BROKEN])
def test_a_broken_promise_is_named(register, cls, sentence):
    with pytest.raises(stoicc.FormatError, match=sentence) as raised:
        check_format(register(cls), TILE, ("f32",))
    assert str(raised.value).startswith(
        f"format {cls.name}: expected the contract of TileFormat, found broken promises"
    )


@pytest.mark.parametrize(
    ("cls", "isa", "dtype"),
    [(NoDigits, "vnni", "f32"), (NoFloats, "avx2", "f32"), (NoPairs, "amx", "bf16"), (NoOctets, "amx", "f32")],
)
def test_every_form_of_a_multiply_is_under_contract(register, monkeypatch, cls, isa, dtype):
    need(isa, monkeypatch)
    with pytest.raises(stoicc.FormatError, match=rf"C multiply equals decode \({dtype}\): random tiles times"):
        check_format(register(cls), (64, 64), (dtype,))


def test_a_promise_is_listed_once_with_its_dtypes(register):
    with pytest.raises(stoicc.FormatError) as raised:
        check_format(register(Dotted), TILE)
    assert str(raised.value).count("identifiers") == 1
    assert "planes are well declared (f32, f16, bf16)" in str(raised.value)


class WrongHalf(Dense):
    """Right for every dtype but f16."""

    name: ClassVar[str] = "wrong_half"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        return TileMac(code.source, code.pack, "" if dtype != "f16" else code.decode.replace("BM;", "BM - 1;"))


def test_device_code_is_checked_in_every_dtype(register):
    with pytest.raises(stoicc.FormatError, match=r"C panel decode equals decode \(f16\): random") as raised:
        check_format(register(WrongHalf), TILE)
    assert "f32" not in str(raised.value)


class Costly(Dense):
    """Costs more than dense, so that an inspector with a choice would never use it; its C is wrong."""

    name: ClassVar[str] = "costly"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return (*super().planes(tile, dtype), Plane("spare", "u8", (4,)))

    def encode(self, tiles: Tensor) -> Planes:
        return {"values": tiles, "spare": torch.zeros(len(tiles), 4, dtype=torch.uint8)}

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        source = code.source.replace("*values, const float", "*values, const uint8_t *spare, const float")
        return TileMac(
            source.replace("x + k * nb + i", "x + k * nb"), lambda planes: {**planes, **code.pack(planes)}, ""
        )


def test_a_format_that_costs_more_than_dense_is_checked_all_the_same(register):
    with pytest.raises(stoicc.FormatError, match=r"C multiply equals decode \(f32\): random tiles times the identity"):
        check_format(register(Costly), TILE, ("f32",))


# ---- text -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled(Plain):
    """Options of every kind that texts know."""

    name: ClassVar[str] = "labelled"
    label: str = ""
    mode: Literal["fast", "small"] = "fast"
    limit: int | None = None


@pytest.mark.parametrize(
    "fields", [{}, {"label": "a b"}, {"mode": "small"}, {"limit": 3}, {"label": "x", "mode": "small", "limit": 0}]
)
def test_options_read_back(register, fields):
    fmt = Labelled(**fields)
    register(Labelled)
    check_format(fmt, TILE, ("f32",))
    assert find_format(str(fmt)) == fmt


@pytest.mark.parametrize("label", ["a,b", "a>b", "<", " padded"])
def test_options_that_do_not_read_back_are_refused(register, label):
    register(Labelled)
    with pytest.raises(stoicc.FormatError, match=r"text form reads back \(f32\): .*label.*" + label):
        check_format(Labelled(label), TILE, ("f32",))


@dataclass(frozen=True)
class Forgets(Plain):
    """Leaves its option out of its text."""

    name: ClassVar[str] = "forgets"
    step: int = 1

    def __str__(self) -> str:
        return self.name


def test_a_text_without_its_options_is_refused(register):
    register(Forgets)
    with pytest.raises(stoicc.FormatError, match=r"its text forgets reads back as Forgets\(step=1\), not as .*step=2"):
        check_format(Forgets(2), TILE, ("f32",))


@pytest.mark.parametrize("fmt", [Plain(), Labelled("a b", limit=3)])
def test_an_unregistered_format_is_checked_and_told_to_register(fmt):
    sentence = rf"{fmt.name!r} does not stand for {type(fmt).__name__}, .*register it first"
    with pytest.raises(stoicc.FormatError, match=sentence) as raised:
        check_format(fmt, TILE, ("f32",))
    assert len(str(raised.value).splitlines()) == 2  # nothing else is broken
