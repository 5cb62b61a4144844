"""Device functions for Hopper's `wgmma`: a warpgroup of four warps multiplies 64 rows, x straight from shared memory.

Weights are the same blobs: warp w of a warpgroup holds rows 16 w .. 16 w + 15 of an operand of 64 rows as it
holds those of an `mma`, positions likewise, and sums `[MT, RN, W, 32, 4]` are where they are for `mma`. Only x differs:
its block is `[BN, 32]` words for each 64 columns, swizzled by 128 bytes, and `wgmma` takes a descriptor of it.

A product is asynchronous: until `await_products` has waited for it, nothing may touch the registers of its
operands and sums, nor its slot of the ring. Loops keep at most one product on its way, half of 64 columns: while
it runs, the operands of the next are loaded to other registers. That is why a copy runs `LAG` slots behind.

Compiled and emulated, never run on a GPU.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def copies_asm(NEWEST):
    """Wait for copies of this thread, and let `wgmma`, which reads past the caches of the warps, see them."""
    return "cp.async.wait_group " + str(NEWEST) + "; fence.proxy.async.shared::cta;"


@gluon.jit
def await_copies(NEWEST: gl.constexpr):
    """Wait for all groups of this thread's copies but the NEWEST; a barrier has to follow."""
    gl.inline_asm(copies_asm(NEWEST), "~{memory}", [], [], is_pure=False)


@gluon.constexpr_function
def block_layout():
    """A block of x `[BN, BK / 2]` in words: panels of 64 columns, rows of 128 bytes."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)


@gluon.jit
def load_positions(tile, AT: gl.constexpr, MT: gl.constexpr, W: gl.constexpr):
    """A word of positions for each lane and m-tile, from word AT of a tile: `[MT * W * 32]`."""
    return tile.slice(AT, MT * W * 32).load(gl.BlockedLayout([1], [32], [W], [0]))


@gluon.constexpr_function
def moves_asm(outputs, inputs):
    """Copies of registers."""
    return " ".join(["mov.b32 " + into + ", " + word + ";" for into, word in zip(outputs[0], inputs[0], strict=True)])


@gluon.jit
def own_registers(positions):
    """The same positions in registers of one product's own: both halves need them, and one may be on its way."""
    return gl.inline_asm(moves_asm, ("=r", "r"), [positions], positions.type, is_pure=False)


@gluon.constexpr_function
def zeros_asm(outputs, inputs):
    """Zeros that the compiler does not know to be constants."""
    return " ".join(["mov.b32 " + into + ", 0;" for into in outputs[0]])


@gluon.jit
def start_sums(L: gl.constexpr, MT: gl.constexpr, RN: gl.constexpr, W: gl.constexpr):
    """Sums of nothing. Known zeros would be written once more where a loop has no turn, next to products on their way,
    and ptxas would have all products wait for each other."""
    kind: gl.constexpr = gl.distributed_type(gl.float32, [MT, RN, W, 32, 4], L)
    return gl.inline_asm(zeros_asm, ("=f",), [], kind, is_pure=False)


@gluon.constexpr_function
def descriptor_asm(ADDRESS, HALF):
    """Matrix descriptor b0 of 32 columns of x (PTX ISA, wgmma): address / 16, 1024 bytes for 8 rows, swizzle 128."""
    fields = (1 << 62) | (1024 // 16 << 32) | (1 << 16)
    text = "{ .reg .b32 at; .reg .b64 b0, b1; and.b32 at, " + ADDRESS + ", 0x3FFFF; shr.u32 at, at, 4; "
    text += "cvt.u64.u32 b0, at; add.s64 b0, b0, " + str(fields + HALF * 64 // 16) + "; "
    return text + "add.s64 b1, b0, 2; "  # 16 columns further on: 32 bytes


@gluon.constexpr_function
def registers(FIRST, COUNT):
    """A vector operand."""
    return "{" + ", ".join(["$" + str(FIRST + number) for number in range(COUNT)]) + "}"


@gluon.constexpr_function
def group_asm(MT, RN, HALF, SPARSE, DTYPE):
    """One group of products: sums, then operands a0, a1 (or a and positions), the block's address, sums again."""
    sums, words = 4 * MT * RN, 4 * MT
    text = descriptor_asm("$" + str(sums + words + (MT if SPARSE else words)), HALF) + "wgmma.fence.sync.aligned; "
    kind = "m64n" + str(8 * RN) + ("k32" if SPARSE else "k16") + ".f32." + DTYPE + "." + DTYPE + " "
    for tile in range(MT):
        into, a0 = registers(4 * RN * tile, 4 * RN), sums + 4 * tile
        if SPARSE:
            text += "wgmma.mma_async.sp.sync.aligned." + kind + into + ", " + registers(a0, 4) + ", b0, "
            text += "$" + str(sums + words + tile) + ", " + str(HALF) + ", 1, 1, 1, 0; "
        else:
            for number in range(2):
                text += "wgmma.mma_async.sync.aligned." + kind + into + ", " + registers(a0 + number * words, 4)
                text += ", b" + str(number) + ", 1, 1, 1, 0; "
    return text + "wgmma.commit_group.sync.aligned; }"


@gluon.constexpr_function
def group_constraints(MT, RN, OPERANDS):
    """Sums are read and written in place; no load of shared memory moves across."""
    sums = 4 * MT * RN
    tied = [str(number) for number in range(sums)]
    return ",".join(["=&f"] * sums + ["r"] * OPERANDS + tied + ["~{memory}"])


@gluon.jit
def multiply_group(a0, a1, block, sums, K32: gl.constexpr, DTYPE: gl.constexpr, MT: gl.constexpr, RN: gl.constexpr):
    """Start adding two dense fragments times 32 columns of x to the sums."""
    panel = block.slice(K32 // 2 * 32, 32, dim=1)
    asm: gl.constexpr = group_asm(MT, RN, K32 % 2, False, DTYPE)
    constraints: gl.constexpr = group_constraints(MT, RN, 8 * MT + 1)
    return gl.inline_asm(asm, constraints, [a0, a1, panel, sums], sums.type, is_pure=False)


@gluon.jit
def multiply_group_sparse(
    a, positions, block, sums, K32: gl.constexpr, DTYPE: gl.constexpr, MT: gl.constexpr, RN: gl.constexpr
):
    """Start adding a 2:4 fragment times 32 columns of x to the sums."""
    panel = block.slice(K32 // 2 * 32, 32, dim=1)
    asm: gl.constexpr = group_asm(MT, RN, K32 % 2, True, DTYPE)
    constraints: gl.constexpr = group_constraints(MT, RN, 5 * MT + 1)
    return gl.inline_asm(asm, constraints, [a, positions, panel, sums], sums.type, is_pure=False)


@gluon.constexpr_function
def await_asm(NEWEST):
    """Wait for all groups but the newest."""
    return "wgmma.wait_group.sync.aligned " + str(NEWEST) + ";"


@gluon.constexpr_function
def await_constraints(COUNT):
    """Sums in place."""
    return ",".join(["=f"] * COUNT + [str(number) for number in range(COUNT)] + ["~{memory}"])


@gluon.jit
def await_products(sums, NEWEST: gl.constexpr, MT: gl.constexpr, RN: gl.constexpr):
    """Wait until all groups of products but the NEWEST have ended."""
    asm: gl.constexpr = await_asm(NEWEST)
    constraints: gl.constexpr = await_constraints(4 * MT * RN)
    return gl.inline_asm(asm, constraints, [sums], sums.type, is_pure=False)
