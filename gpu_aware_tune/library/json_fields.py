"""Values of a JSON document, taken with their types; an error names the field and what is wrong."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterator
from typing import Any


class FieldError(ValueError):
    """A field is missing or wrong; the text names it, in one line."""


def parse_object(text: bytes) -> Fields:
    """Parse a JSON object.

    Raises:
        FieldError: it is no JSON, or no object, or nested too deeply, or names a member twice.
    """
    try:
        value = json.loads(
            text.decode(), object_pairs_hook=_without_repeats, parse_constant=_no_constant
        )
    except RecursionError:
        raise FieldError("it is nested too deeply") from None
    except ValueError as error:  # not UTF-8, no JSON, a number of thousands of digits
        raise FieldError(str(error)) from None
    return Fields(value)


class Fields:
    """An object of a JSON document.

    Args:
        value: the object.
        path: where it is, such as "libraries[0]"; "" for the document itself.

    Raises:
        FieldError: `value` is no object.
    """

    def __init__(self, value: Any, path: str = "") -> None:
        if not isinstance(value, dict):
            raise FieldError(f"{path or 'it'} is {_shown(value)}, not an object")
        self.value: dict[str, Any] = value
        self._path = path

    def text(self, name: str) -> str:
        """A text, whatever is in it."""
        return self._typed(name, str, "a text")

    def line(self, name: str) -> str:
        """A text that can be shown as it is: one line, without control characters, not empty."""
        value = self.text(name)
        if not value or not value.isprintable():
            raise self.wrong(name, "one line of printable text")
        return value

    def whole(self, name: str, low: int, high: int) -> int:
        """A whole number."""
        value = self._value(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(name, "a whole number")
        if not low <= value <= high:
            raise self.wrong(name, f"from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        """A finite number."""
        value = self._value(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(name, "a number")
        if not low <= value <= high:  # not so for NaN either
            raise self.wrong(name, f"from {low:g} to {high:g}")
        return float(value)

    def optional(self, name: str, take: Callable[[str], Any]) -> Any:
        """What `take` gives for a field; None where it is missing or null."""
        return None if self.value.get(name) is None else take(name)

    def object(self, name: str) -> Fields:
        """An object within."""
        self._value(name)
        return Fields(self.value[name], self._at(name))

    def objects(self, name: str) -> Iterator[Fields]:
        """The objects of a list."""
        values = self._typed(name, list, "a list")
        for number, value in enumerate(values):
            yield Fields(value, f"{self._at(name)}[{number}]")

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        values = self._typed(name, list, "a list")
        if not all(isinstance(value, str) for value in values):
            raise self.wrong(name, "a list of texts")
        return tuple(values)

    def wholes(self, name: str, low: int, high: int) -> tuple[int, ...]:
        """A list of whole numbers."""
        values = self._typed(name, list, "a list")
        for number, value in enumerate(values):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not low <= value <= high:
                where = f"{self._at(name)}[{number}]"
                raise FieldError(
                    f"{where} is {_shown(value)}, not a whole number from {low} to {high}"
                )
        return tuple(values)

    def lines(self, name: str) -> dict[str, str]:
        """An object whose values are all printable lines."""
        inner = self.object(name)
        return {key: inner.line(key) for key in inner.value}

    def wrong(self, name: str, wanted: str) -> FieldError:
        """The error for a field that is there and is not what is wanted."""
        return FieldError(f"{self._at(name)} is {_shown(self.value[name])}, not {wanted}")

    def _value(self, name: str) -> Any:
        if name not in self.value:
            raise FieldError(f"{self._at(name)} is missing")
        return self.value[name]

    def _typed(self, name: str, kind: type, wanted: str) -> Any:
        value = self._value(name)
        if not isinstance(value, kind):
            raise self.wrong(name, wanted)
        return value

    def _at(self, name: str) -> str:
        shown = name if name.isidentifier() else _shown(name)
        return f"{self._path}.{shown}" if self._path else shown


def finite(value: Any) -> Any:
    """A JSON value with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FieldError(f"{_shown(twice)} is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise FieldError(f"{name} is no number of JSON")
