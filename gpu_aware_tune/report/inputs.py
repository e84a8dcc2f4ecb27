"""What a report is made from besides the records: a run, a library's manifest, JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.library.manifest import Manifest, read_manifest
from gpu_aware_tune.records.store import Run, Store
from gpu_aware_tune.report.history import TaskInfo, task_infos


@dataclass(frozen=True)
class ShareLatency:
    """One point of a profile: the kernels tuned for `tuned_at` units, run on `units`."""

    units: int
    tuned_at: int
    percent: float | None
    latency_ms: float
    p10_ms: float | None
    p90_ms: float | None
    throughput_per_s: float | None
    efficacy: float | None
    energy_j: float | None


@dataclass(frozen=True)
class Profile:
    """Latency over share at one batch size, fewest units first.

    `knee` is the units beyond which more hardly help; `unit` is what they are: "core" or "SM".
    """

    model: str
    unit: str
    batch: int
    points: tuple[ShareLatency, ...]
    knee: int | None

    @property
    def label(self) -> str:
        """Which kernels ran."""
        tuned = sorted({point.tuned_at for point in self.points})
        one = f"tuned at {tuned[0]} {self.unit}{'' if tuned[0] == 1 else 's'}"
        text = one if len(tuned) == 1 else "tuned at each share"
        return text if self.batch == 1 else f"{text}, batch {self.batch}"


@dataclass(frozen=True)
class Stock:
    """The same model tuned by TVM's own tuner.

    `points` are (seconds, latency in seconds); `tasks` are its kernels' seconds by name where the
    file has them, and then the curve is about these alone.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    tasks: Mapping[str, float] = field(default_factory=dict)


def find_run(store: Store, run_id: int | None = None, manifest: Manifest | None = None) -> Run:
    """Return the run asked for: by its number, else the latest, of the library's model if given.

    Raises:
        UserError: there is none.
    """
    runs = store.runs()
    if not runs:
        raise UserError(
            f"{store.path} holds no run; tune a model first or give another folder with --db"
        )
    if run_id is not None:
        found = [run for run in runs if run.id == run_id]
        if not found:
            raise UserError(f"--run {run_id} is not in {store.path}: it has {_numbers(runs)}")
        return found[0]
    if manifest is None:
        return runs[-1]
    same = [run for run in runs if _is_of(run, manifest)]
    if not same:
        raise UserError(
            f"{store.path} has no run of {manifest.model.name}: it has {_numbers(runs)};"
            " give one with --run, or another folder with --db"
        )
    return same[-1]


def find_tasks(store: Store, run: Run, manifest: Manifest | None = None) -> list[TaskInfo]:
    """Return the tasks of a run's model with their weights, from wherever they are written.

    That is the run's row, else a manifest of the model, else the row of another run of it.
    """
    infos = task_infos(run) or _manifest_tasks(manifest or _manifest_of(run))
    same = (one for one in reversed(store.runs()) if _model_hash(one) == _model_hash(run))
    return infos or next(filter(None, map(task_infos, same)), [])


def _manifest_of(run: Run) -> Manifest | None:
    """Return the manifest of the library that a run wrote, where that folder is still there."""
    folder = run.settings.get("output") or f"{run.machine.get('model')}.tuned"
    try:
        manifest = read_manifest(Path(folder))
    except UserError:
        return None
    return manifest if _is_of(run, manifest) else None


def _manifest_tasks(manifest: Manifest | None) -> list[TaskInfo]:
    """Return the tasks that a manifest names, each once."""
    tasks = manifest.tasks if manifest is not None else ()
    return list({task.hash: TaskInfo(task.hash, task.name, task.weight) for task in tasks}.values())


def read_profiles(path: Path) -> list[Profile]:
    """Read the curves of `tune profile --json`, one for each batch size.

    Raises:
        UserError: the file is no such profile.
    """
    whole = read_json(path)
    groups: dict[int, list[ShareLatency]] = {}
    try:
        for point in whole["points"]:
            groups.setdefault(int(point.get("batch", 1)), []).append(_share_latency(point))
        knees = {int(batch): int(units) for batch, units in whole.get("knees", {}).items()}
        model, unit = str(whole.get("model", "")), str(whole.get("unit", "unit"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"--profile {path} is no profile ({type(error).__name__}: {error});"
            " write one with `tune profile LIB --json`"
        ) from error
    if not groups:
        raise UserError(f"--profile {path} has no points; write one with `tune profile LIB --json`")
    return [
        Profile(model, unit, batch, tuple(sorted(points, key=lambda p: p.units)), knees.get(batch))
        for batch, points in sorted(groups.items())
    ]


def read_stock(path: Path, model: str) -> list[Stock]:
    """Read curves of TVM's own tuner.

    Either `{"stock": [[seconds, latency_s], ...]}`, or the results of a comparison: "runs", of
    which those count whose "cell" has the side "stock" and a model that `model` contains.

    Raises:
        UserError: the file has no such curve.
    """
    whole = read_json(path)
    try:
        if "stock" in whole:
            found = [Stock("stock TVM", _pairs(whole["stock"]))]
        else:
            found = _stock_runs(whole["runs"], model)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"--stock {path} is no curve ({type(error).__name__}: {error});"
            ' give {"stock": [[seconds, latency_s], ...]}'
        ) from error
    found = [stock for stock in found if stock.points]
    if not found:
        raise UserError(
            f"--stock {path} has no stock curve of {model};"
            ' give {"stock": [[seconds, latency_s], ...]}'
        )
    return found


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a JSON file") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): give a JSON file") from error


def _stock_runs(runs: Sequence[Mapping[str, Any]], model: str) -> list[Stock]:
    """One curve for each number of trials, the first repeat of each."""
    found: dict[Any, Stock] = {}
    for run in runs:
        cell = run["cell"]
        if cell["side"] != "stock" or str(cell["model"]).lower() not in model.lower():
            continue
        tasks = {name: float(kernel["seconds"]) for name, kernel in run.get("kernels", {}).items()}
        label = f"stock TVM, {run['trials']} trials"
        found.setdefault(run["trials"], Stock(label, _pairs(run["curve"]), tasks))
    return list(found.values())


def _pairs(curve: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    return tuple(sorted((float(time_s), float(latency_s)) for time_s, latency_s in curve))


def _share_latency(point: Mapping[str, Any]) -> ShareLatency:
    names = ("percent", "p10_ms", "p90_ms", "throughput_per_s", "efficacy", "energy_j")
    optional = {n: None if point.get(n) is None else float(point[n]) for n in names}
    latency_ms = float(point["latency_ms"])
    return ShareLatency(
        int(point["units"]), int(point["tuned_at"]), latency_ms=latency_ms, **optional
    )


def _is_of(run: Run, manifest: Manifest) -> bool:
    return _model_hash(run) == manifest.model.hash


def _model_hash(run: Run) -> str:
    return str(run.machine.get("model_hash"))


def _numbers(runs: Sequence[Run]) -> str:
    shown = [f"{run.id} ({run.machine.get('model') or 'unnamed'})" for run in runs[-5:]]
    earlier = f"and {len(runs) - 5} earlier" if len(runs) > 5 else ""
    return ", ".join(filter(None, [*reversed(shown), earlier]))
