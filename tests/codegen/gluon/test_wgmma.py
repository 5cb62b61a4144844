"""Products of warpgroups: kernels compiled for sm_90, run on the emulator against float64, and wrong ones caught."""

import re
from dataclasses import dataclass, replace
from itertools import combinations

import pytest
import torch

from stoicc.codegen.gluon import launch
from stoicc.codegen.gluon.compile import Compiled, compile_for
from stoicc.codegen.gluon.emit import emit
from stoicc.codegen.gluon.launch import GluonConfig, loops_of, without_wgmma
from stoicc.codegen.triton.compile_check import ptxas_notes
from tests.codegen.gluon.test_emulated import TOLERANCE, error_of
from tests.codegen.gluon.test_executor import launch as launched
from tests.kernel_classes import Case, KernelClass, make_case
from tests.ptx.program import EmulationError
from tests.ptx.run import Mutation, emulate

pytestmark = pytest.mark.skipif(not launch.HAS_WGMMA, reason="wgmma needs triton 3.9")


@dataclass(frozen=True)
class Wide:
    """A class for large batches: its kernel, the shape of a weight and slots of the ring."""

    kernel: KernelClass
    shape: tuple[int, int]
    stages: int

    def value(self, parameter: str) -> object:
        return getattr(self, parameter) if hasattr(self, parameter) else getattr(self.kernel, parameter)


def wide(formats, tile, weight, beside, split, block_n, shape, stages) -> Wide:
    return Wide(KernelClass(formats, tile, weight, "same", beside, split, block_n), shape, stages)


PARAMETERS: dict[str, tuple[object, ...]] = {
    "formats": ("dense", "nv24", "int8", "int4_nv24", "wide_zeros", "mosaic"),
    "tile": ((64, 64), (64, 128), (128, 64), (128, 128)),
    "weight": ("bf16", "f16"),
    "block_n": (64, 128, 256),
    "stages": (2, 4),
}
COVER = (
    wide("dense", (64, 64), "bf16", "bias", False, 256, (200, 456), 4),
    wide("nv24", (128, 64), "f16", "gelu", False, 256, (200, 712), 4),
    wide("mosaic", (64, 128), "f16", "bias", True, 64, (200, 456), 4),
    wide("wide_zeros", (128, 128), "bf16", "plain", False, 64, (130, 296), 2),
    wide("int8", (128, 64), "bf16", "low_rank", False, 128, (128, 136), 4),
    wide("int4_nv24", (64, 64), "f16", "rows", False, 128, (70, 517), 2),
    wide("dense", (128, 128), "f16", "most", True, 128, (200, 456), 2),
    wide("dense", (64, 128), "bf16", "gelu", False, 64, (128, 128), 2),
    wide("dense", (128, 64), "f16", "plain", False, 64, (64, 72), 4),
    wide("nv24", (64, 64), "bf16", "output_scale", True, 64, (200, 456), 2),
    wide("nv24", (64, 128), "bf16", "low_rank", False, 128, (200, 456), 4),
    wide("nv24", (128, 128), "f16", "bias", False, 128, (300, 72), 4),
    wide("nv24", (64, 64), "bf16", "bias", False, 256, (300, 72), 2),
    wide("int8", (64, 64), "f16", "bias", False, 64, (200, 456), 2),
    wide("int8", (64, 128), "bf16", "rows", True, 64, (200, 456), 4),
    wide("int8", (128, 128), "f16", "plain", False, 64, (200, 456), 4),
    wide("int4_nv24", (128, 64), "bf16", "most", True, 64, (200, 456), 4),
    wide("int4_nv24", (64, 128), "bf16", "plain", False, 64, (200, 456), 2),
    wide("int4_nv24", (128, 128), "f16", "gelu", False, 64, (200, 456), 4),
    wide("wide_zeros", (64, 64), "f16", "bias", True, 128, (200, 456), 4),
    wide("wide_zeros", (64, 128), "f16", "gelu", False, 64, (200, 456), 4),
    wide("wide_zeros", (128, 64), "bf16", "rows", False, 128, (200, 456), 2),
    wide("mosaic", (64, 64), "bf16", "low_rank", False, 128, (200, 456), 2),
    wide("mosaic", (128, 64), "bf16", "most", True, 128, (200, 712), 4),
    wide("mosaic", (128, 128), "bf16", "plain", False, 64, (300, 400), 4),
)
"""Classes in which any two values occur together, but for what registers and shared memory forbid."""

FAST = COVER[:6]
"""What runs in every test run: every value of every parameter."""


def possible(pair: dict[str, object]) -> bool:
    """Sums that are scaled leave registers for 128 rows of the batch, 64 where tiles are wide; wide tiles leave shared
    memory for 128."""
    plain, wide_tile = pair.get("formats", "dense") in ("dense", "nv24"), pair.get("tile") in ((64, 128), (128, 128))
    refused = [256] if wide_tile or not plain else []
    return pair.get("block_n") not in (refused if plain or not wide_tile else [128, 256])


@pytest.fixture(autouse=True)
def _no_triton_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled_class(chosen: Wide) -> tuple[Case, Compiled]:
    case, kernel = make_case(chosen.kernel, chosen.shape), chosen.kernel
    config = GluonConfig(kernel.block_n, kernel.tile[0] // 16, chosen.stages, True)
    return case, compile_for(case.module, kernel.x_dtype, kernel.block_n, "sm_90", config)


@pytest.mark.parametrize(
    "chosen",
    [pytest.param(c, id=f"{c.kernel.name}-s{c.stages}", marks=[] if c in FAST else pytest.mark.slow) for c in COVER],
)
def test_class_equals_the_reference(chosen: Wide) -> None:
    """The result, and that products are on their way while the next operands are loaded."""
    case, compiled = compiled_class(chosen)
    assert all(kernel.machine().spills_in_loops == 0 for kernel in compiled.kernels)
    assert "C7515" not in ptxas_notes(compiled.kernels[0].ptx, "sm_90")
    block_n = chosen.kernel.block_n
    batch = block_n + 3 if block_n == 64 else block_n - 5  # a tail, and for narrow blocks two of them
    x = torch.randn(batch, chosen.shape[1]).to(chosen.kernel.x_dtype)
    assert error_of(emulate(compiled, x, case.pools), case, x) < TOLERANCE[chosen.kernel.weight]


def test_classes_cover_every_pair_that_is_possible_and_fast_ones_every_value() -> None:
    for a, b in combinations(PARAMETERS, 2):
        found = {(chosen.value(a), chosen.value(b)) for chosen in COVER}
        pairs = {(u, v) for u in PARAMETERS[a] for v in PARAMETERS[b] if possible({a: u, b: v})}
        assert pairs <= found, (a, b, pairs - found)
    for name, values in PARAMETERS.items():
        assert {chosen.value(name) for chosen in FAST} == set(values), name


# ---- faults ---------------------------------------------------------------------------------


KERNEL = KernelClass("mosaic_64", (64, 64), "bf16", "same", "bias", False, 64)
SHAPE = (130, 840)


@pytest.fixture(scope="module")
def mosaic() -> tuple[Case, Compiled]:
    return compiled_class(Wide(KERNEL, SHAPE, 4))


def is_caught(case: Case, compiled: Compiled, mutate: Mutation | None) -> bool:
    x = torch.randn(67, SHAPE[1]).bfloat16()
    try:
        return not error_of(emulate(compiled, x, case.pools, mutate), case, x) < TOLERANCE["bf16"]
    except EmulationError:
        return True


def substitute(pattern: str, by: str, count: int = 0) -> Mutation:
    return lambda ptx: re.sub(pattern, by, ptx, count=count)


SWIZZLED = str((1 << 62) + (64 << 32) + (1 << 16))
MUTATIONS: dict[str, Mutation] = {
    "waits for one product too few": substitute(r"(wgmma\.wait_group\.sync\.aligned) 1;", r"\1 2;"),
    "does not wait where a loop ends": substitute(r"wgmma\.wait_group\.sync\.aligned 0;", ""),
    "no fence of registers": substitute(r"wgmma\.fence\.sync\.aligned;", ""),
    "no fence of shared memory": substitute(r"fence\.proxy\.async\.shared::cta;", ""),
    "a group is not closed": substitute(r"wgmma\.commit_group\.sync\.aligned;", ""),
    "waits for one copy too few": substitute(r"cp\.async\.wait_group 1;", "cp.async.wait_group 2;"),
    "no barrier before a tile is read": substitute(r"bar\.sync\s+0;", ""),
    "sparsity selector of the other half": substitute(r"(mma_async\.sp[^;]*), 1, 1, 1, 1, 0;", r"\1, 0, 1, 1, 1, 0;"),
    "x of another half": substitute(str(int(SWIZZLED) + 4), SWIZZLED),
    "x of another 16 columns": substitute(r"add\.s64 b1, b0, 2;", "add.s64 b1, b0, 0;"),
    "rows of x too close": substitute(SWIZZLED, str(int(SWIZZLED) - (32 << 32))),
    "x not swizzled": substitute(SWIZZLED, str(int(SWIZZLED) - (1 << 62))),
    "registers of the weights swapped": substitute(r"(mma_async[^{]*\{[^}]*\}, \{)(%r\d+), (%r\d+)", r"\1\3, \2"),
    "registers of the sums swapped": substitute(r"(mma_async[^{]*\{)(%r\d+), (%r\d+)", r"\1\3, \2"),
    "sums of a product replaced": substitute(r"(mma_async[^;]*b1), 1, 1, 1, 0;", r"\1, 0, 1, 1, 0;"),
}  # fmt: skip


def test_the_kernel_as_it_is_passes(mosaic: tuple[Case, Compiled]) -> None:
    assert not is_caught(*mosaic, None)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_instruction_is_caught(name: str, mosaic: tuple[Case, Compiled]) -> None:
    assert is_caught(*mosaic, MUTATIONS[name])


def test_a_slot_that_is_filled_while_a_product_reads_it_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies as far ahead as those of `mma`."""
    for module in ("emit", "ring"):
        monkeypatch.setattr(f"stoicc.codegen.gluon.{module}.ahead", lambda shape: "STAGES - 1")
    assert is_caught(*compiled_class(Wide(replace(KERNEL, formats="dense"), SHAPE, 4)), None)


# ---- the choice -----------------------------------------------------------------------------


def test_it_is_off_unless_asked_for() -> None:
    module = make_case(KERNEL, (256, 256)).module
    loops = loops_of(module)
    assert not GluonConfig.choose(4096, module, loops, 90).wgmma
    assert without_wgmma(90, 4096, {}) == "the schedule does not say wgmma = 1, and no GPU has confirmed it yet"
    asked = {"wgmma": 1}
    assert without_wgmma(90, 4096, asked) is None
    assert without_wgmma(80, 4096, asked) == "sm_80 has no wgmma, which sm_90 alone has"
    assert without_wgmma(90, 63, asked) == "it begins at a batch of 64"


def test_launch_constants() -> None:
    for formats, batch, given, want in (
        ("nv24", 4096, {}, GluonConfig(256, 8, 4, True)),
        ("nv24", 64, {}, GluonConfig(64, 8, 4, True)),
        ("nv24", 4096, {"block_n": 128}, GluonConfig(128, 8, 4, True)),
        ("int4", 4096, {}, GluonConfig(128, 8, 4, True)),
        ("nv24", 63, {}, GluonConfig(64, 8, 2)),
    ):
        module = make_case(replace(KERNEL, formats=formats, tile=(128, 64)), (256, 256)).module
        assert GluonConfig.choose(batch, module, loops_of(module), 90, {"wgmma": 1, **given}) == want
    wide = make_case(replace(KERNEL, formats="dense", tile=(128, 256)), (256, 512)).module
    assert GluonConfig.choose(4096, wide, loops_of(wide), 90, {"wgmma": 1}) == GluonConfig(64, 8, 2, True)


def test_warpgroups(golden) -> None:
    module = make_case(replace(KERNEL, tile=(128, 64)), (200, 456)).module
    text = emit(module, loops_of(module), 8, True).source
    assert max(map(len, text.splitlines())) <= 120
    golden(text)


@pytest.mark.parametrize(
    ("batch", "kernels"), [(70, ["tiles_kernel", "reduce_kernel"]), (5, ["tiles_kernel", "reduce_kernel"])]
)
def test_the_executor_launches_it(batch: int, kernels: list[str]) -> None:
    case = make_case(replace(KERNEL, formats="nv24", split=True), (64, 136))
    assert case.module.schedule is not None
    module = replace(case.module, schedule=case.module.schedule.launch_with(wgmma=1))
    x = torch.randn(batch, 136).bfloat16()
    y, names = launched(Case(module, case.pools), x, 90)
    assert names == kernels
    assert error_of(y, case, x) < TOLERANCE["bf16"]
