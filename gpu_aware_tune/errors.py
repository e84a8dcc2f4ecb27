"""What can go wrong, and the exit code each kind of error gets on the command line."""

from __future__ import annotations

import re

MESSAGE_LENGTH = 300  # characters, of an error that quotes what comes from outside

# What changes how a terminal shows other text: control characters, but for the end of a line and
# tabs; marks of the direction of writing; halves of characters, which cannot be written at all.
_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class TuneError(Exception):
    """An error of this package; its text is one line: the value, what is allowed, the fix."""

    exit_code = 1


class UserError(TuneError):
    """The caller gave something that cannot work: a bad flag, file or model."""

    exit_code = 2


class SetupError(TuneError):
    """The machine lacks something: a compiler, a driver, a writable folder."""

    exit_code = 3


def last_line(error: Exception) -> str:
    """The line of a TVM error that says what happened, or ""; C++ frames come before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:MESSAGE_LENGTH] if lines else ""


def one_line(text: object, limit: int = MESSAGE_LENGTH) -> str:
    """The first line of a text that is not empty, control characters escaped, cut to a length."""
    lines = (line.strip() for line in str(text).splitlines())
    first = next((line for line in lines if line), type(text).__name__)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in first)
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def quoted(name: object) -> str:
    """A name from outside as messages show it: in quotes, on one line, of a bounded length."""
    return one_line(repr(name), 60)


def printable(text: str) -> str:
    """A text with everything escaped that would control a terminal; lines and tabs stay."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
