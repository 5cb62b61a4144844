"""Watching the inputs of a model's layers: hooks that come off again, and who shares an input."""

import difflib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stoicc.ir.errors import InputError, brief
from stoicc.weights import version_of

See = Callable[[str, Tensor], None]
"""Called with a layer's name and its input, each time that the layer runs."""


def layer_names(model: nn.Module, layers: Sequence[str] | None) -> list[str]:
    """The named layers, or every `nn.Linear` of a model; InputError for a name that it lacks."""
    if layers is None:
        found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not found:
            raise InputError(
                f"calibration: expected nn.Linear layers in {type(model).__name__}, found none; name the layers"
            )
        return found
    if isinstance(layers, str):
        raise InputError(f"calibration: expected a list of layer names, found {layers!r}; write [...] around it")
    known = dict(model.named_modules(remove_duplicate=False))
    for name in layers:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            way_out = f"; perhaps {' or '.join(near)}" if near else "; model.named_modules() lists them"
            raise InputError(f"calibration: expected names of the model's modules, found {brief(repr(name))}{way_out}")
    return list(dict.fromkeys(layers))


@contextmanager
def watching(model: nn.Module, names: Iterable[str], see: See) -> Iterator[None]:
    """The model in eval mode and without gradients, with `see` on layers; afterwards it is as it was."""
    training = [module for module in model.modules() if module.training]
    hooks = [model.get_submodule(name).register_forward_pre_hook(_hook(name, see), with_kwargs=True) for name in names]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True


def _hook(name: str, see: See) -> Callable[..., None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(name, args[0] if args else next(iter(kwargs.values())))

    return before


def run(model: nn.Module, batch: Any) -> Any:
    """What a model returns for a tensor, a tuple of arguments or a mapping of them."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


class Same:
    """Remembers a tensor, without keeping it alive, and says whether another is it, unchanged."""

    def __init__(self, x: Tensor) -> None:
        self._x, self._version = weakref.ref(x), version_of(x)

    def holds(self, x: Tensor) -> bool:
        """Whether x is that very tensor, not changed in place since."""
        return self._x() is x and self._version == version_of(x)


def groups_by_input(model: nn.Module, batches: Iterable[Any], names: list[str]) -> list[list[str]]:
    """Layers in the order of their first call; those first called with the very same tensor together.

    Batches run until every layer was called; a layer that none of them calls is in no group.
    """
    groups: list[list[str]] = []
    inputs: list[Same] = []
    waiting = set(names)

    def see(name: str, x: Tensor) -> None:
        if name not in waiting:
            return
        waiting.remove(name)
        for group, seen in zip(groups, inputs, strict=True):
            if seen.holds(x):
                group.append(name)
                return
        groups.append([name])
        inputs.append(Same(x))

    with watching(model, names, see):
        for batch in batches:
            run(model, batch)
            if not waiting:
                break
    return groups
