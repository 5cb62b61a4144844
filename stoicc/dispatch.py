"""The one door to every executor: a `torch.library` op per executor kind.

`stoicc::tiles`, `stoicc::dense_once`, `stoicc::vendor` and `stoicc::reference` take x `[N, K]`, an optional uint8
workspace (scratch; allocated inside where None), the handle of a kernel and those of its tensors that are
trained (the kernel reads its own; these are there for autograd), and return y `[N, M]`. Their backward is
`stoicc::before_activation`, `stoicc::input_gradient` and `stoicc::weight_gradients`. Fake tensors, torch.compile
and autograd see them as ordinary ops; a plain call outside of those goes to the executor at once.
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stoicc import gradients
from stoicc.ir.dtypes import TORCH_DTYPES, output_dtype
from stoicc.ir.errors import InputError

if TYPE_CHECKING:
    from stoicc.kernel import Kernel

# names of this module: each look-up on the way to them would touch memory that a large weight pushed out of the caches
is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state
_profiled = torch._C._autograd._profiler_enabled

_KERNELS: "weakref.WeakValueDictionary[int, Kernel]" = weakref.WeakValueDictionary()
_HANDLES = itertools.count(1)
_LIBRARY = torch.library.Library("stoicc", "DEF")
KINDS = {"tiles": "tiles", "dense-once": "dense_once", "vendor": "vendor", "reference": "reference"}


def new_handle(kernel: "Kernel") -> int:
    """A number by which ops find the kernel; it does not keep the kernel alive."""
    handle = next(_HANDLES)
    _KERNELS[handle] = kernel
    return handle


def execute(kind: str, x: Tensor, workspace: Tensor | None, handle: int, trained: Sequence[Tensor] = ()) -> Tensor:
    """y `[N, M]` of a kernel for x `[N, K]`, through the op of this executor kind.

    Where nobody but the executor would see the op, it runs without torch's dispatcher, which a large weight
    pushes out of the caches on each call, so that it would have to come back from memory on the next.
    """
    if unwatched(x, trained):
        return _run(kind, x, workspace, handle)
    y: Tensor = getattr(torch.ops.stoicc, KINDS[kind])(x, workspace, handle, list(trained) or None)
    return y


def unwatched(x: Tensor, trained: Sequence[Tensor] = ()) -> bool:
    """Whether x is numbers and nothing more: no trace, gradient, transform, mode or subclass that looks on.

    `trained` is empty but where autograd will ask for a gradient of one of them.
    """
    return (
        not is_compiling()
        and type(x) is Tensor
        and not ((x.requires_grad or trained) and _grad_enabled())
        and _dispatch_modes() == 0
        and _function_modes() == 0
        and _transform() is None
        and not _tracing()
        and not _profiled()
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
    _LIBRARY.define(f"{op}(Tensor x, Tensor? workspace, int handle, Tensor[]? trained=None) -> Tensor")

    def run(x: Tensor, workspace: Tensor | None, handle: int, trained: Sequence[Tensor] | None = None) -> Tensor:
        return _run(kind, x, workspace, handle)

    def fake(x: Tensor, workspace: Tensor | None, handle: int, trained: Sequence[Tensor] | None = None) -> Tensor:
        kernel = _kernel(handle)
        return x.new_empty(x.shape[0], kernel.out_features, dtype=output_dtype(kernel.program.dtype, x.dtype))

    _LIBRARY.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stoicc::{op}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"stoicc::{op}", _backward, setup_context=_setup_context, lib=_LIBRARY)


# -- backward ------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, ctx.handle, trained = inputs
    trained = trained or ()
    kernel = ctx.kernel = _kernel(ctx.handle)  # alive until the backward pass
    ctx.names = kernel.trained_names() if trained else ()
    ctx.keeps_x = bool(trained) or kernel.program.beside.activation is not None
    # trained tensors are saved for autograd to see that no step comes between the two passes
    ctx.save_for_backward(*((x,) if ctx.keeps_x else ()), *trained)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x = ctx.saved_tensors[0] if ctx.keeps_x else None
    wanted = ctx.needs_input_grad  # without trailing arguments that are as by default
    of_trained = wanted[3] if len(wanted) > 3 else ()
    if ctx.kernel.program.beside.activation is not None:
        grad = torch.ops.stoicc.before_activation(grad, x, ctx.handle)
    to_x = torch.ops.stoicc.input_gradient(grad, ctx.handle) if wanted[0] else None
    names = [name for name, asked in zip(ctx.names, of_trained, strict=True) if asked]
    found = dict(
        zip(names, torch.ops.stoicc.weight_gradients(grad, x, ctx.handle, names) if names else [], strict=True)
    )
    return (to_x, None, None, [found.get(name) for name in ctx.names])[: len(wanted)]


def _input_gradient(grad: Tensor, handle: int) -> Tensor:
    return gradients.input_gradient(_kernel(handle), grad)


def _fake_input_gradient(grad: Tensor, handle: int) -> Tensor:
    return grad.new_empty(grad.shape[0], _kernel(handle).in_features)


def _before_activation(grad: Tensor, x: Tensor, handle: int) -> Tensor:
    return gradients.before_activation(_kernel(handle), grad, x)


def _fake_before_activation(grad: Tensor, x: Tensor, handle: int) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _weight_gradients(grad: Tensor, x: Tensor, handle: int, names: list[str]) -> list[Tensor]:
    return gradients.weight_gradients(_kernel(handle), grad, x, names)


def _fake_weight_gradients(grad: Tensor, x: Tensor, handle: int, names: list[str]) -> list[Tensor]:
    pools = {pool.name: pool for pool in _kernel(handle).program.pools()}
    return [grad.new_empty(pools[name].shape, dtype=TORCH_DTYPES[pools[name].dtype]) for name in names]


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise InputError(
        "gradient of a kernel: expected a first derivative, found a derivative of one; leave create_graph out, or "
        "multiply by kernel.to_dense()"
    )


def _define_gradient(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = f"stoicc::{schema.partition('(')[0]}"
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    torch.library.register_autograd(name, _no_second_derivative, lib=_LIBRARY)


_define_gradient("input_gradient(Tensor grad, int handle) -> Tensor", _input_gradient, _fake_input_gradient)
_define_gradient(
    "before_activation(Tensor grad, Tensor x, int handle) -> Tensor", _before_activation, _fake_before_activation
)
_define_gradient(
    "weight_gradients(Tensor grad, Tensor x, int handle, str[] names) -> Tensor[]",
    _weight_gradients,
    _fake_weight_gradients,
)
for _kind in KINDS:
    _define(_kind)
