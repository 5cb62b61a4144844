"""The GPU's cost model counts instructions in the code that would run: of the dialect that is chosen."""

from dataclasses import replace

import pytest

from stoicc.gpu_model import CompiledCode
from stoicc.ir.types import Module
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
