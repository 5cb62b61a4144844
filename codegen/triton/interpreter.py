"""Triton's interpreter (`TRITON_INTERPRET=1`), and the repairs that it needs.

The interpreter keeps bf16 as 16-bit patterns. Its conversion from fp32 cuts the low bits off
where a GPU rounds to nearest even, and its conversion to fp32 gets subnormals wrong (triton 3.6
and 3.9), so a decode would not be what it is on a device. `repair` puts the device's conversions
in their place, and lets a loaded scalar bound a loop under NumPy 2.4 (triton 3.6). Nothing
happens outside the interpreter. `tl.dot` multiplies bf16 patterns as integers there: the launcher
asks for fp32 operands (`DOT`) instead.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl


@cache
def interpreting() -> bool:
    """Whether `@triton.jit` means the interpreter in this process."""
    return bool(triton.knobs.runtime.interpret)


@cache
def repair() -> None:
    """Convert between fp32 and bf16 as a device does; called once, before the first interpreted launch."""
    if not interpreting():
        return
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    given, patch_tensor = InterpreterBuilder.cast_impl, interpreter._patch_lang_tensor

    def patch_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        pair = (source.dtype.scalar, target.scalar)
        if pair == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return given(self, source, target)

    InterpreterBuilder.cast_impl = cast_impl
    interpreter._patch_lang_tensor = patch_index
