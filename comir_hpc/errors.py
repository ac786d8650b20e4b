"""Errors that speak to a person.

Each is also the builtin that a caller would expect, so library users may catch either. A message says what
was found, what was expected and what to do, with the path and the numbers.
"""


def printable(text: str) -> str:
    """Return the text with every control character, and every other that prints nothing, as an escape.

    What a damaged file holds must not end a line or steer a terminal.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )


class ComirError(Exception):
    """Base of every refusal that comir-hpc makes knowingly; the command line prints it as one red line."""

    def __str__(self) -> str:
        # What a library says in several lines becomes one.
        return printable(" ".join(super().__str__().splitlines()))


class ConfigError(ComirError, ValueError):
    """Settings that cannot work: an unknown key, a combination that contradicts itself."""


class VolumeError(ComirError, ValueError):
    """A volume that cannot be read, written or trusted."""


class CheckpointError(ComirError, RuntimeError):
    """A training checkpoint that is missing, torn or made by another architecture."""


class RegistrationError(ComirError, RuntimeError):
    """A registration that could not be carried out (a poor result is a verdict, not an error)."""


class HeldError(ComirError, RuntimeError):
    """Another process is writing to the same place, and two writers would spoil each other's work."""


class UnsavedResult(RegistrationError):
    """A registration that is done, but whose result could not be written.

    Attributes
    ----------
    content : str
        What result.json would hold. The command line prints it, so that the search is not lost.
    """

    def __init__(self, message: str, content: str) -> None:
        super().__init__(message)
        self.content = content


class StopRequested(ComirError, InterruptedError):
    """The scheduler asked us to stop; the state is saved and the same command resumes it (exit code 85)."""
