"""The blocked loop nest on vector units: several tile rows and all the entries of a large batch at a time."""

import ctypes
import subprocess
from dataclasses import replace

import pytest
import torch

import stoicc
from stoicc.codegen.cpu.build import able_instruction_sets, compiler
from stoicc.codegen.cpu.groups import functions
from stoicc.codegen.cpu.layouts import BLOCKED_ENTRIES
from stoicc.codegen.cpu.plan import classify
from stoicc.ir.dtypes import TORCH_DTYPES
from tests.codegen.cpu.mosaics import BOUNDS, mosaic, need, relative_error, run
from tests.codegen.cpu.unrounded import build

FORMATS = ("empty", "dense", "nv24")
LEAST = 192
"""The batch from which all of FORMATS are unpacked."""
BATCHES = (LEAST - 1, LEAST, 203, BLOCKED_ENTRIES + 3)
"""One below the nest, whole blocks, blocks of every size, and more entries than are multiplied at a time."""


@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "portable"])
@pytest.mark.parametrize(
    ("tile", "dtype", "parts"),
    [((64, 64), "f32", 1), ((48, 16), "f16", 3), ((96, 48), "f32", 2), ((16, 256), "bf16", 1)],
    ids=["64x64", "three-strips", "six-strips", "one-strip"],
)
def test_products_with_all_that_is_fused(isa, tile, dtype, parts, monkeypatch) -> None:
    need(isa, monkeypatch)
    beside = ("bias", "output_scale", "input_scale", "low_rank", "row_permutation", "column_permutation")
    case = mosaic((3 * tile[0] + 7, 5 * tile[1] + 3), FORMATS, dtype, tile, beside, "gelu", parts, bins=2)
    for x_dtype in {TORCH_DTYPES[dtype], torch.float32}:
        assert classify(case.module, x_dtype, isa).blocked == "floats"
        executor = build(case)
        for batch in BATCHES:
            x = torch.randn(batch, case.weight.shape[1]).to(x_dtype)
            y = run(executor, x, dtype, case.weight.shape[0])
            bound = BOUNDS[dtype if x_dtype != torch.float32 else "f32"]
            assert relative_error(y, case.expected(x)) < bound, (x_dtype, batch)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("isa", able_instruction_sets())
def test_unstructured_zeros(isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a length of their own."""
    need(isa, monkeypatch)
    torch.manual_seed(0)
    weight = (torch.randn(70, 300) * (torch.rand(70, 300) < 0.4)).to(TORCH_DTYPES[dtype])
    for tile in ((64, 64), (16, 32)):
        kernel = stoicc.compile(stoicc.inspect(weight, tile=tile, formats=("empty", "bitmap")), target="cpu")
        x = torch.randn(61, 300).to(TORCH_DTYPES[dtype])
        assert classify(kernel.ir, x.dtype, isa).least_blocked <= len(x)
        y = run(kernel.executor("tiles"), x, dtype, 70)
        assert relative_error(y, x.double() @ weight.double().T) < BOUNDS[dtype]


def test_the_same_bits_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    need(able_instruction_sets()[0], monkeypatch)
    case = mosaic((400, 300), FORMATS, "f32", (32, 32), parts=2)
    x = torch.randn(LEAST + 5, 300)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(build(case), x, "f32", 400))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("tiles", "most", "groups"),
    [
        ((4,) * 20, 64, (8, 8, 4)),
        ((40, 40, 40, 0, 0, 1, 1, 1, 1, 1, 1, 1), 40, (1, 1, 3, 7)),  # dense rows that stand together
        ((10, 10, 10, 10, 3, 3, 3), 20, (2, 2, 3)),
        ((100, 1, 1, 100, 1), 20, (1, 2, 1, 1)),  # one item may have more than a group should
        ((0,) * 9, 0, (8, 1)),
    ],
)
def test_groups_are_no_more_than_a_share(tiles, most, groups, tmp_path) -> None:
    """What threads take is bounded by tile rows, and by tiles where few rows have most of them."""
    command = compiler()
    if command is None:
        pytest.skip("no C compiler")
    kernel = classify(mosaic((64, 64), ("dense",), "f32", (64, 64)).module, torch.float32, "portable")
    name = kernel.parts[0].name
    (tmp_path / "groups.c").write_text(
        f"#include <stdint.h>\nstruct item {{ int {name}_begin, {name}_end; }};\n"
        "struct weight { const struct item *items; };\n"
        f"{functions(kernel)}\n"
        "int end_of(const struct item *items, int begin, int count, int tall, int64_t most)\n"
        "{ struct weight w = {items}; return group_end(&w, begin, count, tall, most); }\n"
    )
    subprocess.run([*command, "-shared", "-fPIC", "groups.c", "-o", "groups.so"], cwd=tmp_path, check=True)
    end_of = ctypes.CDLL(str(tmp_path / "groups.so")).end_of
    end_of.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 3, ctypes.c_int64]
    items = torch.tensor([(7, 7 + count) for count in tiles], dtype=torch.int32)
    begin, found = 0, []
    while begin < len(tiles):
        found.append(end_of(items.data_ptr(), begin, len(tiles), 8, most) - begin)
        begin += found[-1]
    assert tuple(found) == groups


def test_where_it_is_used() -> None:
    """Not where codes are multiplied on integer matrix units, nor for a format that cannot be unpacked to floats."""
    case = mosaic((64, 128), ("dense", "nv24"), "f32", (64, 64))
    kernel = classify(case.module, torch.float32, "avx512")
    assert (kernel.blocked, kernel.least_blocked) == ("floats", LEAST)
    assert classify(case.module, torch.float32, "amx").blocked == "floats"
    assert kernel.scratch_bytes(LEAST, 2, 0, 2) - kernel.scratch_bytes(LEAST - 1, 2, 0, 2) == 2 * kernel.blocked_bytes
    assert classify(mosaic((64, 128), ("dense", "int4"), "f32", (64, 64)).module, torch.float32, "amx").blocked == ""
    bf16 = mosaic((64, 128), ("dense", "nv24"), "bf16", (64, 64)).module
    assert classify(bf16, torch.bfloat16, "amx").blocked == "pairs"
    assert classify(bf16, torch.bfloat16, "avx512").blocked == "floats"
    part = kernel.parts[0]
    plain = replace(part, code=replace(part.code, floats=None))
    assert replace(kernel, parts=(plain, *kernel.parts[1:])).blocked == ""
