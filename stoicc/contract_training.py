"""What a format promises of planes that training may change: gradients through `decode`, and code that follows."""

from collections.abc import Callable

import torch
from torch import Tensor

from stoicc.codegen.reference import decode_tiles
from stoicc.contract import TILES, Contract, NotTried, Problems
from stoicc.contract_kernels import run_executor, sample_kernel, wrong_rows
from stoicc.ir.dtypes import TORCH_DTYPES, bits
from stoicc.ir.format import Planes

STEP = {"f32": 2.0**-7, "f16": 2.0**-4, "bf16": 2.0**-3}
"""How far planes are moved, as a share of their numbers: past what rounding to the weight's dtype hides."""

SLACK = {"f32": 0.01, "f16": 0.05, "bf16": 0.2}
"""How far the movement of tiles may be from what gradients say, as a share of it: curvature, and rounding."""


def trained_planes(c: Contract) -> Problems:
    """`trainable` names planes of floats, and torch finds their gradients through `decode`."""
    names = c.fmt.trainable(c.tile, c.dtype)
    if not names:
        raise NotTried("the format has no planes that are trained")
    wrong = list(_misnamed(c, names))
    yield from wrong
    if wrong:
        return
    samples = {kind: c.fmt.encode(tiles.clone()) for kind, tiles in c.accepted().items()}
    every = torch.arange(TILES)
    samples["approximated random"] = c.fmt.approximate(c.samples()["random"], every).planes
    moved: dict[str, bool] = {}
    for kind, planes in samples.items():
        for name in names:
            for problem in _gradient(c, kind, planes, name, moved):
                yield problem
                return
    for name, changed in moved.items():
        if not changed:
            yield f"moving the plane {name!r} changes no tile that decode returns; leave it out of trainable"


def _misnamed(c: Contract, names: tuple[str, ...]) -> Problems:
    if not isinstance(names, tuple):
        yield f"trainable returns {names!r}, not a tuple of names of planes"
        return
    dtypes = {plane.name: plane.dtype for plane in c.planes}
    for name in names:
        if name not in dtypes:
            yield f"trainable names the plane {name!r}, which planes() does not declare"
        elif not TORCH_DTYPES[dtypes[name]].is_floating_point:
            yield f"trainable names the plane {name!r} of {dtypes[name]}; only planes of floats can be trained"
    if len(set(names)) < len(names):
        yield f"trainable names a plane twice: {', '.join(names)}"


def _gradient(c: Contract, kind: str, planes: Planes, name: str, moved: dict[str, bool]) -> Problems:
    """Of one plane: what decode gives for it moved up and down, beside what its gradient says of that."""

    def decode(plane: Tensor) -> Tensor:
        given = {key: value.clone() for key, value in planes.items()}
        return c.fmt.decode({**given, name: plane}, c.tile, c.dtype)

    plane = planes[name].detach()
    if not plane.numel():
        return
    with torch.enable_grad():
        leaf = plane.clone().requires_grad_()
        tiles = decode(leaf)
    if not torch.equal(bits(tiles.detach()), bits(decode(plane.clone()))):
        yield f"decode of {kind} tiles gives other bits while the plane {name!r} takes gradients"
        return
    typical = plane.float().square().mean().sqrt()
    step = STEP[c.dtype] * (float(typical) or 1.0)
    signs = torch.randint(0, 2, plane.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
    up, down = ((plane.float() + way * signs * step).to(plane.dtype) for way in (1, -1))
    difference = decode(up).double() - decode(down).double()
    happened = difference.square().sum()
    moved[name] = moved.get(name, False) or bool(happened > 0)
    if not tiles.requires_grad:
        if happened > 0:
            yield (
                f"decode of {kind} tiles gives no gradient to the plane {name!r}; compute them with torch from the "
                "plane itself, without detach, .data or numpy"
            )
        return
    size = happened.sqrt().clamp_min(1e-30)  # of one, so that sums over shared planes stay in the range of fp16
    (found,) = torch.autograd.grad(tiles, leaf, (difference / size).to(tiles.dtype), allow_unused=True)
    said = torch.tensor(0.0) if found is None else (found.double() * (up.double() - down.double())).sum() * size
    if not (said - happened).abs() <= SLACK[c.dtype] * happened:
        yield (
            f"the gradient that decode of {kind} tiles gives to the plane {name!r} says {said:.4g} of a change that is "
            f"{happened:.4g}; it must be that of what decode returns"
        )


def code_follows(c: Contract) -> Problems:
    """C code, fresh from `pack`, multiplies planes as training leaves them, which `encode` may never give."""
    names, code = c.fmt.trainable(c.tile, c.dtype), c.fmt.tile_mac(c.tile, c.dtype)
    if not names or code is None:
        raise NotTried("the format has no planes that are trained, or no tile_mac")
    if list(_misnamed(c, names)):
        raise NotTried("trainable names other things than planes of floats")
    kernel, weight, kinds = sample_kernel(c, "cpu")
    kernel.requires_grad_()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in kernel.parameters():
            factors = torch.rand(parameter.shape, generator=generator) * 3 - 1
            parameter.mul_(factors.where(torch.rand(parameter.shape, generator=generator) > 0.1, 0))  # zeros too
    want = decode_tiles(kernel.program, kernel.source_of_pools)
    compared: dict[str, Callable[[Tensor], Tensor]] = {"tiles": lambda y: y.to(want.dtype), "dense-once": lambda y: y}
    for executor, rounded in compared.items():
        got = rounded(run_executor(kernel, executor, torch.eye(weight.shape[1])).T)
        for kind in wrong_rows(c, got != want.to(got.dtype), kinds):
            yield f"{kind} tiles whose trained planes changed, times the identity ({executor}), differ from decode"
