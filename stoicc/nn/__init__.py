"""Layers that train sparse: `stoicc.sparsify_for_training` puts them in a model, `docs/training.md` shows a run."""

from stoicc.nn.recipe import Slope, compile_trained, sparsify_for_training
from stoicc.nn.schedule import SlopeSchedule
from stoicc.nn.slope import SlopeLinear

__all__ = ["Slope", "SlopeLinear", "SlopeSchedule", "compile_trained", "sparsify_for_training"]
