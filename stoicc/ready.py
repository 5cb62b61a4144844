"""Calls like one before: what `Kernel.forward` finds out about an input, kept for inputs like it.

A weight that comes from memory leaves little of the interpreter in the caches: after it each line of Python waits for
its code and its data, and a call that asks everything anew waits for hundreds of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad as fwAD

from stoicc.buffers import Buffers
from stoicc.codegen.executor import Executor
from stoicc.dispatch import unwatched
from stoicc.weights import version_of

MOST = 16
"""Shapes and dtypes of x that a kernel remembers."""
_autocast = torch.is_autocast_enabled


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """What is known about x of one shape and dtype.

    Attributes:
        call: y from such an x, if contiguous; None where it does not serve any more.
        changes: of the kernel's buffers, when that was found out.
        held: buffers that are there, and how often each was edited by then.
    """

    call: Callable[[Tensor], Tensor | None]
    changes: int
    held: tuple[tuple[Tensor, int], ...]

    def serves(self, x: Tensor, buffers: Buffers) -> bool:
        """Whether x is such an input that nobody watches, and the kernel as it was."""
        if buffers.changes != self.changes or x.layout is not torch.strided or not x.is_cpu:
            return False
        if not x.is_contiguous() or _autocast("cpu") or fwAD._current_level >= 0:
            return False
        return unwatched(x) and all(version_of(tensor) == version for tensor, version in self.held)


class ReadyCalls:
    """What a kernel has found out about the inputs of its tiles executor."""

    def __init__(self) -> None:
        self._known: dict[tuple[torch.Size, torch.dtype], _Ready] = {}

    def call(self, x: Tensor, buffers: Buffers) -> Tensor | None:
        """y for a plain tensor like one that is known; None for others. Not for what torch compiles."""
        known = self._known.get((x.shape, x.dtype))
        if known is None or not known.serves(x, buffers):
            return None
        y = known.call(x)
        if y is None:
            self._known.pop((x.shape, x.dtype), None)
        return y

    def remember(self, x: Tensor, executor: Executor | None, buffers: Buffers) -> None:
        """What was found out about x, unless planes still wait to be let go, which every call tries again."""
        if executor is None or (x.shape, x.dtype) in self._known or buffers.trained:
            return
        if buffers.packed is None and executor.packed is not None:
            return
        call = executor.prepared(x.shape, x.dtype)
        if call is None:
            return
        if len(self._known) >= MOST:
            self._known.clear()
        held = tuple((tensor, version_of(tensor)) for tensor in buffers.real().values())
        self._known[x.shape, x.dtype] = _Ready(call, buffers.changes, held)

    def clear(self) -> None:
        """Forget all: an executor or the values of the kernel are others now."""
        self._known.clear()
