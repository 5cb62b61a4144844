"""The GPU's cost model counts instructions in the code that would run: of the dialect that is chosen."""

from dataclasses import replace

import pytest

from stoicc.codegen.gluon.launch import GluonConfig, loops_of
from stoicc.gpu_model import CompiledCode
from stoicc.ir.types import Beside, Module
from stoicc.passes import default_pipeline
from stoicc.passes.cost_gpu import GPUS, GpuCostModel
from tests.ir.modules import full_beside, make_program
from tests.kernel_classes import KernelClass, make_case

KERNEL = KernelClass("mosaic_64", (128, 64), "bf16", "same", "bias", False, 16)


@pytest.fixture(autouse=True)
def _no_triton_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def portable(module: Module) -> Module:
    assert module.schedule is not None
    return replace(module, schedule=module.schedule.launch_with(gluon=0))


def test_instructions_are_those_of_the_dialect_that_runs() -> None:
    module, code = make_case(KERNEL, (256, 512)).module, CompiledCode("H200")
    ours, plain = code(module, 16, "bf16"), code(portable(module), 16, "bf16")
    assert ours is not None
    assert plain is not None
    assert module.schedule is not None
    names = [module.tiles.segments[csr.segment].format.partition("<")[0] for csr in module.schedule.csrs]
    assert "dense" in names
    for name, least, most in zip(names, ours.tile_instructions, plain.tile_instructions, strict=True):
        assert 0 < least <= most, name
        if name != "dense":  # nothing is decoded there: the dialects may take as many
            assert least < most, name
    assert ours.block_n == plain.block_n == 16


def test_inputs_that_the_dialect_does_not_take_are_counted_in_the_other() -> None:
    module, code = make_case(KERNEL, (256, 512)).module, CompiledCode("A100")
    assert code(module, 16, "f32") == code(portable(module), 16, "f32") is not None


@pytest.mark.parametrize(
    ("beside", "shape", "batch"),
    [
        ("scales", (8192, 28672), 16),
        pytest.param("permuted", (5120, 5120), 32, marks=pytest.mark.slow),
        pytest.param("permuted", (8192, 28672), 16, marks=pytest.mark.slow),
        pytest.param("all", (8192, 28672), 16, marks=pytest.mark.slow),
        pytest.param("scales", (8192, 28672), 32, marks=pytest.mark.slow),
        pytest.param("all", (8192, 28672), 64, marks=pytest.mark.slow),
        pytest.param("all", (5120, 5120), 64, marks=pytest.mark.slow),
    ],
)
def test_x_is_prepared_where_it_is_predicted_to_take_less(beside: str, shape: tuple[int, int], batch: int) -> None:
    """In the launch that multiplies or before it, for int4_nv24, whose loop has the least room beside its bytes."""
    text = ("int4_nv24<group_size=64>",)
    program = make_program(shape, (128, 64), text, beside=replace(full_beside(shape), low_rank=None))
    parts = {"scales": ("input_scale",), "permuted": ("column_permutation",)}.get(beside)
    if parts is not None:
        kept = {name: getattr(program.beside, name) for name in parts}
        program = replace(program, beside=Beside(**kept))
    module = default_pipeline("triton").run(Module(program))
    assert module.schedule is not None
    model = GpuCostModel(GPUS["H200"], CompiledCode("H200"))
    inside, before = (
        model.predict(replace(module, schedule=module.schedule.launch_with(prologue=where)), batch, "bf16").seconds
        for where in (1, 0)
    )
    config = GluonConfig.choose(batch, module, loops_of(module), 90)
    assert (inside if config.prologue else before) <= 1.02 * min(inside, before), (inside, before)
