"""The emitted text: readable, the same for the same class, and what it may hold."""

import ast
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import triton
import triton.language as tl

from stoicc.codegen.triton import build
from stoicc.codegen.triton.backend import TritonBackend
from stoicc.codegen.triton.emit import emit_decode, emit_tiles
from stoicc.codegen.triton.sources import inline
from stoicc.formats.dense import Dense
from stoicc.ir.errors import CodegenError
from stoicc.ir.format import TritonDecode
from stoicc.ir.registry import REGISTRY, register_format
from stoicc.ir.types import Module
from tests.kernel_classes import KERNEL_CLASSES, KernelClass, make_case

MOSAIC = KernelClass("mosaic", (64, 64), "bf16", "same", "all", True, 16)
OFFSET = 3


def test_a_mosaic(golden) -> None:
    golden(TritonBackend().emit(make_case(MOSAIC, (200, 300)).module, torch.bfloat16))


def test_a_plain_layer(golden) -> None:
    plain = replace(MOSAIC, beside="bias", split=False, formats="rows")
    golden(TritonBackend().emit(make_case(plain, (192, 256)).module, torch.bfloat16))


@pytest.mark.parametrize("formats", ["composed", "apart"])
def test_formats_in_formats(golden, formats) -> None:
    plain = replace(MOSAIC, beside="plain", split=False, formats=formats)
    golden(TritonBackend().emit(make_case(plain, (192, 256)).module, torch.bfloat16), f"test_formats_{formats}")


def test_decode_kernels(golden) -> None:
    golden(emit_decode(make_case(MOSAIC, (200, 300)).module).source)


@pytest.mark.parametrize("kernel", KERNEL_CLASSES, ids=lambda kernel: kernel.name)
def test_text_depends_on_the_class_alone(kernel: KernelClass) -> None:
    first, second = (emit_tiles(make_case(kernel, (256, 256), seed=seed).module) for seed in (0, 1))
    assert first.source == second.source
    assert first.name == second.name
    tree = ast.parse(first.source)
    kernels = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")]
    assert kernels == ["tiles_kernel", *(["reduce_kernel"] if kernel.split else [])]
    assert max(map(len, first.source.splitlines())) <= 120


def test_only_loops_for_formats_that_occur() -> None:
    text = emit_tiles(make_case(replace(MOSAIC, formats="nv24"), (200, 300)).module).source
    assert text.count("for t in range") == 1
    assert "decode_dense" not in text


def test_a_format_without_a_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dense, "decode_block", lambda self, tile, dtype: None)
    case = make_case(MOSAIC, (200, 300))
    with pytest.raises(CodegenError, match="format dense: expected a Triton decode, found none; give it"):
        TritonBackend().build(case.module, case.pools, "tiles", "error")
    assert "decode_values(" in emit_tiles(case.module).source


def test_tiles_that_triton_cannot_hold() -> None:
    module = make_case(MOSAIC, (200, 300)).module
    odd = replace(module, tiles=replace(module.tiles, tile=(64, 48)))
    with pytest.raises(CodegenError, match="tile 64x48: expected sides that are powers of two from 16 up, found 48"):
        TritonBackend().emit(odd, torch.bfloat16)


def test_a_module_without_a_schedule() -> None:
    module = Module(make_case(MOSAIC, (200, 300)).module.tiles)
    with pytest.raises(CodegenError, match="expected a schedule with a csr per live segment, found none"):
        TritonBackend().emit(module, torch.bfloat16)


def test_an_unknown_executor() -> None:
    case = make_case(MOSAIC, (200, 300))
    with pytest.raises(CodegenError, match=r"expected an executor of tiles, dense-once, .*, found 'fast'"):
        TritonBackend().build(case.module, case.pools, "fast", "error")


# ---- functions of users ---------------------------------------------------------------------


@triton.jit
def decode_shifted(values, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(values + tl.arange(0, BM)[:, None] * BK + tl.arange(0, BK)[None, :]) + OFFSET


@dataclass(frozen=True)
class Shifted(Dense):
    name: ClassVar[str] = "shifted"

    def decode_block(self, tile, dtype):
        return TritonDecode(decode_shifted)


def test_globals_of_a_users_decode_are_imported() -> None:
    register_format(Shifted())
    try:
        case = make_case(replace(MOSAIC, formats="dense"), (64, 64))
        segment = replace(case.module.tiles.segments[0], format="shifted")
        text = emit_tiles(replace(case.module, tiles=replace(case.module.tiles, segments=(segment,)))).source
    finally:
        REGISTRY.unregister("shifted")
    assert f"from {__name__} import OFFSET" in text
    assert "def decode_shifted(" in text


def test_closures_are_refused() -> None:
    offset = 2

    @triton.jit
    def decode_closed(values, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
        return tl.load(values) + offset

    with pytest.raises(CodegenError, match=r"device function decode_closed: .* closes over offset; pass them as"):
        inline([decode_closed])


def test_two_functions_of_one_name_are_refused() -> None:
    class Other:
        @staticmethod
        def fn(values):
            return values

    Other.fn.__name__ = "decode_shifted"
    with pytest.raises(CodegenError, match="expected one function of this name in a kernel, found two that differ"):
        inline([decode_shifted, Other])


def test_functions_named_as_the_kernels_own_are_refused() -> None:
    @triton.jit
    def load_x(values, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
        return tl.load(values)

    with pytest.raises(CodegenError, match=r"expected a name other than load_x, add_product, tiles_kernel, .*, which"):
        inline([load_x])


def test_functions_without_source_are_refused() -> None:
    class Unread:
        fn = eval("lambda values: values")

    with pytest.raises(CodegenError, match="expected a function whose source can be read, found none"):
        inline([Unread])


# ---- cache ----------------------------------------------------------------------------------


def test_text_is_written_once_and_imported(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("STOICC_CACHE_DIR", str(tmp_path / "deep" / "er"))
    module = build.load("k_test", "VALUE = 1\n")
    assert module.VALUE == 1
    assert [file.name for file in (tmp_path / "deep" / "er").iterdir() if file.is_file()] == ["k_test.py"]
    assert build.load("k_test", "VALUE = 1\n") is module
