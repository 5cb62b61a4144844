"""Tiles to rows, by every instruction set: bit for bit what the formats' own decode gives."""

import pytest
import torch

from stoicc.codegen.cpu.decode import CompiledDecoder
from stoicc.codegen.reference import decode_tiles
from stoicc.ir.dtypes import TORCH_DTYPES, bits
from tests.codegen.cpu.mosaics import need
from tests.kernel_classes import KernelClass, make_case


@pytest.mark.parametrize(
    ("isa", "formats", "dtype", "tile"),
    [
        ("amx", "kept", "bf16", (32, 64)),
        ("avx512", "kept", "bf16", (64, 64)),
        ("avx2", "kept", "bf16", (32, 64)),
        ("portable", "kept", "bf16", (32, 64)),
        ("amx", "kept", "bf16", (16, 16)),  # too narrow for rows of 32 columns
        ("avx512", "kept", "f32", (32, 64)),
        ("avx2", "kept", "f32", (32, 16)),
        ("avx512", "zeros", "bf16", (32, 64)),  # groups of 16 columns
        ("avx512", "int4", "f32", (32, 64)),
        ("avx512", "int4", "f16", (32, 64)),
        ("avx2", "int4", "bf16", (32, 64)),
    ],
)
def test_panels_have_the_bits_of_decode(isa, formats, dtype, tile, monkeypatch):
    need(isa, monkeypatch)
    height, width = tile
    case = make_case(KernelClass(formats, tile, dtype, "same", "plain", False, 16), (3 * height, 5 * width))
    expected = decode_tiles(case.module.tiles, case.pools)
    panel = torch.full(expected.shape, torch.nan, dtype=TORCH_DTYPES[dtype])
    CompiledDecoder(case.module, case.pools)(0, 3, panel)
    assert torch.equal(bits(panel), bits(expected))
