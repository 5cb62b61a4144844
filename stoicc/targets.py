"""Which backend serves which target and device."""

import warnings
from functools import cache

from stoicc.codegen.cpu.backend import CpuBackend
from stoicc.codegen.executor import Backend
from stoicc.codegen.reference import ReferenceBackend
from stoicc.codegen.triton.backend import TritonBackend
from stoicc.ir.errors import InputError

TARGETS = ("auto", "cpu", "cuda", "reference")


@cache
def backend_named(name: str) -> Backend:
    """The backend of a name; one object per process, as backends keep nothing but build caches."""
    return {"cpu": CpuBackend, "triton": TritonBackend, "reference": ReferenceBackend}[name]()


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


@cache
def _warn_once(missing: str) -> None:
    warnings.warn(
        f"target 'cpu': expected a C compiler, found {missing}; kernels run on the slow reference backend "
        "(install gcc or clang)",
        RuntimeWarning,
        stacklevel=4,
    )
