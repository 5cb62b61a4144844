"""`stoicc.compile`: inspect, schedule, and wrap in a kernel."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from stoicc.inspector import everything, inspect_for, inspect_tall
from stoicc.ir.errors import FormatError, InputError
from stoicc.ir.schedule import Schedule
from stoicc.ir.types import Module, TileProgram
from stoicc.kernel import Kernel
from stoicc.ops.statistics import Statistics
from stoicc.passes import Pipeline, default_pipeline, initial_schedule, is_weight_pass
from stoicc.policy.applying import Wanted, tiled_within
from stoicc.policy.budget import Budget
from stoicc.policy.choose import Choice, Task
from stoicc.pools import TiledWeight
from stoicc.targets import backend_for, backend_named, check_target
from stoicc.weights import FormatLike, TileMap


def compile(  # the name is the contract of design and README
    weight: Any,
    formats: Sequence[FormatLike] | None = None,
    tile: tuple[int, int] | None = None,
    *,
    tile_map: TileMap | None = None,
    approximate: bool = False,
    bias: Tensor | None = None,
    activation: str | None = None,
    target: str = "auto",
    pipeline: str | Pipeline | None = None,
    schedule: Schedule | None = None,
    on_missing: str = "error",
    name: str = "weight",
    policy: Budget | None = None,
    statistics: Statistics | None = None,
    library: bool = False,
) -> Kernel:
    """Compile a weight matrix to a kernel: `kernel(x)` is `F.linear(x, weight, bias)`.

    Lossless, unless a policy, or a tile map with `approximate=True`, asks otherwise: `kernel.to_dense()` equals the
    weight (or the operator's own matrix) bit for bit.

    Args:
        weight: `[M, K]` tensor, numpy array, scipy sparse matrix, operator's result,
            `nn.Linear` (its bias comes along), `stoicc.inspect`'s result, or another kernel (to
            change target or schedule).
        formats: to choose from; default: every registered one that has code for the target (all,
            with `on_missing="dense"` or the reference).
        tile, tile_map, approximate, bias, activation, name: see `stoicc.inspect`.
        target: "auto" (the weight's device), "cpu", "cuda" or "reference".
        pipeline: scheduling passes, as text (`"drop-empty,build-csr,split-k{parts=4}"`) or object;
            default: `stoicc.passes.default_pipeline(target)`. Passes on the weight come first
            (`"reorder-rows,drop-empty,..."`) and need the weight, or a kernel that was made with them.
        schedule: a schedule to use as it is, in place of a pipeline.
        on_missing: what to do with a format that has no code for the target: "error", or
            "dense" to materialise its tiles when the executor is built.
        policy: a `Budget`: each tile gets the format that serves the output best within it, of the formats that
            the budget names. `kernel.choice` then tells what was chosen between what.
        statistics: of the layer's inputs (`stoicc.ops.Statistics`), for the policy; with a gram matrix, tiles are
            rounded in a sweep in which the weights to come make up for the errors. Without any, all inputs count alike.
        library: on GPUs, give large batches to a vendor's library, which keeps the matrix in its own form beside
            the tiles: 2:4 where all tiles are, else dense. Without it they are decoded panel by panel at each call.

    Raises:
        StoiccError: one sentence that says where, what was expected and found, and the way out.
    """
    if statistics is not None and policy is None:
        raise InputError("compile: expected a policy with statistics, found none; pass policy=stoicc.Budget(...)")
    if pipeline is not None and schedule is not None:
        raise InputError("compile: expected a pipeline or a schedule, found both; give one")
    check_target(target)
    device = _device(weight, target)
    if library and (pipeline is not None or schedule is not None):
        raise InputError(
            "compile: expected no pipeline or schedule with library=True, found one; write regimes{above=vendor} in it"
        )
    on_weight, passes = _pipeline(pipeline, _pipeline_target(target, device), library).split()
    applied = tuple(str(step) for step in on_weight)
    choice: Choice | None = None
    if isinstance(weight, nn.Linear):
        bias = weight.bias if bias is None else bias
        weight = weight.weight
    if isinstance(weight, (TiledWeight, Kernel)):
        given = {"formats": formats, "tile": tile, "tile_map": tile_map, "bias": bias, "activation": activation}
        options = {**given, "policy": policy}
        _refuse_options({**options, "approximate": approximate or None, "name": None if name == "weight" else name})
        tiled = weight.tiled() if isinstance(weight, Kernel) else weight
        applied = _made_with(weight)
        passes = replace(passes, passes=(*on_weight, *passes.passes))  # which say what they lack, if anything
    else:
        usable = backend_for(target, device).has_code if on_missing == "error" else everything
        wanted = Wanted(usable, name, bias, activation)
        if policy is not None:
            said: dict[str, Any] = {"formats": formats, "tile_map": tile_map, "approximate": approximate or None}
            _refuse_with_policy({**said, **{str(step): step for step in on_weight}})
            backend = _pipeline_target(target, device)
            tiled, choice = tiled_within(Task.of(weight, statistics, policy, tile, usable, backend), wanted)
        else:
            making: dict[str, Any] = {"name": name, "bias": bias, "activation": activation, "passes": on_weight}
            chooses_tile = tile is None and tile_map is None and not approximate
            if chooses_tile and _pipeline_target(target, device) == "triton":
                tiled = inspect_tall(usable, weight, formats, **making)
            else:
                tiled = inspect_for(usable, weight, formats, tile, tile_map, approximate=approximate, **making)
    module = _scheduled(tiled, applied, passes, schedule)
    _check_code(module.tiles, target, device, on_missing)
    kernel = Kernel(module, tiled.pools, target, on_missing).to(device)
    kernel.choice = choice
    return kernel


def _refuse_with_policy(options: dict[str, Any]) -> None:
    """What says how tiles are made, beside a policy that does."""
    if taken := [option for option, value in options.items() if value is not None]:
        raise InputError(
            f"compile: expected no {', '.join(taken)} with a policy, which chooses the tiles itself, found both; name "
            "formats in the Budget"
        )


def _refuse_options(options: dict[str, Any]) -> None:
    """A weight that is inspected already has its tiles; options for the inspector come too late."""
    if taken := [option for option, value in options.items() if value is not None]:
        raise InputError(
            f"compile: expected no {', '.join(taken)} with a weight that is inspected already; "
            "pass it to stoicc.inspect"
        )


def _pipeline(pipeline: str | Pipeline | None, target: str, library: bool) -> Pipeline:
    """The given pipeline, or that of the target."""
    passes = Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline
    if passes is not None and not isinstance(passes, Pipeline):
        raise InputError(f"pipeline: expected text or a Pipeline, found {type(passes).__name__}")
    return passes or default_pipeline(target, library)


def _made_with(weight: TiledWeight | Kernel) -> tuple[str, ...]:
    """The passes on the weight, as text, that tiles were made with; only a kernel says."""
    if isinstance(weight, TiledWeight):
        return ()
    return tuple(text for text in weight.schedule.applied if is_weight_pass(text))


def _scheduled(tiled: TiledWeight, applied: tuple[str, ...], passes: Pipeline, schedule: Schedule | None) -> Module:
    """The program with the given schedule, or what the pipeline makes of it after the passes that were applied."""
    if schedule is None:
        first = replace(initial_schedule(tiled.program), applied=applied)
        return passes.run(Module(tiled.program, first))
    if not isinstance(schedule, Schedule):
        raise InputError(f"schedule: expected a Schedule, found {type(schedule).__name__}; edit kernel.schedule")
    return Module(tiled.program, schedule)


def _check_code(program: TileProgram, target: str, device: str, on_missing: str) -> None:
    """A format without code for the target is named now, not at the first call."""
    backend = backend_for(target, device)
    for segment in program.segments:
        if on_missing == "error" and not backend.has_code(segment.resolve(), program.tile, program.dtype):
            raise FormatError(
                f"format {segment.format}: expected code for target {backend.name!r}, found none; give the format "
                f"{backend.code}, or pass on_missing='dense' to materialise its tiles when the kernel is built"
            )


def _device(weight: Any, target: str) -> str:
    """The device type that the kernel's pools go to."""
    if target == "cuda":
        return "cpu" if backend_named("triton").runs_on_cpu else "cuda"
    if target == "auto":
        tensor = weight.weight if isinstance(weight, nn.Linear) else weight
        return str(getattr(getattr(tensor, "device", None), "type", "cpu"))
    return "cpu"


def _pipeline_target(target: str, device: str) -> str:
    if target == "reference":
        return "reference"
    return "triton" if "cuda" in (target, device) else "cpu"
