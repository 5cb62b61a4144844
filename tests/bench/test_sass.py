"""Budgets of the tensor-core dialect's machine code: an instruction too many in a loop fails here."""

import json
from pathlib import Path

import pytest
import triton

from bench import sass
from bench.sass import FORMATS, Row, rows_of

NEWEST = not triton.__version__.startswith(("3.6", "3.7", "3.8"))
ROOM = 1.0 if NEWEST else 1.13
"""Triton 3.6 puts a few more instructions around each copy."""

BUDGET = {
    "dense": 220, "nv24": 200, "int8<group_size=64>": 480, "int4<group_size=64>": 410, "int4_nv24<group_size=64>": 330,
}  # fmt: skip
"""Warp instructions for 64x64 weights on sm_90, bf16, batch block 16, groups of 64, tile rows of 128: of a format
alone, and with the others in one kernel."""


def named(row: Row) -> str:
    return next(text for text in FORMATS if text.split("<")[0] == row.format.split("<")[0])


@pytest.fixture(autouse=True)
def _no_triton_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("formats", [*((text,) for text in FORMATS), FORMATS], ids=lambda formats: "+".join(formats))
def test_budgets_of_a_64x64_tile(formats: tuple[str, ...]) -> None:
    rows = list(rows_of("gluon", "sm_90", "bf16", 16, formats))
    assert sorted(named(row) for row in rows) == sorted(formats)
    for row in rows:
        assert row.tile == (128, 64)
        assert row.instructions <= BUDGET[named(row)] * ROOM, row
        assert row.spills_in_loop == 0
        assert row.bound_by == "bytes"
        assert row.in_flight >= 25 * 1024, row
        assert {bits: n for bits, n in row.loads.items() if bits != 128} == {32: 1}, "only a descriptor is narrow"


@pytest.mark.parametrize("text", FORMATS)
def test_the_portable_dialect_is_within_twice_the_budgets(text: str) -> None:
    (row,) = rows_of("portable", "sm_90", "bf16", 16, (text,))
    assert row.tile == (128, 128)
    assert row.instructions <= 2 * BUDGET[text] * ROOM, row
    assert row.spills_in_loop == 0


def test_sparse_operands_go_to_sparse_tensor_cores() -> None:
    for text, opcode, other in (("nv24", "HMMA.SP", "HMMA"), ("dense", "HMMA", "HMMA.SP")):
        (row,) = rows_of("gluon", "sm_80", "f16", 16, (text,))
        assert row.opcodes[opcode] == (8 if text == "nv24" else 16)
        assert other not in row.opcodes


WARPGROUP_BUDGET = {"dense": 420, "nv24": 400}
"""Warp instructions for 64x64 weights and a block of 256 rows of the batch. An SM issues some 2000 while its tensor
cores multiply them, and half as many while they are 2:4."""


@pytest.mark.skipif(not NEWEST, reason="wgmma needs triton 3.9")
@pytest.mark.parametrize("text", ["dense", "nv24"])
def test_warpgroups_are_bound_by_tensor_cores(text: str) -> None:
    """The kernels of large batches leave issue slots, and the next operands load while a product is on its way."""
    (row,) = rows_of("wgmma", "sm_90", "bf16", sass.LARGE, (text,))
    assert (row.block_n, row.tile) == (256, (128, 64))
    assert row.bound_by == "tensor cores"
    assert row.instructions <= WARPGROUP_BUDGET[text]
    assert row.opcodes["HGMMA"] == (4 if text == "dense" else 2)
    assert not row.serialized
    assert row.spills_in_loop == 0


def test_the_record_is_within_the_budgets() -> None:
    """`bench/results/sass.json`, which `--quick --output` wrote: triton 3.9, all formats, both dialects."""
    found = json.loads((Path(sass.__file__).parent / "results" / "sass.json").read_text())
    assert found["versions"]["triton"].startswith("3.9")
    rows = [row for row in found["rows"] if row["target"] == "sm_90" and row["dialect"] != "wgmma"]
    assert len(rows) == 4 * len(FORMATS)
    for row in rows:
        name = next(text for text in FORMATS if text.split("<")[0] == row["format"].split("<")[0])
        assert row["instructions"] <= BUDGET[name] * (1 if row["dialect"] == "gluon" else 2)
        assert row["spills_in_loop"] == 0


def test_the_table() -> None:
    (row,) = rows_of("portable", "sm_90", "bf16", 16, ("nv24",))
    printed = sass.line(row)
    assert printed.startswith("nv24                       portable 128x128")
    assert f" {row.instructions:.0f} " in printed
    assert " LDGSTS 15 " in printed
    assert row.payload == 64 * 64 * 9 / 8


def test_products_are_counted_alike() -> None:
    """64x64 weights times 16 rows, by 4 warps: 32 products of m16n8k16, however they are issued."""
    assert sass.products_of({"HMMA": 8}, 4, 16) == 32
    assert sass.products_of({"HGMMA": 4}, 4, 16) == 32
