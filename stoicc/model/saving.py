"""A compressed model on disk: an artefact per kernel, and everything else in one safetensors file.

stoicc.json             the names of kernels, and of tensors that are one
layers/                 an artefact and a record for each kernel
rest.safetensors        what the state dict holds beside the kernels
"""

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from stoicc.ir.errors import InputError, StoiccError, brief
from stoicc.kernel import Kernel
from stoicc.model.cutting import Cut, cut_module
from stoicc.model.folder import LAYERS, make_folder, read_contents, read_layer, write_contents, write_layer
from stoicc.model.layers import Surgery
from stoicc.record import LayerRecord

REST = "rest.safetensors"


def save_model(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write a compressed model to a new folder: kernels, and the rest of its state dict.

    Raises:
        InputError: a model without kernels, a folder that holds things, or one that cannot be written.
    """
    from safetensors.torch import save_file

    folder = Path(path)
    places = kernel_places(model)
    if not places:
        raise InputError(
            f"model {type(model).__name__}: expected kernels to save, found none; stoicc.compress makes them"
        )
    check_new(folder)
    rest, same = _distinct(_rest(model, places))
    make_folder(folder / LAYERS)
    for kernel, names in places.items():
        write_layer(folder, names[0], dict.fromkeys(names, kernel), kernel.record or LayerRecord())
    save_file(rest, folder / REST)
    contents = {"layers": [names[0] for names in places.values()], "same": same, "narrowed": _narrowed(model)}
    write_contents(folder, {"model": contents})


def load_model(
    model: nn.Module, path: str | PathLike[str], *, target: str = "auto", on_missing: str = "error"
) -> nn.Module:
    """Put what `save_model` wrote into a model of the same architecture, in place.

    Args:
        model: as it was before it was compressed; its values do not matter, so it may stand on the meta device.
            Kernels and tensors come to the CPU; `.to` moves them.
        target, on_missing: as in `stoicc.compile`.

    Raises:
        InputError: no such folder, a damaged one, or one of another architecture; the model is as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(path)
    kernels = read_kernels(folder, target, on_missing)
    try:
        rest = load_file(folder / REST)
    except (SafetensorError, OSError) as error:
        raise InputError(f"folder {folder}: expected {REST}, found {brief(str(error))}") from None
    contents = read_contents(folder)["model"]
    rest |= {name: rest[other] for name, other in contents["same"].items()}
    surgery = Surgery(model)
    try:
        surgery.replace(_as_narrow(model, contents["narrowed"], rest))
        _refuse_other(model, folder, kernels, rest)
    except StoiccError:
        surgery.undo()
        raise
    surgery.leave_fast_path([model.get_submodule(name) for name in kernels])
    surgery.replace(kernels)
    model.load_state_dict(rest, strict=False, assign=True)
    return model


def check_new(folder: Path) -> None:
    """InputError where a folder holds things, or is none."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"folder {folder}: expected a new one to save to, found other things; name a new folder")


def read_kernels(folder: Path, target: str = "auto", on_missing: str = "error") -> dict[str, Kernel]:
    """The kernels of a saved model, at every name.

    Raises:
        InputError: no such folder, or a damaged one.
    """
    saved = read_contents(folder).get("model")
    if not isinstance(saved, Mapping):
        raise InputError(f"folder {folder}: expected a saved model, found a run of compress; finish it, and save_model")
    kernels: dict[str, Kernel] = {}
    for name in saved["layers"]:
        kernels.update(read_layer(folder, name, target, on_missing)[0])
    return kernels


def kernel_places(model: nn.Module) -> dict[Kernel, list[str]]:
    """Every kernel of a model with all names at which it stands."""
    places: dict[Kernel, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Kernel):
            places.setdefault(module, []).append(name)
    return places


def _rest(model: nn.Module, places: Mapping[Kernel, list[str]]) -> dict[str, Tensor]:
    """The state dict beside the kernels."""
    state = _beside(model.state_dict(), (name for names in places.values() for name in names))
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(f"model, state {name}: expected a tensor to save, found {type(value).__name__}")
    return state


def _narrowed(model: nn.Module) -> dict[str, dict[str, list[int]]]:
    """Modules from which width pruning took channels: the shapes of their weights, before and now."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kernel = module if isinstance(module, Kernel) else None
        before = (
            module.__dict__.get("narrowed_from") if kernel is None else kernel.record and kernel.record.narrowed_from
        )
        if before:
            now = module.get_parameter("weight").shape if kernel is None else kernel.program.shape
            found[name] = {"before": list(before), "now": list(now)}
    return found


def _as_narrow(
    model: nn.Module, narrowed: Mapping[str, Mapping[str, list[int]]], rest: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """Modules of a model as large as they were when they were saved; values do not matter."""
    made: dict[nn.Module, nn.Module] = {}
    places: dict[str, nn.Module] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, shapes in narrowed.items():
        module = modules.get(name)
        weight = getattr(module, "weight", None)
        if module is None or not isinstance(weight, Tensor) or list(weight.shape) != shapes["before"]:
            continue  # refused with all other differences
        if module not in made:
            masks = [torch.arange(was) < now for was, now in zip(shapes["before"], shapes["now"], strict=True)]
            rows = masks[1] if isinstance(module, nn.Embedding) else masks[0]
            columns = masks[1] if len(masks) == 2 and not isinstance(module, nn.Embedding) else None
            made[module] = cut_module(module, Cut(rows, columns, True, True))
            if f"{name}.bias" in rest and getattr(module, "bias", None) is None:
                made[module].bias = nn.Parameter(weight.new_empty(shapes["now"][0]))
        places[name] = made[module]
    return places


def _beside(state: Mapping[str, Tensor], kernels: Iterable[str]) -> dict[str, Tensor]:
    below = tuple(f"{name}." for name in kernels)
    return {name: value for name, value in state.items() if not name.startswith(below)}


def _distinct(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and for the other names of it the first one."""
    first: dict[tuple[object, ...], str] = {}
    same: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = (
            tensor.device,
            tensor.data_ptr() if tensor.numel() else name,
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        if first.setdefault(key, name) != name:
            same[name] = first[key]
    return {name: tensors[name].detach().cpu().clone().contiguous() for name in first.values()}, same


def _refuse_other(model: nn.Module, folder: Path, kernels: Mapping[str, Kernel], rest: Mapping[str, Tensor]) -> None:
    """The model has the very layers and tensors that were saved, in their shapes."""
    modules = dict(model.named_modules(remove_duplicate=False))
    expected: dict[str, object] = {name: list(kernel.program.shape) for name, kernel in kernels.items()}
    expected |= {name: list(tensor.shape) for name, tensor in rest.items()}
    found: dict[str, object] = {
        name: list(module.weight.shape)
        for name, module in modules.items()
        if name in kernels and isinstance(module, nn.Linear)
    }
    found |= {name: list(value.shape) for name, value in _beside(model.state_dict(), kernels).items()}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise InputError(
                f"model {type(model).__name__}: expected {name} {expected.get(name, 'to be absent')} as saved in "
                f"{folder}, found {found.get(name, 'none')}; give a model of the same architecture, not compressed"
            )
