"""The emitted Gluon text: readable, the same for the same class; and what the dialect does not run."""

import ast
from dataclasses import replace

import pytest
import torch

from stoicc.codegen.gluon.compile import compile_for
from stoicc.codegen.gluon.emit import emit
from stoicc.codegen.gluon.launch import GluonConfig, loops_of, unsupported
from stoicc.formats.dense import Dense
from stoicc.ir.errors import CodegenError
from tests.codegen.gluon.classes import COVER, Covered
from tests.kernel_classes import KernelClass, make_case

MOSAIC = KernelClass("mosaic_64", (128, 64), "bf16", "same", "bias", False, 16)


def text_of(kernel: KernelClass, shape: tuple[int, int], warps: int = 4, seed: int = 0) -> str:
    module = make_case(kernel, shape, seed=seed).module
    return emit(module, loops_of(module), warps).source


def test_a_mosaic(golden) -> None:
    golden(text_of(MOSAIC, (200, 456)))


def test_zero_points_and_parts(golden) -> None:
    golden(text_of(replace(MOSAIC, formats="wide_zeros", beside="most", split=True, weight="f16"), (256, 512)))


@pytest.mark.parametrize("covered", COVER[::4], ids=lambda covered: covered.name)
def test_text_depends_on_the_class_alone(covered: Covered) -> None:
    first, second = (text_of(covered.kernel, (512, 1288), seed=seed) for seed in (0, 1))
    assert first == second
    assert max(map(len, first.splitlines())) <= 120
    names = [node.name for node in ast.parse(first).body if isinstance(node, ast.FunctionDef)]
    assert len(set(names)) == len(names)
    parts = covered.kernel.split or covered.kernel.beside in ("low_rank", "most")
    assert [n for n in names if n.endswith("_kernel")] == ["tiles_kernel", *(["reduce_kernel"] if parts else [])]


def test_only_loops_for_formats_that_occur() -> None:
    text = text_of(replace(MOSAIC, formats="nv24"), (200, 456))
    assert text.count("for _ in range(gl.load(item") == 1
    assert "def multiply_sparse(" in text
    assert "def multiply(" not in text


@pytest.mark.parametrize(
    ("change", "shape", "why"),
    [
        ({"weight": "f32"}, (128, 128), "weights are f32, tensor cores take f16 and bf16"),
        ({"x": "f32"}, (128, 128), "x is float32, operands of a tensor core have one dtype"),
        ({"tile": (32, 32)}, (128, 128), "tiles are 32x32, four warps share tiles of 64 or 128 rows"),
        ({"beside": "scales", "weight": "f16"}, (128, 128), "x is scaled, which may leave the range of f16"),
        ({"formats": "zeros"}, (128, 128), "format int4<group_size=16, zero_points=true> has no fragment"),
    ],
)
def test_what_the_portable_dialect_runs(change, shape, why):
    kernel = replace(MOSAIC, **change)
    module = make_case(kernel, shape).module
    found = unsupported(module, kernel.x_dtype, 80)
    assert found is not None
    assert found.startswith(why) or "int4_nv24<group_size=16" in found
    with pytest.raises(CodegenError, match="; the portable dialect runs it"):
        compile_for(module, kernel.x_dtype, 16, "sm_80")


def test_a_format_without_a_fragment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dense, "fragment", lambda self, tile, dtype: None)
    assert unsupported(make_case(MOSAIC, (128, 128)).module, torch.bfloat16, 80) == "format dense has no fragment"


def test_gpus_that_cannot() -> None:
    module = make_case(MOSAIC, (128, 128)).module
    assert unsupported(module, torch.bfloat16, 75) == "sm_75 has no sparse tensor cores, which begin with sm_80"
    wide = make_case(replace(MOSAIC, tile=(128, 256)), (256, 512)).module
    assert unsupported(wide, torch.bfloat16, 90) is None
    assert unsupported(wide, torch.bfloat16, 86) == "two slots of a ring take 136 KB, sm_86 has 99"
    empty = make_case(MOSAIC, (128, 128), empty=1.0).module
    assert unsupported(empty, torch.bfloat16, 80) == "every tile is empty"


def test_launch_constants() -> None:
    module = make_case(MOSAIC, (256, 256)).module
    loops = loops_of(module)
    chosen = {n: GluonConfig.choose(n, module, loops, 90) for n in (1, 8, 9, 16, 40, 300)}
    assert [config.block_n for config in chosen.values()] == [8, 8, 16, 16, 64, 128]
    assert chosen[16] == GluonConfig(16, 4, 4)
    assert chosen[300].num_warps == 8
    assert GluonConfig.choose(16, module, loops, 90, {"block_n": 32, "num_warps": 8, "num_stages": 2}) == GluonConfig(
        32, 8, 2
    )
