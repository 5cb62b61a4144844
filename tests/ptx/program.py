"""PTX text of one kernel -> instructions, labels and parameters.

Scopes of inline assembly are flattened: a name that two of them declare is one register here, which only matters to
code that reads a register before it writes it.
"""

import re
from dataclasses import dataclass

Operand = str | tuple[str, ...]
"""A register, number or address as written; the parts of a `{...}` vector."""


class EmulationError(Exception):
    """The kernel did something that no kernel may do, or that the emulator does not know."""


@dataclass(frozen=True)
class Instruction:
    """One statement.

    Attributes:
        opcode: parts between dots, as `("mul", "wide", "s32")`.
        operands: as written.
        guard: predicate register that has to be true, or false where `negated`; None: always runs.
    """

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str | None
    negated: bool
    text: str


@dataclass(frozen=True)
class Program:
    """A kernel.

    Attributes:
        labels: index of the instruction that follows each label.
        parameters: names, in order.
        threads: of a program, from `.reqntid`.
    """

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    parameters: tuple[str, ...]
    threads: int


def parse(ptx: str) -> Program:
    """The one kernel of a PTX module.

    Raises:
        EmulationError: there is none, or its text cannot be read.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{", text, re.S)
    if head is None:
        raise EmulationError("PTX: expected an .entry, found none")
    parameters = tuple(re.findall(r"(\w+)\s*(?:,|$)", head[2].strip()))
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", head[3])
    if threads is None:
        raise EmulationError(f"PTX of {head[1]}: expected .reqntid, found none")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in _statements(_braced(text, head.end())):
        while label := re.match(r"(\$?\w+):\s*", statement):
            labels[label[1]] = len(instructions)
            statement = statement[label.end() :]
        if statement and not statement.startswith("."):
            instructions.append(_instruction(statement))
    return Program(head[1], tuple(instructions), labels, parameters, int(threads[1]))


def _braced(text: str, begin: int) -> str:
    """From `begin`, just inside a brace, to the brace that closes it."""
    depth = 1
    for at in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin:at]
    raise EmulationError("PTX: expected a closing brace, found the end of the text")


def _statements(body: str) -> list[str]:
    """Statements without their semicolons, scopes and line notes; labels stand before what they mark."""
    body = re.sub(r"^\s*\.loc\b[^\n]*$", "", body, flags=re.M)
    found = []
    for piece in body.split(";"):
        statement = piece.strip()
        while statement[:1] in ("{", "}") and statement:
            statement = statement[1:].strip()
        found.append(_without_scope(" ".join(statement.split())))
    return [statement for statement in found if statement]


def _without_scope(statement: str) -> str:
    """`$label: { add ...` -> `$label: add ...`."""
    return re.sub(r"^((?:\$?\w+:\s*)+)[{}\s]+", r"\1", statement)


def _instruction(statement: str) -> Instruction:
    match = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement)
    if match is None:
        raise EmulationError(f"PTX: expected an instruction, found {statement!r}")
    opcode = tuple(match[3].split("."))
    return Instruction(opcode, _operands(match[4]), match[2], match[1] == "!", statement)


def _operands(text: str) -> tuple[Operand, ...]:
    """Split at commas outside of brackets and braces."""
    pieces, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            pieces.append(current.strip())
            current = ""
        else:
            current += character
    pieces.append(current.strip())
    return tuple(_operand(piece) for piece in pieces if piece)


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text.strip("{}").split(","))
    return text
