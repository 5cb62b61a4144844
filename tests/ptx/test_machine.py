"""The emulator against small kernels whose result one can tell by hand, and what it refuses."""

import numpy as np
import pytest

from tests.ptx.arithmetic import bf16_to_f32, f32_to_bf16, logic3, permute_bytes
from tests.ptx.machine import Kernel
from tests.ptx.memory import GlobalMemory
from tests.ptx.program import EmulationError, parse
from tests.ptx.tensor_core import mma, mma_sparse

THREADS = 64


def run(body: str, words: int = THREADS, shared: int = 1024, grid: int = 1) -> np.ndarray:
    """A kernel that finds `%rd1`, the address of its thread's word of `out`, and `%r1`, its number."""
    ptx = f"""
        .visible .entry k(.param .u64 k_param_0) .reqntid {THREADS}
        {{ .reg .b32 %r<99>; .reg .b64 %rd<99>;
        ld.param.b64 %rd9, [k_param_0];
        mov.u32 %r1, %tid.x;
        mad.wide.u32 %rd1, %r1, 4, %rd9;
        {body}
        $end: ret; }}"""
    out = np.full(4 * words, 0xEE, np.uint8)
    memory = GlobalMemory()
    Kernel(parse(ptx)).run(grid, [memory.add("out", out)], memory, shared)
    return out.view(np.uint32)


def store(body: str) -> np.ndarray:
    return run(body + " st.global.b32 [%rd1], %r2;")


LANES = np.arange(THREADS, dtype=np.int64)


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("add.s32 %r2, %r1, -3;", LANES - 3),
        ("mul.lo.s32 %r2, %r1, 0x10001;", LANES * 0x10001),
        ("shl.b32 %r2, %r1, 40;", LANES * 0),
        ("sub.s32 %r3, %r1, 9; shr.s32 %r2, %r3, 1;", (LANES - 9) >> 1),
        ("sub.s32 %r3, %r1, 9; div.s32 %r2, %r3, 4;", np.trunc((LANES - 9) / 4)),
        ("bfe.u32 %r2, %r1, 2, 3;", LANES >> 2 & 7),
        ("shl.b32 %r3, %r1, 26; bfe.s32 %r2, %r3, 26, 6;", np.where(LANES < 32, LANES, LANES - 64)),
        ("mad.lo.s32 %r2, %r1, %r1, 5;", LANES * LANES + 5),
        ("xor.b32 %r3, %r1, 5; shfl.sync.idx.b32 %r2, %r1, %r3, 31, -1;", LANES ^ 5),
        ("shfl.sync.idx.b32 %r2, %r1, 2, 31, -1;", LANES // 32 * 32 + 2),
        ("setp.lt.s32 %p1, %r1, 7; selp.b32 %r2, 1, 0, %p1;", LANES < 7),
        ("setp.gt.u32 %p1, %r1, 7; mov.b32 %r2, 3; @!%p1 mov.b32 %r2, 4;", np.where(LANES > 7, 3, 4)),
        ("{ .reg .b32 u; xor.b32 u, %r1, 5; mov.b32 %r2, u; }", LANES ^ 5),
        ("mov.b32 %r3, {1, 2}; mov.b32 {%rs1, %rs2}, %r3; cvt.u32.u16 %r2, %rs2;", LANES * 0 + 2),
        ("cvt.u64.u32 %rd2, %r1; shl.b64 %rd3, %rd2, 33; shr.u64 %rd4, %rd3, 32; cvt.u32.u64 %r2, %rd4;", 2 * LANES),
        ("cvt.s64.s32 %rd2, -3; add.s64 %rd2, %rd2, 0x700000000; cvt.s64.s32 %rd3, %rd2; shr.s64 %rd4, %rd3, 32; "
         "cvt.u32.u64 %r2, %rd4;", LANES * 0 - 1),
    ],
)  # fmt: skip
def test_integers(body: str, want: np.ndarray) -> None:
    assert (store(body) == want.astype(np.int64).astype(np.uint32)).all()


def test_floats() -> None:
    values = store("cvt.rn.f32.s32 %r3, %r1; fma.rn.f32 %r2, %r3, 0f3F000000, 0fBF800000;").view(np.float32)
    assert (values == LANES * 0.5 - 1).all()
    pairs = store("cvt.rn.f32.s32 %r3, %r1; cvt.rn.bf16x2.f32 %r4, 0f3F800000, %r3; "
                  "fma.rn.bf16x2 %r2, %r4, 0x40004000, 0x3F803F80;").view(np.uint16)  # fmt: skip
    assert (bf16_to_f32(pairs[0::2]) == 2 * LANES + 1).all()
    assert (bf16_to_f32(pairs[1::2]) == 3).all()


def test_comparisons_with_nan() -> None:
    for name, want in {"lt": 0, "ltu": 1, "ne": 0, "neu": 1, "eq": 0, "equ": 1, "ge": 0, "geu": 1}.items():
        found = store(f"setp.{name}.f32 %p1, 0f7FC00000, 0f3F800000; selp.b32 %r2, 1, 0, %p1;")
        assert (found == want).all(), name


def test_halves_by_themselves() -> None:
    """bf16 alone in a register of 16 bits: 1.5 times 2.5 is 3.75."""
    one = store("mov.b16 %rs1, 0x3FC0; mov.b16 %rs2, 0x4020; mul.bf16 %rs3, %rs1, %rs2; cvt.u32.u16 %r2, %rs3;")
    assert (one == 0x4070).all()


def test_rounding_to_bf16_is_to_nearest_even() -> None:
    halfway = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7FC00001], np.uint32).view(np.float32)
    assert [hex(bits) for bits in f32_to_bf16(halfway)] == ["0x3f80", "0x3f82", "0x3f81", "0x7fff"]


def test_bytes_and_tables() -> None:
    a, b, selector = (np.array([word], np.uint32) for word in (0x33221100, 0x77665544, 0x4321))
    assert permute_bytes(a, b, selector)[0] == 0x44332211
    assert logic3(np.array([0xC], np.uint32), np.array([0xA], np.uint32), np.array([0x1], np.uint32), 0xEA)[0] == 0x9


def test_threads_part_and_meet_again() -> None:
    body = "setp.lt.u32 %p1, %r1, 9; @%p1 bra $few; mov.b32 %r2, 2; bra $met; $few: mov.b32 %r2, 3; $met: "
    assert (store(body + "add.s32 %r2, %r2, 10;") == np.where(LANES < 9, 13, 12)).all()


def test_a_loop() -> None:
    assert (store("mov.b32 %r2, 0; $top: add.s32 %r2, %r2, 2; setp.lt.s32 %p1, %r2, %r1; @%p1 bra $top;")
            == np.maximum(LANES + LANES % 2, 2)).all()  # fmt: skip


FILL = "shl.b32 %r5, %r1, 2; st.shared.b32 [%r5], %r1; "
TURNED = "xor.b32 %r6, %r5, 128; ld.shared.b32 %r2, [%r6];"


def test_shared_memory_with_a_barrier() -> None:
    assert (store(FILL + "bar.sync 0; " + TURNED) == (LANES ^ 32)).all()


COPY = "shl.b32 %r5, %r1, 2; cp.async.ca.shared.global [%r5], [%rd1], 4; cp.async.commit_group; "


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (FILL + TURNED, "bytes read that another warp has written since the last barrier"),
        (FILL + "bar.sync 0; " + TURNED + "st.shared.b32 [%r5], %r1;", "bytes written that another warp has read"),
        ("ld.shared.b32 %r2, [0];", "read of bytes that no store or finished copy has filled"),
        (COPY + "ld.shared.b32 %r2, [%r5];", "read of bytes that no store or finished copy has filled"),
        (COPY + "cp.async.wait_group 0; " + TURNED, "bytes read that another warp has written"),
        (COPY + "st.shared.b32 [%r5], %r1;", "bytes written that a copy is on its way to"),
        (COPY + COPY, "bytes written that a copy is on its way to"),
        (COPY, "the program ends while copies are on their way"),
        ("add.s32 %r2, %r7, 1;", "register %r7: read before it was written"),
        ("st.global.b32 [%rd1+4], %r1;", "access of 4 bytes at offset 256 of out of 256 bytes"),
        ("st.global.b32 [%rd1+2], %r1;", "at an address that is no multiple of it"),
        ("st.shared.b32 [1024], %r1;", "access of 4 bytes at 1024 of 1024"),
        ("setp.lt.u32 %p1, %r1, 9; @%p1 bra $few; bar.sync 0; $few:", "apart where they have to be together"),
        ("$top: bra $top;", "more than 2000000 steps"),
        ("popc.b32 %r2, %r1;", "instruction popc.b32: not emulated"),
        ("mov.b32 %rs1, 0; mov.b16 %rs2, %rs1;", "register %rs1: expected b16, found uint32"),
    ],
)
def test_what_no_kernel_may_do(body: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "steps" in message:
        monkeypatch.setattr("tests.ptx.machine.MOST_STEPS", 1000)
        message = "more than 1000 steps"
    with pytest.raises(EmulationError, match=message):
        run(body)


OWN = "mov.u32 %r3, %ctaid.x; mad.wide.u32 %rd1, %r3, 256, %rd1; "
"""Each program has 64 words of its own."""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (OWN + "st.global.b32 [%rd1], %r1; ld.global.b32 %r2, [%rd1];", None),
        ("ld.global.b32 %r2, [%rd1];", None),
        ("st.global.b32 [%rd1], %r1;", "bytes of out written that another program of the launch has written"),
        (OWN + "st.global.b32 [%rd1], %r1; ld.global.b32 %r2, [%rd9];", "bytes of out read that another program"),
        (OWN + "ld.global.b32 %r2, [%rd9+256]; st.global.b32 [%rd1], %r1;", "another program of the launch has read"),
        (OWN + "ld.global.b32 %r2, [%rd9]; ld.global.b32 %r2, [%rd9+256];", None),
    ],
)  # fmt: skip
def test_programs_share_no_byte_that_one_of_them_writes(body: str, message: str | None) -> None:
    if message is None:
        run(body, 2 * THREADS, grid=2)
        return
    with pytest.raises(EmulationError, match=message):
        run(body, 2 * THREADS, grid=2)


def fragments(matrix: np.ndarray, rows: tuple[int, ...], columns: tuple[int, ...]) -> list[np.ndarray]:
    """Registers of pairs along the columns, for offsets of each register: PTX ISA's figures in words."""
    lane = np.arange(32)
    found = []
    for row, column in zip(rows, columns, strict=True):
        low, high = (matrix[lane // 4 + row, 2 * (lane % 4) + column + half] for half in (0, 1))
        bits = [part.astype(np.float16).view(np.uint16).astype(np.uint32) for part in (low, high)]
        found.append(bits[0] | bits[1] << np.uint32(16))
    return found


def sums_of(result: np.ndarray) -> np.ndarray:
    """Registers of sums -> `[16, 8]`."""
    out = np.zeros((16, 8))
    for lane in range(32):
        for register in range(4):
            out[lane // 4 + 8 * (register // 2), 2 * (lane % 4) + register % 2] = result[lane, register]
    return out


def test_matrix_products() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.integers(-9, 9, (16, 32)), generator.integers(-9, 9, (8, 32))
    zero = [np.zeros(32, np.float32)] * 4
    left = fragments(a, (0, 8, 0, 8), (0, 0, 8, 8))
    right = fragments(b, (0, 0), (0, 8))
    assert (sums_of(mma(left, right, zero, "f16")) == a[:, :16] @ b[:, :16].T).all()
    # two different places in each four columns; a lane's word is for the columns of one selector, the other is noise
    first, gap = generator.integers(0, 3, (16, 8)), generator.integers(0, 3, (16, 8))
    second = np.minimum(first + 1 + gap, 3)
    columns = 4 * np.arange(8)[None, :, None] + np.stack((first, second), -1)
    compressed = np.take_along_axis(a, columns.reshape(16, 16), 1)
    kept = np.zeros_like(a)
    np.put_along_axis(kept, columns.reshape(16, 16), compressed, 1)
    nibbles = (first | second << 2).astype(np.uint32)
    left = fragments(compressed, (0, 8, 0, 8), (0, 0, 8, 8))
    right = fragments(b, (0, 0, 0, 0), (0, 8, 16, 24))
    for selector in (0, 1):
        metadata = np.full(32, 0x44444444, np.uint32)
        for group, half in np.ndindex(8, 2):
            rows = [sum(int(nibbles[row, 4 * half + i]) << 4 * i for i in range(4)) for row in (group, group + 8)]
            metadata[4 * group + 2 * selector + half] = rows[0] | rows[1] << 16
        assert (sums_of(mma_sparse(left, right, zero, metadata, selector, "f16")) == kept @ b.T).all()
    with pytest.raises(EmulationError, match="positions of ordered metadata have to increase"):
        mma_sparse(left, right, zero, np.zeros(32, np.uint32), 0, "f16")
