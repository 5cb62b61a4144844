"""The contract that every tile format keeps, as one function: `check_format(fmt)`.

Built-in formats and a user's own go through the same checks. A failure is said in the terms of
whoever wrote the format: which promise, on which kind of tile, what came back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from stoicc import contract_kernels, contract_storage, contract_training
from stoicc.contract import Contract, NotTried, Problems
from stoicc.ir.errors import FormatError, StoiccError
from stoicc.ir.format import TileFormat
from stoicc.ir.registry import find_format

FIRST: dict[str, Callable[[Contract], Problems]] = {
    "planes are well declared": contract_storage.declared,
    "a verdict on each tile": contract_storage.rejects,
}
"""Promises that all others build on: where one is broken, the others are not tried at that dtype."""

CHECKS: dict[str, Callable[[Contract], Problems]] = {
    **FIRST,
    "text form reads back": contract_storage.text,
    "the name is registered": contract_storage.registered,
    "planes as declared": contract_storage.encoded_as_declared,
    "inputs are left alone": contract_storage.inputs_left_alone,
    "accepted tiles come back bit for bit": contract_storage.round_trip,
    "zeros are held": contract_storage.zeros,
    "more than zeros is held": contract_storage.more_than_zeros,
    "an empty batch": contract_storage.no_tiles,
    "a reason for each rejection": contract_storage.reasons,
    "bytes as declared": contract_storage.byte_counts,
    "tiles that share planes agree": contract_storage.shared_planes,
    "one entry for the matrix": contract_storage.matrix_planes,
    "tails": contract_storage.tails,
    "approximation tells its error": contract_storage.approximation,
    "codes are held as they are": contract_storage.codes,
    "trained planes have gradients": contract_training.trained_planes,
    "C multiply equals decode": contract_kernels.c_multiply,
    "C panel decode equals decode": contract_kernels.c_panels,
    "packed planes unpack to themselves": contract_kernels.c_unpack,
    "C follows planes that training changed": contract_training.code_follows,
    "tensor-core operands mean what decode gives": contract_kernels.fragments,
    "Triton decode_block equals decode": contract_kernels.triton_decode,
}


def check_format(
    fmt: TileFormat | str, tile: tuple[int, int] = (64, 64), dtypes: tuple[str, ...] = ("f32", "f16", "bf16")
) -> tuple[str, ...]:
    """Run the whole contract on a format.

    Device code is run where it can be: C with a compiler, Triton on a GPU or under `TRITON_INTERPRET=1`.

    Args:
        fmt: the format, or its text. It has to be registered, as programs name formats by text.
        tile: the tile shape to try it at.
        dtypes: weight dtypes that it should hold.

    Returns:
        The promises that were checked, in order; those of device code only where it could run.

    Raises:
        FormatError: lists every broken promise.
    """
    resolved = find_format(fmt)
    broken: dict[tuple[str, str], dict[str, None]] = {}
    tried: set[str] = set()
    with _one_thread():
        for dtype in dtypes:
            subject = Contract(resolved, tile, dtype)
            for name, check in CHECKS.items():
                problems = _problems(check, subject)
                if problems is None:
                    continue
                tried.add(name)
                for problem in problems:
                    broken.setdefault((name, problem), {})[dtype] = None
                if problems and name in FIRST:
                    break
    if broken:
        listed = "\n  ".join(f"{name} ({', '.join(at)}): {problem}" for (name, problem), at in broken.items())
        raise FormatError(
            f"format {resolved.name}: expected the contract of TileFormat, found broken promises:\n  {listed}"
        )
    return tuple(name for name in CHECKS if name in tried)


def _problems(check: Callable[[Contract], Problems], subject: Contract) -> list[str] | None:
    """What a check yields, and what the format's own code raises in it; None where it was not tried."""
    found: list[str] = []
    try:
        found.extend(check(subject))
    except NotTried:
        return None
    except StoiccError as error:
        found.append(str(error))
    except Exception as error:  # a user's code may raise anything; say which promise it broke
        found.append(f"raised {type(error).__name__}: {error}")
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """Samples are a few tiles, which gain nothing from threads; on a busy machine threads that spin cost a lot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
