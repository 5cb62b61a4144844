"""n:m tiles in the order in which lanes pick their columns."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

import stoicc
from stoicc.codegen.cpu.checks import tile_code
from stoicc.codegen.cpu.decode import held_packed
from stoicc.codegen.cpu.plan import classify
from stoicc.contract_kernels import run_executor
from stoicc.formats._nm_picked_c import can_pick
from stoicc.formats.dense import Dense
from stoicc.formats.nm import Nm
from stoicc.ir.dtypes import TORCH_DTYPES, bits
from stoicc.ir.format import Tile
from stoicc.ir.registry import REGISTRY
from stoicc.ir.tile_mac import TileMac
from stoicc.testing import check_format
from tests.codegen.cpu.mosaics import need

TILE = (32, 64)


def code_of(fmt: Nm, dtype: str, isa: str) -> TileMac:
    code = tile_code(fmt, TILE, dtype, isa)
    assert code is not None
    return code


@pytest.mark.parametrize(("n", "m"), [(1, 4), (1, 8), (2, 8), (1, 16), (2, 16), (3, 16), (4, 16)])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_kept_weights_stand_by_row_and_column(n, m, dtype):
    fmt = Nm(n=n, m=m)
    tiles = torch.arange(1.0, 2 * 32 * 64 + 1).view(2, *TILE).to(TORCH_DTYPES[dtype])
    held = tiles.where(fmt.keep(torch.rand(tiles.shape, generator=torch.Generator().manual_seed(0))), 0)
    packed = code_of(fmt, dtype, "avx2").pack(fmt.encode(held))
    kept, words = n * 32 // m, packed["masks"][1, 1, 1]  # of the second strip of the second tile, columns 32 to 63
    if dtype == "bf16":
        values = packed["values"].view(2, 2, 2, kept // 2, 16, 2)[1, 1, 1].transpose(1, 2).flatten(0, 1)
    else:
        values = packed["values"].view(2, 2, 2, kept, 16)[1, 1, 1]
    for row in (0, 5, 15):
        want = held[1, 16 + row, 32:]
        found = torch.zeros(32)
        for i in range(kept):
            place = int(words[row]) >> (i // 2 * 4 + i % 2 * 16) & 15
            found[i // n * m + place] = values[i, row]
        assert torch.equal(found, want.float())


def test_what_does_not_fit_a_word_of_positions_keeps_its_masks():
    for n, m in ((2, 4), (3, 8), (5, 16), (1, 32), (1, 6)):
        assert not can_pick(n, m, 64), (n, m)
        if 64 % m == 0:
            assert Nm(n=n, m=m).tile_mac((32, 64), "bf16").in_vectors is None
    assert not can_pick(2, 8, 48)


def test_matrix_units_take_masks():
    for dtype, isa, picked in (("bf16", "amx", False), ("f32", "amx", True), ("bf16", "avx512bf16", True)):
        own = Nm().tile_mac(TILE, dtype).in_vectors
        assert own is not None
        assert (code_of(Nm(), dtype, isa).source == own.source) is picked


@pytest.mark.parametrize("flipped", [1, -1])
def test_masks_that_keep_another_number_are_refused(flipped):
    planes = Nm().encode(torch.ones(1, *TILE).where(torch.arange(64) % 8 < 2, 0))
    planes["masks"] = planes["masks"] ^ 1 if flipped == 1 else torch.zeros_like(planes["masks"])
    with pytest.raises(stoicc.FormatError, match="masks that keep 2 of each 8"):
        code_of(Nm(), "f32", "avx2").pack(planes)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_row_of_two_kept_columns_comes_back(dtype):
    fmt = Nm(n=1, m=16)
    tiles = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)).to(TORCH_DTYPES[dtype])
    planes = fmt.encode(tiles.where(fmt.keep(tiles.float().abs()), 0))
    code = tile_code(fmt, (32, 32), dtype, "avx2")
    assert code is not None
    assert code.unpack is not None
    back = code.unpack(code.pack(dict(planes)), (32, 32))
    assert all(torch.equal(bits(back[name]), bits(plane)) for name, plane in planes.items())


def test_packed_planes_are_shown_to_the_instruction_set_that_they_are_packed_for(monkeypatch):
    need("avx2", monkeypatch)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    kernel = stoicc.compile(stoicc.inspect(weight, tile=TILE, tile_map=[["nm"]], approximate=True), target="cpu")
    held = kernel.to_dense()
    kernel(torch.ones(1, 64))
    assert held_packed(0, kernel.source_of_pools) is not None
    monkeypatch.setenv("STOICC_CPU_ISA", "portable")
    assert held_packed(0, kernel.source_of_pools) is None
    assert torch.equal(run_executor(kernel, "dense-once", torch.eye(64)).T, held)


class PicksOnMatrixUnits(Nm):
    """Gives what picks where matrix units would take it."""

    name: ClassVar[str] = "picks_on_matrix_units"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype).in_vectors
        assert code is not None
        return code


class InVectorsWithoutDecode(Nm):
    """Has no C for panels where no matrix units multiply."""

    name: ClassVar[str] = "in_vectors_without_decode"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        assert code.in_vectors is not None
        return replace(code, in_vectors=replace(code.in_vectors, decode="", decode_packed=""))


@pytest.fixture
def kernel_of() -> Iterator[Callable[[Nm], stoicc.Kernel]]:
    names = []

    def make(fmt: Nm) -> stoicc.Kernel:
        names.append(stoicc.register_format(fmt).name)
        weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        tiled = stoicc.inspect(weight, tile=TILE, tile_map=[[fmt.name]], approximate=True)
        return stoicc.compile(tiled, target="cpu")

    yield make
    for name in names:
        REGISTRY.unregister(name)


def test_what_picks_has_no_place_on_matrix_units(kernel_of):
    kernel = kernel_of(PicksOnMatrixUnits())
    with pytest.raises(stoicc.FormatError, match="pairs that pick in in_vectors"):
        classify(kernel.ir, torch.bfloat16, "amx")
    assert classify(kernel.ir, torch.bfloat16, "avx512bf16").pairs


def test_panels_are_decoded_where_in_vectors_has_no_c_for_them(kernel_of):
    kernel = kernel_of(InVectorsWithoutDecode())
    assert torch.equal(run_executor(kernel, "dense-once", torch.eye(64)).T, kernel.to_dense().float())


class SignlessInVectors(Dense):
    """Loses the sign of zero on the way back to canonical planes, where no matrix units multiply."""

    name: ClassVar[str] = "signless_in_vectors"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        assert code.unpack is not None
        inverse = code.unpack
        signless = replace(code, unpack=lambda packed, tile: {"values": inverse(packed, tile)["values"] + 0.0})
        return replace(code, in_vectors=signless)


class PacksInVectors(Dense):
    """Packs its planes for good where no matrix units multiply."""

    name: ClassVar[str] = "packs_in_vectors"

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac:
        code = super().tile_mac(tile, dtype)
        return replace(code, in_vectors=replace(code, unpack=None))


@pytest.mark.parametrize(
    ("cls", "said"),
    [(SignlessInVectors, "in_vectors: values of negative zero tiles"), (PacksInVectors, "in_vectors has no unpack")],
)
def test_the_contract_asks_for_the_way_back(cls, said):
    fmt = stoicc.register_format(cls())
    try:
        with pytest.raises(stoicc.FormatError, match=rf"packed planes unpack to themselves \(f32\): {said}"):
            check_format(fmt, (64, 64), ("f32",))
    finally:
        REGISTRY.unregister(fmt.name)
