"""Scheduled modules built by hand, with their pools and the matrix that they mean in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stoicc.formats  # noqa: F401  registers the built-in formats
from stoicc.codegen.cpu.build import able_instruction_sets
from stoicc.ir.dtypes import DTYPE_NAMES, TORCH_DTYPES, output_dtype
from stoicc.ir.format import PlaneKind
from stoicc.ir.planes import plane_slots, pool_name, tile_planes
from stoicc.ir.registry import find_format
from stoicc.ir.schedule import EPILOGUE, PROLOGUE, Schedule, TileCsr
from stoicc.ir.types import Beside, Module, Pool, Segment, TileProgram

BOUNDS = {"f32": 1e-5, "f16": 2e-3, "bf16": 1e-2}
ALL_FORMATS = (
    "empty",
    "dense",
    "nv24",
    "int8<group_size=16, zero_points=true>",
    "int4<group_size=128>",
    "int4<group_size=32, zero_points=true>",
    "int4_nv24",
    "int4_nv24<group_size=16, zero_points=true>",
    "int2",
    "int3<group_size=16, zero_points=true>",
)


@dataclass(frozen=True)
class Mosaic:
    """A module, its pools, and W as float64 `[M, K]` in the order of the tiles."""

    module: Module
    pools: dict[str, Tensor]
    weight: Tensor

    def expected(self, x: Tensor) -> Tensor:
        """y in float64; x is taken as it is."""
        beside, x = self.module.tiles.beside, x.double()
        get = lambda pool: self.pools[pool.name].double()  # noqa: E731
        inputs = x * get(beside.input_scale) if beside.input_scale else x
        if beside.column_permutation:
            inputs = inputs[:, self.pools[beside.column_permutation.name].long()]
        y = inputs @ self.weight.T
        if beside.row_permutation:
            y = torch.empty_like(y).index_copy_(1, self.pools[beside.row_permutation.name].long(), y)
        if beside.output_scale:
            y = y * get(beside.output_scale)
        if beside.low_rank:
            y = y + x @ get(beside.low_rank[1]).T @ get(beside.low_rank[0]).T
        y = y + get(beside.bias) if beside.bias else y
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "relu": torch.relu,
            "gelu": torch.nn.functional.gelu,
            "silu": torch.nn.functional.silu,
        }
        functions["gelu_tanh"] = lambda v: torch.nn.functional.gelu(v, approximate="tanh")
        return functions[beside.activation](y) if beside.activation else y


def mosaic(
    shape: tuple[int, int],
    formats: tuple[str, ...] = ALL_FORMATS,
    dtype: str = "f32",
    tile: tuple[int, int] = (32, 32),
    beside: tuple[str, ...] = (),
    activation: str | None = None,
    parts: int = 1,
    bins: int | None = None,
    rank: int = 5,
    seed: int = 0,
) -> Mosaic:
    """A matrix whose tiles have the given formats in random places, and a schedule for it."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    grid = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    tile_map = rng.integers(0, len(formats), grid)
    pools: dict[str, Tensor] = {}
    segments = tuple(_segment(i, text, tile_map, shape, tile, dtype, pools) for i, text in enumerate(formats))
    beside_ = _beside(beside, activation, shape, dtype, rank, pools)
    flat = tuple(int(s) for s in tile_map.flatten())
    program = TileProgram("w", shape, tile, dtype, segments, flat, beside_)
    module = Module(program, _schedule(program, tile_map, parts, bins))
    return Mosaic(module, pools, _weight(program, tile_map, pools))


def need(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Force an instruction set, or skip the test where this machine has not got it."""
    if isa not in able_instruction_sets():
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("STOICC_CPU_ISA", isa)


def run(executor, x: Tensor, weight_dtype: str, rows: int) -> Tensor:
    """y of an executor; out and workspace are poisoned first."""
    out = torch.full((x.shape[0], rows), torch.nan, dtype=output_dtype(weight_dtype, x.dtype))
    workspace = torch.full((executor.workspace_bytes(x.shape[0], x.dtype),), 255, dtype=torch.uint8)
    executor.run(x, out, workspace)
    return out


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error; NaN anywhere gives NaN, which passes no bound."""
    norm = expected.norm()
    return float((y.double() - expected).norm() / (norm if norm > 0 else 1))


def _segment(index, text, tile_map, shape, tile, dtype, pools) -> Segment:
    fmt = find_format(text)
    rows, columns = np.nonzero(tile_map == index)
    tiles = torch.randn(rows.size, *tile).to(TORCH_DTYPES[dtype])
    for t, (row, column) in enumerate(zip(rows, columns, strict=True)):
        tiles[t, max(shape[0] - row * tile[0], 0) :] = 0
        tiles[t, :, max(shape[1] - column * tile[1], 0) :] = 0
    planes = fmt.planes(tile, dtype)
    shared = next((plane for plane in planes if plane.kind is PlaneKind.GROUP), None)
    slots = np.arange(rows.size) if shared is None else plane_slots(shared, rows, columns)
    encoded = fmt.approximate(tiles, torch.from_numpy(slots)).planes
    described = []
    for plane in planes:
        entries = np.unique(plane_slots(plane, rows, columns), return_index=True)[1]
        name = pool_name(index, plane.name)
        pools[name] = encoded[plane.name][torch.from_numpy(entries)].contiguous()
        described.append(_pool(name, pools[name]))
    return Segment(text, rows.size, tuple(described))


def _beside(names, activation, shape, dtype, rank, pools) -> Beside:
    def put(name: str, value: Tensor) -> Pool:
        pools[name] = value
        return _pool(name, value)

    float_dtype = TORCH_DTYPES[dtype]
    make: dict[str, Callable[[], Any]] = {
        "bias": lambda: put("bias", torch.randn(shape[0]).to(float_dtype)),
        "output_scale": lambda: put("output_scale", (torch.rand(shape[0]) + 0.5).to(float_dtype)),
        "input_scale": lambda: put("input_scale", (torch.rand(shape[1]) + 0.5).to(float_dtype)),
        "row_permutation": lambda: put("row_permutation", torch.randperm(shape[0])),
        "column_permutation": lambda: put("column_permutation", torch.randperm(shape[1])),
        "low_rank": lambda: (
            put("left", torch.randn(shape[0], rank).to(float_dtype)),
            put("right", torch.randn(rank, shape[1]).to(float_dtype)),
        ),
    }
    return Beside(**{name: make[name]() for name in names}, activation=activation)


def _pool(name: str, value: Tensor) -> Pool:
    return Pool(name, DTYPE_NAMES[value.dtype], tuple(value.shape), "")


def _schedule(program, tile_map, parts, bins) -> Schedule:
    live = tuple(i for i, segment in enumerate(program.segments) if segment.format != "empty")
    csrs = []
    for segment in live:
        rows, columns = np.nonzero(tile_map == segment)
        ptr = np.searchsorted(rows, np.arange(program.grid[0] + 1))
        csrs.append(TileCsr(segment, tuple(int(p) for p in ptr), tuple(int(c) for c in columns)))
    fused = [tuple(n for n in names if getattr(program.beside, n) is not None) for names in (PROLOGUE, EPILOGUE)]
    order = tuple(range(program.grid[0]))
    schedule = Schedule(live, order, tuple(csrs), prologue=fused[0], epilogue=fused[1]).split_k(parts)
    return schedule if bins is None else schedule.balance(bins)


def _weight(program, tile_map, pools) -> Tensor:
    (rows, columns), (height, width) = program.grid, program.tile
    full = torch.zeros(rows, columns, height, width, dtype=torch.float64)
    for index, segment in enumerate(program.segments):
        where = torch.from_numpy(tile_map == index)
        fmt = segment.resolve()
        if segment.count and fmt.planes(program.tile, program.dtype):
            full[where] = fmt.decode(tile_planes(program, index, pools), program.tile, program.dtype).double()
    matrix = full.permute(0, 2, 1, 3).reshape(rows * height, columns * width)
    return matrix[: program.shape[0], : program.shape[1]].contiguous()
