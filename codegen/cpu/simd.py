"""The vector vocabulary: which primitives there are, and the text of those that a kernel uses.

`simd_avx512.h`, `simd_avx2.h` and `simd_portable.h` implement the same names; `simd_common.h` holds
scalars, and what builds on those names, `simd_kept.h` codes of which some are kept, `simd_digits.h` products of codes
with x in digits, on names of `simd_digits_avx512.h` or `simd_digits_avx2.h`. `simd_vnni.h`, `simd_pairs.h` with
`simd_dots.h` or `simd_amx.h`, `simd_octets.h` and `simd_transposed.h` add products of their own to AVX-512.
`simd_vnni.h`, `simd_dots.h`, `simd_kept_avx2.h`, `simd_kept_avx512.h`, `simd_decode.h`, `simd_decode_avx2.h` and
`simd_vbmi2.h` have better forms of some names. An emitted file holds only the definitions it needs.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

ISAS = ("amx", "avx512bf16", "vnni", "avx512", "avx2", "portable")
"""Instruction sets, the best first: each of the first four has all of those up to `avx512`."""
_DIGITS = ("digits", "digits_avx512")
_HEADERS = {
    "amx": (
        "avx512",
        "common",
        "kept",
        "kept_avx512",
        "decode",
        *_DIGITS,
        "vnni",
        "pairs",
        "amx",
        "octets",
        "transposed",
        "vbmi2",
    ),
    "avx512bf16": ("avx512", "common", "kept", "kept_avx512", "decode", *_DIGITS, "vnni", "pairs", "vbmi2", "dots"),
    "vnni": ("avx512", "common", "kept", "kept_avx2", "kept_avx512", "decode", *_DIGITS, "vnni"),
    "avx512": ("avx512", "common", "kept", "kept_avx2", "kept_avx512", "decode", *_DIGITS),
    "avx2": ("avx2", "common", "kept", "kept_avx2", "decode_avx2", "digits", "digits_avx2"),
    "portable": ("portable", "common", "kept"),
}
_NAME = re.compile(
    r"(?:typedef .*?|^\} |^(?:static inline|static|INLINE) (?:const )?\w+ \*?)(\w+)(?=;$|\(| __attribute__)",
    re.MULTILINE,
)
_WORD = re.compile(r"[A-Za-z_]\w*")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True)
class Definition:
    """One typedef or function of a header, with the comment above it."""

    name: str
    text: str
    uses: tuple[str, ...]


def defined(header: str) -> dict[str, str]:
    """The text of every definition of `simd_<header>.h`, by name."""
    blocks = _blocks(files(__package__).joinpath(f"simd_{header}.h").read_text())
    return {match.group(1): block for block in blocks if (match := _NAME.search(block))}


@cache
def vocabulary(isa: str) -> dict[str, Definition]:
    """Every definition for an instruction set, by name, in the order of the headers."""
    blocks: dict[str, str] = {}
    for header in _HEADERS[isa]:
        blocks |= defined(header)
    words = {name: dict.fromkeys(_WORD.findall(_COMMENT.sub("", text))) for name, text in blocks.items()}
    return {
        name: Definition(name, text, tuple(w for w in words[name] if w in blocks and w != name))
        for name, text in blocks.items()
    }


def includes(isa: str) -> tuple[str, ...]:
    """The `#include` lines that the header of an instruction set needs."""
    text = files(__package__).joinpath(f"simd_{_HEADERS[isa][0]}.h").read_text()
    return tuple(line for line in text.splitlines() if line.startswith("#include"))


def definitions(isa: str, text: str) -> str:
    """C text of all that `text` uses of the vocabulary, each definition after those it uses."""
    known = vocabulary(isa)
    placed: dict[str, str] = {}

    def place(name: str) -> None:
        if name not in placed:
            for used in known[name].uses:
                place(used)
            placed[name] = known[name].text

    used = set(_WORD.findall(text))
    for name in known:
        if name in used:
            place(name)
    return "\n\n".join(placed.values())


def _blocks(text: str) -> list[str]:
    """Top-level chunks of a header: what stands between blank lines, bodies kept whole."""
    blocks: list[str] = []
    depth = 0
    for chunk in text.split("\n\n"):
        if depth:
            blocks[-1] += "\n\n" + chunk
        else:
            blocks.append(chunk)
        depth += chunk.count("{") - chunk.count("}")
    return [block.strip("\n") for block in blocks]
