"""The records of one device and number of units, seen as TVM sees them."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm.s_tir import meta_schedule as ms

from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.kernels.naming import fits_names, names_in, renamed_trace
from gpu_aware_tune.kernels.traces import (
    TraceError,
    apply_trace,
    canonical_trace,
    module_from_json,
    module_to_json,
    task_hash,
)
from gpu_aware_tune.records.store import Counts, Record, RecordKey, Store

WORKLOADS, RECORDS = "database_workload.json", "database_tuning_record.json"

# What decides the code that a target makes. The number of cores is no part of it (a record has its
# units for that), nor are limits that follow from the architecture, nor the host's own triple.
_TARGET_OPTIONS = ("arch", "march", "mcpu", "mattr")
_FAILED_S = 1e9  # TVM writes 1e10 seconds for a candidate that failed
_BATCH = 256


@dataclass(frozen=True)
class Moved:
    """What an export or import has moved, and what it had to leave."""

    tasks: int
    records: int
    failures: int
    skipped: int


def memory_database(
    modules: Mapping[str, tvm.IRModule],
    traces: Mapping[str, str],
    target: tvm.target.Target,
) -> ms.database.MemoryDatabase:
    """Return a database that answers each task with the one trace chosen for it.

    TVM's query looks at neither the target nor the units, so a database holds one choice of
    kernels, never a store's records. Use it as `with target, database:` around
    `relax.transform.MetaScheduleApplyDatabase()`.

    Args:
        modules: the tasks' unscheduled modules by task hash.
        traces: trace JSON by task hash; a task without one (or with "") stays unscheduled.
        target: what the kernels are compiled for.

    Raises:
        TraceError: a trace does not fit the module of its task.
    """
    database = ms.database.MemoryDatabase()
    for name, trace in traces.items():
        if not trace:
            continue
        module = modules[name]
        if task_hash(module) != name:
            raise TraceError(f"task {name}: its module has the hash {task_hash(module)}")
        try:
            applied = apply_trace(trace, module).trace
        except TraceError as error:
            raise TraceError(f"task {name}: {error}") from error
        workload = database.commit_workload(module)
        args = ms.arg_info.ArgInfo.from_entry_func(module, remove_preproc=False)
        record = ms.database.TuningRecord(applied, workload, [1.0], target, args)
        database.commit_tuning_record(record)
    return database


def is_same_task(store: Store, module: tvm.IRModule) -> bool:
    """Tell whether the store's records under this module's hash are really of this module.

    False means that two modules share a hash; then the records must not be used. A task which
    the store has never seen is the same.
    """
    stored = store.task(task_hash(module))
    if stored is None:
        return True
    return bool(tvm_ffi.structural_equal(module_from_json(stored.module), module))


def adopt_task(store: Store, module: tvm.IRModule) -> int:
    """Bring what the store holds of a task to canonical names inside its kernel (see `naming`).

    Stores of before name blocks after the variables of whichever model came first. Its traces are
    renamed; those of another model, which fit neither module, are marked and left out.

    Args:
        store: open for writing.
        module: the task's module, with canonical names; structurally equal to the stored one.

    Returns:
        How many traces do not fit.
    """
    name = task_hash(module)
    stored = store.task(name)
    if stored is None:
        return 0
    old, new = names_in(stored.module), names_in(module_to_json(module))
    if old.are_canonical:
        return 0

    def rename(trace: str) -> str | None:
        if not trace or fits_names(trace, new):  # "" stands for the unscheduled kernel
            return trace
        changed = renamed_trace(trace, old)
        return changed if fits_names(changed, new) else None

    return store.adopt_names(name, module_to_json(module), rename)[1]


def target_text(target: tvm.target.Target) -> str:
    """Return the part of a target that records are keyed by, such as "llvm -mcpu=znver5"."""
    config = target.export()
    options = []
    for name in _TARGET_OPTIONS:
        value = config.get(name)
        if value:
            text = value if isinstance(value, str) else ",".join(str(item) for item in value)
            options.append(f" -{name}={text}")
    return str(config["kind"]) + "".join(options)


def args_json(module: tvm.IRModule) -> str:
    """Return the arguments of a task as TVM's record files describe them."""
    args = ms.arg_info.ArgInfo.from_entry_func(module, remove_preproc=False)
    return json.dumps([arg.as_json() for arg in args], separators=(",", ":"))


def export_tvm(
    store: Store,
    folder: Path,
    device: str | None = None,
    units: int | None = None,
    tvm_version: str | None = None,
    overwrite: bool = False,
) -> Moved:
    """Write usable records as the pair of files that `ms.database.JSONDatabase` reads.

    Args:
        store: where the records are.
        folder: where the two files go; created when missing.
        device: only records of this device; needed when the store has several.
        units: likewise, this many units. TVM cannot tell a record of 30 % from one of 100 %.
        tvm_version: likewise, records measured with this version of TVM.
        overwrite: replace files that are there.

    Returns:
        What was written; failures and wrong kernels are never among it, and tasks whose module
        the store does not know are skipped.

    Raises:
        UserError: no records match, or they are of more than one device, units or version.
    """
    keys = _one_group(store.counts(), device, units, tvm_version)
    workloads: list[str] = []
    lines: list[str] = []
    skipped = 0
    for counts in keys:
        task = store.task(counts.key.task)
        if task is None:
            skipped += 1
            continue
        module = module_from_json(task.module)
        args = task.args if task.args not in ("", "[]") else args_json(module)
        tail = f"{json.dumps(_target_config(counts.key))},{args}"
        for record in store.best(counts.key, k=counts.trials):
            if record.trace:  # "" stands for the unscheduled kernel, which TVM has no record for
                lines.append(f"[{len(workloads)},[{record.trace},[{record.best_s!r}],{tail}]]\n")
        workloads.append(json.dumps(ms.database.Workload(module).as_json()) + "\n")
    files = {folder / WORKLOADS: workloads, folder / RECORDS: lines}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in files:
            if path.exists() and not overwrite:
                raise UserError(f"{path} exists; choose another folder or pass --force")
        for path, text in files.items():
            partial = path.with_name(path.name + ".partial")
            try:
                partial.write_text("".join(text))
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise SetupError(
            f"cannot write to {folder} ({error.strerror}); choose another folder"
        ) from error
    return Moved(len(workloads), len(lines), 0, skipped)


def import_tvm(
    store: Store,
    folder: Path,
    device: str,
    units: int,
    tvm_version: str | None = None,
) -> Moved:
    """Add the records of a pair of JSONDatabase files to the store.

    Args:
        store: where the records go; what it already knows it keeps.
        folder: where `database_workload.json` and `database_tuning_record.json` are.
        device: what the records were measured on, as `Device.key` names it; the files do not say.
        units: likewise, on how many units.
        tvm_version: with which TVM; by default the version that wrote the files.

    Returns:
        What was read; skipped are lines whose trace is none or whose target cannot be read.

    Raises:
        UserError: a file is missing, a line is no JSON of this kind, or a record is of another
            kind of device; nothing was added then.
    """
    workloads = [_workload(place, line, tvm_version) for place, line in _lines(folder / WORKLOADS)]
    records: list[Record] = []
    skipped = 0
    for place, line in _lines(folder / RECORDS):
        try:
            index, (trace, run_secs, target, _args) = line
            if index < 0:
                raise IndexError(f"workload {index}")
            module, version = workloads[index]
        except (TypeError, ValueError, IndexError) as error:
            raise UserError(f"{place}: no tuning record of TVM ({error}); export it again") from (
                error
            )
        try:
            text = canonical_trace(trace)
            key_target = target_text(tvm.target.Target(target))
        except Exception:  # TVM raises many kinds for a target it does not know
            skipped += 1
            continue
        kind = key_target.partition(" ")[0]
        if device.partition("/")[0] != kind:
            raise UserError(
                f"{place}: measured on {kind}, but the device is {device};"
                f" give a --device that starts with {kind}/"
            )
        key = RecordKey(task_hash(module), device, units, key_target, version)
        records.append(_record(key, text, run_secs))
    for module, _version in workloads:
        store.add_task(
            task_hash(module), _block_names(module), module_to_json(module), args_json(module)
        )
    for start in range(0, len(records), _BATCH):
        store.add(records[start : start + _BATCH])
    failures = sum(record.failure is not None for record in records)
    return Moved(len(workloads), len(records) - failures, failures, skipped)


def _one_group(
    counts: list[Counts], device: str | None, units: int | None, tvm_version: str | None
) -> list[Counts]:
    """Return the keys that match, which must agree in everything but the task."""
    found = [
        row
        for row in counts
        if device in (None, row.key.device)
        and units in (None, row.key.units)
        and tvm_version in (None, row.key.tvm)
    ]
    groups = sorted({(r.key.device, r.key.units, r.key.target, r.key.tvm) for r in found})
    names = "; ".join(f"{g[0]} with {g[1]} units, {g[2]}, TVM {g[3]}" for g in groups[:6])
    if len(groups) > 1:
        raise UserError(
            f"the records are of {len(groups)} kinds that TVM cannot tell apart ({names});"
            " choose one with --device, --units, --tvm"
        )
    if not groups:
        there = sorted({(r.key.device, r.key.units) for r in counts})
        text = "; ".join(f"{d} with {u} units" for d, u in there[:6]) or "none"
        raise UserError(f"no records match; the store has: {text}")
    return found


def _target_config(key: RecordKey) -> dict[str, Any]:
    """Return the target of a key as TVM's JSON; on a CPU the units are its cores."""
    kind, *options = key.target.split(" ")
    config: dict[str, Any] = {"kind": kind}
    for option in options:
        name, _, value = option.removeprefix("-").partition("=")
        config[name] = value.split(",") if name == "mattr" else value
    if kind == "llvm":
        config["num-cores"] = key.units
    return config


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each line of a JSON-lines file with its place, "file:line"."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path} ({error}); give a folder with {WORKLOADS} and {RECORDS}"
        ) from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: no JSON ({error}); export it again") from error


def _workload(place: str, line: Any, tvm_version: str | None) -> tuple[tvm.IRModule, str]:
    """Return the module of a workload line and the version of TVM that wrote it."""
    try:
        module = ms.database.Workload.from_json(line).mod
    except Exception as error:  # TVM raises many kinds, all of which mean a line it did not write
        raise UserError(f"{place}: no workload of TVM; export it again") from error
    if tvm_version is None:
        tvm_version = str(tvm.__version__)
        with contextlib.suppress(ValueError, KeyError, TypeError, binascii.Error):
            # TVM's base64 text starts with eight bytes that hold its length.
            written = json.loads(base64.b64decode(line[1])[8:])
            tvm_version = str(written["metadata"]["tvm_version"])
    return module, tvm_version


def _record(key: RecordKey, trace: str, run_secs: list[float] | None) -> Record:
    seconds = sum(run_secs) / len(run_secs) if run_secs else _FAILED_S
    if not 0 < seconds < _FAILED_S:
        text = "recorded as failed by TVM's tuner"
        return Record(key, trace, failure="lost", failure_text=text, flags="imported")
    return Record(key, trace, seconds, repeats=len(run_secs or ()), flags="imported")


def _block_names(module: tvm.IRModule) -> str:
    """Return a name for a task that came without one: the names of its blocks."""
    schedule = tvm.s_tir.Schedule(module)
    try:
        blocks = schedule.get_child_blocks(schedule.get_sblock("root", func_name="main"))
        names = [str(schedule.get(block).name_hint) for block in blocks]
    except Exception:  # a module of another shape is still a task
        names = []
    return "_".join(names)[:60] or "imported"
