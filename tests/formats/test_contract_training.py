"""What `trainable` promises: a format that breaks it, and the sentence that says so."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

import stoicc
from stoicc.formats.dense import Dense
from stoicc.ir.dtypes import TORCH_DTYPES, bits
from stoicc.ir.format import Plane, TileFormat
from stoicc.ir.registry import REGISTRY
from stoicc.testing import check_format

TILE = (16, 16)
PROMISES = {"trained planes have gradients", "C follows planes that training changed"}


class Trained(TileFormat):
    """Any tile as it is; its values are trained."""

    name: ClassVar[str] = "test_trained"

    def planes(self, tile, dtype):
        return (Plane("values", dtype, tile), Plane("marks", "i8", (1,)))

    def encode(self, tiles):
        return {"values": tiles.clone(), "marks": torch.zeros(len(tiles), 1, dtype=torch.int8)}

    def decode(self, planes, tile, dtype):
        return planes["values"] * 1

    def trainable(self, tile, dtype):
        return ("values",)


class Scales(Trained):
    """A scale of each tile is trained too, in the dtype of the weight."""

    def planes(self, tile, dtype):
        return (*super().planes(tile, dtype), Plane("scale", dtype, (1,)))

    def encode(self, tiles):
        return {**super().encode(tiles), "scale": tiles.new_ones(len(tiles), 1)}

    def decode(self, planes, tile, dtype):
        return (planes["values"].float() * planes["scale"].float()[:, :, None]).to(TORCH_DTYPES[dtype])

    def trainable(self, tile, dtype):
        return "values", "scale"


class Curved(Scales):
    """As exponents."""

    def encode(self, tiles):
        return {**super().encode(tiles), "scale": tiles.new_zeros(len(tiles), 1)}

    def decode(self, planes, tile, dtype):
        return (planes["values"].float() * planes["scale"].float().exp()[:, :, None]).to(TORCH_DTYPES[dtype])


class Untyped(Trained):
    def trainable(self, tile, dtype):
        return "values"


class Unknown(Trained):
    def trainable(self, tile, dtype):
        return ("weights",)


class Codes(Trained):
    def trainable(self, tile, dtype):
        return ("values", "marks")


class Twice(Trained):
    def trainable(self, tile, dtype):
        return ("values", "values")


class Detached(Trained):
    def decode(self, planes, tile, dtype):
        return planes["values"].detach() * 1


class HalfDetached(Trained):
    """Half of the rows are copied past autograd."""

    def decode(self, planes, tile, dtype):
        values = planes["values"]
        return torch.cat((values[:, :8], values[:, 8:].detach()), 1)


class Doubled(Trained):
    def decode(self, planes, tile, dtype):
        return 2 * planes["values"] - planes["values"].detach()


class Numpy(Trained):
    def decode(self, planes, tile, dtype):
        return torch.from_numpy(planes["values"].float().numpy().copy()).to(TORCH_DTYPES[dtype])


class TwoFaced(Trained):
    def decode(self, planes, tile, dtype):
        values = planes["values"]
        return values + 1 if values.requires_grad else values * 1


class InPlace(Trained):
    """Writes on the plane that it is given, which a leaf of autograd refuses."""

    def decode(self, planes, tile, dtype):
        return planes["values"].mul_(1)


class Idle(Scales):
    def decode(self, planes, tile, dtype):
        return planes["values"] * 1


class Stale(Dense):
    """Holds tiles without a sign, and its C relies on that."""

    name: ClassVar[str] = "test_trained"

    def reject(self, tiles):
        return bits(tiles).lt(0).flatten(1).any(1)

    def approximate(self, tiles, slots, statistics=None):
        return (
            super()
            .approximate(tiles.abs(), slots, statistics)
            ._replace(error=(tiles.float().abs() - tiles.float()).square().flatten(1).sum(1))
        )

    def tile_mac(self, tile, dtype):
        code = super().tile_mac(tile, dtype)
        return replace(code, pack=lambda planes: code.pack({"values": planes["values"].abs()}), unpack=None)


@pytest.fixture
def register():
    yield stoicc.register_format
    if "test_trained" in REGISTRY.names():
        REGISTRY.unregister("test_trained")


@pytest.mark.parametrize("cls", [Trained, Scales, Curved])
def test_right_ones_are_tried_and_pass(register, cls):
    assert PROMISES & set(check_format(register(cls()), TILE)) == {"trained planes have gradients"}


@pytest.mark.parametrize("text", ["dense", "bitmap"])
def test_code_of_built_in_ones_is_tried(text):
    assert set(check_format(text, TILE, ("bf16",))) >= PROMISES


@pytest.mark.parametrize(
    ("cls", "sentence"),
    [
        (Untyped, r"trainable returns 'values', not a tuple of names of planes"),
        (Unknown, r"trainable names the plane 'weights', which planes\(\) does not declare"),
        (Codes, r"trainable names the plane 'marks' of i8; only planes of floats can be trained"),
        (Twice, r"trainable names a plane twice: values, values"),
        (Detached, r"decode of .* tiles gives no gradient to the plane 'values'; compute them with torch"),
        (HalfDetached, r"the gradient that decode of .* tiles gives to the plane 'values' says .* of a change"),
        (Doubled, r"the gradient that decode of .* tiles gives to the plane 'values' says .* of a change"),
        (Numpy, r"raised RuntimeError: Can't call numpy\(\) on Tensor that requires grad"),
        (TwoFaced, r"decode of .* tiles gives other bits while the plane 'values' takes gradients"),
        (InPlace, r"raised RuntimeError: a leaf Variable that requires grad is being used in an in-place"),
        (Idle, r"moving the plane 'scale' changes no tile that decode returns; leave it out of trainable"),
    ],
)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_wrong_class_is_told(register, cls, sentence, dtype):
    with pytest.raises(stoicc.FormatError, match=rf"trained planes have gradients \({dtype}\): {sentence}"):
        check_format(register(cls()), TILE, (dtype,))


def test_code_that_relies_on_what_training_changes_is_told(register):
    with pytest.raises(stoicc.FormatError) as raised:
        check_format(register(Stale()), TILE, ("f32",))
    broken = str(raised.value).splitlines()[1:]
    assert broken
    assert all(line.startswith("  C follows planes that training changed (f32): ") for line in broken)
    assert "tiles whose trained planes changed, times the identity (tiles), differ from decode" in str(raised.value)
