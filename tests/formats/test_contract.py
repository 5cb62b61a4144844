"""Every built-in format, at several parameters and tile shapes, through the one contract suite."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import stoicc
from stoicc.formats.dense import Dense
from stoicc.ir.dtypes import bits
from stoicc.ir.format import Approximation, Plane, Planes, Tile, TileFormat
from stoicc.ir.registry import REGISTRY
from stoicc.testing import CHECKS, check_format
from tests.products import assert_product

AFFINE = ("int8", "int4", "int4_nv24")
GROUPS = (16, 64, 128, 0)
NARROW = [
    *(f"int2<group_size={size}>" for size in (16, 64)),
    "int2<group_size=0, zero_points=true>",
    *(f"int3<group_size={size}>" for size in (32, 0)),
    "int3<group_size=16, zero_points=true>",
    "fp8",
    "fp8<kind=e5m2, group_size=32>",
    "mxfp4",
    "nvfp4",
    "nm",
    "nm<n=1, m=4>",
]
COMPOSED = [
    "masked",
    "masked<values=int4<group_size=16, zero_points=true>>",
    "masked<values=int8<group_size=0>>",
    "masked<mask=nv24, values=int8<group_size=32, zero_points=true>>",
    "masked<mask=nm<n=3, m=16>, values=int2<group_size=16>>",
    "masked<mask=nm, values=fp8>",
    "masked<values=fp8<kind=e5m2, group_size=16>>",
    "masked<mask=nv24, values=mxfp4>",
    "masked<mask=nm, values=int4>",
    "masked<mask=nm<n=1, m=4>, values=int2<zero_points=true>>",
    "masked<mask=nm<n=4, m=16>, values=int8<group_size=0>>",
    "masked<mask=nv24, values=int4<group_size=32, zero_points=true>>",
    "masked<mask=nv24, values=nvfp4>",
    "group_sparse",
    "group_sparse<group_size=32, zero_points=true>",
    "outlier",
    "outlier<values=int3<group_size=16, zero_points=true>, share=0.05>",
    "outlier<values=fp8<group_size=32>>",
]
FORMATS = [
    "empty",
    "dense",
    "nv24",
    "bitmap",
    *(f"{name}<group_size={size}>" for name in AFFINE for size in GROUPS),
    *(f"{name}<group_size={size}, zero_points=true>" for name in AFFINE for size in (64, 0)),
    *NARROW,
    *COMPOSED,
]


def untried(text: str) -> set[str]:
    """Promises of device code that cannot be checked on a machine without a GPU, or that the format has not made."""
    c_code = {"C multiply equals decode", "C panel decode equals decode", "packed planes unpack to themselves"}
    if text != "empty":  # runs of their own length are in the order of lanes as they are
        c_code = {"packed planes unpack to themselves"} if text == "bitmap" else set()
    on_gpu = torch.cuda.is_available() and text != "empty"
    tensor_cores = (
        text not in ("empty", "bitmap", *COMPOSED, *NARROW) and "=16" not in text
    )  # a product sums 32 columns that share a scale
    trained = text.startswith(("dense", "nv24", "bitmap", "nm", "outlier"))
    return (
        c_code
        | (set() if trained else {"trained planes have gradients", "C follows planes that training changed"})
        | (set() if on_gpu else {"Triton decode_block equals decode"})
        | (set() if tensor_cores else {"tensor-core operands mean what decode gives"})
    )


@pytest.mark.parametrize("text", FORMATS)
def test_built_in_formats_keep_the_contract(text):
    # groups of 128 are shared as those of a row are, and the further formats differ little by dtype: one is enough
    dtypes = ("bf16",) if "=128" in text or text in (*NARROW, *COMPOSED) else ("f32", "f16", "bf16")
    assert check_format(text, dtypes=dtypes) == tuple(name for name in CHECKS if name not in untried(text))


@pytest.mark.parametrize("tile", [(16, 16), (32, 128)])
@pytest.mark.parametrize(
    "text", ["empty", "dense", "nv24", "bitmap", "int4<group_size=16>", "int8<group_size=0>", "int4_nv24<group_size=0>"]
)
def test_contract_at_other_tiles(text, tile):
    check_format(text, tile, ("bf16",))


def test_every_registered_format_is_under_contract():
    assert set(stoicc.formats()) == {text.partition("<")[0] for text in FORMATS}


@dataclass(frozen=True)
class Ternary(TileFormat):
    """A user's smallest useful format: signs and one scale per tile, no device code."""

    name: ClassVar[str] = "ternary"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return (Plane("signs", "i8", tile), Plane("scale", dtype, (1,)))

    def encode(self, tiles: Tensor) -> Planes:
        return {"signs": tiles.sign().to(torch.int8), "scale": tiles.abs().amax((1, 2)).view(-1, 1)}

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        return planes["signs"].to(planes["scale"].dtype) * planes["scale"][:, :, None]


@pytest.fixture
def ternary():
    stoicc.register_format(Ternary())
    yield
    REGISTRY.unregister("ternary")


def test_a_users_format_in_one_class(ternary):
    check_format("ternary")
    weight = torch.randn(100, 130).sign() * 0.3
    kernel = stoicc.compile(weight, ["ternary"], target="reference")
    assert torch.equal(kernel.to_dense(), weight)
    x = torch.randn(7, 130)
    assert_product(kernel(x), x, weight)


def test_missing_device_code_is_an_error_or_dense_on_request(ternary):
    weight = torch.randn(100, 130).sign() * 0.3
    with pytest.raises(stoicc.FormatError, match=r"format ternary: expected code for target 'cpu', found none; give"):
        stoicc.compile(weight, ["ternary"], target="cpu")
    kernel = stoicc.compile(weight, ["ternary"], target="cpu", on_missing="dense")
    x = torch.randn(7, 130)
    assert_product(kernel(x), x, weight)
    assert kernel.stats().packed_bytes >= weight.nbytes


class Forgetful(Dense):
    """Drops the sign of zero, and says that it does not."""

    name: ClassVar[str] = "forgetful"

    def encode(self, tiles: Tensor) -> Planes:
        return {"values": tiles + 0.0}


class Misdeclared(Dense):
    """Encodes another dtype than it declares."""

    name: ClassVar[str] = "misdeclared"

    def encode(self, tiles: Tensor) -> Planes:
        return {"values": tiles.double()}

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        return planes["values"].float()


class Boastful(Dense):
    """Loses half of every weight, and reports no error."""

    name: ClassVar[str] = "boastful"

    def reject(self, tiles: Tensor) -> Tensor:
        return bits(tiles).flatten(1).ne(0).any(1)

    def encode(self, tiles: Tensor) -> Planes:
        return {"values": tiles / 2}

    def approximate(self, tiles: Tensor, slots: Tensor, statistics: Tensor | None = None) -> Approximation:
        return Approximation(self.encode(tiles), torch.zeros(len(tiles)))


class Shy(Dense):
    """Rejects everything and gives no reason."""

    name: ClassVar[str] = "shy"

    def reject(self, tiles: Tensor) -> Tensor:
        return torch.ones(len(tiles), dtype=torch.bool)

    def why(self, tile: Tensor) -> str:
        return "no"


@pytest.mark.parametrize(
    ("fmt", "promise"),
    [
        (Forgetful(), "negative zero tiles are accepted but come back with other bits"),
        (Misdeclared(), "declared f32 but encoded as torch.float64"),
        (Boastful(), r"approximate reports the error of random tiles as \[0.0, 0.0, 0.0\], measured"),
        (Shy(), "every format holds zeros"),
        (Shy(), "should say what was expected and found"),
    ],
)
def test_broken_promises_are_named(fmt, promise):
    with pytest.raises(stoicc.FormatError, match=promise):
        check_format(fmt, dtypes=("f32",))
