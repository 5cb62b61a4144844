"""Statistics of a model's layers as one safetensors file."""

import json
from collections.abc import Mapping
from os import PathLike

from torch import Tensor

from stoicc.ir.errors import InputError
from stoicc.ops.statistics import Statistics

VERSION_KEY = "stoicc.statistics"
VERSION = "1"


def save_statistics(statistics: Mapping[str, Statistics], path: str | PathLike[str]) -> None:
    """Write statistics of many layers to one safetensors file; what layers share is written once.

    Raises:
        InputError: a path that cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    distinct = {id(each): each for each in statistics.values()}
    number = {key: index for index, key in enumerate(distinct)}
    tensors = {
        f"{index}.{field}": tensor.contiguous()
        for index, each in enumerate(distinct.values())
        for field, tensor in each.to_dict().items()
    }
    layers = json.dumps({name: number[id(each)] for name, each in statistics.items()})
    try:
        save_file(tensors, path, metadata={VERSION_KEY: VERSION, "layers": layers})
    except (SafetensorError, OSError) as error:
        raise InputError(f"statistics {path}: expected a file that can be written, found {error}") from None


def load_statistics(path: str | PathLike[str]) -> dict[str, Statistics]:
    """Read what `save_statistics` wrote, layers in the same order.

    Raises:
        InputError: no such file, or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"statistics {path}: expected a safetensors file, found {error}") from None
    if metadata.get(VERSION_KEY) != VERSION:
        found = metadata.get(VERSION_KEY, "none")
        raise InputError(f"statistics {path}: expected version {VERSION} of a statistics file, found {found}")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, field = key.partition(".")
        parts.setdefault(index, {})[field] = tensor
    distinct = {int(index): Statistics.from_dict(part) for index, part in parts.items()}
    return {name: distinct[index] for name, index in json.loads(metadata["layers"]).items()}
