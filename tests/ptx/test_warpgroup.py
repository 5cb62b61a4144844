"""Products of warpgroups on the emulator: what they compute, and what no kernel may do around them."""

import numpy as np
import pytest

from tests.ptx.machine import Kernel
from tests.ptx.memory import GlobalMemory
from tests.ptx.program import EmulationError, parse

THREADS, COLUMNS = 128, 8
ROWS_OF_X = 1 << 62 | 64 << 32 | 1 << 16
"""A descriptor: rows of 128 bytes swizzled by 128, eight of them every 1024 bytes."""

WEIGHTS = ("%r10", "%r11", "%r12", "%r13")
SUMS = ("%r20", "%r21", "%r22", "%r23")
REGISTERS = f"{{{', '.join(SUMS)}}}, {{{', '.join(WEIGHTS)}}}"
DENSE = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {REGISTERS}, %rd5, 1, 1, 1, 0; "
SPARSE = DENSE.replace("mma_async", "mma_async.sp").replace("k16", "k32").replace("%rd5,", "%rd5, %r14, 1,")
COMMIT, WAIT = "wgmma.commit_group.sync.aligned; ", "wgmma.wait_group.sync.aligned 0; "
FENCE, PUBLISH = "wgmma.fence.sync.aligned; ", "fence.proxy.async.shared::cta; "
SUM_UP = "".join(f"st.global.b32 [%rd1+{4 * number}], {name}; " for number, name in enumerate(SUMS))
STEP = FENCE + DENSE + COMMIT + WAIT


def run(body: str, weights: np.ndarray, x: np.ndarray, descriptor: int = ROWS_OF_X) -> np.ndarray:
    """Sums `[threads, 4]` of a program that has loaded its weights (a row of words a thread) and x (1024 bytes)."""
    ptx = f"""
        .visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1, .param .u64 k_param_2) .reqntid {THREADS}
        {{ .reg .b32 %r<99>; .reg .b64 %rd<99>;
        ld.param.b64 %rd9, [k_param_0]; ld.param.b64 %rd8, [k_param_1]; ld.param.b64 %rd7, [k_param_2];
        mov.u32 %r1, %tid.x;
        mad.wide.u32 %rd1, %r1, 16, %rd9; mad.wide.u32 %rd2, %r1, 32, %rd8; mad.wide.u32 %rd3, %r1, 8, %rd7;
        ld.global.v4.b32 {{{", ".join(WEIGHTS)}}}, [%rd2]; ld.global.b32 %r14, [%rd2+16];
        shl.b32 %r2, %r1, 3; ld.global.v2.b32 {{%r3, %r4}}, [%rd3]; st.shared.v2.b32 [%r2], {{%r3, %r4}};
        {"".join(f"mov.b32 {name}, 0f3F800000; " for name in SUMS)}
        mov.b64 %rd5, {descriptor};
        {body}
        ret; }}"""
    out, memory = np.full(16 * THREADS, 0xEE, np.uint8), GlobalMemory()
    buffers = [memory.add(name, data) for name, data in (("out", out), ("weights", weights), ("x", x))]
    Kernel(parse(ptx)).run(1, buffers, memory, 2048)
    return out.view(np.float32).reshape(THREADS, 4)


def operands(depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weights as a program loads them and `[64, depth]`, x as it lies in shared memory and `[8, depth]`.

    Of the weights, half of which are kept where depth is 32, lane 4 g + t of warp w has rows 16 w + g and 8 further on.
    """
    generator = np.random.default_rng(3)
    kept, x = generator.integers(-9, 10, (64, 16)), generator.integers(-9, 10, (COLUMNS, depth))
    words, whole = np.zeros((THREADS, 8), np.uint32), np.zeros((64, depth))
    first = generator.integers(0, 3, (64, 8)) if depth == 32 else None
    for thread in range(THREADS):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        for register in range(4):
            row, column = 16 * warp + g + 8 * (register % 2), 2 * t + 8 * (register // 2)
            pair = kept[row, column : column + 2].astype(np.float16).view(np.uint16).astype(np.uint32)
            words[thread, register] = pair[0] | pair[1] << 16
        if first is not None and t >= 2:  # selector 1: lanes 2 and 3 of four
            for half, row in enumerate((16 * warp + g, 16 * warp + g + 8)):
                nibbles = [int(f | (f + 1) << 2) << 4 * i for i, f in enumerate(first[row, 4 * (t - 2) : 4 * (t - 1)])]
                words[thread, 4] |= np.uint32(sum(nibbles) << 16 * half)
    for row, column in np.ndindex(kept.shape):
        where = column if first is None else 4 * (column // 2) + first[row, column // 2] + column % 2
        whole[row, where] = kept[row, column]
    lying = np.zeros((COLUMNS, 8, 8), np.float16)  # rows of eight runs of 16 bytes, run r of row n at place r ^ n
    for n, k in np.ndindex(x.shape):
        lying[n, k // 8 ^ n, k % 8] = x[n, k]
    return words.view(np.uint8).ravel(), whole, lying.view(np.uint8).ravel(), x


def sums_of(found: np.ndarray) -> np.ndarray:
    """Registers of sums -> `[64, 8]`."""
    out = np.zeros((64, COLUMNS))
    for thread, register in np.ndindex(found.shape):
        row = thread // 32 * 16 + thread % 32 // 4 + 8 * (register // 2)
        out[row, 2 * (thread % 4) + register % 2] = found[thread, register]
    return out


OVERWRITE = "bar.sync 0; st.shared.b32 [%r2], %r1; "
READY = PUBLISH + "bar.sync 0; "


@pytest.mark.parametrize(("product", "depth"), [(DENSE, 16), (SPARSE, 32)])
def test_products(product: str, depth: int) -> None:
    """Sums of ones and twice the product: groups end in order."""
    weights, whole, x, columns = operands(depth)
    found = run(READY + FENCE + product + COMMIT + product + COMMIT + WAIT + SUM_UP, weights, x)
    assert (sums_of(found) == 1 + 2 * whole @ columns.T).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (READY + DENSE + COMMIT + WAIT, "no wgmma.fence since it was written"),
        (READY + STEP + "mov.b32 %r20, 0f3F800000; " + DENSE + COMMIT + WAIT, "%r20: no wgmma.fence since"),
        ("bar.sync 0; " + STEP, "bytes that no fence.proxy.async has published"),
        (PUBLISH + STEP, "bytes read that another warp has written since the last barrier"),
        (READY + FENCE + DENSE + COMMIT + SUM_UP, "register %r20: read while a product is on its way"),
        (READY + FENCE + DENSE + COMMIT + "mov.b32 %r10, 0;", "register %r10: written while a product is on its way"),
        (READY + FENCE + SPARSE + COMMIT + "mov.b32 %r14, 0;", "register %r14: written while a product is on its way"),
        (READY + FENCE + DENSE + WAIT + SUM_UP, "register %r20: read while a product is on its way"),
        (READY + FENCE + DENSE + COMMIT, "the program ends while products are on their way"),
        (READY + FENCE + DENSE + COMMIT + OVERWRITE + "bar.sync 0; " + WAIT, "no fence.proxy"),
        (READY + FENCE + DENSE + COMMIT + OVERWRITE + READY + WAIT, "shared memory has changed"),
        (READY + STEP + "st.shared.b32 [%r2], %r1;", "bytes written that another warp has read since the last barrier"),
        (READY + "mov.b64 %rd5, 0; " + STEP, "descriptor 0x0 is not one of swizzled rows"),
        (READY + "cvt.u64.u32 %rd5, %r1; " + STEP, "threads of a warpgroup have different descriptors"),
        (READY + STEP.replace("1, 1, 1, 0;", "0, 1, 1, 0;"), "not emulated"),
        (READY + STEP.replace("n8", "n16"), "expected as many registers as its shape has"),
        (READY + FENCE + SPARSE.replace("%r14, 1,", "%r14, 0,") + COMMIT + WAIT, "positions of ordered metadata"),
    ],
)  # fmt: skip
def test_what_no_kernel_may_do(body: str, message: str) -> None:
    weights, _, x, _ = operands(32 if ".sp." in body else 16)
    with pytest.raises(EmulationError, match=message):
        run(body, weights, x)
