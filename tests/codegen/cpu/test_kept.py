"""Codes of which some are kept, on every instruction set: where they are put, and that none is read after the last.

Each run of codes ends where a page begins that may not be read.
"""

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

from stoicc.codegen.cpu import simd
from stoicc.codegen.cpu.build import load
from tests.codegen.cpu.mosaics import need

Array = np.ndarray
RUNS = 60

_SOURCE = """
#define INLINE static inline __attribute__((always_inline))
enum { LANES = 16 };

%(vocabulary)s

static const void *at_the_end(const void *from, int64_t size)
{
    static char *pages;
    if (!pages) {
        pages = mmap(0, 3 * 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mprotect(pages + 2 * 65536, 65536, PROT_NONE);
    }
    return memcpy(pages + 2 * 65536 - size, from, size);
}

#define SPREAD(function, bits) \\
    int function##_##bits( \\
        const int64_t *masks, const uint8_t *codes, int64_t size, const int8_t *rows, int otherwise, int flip, \\
        uint8_t *to) \\
    { \\
        const uint8_t *p = at_the_end(codes, size); \\
        return (int)(function(masks, p, p + size, rows, otherwise, flip, bits, to) - p); \\
    }
SPREAD(spread_word, 2)
SPREAD(spread_word, 4)
SPREAD(spread_word, 8)
SPREAD(spread_columns, 8)

void words(uint32_t mask, const int32_t *p, int64_t size, uint32_t flip, int32_t *to)
{
    spread_words(mask, at_the_end(p, size), flip, to);
}

void halves(uint32_t mask, const bf16 *p, int64_t size, bf16 *to)
{
    spread_bf16(mask, at_the_end(p, size), to);
}

void bytes(uint32_t mask, const uint8_t *p, int64_t size, int less, int8_t *to)
{
    spread_bytes(mask, at_the_end(p, size), less, to);
}
"""

_IN_LANES = """
#define KEPT(bits) \\
    int vi_kept_##bits( \\
        const int64_t *masks, const uint8_t *codes, int64_t size, const int8_t *rows, int otherwise, int flip, \\
        uint8_t *to) \\
    { \\
        const uint8_t *p = at_the_end(codes, size); \\
        vint each = vi_kept((uint64_t)*masks, p, p + size, vi_none(rows, otherwise, bits), bits); \\
        memcpy(to, &each, sizeof each); \\
        return block_bytes((uint64_t)*masks, bits); \\
    }
KEPT(2)
KEPT(4)
KEPT(8)
"""


def compiled(isa: str) -> ctypes.CDLL:
    includes = ["#include <stdint.h>", "#include <string.h>", "#include <sys/mman.h>", *simd.includes(isa)]
    source = _SOURCE if isa == "portable" else _SOURCE + _IN_LANES
    text = source % {"vocabulary": simd.definitions(isa, source)}
    return load("\n".join(includes) + text, f"kept_codes_{isa}", isa)


def spread(
    masks: list[int], runs: Array, rows: Array | None, otherwise: int, flip: int, bits: int
) -> tuple[Array, Array]:
    """The bytes of the blocks' kept codes, and the word `[64]` that they make, by the words of simd_kept.h."""
    most, stored, word = (1 << bits) - 1, [], np.zeros(64, dtype=np.int64)
    for field, mask in enumerate(masks):
        run = 0
        place = 0
        for i in range(64):
            code = (otherwise + (0 if rows is None else int(rows[i // 4]))) & most
            if mask >> i & 1:
                code = int(runs[field, i]) & most
                run |= code << place
                place += bits
            word[i] |= (code ^ flip) << bits * field
        stored.append(np.frombuffer(run.to_bytes((place + 7) // 8, "little"), dtype=np.uint8))
    return np.concatenate(stored), word.astype(np.uint8)


def mask_of(random: np.random.Generator) -> int:
    """64 bits: none, all, or each with a share."""
    share = random.choice([0.0, 0.05, 0.5, 0.95, 1.0])
    return int.from_bytes(np.packbits(random.random(64) < share).tobytes(), "little")


def pointer(array: Array | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


@pytest.mark.parametrize("isa", simd.ISAS)
def test_codes_come_to_the_places_of_their_masks(isa, monkeypatch):
    need(isa, monkeypatch)
    library, random = compiled(isa), np.random.default_rng(0)
    ways = [("spread_word", 2), ("spread_word", 4), ("spread_word", 8), ("spread_columns", 8)]
    ways += [("vi_kept", bits) for bits in (2, 4, 8) if isa != "portable"]
    for name, bits in ways:
        function: Callable[..., int] = library[f"{name}_{bits}"]
        for _ in range(RUNS):
            blocks = 1 if name == "vi_kept" else 8 // bits
            masks = [mask_of(random) for _ in range(blocks)]
            rows = random.integers(-128, 128, 16, dtype=np.int8) if random.random() < 0.5 else None
            otherwise, flip = int(random.integers(1 << bits)), int(random.integers(1 << bits))
            flip = 0 if name == "vi_kept" else flip
            stored, word = spread(masks, random.integers(256, size=(blocks, 64)), rows, otherwise, flip, bits)
            if name == "spread_columns":
                word = word.reshape(16, 4).T.ravel()
            found, held = np.zeros(64, dtype=np.uint8), np.array(masks, dtype=np.uint64)
            size = ctypes.c_int64(len(stored))
            taken = function(pointer(held), pointer(stored), size, pointer(rows), otherwise, flip, pointer(found))
            assert taken == len(stored)
            assert np.array_equal(found, word), (name, bits, masks, otherwise, flip)


@pytest.mark.parametrize("isa", simd.ISAS)
def test_words_come_to_the_rows_of_their_mask(isa, monkeypatch):
    need(isa, monkeypatch)
    library, random = compiled(isa), np.random.default_rng(1)
    for mask in [0, 1, 0x8000, 0xFFFF, 0xFF00, *random.integers(1 << 16, size=RUNS).tolist()]:
        kept = np.array([mask >> row & 1 for row in range(16)], dtype=bool)
        for name, dtype, turned in (
            ("words", np.uint32, 0x88888888),
            ("halves", np.uint16, None),
            ("bytes", np.uint8, 8),
        ):
            values = random.integers(np.iinfo(dtype).max, size=int(kept.sum()), dtype=dtype)
            want, found = np.zeros(16, dtype=dtype), np.full(16, 77, dtype=dtype)
            want[kept] = values ^ dtype(turned or 0) if name == "words" else values - dtype(turned or 0)
            options = () if turned is None else (ctypes.c_uint32(turned),)
            library[name](mask, pointer(values), ctypes.c_int64(values.nbytes), *options, pointer(found))
            assert np.array_equal(found, want), (name, hex(mask))
