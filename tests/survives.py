"""What every operator promises: its result survives lowering bit for bit, on every backend that is here."""

import torch

import stoicc
from stoicc.ir.dtypes import bits
from stoicc.ops import CompressedWeight
from tests.products import assert_product

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_survives(compressed: CompressedWeight, *formats: str) -> None:
    """Kernels hold the operator's own matrix bit for bit, in these formats (if named), and multiply by it."""
    expected = compressed.dense()
    x = torch.randn(3, expected.shape[1], generator=torch.Generator().manual_seed(3)).to(compressed.values().dtype)
    for target in ("reference", "cpu"):
        kernel = stoicc.compile(compressed, target=target)
        assert torch.equal(bits(kernel.to_dense()), bits(expected))
        assert not formats or [segment.format for segment in kernel.program.segments] == list(formats)
        assert_product(kernel(x), x, expected, TOLERANCES[x.dtype])
