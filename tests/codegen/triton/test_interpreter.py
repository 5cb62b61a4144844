"""What emitted kernels compute, in Triton's interpreter, against float64 of the decoded tiles.

Run as `TRITON_INTERPRET=1 python -m pytest -m interpreter`: the variable has to be set before
triton is imported.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

import stoicc
from stoicc.codegen.triton.backend import TritonBackend
from stoicc.codegen.triton.interpreter import repair
from stoicc.formats.dense import Dense
from stoicc.ir.dtypes import DTYPE_NAMES, TORCH_DTYPES, bits
from stoicc.ir.format import Plane, PlaneKind, TritonDecode
from stoicc.ir.planes import pool_name
from stoicc.ir.registry import REGISTRY, find_format, register_format
from stoicc.ir.types import Beside, Module, Pool
from stoicc.passes import Pipeline
from tests.kernel_classes import (
    EPILOGUES,
    FURTHER,
    FURTHER_CLASSES,
    KERNEL_CLASSES,
    MIXES,
    Case,
    KernelClass,
    make_case,
    reference,
)

pytestmark = [
    pytest.mark.interpreter,
    # NumPy warns where a device overflows to infinity without a word.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative Frobenius error allowed, by output dtype."""

PLAIN = KernelClass("mosaic", (16, 16), "f32", "same", "plain", False, 16)


def check(
    case: Case,
    batch: int,
    x_dtype: torch.dtype,
    kind: str = "tiles",
    on_missing: str = "error",
    most: float | None = None,
) -> torch.Tensor:
    """Run an executor on poisoned outputs and compare; returns y."""
    rows, columns = case.module.tiles.shape
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1)).to(x_dtype)
    executor = TritonBackend().build(case.module, case.pools, kind, on_missing)
    out = torch.full((batch, rows), torch.nan, dtype=x_dtype)
    workspace = torch.full((executor.workspace_bytes(batch, x_dtype),), 255, dtype=torch.uint8)
    executor.run(x, out, workspace)
    want = reference(case, x)
    assert not out.isnan().any()
    error = (out.double() - want).norm() / want.norm().clamp_min(1e-30)
    assert error < (most or TOLERANCE[x_dtype]), f"relative error {error:.2e}"
    return out


def small(kernel: KernelClass) -> KernelClass:
    """The class at a tile that the interpreter gets through quickly."""
    return replace(
        kernel, tile=(kernel.tile[0] // 4, max(kernel.tile[1] // 4, 16 if kernel.formats in MIXES else 32)), block_n=16
    )


@pytest.mark.parametrize("kernel", KERNEL_CLASSES + FURTHER_CLASSES, ids=lambda kernel: kernel.name)
def test_every_class_multiplies(kernel: KernelClass) -> None:
    kernel = small(kernel) if kernel.tile != (32, 32) else kernel
    kernel = replace(kernel, tile=(max(kernel.tile[0], 16), kernel.tile[1]))
    check(make_case(kernel, (37, 90)), 5, kernel.x_dtype)


@pytest.mark.parametrize("formats", [*MIXES, *FURTHER])
def test_a_tile_of_64(formats: str) -> None:
    check(make_case(replace(PLAIN, formats=formats, tile=(64, 64), weight="bf16"), (65, 200)), 3, torch.bfloat16)


@pytest.mark.parametrize("shape", [(1, 1), (37, 53), (16, 16), (17, 64), (48, 31)])
@pytest.mark.parametrize("split", [False, True])
def test_tails(shape: tuple[int, int], split: bool) -> None:
    check(make_case(replace(PLAIN, split=split, beside="all"), shape), 2, torch.float32)


@pytest.mark.parametrize("batch", [1, 16, 17, 40])
@pytest.mark.parametrize("split", [False, True])
def test_batches(batch: int, split: bool) -> None:
    check(make_case(replace(PLAIN, split=split, beside="bias"), (20, 50)), batch, torch.float32)


@pytest.mark.parametrize("beside", EPILOGUES)
@pytest.mark.parametrize("kind", ["tiles", "dense-once"])
@pytest.mark.parametrize("weight", ["f32", "bf16", "f16"])
def test_what_stands_beside(beside: str, kind: str, weight: str) -> None:
    case = make_case(replace(PLAIN, beside=beside, weight=weight), (37, 53))
    check(case, 3, TORCH_DTYPES[weight], kind)


def test_split_batches_run_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the parts of a batch do not fit the workspace, pieces give the same bits as one run."""
    case = make_case(replace(PLAIN, split=True, beside="all"), (37, 53))
    whole = check(case, 40, torch.float32)
    monkeypatch.setattr("stoicc.codegen.triton.launch.PARTS_BYTES", 1)
    monkeypatch.setattr("stoicc.codegen.triton.launch.ROUND", 16)
    executor = TritonBackend().build(case.module, case.pools, "tiles", "error")
    assert executor.workspace_bytes(40, torch.float32) < 40 * 37 * 8 * 4
    assert torch.equal(check(case, 40, torch.float32), whole)


def test_panels_of_dense_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(replace(PLAIN, beside="all"), (70, 53))
    monkeypatch.setattr("stoicc.codegen.triton.dense_once.PANEL_BYTES", 2 * 16 * 53 * 4)
    executor = TritonBackend().build(case.module, case.pools, "dense-once", "error")
    assert executor.workspace_bytes(1, torch.float32) < 2 * 16 * 53 * 4 + 3 * 256 + 4 * (53 + 70 + 5)
    check(case, 3, torch.float32, "dense-once")


def test_a_format_without_a_device_decode_is_made_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(PLAIN, (37, 53))
    monkeypatch.setattr(type(find_format("nv24")), "decode_block", lambda self, tile, dtype: None)
    for kind in ("tiles", "dense-once"):
        check(case, 3, torch.float32, kind, on_missing="dense")
    assert TritonBackend().build(case.module, case.pools, "tiles", "dense").resident_bytes > 16 * 16 * 4


def test_nothing_but_empty_tiles() -> None:
    case = make_case(replace(PLAIN, beside="bias"), (20, 20), empty=1.0)
    assert case.module.schedule is not None
    assert not case.module.schedule.live
    for kind in ("tiles", "dense-once"):
        check(case, 2, torch.float32, kind)


@pytest.mark.parametrize("kind", ["tiles", "dense-once"])
@pytest.mark.parametrize("on_missing", ["error", "dense"])
def test_a_csr_of_empty_tiles_costs_nothing(kind: str, on_missing: str) -> None:
    """Without drop-empty, empty tiles have a csr and a range of each item, and no loop."""
    case = make_case(replace(PLAIN, beside="bias"), (37, 90), empty=0.5)
    assert any(segment.format == "empty" for segment in case.module.tiles.segments)
    case = replace(case, module=Pipeline.parse("build-csr,fuse-epilogue").run(Module(case.module.tiles)))
    check(case, 3, torch.float32, kind, on_missing)


def test_a_compiled_weight_with_empty_tiles_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the dispatcher, which guards a device only where x is on one."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.fail(f"guarded {device}"))
    texts = [["empty", "dense"], ["dense", "empty"]]
    tiled = stoicc.inspect(torch.randn(32, 32), tile=(16, 16), tile_map=texts, approximate=True)
    kernel = stoicc.compile(tiled, target="cuda", pipeline="build-csr,fuse-epilogue")
    x = torch.randn(3, 32)
    torch.testing.assert_close(kernel(x), x @ kernel.to_dense().T)


@pytest.mark.parametrize("kind", ["tiles", "dense-once"])
def test_pools_of_any_layout(kind: str) -> None:
    """Pools that start anywhere or are not contiguous are copied, and counted."""
    case = make_case(replace(PLAIN, beside="all", weight="bf16"), (37, 53))
    for misplace in (lambda pool: torch.cat([pool.flatten()[:1], pool.flatten()])[1:].view(pool.shape), strided):
        pools = {name: misplace(pool) for name, pool in case.pools.items()}
        check(replace(case, pools=pools), 3, torch.bfloat16, kind)
        held = [TritonBackend().build(case.module, p, kind, "error").resident_bytes for p in (case.pools, pools)]
        assert held[1] > held[0]


def strided(pool: torch.Tensor) -> torch.Tensor:
    """The same values, every other element in memory."""
    return torch.stack([pool, pool], dim=-1)[..., 0]


LARGE = torch.full((64,), 100.0)


@pytest.mark.parametrize("kind", ["tiles", "dense-once"])
@pytest.mark.parametrize(
    ("beside", "want"),
    [
        ({"output_scale": LARGE / 1e5}, 640.0),  # x W alone is 640000, past fp16
        ({"input_scale": LARGE, "output_scale": LARGE / 1e7}, 640.0),  # x times the scale is 10000
        ({"input_scale": LARGE * 10, "output_scale": LARGE / 1e8}, 640.0),  # x times the scale is 100000, past fp16
        ({"bias": LARGE * -6399.0}, 100.0),
        ({"left": LARGE[:, None], "right": LARGE[None], "bias": LARGE * -646400.0 + 1024.0}, 1024.0),
    ],
)
def test_fp16_stays_in_range_until_y(kind: str, beside: dict[str, torch.Tensor], want: float) -> None:
    plain = replace(PLAIN, formats="dense", weight="f16")
    case = make_case(plain, (64, 64), empty=0.0)
    pools = {name: torch.full_like(pool, 100.0) for name, pool in case.pools.items()} | beside
    pools |= {name: beside[name].half() for name in ("left", "right") if name in beside}
    there: Any = {n: Pool(n, DTYPE_NAMES[pools[n].dtype], tuple(pools[n].shape), "0" * 16) for n in beside}
    if "left" in there:
        there["low_rank"] = (there.pop("left"), there.pop("right"))
    placed = Beside(**there)
    module = replace(case.module, tiles=replace(case.module.tiles, beside=placed))
    executor = TritonBackend().build(module, pools, kind, "error")
    x, out = torch.full((2, 64), 100.0, dtype=torch.float16), torch.full((2, 64), torch.nan, dtype=torch.float16)
    executor.run(x, out, torch.full((executor.workspace_bytes(2, x.dtype),), 255, dtype=torch.uint8))
    assert torch.allclose(out.float(), torch.full((2, 64), want), rtol=1e-3), out[0, :4]


@pytest.mark.parametrize("beside", ["all", "low_rank", "scales"])
@pytest.mark.parametrize("weight", ["bf16", "f16"])
def test_dense_once_rounds_y_once(beside: str, weight: str) -> None:
    """What is left is the rounding of y and, with an input scale, that of the scaled x."""
    dtype = TORCH_DTYPES[weight]
    case = make_case(replace(PLAIN, beside=beside, weight=weight), (64, 256))
    rounding = torch.finfo(dtype).eps / 2
    check(case, 8, dtype, "dense-once", most=rounding * (0.5 if beside == "low_rank" else 1.0))


@triton.jit
def low_rank_items(columns, left, left_slot, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    """A dense tile times a factor, plus an offset."""
    at = tl.arange(0, BM)[:, None] * BK + tl.arange(0, BK)[None, :]
    return (tl.load(columns + at) * tl.load(left) + tl.load(left_slot)).to(DTYPE)


@dataclass(frozen=True)
class Awkward(Dense):
    """Format, planes and function named as a kernel names what it has itself."""

    name: ClassVar[str] = "low_rank"

    def planes(self, tile, dtype):
        shared = Plane("left", dtype, (1,), PlaneKind.GROUP, span=1)
        return Plane("columns", dtype, tile), shared, Plane("left_slot", dtype, (1,)), Plane("items", dtype, (1,))

    def decode(self, planes, tile, dtype):
        return planes["columns"] * planes["left"][:, :, None] + planes["left_slot"][:, :, None]

    def decode_block(self, tile, dtype):
        return TritonDecode(decode_awkward)


@triton.jit
def decode_awkward(columns, left, left_slot, items, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    return low_rank_items(columns, left, left_slot, BM, BK, DTYPE)


@pytest.mark.parametrize("kind", ["tiles", "dense-once"])
def test_planes_may_have_any_names(kind: str) -> None:
    register_format(Awkward())
    try:
        case = make_case(replace(PLAIN, formats="dense", beside="low_rank"), (37, 53), empty=0.0)
        program = case.module.tiles
        (index,) = (i for i, segment in enumerate(program.segments) if segment.format == "dense")
        segments = tuple(replace(s, format="low_rank") if i == index else s for i, s in enumerate(program.segments))
        values = case.pools[pool_name(index, "values")]
        pools = case.pools | {pool_name(index, "columns"): values}
        pools |= {pool_name(index, name): torch.rand(len(values), 1) for name in ("left", "left_slot", "items")}
        module = replace(case.module, tiles=replace(program, segments=segments))
        check(replace(case, module=module, pools=pools), 3, torch.float32, kind)
    finally:
        REGISTRY.unregister("low_rank")


@given(
    shape=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    formats=st.sampled_from(sorted(MIXES)),
    beside=st.sampled_from(sorted(EPILOGUES)),
    weight=st.sampled_from(["f32", "f16", "bf16"]),
    x=st.sampled_from(["same", "f32"]),
    split=st.booleans(),
    batch=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_any_weight(shape, formats, beside, weight, x, split, batch, seed) -> None:
    kernel = KernelClass(formats, (16, 16), weight, x, beside, split, 16)
    check(make_case(kernel, shape, seed=seed), batch, kernel.x_dtype)


# ---- device decode == reference decode ------------------------------------------------------

DECODED = sorted({text for mix in MIXES.values() for text in mix} - {"empty"})


@pytest.mark.parametrize("weight", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("text", DECODED)
@pytest.mark.parametrize("tile", [(16, 16), (16, 64)])
def test_device_decode_is_decode(text: str, weight: str, tile: tuple[int, int]) -> None:
    """Through the decode kernel: every bit of every tile, with codes and scales of any pattern."""
    fmt: Any = find_format(text)
    generator = torch.Generator().manual_seed(2)
    dtype = TORCH_DTYPES[weight]
    tiles = torch.randn(2, *tile, generator=generator).to(dtype)
    planes = fmt.approximate(tiles, torch.arange(2)).planes
    for name, plane in planes.items():
        if name in ("codes", "zeros"):
            most = 256 if name == "codes" or fmt.bits == 8 else 16
            planes[name] = torch.randint(0, most, plane.shape, generator=generator, dtype=torch.uint8)
        elif plane.is_floating_point():
            scale = torch.randint(-130, 120, plane.shape, generator=generator)
            planes[name] = torch.ldexp(torch.randn(plane.shape, generator=generator), scale).to(dtype)
    want = fmt.decode(planes, tile, weight)
    assert torch.equal(bits(run_decode(fmt.decode_block(tile, weight), fmt, planes, tile, weight)), bits(want))


def run_decode(decode: TritonDecode, fmt, planes, tile, weight: str) -> torch.Tensor:
    """Decode tile by tile with a kernel written for the number of planes."""
    repair()
    names = [plane.name for plane in fmt.planes(tile, weight)]
    rows = ", ".join(names)
    source = (
        "import triton\nimport triton.language as tl\n\n@triton.jit\n"
        f"def kernel(out, {rows}, DECODE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):\n"
        f"    tile = DECODE({rows}, BM, BK, DTYPE{''.join(f', {k}={v}' for k, v in decode.constants.items())})\n"
        "    tl.store(out + tl.arange(0, BM)[:, None] * BK + tl.arange(0, BK)[None, :], tile)\n"
    )
    from stoicc.codegen.triton import build

    kernel = build.load(f"decode_test_{abs(hash(source))}", source).kernel
    out = torch.full((2, *tile), torch.nan, dtype=TORCH_DTYPES[weight])
    device = {"f32": tl.float32, "f16": tl.float16, "bf16": tl.bfloat16}[weight]
    for index in range(2):
        kernel[(1,)](out[index], *(planes[n][index].contiguous() for n in names), decode.function, *tile, device)
    return out
