"""CSV for spreadsheets, which run a cell that begins as a formula does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpu_aware_tune.errors import printable

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def csv_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose texts are shown as they are: an apostrophe stands before what would be a formula.

    Numbers stay numbers, negative ones too.
    """
    return {name: _cell(value) for name, value in values.items()}


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return printable(f"'{value}" if value.startswith(_FORMULA) else value)
