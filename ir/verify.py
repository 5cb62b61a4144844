"""The verifier: every invariant of a tile program, its schedule and its pools.

`verify` runs between passes and where a module enters from outside; it reads the IR only.
`verify_pools` also reads the tensors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from stoicc.ir.digest import digest
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.errors import VerifyError
from stoicc.ir.format import PlaneKind
from stoicc.ir.planes import pool_name
from stoicc.ir.rules import broken, run_rules
from stoicc.ir.rules_program import PROGRAM_RULES
from stoicc.ir.rules_schedule import SCHEDULE_RULES
from stoicc.ir.schedule import EPILOGUE, PROLOGUE
from stoicc.ir.types import Module, Pool, TileProgram


def verify(module: Module) -> None:
    """Check every rule of a module; VerifyError names the tile, format and rule that broke."""
    _raise_first(failures(module, stop=True))


def verify_schedule(module: Module) -> None:
    """Check the rules of the schedule alone, for a module whose program is known to be good."""
    failed: dict[str, VerifyError] = {}
    if module.schedule is not None:
        run_rules(SCHEDULE_RULES, module, failed, stop=True)
    _raise_first(failed)


def verify_runnable(module: Module) -> None:
    """Check that a verified module says all that an executor needs: csrs, items, and all beside the tiles fused.

    A pipeline may stop half-way, and its module is good; an executor of it would leave something out.
    """
    schedule = module.schedule
    where = f"program {module.tiles.name!r}, schedule"
    if schedule is None or not schedule.items:
        raise broken(where, "work items", "none", "run build-csr, or a whole default_pipeline")
    beside = [name for name in (*PROLOGUE, *EPILOGUE) if getattr(module.tiles.beside, name) is not None]
    fused = (*schedule.prologue, *schedule.epilogue)
    if left := [name for name in beside if name not in fused]:
        raise broken(where, f"{', '.join(left)} in the prologue or epilogue", "it left out", "run fuse-epilogue")


def failures(module: Module, stop: bool = False) -> dict[str, VerifyError]:
    """What is wrong with a module, by rule; a rule that cannot be judged has its cause's error."""
    failed: dict[str, VerifyError] = {}
    run_rules(PROGRAM_RULES, module, failed, stop)
    if module.schedule is not None and not (stop and failed):
        run_rules(SCHEDULE_RULES, module, failed, stop)
    return failed


def verify_pools(program: TileProgram, pools: Mapping[str, Tensor], contents: bool = True) -> None:
    """Check tensors against the program: there, dtype, shape, digest, legal permutations and offsets.

    Args:
        program: a verified program.
        pools: tensors by pool name; others than the program's may be there too.
        contents: also compare content hashes, which reads every byte.
    """
    for pool in program.pools():
        _check_tensor(program, pool, pools, contents)
    for name in ("row_permutation", "column_permutation"):
        pool = getattr(program.beside, name)
        if pool is not None:
            _check_permutation(f"program {program.name!r}, beside {name}, pool {pool.name}", pools[pool.name])
    for index, segment in enumerate(program.segments):
        for plane in segment.resolve().planes(program.tile, program.dtype):
            if plane.kind is PlaneKind.RAGGED:
                name = pool_name(index, plane.name)
                _check_offsets(f"segment %{index}, format {segment.format}, pool {name}_ptr", pools, name)


def _raise_first(failed: dict[str, VerifyError]) -> None:
    for error in failed.values():
        raise error


def _check_tensor(program: TileProgram, pool: Pool, pools: Mapping[str, Tensor], contents: bool) -> None:
    where = f"program {program.name!r}, pool {pool.name}"
    if pool.name not in pools:
        raise broken(where, "a tensor of this name", ", ".join(sorted(pools)) or "no pools", "pass every pool")
    tensor = pools[pool.name]
    if tensor.dtype != TORCH_DTYPES[pool.dtype] or tuple(tensor.shape) != pool.shape:
        raise broken(
            where,
            f"{TORCH_DTYPES[pool.dtype]} of shape {list(pool.shape)}",
            f"{tensor.dtype} of shape {list(tensor.shape)}",
            "encode the tiles again",
        )
    if contents:
        found = digest(tensor)
        if found != pool.digest:
            raise broken(where, f"content #{pool.digest}", f"#{found}", "the tensor changed: make the program again")


def _check_permutation(where: str, tensor: Tensor) -> None:
    counts = torch.zeros(tensor.numel(), dtype=torch.int64)
    inside = bool(((tensor >= 0) & (tensor < tensor.numel())).all())
    if inside:
        counts = torch.bincount(tensor.cpu().long(), minlength=tensor.numel())
    if not inside or bool((counts != 1).any()):
        raise broken(
            where,
            f"a permutation of 0 to {tensor.numel() - 1}",
            "an entry twice" if inside else "an entry out of range",
            "name every index once",
        )


def _check_offsets(where: str, pools: Mapping[str, Tensor], name: str) -> None:
    ptr, elements = pools[f"{name}_ptr"].cpu().long(), pools[name].shape[0]
    if int(ptr[0]) != 0 or int(ptr[-1]) != elements or bool((ptr.diff() < 0).any()):
        raise broken(
            where,
            f"ascending offsets from 0 to {elements}",
            f"{int(ptr[0])} to {int(ptr[-1])}",
            "encode the tiles again",
        )
