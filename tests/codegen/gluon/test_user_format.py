"""A user's format on tensor cores: one class, a decode in plain Gluon, and nothing of ours changed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import stoicc
from stoicc.codegen.gluon.compile import compile_for
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.format import Fragment, Plane, Planes, Tile, TileFormat
from stoicc.ir.fragment import Operands
from stoicc.ir.registry import REGISTRY
from stoicc.ir.types import Module
from stoicc.testing import check_format
from tests.codegen.gluon.test_emulated import TOLERANCE, error_of
from tests.kernel_classes import Case, schedule_by_hand
from tests.ptx.run import emulate

STEP = 0.25


@gluon.jit
def grid_fragment(words, DTYPE: gl.constexpr, STEP: gl.constexpr):
    """Nibble r of each half of a word is register r: (code - 8) * STEP."""
    register = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, words.type.layout))))
    shifted = words >> (register * 4)[None, None, None, :]
    return grid_value(shifted & 15, DTYPE, STEP) | grid_value((shifted >> 16) & 15, DTYPE, STEP) << 16


@gluon.jit
def grid_value(code, DTYPE: gl.constexpr, STEP: gl.constexpr):
    """The bits of one weight."""
    value = (code - 8).to(gl.float32) * STEP
    if DTYPE == "bf16":
        return value.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return value.to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF


@dataclass(frozen=True)
class Grid(TileFormat):
    """Weights that are multiples of a quarter from -2 to 1.75: a code of 4 bits each, in a byte of its own."""

    name: ClassVar[str] = "quarter_grid"

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        return (Plane("codes", "u8", tile),)

    def encode(self, tiles: Tensor) -> Planes:
        return {"codes": (tiles.float() / STEP + 8).round().clamp(0, 15).to(torch.uint8)}

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        return ((planes["codes"].float() - 8) * STEP).to(TORCH_DTYPES[dtype])

    def fragment(self, tile: Tile, dtype: str) -> Fragment | None:
        if dtype == "f32":
            return None
        return Fragment(
            4,
            lambda planes, tile: Operands(planes["codes"]),
            lambda operands, tile: {"codes": operands.values},
            decode=grid_fragment,
            constants=(("STEP", STEP),),
        )


@pytest.fixture
def grid() -> Iterator[Grid]:
    stoicc.register_format(Grid())
    yield Grid()
    REGISTRY.unregister("quarter_grid")


@pytest.mark.parametrize(("dtype", "arch"), [("bf16", "sm_90"), ("f16", "sm_80")])
def test_it_runs_on_tensor_cores_beside_built_in_formats(grid: Grid, dtype: str, arch: str) -> None:
    weight = (torch.randint(-8, 8, (128, 192)) * STEP).to(TORCH_DTYPES[dtype])
    formats = [["quarter_grid", "dense", "quarter_grid"], ["dense", "quarter_grid", "empty"]]
    tiled = stoicc.inspect(weight, tile=(64, 64), tile_map=formats, approximate=True)
    case = Case(schedule_by_hand(Module(tiled.program), 1), dict(tiled.pools))
    compiled = compile_for(case.module, weight.dtype, 8, arch)
    x = torch.randn(7, 192).to(weight.dtype)
    assert error_of(emulate(compiled, x, case.pools), case, x) < TOLERANCE[dtype]


def test_it_keeps_the_contract(grid: Grid) -> None:
    assert "tensor-core operands mean what decode gives" in check_format(grid, (64, 64), ("f16",))
