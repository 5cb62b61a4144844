"""stoicc: compile a weight matrix to a kernel, tile by tile.

    kernel = stoicc.compile(weight)      # [out, in] tensor, or an operator's result
    y = kernel(x)                        # like F.linear

See README.md for the three uses: compile, register formats, schedule from Python.
"""

from stoicc import nn, ops
from stoicc.autotuner import autotune
from stoicc.compiler import compile
from stoicc.device_constants import cost_model
from stoicc.formats import formats
from stoicc.formats import load_installed as _load_installed
from stoicc.inspector import inspect
from stoicc.io import load
from stoicc.ir.errors import (
    CodegenError,
    FormatError,
    InputError,
    ParseError,
    PassError,
    StoiccError,
    VerifyError,
)
from stoicc.ir.format import Plane, PlaneKind, TileFormat, TileMac, TritonDecode
from stoicc.ir.registry import register_format
from stoicc.kernel import Kernel
from stoicc.model.compress import compress
from stoicc.model.recipe import Recipe, Rule, Step
from stoicc.model.reporting import report
from stoicc.model.saving import load_model, save_model
from stoicc.model.width_rule import Width
from stoicc.nn import sparsify_for_training
from stoicc.passes import Pipeline
from stoicc.policy.budget import Budget
from stoicc.policy.pareto import Pareto, pareto
from stoicc.pools import TiledWeight
from stoicc.retile import retile
from stoicc.tuning_result import TuningResult
from stoicc.tuning_space import Space

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "CodegenError",
    "FormatError",
    "InputError",
    "Kernel",
    "Pareto",
    "ParseError",
    "PassError",
    "Pipeline",
    "Plane",
    "PlaneKind",
    "Recipe",
    "Rule",
    "Space",
    "Step",
    "StoiccError",
    "TileFormat",
    "TileMac",
    "TiledWeight",
    "TritonDecode",
    "TuningResult",
    "VerifyError",
    "Width",
    "autotune",
    "compile",
    "compress",
    "cost_model",
    "formats",
    "inspect",
    "load",
    "load_model",
    "nn",
    "ops",
    "pareto",
    "register_format",
    "report",
    "retile",
    "save_model",
    "sparsify_for_training",
]

_load_installed()  # last, as what a package brings imports stoicc
