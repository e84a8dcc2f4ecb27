"""A fleet: the device, the models with their demands and curves, and how lanes disturb each other.

It comes from a `fleet.toml`, or from the command line's folders and lists.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.planning.curve import MARGIN, Batching
from gpu_aware_tune.planning.curve_file import MeasuredCurve, read_curve
from gpu_aware_tune.planning.demand import Demand
from gpu_aware_tune.planning.device import PlanDevice, default_step, parse_device
from gpu_aware_tune.planning.interference import Interference
from gpu_aware_tune.planning.lanes import Workload
from gpu_aware_tune.planning.planner import workload
from gpu_aware_tune.planning.schedule import PlanObjective

MANIFEST = "manifest.json"  # of a tuned model's folder
_TABLES = {"device", "models", "interference", "margin", "batching", "objective"}
_MODEL_KEYS = {"name", "curve", "library", "rate", "slo", "percentile", "weight", "cv"}
_DEVICE_KEYS = {"name", "units", "unit", "step"}


@dataclass(frozen=True)
class Fleet:
    """Everything that is planned with.

    Args:
        device: what to plan for.
        demands: one for each model.
        curves: one for each model.
        interference: how much lanes slow each other down.
        margin: the planning latency is so many times the measured p90.
        batching: what a batch size that was not measured takes.
        objective: what to make the most of.
    """

    device: PlanDevice
    demands: tuple[Demand, ...]
    curves: tuple[MeasuredCurve, ...]
    interference: Interference = field(default_factory=Interference)
    margin: float = MARGIN
    batching: Batching = Batching.AFFINE
    objective: PlanObjective = PlanObjective.HEADROOM

    def workload(self) -> Workload:
        """What the planner works on."""
        return workload(
            self.device, self.demands, self.curves, self.margin, self.batching, self.interference
        )


def read_fleet(path: Path, device: str | None = None) -> Fleet:
    """Read a `fleet.toml`.

    Args:
        path: the file; curves and libraries in it are looked for beside it.
        device: as `--device`, instead of the one in the file.

    Raises:
        UserError: something in it cannot be used, with what and what is allowed.
    """
    facts = read_toml(path)
    check_keys(facts, _TABLES, str(path))
    entries = facts.get("models")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} has no [[models]]: give one for each model, with name, rate, slo")
    demands, curves = [], []
    for number, entry in enumerate(entries, 1):
        demand, curve = _model(entry, f"{path}, model {number}", path.parent)
        demands.append(demand)
        curves.append(curve)
    return Fleet(
        device=choose_device(device, curves, facts.get("device"), str(path)),
        demands=tuple(demands),
        curves=tuple(curves),
        interference=_interference(facts.get("interference", {}), str(path)),
        margin=read_number(facts, "margin", str(path), MARGIN),
        batching=_batching(facts.get("batching", Batching.AFFINE), str(path)),
        objective=_objective(facts.get("objective", PlanObjective.HEADROOM), str(path)),
    )


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UserError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no TOML: {error}") from error


def find_curve(source: Path, folder: Path) -> MeasuredCurve:
    """The curve of a tuned model's folder, or in a JSON file.

    Args:
        source: a folder that `tune MODEL` wrote, or a curve.
        folder: where the curves of folders are.

    Raises:
        UserError: there is none, with how to make it.
    """
    if source.is_file() and source.suffix == ".json":
        return read_curve(source)
    name = model_name(source)
    for candidate in (folder / f"{name}.json", folder / f"{source.stem}.json"):
        if candidate.is_file():
            return read_curve(candidate)
    raise UserError(
        f"there is no curve of {source} in {folder}: run `tune profile {source} --save {folder}`"
    )


def model_name(folder: Path) -> str:
    """The name of the model in a folder that `tune MODEL` wrote.

    Raises:
        UserError: it is no such folder.
    """
    try:
        return str(json.loads((folder / MANIFEST).read_text())["model"]["name"])
    except OSError:
        raise UserError(
            f"{folder} is no tuned model and no curve: give a folder that `tune MODEL` wrote, a"
            " curve that `tune profile --save` wrote, or a fleet.toml"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged ({error}): tune again") from error


def choose_device(
    text: str | None, curves: Sequence[MeasuredCurve], table: Any = None, source: str = "--device"
) -> PlanDevice:
    """The device to plan for: the one told, else the one that the curves were measured on.

    Raises:
        UserError: a curve is of another device.
    """
    if text is not None:
        device = parse_device(text)
    elif table is not None:
        device = _device(table, source)
    else:
        first = curves[0]
        step = default_step(first.unit, first.units_total)
        device = PlanDevice(first.device_name, first.units_total, first.unit, step)
    for curve in curves:
        known = device.name.lower() in curve.device.lower()
        if not known or (curve.unit, curve.units_total) != (device.unit, device.units):
            raise UserError(
                f"the curve of {curve.model} was measured on {curve.device_name} with"
                f" {curve.units_total} {curve.unit}s, the plan is for {device.name} with"
                f" {device.count(device.units)}: profile it there, or plan for that device"
            )
    return device


def parse_slo(text: str) -> float:
    """Read "25ms" or "0.1s" as seconds.

    Raises:
        UserError: it is something else.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(ms|s)\s*", text)
    if found is None or not float(found[1]) > 0:
        raise UserError(f"slo {text!r} is no latency above 0: give a form such as 25ms or 0.1s")
    return float(found[1]) * (1e-3 if found[2] == "ms" else 1.0)


def split_list(name: str, text: str, count: int) -> list[str]:
    """Read a comma-separated list of one value for each model, or of one for all.

    Raises:
        UserError: it has another number of values.
    """
    parts = text.split(",")
    if len(parts) == 1:
        return parts * count
    if len(parts) != count:
        models = f"{count} model{'' if count == 1 else 's'}"
        raise UserError(
            f"--{name} {text}: {len(parts)} values for {models}; give one for each, or one for all"
        )
    return parts


def _model(entry: Any, where: str, beside: Path) -> tuple[Demand, MeasuredCurve]:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is no table: write [[models]] above its name, rate and slo")
    check_keys(entry, _MODEL_KEYS, where)
    if ("curve" in entry) == ("library" in entry):
        raise UserError(f"{where}: give either curve = 'FILE.json' or library = 'FOLDER'")
    source = beside / str(entry.get("curve") or entry.get("library"))
    curve = find_curve(source, beside / "curves") if "library" in entry else read_curve(source)
    name = entry.get("name", curve.model)
    slo = entry.get("slo")
    if "rate" not in entry or not isinstance(slo, str):
        raise UserError(f"{where}: rate (requests a second) and slo (such as '50ms') are needed")
    if name != curve.model:  # two deployments of one model
        curve = MeasuredCurve(name, curve.device, curve.unit, curve.units_total, curve.points)
    demand = Demand(
        model=str(name),
        rate_per_s=read_number(entry, "rate", where, 0.0),
        slo_s=parse_slo(slo),
        percentile=read_number(entry, "percentile", where, 99.0),
        weight=read_number(entry, "weight", where, 1.0),
        cv=read_number(entry, "cv", where, 0.0),
    )
    return demand, curve


def _device(table: Any, where: str) -> PlanDevice:
    if not isinstance(table, dict):
        raise UserError(f"{where}: device is no table: write [device] with name and units")
    check_keys(table, _DEVICE_KEYS, f"{where}, device")
    unit = _choice(table.get("unit", "SM"), ("SM", "core"), "unit", where)
    units = int(read_number(table, "units", f"{where}, device", 0.0))
    step = int(read_number(table, "step", f"{where}, device", default_step(unit, units)))
    return PlanDevice(str(table.get("name", "")), units, unit, step)


def _interference(table: Any, where: str) -> Interference:
    if not isinstance(table, dict):
        raise UserError(f"{where}: interference is no table: write [interference]")
    pairs = {}
    for key in set(table) - {"default"}:
        names = [part.strip() for part in key.split(",")]
        if len(names) != 2:
            raise UserError(f"{where}: interference {key!r} names no two models: write 'a,b' = 1.2")
        pairs[names[0], names[1]] = read_number(table, key, where, 1.0)
    return Interference(read_number(table, "default", where, 1.0), pairs)


def check_keys(table: Mapping[str, Any], allowed: set[str], where: str) -> None:
    """Refuse a table of a file that has unknown keys.

    Raises:
        UserError: with them, and those that are allowed.
    """
    if unknown := sorted(set(table) - allowed):
        raise UserError(
            f"{where}: {', '.join(unknown)} is not known; allowed: {', '.join(sorted(allowed))}"
        )


def read_number(table: Mapping[str, Any], name: str, where: str, default: float) -> float:
    """A number of a table.

    Raises:
        UserError: it is something else.
    """
    value = table.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {name} {value!r} is no number")
    return float(value)


def _choice(value: Any, allowed: Sequence[str], name: str, where: str) -> str:
    if value not in allowed:
        raise UserError(f"{where}: {name} {value!r} is not known; allowed: {', '.join(allowed)}")
    return str(value)


def _batching(value: Any, where: str) -> Batching:
    return Batching(_choice(value, list(Batching), "batching", where))


def _objective(value: Any, where: str) -> PlanObjective:
    return PlanObjective(_choice(value, list(PlanObjective), "objective", where))
