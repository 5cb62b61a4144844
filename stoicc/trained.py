"""Pools of a kernel as parameters: what training changes, and how a kernel is made to train as another does."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stoicc.ir.errors import InputError

if TYPE_CHECKING:
    from stoicc.kernel import Kernel

Training = tuple[bool, Mapping[str, bool]]
"""Whether a kernel is in training mode, and by name of each parameter whether it takes gradients."""


def make_parameters(kernel: "Kernel", requires_grad: bool, only: Iterable[str] | None) -> None:
    """Buffers to parameters, or back; see `Kernel.requires_grad_`."""
    trainable = kernel.trainable()
    names = trainable if only is None else tuple(only)
    if wrong := [name for name in names if name not in trainable]:
        raise InputError(
            f"kernel {kernel.program.name}: expected names of {', '.join(trainable) or 'nothing'}, which can be "
            f"trained, found {wrong[0]!r}; codes, positions and scales are fixed"
        )
    for name in names:
        parameter = kernel._parameters.get(name)
        if requires_grad and parameter is None:
            tensor = kernel._buffers.pop(name)
            assert tensor is not None
            kernel.register_parameter(name, nn.Parameter(tensor))
        elif requires_grad and parameter is not None:
            parameter.requires_grad_()
        elif parameter is not None:
            del kernel._parameters[name]
            kernel.register_buffer(name, parameter.detach())


def watched_parameters(kernel: "Kernel") -> list[Tensor]:
    """The parameters, where autograd will ask for the gradient of one."""
    found: list[Tensor] = [parameter for parameter in kernel._parameters.values() if parameter is not None]
    return found if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in found) else []


def training_of(kernel: "Kernel") -> Training:
    """How a kernel trains, for `trained_as`."""
    return kernel.training, {name: parameter.requires_grad for name, parameter in kernel.named_parameters()}


def trained_as(kernel: "Kernel", training: Training) -> "Kernel":
    """The kernel with the mode and the parameters of another."""
    mode, parameters = training
    kernel.requires_grad_(only=parameters)
    for name, parameter in kernel.named_parameters():
        parameter.requires_grad_(parameters[name])
    return kernel.train(mode)
