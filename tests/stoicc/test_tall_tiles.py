"""The tiles that a weight is cut in for a GPU where nobody says: tall ones, unless those take more bytes."""

import pytest
import torch

import stoicc
from stoicc.codegen.triton.backend import TritonBackend
from stoicc.inspector import everything, inspect_tall
from stoicc.ir.errors import InputError
from stoicc.ops.graph import CompressedWeight


def tile_of(weight: object) -> tuple[int, int]:
    made = inspect_tall(everything, weight, ["dense", "nv24"], name="w", bias=None, activation=None)
    if not isinstance(weight, CompressedWeight):
        assert torch.equal(made.to_dense(), torch.as_tensor(weight))
    return made.program.tile


def halves(rows: int) -> torch.Tensor:
    """2:4 in every second run of so many rows."""
    weight = torch.randn(256, 128).bfloat16()
    sparse = torch.arange(256) // rows % 2 == 1
    pruned = torch.tensor([False, True, True, False]).repeat(32)
    weight[sparse[:, None] & pruned] = 0
    return weight


def test_tall_where_nothing_is_lost() -> None:
    assert tile_of(torch.randn(256, 128).bfloat16()) == (128, 64)
    assert tile_of(torch.randn(256, 128).half().numpy()) == (128, 64)
    assert tile_of(halves(128)) == (128, 64)


def test_low_where_tall_ones_take_more_bytes_or_do_not_fit() -> None:
    assert tile_of(halves(64)) == (64, 64)
    assert tile_of(torch.randn(256, 128)) == (64, 64), "fp32 has no tensor cores of this kind"
    assert tile_of(torch.randn(192, 128).bfloat16()) == (64, 64)


def test_tiles_of_operators_stay() -> None:
    pruned = stoicc.ops.nm_magnitude(torch.randn(256, 128).bfloat16(), tile=(64, 64))
    assert tile_of(pruned) == (pruned.tile or (128, 64))


def test_a_library_and_a_pipeline_are_two_ways_to_say_it() -> None:
    with pytest.raises(InputError, match="expected no pipeline or schedule with library=True, found one"):
        stoicc.compile(torch.randn(64, 64), target="cpu", library=True, pipeline="build-csr")


def test_loss_is_still_refused_without_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonBackend, "available", lambda self: None)
    with pytest.raises(InputError, match="expected a tile_map with approximate=True, found none"):
        stoicc.compile(torch.randn(256, 128).bfloat16(), ["nv24"], target="cuda", approximate=True)
