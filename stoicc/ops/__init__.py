"""Compression algorithms as operators: a weight in, a `CompressedWeight` out. One file each."""

from stoicc.ops import budgets
from stoicc.ops.absmax import absmax
from stoicc.ops.budget_mosaic import budget_mosaic
from stoicc.ops.combine import low_rank, permute, scale, stack
from stoicc.ops.graph import CompressedWeight
from stoicc.ops.group_absmax import group_absmax
from stoicc.ops.magnitude import magnitude
from stoicc.ops.mosaic import mosaic
from stoicc.ops.naive_lora import naive_lora
from stoicc.ops.nm_magnitude import nm_magnitude
from stoicc.ops.obd import obd, obd_prune
from stoicc.ops.obs import obs, obs_prune
from stoicc.ops.optq import optq
from stoicc.ops.quantize_adapter import quantize_adapter
from stoicc.ops.slim import slim
from stoicc.ops.slim_lora import slim_lora
from stoicc.ops.slim_quant import slim_quant
from stoicc.ops.sparsegpt import sparsegpt
from stoicc.ops.statistics import Statistics, collect, sequentially
from stoicc.ops.statistics_file import load_statistics, save_statistics
from stoicc.ops.tile_mosaic import tile_mosaic
from stoicc.ops.wanda import wanda

__all__ = [
    "CompressedWeight",
    "Statistics",
    "absmax",
    "budget_mosaic",
    "budgets",
    "collect",
    "group_absmax",
    "load_statistics",
    "low_rank",
    "magnitude",
    "mosaic",
    "naive_lora",
    "nm_magnitude",
    "obd",
    "obd_prune",
    "obs",
    "obs_prune",
    "optq",
    "permute",
    "quantize_adapter",
    "save_statistics",
    "scale",
    "sequentially",
    "slim",
    "slim_lora",
    "slim_quant",
    "sparsegpt",
    "stack",
    "tile_mosaic",
    "wanda",
]
