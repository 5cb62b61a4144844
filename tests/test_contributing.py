"""The format in CONTRIBUTING.md works as it stands there."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

import stoicc
from stoicc.ir.registry import REGISTRY

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def constant():
    (block,) = re.findall(r"^ *```python\n(.*?)^ *```", TEXT, re.DOTALL | re.MULTILINE)
    exec(compile(textwrap.dedent(block), "CONTRIBUTING.md", "exec"), {"__name__": "contributing"})
    yield
    REGISTRY.unregister("constant")


@pytest.mark.usefixtures("constant")
def test_the_format_compiles_a_weight(rng):
    weight = torch.randn(128, 100, generator=rng)
    weight[:64, :64] = 0.5
    kernel = stoicc.compile(weight, formats=["dense", "constant"], target="reference")
    assert {entry.format: entry.tiles for entry in kernel.stats().formats} == {"constant": 1, "dense": 3}
    assert torch.equal(kernel.to_dense(), weight)
    x = torch.randn(3, 100, generator=rng)
    torch.testing.assert_close(kernel(x), x @ weight.T)


@pytest.mark.usefixtures("constant")
def test_the_format_says_why_a_tile_does_not_fit():
    with pytest.raises(stoicc.FormatError, match="expected one value in the whole tile, found 2; add 'dense'"):
        stoicc.inspect(torch.eye(64), tile_map=[["constant"]])
