"""Device functions for tensor-core operands in registers: what lane holds what is written here, once.

With g = lane // 4 and t = lane % 4 (PTX ISA, `mma.m16n8k16` and `mma.sp.m16n8k32`), register r of

- A, 16 x 16 weights: row g + 8 * (r % 2), columns 2 t + 8 * (r // 2) and the next;
- B, 32 columns of x for 8 rows of the batch: batch row g, columns 2 t + 8 * r and the next: the first two
  registers are B of one dense `mma` and the others of the next, all four are B of one sparse `mma`;
- the sums, 16 x 8: row g + 8 * (r // 2), batch row 2 t + r % 2.

A program has W warps. Sums are `[MT, RN, W, 32, 4]`: m-tile i of warp w is rows 16 * (i * W + w) on, n-tile j is rows
8 * j on of the batch block, then lanes and registers. A is `[MT, W, 32, 4]`, broadcast along RN; B is `[RN, 32, 4]`,
broadcast along MT and W. An elementwise assembly of four elements is one instruction a warp then, since
the layouts keep the last axis in one lane. `convert_layout(assert_trivial=True)` only renames
registers: it fails to compile where data would have to move.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# ---- layouts --------------------------------------------------------------------------------


@gluon.constexpr_function
def sums_layout(MT, RN, W):
    """Sums `[MT, RN, W, 32, 4]`."""
    return gl.BlockedLayout([MT, RN, 1, 1, 4], [1, 1, 1, 32, 1], [1, 1, W, 1, 1], [4, 3, 2, 1, 0])


@gluon.constexpr_function
def powers_of_two(end):
    """1, 2, 4, ... below end: strides of the bits of an index."""
    return [1 << bit for bit in range(end.bit_length() - 1)]


@gluon.constexpr_function
def x_layout(RN, W):
    """B of 32 columns of x as words `[8 * RN, 16]`, the same in every warp: what `ldmatrix` gives."""
    registers = [[0, 4], [0, 8]] + [[8 * tile, 0] for tile in powers_of_two(RN)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0] for _ in powers_of_two(W)], [], [8 * RN, 16])


@gluon.constexpr_function
def pairs_layout(MT, W):
    """Row pairs `[MT * W * 8]`, pair g of each m-tile in the lanes 4 g .. 4 g + 3."""
    registers = [[8 * W * tile] for tile in powers_of_two(MT)]
    return gl.DistributedLinearLayout(
        registers, [[0], [0], [1], [2], [4]], [[8 * warp] for warp in powers_of_two(W)], [], [8 * MT * W]
    )


# ---- a tile in shared memory ----------------------------------------------------------------


@gluon.jit
def load_vectors(tile, AT: gl.constexpr, L: gl.constexpr, MT: gl.constexpr, W: gl.constexpr):
    """Four words for each lane, from word AT of a tile: `[MT, W, 32, 4]`."""
    flat = tile.slice(AT, MT * W * 128).load(gl.BlockedLayout([4], [32], [W], [0]))
    return gl.convert_layout(flat.reshape([MT, W, 32, 4]), gl.SliceLayout(1, L), assert_trivial=True)


@gluon.jit
def load_words(tile, AT: gl.constexpr, L: gl.constexpr, MT: gl.constexpr, W: gl.constexpr):
    """One word for each lane, in each of the four registers: `[MT, W, 32, 4]`."""
    flat = tile.slice(AT, MT * W * 32).load(gl.BlockedLayout([1], [32], [W], [0]))
    return each_register(flat.reshape([MT, W, 32]), L, MT, W)


@gluon.jit
def each_register(words, L: gl.constexpr, MT: gl.constexpr, W: gl.constexpr):
    """A word `[MT, W, 32]` of each lane, in each of the four registers: `[MT, W, 32, 4]`."""
    A: gl.constexpr = gl.SliceLayout(1, L)
    words = gl.convert_layout(words, gl.SliceLayout(3, A), assert_trivial=True)
    return words.expand_dims(3) | gl.zeros([MT, W, 32, 4], gl.int32, A)


@gluon.jit
def four_words(tile, AT: gl.constexpr, L: gl.constexpr, MT: gl.constexpr, W: gl.constexpr):
    """Four words of each lane, from word AT of a tile, each as `load_words` gives one."""
    flat = tile.slice(AT, MT * W * 128).load(gl.BlockedLayout([4], [32], [W], [0]))
    even, odd = gl.split(flat.reshape([MT, W, 32, 2, 2]))
    word0, word2 = gl.split(even)
    word1, word3 = gl.split(odd)
    return (
        each_register(word0, L, MT, W),
        each_register(word1, L, MT, W),
        each_register(word2, L, MT, W),
        each_register(word3, L, MT, W),
    )


@gluon.jit
def two_words(tile, AT: gl.constexpr, L: gl.constexpr, MT: gl.constexpr, W: gl.constexpr):
    """Two words of each lane, from word AT of a tile, each as `load_words` gives one."""
    flat = tile.slice(AT, MT * W * 64).load(gl.BlockedLayout([2], [32], [W], [0]))
    word0, word1 = gl.split(flat.reshape([MT, W, 32, 2]))
    return each_register(word0, L, MT, W), each_register(word1, L, MT, W)


@gluon.jit
def load_pairs(tile, AT: gl.constexpr, L: gl.constexpr, MT: gl.constexpr, W: gl.constexpr):
    """The row pair of each lane, from word AT of a tile, in each of the four registers: `[MT, W, 32, 4]`."""
    pairs = tile.slice(AT, MT * W * 8).load(pairs_layout(MT, W)).reshape([MT, W, 8])
    split: gl.constexpr = gl.BlockedLayout([MT, 1, 1, 1], [1, 1, 8, 4], [1, W, 1, 1], [3, 2, 1, 0])
    pairs = gl.convert_layout(pairs, gl.SliceLayout(3, split), assert_trivial=True)
    lanes = pairs.expand_dims(3) | gl.zeros([MT, W, 8, 4], gl.int32, split)
    return each_register(lanes.reshape([MT, W, 32]), L, MT, W)


@gluon.constexpr_function
def widen_asm(DTYPE):
    """A pair of 16-bit floats to fp32: the lower half to registers 0 and 1, the upper to 2 and 3."""
    if DTYPE == "bf16":
        low, high = "shl.b32 a, $4, 16;", "and.b32 b, $4, 0xffff0000;"
    else:
        low, high = "cvt.f32.f16 a, h;", "cvt.f32.f16 b, k;"
    halves = "" if DTYPE == "bf16" else ".reg .b16 h, k; mov.b32 {h, k}, $4; "
    kind = "b32" if DTYPE == "bf16" else "f32"
    moves = " ".join(["mov.b32 $0, a;", "mov.b32 $1, a;", "mov.b32 $2, b;", "mov.b32 $3, b;"])
    return "{ .reg ." + kind + " a, b; " + halves + low + " " + high + " " + moves + " }"


@gluon.jit
def load_scales(tile, AT: gl.constexpr, DTYPE: gl.constexpr, L: gl.constexpr, MT: gl.constexpr, W: gl.constexpr):
    """What each register of the sums is multiplied by, fp32 `[MT, 1, W, 32, 4]`."""
    pairs = load_pairs(tile, AT, L, MT, W)
    scales = gl.inline_asm_elementwise(widen_asm(DTYPE), "=&f,=&f,=&f,=&f,r,r,r,r", [pairs], gl.float32, True, 4)
    return scales.expand_dims(1)


@gluon.constexpr_function
def less_pair_asm(DTYPE):
    """Registers 0 and 2 less the lower half of a pair, registers 1 and 3 less its upper half."""
    text = "{ .reg .b32 low, high, minus; mov.b32 minus, " + ("0xBF80BF80" if DTYPE == "bf16" else "0xBC00BC00") + "; "
    text += "prmt.b32 low, $8, $8, 0x1010; prmt.b32 high, $8, $8, 0x3232; "
    for register in range(4):
        half = "high" if register % 2 else "low"
        text += f"fma.rn.{DTYPE}x2 ${register}, {half}, minus, ${4 + register}; "
    return text + "}"


@gluon.jit
def less_zeros(fragment, pairs, DTYPE: gl.constexpr):
    """A fragment of codes less the zero points of its rows (`load_pairs`); exact."""
    asm: gl.constexpr = less_pair_asm(DTYPE)
    return gl.inline_asm_elementwise(asm, "=&r,=&r,=&r,=&r" + ",r" * 8, [fragment, pairs], gl.int32, True, 4)


# ---- x in shared memory ---------------------------------------------------------------------


@gluon.jit
def load_columns(block, K32: gl.constexpr, L: gl.constexpr, RN: gl.constexpr, W: gl.constexpr):
    """B of 32 columns of x, `[1, RN, 1, 32, 4]`, from the words of a block of x `[BN, BK / 2]`."""
    words = block.slice(K32 * 16, 16, dim=1).load(x_layout(RN, W))
    words = words.reshape([RN, 8, 4, 4]).permute([0, 1, 3, 2]).reshape([RN, 32, 4])
    words = gl.convert_layout(words, gl.SliceLayout(0, gl.SliceLayout(2, L)), assert_trivial=True)
    return words.expand_dims(0).expand_dims(2)


@gluon.jit
def take_halves(low, high, odd0, odd1):
    """A word of two 16-bit numbers: of `low` the lower half, or where odd0 the upper, and of `high` likewise."""
    selector = 0x5410 + odd0 * 0x22 + odd1 * 0x2200
    return gl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], gl.int32, True, 1)


@gluon.constexpr_function
def scale_asm():
    """Both bf16 halves of $1 times $2 and $3 in fp32, rounded to bf16."""
    text = "{ .reg .b32 a, b; shl.b32 a, $1, 16; and.b32 b, $1, 0xffff0000; "
    return text + "mul.f32 a, a, $2; mul.f32 b, b, $3; cvt.rn.bf16x2.f32 $0, b, a; }"


@gluon.jit
def scale_halves(words, scale0, scale1):
    """A word of two numbers in bf16, each times a scale in fp32; what f16 could not hold is not scaled here."""
    asm: gl.constexpr = scale_asm()
    return gl.inline_asm_elementwise(asm, "=&r,r,f,f", [words, scale0, scale1], gl.int32, True, 1)


# ---- products -------------------------------------------------------------------------------


@gluon.constexpr_function
def mma_asm(DTYPE):
    """sums $0-3 = a0 $4-7 times b $12,13 plus a1 $8-11 times b $14,15 plus sums $16-19."""
    mma = "mma.sync.aligned.m16n8k16.row.col.f32." + DTYPE + "." + DTYPE + ".f32 "
    first = mma + "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$12,$13}, {$16,$17,$18,$19}; "
    return first + mma + "{$0,$1,$2,$3}, {$8,$9,$10,$11}, {$14,$15}, {$0,$1,$2,$3};"


@gluon.jit
def multiply(a0, a1, b, sums, DTYPE: gl.constexpr):
    """Sums plus two dense fragments times 32 columns of x."""
    operands = [a0.expand_dims(1), a1.expand_dims(1), b, sums]
    constraints: gl.constexpr = "=&f,=&f,=&f,=&f" + ",r" * 12 + ",f" * 4
    return gl.inline_asm_elementwise(mma_asm(DTYPE), constraints, operands, gl.float32, True, 4)


@gluon.constexpr_function
def mma_sparse_asm(DTYPE, SELECTOR):
    """sums $0-3 = a $4-7 at positions $16 times b $8-11 plus sums $12-15."""
    mma = "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." + DTYPE + "." + DTYPE + ".f32 "
    return mma + "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, $16, " + str(SELECTOR) + ";"


@gluon.jit
def multiply_sparse(a, b, positions, sums, SELECTOR: gl.constexpr, DTYPE: gl.constexpr):
    """Sums plus a 2:4 fragment times 32 columns of x; the selector takes one half of the positions."""
    operands = [a.expand_dims(1), b, sums, positions.expand_dims(1)]
    constraints: gl.constexpr = "=f,=f,=f,=f" + ",r" * 8 + ",f" * 4 + ",r" * 4
    return gl.inline_asm_elementwise(mma_sparse_asm(DTYPE, SELECTOR), constraints, operands, gl.float32, True, 4)
