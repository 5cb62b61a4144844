"""Constants of a device that does not exist: round numbers, so that tests can reckon."""

from stoicc.passes.cost_cpu import CpuConstants

FORMATS = ("dense", "nv24", "int4", "int8", "int4_nv24")
SHARED = {1: 1.0, 2: 1.4, 4: 2.0}


def constants(
    bandwidth: float = 1e10,
    tile: float = 1e-6,
    call: float = 1e-5,
    exposed: float = 0.5,
    join: float = 1e-9,
    gemm: float = 1e-11,
) -> CpuConstants:
    """A tile of 64 x 64 takes `tile` seconds at batch 1; bandwidth and speedup grow less than threads do."""
    by_batch = {1: tile, 4: 2 * tile, 16: 4 * tile, 64: 16 * tile}
    return CpuConstants(
        source="measured",
        call={1: call, 4: 2 * call},
        bandwidth={count: {1 << 12: bandwidth * more, 1 << 20: bandwidth / 2 * more} for count, more in SHARED.items()},
        tiles={(name, dtype, 64, 64): by_batch for name in FORMATS for dtype in ("bf16", "f32")},
        exposed={f"{name}|bf16": exposed for name in FORMATS},
        items={"bf16": {1: 1e-9, 64: 4e-9}, "f32": {1: 1e-9, 64: 4e-9}},
        pack={"bf16": {1: 1e-10, 64: 1e-8}, "f32": {1: 1e-10, 64: 1e-8}},
        join={1: join, 64: 16 * join},
        join_call={1: 1e-7, 4: 2e-7},
        speedup={1: 1.0, 2: 1.9, 4: 3.4},
        decode={(name, "bf16", 64, 64): 2e-10 for name in (*FORMATS, "empty")},
        decode_speedup={1: 1.0, 4: 3.0},
        gemm={"f32": {1: {1: 10 * gemm, 64: gemm}, 4: {1: 3 * gemm, 64: gemm / 4}}},
        gemm_call={"f32": {1: {1: 1e-7, 64: 2e-7}}},
    )
