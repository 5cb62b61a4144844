"""The code in CONTRIBUTING.md works as it stands there."""

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import stoicc
from stoicc.ir.registry import REGISTRY
from stoicc.passes.catalogue import unregister_pass
from tests.products import assert_product

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def constant():
    run_block(0)
    yield
    REGISTRY.unregister("constant")


def run_block(number: int) -> dict[str, Any]:
    """What a code block of the page defines."""
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    namespace: dict[str, Any] = {"__name__": "contributing"}
    exec(compile(textwrap.dedent(blocks[number]), "CONTRIBUTING.md", "exec"), namespace)
    return namespace


@pytest.mark.usefixtures("constant")
def test_the_format_compiles_a_weight(rng):
    weight = torch.randn(128, 100, generator=rng)
    weight[:64, :64] = 0.5
    kernel = stoicc.compile(weight, formats=["dense", "constant"], target="reference")
    assert {entry.format: entry.tiles for entry in kernel.stats().formats} == {"constant": 1, "dense": 3}
    assert torch.equal(kernel.to_dense(), weight)
    x = torch.randn(3, 100, generator=rng)
    assert_product(kernel(x), x, weight)


@pytest.mark.usefixtures("constant")
def test_the_format_says_why_a_tile_does_not_fit():
    with pytest.raises(stoicc.FormatError, match="expected one value in the whole tile, found 2; add 'dense'"):
        stoicc.inspect(torch.eye(64), tile_map=[["constant"]])


def test_the_pass_runs_in_a_pipeline():
    run_block(1)
    weight, x = torch.randn(200, 100), torch.randn(3, 100)
    try:
        kernel = stoicc.compile(weight, pipeline="drop-empty,build-csr,reverse,fuse-epilogue")
    finally:
        unregister_pass("reverse")
    assert kernel.schedule.row_order == (3, 2, 1, 0)
    assert_product(kernel(x), x, weight)


def test_the_operator_lowers_as_it_says():
    threshold = run_block(2)["threshold"]
    result = threshold(torch.randn(100, 70), 0.5)
    dense = result.dense()
    assert not ((dense != 0) & (dense.abs() < 0.5)).any()
    assert torch.equal(stoicc.compile(result).to_dense(), dense)
