"""Built-in tile formats, one file each; all come through the door that a user's format uses.

Adding a format adds one file here and touches no other: every module of this folder whose name
has no leading underscore is imported, and registers itself. Installed packages add theirs under
the entry-point group `stoicc.formats` (an entry is a TileFormat instance).
"""

import importlib
import pkgutil
import warnings
from importlib.metadata import entry_points

from stoicc.ir.registry import REGISTRY, register_format


def load_built_in() -> None:
    """Import every built-in format."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")


def load_installed() -> None:
    """Register every format that an installed package offers; once stoicc is there for them to import."""
    for entry in entry_points(group="stoicc.formats"):
        try:
            register_format(entry.load())
        except Exception as error:  # another package's code may raise anything; stoicc works without it
            warnings.warn(
                f"entry point {entry.name} = {entry.value} of stoicc.formats: expected a tile format to register, "
                f"found {type(error).__name__}: {error}; update or uninstall the package that brings it",
                stacklevel=2,
            )


def formats() -> tuple[str, ...]:
    """Names of the registered formats, sorted."""
    return REGISTRY.names()


load_built_in()
