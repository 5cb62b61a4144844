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
    """Text that is not tile IR; shows the line with a caret under the fault."""

    def __init__(self, message: str, line: int, column: int, text: str) -> None:
        self.line, self.column = line, column
        super().__init__(f"line {line}, column {column}: {message}\n  {text}\n  {' ' * (column - 1)}^")
