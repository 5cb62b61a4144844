"""The executor of the Gluon dialect, launched through Triton's own JIT on the emulator."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stoicc.codegen.executor import Executor, Pools
from stoicc.codegen.gluon.executor import GluonTiles
from stoicc.codegen.triton import backend
from stoicc.codegen.triton.backend import TritonBackend
from stoicc.ir.format import PlaneKind
from stoicc.ir.planes import pool_name
from stoicc.ir.types import Module
from stoicc.stats import kernel_stats
from tests.codegen.gluon.test_emulated import TOLERANCE, error_of
from tests.kernel_classes import Case, KernelClass, make_case
from tests.ptx.driver import emulated

KERNEL = KernelClass("mosaic_64", (64, 64), "bf16", "same", "bias", False, 16)
SHAPE = (136, 200)


class Portable(Executor):
    """Notes what it is given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def run(self, x: Tensor, out: Tensor, workspace: Tensor) -> None:
        self.seen.append(x)

    def workspace_bytes(self, batch: int, x_dtype: torch.dtype) -> int:
        return 64


def launch(case: Case, x: Tensor, capability: int) -> tuple[Tensor, list[str]]:
    """y into poisoned memory, and the kernels that were launched."""
    executor = GluonTiles(case.module, case.pools, capability, lambda pools: Portable())
    out = torch.full((x.shape[0], case.module.tiles.shape[0]), torch.nan, dtype=x.dtype)
    workspace = torch.full((executor.workspace_bytes(x.shape[0], x.dtype),), 255, dtype=torch.uint8)
    with emulated(capability) as driver:
        executor.run(x, out, workspace)
    return out, driver.launched


@pytest.mark.parametrize(
    ("beside", "split", "kernels"),
    [
        ("bias", False, ["tiles_kernel"]),
        ("output_scale", True, ["tiles_kernel", "reduce_kernel"]),
        ("most", False, ["tiles_kernel", "reduce_kernel"]),
    ],
)
@pytest.mark.parametrize(("weight", "capability"), [("bf16", 90), ("f16", 80)])
def test_one_launch_and_one_to_end_the_work(beside, split, kernels, weight, capability) -> None:
    case = make_case(replace(KERNEL, beside=beside, split=split, weight=weight), SHAPE)
    x = torch.randn(19, SHAPE[1]).to(torch.bfloat16 if weight == "bf16" else torch.float16)
    y, launched = launch(case, x, capability)
    assert launched == kernels
    assert error_of(y, case, x) < TOLERANCE[weight]


@pytest.mark.parametrize(("beside", "weight"), [("scales", "bf16"), ("permuted", "f16"), ("all", "bf16")])
def test_what_stands_on_the_side_of_x(beside: str, weight: str) -> None:
    case = make_case(replace(KERNEL, formats="nv24", beside=beside, weight=weight, split=beside == "all"), SHAPE)
    x = torch.randn(5, SHAPE[1]).to(torch.bfloat16 if weight == "bf16" else torch.float16)
    y, launched = launch(case, x, 90)
    assert launched == ["tiles_kernel", *(["reduce_kernel"] if beside == "all" else [])]
    rounded = 1.5 if "permuted" not in beside else 1  # x times its scale is rounded as well
    assert error_of(y, case, x) < rounded * TOLERANCE[weight]


@pytest.mark.parametrize("batch", [1, 33])
def test_batches_with_other_launch_constants(batch: int) -> None:
    """One row, which a launch must not take as a constant, and more warps a program."""
    case = make_case(replace(KERNEL, tile=(128, 64)), SHAPE)
    x = torch.randn(batch, SHAPE[1]).bfloat16()
    assert error_of(launch(case, x, 90)[0], case, x) < TOLERANCE["bf16"]


def test_a_batch_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoicc.codegen.triton.launch.PARTS_BYTES", 1)
    case = make_case(replace(KERNEL, formats="nv24", beside="low_rank"), (64, 64))
    x = torch.randn(130, 64).bfloat16()
    y, launched = launch(case, x, 90)
    assert launched == ["tiles_kernel", "reduce_kernel"] * 2
    assert error_of(y, case, x) < TOLERANCE["bf16"]


def test_other_inputs_go_to_the_portable_dialect() -> None:
    case, portable = make_case(KERNEL, SHAPE), Portable()
    given: list[Pools] = []

    def make(pools: Pools) -> Executor:
        given.append(pools)
        return portable

    executor = GluonTiles(case.module, case.pools, 90, make)
    assert not given, "nothing is built before it is asked for"
    out, workspace = torch.empty(3, SHAPE[0]), torch.empty(64, dtype=torch.uint8)
    executor.run(torch.zeros(3, SHAPE[1]), out, workspace)
    assert [x.dtype for x in portable.seen] == [torch.float32]
    assert given[0].keys() == case.pools.keys()
    assert all(given[0][name] is pool for name, pool in case.pools.items()), "no copy of what is there"


def test_an_x_that_is_not_aligned() -> None:
    case = make_case(replace(KERNEL, formats="nv24"), (64, 64))
    x = torch.randn(3 * 64 + 1).bfloat16()[1:].view(3, -1)
    y, launched = launch(case, x, 90)
    assert launched == ["tiles_kernel"]
    assert error_of(y, case, x) < TOLERANCE["bf16"]


@pytest.mark.parametrize(("beside", "columns"), [("bias", 133), ("permuted", 130), ("all", 129)])
def test_rows_of_x_that_have_to_be_padded(beside: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the caller's workspace, which is poisoned, and once for all pieces of a batch."""
    monkeypatch.setattr("stoicc.codegen.triton.launch.PARTS_BYTES", 1)
    case = make_case(replace(KERNEL, beside=beside, split=beside == "all"), (70, columns))
    x = torch.randn(131 if beside == "all" else 9, columns).bfloat16()
    y, launched = launch(case, x, 90)
    assert launched == (["tiles_kernel", "reduce_kernel"] * 2 if beside == "all" else ["tiles_kernel"])
    assert error_of(y, case, x) < 1.5 * TOLERANCE["bf16"]


def test_what_it_keeps_is_counted() -> None:
    """Blobs are as large as the payload, tables small beside it; unpacked copies count as well."""
    case = make_case(replace(KERNEL, beside="plain"), (512, 512), empty=0.0)
    payload = sum(pool.nbytes for pool in case.pools.values())
    executor = GluonTiles(case.module, case.pools, 90, lambda pools: Portable())
    kept = executor.resident_bytes
    assert payload <= kept < 1.1 * payload
    case.pools.clear()
    executor.workspace_bytes(3, torch.float32)
    assert executor.resident_bytes == kept + payload


@pytest.mark.parametrize("formats", ["mosaic_64", "rows", "wide_zeros"])
def test_planes_come_back_from_blobs(formats: str) -> None:
    case = make_case(replace(KERNEL, formats=formats, split=True), (200, 520))
    packed = GluonTiles(case.module, case.pools, 90, lambda pools: Portable()).packed
    whole = packed.whole()
    shared = {name for name in case.pools if name.endswith(("scales", "zeros"))} if formats == "rows" else set()
    assert packed.names == whole.keys() == case.pools.keys() - shared - {"bias"}
    for name, plane in whole.items():
        assert plane.dtype == case.pools[name].dtype
        assert torch.equal(plane.view(torch.uint8), case.pools[name].view(torch.uint8)), name
    program = case.module.tiles
    for index, segment in enumerate(program.segments):
        planes = segment.resolve().planes(program.tile, program.dtype)
        ranges = {plane.name: (1, 2) if plane.kind is PlaneKind.TILE else (0, 1) for plane in planes}
        found = packed.entries(index, ranges)
        assert (found is None) == (not planes)
        for name, (first, last) in ranges.items():
            assert found is not None
            assert torch.equal(found[name], case.pools[pool_name(index, name)][first:last])


# ---- the choice of a dialect ----------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """An H200 as far as the choice asks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    return torch.device("cuda")


def dialect(module: Module, device: torch.device) -> str:
    return TritonBackend().dialect(module, device)


def test_the_dialect_and_why(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_case(KERNEL, SHAPE).module
    assert dialect(module, gpu) == "Gluon on the tensor cores of sm_90 for bf16 inputs, portable Triton for others"
    odd = dialect(make_case(replace(KERNEL, beside="permuted"), (64, 100)).module, gpu)
    assert odd == f"{dialect(module, gpu)}; x is permuted and padded to 104 columns before the launch"
    low = make_case(replace(KERNEL, tile=(32, 32)), SHAPE).module
    assert dialect(low, gpu).startswith("portable Triton: tiles are 32x32, four warps share tiles of 64 or 128 rows")
    for fmt in ("bitmap", "nm", "int2", "int3", "fp8", "mxfp4", "nvfp4"):
        without = make_case(replace(KERNEL, formats=fmt), SHAPE).module
        assert dialect(without, gpu).startswith(f"portable Triton: format {fmt}")
        assert dialect(without, gpu).endswith("has no fragment")
    assert module.schedule is not None
    chosen = replace(module, schedule=module.schedule.launch_with(gluon=0))
    assert dialect(chosen, gpu) == "portable Triton: the schedule says gluon = 0"
    assert dialect(module, torch.device("cpu")) == dialect(module, gpu), "before it has moved to the GPU"
    with monkeypatch.context() as amd:
        amd.setattr(torch.version, "hip", "6.4")
        assert dialect(module, gpu) == "portable Triton: Gluon's tensor cores are NVIDIA's"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert dialect(module, gpu) == "portable Triton: sm_75 has no sparse tensor cores, which begin with sm_80"
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    assert dialect(module, gpu) == "portable Triton: Triton's interpreter has no Gluon"


def test_stats_say_it() -> None:
    program = make_case(KERNEL, SHAPE).module.tiles
    why = "portable Triton: tiles are 32x32"
    assert f"runs in {why}" in str(kernel_stats(program, 0, 0, 0, why))
    assert "runs in" not in str(kernel_stats(program, 0, 0, 0))
