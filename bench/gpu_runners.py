"""What is timed on a GPU: our executors and the vendor's, each over copies of a weight at other addresses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu_weights import MOSAIC, RandomWeight, random_weight
from stoicc.codegen.gluon.launch import WGMMA_BLOCKS, without_wgmma
from stoicc.ir.library import library_matrix

VENDORS = ("dense (F.linear)", "2:4 (semi-structured)", "int4 (torch)")
"""The vendor's library, to compare with; the first is what speed-ups are over."""

MIXES = {"mosaic": MOSAIC, "half 2:4": (("dense", 0.5), ("nv24", 0.5))}

TENSOR_CORE_TILE = (128, 64)
"""The tile that the Gluon dialect is best at; the portable dialect is timed at the one it is best at."""

INT4_GROUP = 128

Runners = Callable[[Tensor, int], dict[str, list[Callable[[], object]]]]
"""For x and its batch: calls by executor, one for each copy of the weight."""


def is_vendor(name: str) -> bool:
    """Whether a row is the vendor's library, and not ours."""
    return name.endswith(")")


def runners_of(clock: Any, shape: tuple[int, int], name: str) -> tuple[Runners, int]:
    """What runs a row of the table, and the bytes of its weight."""
    return vendor(clock, shape, name) if is_vendor(name) else tiles(clock, shape, name)


def tiles(clock: Any, shape: tuple[int, int], name: str) -> tuple[Runners, int]:
    """Executors of ours: `tiles` in both dialects at decode; at prefill `dense-once`, up to 512 `tiles`, and where they
    can be used `tiles` by `wgmma` and the vendor's library."""
    shares = MIXES.get(name, ((name, 1.0),))
    weight = random_weight(shape, shares, "bf16", clock.device, tile=TENSOR_CORE_TILE)
    portable = in_portable_dialect(random_weight(shape, shares, "bf16", clock.device))
    count = clock.copies(weight.payload_bytes) - 1
    weights, portables = ([one, *(one.copy() for _ in range(count))] for one in (weight, portable))
    wide = [by_warpgroups(one) for one in weights] if has_warpgroups(clock.device) else []
    built: dict[tuple[int, str], Any] = {}  # packing the copies anew for each batch would take most of the time
    library = weights if library_matrix(weight.module.tiles) is not None and clock.device.type == "cuda" else []

    def executor(held: RandomWeight, kind: str) -> Any:
        key = id(held), kind
        if key not in built:
            built[key] = held.executor(kind)
        return built[key]

    def runners(x: Tensor, batch: int) -> dict[str, list[Callable[[], object]]]:
        kinds = ["tiles"] if batch <= 128 else ["dense-once"] if batch > 512 else ["tiles", "dense-once"]
        calls = {kind: [call(executor(w, kind), x, shape[0]) for w in weights] for kind in kinds}
        if batch <= 128:
            calls["portable"] = [call(executor(w, "tiles"), x, shape[0]) for w in portables]
        for name, kind, held in (("wgmma", "tiles", wide), ("vendor", "vendor", library)):
            if batch > 128 and held:
                calls[name] = [call(executor(w, kind), x, shape[0]) for w in held]
        return calls

    return runners, weight.payload_bytes


def has_warpgroups(device: torch.device) -> bool:
    """Whether a schedule that asks for `wgmma` gets it here."""
    if device.type != "cuda" or torch.version.hip:
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return without_wgmma(10 * major + minor, WGMMA_BLOCKS[0], {"wgmma": 1}) is None


def by_warpgroups(weight: RandomWeight) -> RandomWeight:
    """The same weight under a schedule that asks for `wgmma`, without split-K, which large batches have no use for."""
    assert weight.module.schedule is not None
    schedule = weight.module.schedule.split_k(1).launch_with(wgmma=1)
    return RandomWeight(replace(weight.module, schedule=schedule), weight.pools)


def in_portable_dialect(weight: RandomWeight) -> RandomWeight:
    """The same weight, kept to plain Triton."""
    assert weight.module.schedule is not None
    schedule = weight.module.schedule.launch_with(gluon=0)
    return RandomWeight(replace(weight.module, schedule=schedule), weight.pools)


def call(executor: Any, x: Tensor, rows: int) -> Callable[[], object]:
    """A call with its own output and workspace, both allocated before."""
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    workspace = torch.empty(executor.workspace_bytes(x.shape[0], x.dtype), dtype=torch.uint8, device=x.device)
    return lambda: executor.run(x, out, workspace)


def vendor(clock: Any, shape: tuple[int, int], name: str) -> tuple[Runners, int]:
    """F.linear on a dense weight or on torch's semi-structured form of a 2:4 one, and torch's int4 kernel."""
    if name.startswith("int4"):
        return torch_int4(clock, shape)
    weight = torch.randn(*shape, device=clock.device).to(torch.bfloat16) * 0.02
    payload = weight.nbytes
    if name.startswith("2:4"):
        weight = weight * torch.tensor([1, 0, 1, 0], dtype=weight.dtype, device=clock.device).repeat(shape[1] // 4)
        payload = payload * 9 // 16
    copies = [weight.clone() for _ in range(clock.copies(payload))]
    if name.startswith("2:4"):
        copies = [torch.sparse.to_sparse_semi_structured(copy) for copy in copies]

    def linear(x: Tensor, held: Tensor) -> Callable[[], object]:
        return lambda: F.linear(x, held)

    return lambda x, batch: {"torch": [linear(x, held) for held in copies]}, payload


def torch_int4(clock: Any, shape: tuple[int, int]) -> tuple[Runners, int]:
    """`torch.ops.aten._weight_int4pack_mm`, groups of 128 with scales and zeros in bf16."""
    rows, columns = shape
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=clock.device)
    scales = torch.randn(columns // INT4_GROUP, rows, 2, device=clock.device).to(torch.bfloat16) * 0.02
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    payload = packed.nbytes + scales.nbytes
    copies = [(packed.clone(), scales.clone()) for _ in range(clock.copies(payload))]

    def multiply(x: Tensor, held: tuple[Tensor, Tensor]) -> Callable[[], object]:
        return lambda: torch.ops.aten._weight_int4pack_mm(x, held[0], INT4_GROUP, held[1])

    return lambda x, batch: {"torch": [multiply(x, held) for held in copies]}, payload
