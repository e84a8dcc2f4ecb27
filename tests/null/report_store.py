"""A hand-made record store of one run, whose figures can be checked by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_aware_tune.records.store import Record, RecordKey, Run, Store

DEVICE, TARGET, TVM = "llvm/AMD EPYC/znver4", "llvm -mcpu=znver4", "0.27.0"
TASKS = [
    {"hash": "1", "name": "fused_conv2d_relu", "weight": 2},
    {"hash": "2", "name": "softmax", "weight": 1},
]

# task, trace, origin, second of the run, milliseconds on 2 cores and on 1, failure
CANDIDATES = [
    ("1", "d1", "default", 1.0, (4.0, 8.0), None),
    ("2", "d2", "default", 2.0, (1.0, 2.0), None),
    ("1", "a", "search", 10.0, (3.0, 7.0), None),
    ("1", "b", "search", 11.0, None, "build"),
    ("2", "c", "search", 12.0, (0.5, 1.5), None),
    ("1", "e", "search", 13.0, (1.0, 1.0), "wrong numbers"),
    ("2", "f", "search", 14.0, (2.0, 3.0), None),
]
FACTS = {
    "core_seconds": {"search": 2.0, "build": 20.0, "measure": 8.0, "idle": 10.0, "total": 40.0},
    "latency_s": {"untuned-2": 0.0095, "tuned-2": 0.007, "untuned-1": 0.019, "tuned-1": 0.016},
    "drift": {"fused_conv2d_relu-2": 1.02},
    "trials": 5,
}


def key(task: str, units: int) -> RecordKey:
    return RecordKey(task, DEVICE, units, TARGET, TVM)


def machine(**changes: Any) -> dict[str, Any]:
    values = {
        "device": DEVICE, "units": [2, 1], "backend": "cores", "cores": 2, "tvm": TVM,
        "model": "net", "model_hash": "abc", "tasks": TASKS,
    }  # fmt: skip
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


def settings(**changes: Any) -> dict[str, Any]:
    return {"gpu_pct": [100, 50], "trials": 5, "time_s": None, "resume": True, **changes}


def start(store: Store, facts: Mapping[str, Any] | None = None, **changes: Any) -> Run:
    """Opens a run's row; `changes` are settings."""
    run_id = store.start_run(settings(**changes), facts or machine())
    return store.runs()[run_id - 1]


def add(store: Store, run: Run, candidates: Sequence[tuple[Any, ...]] = CANDIDATES) -> None:
    """Adds candidates of a run, and marks those found wrong."""
    for task in TASKS:
        store.add_task(str(task["hash"]), str(task["name"]), "{}")
    for task, trace, origin, second, times, failure in candidates:
        for place, units in enumerate((2, 1)):
            store.add(
                [
                    Record(
                        key(task, units),
                        trace,
                        seconds=times and times[place] / 1e3,
                        failure=failure if times is None else None,
                        failure_text="error: no <vector>\nin line 3" if times is None else None,
                        origin=origin,
                        run_id=run.id,
                        created=run.started + second,
                    )
                ]
            )
        if times is not None and failure:
            store.mark_wrong(key(task, 2), trace)


def finished_store(folder: Path) -> Path:
    """A store of one finished run."""
    with Store(folder) as store:
        run = start(store)
        add(store, run)
        store.finish_run(run.id, "finished", **FACTS)
    return folder
