"""Units of kept codes for matrix units, which few machines have: what is unpacked for them, on any with AVX512-BF16."""

import ctypes

import pytest
import torch
from torch import Tensor

import stoicc
from stoicc.codegen.cpu.build import able_instruction_sets, load
from stoicc.codegen.cpu.emit import emit
from stoicc.codegen.cpu.lanes import from_lanes
from stoicc.codegen.cpu.plan import classify
from stoicc.ir.registry import find_format

TILE = (32, 128)
_CALLS = """
void unit_of_pairs($pointers, int unit, bf16 *pairs, float *scale)
{
    vf_store_f32(scale, $format_pairs($names, unit, pairs));
}

void unit_of_octets($pointers, int unit, int8_t *octets, float *scale)
{
    vf_store_f32(scale, $format_octets($names, unit, octets));
}
"""


def units(fmt: str, form: str, columns: int) -> tuple[Tensor, Tensor]:
    """What all units of a tile are unpacked to, times what they return, fp32 `[BM, BK]`, and the tile."""
    if "avx512bf16" not in able_instruction_sets():
        pytest.skip("this machine has no AVX512-BF16")
    weight = torch.randn(TILE, generator=torch.Generator().manual_seed(0)).bfloat16()
    kernel = stoicc.compile(weight, tile=TILE, tile_map=[[fmt]], approximate=True, target="cpu")
    code = find_format(fmt).tile_mac(TILE, "bf16")
    assert code is not None
    resolved = find_format(fmt)
    encoded = resolved.approximate(weight[None], torch.zeros(1, dtype=torch.int64)).planes
    planes = code.pack({name: plane.contiguous() for name, plane in encoded.items()})
    arguments: list[ctypes.c_void_p | ctypes.c_int64] = []
    for name, plane in planes.items():
        if name == name.removesuffix("_ptr"):
            arguments.append(ctypes.c_void_p(plane.data_ptr()))
            arguments += [ctypes.c_int64(len(plane))] * (f"{name}_ptr" in planes)  # of a plane of any length
    names = ", ".join(f"p{i}" for i in range(len(arguments)))
    types = {ctypes.c_void_p: "const void *", ctypes.c_int64: "const int64_t "}
    pointers = ", ".join(f"{types[type(value)]}p{i}" for i, value in enumerate(arguments))
    calls = _CALLS.replace("$format", resolved.name).replace("$pointers", pointers).replace("$names", names)
    if form == "pairs":
        calls = calls[: calls.index("void unit_of_octets")]
    library = load(emit(classify(kernel.ir, torch.bfloat16, "amx")) + calls, "units", "amx")
    width = 2 if form == "pairs" else 4
    room = torch.zeros(columns * 16 * 2 + 64, dtype=torch.uint8)
    to = room[-room.data_ptr() % 64 :]  # stores are of whole lines
    parts = []
    for unit in range(TILE[0] // 16 * TILE[1] // columns):
        scale = torch.empty(16)
        getattr(library, f"unit_of_{form}")(
            *arguments, unit, ctypes.c_void_p(to.data_ptr()), ctypes.c_void_p(scale.data_ptr())
        )
        own = to[: columns * 16 * 4 // width].clone().view(torch.bfloat16 if form == "pairs" else torch.int8)
        lanes = own.float().view(1, 1, columns // width, 16, width).transpose(3, 4).flatten(2, 3)
        parts.append(from_lanes(lanes.contiguous(), 16)[0] * scale[:, None])
    found = torch.stack(parts).view(TILE[0] // 16, -1, 16, columns).transpose(1, 2).flatten(2).flatten(0, 1)
    return found, resolved.decode(encoded, TILE, "bf16")[0]


@pytest.mark.parametrize("form", ["pairs", "octets"])
@pytest.mark.parametrize(
    "fmt",
    [
        "masked<mask=nm, values=int4>",
        "masked<mask=nm<n=1, m=4>, values=int2<zero_points=true>>",
        "masked<mask=nm<n=4, m=16>, values=int8>",
        "masked<mask=nv24, values=int4<zero_points=true>>",
        "masked<mask=nv24, values=int2<group_size=128>>",
        "masked<mask=nv24, values=int8<group_size=0>>",
    ],
)
def test_units_for_matrix_units(fmt, form):
    found, tile = units(fmt, form, 32 if form == "pairs" else 64)
    assert torch.equal(found.bfloat16(), tile)


@pytest.mark.parametrize(("size", "form"), [(32, "pairs"), (64, "pairs"), (64, "octets"), (128, "octets")])
@pytest.mark.parametrize("zeros", ["", ", zero_points=true"])
def test_units_of_groups(size, form, zeros):
    found, tile = units(f"group_sparse<group_size={size}{zeros}>", form, 32 if form == "pairs" else 64)
    assert torch.equal(found.bfloat16(), tile)


@pytest.mark.parametrize("values", ["fp8", "fp8<kind=e5m2, group_size=32>", "mxfp4"])
@pytest.mark.parametrize("mask", ["nv24", "nm"])
def test_pairs_of_small_floats(mask, values):
    found, tile = units(f"masked<mask={mask}, values={values}>", "pairs", 32)
    assert torch.equal(found.bfloat16(), tile)
