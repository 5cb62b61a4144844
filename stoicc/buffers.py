"""The buffers of a kernel: canonical planes that are let go while an executor holds them packed.

A plane is let go only where nobody but its kernel could see it: no reference, view or array shares it.
Whoever asks for it later, by any door of `nn.Module`, is given real tensors again, and whatever was
packed is dropped: an edit can therefore never miss the executor. Tensors that somebody holds stay.
"""

import sys
import threading
from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from stoicc.codegen.executor import PackedPlanes
from stoicc.ir.format import Planes
from stoicc.ir.planes import PlaneSource, pool_name
from stoicc.pools import aligned
from stoicc.weights import version_of


class Buffers(dict[str, Tensor | None]):
    """What a kernel has as `_buffers`: whoever reads a tensor finds all of them there.

    Where a plane was let go, the dictionary itself holds a meta tensor: code that reads past these methods
    fails, and does not compute with nothing.

    Attributes:
        lock: held while tensors come and go.
        packed: what holds the pools that were let go, or None.
        gone: the names of those.
        trained: the parameters of the kernel: pools that training changes, which stand here no longer.
    """

    def __init__(
        self,
        *given: Any,
        dropped: Callable[[], object] = lambda: None,
        trained: Mapping[str, Tensor | None] | None = None,
    ) -> None:
        super().__init__(*given)
        self.trained = {} if trained is None else trained
        self.lock = threading.RLock()
        self.packed: PackedPlanes | None = None
        self.gone: frozenset[str] = frozenset()
        self._dropped = dropped
        self._changes = 0

    # -- for the kernel --------------------------------------------------------------------

    def state(self) -> tuple[object, ...]:
        """Differs from an earlier one where tensors were exchanged or (by torch's count) edited."""
        real = ((id(tensor), version_of(tensor)) for tensor in self._here().values())
        if not self.trained:  # as on each call of a kernel that serves
            return (self._changes, *real)
        return (self._changes, *real, *((id(p), p.data_ptr()) for p in self._parameters().values()))

    def steps(self) -> tuple[object, ...]:
        """Differs from an earlier one where values of parameters were edited."""
        return tuple(version_of(parameter) for parameter in self._parameters().values()) if self.trained else ()

    def real(self) -> dict[str, Tensor]:
        """The tensors that are here now, parameters without their gradient."""
        return {**self._here(), **{name: p.detach() for name, p in self._parameters().items()}}

    def _here(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in super().items() if tensor is not None and name not in self.gone}

    def _parameters(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self.trained.items() if parameter is not None}

    def alone(self, names: frozenset[str]) -> bool:
        """Whether nobody but this dictionary has any of these tensors, or anything that shares their memory."""
        if any(name not in self for name in names):  # a parameter
            return False
        if any(_references(self, name) != _of_one_owner() for name in names):  # first, as it is quickly said
            return False
        return all(_plain(super(Buffers, self).__getitem__(name)) for name in names)

    def let_go(self, packed: PackedPlanes, names: frozenset[str]) -> None:
        """Free tensors that were packed just now; `alone` must have said that one may."""
        for name in names:
            tensor = super().__getitem__(name)
            assert tensor is not None
            super().__setitem__(name, torch.empty_like(tensor, device="meta"))
        self.packed, self.gone = packed, names

    def restore(self) -> None:
        """Have all tensors here again, and drop what was packed."""
        with self.lock:
            if self.packed is None:
                return
            for name, tensor in self.packed.whole().items():
                if name in self.gone:
                    super().__setitem__(name, tensor)
            self.packed, self.gone = None, frozenset()
            self._changes += 1
            self._dropped()

    def _restore_if(self, name: str) -> None:
        if name in self.gone:
            self.restore()

    # -- for everybody else ----------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor | None:
        with self.lock:
            self._restore_if(name)
            return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def items(self) -> ItemsView[str, Tensor | None]:  # type: ignore[override]
        """Of the tensors that are here now: they are held, and stay, while somebody iterates."""
        with self.lock:
            self.restore()
            return dict(super().items()).items()

    def values(self) -> ValuesView[Tensor | None]:  # type: ignore[override]
        return dict(self.items()).values()

    def __iter__(self) -> Iterator[str]:  # without a method of ours, dict(self) would read past __getitem__
        return super().__iter__()

    def copy(self) -> "Buffers":
        return Buffers(self.items())

    def __setitem__(self, name: str, tensor: Tensor | None) -> None:
        with self.lock:
            self._restore_if(name)
            self._changes += 1
            super().__setitem__(name, tensor)

    def __delitem__(self, name: str) -> None:
        with self.lock:
            self._restore_if(name)
            self._changes += 1
            super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        with self.lock:
            found = self[name] if name in self or not default else default[0]
            if name in self:
                del self[name]
            return found

    def popitem(self) -> tuple[str, Any]:
        name = next(reversed(self))
        return name, self.pop(name)

    def clear(self) -> None:
        for name in tuple(self):
            del self[name]

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def __ior__(self, other: Any) -> Self:  # type: ignore[override,misc]
        self.update(other)
        return self

    def update(self, *given: Any, **named: Any) -> None:
        for name, tensor in dict(*given, **named).items():
            self[name] = tensor

    def __repr__(self) -> str:
        return repr(dict(self.items()))


class BufferSource(PlaneSource):
    """Buffers for reading: planes that were let go are unpacked to copies, which nobody keeps."""

    def __init__(self, buffers: Buffers, device: torch.device) -> None:
        self._buffers, self._device = buffers, device

    @property
    def device(self) -> torch.device:
        return self._device

    def __getitem__(self, name: str) -> Tensor:
        tensor, packed = self._found(name)
        return aligned(tensor) if packed is None else packed.pool(name)

    def __iter__(self) -> Iterator[str]:
        return iter((*self._buffers, *self._buffers.trained))

    def __len__(self) -> int:
        return len(self._buffers) + len(self._buffers.trained)

    def whole(self) -> dict[str, Tensor]:
        """All pools by name, as they are or unpacked."""
        with self._buffers.lock:
            packed = self._buffers.packed
            found = self._buffers.real()
        unpacked = packed.whole() if packed else {}
        return {name: found[name] if name in found else unpacked[name] for name in self}

    @property
    def unpacked_bytes(self) -> int:
        packed = self._buffers.packed
        return packed.nbytes if packed else 0

    def packed(self, segment: int) -> Planes | None:
        packed = self._buffers.packed
        return packed.held(segment) if packed else None

    def entries(self, segment: int, ranges: Mapping[str, tuple[int, int]]) -> Planes:
        packed = self._buffers.packed
        found = packed.entries(segment, ranges) if packed else None
        if found is not None:
            return found
        return {name: self[pool_name(segment, name)][first:last] for name, (first, last) in ranges.items()}

    def _found(self, name: str) -> tuple[Tensor, PackedPlanes | None]:
        """The tensor under a name, and what holds its values if it was let go."""
        if (parameter := self._buffers.trained.get(name)) is not None:
            return parameter.detach(), None
        with self._buffers.lock:
            tensor = dict.__getitem__(self._buffers, name)
            assert tensor is not None
            return tensor, self._buffers.packed if name in self._buffers.gone else None


def _plain(tensor: Tensor | None) -> bool:
    """Whether a tensor is nothing but its values, in memory of this process: new ones can stand for it."""
    if type(tensor) is not Tensor or tensor.requires_grad or tensor.is_shared():
        return False
    return all(name.startswith("_dynamo") for name in tensor.__dict__)  # notes of torch.compile, made anew


def _references(tensors: dict[str, Any], name: str) -> tuple[int, int, int, int]:
    """How many references there are to a tensor of a dictionary and to its memory, each from Python and from torch."""
    tensor = dict.__getitem__(tensors, name)
    memory = tensor.untyped_storage()
    of_memory = torch._C._storage_Use_Count(memory._cdata)
    return sys.getrefcount(tensor), tensor._use_count(), sys.getrefcount(memory), of_memory


@cache
def _of_one_owner() -> tuple[int, int, int, int]:
    """What `_references` counts where there is no other; it depends on the versions of Python and torch."""
    return _references({"alone": torch.empty(1)}, "alone")
