"""Compression algorithms as operators: a weight in, a `CompressedWeight` out. One file each."""

from stoicc.ops.combine import low_rank, permute, scale, stack
from stoicc.ops.graph import CompressedWeight
from stoicc.ops.group_absmax import group_absmax
from stoicc.ops.nm_magnitude import nm_magnitude

__all__ = ["CompressedWeight", "group_absmax", "low_rank", "nm_magnitude", "permute", "scale", "stack"]
