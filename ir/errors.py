"""Every error a user can meet, as kinds of one class.

A message is one sentence: where, what was expected, what was found, the way out.
"""


class StoiccError(Exception):
    """Base of all errors that stoicc raises on purpose."""


class InputError(StoiccError, ValueError):
    """A weight, an input or an option that cannot be used as given."""


class FormatError(StoiccError, ValueError):
    """A tile does not fit a format, or a format is unknown or breaks its contract."""


class VerifyError(StoiccError):
    """An invariant of the tile IR or of a schedule does not hold."""


class PassError(StoiccError, ValueError):
    """A pass or a pipeline is unknown, misspelt or out of order."""


class CodegenError(StoiccError, RuntimeError):
    """A backend cannot emit, build or run an executor."""


class ParseError(StoiccError, ValueError):
    """Text that is not tile IR; shows the line, or 160 characters of it, with a caret under the fault."""

    def __init__(self, message: str, line: int, column: int, text: str) -> None:
        self.line, self.column = line, column
        start = max(0, min(column - _SHOWN // 2, len(text) - _SHOWN))
        shown = "..." * (start > 0) + text[start : start + _SHOWN] + "..." * (start + _SHOWN < len(text))
        caret = " " * (column - 1 - start + 3 * (start > 0)) + "^"
        super().__init__(f"line {line}, column {column}: {message}\n  {shown}\n  {caret}")


_SHOWN = 160
"""The most characters of a line that a ParseError shows."""


def brief(text: str, most: int = 160) -> str:
    """A text of a user's for a message: on one line, and its middle left out where it is long."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 4 :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
