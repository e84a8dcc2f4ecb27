"""Curves as `tune profile --save` writes them, checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_aware_tune.errors import UserError

_REMEDY = "write it with tune profile --save"


@dataclass(frozen=True)
class MeasuredPoint:
    """A share and batch size; see `profiling.curves.Point`."""

    units: int
    batch: int
    latency_ms: float
    p90_ms: float


@dataclass(frozen=True)
class MeasuredCurve:
    """A model's latency over units and batch sizes; see `profiling.curves.Curve`."""

    model: str
    device: str
    unit: str
    units_total: int
    points: tuple[MeasuredPoint, ...]

    @property
    def device_name(self) -> str:
        """The device's name for people: "llvm/AMD EPYC/znver4" is "AMD EPYC"."""
        parts = self.device.split("/")
        return "/".join(parts[1:-1]) if len(parts) > 2 else self.device


def read_curve(path: Path) -> MeasuredCurve:
    """Read a curve from a JSON file.

    Raises:
        UserError: there is none, or it is damaged, with what is wrong.
    """
    try:
        facts = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read curve {path} ({error.strerror}): {_REMEDY}") from error
    except ValueError as error:
        raise UserError(f"curve {path} is no JSON ({error}): {_REMEDY}") from error
    return curve_from_dict(facts, str(path))


def curve_from_dict(facts: Any, source: str) -> MeasuredCurve:
    """Check what a JSON file holds.

    Args:
        facts: the parsed file.
        source: its name, for errors.

    Raises:
        UserError: something is missing or cannot be, with what.
    """
    if not isinstance(facts, dict):
        raise UserError(f"curve {source} is no JSON object: {_REMEDY}")
    model, device = (_text(facts, name, source) for name in ("model", "device"))
    unit = facts.get("unit")
    if unit not in ("SM", "core"):
        raise UserError(f"curve {source}: unit {unit!r} is not allowed; allowed: SM, core")
    total = _whole(facts, "units_total", source)
    entries = facts.get("points")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"curve {source} has no points: {_REMEDY}")
    points = tuple(_point(entry, number, source) for number, entry in enumerate(entries))
    for number, point in enumerate(points):
        if point.units > total:
            raise UserError(
                f"curve {source}, point {number}: {point.units} units of a device with {total}"
            )
    return MeasuredCurve(model, device, unit, total, points)


def _point(entry: Any, number: int, source: str) -> MeasuredPoint:
    where = f"{source}, point {number}"
    if not isinstance(entry, dict):
        raise UserError(f"curve {where} is no JSON object: {_REMEDY}")
    latency_ms = _positive(entry, "latency_ms", where)
    p90_ms = _positive(entry, "p90_ms", where) if "p90_ms" in entry else latency_ms
    units, batch = _whole(entry, "units", where), _whole(entry, "batch", where)
    return MeasuredPoint(units, batch, latency_ms, p90_ms)


def _text(facts: Mapping[str, Any], name: str, where: str) -> str:
    value = facts.get(name)
    if not isinstance(value, str) or not value:
        raise UserError(f"curve {where}: {name} {value!r} is no name: {_REMEDY}")
    return value


def _whole(facts: Mapping[str, Any], name: str, where: str) -> int:
    value = facts.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"curve {where}: {name} {value!r} is no whole number from 1 on: {_REMEDY}")
    return value


def _positive(facts: Mapping[str, Any], name: str, where: str) -> float:
    value = facts.get(name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (math.isfinite(value) and value > 0):  # type: ignore[arg-type,operator]
        raise UserError(f"curve {where}: {name} {value!r} is no number above 0: {_REMEDY}")
    return float(value)  # type: ignore[arg-type]
