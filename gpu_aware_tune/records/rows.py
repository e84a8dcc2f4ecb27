"""The nouns of the record store, and how they lie in its tables."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any


@dataclass(frozen=True)
class RecordKey:
    """What a measured number depends on; records of other keys are seeds, never answers."""

    task: str
    device: str
    units: int
    target: str
    tvm: str


@dataclass(frozen=True)
class Record:
    """One candidate measured under one key, or the failure it ended in."""

    key: RecordKey
    trace: str
    seconds: float | None = None
    failure: str | None = None
    failure_text: str | None = None
    origin: str = "search"
    spread: float | None = None
    repeats: int | None = None
    run_id: int | None = None
    created: float = field(default_factory=time.time)
    partition: str = ""
    flags: str = ""
    wrong: bool = False
    retimed: float | None = None

    @property
    def usable(self) -> bool:
        """Whether the kernel ran, and is numerically correct as far as that was checked."""
        return self.best_s is not None and self.failure is None and not self.wrong

    @property
    def best_s(self) -> float | None:
        """The seconds to go by: those of the second, exclusive measurement where there is one."""
        return self.seconds if self.retimed is None else self.retimed


@dataclass(frozen=True)
class Counts:
    """What the store holds under one key."""

    key: RecordKey
    name: str  # of the task, "" where the store does not know it
    trials: int
    failures: int
    wrong: int
    best_s: float | None
    default_s: float | None  # the untuned schedule, candidate 0


@dataclass(frozen=True)
class StoredTask:
    """A task as kept for later: enough to export its records without the model."""

    hash: str
    name: str
    module: str
    args: str


@dataclass(frozen=True)
class Run:
    """One tuning run; `status` is "running", "interrupted" or what `finish_run` was given."""

    id: int
    status: str
    started: float
    finished: float | None
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class LogEntry:
    """A record without its trace, as the history of a run needs it."""

    task: str
    name: str  # of the task, "" where the store does not know it
    units: int
    target: str
    trace: int  # tells candidates apart
    seconds: float | None
    retimed: float | None
    failure: str | None
    failure_text: str | None
    origin: str
    created: float
    run_id: int | None
    wrong: bool

    @property
    def usable(self) -> bool:
        """Whether the kernel ran and computes right numbers, as far as that was checked."""
        return self.seconds is not None and self.failure is None and not self.wrong

    @property
    def best_s(self) -> float | None:
        """The seconds to go by, like those of a `Record`."""
        return self.seconds if self.retimed is None else self.retimed


class DamagedRow(Exception):
    """A row that is not what was written, as after a flipped bit: it is left out and counted."""


UNFIT = "unfit"  # failure of a record whose trace cannot be applied to its task
KEY = "k.task, k.device, k.units, k.target, k.tvm"
VALUES = (
    "seconds", "failure", "failure_text", "origin", "spread", "repeats", "run", "created", "partition",
    "flags", "wrong", "retimed",
)  # fmt: skip
COLUMNS = f"{KEY}, t.json, {', '.join(f'r.{name}' for name in VALUES)}, r.id, t.hash, r.sum"
FROM = "FROM records r JOIN keys k ON k.id = r.key JOIN traces t ON t.id = r.trace"
LOG = (
    "SELECT k.task, COALESCE(n.name, ''), k.units, k.target, r.trace, r.seconds, r.retimed,"
    " r.failure, r.failure_text, r.origin, r.created, r.run, r.wrong"
    " FROM records r JOIN keys k ON k.id = r.key LEFT JOIN tasks n ON n.hash = k.task"
    " WHERE r.key IN ({keys}) AND (r.run = ? OR r.created < ?) ORDER BY r.created, r.id"
)
USABLE = "r.seconds IS NOT NULL AND r.failure IS NULL AND r.wrong = 0"
FASTEST = "COALESCE(r.retimed, r.seconds)"
ADD_TRACE = "INSERT INTO traces (hash, json) VALUES (?, ?) ON CONFLICT DO NOTHING"
ADD_RECORD = (
    f"INSERT INTO records (key, trace, {', '.join(VALUES)}) VALUES"
    " (?, (SELECT id FROM traces WHERE hash = ?), ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (key, trace) DO UPDATE SET "
    # Measuring again does not make a kernel right that was found to compute wrong numbers.
    + ", ".join(
        "wrong = MAX(wrong, excluded.wrong)" if name == "wrong" else f"{name} = excluded.{name}"
        for name in VALUES
    )
    + " WHERE {replace} OR (failure IS NOT NULL AND excluded.failure IS NULL)"
)


def packed(trace: str) -> tuple[bytes, bytes]:
    """Return a trace as its row: the hash it is found by, and the text compressed."""
    return digest(trace), zlib.compress(trace.encode())


def unpacked(text: bytes) -> str:
    """Return a text that was kept compressed.

    Raises:
        DamagedRow: it is not whole.
    """
    try:
        return zlib.decompress(text).decode()
    except (zlib.error, UnicodeDecodeError, TypeError) as error:
        raise DamagedRow(str(error)) from None


def row_sum(*values: object) -> bytes:
    """Return the checksum of a record: of its key, its trace's hash and `VALUES`, as SQLite has them."""
    return blake2b(repr(values).encode(), digest_size=8).digest()


def digest(trace: str) -> bytes:
    """Return what a trace is found by; records hold no duplicates of one key and digest."""
    return blake2b(trace.encode(), digest_size=16).digest()


def check_seconds(*values: float | None) -> None:
    """Raise ValueError for a time that no clock can have shown."""
    for value in values:
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"a record of {value} seconds; it must be above 0 and finite")


def row_of(record: Record) -> tuple[Any, ...]:
    """Return the values of a record in the order of `ADD_RECORD`, after key and trace."""
    check_seconds(record.seconds, record.retimed)
    return (
        record.seconds,
        record.failure,
        record.failure_text,
        record.origin,
        record.spread,
        record.repeats,
        record.run_id,
        record.created,
        record.partition,
        record.flags,
        record.wrong,
        record.retimed,
    )


def log_entry_of(row: tuple[Any, ...]) -> LogEntry:
    """Return the entry of a row that was selected as `LOG`."""
    fields = (*row[:-1], bool(row[-1]))
    return LogEntry(*fields)


def record_of(row: tuple[Any, ...]) -> Record:
    """Return the record of a row that was selected as `COLUMNS`.

    Raises:
        DamagedRow: it is not what was written.
    """
    *key, text = row[:6]
    *values, wrong, retimed = row[6:-3]
    _, hash_, sum_ = row[-3:]
    if row_sum(*key, hash_, *values, wrong, retimed) != sum_:
        raise DamagedRow("its checksum differs")
    trace = unpacked(text)
    if digest(trace) != hash_:
        raise DamagedRow("the checksum of its trace differs")
    fields = (RecordKey(*key), trace, *values, bool(wrong), retimed)
    return Record(*fields)


def key_of(row: Sequence[Any]) -> RecordKey:
    """Return the key of a row that starts as `KEY` does.

    Raises:
        DamagedRow: a value is of another type.
    """
    key = RecordKey(*row[:5])
    texts = (key.task, key.device, key.target, key.tvm)
    if not isinstance(key.units, int) or not all(isinstance(text, str) for text in texts):
        raise DamagedRow("a value is of another type")
    return key


def task_of(row: tuple[Any, ...]) -> StoredTask:
    """Return the task of a row (hash, name, module, args).

    Raises:
        DamagedRow: it is not whole.
    """
    hash_, name, module, args = row
    _parsed(args, list)
    return StoredTask(hash_, name, unpacked(module), args)


def run_of(row: tuple[Any, ...]) -> Run:
    """Return the run of a row (id, status, started, finished, settings, machine, facts).

    Raises:
        DamagedRow: it is not whole.
    """
    return Run(*row[:4], *(_parsed(text, dict) for text in row[4:]))


def _parsed(text: object, kind: type) -> Any:
    try:
        value = json.loads(str(text))
    except ValueError as error:
        raise DamagedRow(str(error)) from None
    if not isinstance(value, kind):
        raise DamagedRow(f"{kind.__name__} was kept, not {type(value).__name__}")
    return value


def prune_condition(
    keep: int | None, failures_older_s: float | None, wrong: bool
) -> tuple[str, list[float]]:
    """Return the condition and the values that `Store.prune` finds records by."""
    parts, values = ["0"], []
    if keep is not None:
        parts.append(
            "id IN (SELECT id FROM (SELECT id, origin, ROW_NUMBER() OVER (PARTITION BY key"
            f" ORDER BY {FASTEST}) AS place FROM records r WHERE {USABLE})"
            " WHERE place > ? AND origin <> 'default')"
        )
        values.append(float(keep))
    if failures_older_s is not None:
        parts.append("failure IS NOT NULL AND created <= ?")
        values.append(time.time() - failures_older_s)
    if wrong:
        parts.append("wrong = 1")
    return " OR ".join(f"({part})" for part in parts), values
