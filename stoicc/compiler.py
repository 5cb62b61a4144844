"""`stoicc.compile`: inspect, schedule, and wrap in a kernel."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from stoicc.inspector import inspect
from stoicc.ir.errors import InputError
from stoicc.ir.schedule import Schedule
from stoicc.ir.types import Module
from stoicc.kernel import Kernel
from stoicc.passes import Pipeline, default_pipeline
from stoicc.pools import TiledWeight
from stoicc.targets import check_target
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
) -> Kernel:
    """Compile a weight matrix to a kernel: `kernel(x)` is `F.linear(x, weight, bias)`.

    With no `tile_map` and `approximate=True` the result is lossless: `kernel.to_dense()` equals
    the weight bit for bit.

    Args:
        weight: `[M, K]` tensor, numpy array, scipy sparse matrix, operator's result,
            `nn.Linear` (its bias comes along), `stoicc.inspect`'s result, or another kernel (to
            change target or schedule).
        formats, tile, tile_map, approximate, bias, activation, name: see `stoicc.inspect`.
        target: "auto" (the weight's device), "cpu", "cuda" or "reference".
        pipeline: scheduling passes, as text (`"drop-empty,build-csr,split-k{parts=4}"`) or object;
            default: `stoicc.passes.default_pipeline(target)`.
        schedule: a schedule to use as it is, in place of a pipeline.
        on_missing: what to do with a format that has no code for the target: "error", or
            "dense" to materialise its tiles when the executor is built.

    Raises:
        StoiccError: one sentence that says where, what was expected and found, and the way out.
    """
    if pipeline is not None and schedule is not None:
        raise InputError("compile: expected a pipeline or a schedule, found both; give one")
    check_target(target)
    device = _device(weight, target)
    if isinstance(weight, nn.Linear):
        bias = weight.bias if bias is None else bias
        weight = weight.weight
    if isinstance(weight, (TiledWeight, Kernel)):
        given = {"formats": formats, "tile": tile, "tile_map": tile_map, "bias": bias, "activation": activation}
        if taken := [option for option, value in given.items() if value is not None]:
            raise InputError(
                f"compile: expected no {', '.join(taken)} with a weight that is inspected already; "
                "pass it to stoicc.inspect"
            )
        tiled = weight.tiled() if isinstance(weight, Kernel) else weight
    else:
        tiled = inspect(
            weight,
            formats,
            tile,
            tile_map,
            approximate=approximate,
            name=name,
            bias=bias,
            activation=activation,
        )
    if schedule is not None:
        module = Module(tiled.program, schedule)
    else:
        passes = Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline
        module = (passes or default_pipeline(_pipeline_target(target, device))).run(Module(tiled.program))
    return Kernel(module, tiled.pools, target, on_missing).to(device)


def _device(weight: Any, target: str) -> str:
    """The device type that the kernel's pools go to."""
    from stoicc.targets import backend_named

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
