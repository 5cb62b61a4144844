"""Text that every machine with Python has: sources of its standard library, pinned by file list and hash.

`corpus.txt` lists files that Python 3.11 and 3.12 share (tests, tables of encodings, and the documentation topics left
out). Which split a file belongs to follows from its name alone, so no file is in two of them on any machine.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Split = Literal["train", "calibration", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "held-out")
SHARES = {"held-out": 7, "calibration": 14}
"""Of 100 values of a name's hash, those below the first are held out, below the second for calibration."""
FILES = tuple((Path(__file__).parent / "corpus.txt").read_text().split())
FRESH = ("idlelib", "lib2to3", "tkinter")
"""Packages of the standard library that `corpus.txt` leaves out: nothing was trained, calibrated or chosen on them."""
KNOWN = {"cae1fb3fc6cb948c": "3.11.7"}
"""Corpora of figures on record, by hash: the Python that they come with."""


@dataclass(frozen=True)
class Corpus:
    """The files of one Python, by split.

    Attributes:
        root: folder of the standard library.
        missing: files of the list that are not there.
        hash: SHA-256 of names and contents, first 16 digits.
    """

    root: Path
    files: tuple[str, ...] = FILES

    @cached_property
    def contents(self) -> dict[str, bytes]:
        paths = {name: self.root / name for name in self.files}
        return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}

    @property
    def missing(self) -> list[str]:
        return [name for name in self.files if name not in self.contents]

    @cached_property
    def hash(self) -> str:
        digest = hashlib.sha256()
        for name, content in self.contents.items():
            digest.update(f"{name} {len(content)}\n".encode() + content)
        return digest.hexdigest()[:16]

    def names(self, split: Split | None = None) -> list[str]:
        """The files of a split, or all, in order of the list."""
        return [name for name in self.contents if split in (None, split_of(name))]

    def text(self, split: Split | None = None) -> Tensor:
        """The bytes of a split, or of all, a file after another: uint8 `[bytes]`."""
        joined = bytearray(b"".join(self.contents[name] for name in self.names(split)))
        return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)

    def docstrings(self, split: Split | None = None) -> Iterator[str]:
        """Docstrings of modules, classes and functions of a split, or of all, in source order."""
        for name in self.names(split):
            for node in ast.walk(ast.parse(self.contents[name])):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from filter(None, [ast.get_docstring(node)])

    def __str__(self) -> str:
        """One sentence: how much text, which, and whether it is a corpus on record."""
        sizes = ", ".join(f"{split} {len(self.text(split)) / 1e6:.2f} MB" for split in SPLITS)
        known = KNOWN.get(self.hash)
        whose = f"that of Python {known}" if known else "not one on record: figures differ a little from those there"
        gone = f"; {len(self.missing)} files of the list are missing" if self.missing else ""
        return f"{len(self.contents)} files of the standard library ({sizes}), hash {self.hash}, {whose}{gone}"


def standard_library() -> Corpus:
    """The corpus of the Python that runs."""
    return Corpus(Path(sysconfig.get_paths()["stdlib"]))


def fresh_text() -> Corpus:
    """The packages of `FRESH` without their tests."""
    root = standard_library().root
    files = sorted(path.relative_to(root) for package in FRESH for path in (root / package).rglob("*.py"))
    return Corpus(root, tuple(map(str, (file for file in files if not {"tests", "idle_test"} & set(file.parts)))))


def split_of(name: str) -> Split:
    """Which split a file is in."""
    draw = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
    return next((split for split in SPLITS[:0:-1] if draw < SHARES[split]), "train")


def windows(text: Tensor, count: int, length: int, seed: int | None = None) -> Tensor:
    """Windows of a text as int64 `[count, length]`.

    Without a seed they are spread evenly (and do not overlap where the text is long enough); with one, drawn at random.
    """
    last = len(text) - length
    if seed is None:
        starts = torch.linspace(0, last, count).long()
    else:
        starts = torch.randint(last + 1, (count,), generator=torch.Generator().manual_seed(seed))
    return text[starts[:, None] + torch.arange(length)].long()


def sentences_in(texts: Iterator[str]) -> list[str]:
    """Sentences of 40 to 200 characters that read as English, without repeats."""
    found: dict[str, None] = {}
    for text in texts:
        spaced = re.sub(r"\s+", " ", text)
        found.update(dict.fromkeys(re.findall(r"(?:^|(?<=[.!?] ))[A-Z][a-z][^.:*|`\\<>=\[\]{}]{38,198}\.", spaced)))
    return list(found)
