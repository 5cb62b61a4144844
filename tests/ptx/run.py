"""Runs what the Gluon dialect compiles to: launches of a module, on the emulator."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from stoicc.codegen.executor import Pools
from stoicc.codegen.gluon.compile import Compiled
from stoicc.ir.dtypes import output_dtype
from tests.ptx.machine import Kernel
from tests.ptx.memory import GlobalMemory
from tests.ptx.program import parse

Mutation = Callable[[str], str]


def emulate(compiled: Compiled, x: Tensor, pools: Pools, mutate: Mutation | None = None) -> Tensor:
    """y `[N, M]` for x `[N, K]`; memory is poisoned first, so that what is not written is NaN.

    Args:
        mutate: changes the PTX of the tiles kernel, to see that a fault is found.

    Raises:
        EmulationError: a kernel did what no kernel may do.
    """
    module = compiled.module.tiles
    out = torch.full((x.shape[0], module.shape[0]), torch.nan, dtype=output_dtype(module.dtype, x.dtype))
    memory = GlobalMemory()
    addresses: dict[int, int] = {}
    for launch in compiled.launches(x, pools, out):
        for name, argument in zip(launch.kernel.arguments, launch.arguments, strict=True):
            if isinstance(argument, Tensor) and argument.data_ptr() not in addresses:
                addresses[argument.data_ptr()] = memory.add(name, bytes_of(argument))
        ptx = launch.kernel.ptx
        if mutate is not None and launch.kernel.name == "tiles_kernel":
            changed = mutate(ptx)
            assert changed != ptx, "the mutation changes nothing"
            ptx = changed
        arguments = [addresses[a.data_ptr()] if isinstance(a, Tensor) else a for a in launch.arguments]
        kernel_of(ptx).run(launch.grid, arguments, memory, launch.kernel.shared)
    return out


@lru_cache(maxsize=8)
def kernel_of(ptx: str) -> Kernel:
    """The kernel of a PTX module, ready to run."""
    return Kernel(parse(ptx))


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory."""
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8).numpy()
