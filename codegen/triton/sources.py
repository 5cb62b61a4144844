"""Source text of device functions, ready to stand in an emitted module.

A decode and the `@triton.jit` helpers it calls are copied as they are written, so that an
emitted module reads from top to bottom without opening another file. Other globals become
import lines.
"""

import inspect
import textwrap
from collections.abc import Iterable
from typing import Any

from stoicc.ir.errors import CodegenError

_GIVEN = ("tl", "triton", "gl", "gluon")
_OURS = (
    "load_x", "add_product", "tiles_kernel", "reduce_kernel", "load_h", "transposed_kernel", "start_copy", "next_tile",
)  # fmt: skip


def inline(functions: Iterable[Any]) -> tuple[list[str], list[str]]:
    """Import lines and function texts, helpers before those who call them, each once.

    Raises:
        CodegenError: a function's source cannot be read, it is a closure, two functions differ and share a
            name, or its name is one of the kernel's own functions.
    """
    imports: dict[str, None] = {}
    texts: dict[str, str] = {}
    for function in functions:
        _collect(function, imports, texts)
    return sorted(imports), list(texts.values())


def _collect(function: Any, imports: dict[str, None], texts: dict[str, str]) -> None:
    plain = function.fn
    if plain.__name__ in _OURS:
        raise CodegenError(
            f"device function {plain.__name__}: expected a name other than {', '.join(_OURS)}, which kernels define, "
            "found one of them; rename the function"
        )
    text = _source(plain)
    held = texts.get(plain.__name__)
    if held is not None:
        if held != text:
            raise CodegenError(
                f"device function {plain.__name__}: expected one function of this name in a kernel, found two that "
                "differ; rename one of them"
            )
        return
    free = inspect.getclosurevars(plain)
    if free.nonlocals:
        raise CodegenError(
            f"device function {plain.__name__}: expected a function at the top of its module, found one that closes "
            f"over {', '.join(sorted(free.nonlocals))}; pass them as TritonDecode constants"
        )
    for name, value in sorted(free.globals.items()):
        if name in _GIVEN:
            continue
        if hasattr(value, "fn") and value.fn.__name__ == name:
            _collect(value, imports, texts)
        else:
            imports[f"from {plain.__module__} import {name}"] = None
    texts[plain.__name__] = text


def _source(plain: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(plain)).strip()
    except OSError:
        raise CodegenError(
            f"device function {plain.__name__}: expected a function whose source can be read, found none; "
            "define it in a file or a notebook cell, not with exec"
        ) from None
