"""Models and calibration inputs that the command line names: a function in a file, or a folder of transformers."""

import importlib
import json
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from torch import nn

from stoicc.ir.errors import InputError, brief
from stoicc.model.calibration import CalibrationLike

TOKENS = 512
"""Tokens of a calibration batch that is made from text; models with fewer positions get as many as they have."""


def read_model(given: str) -> nn.Module:
    """The model of `file.py:function`, `package.module:function`, or a folder that transformers wrote.

    Raises:
        InputError: something that cannot be read so.
    """
    if Path(given).is_dir():
        model = _from_folder(Path(given))
    elif ":" in given:
        model = _called(given)
    else:
        raise InputError(
            f"model: expected a folder with config.json, or file.py:function that returns the model, found {given!r}"
        )
    if not isinstance(model, nn.Module):
        raise InputError(f"model {given}: expected a torch.nn.Module, found {type(model).__name__}")
    return model


def read_calibration(given: str, model: nn.Module, folder: str) -> CalibrationLike:
    """Batches from `file.py:function`, or from a text file with the tokenizer of the model's folder.

    Raises:
        InputError: something that cannot be read so.
    """
    if ":" in given and not Path(given).exists():
        made: CalibrationLike = _called(given)
        return made
    try:
        text = Path(given).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"calibration: expected a text file or file.py:function, found {given!r} ({brief(str(error))})"
        ) from None
    if not text.strip():
        raise InputError(f"calibration {given}: expected text, found none")
    if not Path(folder).is_dir():
        raise InputError(
            f"calibration {given}: expected file.py:function that returns batches, found text, which needs the "
            "tokenizer of a model's folder"
        )
    if hasattr(model, "encode"):
        lines = [line for line in text.splitlines() if line.strip()]
        return lambda m: m.encode(lines, show_progress_bar=False)  # type: ignore[operator]
    return _token_batches(text, model, folder)


def _from_folder(folder: Path) -> nn.Module:
    if (folder / "modules.json").exists():
        made: nn.Module = _library("sentence_transformers").SentenceTransformer(str(folder), device="cpu").eval()
        return made
    try:
        architecture = json.loads((folder / "config.json").read_text("utf-8"))["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"model {folder}: expected config.json with architectures, found {brief(str(error))}; name file.py:function"
        ) from None
    kind = getattr(_library("transformers"), str(architecture), None)
    if kind is None:
        raise InputError(
            f"model {folder}: expected an architecture of transformers, found {architecture}; name file.py:function"
        )
    model: nn.Module = kind.from_pretrained(folder).eval()
    return model


def _token_batches(text: str, model: nn.Module, folder: str) -> list[dict[str, Any]]:
    """Batches `[1, TOKENS]` of ids; the last may be shorter."""
    tokenizer = _library("transformers").AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    most = getattr(getattr(model, "config", None), "max_position_embeddings", TOKENS)
    return [{"input_ids": part} for part in ids.split(min(TOKENS, most), dim=1)]


def _called(given: str) -> Any:
    """What the function of `file.py:function` or `package.module:function` returns."""
    where, _, name = given.rpartition(":")
    try:
        function: Callable[[], Any] = getattr(_module(where), name)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise InputError(
            f"{given}: expected file.py:function or package.module:function, found {brief(str(error))}"
        ) from None
    return function()


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    spec = spec_from_file_location(Path(where).stem, where)
    if spec is None or spec.loader is None or not Path(where).is_file():
        raise OSError(f"no file {where}")
    module = module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # dataclasses of the file look themselves up
    spec.loader.exec_module(module)
    return module


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"model: expected {name} to read this folder, found none; pip install {name}") from None
