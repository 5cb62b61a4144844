"""Built-in tile formats, one file each; all come through the door that a user's format uses.

Adding a format adds one file here and touches no other: every module of this folder whose name
has no leading underscore is imported, and registers itself. Installed packages add theirs under
the entry-point group `stoicc.formats` (an entry is a TileFormat instance).
"""

import importlib
import pkgutil
from importlib.metadata import entry_points

from stoicc.ir.registry import REGISTRY, register_format


def load_formats() -> None:
    """Import every built-in format and every format that an installed package offers."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group="stoicc.formats"):
        register_format(entry.load())


def formats() -> tuple[str, ...]:
    """Names of the registered formats, sorted."""
    return REGISTRY.names()


load_formats()
