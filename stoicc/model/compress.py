"""`stoicc.compress`: every linear layer that a recipe names becomes a kernel, layer by layer."""

import copy
import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, nn

from stoicc.ir.errors import InputError
from stoicc.kernel import Kernel
from stoicc.model.budget import spread_budgets
from stoicc.model.calibration import (
    Calibration,
    CalibrationLike,
    Stage,
    Survey,
    collect_stage,
    hash_tensor,
    other_input,
    survey,
    try_out,
)
from stoicc.model.folder import Made, ResumeFolder
from stoicc.model.layers import Layer, Surgery, find_layers
from stoicc.model.one_layer import compress_layer
from stoicc.model.parking import Parking
from stoicc.model.processes import Processes
from stoicc.model.progress import Show, layer_bar
from stoicc.model.recipe import Recipe, RecipeLike
from stoicc.model.replay import Replay
from stoicc.model.width import prune_width
from stoicc.ops.statistics import Statistics


def compress(
    model: nn.Module,
    recipe: RecipeLike,
    calibration: CalibrationLike | None = None,
    *,
    sequential: bool = True,
    resume: str | PathLike[str] | None = None,
    in_place: bool = True,
    dtype: torch.dtype = torch.float32,
    distributed: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Compress the linear layers of a model: apply a recipe's operators to each, and compile the results.

    Layers are taken in the order in which the model calls them. Those that see the very same tensor
    (q, k and v) form a stage; its statistics are collected in a run of the calibration batches of
    its own, so one gram matrix is alive at a time. Such a run begins after the last blocks that are finished, whose
    outputs are kept for all batches, on the CPU. `stoicc.report(model)` then prints a table.

    Beside the model, memory holds what one layer needs, and what one or two blocks return for all batches: dense
    weights of finished stages wait in files without a name, in the folder for temporary files, until all is done.
    With `in_place=False` they stay in memory, as the given model is to keep them, and kernels add up beside them.

    Args:
        model: any module; each `nn.Linear` that the recipe names becomes a `stoicc.Kernel`. Layers of
            one weight stay one.
        recipe: a `stoicc.Recipe`, or what `Recipe.of` reads: rules or steps as plain data, YAML, a `Path`.
        calibration: batches (a tensor, a tuple of arguments, or a mapping of keyword arguments
            each), or a function that runs the model. They are gone through once per stage and must be
            the same each time; stages repeat the calls that a function made of the dense model. None
            will do for operators that take no statistics.
        sequential: a layer is calibrated on what the compressed layers before it produce; False: on
            what the dense ones do.
        resume: a folder that keeps finished layers; the same call takes up a run that was stopped.
        in_place: replace layers of this model; False: of a copy, with this one left as it is.
        dtype: of the sums of statistics: torch.float32 or torch.float64.
        distributed: the processes of torch.distributed hold the same model and batches of their own; statistics are
            summed over them, and each compresses every layer. A `resume` folder is each process's own.
        progress: a progress bar on stderr; default: where that is a terminal.

    Returns:
        The model (or its copy). The dense weights are let go when nobody else holds them.

    Raises:
        StoiccError: a recipe, batches or a layer that cannot be used; the model is then as it was,
            as it is after any other error and an interrupt. Finished layers stay in `resume`.
    """
    chosen = Recipe.of(recipe)
    if not isinstance(model, nn.Module):
        raise InputError(f"compress: expected a torch.nn.Module, found {type(model).__name__}")
    if not in_place:
        model = _copied(model, find_layers(model, chosen))
    find_layers(model, chosen)  # which may refuse the model, before anything is run
    processes = Processes(distributed)
    batches = None if calibration is None else Calibration(calibration, processes)
    surgery = Surgery(model)
    parking = Parking() if in_place else None
    try:
        _replace_layers(model, chosen, batches, surgery, parking, resume, sequential, dtype, progress)
    except BaseException:
        surgery.undo()
        raise
    finally:
        surgery.forget()
        if parking is not None:
            parking.fetch()
    return model


def _replace_layers(
    model: nn.Module,
    recipe: Recipe,
    batches: Calibration | None,
    surgery: Surgery,
    parking: Parking | None,
    resume: str | PathLike[str] | None,
    sequential: bool,
    dtype: torch.dtype,
    progress: bool | None,
) -> None:
    """The work of `compress`, in a frame of its own: nothing of it holds a dense weight afterwards."""
    if recipe.width:
        prune_width(model, recipe.width, batches, surgery)
    layers = spread_budgets(model, find_layers(model, recipe), batches)
    surgery.leave_fast_path(module for layer in layers for module in layer.modules.values())
    found = survey(model, layers, batches) if batches is not None and layers else Survey((), tuple(layers), "none", {})
    if batches is not None:
        batches.processes.agree([[layer.name for layer in stage.layers] for stage in found.stages])
    options = f"sequential={sequential}, dtype={dtype}"
    folder = None if resume is None else ResumeFolder(resume, _fingerprint(model, recipe, found, options))
    with layer_bar(len(layers), progress) as show:
        work = _Work(model, batches, folder, dtype, show, sequential, surgery, parking)
        before = len(surgery)
        other = work.all_stages(found, Replay(layers, changing=sequential))
        if other is not None:
            surgery.undo(before)
            if batches is not None:
                batches.calls = None
            warnings.warn(
                "compress: expected modules that hand on no values but those that they return, found that layer "
                f"{other} sees something else if those before it do not run; every stage now runs the whole model",
                stacklevel=4,
            )
            work.all_stages(found, None)


def _park(model: nn.Module, stage: Stage, parking: Parking) -> None:
    """Take the dense weights of a finished stage out of memory, but for those that other modules read.

    Layers of the stage that are still there read theirs from the file.
    """
    linears = {id(module) for layer in stage.layers for module in layer.modules.values()}
    others = (module for module in model.modules() if id(module) not in linears)
    held = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    for layer in stage.layers:
        weight = layer.modules[layer.name].weight
        if id(weight) not in held:
            parking.park(weight)


@dataclass(frozen=True, eq=False)
class _Work:
    """What every stage needs.

    Attributes:
        batches: None without calibration.
        folder: None where nothing is kept.
        parking: None where dense weights stay in memory.
    """

    model: nn.Module
    batches: Calibration | None
    folder: ResumeFolder | None
    dtype: torch.dtype
    show: Show
    sequential: bool
    surgery: Surgery
    parking: Parking | None

    def all_stages(self, found: Survey, replay: Replay | None) -> str | None:
        """Replace every layer, and try the result; a layer that sees something else in it than when it was compressed.

        Args:
            replay: None: every run starts at the model's input, and what `folder` has is made anew.
        """
        first: dict[str, Tensor] = {}
        later: dict[str, Kernel] = {}
        for stage in (*found.stages, *(Stage((layer,), 0) for layer in found.unseen)):
            made = self.stage(stage, replay, first)
            if self.sequential:
                self.surgery.replace(made)
            else:
                later.update(made)
            if self.parking is not None:
                _park(self.model, stage, self.parking)
            if replay is not None:
                replay.settle(stage.layers)
        self.surgery.replace(later)
        if self.batches is None:
            return None
        if self.sequential:
            other = try_out(self.model, self.batches, first)
        else:
            try_out(self.model, self.batches)
            other = other_input({name: found.first[name] for name in first}, first)
        return next(filter(None, self.batches.processes.told(other)), None)

    def stage(self, stage: Stage, replay: Replay | None, first: dict[str, Tensor]) -> dict[str, Kernel]:
        """Kernels for the layers of a stage, by every name at which they are to stand."""
        statistics: Statistics | None = None
        kernels: dict[str, Kernel] = {}
        for layer in stage.layers:
            self.show(layer.name)
            made = None if replay is None else self._finished(layer)
            if made is None:
                if statistics is None and self.batches is not None and stage.calls != 0:
                    statistics = collect_stage(self.model, stage, self.batches, self.dtype, replay, first)
                made = _compressed(layer, statistics)
                if self.folder is not None:
                    self.folder.write(layer.name, *made)
            for module, kernel in made[0].items():
                kernels.update(dict.fromkeys(layer.places[module], kernel))
        return kernels

    def _finished(self, layer: Layer) -> Made | None:
        """What an earlier run left of a layer, on its device; None where it left one of the processes without."""
        made = None if self.folder is None else self.folder.read(layer.name, layer.rule.loading)
        if self.folder is not None and self.batches is not None and not all(self.batches.processes.told(bool(made))):
            return None
        return made if made is None else ({name: k.to(layer.weight.device) for name, k in made[0].items()}, made[1])


def _compressed(layer: Layer, statistics: Statistics | None) -> Made:
    """One kernel for each bias: modules of one weight and one bias share theirs."""
    biases = {id(module.bias): module.bias for module in layer.modules.values()}
    made, record = compress_layer(
        layer.name,
        layer.weight,
        [None if bias is None else bias.detach() for bias in biases.values()],
        layer.rule,
        statistics,
        layer.modules[layer.name].__dict__.get("narrowed_from"),
    )
    of_bias = dict(zip(biases, made, strict=True))
    return {name: of_bias[id(module.bias)] for name, module in layer.modules.items()}, record


def _copied(model: nn.Module, layers: list[Layer]) -> nn.Module:
    """A copy that shares the weights of the layers that are to be replaced, and nothing else."""
    shared = {id(module.weight): module.weight for layer in layers for module in layer.modules.values()}
    return copy.deepcopy(model, shared)


def _fingerprint(model: nn.Module, recipe: Recipe, found: Survey, options: str) -> Mapping[str, str]:
    """What the result depends on, as a hash for each kind of thing."""
    weights = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        weights.update(name.encode())
        if isinstance(value, torch.Tensor):
            hash_tensor(weights, value)
    return {
        "recipe": hashlib.blake2b(str(recipe).encode(), digest_size=16).hexdigest(),
        "weights": weights.hexdigest(),
        "calibration": found.digest,
        "options": options,
    }
