"""The reference's h W: it goes by the transposed schedule, and by nothing else."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from stoicc.codegen.reference import ReferenceBackend
from stoicc.ir.schedule import TileCsc, Transposed
from stoicc.ir.types import Module
from stoicc.passes.base import scheduled
from stoicc.passes.build_csc import BuildCsc
from tests.codegen.cpu.mosaics import ALL_FORMATS, mosaic


def product(module: Module, pools: dict[str, torch.Tensor], h: torch.Tensor) -> torch.Tensor:
    out = torch.full((h.shape[0], module.tiles.shape[1]), torch.nan, dtype=h.dtype)
    ReferenceBackend().build(module, pools, "transposed", "error").run(h, out, torch.empty(0, dtype=torch.uint8))
    return out


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_every_format_in_float64(dtype):
    case = mosaic((130, 390), ALL_FORMATS, dtype)
    h = torch.randn(5, 130, dtype=torch.float64)
    found = product(BuildCsc(bins=3).apply(case.module), case.pools, h)
    torch.testing.assert_close(found, h @ case.weight, rtol=1e-12, atol=1e-12)


def edited(module: Module, **changes: Any) -> Module:
    """With some fields of its transposed schedule replaced."""
    schedule = scheduled(module)
    assert schedule.transposed is not None
    transposed: Transposed = replace(schedule.transposed, **changes)
    return Module(module.tiles, replace(schedule, transposed=transposed))


@pytest.fixture
def case():
    """Two dense tiles above one another, twice, of 32 x 32."""
    made = mosaic((64, 64), ("dense",))
    return replace(made, module=BuildCsc().apply(made.module))


def test_columns_that_the_schedule_leaves_out_are_not_written(case):
    h = torch.randn(2, 64)
    found = product(edited(case.module, column_order=(1,), bin_ptr=(0, 1)), case.pools, h)
    assert found[:, :32].isnan().all()
    torch.testing.assert_close(found[:, 32:].double(), h.double() @ case.weight[:, 32:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("csc", "tiles"),
    [
        (TileCsc(0, (0, 2, 4), (0, 1, 0, 1), (0, 2, 1, 3)), [[0, 1], [2, 3]]),
        (TileCsc(0, (0, 2, 4), (0, 1, 0, 1), (1, 2, 0, 3)), [[1, 0], [2, 3]]),  # other tiles
        (TileCsc(0, (0, 2, 4), (1, 0, 0, 1), (0, 2, 1, 3)), [[2, 1], [0, 3]]),  # other rows
        (TileCsc(0, (0, 1, 3), (0, 0, 1), (0, 1, 3)), [[0, 1], [None, 3]]),  # one less
    ],
)
def test_it_multiplies_the_tiles_that_the_schedule_names(case, csc, tiles):
    held = case.weight.unflatten(0, (2, 32)).unflatten(2, (2, 32)).transpose(1, 2).flatten(0, 1)
    weight = torch.cat([torch.cat([held[t] if t is not None else 0 * held[0] for t in row], 1) for row in tiles])
    h = torch.randn(2, 64, dtype=torch.float64)
    torch.testing.assert_close(product(edited(case.module, cscs=(csc,)), case.pools, h), h @ weight)
