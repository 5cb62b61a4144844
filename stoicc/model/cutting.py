"""A module with fewer rows and columns, or with zeros in their place."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Cut:
    """What stays of a module's weight.

    Attributes:
        rows: bool per output channel (of a norm: per channel), or None for all.
        columns: bool per input channel, or None for all.
        remove_rows, remove_columns: take them out; False: zero them.
        constant: `[K]`, what inputs that go were whatever the sample, or None where they were 0.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    remove_rows: bool = False
    remove_columns: bool = False
    constant: Tensor | None = None

    def with_rows(self, rows: Tensor, remove: bool) -> "Cut":
        """This cut and one of rows."""
        return replace(self, rows=rows, remove_rows=remove)

    def with_columns(self, columns: Tensor, remove: bool, constant: Tensor | None) -> "Cut":
        """This cut and one of columns."""
        return replace(self, columns=columns, remove_columns=remove, constant=constant)

    def zeroed(self) -> "Cut":
        """The same with zeros in place of what is taken out."""
        return replace(self, remove_rows=False, remove_columns=False)


def cut_module(module: nn.Module, cut: Cut) -> nn.Module:
    """A copy of a linear layer, an embedding or a norm with its weight cut; the module is left as it is.

    It remembers the shape that its weight had as `narrowed_from`.
    """
    new = copy.copy(module)
    new._parameters, new._buffers = dict(module._parameters), dict(module._buffers)
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    values = weight.detach()
    bias = None if bias is None else bias.detach()
    if cut.constant is not None:
        moved = (values.double() @ cut.constant.to(values.device)).to(values.dtype)
        bias = moved if bias is None else bias + moved
    if cut.columns is not None:
        values = _part(values, cut.columns, 1, cut.remove_columns)
    if cut.rows is not None:
        values = _part(values, cut.rows, 1 if isinstance(module, nn.Embedding) else 0, cut.remove_rows)
        bias = None if bias is None else _part(bias, cut.rows, 0, cut.remove_rows)
    new._parameters["weight"] = nn.Parameter(values.clone(), weight.requires_grad)
    if bias is not None:
        new._parameters["bias"] = nn.Parameter(bias.clone(), weight.requires_grad)
    _set_sizes(new, values)
    if values.shape != weight.shape:
        new.__dict__["narrowed_from"] = module.__dict__.get("narrowed_from", tuple(weight.shape))
    return new


def _part(values: Tensor, kept: Tensor, dim: int, remove: bool) -> Tensor:
    if remove:
        return values.index_select(dim, kept.nonzero().flatten().to(values.device))
    shape = [1] * values.ndim
    shape[dim] = -1
    return torch.where(
        kept.view(shape).to(values.device), values, torch.zeros((), dtype=values.dtype, device=values.device)
    )


def _set_sizes(module: nn.Module, weight: Tensor) -> None:
    """What a module says about its own size."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif hasattr(module, "normalized_shape"):
        module.__dict__["normalized_shape"] = tuple(weight.shape)
