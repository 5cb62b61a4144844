"""A small byte-level GPT: the model that `bench.accuracy` compresses and `bench.training` trains.

Pre-norm blocks with rotary positions (Su et al. 2021, arXiv 2104.09864); the four linear layers of a block are plain
`nn.Linear` without bias, their dimensions multiples of 64. Bytes are the vocabulary, so there is no tokenizer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256


@dataclass(frozen=True)
class GptConfig:
    """Sizes: `width` is a multiple of 64 and of `heads`; `context` is the most bytes that a position sees."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    context: int = 256


class Attention(nn.Module):
    """Causal self-attention: `[batch, length, width]` to the same."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key = rotated(qkv[:2], rotation)
        mixed = F.scaled_dot_product_attention(query, key, qkv[2], is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    """Two linear layers with GELU between them, four times the width inside."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.width, 4 * config.width, bias=False)
        self.proj = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(config.width), Attention(config)
        self.norm2, self.mlp = nn.LayerNorm(config.width), Mlp(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), rotation)
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """Bytes `[batch, length]` (integers) to logits `[batch, length, 256]` of the next byte."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, config: GptConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        size = config.width // config.heads
        speeds = 10000.0 ** (-torch.arange(0, size, 2) / size)
        angles = torch.arange(config.context)[:, None] * speeds
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        """Normal weights of variance 1/in; what is added to the stream starts smaller, by 1/sqrt(2 x layers)."""
        generator = torch.Generator().manual_seed(seed)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                scale = layer.weight.shape[1] ** -0.5
                scale *= (2 * self.config.layers) ** -0.5 if name.endswith((".out", ".proj")) else 1.0
                nn.init.normal_(layer.weight, 0.0, scale, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        rotation = self.cosines[: tokens.shape[1]], self.sines[: tokens.shape[1]]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(self.norm(x))


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + size/2) of the last dimension by the angle of their position, in the dtype of `x`."""
    cosines, sines = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosines - second * sines, first * sines + second * cosines), -1)


def block_linears(model: Gpt) -> dict[str, nn.Linear]:
    """The four linear layers of every block, by qualified name: what is compressed."""
    return {name: layer for name, layer in model.blocks.named_modules(prefix="blocks") if isinstance(layer, nn.Linear)}


def next_byte_bits(model: nn.Module, windows: Tensor) -> Tensor:
    """Bits of each byte after the first, given those before it: `[count, length]` to `[count, length - 1]`."""
    logits = model(windows[:, :-1]).float()
    losses = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return losses.view(windows.shape[0], -1) / torch.log(torch.tensor(2.0))
