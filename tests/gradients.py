"""What gradients of a kernel should be: those that torch finds through the decoded tiles, in float64."""

import torch
from torch import Tensor

import stoicc
from stoicc.codegen.reference import decode_tiles, finish_output, scaled_input
from stoicc.pools import TiledWeight
from tests.kernel_classes import FURTHER, MIXES, KernelClass, make_case

FORMATS = tuple(dict.fromkeys(text for texts in (*MIXES.values(), *FURTHER.values()) for text in texts))
TOLERANCE = {"f32": 1e-5, "f16": 3e-3, "bf16": 2e-2}
"""Relative Frobenius error allowed for a weight dtype."""


def make_kernel(
    formats: str = "mosaic",
    beside: str = "all",
    weight: str = "f32",
    target: str = "reference",
    *,
    x: str = "same",
    shape: tuple[int, int] = (72, 90),
    tile: tuple[int, int] = (32, 32),
) -> stoicc.Kernel:
    case = make_case(KernelClass(formats, tile, weight, x, beside, False, 16), shape)
    return stoicc.compile(TiledWeight(case.module.tiles, case.pools), target=target)


def expected(kernel: stoicc.Kernel, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """By name dL/dx, dL/d(bias, left, right), and dL/dW as `tiles`, in float64, W in the order of its tiles."""
    program, pools = kernel.program, {name: pool.detach() for name, pool in kernel.pools.items()}
    leaves: dict[str, Tensor] = {
        name: pools[name].double().requires_grad_() for name in ("bias", "left", "right") if name in pools
    }
    tiles = decode_tiles(program, pools).double().requires_grad_()
    wide = x.detach().double().requires_grad_()
    held: dict[str, Tensor] = pools | leaves
    y = finish_output(program, held, scaled_input(program, held, wide) @ tiles.T, wide)
    y.backward(grad.double())
    leaves |= {"x": wide, "tiles": tiles}
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def spread(kernel: stoicc.Kernel) -> Tensor:
    """Gradients of planes where their weights stand `[M, K]`, in the order of tiles; zeros where nothing is trained."""
    held = _no_scales(kernel)
    for name, parameter in kernel.named_parameters():
        held[name] = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    return decode_tiles(kernel.program, {**kernel.pools, **held}).double()


def kept(kernel: stoicc.Kernel) -> Tensor:
    """Bool `[M, K]`, in the order of tiles: the weights that are trained."""
    held = _no_scales(kernel) | {name: torch.ones_like(kernel.pools[name]) for name in kernel.trainable()}
    return decode_tiles(kernel.program, {**kernel.pools, **held}) == 1


def _no_scales(kernel: stoicc.Kernel) -> dict[str, Tensor]:
    """Scales of zero: codes stand for nothing then."""
    scales = [name for name in kernel.pools if name.rpartition("_")[2] in ("scales", "scale") and name[0] == "p"]
    return {name: torch.zeros_like(kernel.pools[name]) for name in scales}


def assert_gradients(kernel: stoicc.Kernel, x: Tensor, tolerance: float) -> None:
    """All gradients of a kernel whose trainable pools are parameters, for one batch."""
    x = x.detach().requires_grad_()
    y = kernel(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    y.backward(grad)
    wanted = expected(kernel, x, grad)
    assert x.grad is not None
    close(x.grad, wanted["x"], tolerance, "x")
    for name in ("bias", "left", "right"):
        if name in wanted:
            found = kernel.get_parameter(name).grad
            assert found is not None
            close(found, wanted[name], tolerance, name)
    close(spread(kernel), wanted["tiles"].where(kept(kernel), 0), tolerance, "planes")


def close(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """By relative Frobenius error; NaN never passes, 2**-127 does for a zero scale."""
    error = (found.double() - wanted).norm()
    assert error <= tolerance * wanted.norm() + 1e-30, f"{what}: relative error {error / wanted.norm():.2e}"
