"""The one door to every executor: a `torch.library` op per executor kind.

`stoicc::tiles`, `stoicc::dense_once` and `stoicc::reference` take x `[N, K]`, an optional uint8
workspace (scratch; allocated inside where None) and the handle of a kernel, and return y
`[N, M]`; `stoicc::input_gradient` is their backward. Fake tensors, torch.compile and autograd see
them as ordinary ops; a plain call outside of those goes to the executor at once.
"""

import contextlib
import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stoicc.ir.dtypes import output_dtype
from stoicc.ir.errors import InputError

if TYPE_CHECKING:
    from stoicc.kernel import Kernel

_KERNELS: "weakref.WeakValueDictionary[int, Kernel]" = weakref.WeakValueDictionary()
_HANDLES = itertools.count(1)
_LIBRARY = torch.library.Library("stoicc", "DEF")
KINDS = {"tiles": "tiles", "dense-once": "dense_once", "reference": "reference"}


def new_handle(kernel: "Kernel") -> int:
    """A number by which ops find the kernel; it does not keep the kernel alive."""
    handle = next(_HANDLES)
    _KERNELS[handle] = kernel
    return handle


def execute(kind: str, x: Tensor, workspace: Tensor | None, handle: int) -> Tensor:
    """y `[N, M]` of a kernel for x `[N, K]`, through the op of this executor kind.

    Where nobody but the executor would see the op, it runs without torch's dispatcher, which a large weight
    pushes out of the caches on each call, so that it would have to come back from memory on the next.
    """
    if _unwatched(x):
        return _run(kind, x, workspace, handle)
    y: Tensor = getattr(torch.ops.stoicc, KINDS[kind])(x, workspace, handle)
    return y


def _unwatched(x: Tensor) -> bool:
    """Whether x is numbers and nothing more: no trace, gradient, transform, mode or subclass that looks on."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not (x.requires_grad and torch.is_grad_enabled())
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._get_tracing_state()
        and not torch._C._autograd._profiler_enabled()
    )


def _kernel(handle: int) -> "Kernel":
    try:
        return _KERNELS[handle]
    except KeyError:
        raise InputError(
            f"executor: expected the handle of a live kernel, found {handle}; keep the kernel alive"
        ) from None


def _run(kind: str, x: Tensor, workspace: Tensor | None, handle: int) -> Tensor:
    kernel = _kernel(handle)
    if x.ndim != 2 or x.shape[1] != kernel.in_features or x.device != kernel.device:
        raise InputError(
            f"op stoicc::{KINDS[kind]}: expected x [N, {kernel.in_features}] on {kernel.device}, "
            f"found {list(x.shape)} on {x.device}"
        )
    out = x.new_empty(x.shape[0], kernel.out_features, dtype=output_dtype(kernel.program.dtype, x.dtype))
    if x.shape[0] == 0:
        return out
    executor = kernel.executor(kind)
    needed = executor.workspace_bytes(x.shape[0], x.dtype)
    kernel.note_workspace(needed)
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.uint8, device=x.device)
    elif workspace.dtype != torch.uint8 or workspace.numel() < needed or workspace.device != x.device:
        raise InputError(
            f"op stoicc::{KINDS[kind]}: expected a workspace of at least {needed} bytes (uint8) on {x.device}, found "
            f"{workspace.numel()} of {workspace.dtype} on {workspace.device}"
        )
    # Triton launches on the current device, which need not be that of x
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        executor.run(x.contiguous(), out, workspace)
    return out


def _define(kind: str) -> None:
    op = KINDS[kind]
    _LIBRARY.define(f"{op}(Tensor x, Tensor? workspace, int handle) -> Tensor")

    def run(x: Tensor, workspace: Tensor | None, handle: int) -> Tensor:
        return _run(kind, x, workspace, handle)

    def fake(x: Tensor, workspace: Tensor | None, handle: int) -> Tensor:
        kernel = _kernel(handle)
        return x.new_empty(x.shape[0], kernel.out_features, dtype=output_dtype(kernel.program.dtype, x.dtype))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.handle = inputs[2]
        ctx.kernel = _kernel(inputs[2])  # alive until the backward pass

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.stoicc.input_gradient(grad, ctx.handle), None, None

    _LIBRARY.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stoicc::{op}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"stoicc::{op}", backward, setup_context=setup_context, lib=_LIBRARY)


def _input_gradient(grad: Tensor, handle: int) -> Tensor:
    return _kernel(handle).input_gradient(grad)


def _fake_input_gradient(grad: Tensor, handle: int) -> Tensor:
    return grad.new_empty(grad.shape[0], _kernel(handle).in_features)


_LIBRARY.define("input_gradient(Tensor grad, int handle) -> Tensor")
_LIBRARY.impl("input_gradient", _input_gradient, "CompositeExplicitAutograd")
torch.library.register_fake("stoicc::input_gradient", _fake_input_gradient, lib=_LIBRARY)
for _kind in KINDS:
    _define(_kind)
