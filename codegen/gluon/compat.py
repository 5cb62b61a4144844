"""Names that differ between the Triton versions that have Gluon."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
"""Start copying from global to shared memory; triton 3.9 renamed it."""

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Wait for all warps of a program; triton 3.9 renamed it."""
