"""Scheduling passes: one file per pass, and the pipeline. Knows only `stoicc.ir`."""

from stoicc.passes.base import Pass, WeightPass, WeightView, initial_schedule, scheduled, with_schedule
from stoicc.passes.catalogue import find_pass, is_weight_pass, parse_pass, pass_names, register_pass
from stoicc.passes.instruments import Instrument, PrintIR, Timing
from stoicc.passes.pipeline import Pipeline, default_pipeline, run_text

__all__ = [
    "Instrument",
    "Pass",
    "Pipeline",
    "PrintIR",
    "Timing",
    "WeightPass",
    "WeightView",
    "default_pipeline",
    "find_pass",
    "initial_schedule",
    "is_weight_pass",
    "parse_pass",
    "pass_names",
    "register_pass",
    "run_text",
    "scheduled",
    "with_schedule",
]
