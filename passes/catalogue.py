"""Where passes are known by name; built-in ones are imported when they are first used."""

import difflib
import importlib
import re
from typing import TypeVar

from stoicc.ir.errors import PassError, brief
from stoicc.ir.options import split_options
from stoicc.passes.base import Pass, WeightPass

CATALOGUE: dict[str, str] = {
    "reorder-rows": "stoicc.passes.reorder_rows:ReorderRows",
    "drop-empty": "stoicc.passes.drop_empty:DropEmpty",
    "order": "stoicc.passes.order:Order",
    "build-csr": "stoicc.passes.build_csr:BuildCsr",
    "split-k": "stoicc.passes.split_k:SplitK",
    "balance": "stoicc.passes.balance:Balance",
    "fuse-epilogue": "stoicc.passes.fuse_epilogue:FuseEpilogue",
    "regimes": "stoicc.passes.regimes:Regimes",
    "launch": "stoicc.passes.launch:Launch",
    "build-csc": "stoicc.passes.build_csc:BuildCsc",
}
"""Built-in passes in their customary order: where dependencies leave a choice, this decides."""

_P = TypeVar("_P", bound=Pass)

_registered: dict[str, type[Pass]] = {}

_TEXT = re.compile(r"\s*([a-z][a-z0-9-]*)\s*(?:\{([^{}]*)\})?\s*")


def register_pass(cls: type[_P]) -> type[_P]:
    """Make a pass known by its `name`; usable as a class decorator."""
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise PassError(
            f"register_pass: expected a name of a-z, 0-9 and -, found {name!r}; set the class variable `name`"
        )
    held = _registered.get(name)
    same = held is not None and (held.__module__, held.__qualname__) == (cls.__module__, cls.__qualname__)
    if name in CATALOGUE or (held is not None and not same):
        raise PassError(f"register_pass: expected a new name, found {name!r} which is taken; choose another name")
    _registered[name] = cls
    return cls


def unregister_pass(name: str) -> None:
    """Forget a registered pass (tests use this)."""
    _registered.pop(name, None)


def pass_names() -> tuple[str, ...]:
    """Names of all passes, built-in ones first."""
    return (*CATALOGUE, *_registered)


def find_pass(name: str) -> type[Pass]:
    """The class of the pass of this name; PassError shows near matches."""
    if name in _registered:
        return _registered[name]
    if name not in CATALOGUE:
        near = difflib.get_close_matches(name[:64], pass_names(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known passes are {', '.join(pass_names())}"
        raise PassError(f"pass {brief(repr(name))}: expected a known pass, found an unknown name; {hint}")
    module, _, cls = CATALOGUE[name].partition(":")
    found: type[Pass] = getattr(importlib.import_module(module), cls)
    return found


def is_weight_pass(text: str) -> bool:
    """Whether a pass's text names a known pass on the weight."""
    name = text.partition("{")[0].strip()
    return name in pass_names() and issubclass(find_pass(name), WeightPass)


def parse_pass(text: str) -> Pass:
    """The pass that a text such as `split-k{parts=4}` names."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise PassError(
            f"pass {brief(repr(text))}: expected name or name{{option=value,...}}, found neither; correct the text"
        )
    name, options = match.groups()
    return find_pass(name).from_text(split_options(options or "", f"pass {name}", PassError))
