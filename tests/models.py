"""A small transformer language model, and what tests ask of whole models."""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

from stoicc.kernel import Kernel
from stoicc.record import LayerRecord


class Block(nn.Module):
    """Attention and a multilayer perceptron, each after a norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for layer in (self.q, self.k, self.v))
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2))
        return x + self.down(relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Tokens `[batch, length]` to logits `[batch, length, tokens]`."""

    def __init__(self, tokens: int = 48, width: int = 64, blocks: int = 2, heads: int = 4, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def token_batches(count: int = 3, tokens: int = 48) -> list[Tensor]:
    """Batches `[2, 12]` of ids."""
    return [torch.randint(0, tokens, (2, 12)) for _ in range(count)]


def kernels_of(model: nn.Module) -> dict[str, Kernel]:
    """The kernels of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Kernel)}


def record_of(module: nn.Module) -> LayerRecord:
    """What was noted about a kernel of a compressed model."""
    assert isinstance(module, Kernel)
    assert module.record is not None
    return module.record
