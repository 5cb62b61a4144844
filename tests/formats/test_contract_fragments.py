"""The promise of tensor-core operands: formats that break it, and the sentence that says so."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

import stoicc
from stoicc.formats.dense import Dense
from stoicc.formats.int4 import Int4
from stoicc.formats.nv24 import Nv24
from stoicc.ir.format import Fragment, Planes, Tile
from stoicc.ir.fragment import Operands
from stoicc.ir.registry import REGISTRY
from stoicc.testing import check_format


def changed_operands(change):
    def wrap(fragment):
        return replace(fragment, operands=lambda planes, tile: change(fragment.operands(planes, tile)))

    return wrap


def doubled(operands):
    return replace(operands, scales=operands.scales * 2)


def other_positions(operands):
    return replace(operands, positions=operands.positions ^ 0x55)


def signless(fragment: Fragment) -> Fragment:
    """Planes come back without the sign of zero."""

    def planes(operands: Operands, tile: Tile) -> Planes:
        return {name: plane + 0.0 for name, plane in fragment.planes(operands, tile).items()}

    return replace(fragment, planes=planes)


BROKEN = [
    (
        Dense,
        changed_operands(lambda o: replace(o, values=o.values.roll(1, 2))),
        "operands of random tiles are not what",
    ),
    (Dense, signless, "values of negative zero tiles becomes operands and comes back with other bits"),
    (Nv24, changed_operands(other_positions), "operands of 2:4 tiles are not what"),
    (Int4, changed_operands(doubled), "scales of 4-bit whole tiles becomes operands"),
    (Int4, changed_operands(lambda o: replace(o, values=15 - o.values)), "operands of 4-bit whole tiles are not what"),
]


@pytest.fixture
def unregister() -> Iterator[None]:
    yield
    if "changed" in REGISTRY.names():
        REGISTRY.unregister("changed")


@pytest.mark.parametrize(("base", "change", "sentence"), BROKEN)
def test_a_broken_promise_is_named(base, change, sentence, unregister):
    def fragment(self, tile, dtype):
        given = base.fragment(self, tile, dtype)
        return None if given is None else change(given)

    Changed = type("Changed", (base,), {"name": "changed", "fragment": fragment})
    stoicc.register_format(Changed())
    with pytest.raises(stoicc.FormatError, match=rf"tensor-core operands mean what decode gives \(bf16\): {sentence}"):
        check_format(Changed(), (64, 64), ("bf16",))


def test_built_in_fragments_are_of_16_bit_weights():
    assert "tensor-core operands mean what decode gives" in check_format("dense", (64, 64), ("f16",))
    assert "tensor-core operands mean what decode gives" not in check_format("dense", (64, 64), ("f32",))
