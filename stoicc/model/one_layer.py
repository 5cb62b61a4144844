"""One layer: apply its rule's operators, measure what they cost, and compile."""

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stoicc.compiler import compile
from stoicc.ir.errors import InputError, ParseError, StoiccError
from stoicc.kernel import Kernel
from stoicc.model.recipe import Rule, Step
from stoicc.ops._output import output_error
from stoicc.ops.graph import CompressedWeight
from stoicc.ops.lookup import find_operator
from stoicc.ops.statistics import Statistics
from stoicc.record import LayerRecord


def compress_layer(
    name: str,
    weight: Tensor,
    biases: Sequence[Tensor | None],
    rule: Rule,
    statistics: Statistics | None,
    narrowed_from: tuple[int, ...] | None = None,
) -> tuple[list[Kernel], LayerRecord]:
    """Apply a rule to a weight `[M, K]` and compile the result, once for each bias.

    Args:
        biases: `[M]` or None, one for each kernel wanted.
        statistics: of the layer's inputs, for operators that take them and for the error.
        narrowed_from: the weight's shape before width pruning, for the record.

    Raises:
        StoiccError: of the operator or of compiling, with the layer's name in front.
    """
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compressed = apply_steps(name, weight, rule.steps, statistics)
    kernels = [_compiled(name, compressed if rule.steps else weight, bias, rule.compile) for bias in biases]
    error = None if statistics is None else output_error(weight, compressed.dense(), statistics)
    notes = (*_dead(statistics), *dict.fromkeys(str(warning.message) for warning in caught))
    record = LayerRecord(tuple(map(str, rule.steps)), error, time.perf_counter() - start, notes, narrowed_from)
    return [_noted(kernel.to(weight.device), record) for kernel in kernels], record


def apply_steps(name: str, weight: Tensor, steps: Sequence[Step], statistics: Statistics | None) -> CompressedWeight:
    """The operators of a rule, one after the other."""
    where = f"layer {name}"
    compressed = _in_place(where, CompressedWeight.of, weight)
    for step in steps:
        operator = find_operator(step.operator)
        compressed = _in_place(where, operator, compressed, step.options, statistics)
    return compressed


def _compiled(name: str, weight: Any, bias: Tensor | None, options: Mapping[str, Any]) -> Kernel:
    return _in_place(f"layer {name}", compile, weight, bias=bias, name=name, **options)


def _noted(kernel: Kernel, record: LayerRecord) -> Kernel:
    kernel.record = record
    return kernel


def _dead(statistics: Statistics | None) -> list[str]:
    """A channel that is 0 in every sample says nothing about its weights."""
    dead = 0 if statistics is None else int(statistics.dead.sum())
    return [f"{dead} of {statistics.columns} input channels are 0 in every sample"] if statistics and dead else []


def _in_place(where: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """function(...), whose errors say which layer and operator they are about."""
    try:
        return function(*args, **kwargs)
    except StoiccError as error:
        kind = InputError if isinstance(error, ParseError) else type(error)
        raise kind(f"{where}: {error}") from error
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # it is public, but not exported
        raise InputError(
            f"{where}: expected a positive definite Hessian, found {error}; raise the operator's damping, or "
            "calibrate with more samples"
        ) from error
