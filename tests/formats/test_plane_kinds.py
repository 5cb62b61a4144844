"""Formats of a user with every kind of plane: ragged runs, shared groups, one entry a matrix."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import stoicc
from stoicc import choosing
from stoicc.ir.dtypes import TORCH_DTYPES, bits
from stoicc.ir.format import Plane, PlaneKind, Planes, Tile, TileFormat
from stoicc.ir.registry import REGISTRY
from stoicc.testing import check_format
from tests.products import assert_product


@dataclass(frozen=True)
class Nonzeros(TileFormat):
    """A bitmap and the non-zeros, as many as there are (a RAGGED plane)."""

    name: ClassVar[str] = "nonzeros"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return (Plane("mask", "u8", tile), Plane("values", dtype, (), PlaneKind.RAGGED))

    def encode(self, tiles: Tensor) -> Planes:
        mask = bits(tiles).ne(0)
        ptr = torch.cat((torch.zeros(1, dtype=torch.int64), mask.flatten(1).sum(1).cumsum(0)))
        return {"mask": mask.to(torch.uint8), "values": tiles[mask], "values_ptr": ptr}

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        mask = planes["mask"].bool()
        return torch.zeros(mask.shape, dtype=TORCH_DTYPES[dtype]).masked_scatter_(mask, planes["values"])

    def tile_bytes(self, tiles: Tensor, dtype: str) -> Tensor:
        kept = bits(tiles).ne(0).flatten(1).sum(1)
        return (tiles[0].numel() + kept * tiles.itemsize).double() if len(tiles) else torch.zeros(0).double()


@dataclass(frozen=True)
class Palette(TileFormat):
    """Indices into one table of values for the whole matrix (a MATRIX plane)."""

    name: ClassVar[str] = "palette"
    step: float = 0.25

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return (Plane("index", "u8", tile), Plane("table", "f32", (16,), PlaneKind.MATRIX))

    def encode(self, tiles: Tensor) -> Planes:
        index = (tiles.float() / self.step + 8).round().clamp(0, 15).to(torch.uint8)
        table = (torch.arange(16) - 8) * self.step
        return {"index": index, "table": table.expand(len(tiles), 16)}

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        table = planes["table"][:, None, :].expand(-1, tile[0], -1)
        return table.gather(2, planes["index"].long()).to(TORCH_DTYPES[dtype])


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> Iterator[None]:
    # several chunks for a small weight, so that what chunks share is put together again
    monkeypatch.setattr(choosing, "CHUNK_WEIGHTS", 1 << 13)
    for fmt in (Nonzeros(), Palette(), Wavering()):
        stoicc.register_format(fmt)
    yield
    for name in ("nonzeros", "palette", "wavering"):
        REGISTRY.unregister(name)


@pytest.mark.parametrize("name", ["nonzeros", "palette"])
def test_they_keep_the_contract(name):
    check_format(name)


def test_ragged_planes_from_weight_to_product(tmp_path):
    weight = torch.randn(300, 200).where(torch.rand(300, 200) < 0.1, 0)
    kernel = stoicc.compile(weight, ["nonzeros"], target="reference")
    (segment,) = kernel.program.segments
    assert sum(segment.tile_bytes) == 4096 * segment.count + 4 * int((weight != 0).sum())
    assert torch.equal(kernel.to_dense(), weight)
    x = torch.randn(3, 200)
    assert_product(kernel(x), x, weight)
    kernel.save(tmp_path / "w.safetensors")
    assert torch.equal(stoicc.load(tmp_path / "w.safetensors", target="reference").to_dense(), weight)
    on_cpu = stoicc.compile(kernel, target="cpu", on_missing="dense")
    assert_product(on_cpu(x), x, weight)


def test_one_entry_for_the_matrix():
    weight = torch.randint(-8, 8, (300, 200)) * 0.25
    kernel = stoicc.compile(weight, ["palette"], target="reference")
    assert kernel.pools["p0_table"].shape == (1, 16)
    assert torch.equal(kernel.to_dense(), weight)
    for target in ("reference", "cpu"):
        again = stoicc.compile(kernel, target=target, on_missing="dense")
        x = torch.randn(3, 200)
        assert_product(again(x), x, weight)


class Wavering(Palette):
    """Another table in every chunk."""

    name: ClassVar[str] = "wavering"

    def encode(self, tiles: Tensor) -> Planes:
        planes = super().encode(tiles)
        return {**planes, "table": planes["table"] * (1 + tiles.abs().max())}

    def reject(self, tiles: Tensor) -> Tensor:
        return torch.zeros(len(tiles), dtype=torch.bool)


def test_a_matrix_plane_that_disagrees_is_refused():
    weight = torch.randn(300, 200)
    wavering = stoicc.register_format(Wavering())
    try:
        with pytest.raises(stoicc.FormatError, match="plane table: expected one entry for the whole matrix, found"):
            stoicc.inspect(weight, [wavering])
    finally:
        REGISTRY.unregister("wavering")
