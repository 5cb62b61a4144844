"""What else multiplies a compressed weight on a CPU, each checked before it is timed.

A peer holds the values of one of our weights (its `weight`): the same codes, mask or blocks where
its scheme allows. One that refuses, or gives a wrong product, is absent, with what it said.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

import stoicc
from bench.cpu_weights import TILE, Weight
from stoicc.ops.graph import Quantize
from stoicc.pools import TiledWeight

Product = Callable[[Tensor], Tensor]
"""x `[N, K]` -> y `[N, M]`."""
TOLERANCE = {"bf16": 2e-2, "f32": 1e-4}
LOSSY_X = 5e-2
"""For a peer that rounds x to int8 on the way."""


@dataclass(frozen=True)
class Peer:
    """A product of another library.

    Attributes:
        name: of the library and scheme.
        weight: the name of the mix that holds the same matrix, or the nearest that is one.
        product: None where the peer is absent.
        absent: why, then.
    """

    name: str
    weight: str
    product: Product | None
    absent: str = ""


def peers(weight: Tensor, compressed: dict[str, Weight], dtype: str) -> Iterator[Peer]:
    """All peers for a weight `[M, K]` and its mixes; made one by one, for they are large."""
    held = {name: _dense(each) for name, each in compressed.items() if name in ("nv24", "half empty")}
    for name, mix, make in (
        ("torch.sparse CSR", "nv24", _torch_csr),
        ("torch.sparse BSR", "half empty", _torch_bsr),
        ("torch.sparse semi-structured", "nv24", _torch_semi_structured),
        ("scipy CSR", "nv24", _scipy_csr),
        ("scipy BSR", "half empty", _scipy_bsr),
        ("torch int8 weight-only (one scale a row)", "int8 g=128", _torch_int8),
        ("torch int4 weight-only g=128", "int4 g=128", _torch_int4),
        ("torch int8 dynamic (rounds x to int8)", "int8 g=128", _torch_dynamic),
    ):
        if mix in compressed:
            yield _checked(name, mix, held.get(mix, weight), dtype, make)


def _checked(name: str, mix: str, matrix: Tensor, dtype: str, make: Callable[[Tensor], tuple[Product, Tensor]]) -> Peer:
    """The peer, or why it is absent: it refuses, or its product is not that of the matrix it says it holds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that sparse and quantized tensors are in beta
            x = torch.randn(4, matrix.shape[1], generator=torch.Generator().manual_seed(4)).to(matrix.dtype)
            for rows in (matrix[:TILE], matrix):  # one that refuses does so soon
                product, held = make(rows)
                found = product(x)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as refusal:
        return Peer(name, mix, None, str(refusal).strip().splitlines()[0][:160])
    if found.dtype != matrix.dtype:
        return Peer(name, mix, None, f"gives {found.dtype} for {matrix.dtype}")
    error = relative_error(found, x, held)
    allowed = LOSSY_X if "rounds x" in name else TOLERANCE[dtype]
    if not error <= allowed:
        return Peer(name, mix, None, f"wrong by {error:.1e} where {allowed:.0e} is allowed")
    return Peer(name, mix, product)


def relative_error(found: Tensor, x: Tensor, held: Tensor) -> float:
    """Of a product x W^T against float32, in the Frobenius norm."""
    wanted = x.float() @ held.float().T
    return float((found.float() - wanted).norm() / wanted.norm())


def _dense(weight: Weight) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    return weight.to_dense() if isinstance(weight, TiledWeight) else weight.dense()


def _torch_csr(matrix: Tensor) -> tuple[Product, Tensor]:
    sparse = matrix.to_sparse_csr()
    return (lambda x: (sparse @ x.T).T), matrix


def _torch_bsr(matrix: Tensor) -> tuple[Product, Tensor]:
    sparse = matrix.to_sparse_bsr((TILE, TILE))
    return (lambda x: (sparse @ x.T).T), matrix


def _torch_semi_structured(matrix: Tensor) -> tuple[Product, Tensor]:
    sparse = torch.sparse.to_sparse_semi_structured(matrix)
    return (lambda x: torch.nn.functional.linear(x, sparse)), matrix


def _scipy_csr(matrix: Tensor) -> tuple[Product, Tensor]:
    return _scipy(scipy.sparse.csr_matrix(_numpy(matrix)), matrix)


def _scipy_bsr(matrix: Tensor) -> tuple[Product, Tensor]:
    return _scipy(scipy.sparse.bsr_matrix(_numpy(matrix), blocksize=(TILE, TILE)), matrix)


def _scipy(sparse: scipy.sparse.spmatrix, matrix: Tensor) -> tuple[Product, Tensor]:
    return (lambda x: torch.from_numpy(sparse @ np.ascontiguousarray(x.numpy().T)).T), matrix


def _numpy(matrix: Tensor) -> np.ndarray:
    if matrix.dtype is torch.bfloat16:
        raise TypeError("numpy has no bfloat16")
    return matrix.numpy()


def _codes(matrix: Tensor, bits: int, group_size: int) -> Quantize:
    """The codes and scales of our operator."""
    compressed = stoicc.ops.group_absmax(matrix, bits, group_size)
    node = compressed.graph.nodes[compressed.output]["node"]
    assert isinstance(node, Quantize)
    return node


def _torch_int8(matrix: Tensor) -> tuple[Product, Tensor]:
    node = _codes(matrix, 8, 0)
    codes, scales = (node.codes.short() - 128).to(torch.int8), node.scales[:, 0].contiguous()
    return (lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, scales)), codes.float() * scales.float()[:, None]


def _torch_int4(matrix: Tensor) -> tuple[Product, Tensor]:
    group = 128
    node = _codes(matrix, 4, group)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(node.codes.int(), 1)
    # [groups, M, 2]: a scale, and what is added to the code less 8 times the scale
    pairs = torch.stack((node.scales, torch.zeros_like(node.scales)), -1).transpose(0, 1).contiguous()
    held = (node.codes.float() - 8) * node.scales.float().repeat_interleave(group, 1)
    return (lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, pairs)), held


def _torch_dynamic(matrix: Tensor) -> tuple[Product, Tensor]:
    if matrix.dtype is not torch.float32:
        raise TypeError("torch.ops.quantized.linear_dynamic takes fp32 x only")
    node = _codes(matrix, 8, 0)
    scales = node.scales[:, 0].double()
    held = (node.codes.short() - 128).float() * scales.float()[:, None]
    quantized = torch.quantize_per_channel(held, scales, torch.zeros(len(scales), dtype=torch.int64), 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    return (lambda x: torch.ops.quantized.linear_dynamic(x, packed, True)), held
