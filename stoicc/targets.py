"""Which backend serves which target and device."""

import importlib
import warnings

from stoicc.codegen.executor import Backend
from stoicc.ir.errors import InputError

TARGETS = ("auto", "cpu", "cuda", "reference")


_WARNED: set[str] = set()
_BACKENDS: dict[str, Backend] = {}
CATALOGUE = {
    "cpu": "stoicc.codegen.cpu.backend:CpuBackend",
    "triton": "stoicc.codegen.triton.backend:TritonBackend",
    "reference": "stoicc.codegen.reference:ReferenceBackend",
}
"""Backends by name, imported on use."""


def backend_named(name: str) -> Backend:
    """The backend of a name; one object per process, as backends keep nothing but build caches."""
    if name not in _BACKENDS:
        module, _, attribute = CATALOGUE[name].partition(":")
        _BACKENDS[name] = getattr(importlib.import_module(module), attribute)()
    return _BACKENDS[name]


def backend_for(target: str, device_type: str) -> Backend:
    """The backend that runs `target` on tensors of `device_type`.

    A CPU without a C compiler falls to the reference backend, with one warning.
    """
    if target == "reference":
        return backend_named("reference")
    if target == "cuda" or device_type == "cuda":
        return backend_named("triton")
    missing = backend_named("cpu").available()
    if missing is None:
        return backend_named("cpu")
    _warn_once(missing)
    return backend_named("reference")


def check_target(target: str) -> str:
    """The target, or InputError where it is unknown or its device is not there."""
    if target not in TARGETS:
        raise InputError(f"target: expected one of {', '.join(TARGETS)}, found {target!r}")
    if target == "cuda":
        missing = backend_named("triton").available()
        if missing is not None:
            raise InputError(f"target 'cuda': expected a GPU that Triton can use, found {missing}; use target='cpu'")
    return target


def _warn_once(missing: str) -> None:
    if missing in _WARNED:
        return
    _WARNED.add(missing)
    warnings.warn(
        f"target 'cpu': expected a C compiler, found {missing}; kernels run on the slow reference backend "
        "(install gcc or clang)",
        RuntimeWarning,
        stacklevel=4,
    )
