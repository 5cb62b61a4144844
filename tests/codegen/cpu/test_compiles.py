"""What is emitted for instruction sets that this machine has not got: it cannot run here, but it compiles."""

import platform
import shlex
import subprocess

import pytest
import torch

import stoicc
from stoicc.codegen.cpu import build
from stoicc.codegen.cpu.build import _COMMON_FLAGS, _ISA_FLAGS, able_instruction_sets, compiler
from stoicc.codegen.cpu.emit import emit
from stoicc.codegen.cpu.plan import classify
from stoicc.codegen.cpu.simd import ISAS
from stoicc.ir.dtypes import TORCH_DTYPES
from tests.codegen.cpu.mosaics import BOUNDS, need, relative_error, run

FORMATS = (
    *("dense", "nv24", "int8", "int4<zero_points=true>", "int4_nv24", "int3", "int2<zero_points=true>", "bitmap", "nm"),
    *("fp8", "mxfp4", "nvfp4", "outlier", "group_sparse", "masked", "masked<mask=nv24, values=fp8>", "empty"),
    *("masked<mask=nm>", "masked<mask=nv24, values=int2<zero_points=true>>"),
)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa not in able_instruction_sets()])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_every_format_compiles(isa, dtype, tmp_path):
    command = compiler()
    if command is None or platform.machine() != "x86_64":
        pytest.skip("no C compiler for this instruction set")
    weight = torch.randn(64, 64 * len(FORMATS), generator=torch.Generator().manual_seed(0)).to(TORCH_DTYPES[dtype])
    kernel = stoicc.compile(weight, tile=(64, 64), tile_map=[list(FORMATS)], approximate=True, target="cpu")
    kernel_class = classify(kernel.ir, weight.dtype, isa)
    assert len(kernel_class.parts) == len(FORMATS) - 1
    (tmp_path / "kernel.c").write_text(emit(kernel_class))
    flags = (*_COMMON_FLAGS, *_ISA_FLAGS[isa], "-O1", "-Werror=implicit-function-declaration")
    subprocess.run([*command, *flags, "-c", "kernel.c", "-o", "kernel.o"], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    "formats", [("dense", "int4"), ("bitmap", "int8"), ("nm", "int2"), ("nv24", "int4", "dense"), ("dense",)]
)
def test_text_for_matrix_units_at_batch_1(formats, monkeypatch):
    """It takes no matrix unit, so that any CPU with bf16 products in vectors runs it."""
    need("avx512bf16", monkeypatch)
    monkeypatch.setattr(build, "able_instruction_sets", lambda: ISAS)
    monkeypatch.setenv("STOICC_CPU_ISA", "amx")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 64 * len(formats) + 5, generator=generator).bfloat16()
    weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    kernel = stoicc.compile(weight, tile_map=[[*formats, "dense"]] * 2, approximate=True, target="cpu", tile=(64, 64))
    x = torch.randn(1, weight.shape[1], generator=generator).bfloat16()
    y = run(kernel.executor("tiles"), x, "bf16", 70)
    assert relative_error(y, x.double() @ kernel.to_dense().double().T) < BOUNDS["bf16"]


def test_a_compiler_gets_what_it_knows(tmp_path, monkeypatch):
    """One of before AVX512-BF16 builds for the next best instruction set."""
    known = compiler()
    if known is None:
        pytest.skip("no C compiler")
    old = tmp_path / "old-cc"
    old.write_text(f'#!/bin/sh\nfor a; do [ "$a" = -mavx512bf16 ] && exit 1; done\nexec {shlex.join(known)} "$@"\n')
    old.chmod(0o755)
    able = able_instruction_sets()
    monkeypatch.setenv("CC", str(old))
    build.able_instruction_sets.cache_clear()
    try:
        assert build.able_instruction_sets() == tuple(isa for isa in able if isa not in ("amx", "avx512bf16"))
    finally:
        build.able_instruction_sets.cache_clear()
