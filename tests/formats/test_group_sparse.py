"""Groups that are dropped, on matrix units: fewer columns under a scale than a tile product sums."""

import pytest
import torch

import stoicc
from tests.codegen.cpu.mosaics import need
from tests.products import assert_product

GROUPS = ["group_sparse", "group_sparse<group_size=8, zero_points=true>"]


@pytest.mark.parametrize("formats", [GROUPS, [*GROUPS, "dense", "empty"]], ids=["alone", "beside dense"])
def test_small_groups_on_matrix_units(formats, monkeypatch):
    need("amx", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 64 * len(formats), generator=generator).bfloat16()
    tiled = stoicc.inspect(weight, tile=(64, 64), tile_map=[formats] * 2, approximate=True)
    kernel = stoicc.compile(tiled, target="cpu")
    held = kernel.to_dense()
    for batch in (1, 7, 8, 17, 100):
        x = torch.randn(batch, weight.shape[1], generator=generator).bfloat16()
        assert_product(kernel(x), x, held, 4e-3)
    assert "LEAST_PAIRS = 8" in kernel.source  # few entries do not repay scaling a strip first
