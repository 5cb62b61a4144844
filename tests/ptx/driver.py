"""Triton's driver, replaced: a kernel is compiled for a GPU that is not there and launched on the emulator.

With it the launch itself is under test: names of arguments, what Triton specialises, grids and workspaces.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver

from tests.ptx.memory import GlobalMemory
from tests.ptx.run import bytes_of, kernel_of

FIRST_DEVICE = 1000
"""Devices of this driver: their numbers are nobody else's, as Triton keeps what it compiled by number."""


class EmulatedDriver:
    """What Triton's JIT asks of a driver, for one GPU of a compute capability."""

    def __init__(self, capability: int) -> None:
        self._capability = capability
        self.launched: list[str] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
            load_binary=lambda name, binary, shared, device: (object(), 0, 0, 0, 1024),
        )

    def get_current_device(self) -> int:
        return FIRST_DEVICE + self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What runs a compiled kernel: its grid and arguments come first to last as Triton binds them."""
        group = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json")
        assert group is not None
        kernel = kernel_of(Path(group[f"{metadata.name}.ptx"]).read_text())
        runs = [kind != "constexpr" for kind in source.signature.values()]

        def launch(x: int, y: int, z: int, *bound: Any) -> None:
            arguments = bound[6:]  # stream, function, two kinds of metadata and two hooks stand before
            assert (y, z, len(arguments)) == (1, 1, len(runs))
            memory, addresses = GlobalMemory(), {}
            given: list[int] = []
            for name, value, passed in zip(source.signature, arguments, runs, strict=True):
                if passed and isinstance(value, Tensor):
                    if value.data_ptr() not in addresses:
                        addresses[value.data_ptr()] = memory.add(name, bytes_of(value))
                    given.append(addresses[value.data_ptr()])
                elif passed:
                    given.append(int(value))
            # Triton keeps this launcher as long as the kernel: a later test may launch it with a driver of its own.
            active = driver.active
            assert isinstance(active, EmulatedDriver)
            active.launched.append(metadata.name)
            kernel.run(x, given, memory, metadata.shared)

        return launch


@contextmanager
def emulated(capability: int) -> Iterator[EmulatedDriver]:
    """Triton launches on the emulator inside of this."""
    before, ours = driver._active, EmulatedDriver(capability)
    driver.set_active(ours)
    try:
        yield ours
    finally:
        driver._active = before
