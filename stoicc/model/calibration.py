"""Calibration of a whole model: in which order layers run, who shares an input, and their statistics.

A survey runs all batches once; a stage (the layers that always see the very same tensor: q, k
and v) then has its statistics collected in a run of its own, which begins where the one before it
ended (`stoicc.model.replay`) and ends where the stage does. So one gram matrix is alive at a time, whatever the
model's size.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stoicc.ir.errors import InputError
from stoicc.model.layers import Layer
from stoicc.model.processes import Processes
from stoicc.model.replay import Read, Replay
from stoicc.ops._hooks import Same, run, watching
from stoicc.ops.statistics import Collector, Statistics
from stoicc.weights import non_finite

CalibrationLike: TypeAlias = Iterable[Any] | Callable[[nn.Module], object]
Digest: TypeAlias = "hashlib.blake2b"
ROUNDING = 1e-2
"""Relative difference of sums over samples that devices which add in any order may show after some layers."""


class _Enough(BaseException):
    """Ends a forward once the layers of a stage have seen their inputs; no model catches it by accident."""


class Calibration:
    """Inputs on which a model is run, as often as needed.

    Args:
        given: batches, each what the model is called with (a tensor, a tuple of arguments, a mapping
            of keyword arguments), or a function that runs the model: `lambda model: model.encode(texts)`.
            A generator is kept as a list; a loader must give the same batches in every run.
        processes: those with which sums are shared.
    """

    def __init__(self, given: CalibrationLike, processes: Processes | None = None) -> None:
        if isinstance(given, (Tensor, Mapping, str)) or not (callable(given) or isinstance(given, Iterable)):
            raise InputError(
                f"calibration: expected batches or a function of the model, found {type(given).__name__}; "
                "write [batch] for a single one"
            )
        self.function = None if isinstance(given, Iterable) else given
        self.calls: list[_Call] | None = None
        self.processes = processes or Processes(False)
        self._batches: Iterable[Any] = []
        if isinstance(given, Iterable):
            self._batches = list(given) if iter(given) is given else given

    def runs(self) -> Iterator[Callable[[nn.Module], object]]:
        """One call of the model for each batch, or the one of a function."""
        if self.function is not None:
            yield self.function
        for batch in self._batches:
            yield partial(run, batch=batch)

    def stage_runs(self) -> Iterator[Callable[[nn.Module], object]]:
        """As `runs`; in place of a function the calls of the model that it made in the survey, where they are known."""
        return iter(self.calls) if self.calls is not None else self.runs()

    def update(self, digest: Digest) -> None:
        """Hash the tensors of all batches; a function's inputs are unknown before it runs."""
        for batch in self._batches:
            for leaf in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch):
                hash_tensor(digest, leaf) if isinstance(leaf, Tensor) else digest.update(repr(leaf).encode())


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of the model that a function made."""

    args: Any
    kwargs: Any
    inference: bool

    def __call__(self, model: nn.Module) -> object:
        with torch.inference_mode() if self.inference else nullcontext():
            return model(*_own(self.args), **_own(self.kwargs))


class _Opaque(Exception):
    """An argument of a kind that cannot be copied safely."""


def _own(value: Any) -> Any:
    """The same values in tensors and containers of our own, which a model and a function may write into."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if type(value) in (tuple, list):
        return type(value)(map(_own, value))
    if isinstance(value, MutableMapping):
        own = copy.copy(value)
        for key, each in value.items():
            own[key] = _own(each)
        return own
    raise _Opaque


class _Recorder:
    """Notes how a function calls the model; what it does besides is not known to stages.

    Attributes:
        calls: of the model so far; None once one could not be noted.
        number: of calls.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[_Call] | None = []
        self.number = 0
        self._model, self._depth = model, 0

    def __enter__(self) -> "_Recorder":
        self._hooks = (
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._after, always_call=True),
        )
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def saw_layer(self) -> None:
        """A layer was called: outside the model's own forward, what leads to it is unknown."""
        if not self._depth:
            self.calls = None

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._depth += 1
        self.number += 1
        if self.calls is None:
            return
        try:
            if self._depth > 1 or torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
                raise _Opaque
            self.calls.append(_Call(_own(args), _own(kwargs), torch.is_inference_mode_enabled()))
        except _Opaque:
            self.calls = None

    def _after(self, module: nn.Module, args: Any, result: Any) -> None:
        self._depth -= 1


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
        first: a sketch of what each layer saw first, by name.
    """

    stages: tuple[Stage, ...]
    unseen: tuple[Layer, ...]
    digest: str
    first: Mapping[str, Tensor]


def survey(model: nn.Module, layers: Sequence[Layer], calibration: Calibration) -> Survey:
    """Run all batches once.

    Raises:
        InputError: no batch, or an input that is not finite: which layer, batch, sample and channel.
    """
    of_name = {name: layer for layer in layers for name in layer.modules}
    tokens: dict[Layer, list[tuple[int, int]]] = {}
    first: dict[str, Tensor] = {}
    digest = hashlib.blake2b(digest_size=16)
    calibration.update(digest)
    batch = token = 0
    last: Same | None = None
    recorder = None if calibration.function is None else _Recorder(model)

    def see(name: str, x: Tensor) -> None:
        nonlocal token, last, batch
        if recorder is not None:
            recorder.saw_layer()
            batch = max(0, recorder.number - 1)
        if last is None or not last.holds(x):
            last, token = Same(x), token + 1
            _refuse_non_finite(x, name, batch)
            if calibration.function is not None and not tokens:
                hash_tensor(digest, x)
        if name not in first:
            first[name] = sketch(x)
        tokens.setdefault(of_name[name], []).append((batch, token))

    with watching(model, of_name, see), recorder or nullcontext():
        for batch, forward in enumerate(calibration.runs()):  # noqa: B007  read by `see`
            last = None
            forward(model)
    if not token:
        raise InputError("calibration: expected batches that reach a layer of the recipe, found none")
    if recorder is not None:
        calibration.calls = recorder.calls
        batch = max(0, recorder.number - 1)
    grouped: dict[tuple[tuple[int, int], ...], list[Layer]] = {}
    for layer, seen in sorted(tokens.items(), key=lambda entry: entry[1]):
        grouped.setdefault(tuple(seen), []).append(layer)
    stages = tuple(Stage(tuple(group), _calls(seen, batch + 1)) for seen, group in grouped.items())
    return Survey(stages, tuple(layer for layer in layers if layer not in tokens), digest.hexdigest(), first)


def collect_stage(
    model: nn.Module,
    stage: Stage,
    calibration: Calibration,
    dtype: torch.dtype,
    replay: Replay | None = None,
    first: dict[str, Tensor] | None = None,
    also: Callable[[], Callable[[Tensor], None]] | None = None,
) -> Statistics:
    """Statistics of a stage's inputs, with a gram matrix, in the model as it is now; of all processes.

    Args:
        replay: what earlier stages left, to go on from; None: every run starts at the model's input.
        first: gets a sketch of what the stage's first layer saw first.
        also: called when the runs begin, possibly more than once; what it returns is called with every input.
    """
    while True:
        try:
            with replay.over(model) if replay is not None else nullcontext():
                found = _collected(model, stage, calibration, dtype, replay, first, also)
            return calibration.processes.summed({stage.layers[0].name: found})[stage.layers[0].name]
        except Read as read:
            assert replay is not None
            replay.keep(read.kind)


def _collected(
    model: nn.Module,
    stage: Stage,
    calibration: Calibration,
    dtype: torch.dtype,
    replay: Replay | None,
    first: dict[str, Tensor] | None,
    also: Callable[[], Callable[[Tensor], None]] | None,
) -> Statistics:
    leader = stage.layers[0]
    collector = Collector(gram=True, dtype=dtype, name=leader.name)
    besides = None if also is None else also()
    may_stop = (calibration.function is None or calibration.calls is not None) and stage.calls is not None
    batch = seen = 0

    def see(name: str, x: Tensor) -> None:
        nonlocal seen
        collector.add(x)
        if besides is not None:
            besides(x)
        if first is not None and batch == seen == 0:  # what it sees later may come through layers of its own stage
            first[name] = sketch(x)
        seen += 1
        if may_stop and seen == stage.calls:
            raise _Enough

    with watching(model, leader.modules, see):
        for batch, forward in enumerate(calibration.stage_runs()):
            seen = 0
            if replay is not None:
                replay.begin(batch)
            try:
                forward(model)
            except _Enough:
                pass
    return collector.statistics()


def try_out(model: nn.Module, calibration: Calibration, first: Mapping[str, Tensor] | None = None) -> str | None:
    """Run the first batch on a compressed model; the first layer of `first` that sees something else than it saw.

    Raises:
        InputError: the model cannot run with kernels in place of its layers.
    """
    found: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        if name not in found:
            found[name] = sketch(x)

    with watching(model, first or (), see):
        try:
            next(calibration.runs())(model)
        except Exception as error:
            raise InputError(
                f"compressed model: expected it to run as before, found {type(error).__name__}: {error}; "
                "exclude layers whose weight the model reads itself"
            ) from error
    return other_input(first or {}, found)


def sketch(x: Tensor) -> Tensor:
    """Float32 `[2, K]` on the CPU: sums over samples of x and of |x|."""
    x = x.detach().reshape(-1, x.shape[-1])
    return torch.stack([x.sum(0, dtype=torch.float32), x.abs().sum(0, dtype=torch.float32)]).cpu()


def other_input(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """The first layer that saw something else, by sketches; rounding is no difference."""
    for name, one in expected.items():
        other = found.get(name)
        if other is None or other.shape != one.shape or bool((other - one).norm() > ROUNDING * one.norm()):
            return name
    return None


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
