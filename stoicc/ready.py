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

MOST = 64
"""Shapes and dtypes of x that a kernel remembers."""
_autocast = torch.is_autocast_enabled


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """What is known about x of one shape and dtype.

    Attributes:
        call: y from such an x, if contiguous; None where it does not serve any more.
        held: name and tensor of the buffers that are there, and how often each was edited by then.
    """

    call: Callable[[Tensor], Tensor | None]
    held: tuple[tuple[str, Tensor, int], ...]

    def serves(self, x: Tensor, buffers: Buffers) -> bool:
        """Whether x is such an input, and the kernel as it was."""
        if x.layout is not torch.strided or not x.is_cpu or not x.is_contiguous():
            return False
        if _autocast("cpu") or fwAD._current_level >= 0:
            return False
        return all(
            dict.get(buffers, name) is tensor and version_of(tensor) == version for name, tensor, version in self.held
        )


class ReadyCalls:
    """What a kernel has found out about the inputs of its tiles executor."""

    def __init__(self) -> None:
        self._known: dict[tuple[torch.Size, torch.dtype], _Ready] = {}

    def call(self, x: Tensor, buffers: Buffers) -> Tensor | None:
        """y for a tensor like one that is known, if nobody watches it; else None."""
        if not unwatched(x):
            return None  # its shape may be one of symbols
        known = self._known.get((x.shape, x.dtype))
        if known is None or not known.serves(x, buffers):
            return None
        y = known.call(x)
        if y is None:
            self._known.pop((x.shape, x.dtype), None)
        return y

    def remember(self, x: Tensor, executor: Executor | None, buffers: Buffers, built_for: tuple[object, ...]) -> None:
        """What was found out about x, for an executor that was built for what the buffers are.

        Nothing while planes wait to be let go, which every call tries again.

        Args:
            built_for: `buffers.state()` then: one who edits while another calls is not missed by the next.
        """
        if executor is None or not unwatched(x) or (x.shape, x.dtype) in self._known or buffers.trained:
            return
        if buffers.packed is None and executor.packed is not None and executor.packed.names:
            return
        call = executor.prepared(x.shape, x.dtype)
        held = tuple((name, tensor, version_of(tensor)) for name, tensor in buffers.real().items())
        ready = None if call is None else _Ready(call, held)
        if ready is None or buffers.state() != built_for:
            return
        if len(self._known) >= MOST:
            self._known.pop(next(iter(self._known)), None)  # the oldest
        self._known[x.shape, x.dtype] = ready

    def clear(self) -> None:
        """Forget all: an executor or the values of the kernel are others now."""
        self._known.clear()
