"""Tile programs without tensors, built by hand and drawn by Hypothesis."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

import stoicc.formats  # noqa: F401  (registers the formats that the programs name)
from stoicc.ir.planes import entry_count, pool_name
from stoicc.ir.registry import find_format
from stoicc.ir.types import Beside, Module, Pool, Segment, TileProgram
from stoicc.passes import Pipeline

MOSAIC = ("dense", "nv24", "int4<group_size=128>", "empty")
FORMATS = (
    "dense",
    "nv24",
    "empty",
    "int4",
    "int4<group_size=0>",
    "int4<group_size=128, zero_points=true>",
    "int4_nv24<group_size=32>",
    "int8<zero_points=true>",
    "int8<group_size=0, zero_points=true>",
)


def make_program(
    shape: tuple[int, int] = (200, 300),
    tile: tuple[int, int] = (64, 64),
    formats: Sequence[str] = MOSAIC,
    tile_map: Sequence[int] | None = None,
    *,
    name: str = "w",
    dtype: str = "bf16",
    seed: int = 0,
    beside: Beside | None = None,
) -> TileProgram:
    """A program that verifies; its tile map is drawn from `seed` where none is given."""
    grid = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    chosen = np.random.default_rng(seed).integers(0, len(formats), grid) if tile_map is None else np.array(tile_map)
    chosen = chosen.reshape(grid)
    segments = []
    for index, text in enumerate(formats):
        rows, columns = np.nonzero(chosen == index)
        pools = tuple(
            Pool(
                pool_name(index, plane.name),
                plane.dtype,
                (entry_count(plane, rows, columns), *plane.shape),
                f"{index:04x}{number:012x}",
            )
            for number, plane in enumerate(find_format(text).planes(tile, dtype))
        )
        segments.append(Segment(text, rows.size, pools))
    return TileProgram(name, shape, tile, dtype, tuple(segments), tuple(chosen.ravel().tolist()), beside or Beside())


def full_beside(shape: tuple[int, int], rank: int = 4) -> Beside:
    """Everything that can stand beside the tiles of a matrix of this shape."""
    rows, columns = shape
    return Beside(
        bias=Pool("bias", "f32", (rows,), "b1"),
        low_rank=(Pool("left", "bf16", (rows, rank), "b2"), Pool("right", "bf16", (rank, columns), "b3")),
        row_permutation=Pool("row_permutation", "i32", (rows,), "b4"),
        column_permutation=Pool("column_permutation", "i32", (columns,), "b5"),
        input_scale=Pool("input_scale", "f32", (columns,), "b6"),
        output_scale=Pool("output_scale", "f32", (rows,), "b7"),
        activation="gelu",
    )


_NAMES = st.one_of(st.sampled_from(["w", "model.layers.0.q_proj"]), st.text(max_size=12))
_EXTENTS = st.one_of(st.sampled_from([1, 2, 13, 16, 97, 256, 257, 300]), st.integers(1, 700))


@st.composite
def programs(draw: st.DrawFn) -> TileProgram:
    """Programs that verify: any shape, formats, dtype, and anything beside the tiles."""
    shape = (draw(_EXTENTS), draw(_EXTENTS))
    tile = (draw(st.sampled_from([16, 32, 64])), draw(st.sampled_from([32, 64, 128])))
    formats = draw(st.lists(st.sampled_from(FORMATS), min_size=1, max_size=5, unique=True))
    everything = full_beside(shape)
    kept = draw(st.sets(st.sampled_from(list(Beside.__dataclass_fields__))))
    return make_program(
        shape,
        tile,
        formats,
        name=draw(_NAMES),
        dtype=draw(st.sampled_from(["bf16", "f32"] if "low_rank" not in kept else ["bf16"])),
        seed=draw(st.integers(0, 5)),
        beside=Beside(**{field: getattr(everything, field) for field in kept}),
    )


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    """Pipelines in a legal order that run on any program."""
    order = draw(st.sampled_from(["order{by=cost}", "order{by=item}", "order{by=row}", "order{by=none}"]))
    split = st.builds("split-k{{parts={}}}".format, st.sampled_from([1, 2, 3, 40, "auto", "balance,min_bytes=4096"]))
    steps = ["build-csr", *draw(st.sets(st.sampled_from(["drop-empty", "fuse-epilogue", "regimes{tiles=8}", order])))]
    bins = st.builds("{}{{bins={}}}".format, st.sampled_from(["balance", "build-csc"]), st.integers(1, 9))
    steps += draw(st.sets(st.one_of(split, bins), max_size=3))
    return Pipeline.ordered(steps)


@st.composite
def modules(draw: st.DrawFn) -> Module:
    """Modules with and without a schedule."""
    module = Module(draw(programs()))
    return draw(pipelines()).run(module) if draw(st.booleans()) else module
