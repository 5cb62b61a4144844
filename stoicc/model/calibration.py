"""Calibration of a whole model: in which order layers run, who shares an input, and their statistics.

A survey runs all batches once; a stage (the layers that always see the very same tensor: q, k
and v) then has its statistics collected in a run of its own, which ends where the stage does.
So one gram matrix is alive at a time, whatever the model's size.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stoicc.ir.errors import InputError
from stoicc.model.layers import Layer
from stoicc.ops._hooks import Same, run, watching
from stoicc.ops.statistics import Collector, Statistics
from stoicc.weights import non_finite

CalibrationLike: TypeAlias = Iterable[Any] | Callable[[nn.Module], object]
Digest: TypeAlias = "hashlib.blake2b"


class _Enough(BaseException):
    """Ends a forward once the layers of a stage have seen their inputs; no model catches it by accident."""


class Calibration:
    """Inputs on which a model is run, as often as needed.

    Args:
        given: batches, each what the model is called with (a tensor, a tuple of arguments, a mapping
            of keyword arguments), or a function that runs the model: `lambda model: model.encode(texts)`.
            A generator is kept as a list; a loader must give the same batches in every run.
    """

    def __init__(self, given: CalibrationLike) -> None:
        if isinstance(given, (Tensor, Mapping, str)) or not (callable(given) or isinstance(given, Iterable)):
            raise InputError(
                f"calibration: expected batches or a function of the model, found {type(given).__name__}; "
                "write [batch] for a single one"
            )
        self.function = None if isinstance(given, Iterable) else given
        self._batches: Iterable[Any] = []
        if isinstance(given, Iterable):
            self._batches = list(given) if iter(given) is given else given

    def runs(self) -> Iterator[Callable[[nn.Module], object]]:
        """One call of the model for each batch, or the one of a function."""
        if self.function is not None:
            yield self.function
        for batch in self._batches:
            yield partial(run, batch=batch)

    def update(self, digest: Digest) -> None:
        """Hash the tensors of all batches; a function's inputs are unknown before it runs."""
        for batch in self._batches:
            for leaf in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch):
                hash_tensor(digest, leaf) if isinstance(leaf, Tensor) else digest.update(repr(leaf).encode())


@dataclass(frozen=True, eq=False)
class Stage:
    """Layers whose inputs are always the very same tensors.

    Attributes:
        calls: how often each batch calls them, where all batches do so equally often.
    """

    layers: tuple[Layer, ...]
    calls: int | None


@dataclass(frozen=True, eq=False)
class Survey:
    """What one run of all batches showed.

    Attributes:
        stages: in the order of first calls.
        unseen: layers that no batch calls.
        digest: of the calibration inputs.
    """

    stages: tuple[Stage, ...]
    unseen: tuple[Layer, ...]
    digest: str


def survey(model: nn.Module, layers: Sequence[Layer], calibration: Calibration) -> Survey:
    """Run all batches once.

    Raises:
        InputError: no batch, or an input that is not finite: which layer, batch, sample and channel.
    """
    of_name = {name: layer for layer in layers for name in layer.modules}
    tokens: dict[Layer, list[tuple[int, int]]] = {}
    digest = hashlib.blake2b(digest_size=16)
    calibration.update(digest)
    batch = token = 0
    last: Same | None = None

    def see(name: str, x: Tensor) -> None:
        nonlocal token, last
        if last is None or not last.holds(x):
            last, token = Same(x), token + 1
            _refuse_non_finite(x, name, batch)
            if calibration.function is not None and not tokens:
                hash_tensor(digest, x)
        tokens.setdefault(of_name[name], []).append((batch, token))

    with watching(model, of_name, see):
        for batch, forward in enumerate(calibration.runs()):  # noqa: B007  read by `see`
            last = None
            forward(model)
    if not token:
        raise InputError("calibration: expected batches that reach a layer of the recipe, found none")
    grouped: dict[tuple[tuple[int, int], ...], list[Layer]] = {}
    for layer, seen in sorted(tokens.items(), key=lambda entry: entry[1]):
        grouped.setdefault(tuple(seen), []).append(layer)
    stages = tuple(Stage(tuple(group), _calls(seen, batch + 1)) for seen, group in grouped.items())
    return Survey(stages, tuple(layer for layer in layers if layer not in tokens), digest.hexdigest())


def collect_stage(model: nn.Module, stage: Stage, calibration: Calibration, dtype: torch.dtype) -> Statistics:
    """Statistics of a stage's inputs, with a gram matrix, in the model as it is now."""
    leader = stage.layers[0]
    collector = Collector(gram=True, dtype=dtype, name=leader.name)
    may_stop = calibration.function is None and stage.calls is not None
    seen = 0

    def see(name: str, x: Tensor) -> None:
        nonlocal seen
        collector.add(x)
        seen += 1
        if may_stop and seen == stage.calls:
            raise _Enough

    with watching(model, leader.modules, see):
        for forward in calibration.runs():
            seen = 0
            try:
                forward(model)
            except _Enough:
                pass
    return collector.statistics()


def try_out(model: nn.Module, calibration: Calibration) -> None:
    """Run the first batch on a compressed model.

    Raises:
        InputError: the model cannot run with kernels in place of its layers.
    """
    with watching(model, (), lambda name, x: None):
        try:
            next(calibration.runs())(model)
        except Exception as error:
            raise InputError(
                f"compressed model: expected it to run as before, found {type(error).__name__}: {error}; "
                "exclude layers whose weight the model reads itself"
            ) from error


def hash_tensor(digest: Digest, tensor: Tensor) -> None:
    """Add dtype, shape and bits of a tensor."""
    own = tensor.detach().cpu().contiguous()
    digest.update(f"{own.dtype}{list(own.shape)}".encode())
    digest.update(own.view(-1).view(torch.uint8).numpy().data if own.numel() else b"")


def _calls(tokens: Sequence[tuple[int, int]], batches: int) -> int | None:
    """Calls in each batch, where they are as many in all."""
    counts = [0] * batches
    for batch, _ in tokens:
        counts[batch] += 1
    return counts[0] if min(counts) == max(counts) else None


def _refuse_non_finite(x: Tensor, name: str, batch: int) -> None:
    bad = non_finite(x.detach().reshape(-1, x.shape[-1])) if x.is_floating_point() and x.numel() else None
    if bad is not None:
        raise InputError(
            f"calibration, layer {name}, batch {batch}: expected finite inputs, found {bad[2]} at sample {bad[0]}, "
            f"channel {bad[1]}; leave that batch out, or run the model in a wider dtype"
        )
