"""Runs of a model that go on where earlier ones ended: calibrating all layers costs about a run more, not one a layer.

What a run computes before it calls a layer that is still to be compressed is final: no later run changes it. A module
that holds layers (a block) and returns within that part keeps a copy of what it returned, and later runs take the copy
in place of running it. A copy is let go when the next module beside it has one, as that module alone will have read
it; code that reads it all the same ends the run, which is then repeated with copies of that kind kept.

That modules do nothing but return values is checked where it can be (inputs that they change), and `compress` compares
what layers saw with what they see in the finished model.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from stoicc.model.layers import Layer
from stoicc.weights import version_of

Path: TypeAlias = tuple[tuple[str, int], ...]
"""A call within a run: names of the modules around it and its own, each with how many such calls came before it."""

_PLAIN = (bool, int, float, str, type(None))


class Read(BaseException):
    """Something read a value that was let go; `kind` is of its module. No model catches it by accident."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class _Gone(Tensor):
    """Shape, dtype and device of a value that was let go; who asks for more raises `Read`."""

    kind: str
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch does

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, kind: str) -> "_Gone":
        gone: _Gone = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        gone.kind = kind
        return gone

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise Read(next(leaf.kind for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Gone)))


@dataclass(eq=False)
class _Copy:
    """What a call returned, tensors in the CPU's memory.

    Attributes:
        leaves: with the device of each tensor, None for other values.
    """

    leaves: list[tuple[Any, torch.device | None]]
    spec: TreeSpec

    @staticmethod
    def of(leaves: list[Any], spec: TreeSpec) -> "_Copy":
        """Of a flattened result."""
        kept: list[tuple[Any, torch.device | None]] = [
            (x.detach().to("cpu", copy=True), x.device) if isinstance(x, Tensor) else (x, None) for x in leaves
        ]
        return _Copy(kept, spec)

    def given(self) -> Any:
        """As the module would return it; the receiver may write into it."""
        leaves = [leaf.to(device, copy=True) if type(leaf) is Tensor else leaf for leaf, device in self.leaves]
        return tree_unflatten(leaves, self.spec)

    def let_go(self, kind: str) -> None:
        """Keep of tensors what takes no memory."""
        self.leaves = [(_Gone(x, d, kind) if d and type(x) is Tensor else x, d) for x, d in self.leaves]


@dataclass(eq=False)
class _Frame:
    """A call that has not returned.

    Attributes:
        calls: how often each module was called in it.
        done: calls in it whose copies are kept.
    """

    path: Path
    calls: dict[str, int] = field(default_factory=dict)
    done: list[Path] = field(default_factory=list)


class Replay:
    """Copies of what modules returned, for each run (batch).

    Args:
        layers: those that are to be compressed.
        changing: whether they are replaced as soon as they are settled; if not, all that a run computes is final.
    """

    def __init__(self, layers: Sequence[Layer], changing: bool = True) -> None:
        places = {place for layer in layers for places in layer.places.values() for place in places}
        self._leaves = places
        self._holders = {place[: dot.start()] for place in places for dot in re.finditer(r"\.", place)}
        self._waiting, self._changing = set(places), changing
        self._probed: set[str] = set()
        self._copies: dict[tuple[int, Path], _Copy] = {}
        self._kept: set[str] = set()
        self._run, self._final = 0, True
        self._stack: list[_Frame] = []

    def settle(self, layers: Sequence[Layer]) -> None:
        """Nothing is to be known of these layers any more; if layers are changing, these did."""
        for layer in layers:
            self._waiting.difference_update(*layer.places.values())

    @contextmanager
    def probing(self, layer: Layer) -> Iterator[None]:
        """A layer that still waits does something else in these runs: nothing after it is final."""
        self._probed = {place for places in layer.places.values() for place in places}
        try:
            yield
        finally:
            self._probed = set()

    def keep(self, kind: str) -> None:
        """Start again without copies, and let none of this kind go from now on."""
        self._kept.add(kind)
        self._copies.clear()

    def begin(self, run: int) -> None:
        """Called before each run of the model with the number of the batch."""
        self._run, self._final = run, True
        self._stack = [_Frame(())]

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Modules of the model keep and give out copies; afterwards they are as they were."""
        before: list[tuple[nn.Module, Any]] = []
        try:
            for name, module in model.named_modules():
                if name in self._leaves or (name in self._holders and not isinstance(module, torch.jit.ScriptModule)):
                    before.append((module, module.__dict__.get("forward")))
                    module.__dict__["forward"] = self._around(name, module.forward)
            yield
        finally:
            for module, forward in before:
                del module.__dict__["forward"]
                if forward is not None:
                    module.__dict__["forward"] = forward

    def _around(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def around(*args: Any, **kwargs: Any) -> Any:
            return self._call(name, forward, args, kwargs)

        return around

    def _call(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        frame = self._stack[-1]
        if name in self._leaves and (name in self._waiting or len(self._stack) > 1):
            self._final &= not (name in self._probed or (self._changing and name in self._waiting))
            return forward(*args, **kwargs)  # one product; its copy would be the largest in a block
        number = frame.calls.get(name, 0)
        frame.calls[name] = number + 1
        path = (*frame.path, (name, number))
        copy = self._copies.get((self._run, path))
        if copy is not None and self._final:
            frame.done.append(path)
            return copy.given()
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [version_of(x) for x in inputs]
        self._stack.append(_Frame(path))
        try:
            result = forward(*args, **kwargs)
        finally:
            self._stack.pop()
        waiting = any(place.startswith(f"{name}.") for place in self._waiting)  # someone is to look inside
        if self._final and not waiting and versions == [version_of(x) for x in inputs]:
            self._copy(frame, path, result)
        return result

    def _copy(self, frame: _Frame, path: Path, result: Any) -> None:
        """Keep a copy of what a call returned, if it is of tensors and plain values; drop those within and before."""
        leaves, spec = tree_flatten(result)
        if not all(type(leaf) is Tensor or isinstance(leaf, _PLAIN) for leaf in leaves):
            return
        within = [key for key in self._copies if key[0] == self._run and key[1][: len(path)] == path]
        for key in within:
            del self._copies[key]
        for earlier in frame.done:
            kind, copy = re.sub(r"\d+", "#", earlier[-1][0]), self._copies.get((self._run, earlier))
            if copy is not None and kind not in self._kept:
                copy.let_go(kind)
        frame.done.append(path)
        self._copies[self._run, path] = _Copy.of(leaves, spec)
