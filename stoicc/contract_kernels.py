"""What a format's device code promises: the C multiply, the C panel decode and the Triton decode equal `decode`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from stoicc.codegen.cpu.build import instruction_set
from stoicc.codegen.cpu.decode import CompiledDecoder, can_decode
from stoicc.codegen.cpu.plan import classify
from stoicc.compiler import compile
from stoicc.contract import TILES, Contract, NotTried, Problems
from stoicc.ir.dtypes import TORCH_DTYPES, bits, output_dtype
from stoicc.ir.format import PlaneKind
from stoicc.ir.fragment import Operands
from stoicc.ir.tile_mac import TileMac
from stoicc.kernel import Kernel
from stoicc.targets import backend_named

BATCHES = (1, 2, 4, 8, 9)
"""Every number of entries that a C multiply is emitted for, and one more than fits a block."""

LARGE = 256
"""Entries that are tried at most."""

TOLERANCE = {"f32": 1e-5, "f16": 1e-3, "bf16": 8e-3}
"""Error of a product allowed, as a share of sum |w x|: a multiply may leave out the rounding of products to the
weight's dtype."""


def c_multiply(c: Contract) -> Problems:
    code, elements = c.fmt.tile_mac(c.tile, c.dtype), c.fmt.elements(c.tile, c.dtype)
    if code is None:
        raise NotTried("the format has no tile_mac")
    if elements is not None and elements.in_lanes and code.in_lanes is None:
        yield "elements says that tile_mac has in_lanes, found none"
    kernel, weight, kinds = sample_kernel(c, "cpu")
    got = run_executor(kernel, "tiles", torch.eye(weight.shape[1])).T.to(weight.dtype)
    for kind in wrong_rows(c, got != weight, kinds):
        yield f"{kind} tiles times the identity differ from decode"
    generator = torch.Generator().manual_seed(2)
    x_dtypes = (torch.float32, torch.bfloat16) if c.dtype == "bf16" else (torch.float32,)  # matrix units take bf16
    for x_dtype, batch in ((dtype, batch) for dtype in x_dtypes for batch in _batches(kernel, dtype)):
        x = torch.randn(batch, weight.shape[1], generator=generator).to(x_dtype)
        want, scale = x.double() @ weight.double().T, x.abs().double() @ weight.abs().double().T
        far = ~((run_executor(kernel, "tiles", x).double() - want).abs() <= TOLERANCE[c.dtype] * scale + 1e-9)
        for kind in wrong_rows(c, far.T, kinds):
            yield f"{kind} tiles times a batch of {batch} are far from the product in float64"


def _batches(kernel: Kernel, x_dtype: torch.dtype) -> tuple[int, ...]:
    """`BATCHES`, and one at which tiles are unpacked once for all entries."""
    kernel_class = classify(kernel.ir, x_dtype, instruction_set())
    large = kernel_class.blocked and kernel_class.least_blocked <= LARGE
    return (*BATCHES, kernel_class.least_blocked) if large else BATCHES


def c_panels(c: Contract) -> Problems:
    code = c.fmt.tile_mac(c.tile, c.dtype)
    if code is None or not code.decode:
        raise NotTried("the format has no C decode of panels")
    kernel, weight, kinds = sample_kernel(c, "cpu")
    got = run_executor(kernel, "dense-once", torch.eye(weight.shape[1])).T
    for kind in wrong_rows(c, got != weight.float(), kinds):
        yield f"{kind} tiles times the identity differ from decode"
    if can_decode(kernel.ir):  # a product cannot tell -0.0 from 0.0
        for held in ("canonical", "packed"):
            if held == "packed":
                kernel.executor("tiles")
            panel = torch.full_like(weight, torch.nan)
            CompiledDecoder(kernel.ir, kernel.source_of_pools)(0, len(kinds), panel)
            for kind in wrong_rows(c, bits(panel) != bits(weight), kinds):
                yield f"{kind} tiles are written with other bits from {held} planes"


def c_unpack(c: Contract) -> Problems:
    code = c.fmt.tile_mac(c.tile, c.dtype)
    if code is None or (code.unpack is None and code.in_vectors is None):
        raise NotTried("the format has no unpack")
    if code.unpack is not None:
        yield from _unpacked(c, code)
    if code.in_vectors is not None:
        if code.in_vectors.unpack is None:
            yield "in_vectors has no unpack: what reads canonical planes could not have them"
            return
        yield from (f"in_vectors: {problem}" for problem in _unpacked(c, code.in_vectors))


def _unpacked(c: Contract, code: TileMac) -> Problems:
    """What unpack does not bring back of what pack made."""
    assert code.unpack is not None
    ragged = {name for plane in c.of_kind(PlaneKind.RAGGED) for name in (plane.name, f"{plane.name}_ptr")}
    for kind, tiles in c.accepted().items():
        planes = {name: plane.contiguous() for name, plane in c.fmt.encode(tiles.clone()).items()}
        before = {name: plane.clone() for name, plane in planes.items()}
        packed = code.pack(dict(before))
        for run in ("all entries", "a run of entries"):
            kept = {p.name: slice(None) if run == "all entries" else _RUNS.get(p.kind, slice(None)) for p in c.planes}
            kept |= dict.fromkeys(ragged, slice(None))
            back = code.unpack({name: plane[kept[name]] for name, plane in packed.items()}, c.tile)
            for name in ragged:
                if packed[name].data_ptr() != before[name].data_ptr() or not torch.equal(packed[name], planes[name]):
                    yield f"pack changes the RAGGED plane {name!r}, which unpack could not bring back by runs"
                    return
            if back.keys() != planes.keys():
                yield f"unpack returns {sorted(back)}, not the planes {sorted(planes)}"
                return
            for name, plane in planes.items():
                want, found = plane[kept[name]], back[name]
                if found.shape != want.shape or found.dtype != want.dtype:
                    yield f"{name} of {kind} tiles is unpacked as {found.dtype} {tuple(found.shape)}, not as it was"
                elif not torch.equal(bits(found), bits(want)):
                    yield f"{name} of {kind} tiles is packed and unpacked to other bits ({run})"


_RUNS = {PlaneKind.TILE: slice(1, None), PlaneKind.GROUP: slice(0, 1), PlaneKind.MATRIX: slice(None)}
"""Entries of which fewer are unpacked: planes are read by runs of their own."""


def fragments(c: Contract) -> Problems:
    """Tensor-core operands, as far as a CPU can tell: what they mean, and that planes come back from them."""
    fragment = c.fmt.fragment(c.tile, c.dtype)
    if fragment is None:
        raise NotTried("the format has no fragment")
    for kind, tiles in c.accepted().items():
        planes = {name: plane.contiguous() for name, plane in c.fmt.encode(tiles.clone()).items()}
        planes = {name: plane.expand(len(tiles), *plane.shape[1:]).contiguous() for name, plane in planes.items()}
        operands = fragment.operands({name: plane.clone() for name, plane in planes.items()}, c.tile)
        back = fragment.planes(operands, c.tile)
        if back.keys() != planes.keys():
            yield f"fragment.planes returns {sorted(back)}, not the planes {sorted(planes)}"
            return
        for name, plane in planes.items():
            found = back[name]
            if found.dtype != plane.dtype or found.shape != plane.shape or not torch.equal(bits(found), bits(plane)):
                yield f"{name} of {kind} tiles becomes operands and comes back with other bits"
        if fragment.decode is None or fragment.groups:
            want = c.fmt.decode(planes, c.tile, c.dtype)
            if not torch.equal(_of_operands(operands, c, fragment.bits), want):  # -0.0 times x is no other product
                yield f"operands of {kind} tiles are not what decode gives"


def _of_operands(operands: Operands, c: Contract, width: int) -> Tensor:
    """The tiles that operands mean."""
    if width == 16:
        values = operands.values.view(TORCH_DTYPES[c.dtype]).float()
    else:
        zeros = torch.tensor(1 << (width - 1)) if operands.zeros is None else _spread(operands.zeros, operands.values)
        values = operands.values.float() - zeros.float()
    if operands.scales is not None:
        values = values * _spread(operands.scales, values).float()
    if operands.positions is None:
        return values.to(TORCH_DTYPES[c.dtype])
    nibbles = torch.stack((operands.positions & 15, operands.positions >> 4), -1).flatten(-2)
    places = torch.stack((nibbles & 3, nibbles >> 2), -1).long()
    tiles = torch.zeros(*nibbles.shape, 4, dtype=values.dtype).scatter_(-1, places, values.unflatten(-1, (-1, 2)))
    return tiles.flatten(-2).to(TORCH_DTYPES[c.dtype])


def _spread(groups: Tensor, values: Tensor) -> Tensor:
    """`[T, BM, G]` -> a value for each operand."""
    return groups.repeat_interleave(values.shape[-1] // groups.shape[-1], -1)


def triton_decode(c: Contract) -> Problems:
    """Where Triton can run: on a GPU, or in its interpreter."""
    if c.fmt.decode_block(c.tile, c.dtype) is None:
        raise NotTried("the format has no decode_block")
    kernel, weight, kinds = sample_kernel(c, "cuda")
    for executor in ("tiles", "dense-once"):
        got = run_executor(kernel, executor, torch.eye(weight.shape[1])).T
        wrong = got.to(weight.dtype) != weight if executor == "tiles" else got != weight.float()
        for kind in wrong_rows(c, wrong, kinds):
            yield f"{kind} tiles times the identity ({executor}) differ from decode"


def sample_kernel(c: Contract, target: str) -> tuple[Kernel, Tensor, list[str]]:
    """A kernel with a tile row of each accepted kind, all in this format; its matrix, and the kinds in order."""
    missing = backend_named({"cuda": "triton"}.get(target, target)).available()
    rows = c.rows() if c.registered else {}
    if missing is not None or not rows:
        raise NotTried(missing or "no sample tile is accepted")
    weight = torch.cat([row.transpose(0, 1).reshape(c.tile[0], -1) for row in rows.values()])
    tile_map = c.tile_map(len(rows) * TILES, TILES)
    kernel = compile(weight, tile=c.tile, tile_map=tile_map, target=target)
    assert [segment.format for segment in kernel.program.segments] == [str(c.fmt)]
    assert weight.dtype == TORCH_DTYPES[c.dtype]
    return kernel, weight, list(rows)


def run_executor(kernel: Kernel, kind: str, x: Tensor) -> Tensor:
    """One executor on an output and a workspace that hold what would show."""
    executor, x = kernel.executor(kind), x.to(kernel.device)
    dtype = output_dtype(kernel.program.dtype, x.dtype)
    out = torch.full((x.shape[0], kernel.out_features), torch.nan, dtype=dtype, device=x.device)
    workspace = torch.full((executor.workspace_bytes(x.shape[0], x.dtype),), 255, dtype=torch.uint8, device=x.device)
    executor.run(x, out, workspace)
    return out.cpu()


def wrong_rows(c: Contract, wrong: Tensor, kinds: list[str]) -> Iterator[str]:
    """The kinds of tiles whose tile row has a True in `wrong [M, ...]`."""
    for kind, row in zip(kinds, wrong.split(c.tile[0]), strict=True):
        if row.any():
            yield kind
