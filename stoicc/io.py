"""Artefacts: one safetensors file with the canonical pools and the exact IR text.

Nothing in it belongs to a device: a backend repacks planes when it builds an executor.
"""

import hashlib
from os import PathLike

import torch

from stoicc.ir.errors import InputError, VerifyError
from stoicc.ir.parser import parse
from stoicc.ir.printer import print_module
from stoicc.ir.types import Module
from stoicc.ir.verify import verify, verify_pools
from stoicc.kernel import Kernel
from stoicc.pools import rehash
from stoicc.revisions import migrated, print_revisions

IR_KEY = "stoicc.ir"
HASH_KEY = "stoicc.ir.hash"
REVISIONS_KEY = "stoicc.formats"
VERSION_KEY = "stoicc.artefact"
VERSION = "1"


def save(kernel: Kernel, path: str | PathLike[str]) -> None:
    """Write a kernel; content hashes are taken anew, as training may have changed values.

    Raises:
        InputError: a path that cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    pools = {name: pool.detach().cpu().contiguous() for name, pool in kernel.source_of_pools.whole().items()}
    text = print_module(Module(rehash(kernel.program, pools), kernel.schedule), exact=True)
    metadata = {IR_KEY: text, HASH_KEY: text_hash(text), VERSION_KEY: VERSION}
    try:
        save_file(pools, path, metadata={**metadata, REVISIONS_KEY: print_revisions(kernel.program)})
    except (SafetensorError, OSError) as error:
        raise InputError(f"artefact {path}: expected a file that can be written, found {error}") from None


def text_hash(text: str) -> str:
    """Of the IR text: an artefact whose text was edited is refused."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def load(
    path: str | PathLike[str], target: str = "auto", device: str | torch.device = "cpu", on_missing: str = "error"
) -> Kernel:
    """Read a kernel that `Kernel.save` wrote.

    Args:
        target, on_missing: as in `stoicc.compile`.
        device: where the pools go.

    Raises:
        InputError: not an artefact of stoicc, one of another version, or planes of a format that is laid out
            otherwise today.
        VerifyError: IR text or pools that are not what was saved.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            pools = {name: file.get_tensor(name).clone() for name in file.keys()}  # each by itself, not of one map
    except (SafetensorError, OSError) as error:
        raise InputError(f"artefact {path}: expected a safetensors file, found {error}") from None
    if metadata.get(VERSION_KEY) != VERSION or IR_KEY not in metadata:
        raise InputError(
            f"artefact {path}: expected version {VERSION} of a stoicc artefact, found "
            f"{metadata.get(VERSION_KEY, 'a file without IR text')}; write it with kernel.save"
        )
    if metadata.get(HASH_KEY) != text_hash(metadata[IR_KEY]):
        raise VerifyError(f"artefact {path}: expected the IR text as it was saved, found it changed; save it again")
    module = parse(metadata[IR_KEY])
    module, pools = migrated(module, pools, metadata.get(REVISIONS_KEY), f"artefact {path}")
    verify(module)
    verify_pools(module.tiles, pools)
    try:
        return Kernel(module, pools, target, on_missing).to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"artefact {path}: expected a device to load to, found {device!r} ({error})") from None
