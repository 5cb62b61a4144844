"""Artefacts: one safetensors file with the canonical pools and the exact IR text.

Nothing in it belongs to a device: a backend repacks planes when it builds an executor.
"""

from os import PathLike

import torch

from stoicc.ir.errors import InputError
from stoicc.ir.parser import parse
from stoicc.ir.printer import print_module
from stoicc.ir.types import Module
from stoicc.ir.verify import verify_pools
from stoicc.kernel import Kernel
from stoicc.pools import rehash

IR_KEY = "stoicc.ir"
VERSION_KEY = "stoicc.artefact"
VERSION = "1"


def save(kernel: Kernel, path: str | PathLike[str]) -> None:
    """Write a kernel; content hashes are taken anew, as training may have changed values."""
    from safetensors.torch import save_file

    pools = {name: pool.detach().cpu().contiguous() for name, pool in kernel.pools.items()}
    module = Module(rehash(kernel.program, pools), kernel.schedule)
    save_file(pools, path, metadata={IR_KEY: print_module(module, exact=True), VERSION_KEY: VERSION})


def load(
    path: str | PathLike[str], target: str = "auto", device: str | torch.device = "cpu", on_missing: str = "error"
) -> Kernel:
    """Read a kernel that `Kernel.save` wrote.

    Args:
        target, on_missing: as in `stoicc.compile`.
        device: where the pools go.

    Raises:
        InputError: not an artefact of stoicc, or one of another version.
        VerifyError: pools that are missing, or whose content does not match the IR.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            pools = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"artefact {path}: expected a safetensors file, found {error}") from None
    if metadata.get(VERSION_KEY) != VERSION or IR_KEY not in metadata:
        raise InputError(
            f"artefact {path}: expected version {VERSION} of a stoicc artefact, found "
            f"{metadata.get(VERSION_KEY, 'a file without IR text')}; write it with kernel.save"
        )
    module = parse(metadata[IR_KEY])
    verify_pools(module.tiles, pools)
    return Kernel(module, pools, target, on_missing).to(device)
