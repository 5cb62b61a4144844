"""Gradients of a kernel: which executors they take, and what surrounds those.

The transposed product runs from the same payload as the product, by a transposed schedule (`build-csc`); what a fused
activation was given is computed anew. `stoicc/dispatch.py` puts these functions behind ops of torch.
"""

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stoicc.codegen.gradient import (
    at_input,
    at_tiles,
    beside_gradients,
    plane_gradients,
    through_activation,
    wide_dtype,
)
from stoicc.codegen.reference import scaled_input
from stoicc.ir.types import Module
from stoicc.passes.base import scheduled
from stoicc.passes.build_csc import BuildCsc

if TYPE_CHECKING:
    from stoicc.kernel import Kernel


def module_for(role: str, module: Module) -> Module:
    """The module that an executor is built from: with columns for "transposed", no activation for "linear"."""
    schedule = scheduled(module)
    if role == "transposed":
        return module if schedule.transposed is not None else BuildCsc().apply(module)
    if role == "linear":
        tiles = replace(module.tiles, beside=replace(module.tiles.beside, activation=None))
        return Module(tiles, replace(schedule, epilogue=tuple(n for n in schedule.epilogue if n != "activation")))
    return module


def run_executor(kernel: "Kernel", role: str, x: Tensor, out: Tensor) -> Tensor:
    """Run an executor of a kernel into `out`, which is returned; the reference's for float64."""
    if x.shape[0] == 0:
        return out
    executor = kernel.executor(f"reference-{role}" if x.dtype == torch.float64 else role)
    needed = executor.workspace_bytes(x.shape[0], x.dtype)
    kernel.note_workspace(needed)
    workspace = torch.empty(needed, dtype=torch.uint8, device=x.device)
    # Triton launches on the current device, which need not be that of x
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        executor.run(x.contiguous(), out, workspace)
    return out


def before_activation(kernel: "Kernel", grad: Tensor, x: Tensor) -> Tensor:
    """dL/dz `[N, M]` from dL/dy, where y = act(z): z is computed anew from x `[N, K]`."""
    z = run_executor(kernel, "linear", x, torch.empty_like(grad, memory_format=torch.contiguous_format))
    return through_activation(kernel.program, z, grad)


def input_gradient(kernel: "Kernel", grad: Tensor) -> Tensor:
    """dL/dx `[N, K]` from dL/dz `[N, M]`."""
    program, pools = kernel.program, kernel.source_of_pools
    inner = at_tiles(program, pools, grad)
    product = run_executor(kernel, "transposed", inner, inner.new_empty(inner.shape[0], kernel.in_features))
    return at_input(program, pools, product, grad)


def weight_gradients(kernel: "Kernel", grad: Tensor, x: Tensor, names: list[str]) -> list[Tensor]:
    """dL/d(pool) for pools by name, each of its pool's shape and dtype, from dL/dz `[N, M]` and x `[N, K]`."""
    program, pools = kernel.program, kernel.source_of_pools
    beside = beside_gradients(program, pools, grad, x)
    found = {name: beside[name]().to(pools[name].dtype) for name in names if name in beside}
    if planes := frozenset(names) - beside.keys():
        inner = at_tiles(program, pools, grad)
        scaled = program.beside.input_scale is not None
        meets = scaled_input(program, pools, x.to(wide_dtype(x.dtype)) if scaled else x)
        both = torch.promote_types(inner.dtype, meets.dtype)
        found |= plane_gradients(program, pools, inner.to(both), meets.to(both), planes)
    return [found[name] for name in names]
