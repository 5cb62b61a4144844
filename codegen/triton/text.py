"""Lines of emitted Python: bodies, argument lists, decorated functions."""

import textwrap


def body(lines: list[str]) -> str:
    """Lines of a function's body, indented."""
    return textwrap.indent("\n".join(lines), "    ", lambda line: bool(line.strip()))


def wrap(arguments: list[str], width: int = 100) -> list[str]:
    """Arguments as lines of at most `width`, each with its comma."""
    lines = [""]
    for argument in arguments:
        if len(lines[-1]) + len(argument) + 2 > width:
            lines.append("")
        lines[-1] += f"{argument}, "
    return [line.rstrip() for line in lines]


def kernel(name: str, arguments: list[str], lines: list[str], jit: str = "triton.jit") -> str:
    """A kernel; numbers that change from call to call are not specialised."""
    listed = "".join(f"    {line}\n" for line in wrap(arguments))
    unspecialized = [n for n in ("N", "RANK", "first", "top") if n in arguments]
    decorator = f"@{jit}(do_not_specialize={unspecialized!r})".replace("'", '"')
    return f"{decorator}\ndef {name}(\n{listed}):\n{body(lines)}"


def function(name: str, arguments: str, lines: list[str], jit: str = "triton.jit") -> str:
    """A device function."""
    head = f"def {name}({arguments}):"
    if len(head) > 120:
        head = f"def {name}(\n" + "".join(f"    {line}\n" for line in wrap(arguments.split(", "))) + "):"
    return f"@{jit}\n{head}\n{body(lines)}"
