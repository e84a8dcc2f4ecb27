"""The record store: every measurement and failure ever made here, in one SQLite file."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.records.lock import WriterLock
from gpu_aware_tune.records.rows import (
    ADD_RECORD,
    ADD_TRACE,
    COLUMNS,
    FASTEST,
    FROM,
    KEY,
    LOG,
    UNFIT,
    USABLE,
    Counts,
    LogEntry,
    Record,
    RecordKey,
    Run,
    StoredTask,
    check_seconds,
    digest,
    doomed,
    log_entry_of,
    packed,
    record_of,
    row_of,
    unpacked,
)
from gpu_aware_tune.records.schema import open_empty, open_file, plain_errors, transaction

__all__ = ["FILE_NAME", "Counts", "LogEntry", "Record", "RecordKey", "Run", "Store", "StoredTask"]

FILE_NAME = "records.sqlite"


class Store:
    """The records of one folder. One process may write at a time, any number may read.

    Args:
        path: the folder (the file is `records.sqlite` in it), or a file ending in `.sqlite`.
        readonly: open for queries only; never blocked by a writer and never blocks one.
        missing_ok: with `readonly`, where there is no such file: an empty store, in memory.
        busy_timeout_s: how long to wait for another program's lock on the file.

    Raises:
        SetupError: the file is damaged, locked, read-only, of a newer version or no record store;
            it is left as it is.
        UserError: `readonly` without `missing_ok`, and there is no such file.
    """

    def __init__(
        self,
        path: Path,
        readonly: bool = False,
        busy_timeout_s: float = 10.0,
        missing_ok: bool = False,
    ) -> None:
        path = Path(path)
        self.path = path if path.suffix == ".sqlite" else path / FILE_NAME
        self.readonly = readonly
        self._owner = os.getpid()
        self._mutex = threading.RLock()
        self._key_ids: dict[RecordKey, int] = {}
        self._lock: WriterLock | None = None
        if not readonly:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SetupError(
                    f"cannot create the folder {self.path.parent} ({error.strerror});"
                    " give another folder with --db"
                ) from error
            self._lock = WriterLock(self.path)
        try:
            with plain_errors(self.path):
                if readonly and missing_ok and not self.path.exists():
                    self._db = open_empty()
                else:
                    self._db = open_file(
                        self.path, readonly=readonly, busy_timeout_s=busy_timeout_s
                    )
        except BaseException:
            if self._lock:
                self._lock.release()
            raise
        if not readonly:
            try:
                self._close_interrupted_runs()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let the next writer in; a child forked from the writer does not."""
        if os.getpid() != self._owner:
            return
        with self._mutex:
            self._db.close()
            if self._lock:
                self._lock.release()

    # -- writing ------------------------------------------------------------------------------

    def add(self, records: Sequence[Record], replace: bool = False) -> int:
        """Add records in one transaction and return how many are new or changed.

        A record is unique per key and trace. What is there is kept, unless `replace` is set or a
        failure is followed by a measurement.
        """
        traces = [packed(record.trace) for record in records]
        rows = [(record.key, row_of(record)) for record in records]
        with self._writing() as db:
            db.executemany(ADD_TRACE, traces)
            values = [
                (self._key_id(key), trace[0], *row)
                for (key, row), trace in zip(rows, traces, strict=True)
            ]
            before = db.total_changes
            db.executemany(ADD_RECORD.format(replace=int(replace)), values)
            return db.total_changes - before

    def mark_wrong(self, key: RecordKey, trace: str) -> None:
        """Mark a kernel that computes wrong numbers, under every number of units of its device."""
        with self._writing() as db:
            db.execute(
                "UPDATE records SET wrong = 1 WHERE trace = (SELECT id FROM traces WHERE hash = ?)"
                " AND key IN (SELECT id FROM keys WHERE task = ? AND device = ? AND tvm = ?)",
                (digest(trace), key.task, key.device, key.tvm),
            )

    def set_retimed(self, key: RecordKey, trace: str, seconds: float) -> None:
        """Keep the seconds of a second measurement, made alone; from then on they count."""
        check_seconds(seconds)
        with self._writing() as db:
            db.execute(
                "UPDATE records SET retimed = ? WHERE key = ?"
                " AND trace = (SELECT id FROM traces WHERE hash = ?)",
                (seconds, self._key_id(key), digest(trace)),
            )

    def add_task(self, hash: str, name: str, module_json: str, args_json: str = "[]") -> None:
        """Keep a task's module, so that its records can be exported without the model."""
        with self._using() as db:
            if db.execute("SELECT 1 FROM tasks WHERE hash = ?", (hash,)).fetchone():
                return
        with self._writing() as db:
            module = zlib.compress(module_json.encode())
            db.execute(
                "INSERT OR IGNORE INTO tasks VALUES (?, ?, ?, ?, ?)",
                (hash, name, module, args_json, time.time()),
            )

    def adopt_names(
        self, task: str, module_json: str, rename: Callable[[str], str | None]
    ) -> tuple[int, int]:
        """Replace a task's module by one with other names inside, and its traces to match.

        Args:
            task: its hash.
            module_json: the module with the new names.
            rename: returns a trace for the new names, or None where it fits neither. The records
                of such a trace stay, marked with the failure `UNFIT`, and are not used.

        Returns:
            How many traces were renamed, and how many do not fit.
        """
        of_task = "SELECT id FROM keys WHERE task = ?"
        with self._writing() as db:
            rows = db.execute(
                f"SELECT DISTINCT t.id, t.json {FROM} WHERE k.task = ? AND t.json IS NOT NULL",
                (task,),
            ).fetchall()
            renamed = unfit = 0
            for old, text in rows:
                trace = unpacked(text)
                changed = rename(trace)
                if changed is None:
                    unfit += 1
                    db.execute(
                        f"UPDATE records SET failure = ? WHERE trace = ? AND key IN ({of_task})",
                        (UNFIT, old, task),
                    )
                elif changed != trace:
                    renamed += 1
                    db.execute(ADD_TRACE, packed(changed))
                    (new,) = db.execute(
                        "SELECT id FROM traces WHERE hash = ?", (digest(changed),)
                    ).fetchone()
                    # Where the new name has a record under a key already, that one is newer.
                    db.execute(
                        f"UPDATE OR IGNORE records SET trace = ? WHERE trace = ? AND key IN ({of_task})",
                        (new, old, task),
                    )
            db.execute(
                "UPDATE tasks SET module = ? WHERE hash = ?",
                (zlib.compress(module_json.encode()), task),
            )
            return renamed, unfit

    def mark_unfit(self, task: str, trace: str) -> None:
        """Mark a trace that cannot be applied to its task; its records stay and are not used."""
        with self._writing() as db:
            db.execute(
                "UPDATE records SET failure = ? WHERE trace = (SELECT id FROM traces WHERE hash = ?)"
                " AND key IN (SELECT id FROM keys WHERE task = ?)",
                (UNFIT, digest(trace), task),
            )

    def start_run(self, settings: Mapping[str, Any], machine: Mapping[str, Any]) -> int:
        """Open the row of a run and return its id."""
        with self._writing() as db:
            cursor = db.execute(
                "INSERT INTO runs (status, started, settings, machine, facts)"
                " VALUES ('running', ?, ?, ?, '{}')",
                (time.time(), _dumps(settings), _dumps(machine)),
            )
            return int(cursor.lastrowid or 0)

    def finish_run(self, run_id: int, status: str, **facts: Any) -> None:
        """Close the row of a run with what is known about it by then, such as drift."""
        with self._writing() as db:
            db.execute(
                "UPDATE runs SET status = ?, finished = ?, facts = ? WHERE id = ?",
                (status, time.time(), _dumps(facts), run_id),
            )

    def prune(
        self,
        keep: int | None = None,
        failures_older_s: float | None = None,
        wrong: bool = False,
        dry_run: bool = False,
    ) -> int:
        """Remove records and return how many; the file shrinks by as much.

        Args:
            keep: leave the fastest so many per key (and the untuned schedule, the baseline).
            failures_older_s: remove failures that are older than this; 0 means all.
            wrong: remove kernels that compute wrong numbers. They are then tried again.
            dry_run: only count.
        """
        where, values = doomed(keep, failures_older_s, wrong)
        if dry_run:
            with self._using() as db:
                query = f"SELECT COUNT(*) FROM records WHERE {where}"
                return int(db.execute(query, values).fetchone()[0])
        with self._writing() as db:
            removed = db.execute(f"DELETE FROM records WHERE {where}", values).rowcount
            db.execute("DELETE FROM traces WHERE id NOT IN (SELECT trace FROM records)")
            db.execute("DELETE FROM keys WHERE id NOT IN (SELECT key FROM records)")
            self._key_ids.clear()
        if removed:
            self.vacuum()
        return removed

    def vacuum(self) -> None:
        """Write the file anew without the room that removed records left."""
        with self._using() as db:
            db.execute("VACUUM")

    # -- queries ------------------------------------------------------------------------------

    def best(self, key: RecordKey, k: int = 1) -> list[Record]:
        """Return the k fastest records of a key that are neither failures nor wrong."""
        return self._select(
            f"WHERE r.key = ? AND {USABLE} ORDER BY {FASTEST} LIMIT ?", (self._key_id(key), k)
        )

    def untuned(self, key: RecordKey) -> Record | None:
        """Return the fastest default schedule of a key that ran and is right."""
        where = f"WHERE r.key = ? AND {USABLE} AND r.origin = 'default'"
        found = self._select(f"{where} ORDER BY {FASTEST} LIMIT 1", (self._key_id(key),))
        return found[0] if found else None

    def all(self, key: RecordKey) -> list[Record]:
        """Return every record of a key, failures included, in the order they were added."""
        return self._select("WHERE r.key = ? ORDER BY r.id", (self._key_id(key),))

    def known(self, key: RecordKey) -> int:
        """Return how many trials, failures included, the store holds under a key."""
        with self._using() as db:
            query = "SELECT COUNT(*) FROM records WHERE key = ?"
            return int(db.execute(query, (self._key_id(key),)).fetchone()[0])

    def for_task(self, task_hash: str, k: int = 1) -> list[Record]:
        """Return the k fastest usable records of a task under each of its keys."""
        with self._using() as db:
            query = f"SELECT {KEY} FROM keys k WHERE k.task = ? ORDER BY k.id"
            keys = [RecordKey(*row) for row in db.execute(query, (task_hash,))]
        return [record for key in keys for record in self.best(key, k)]

    def seeds(self, key: RecordKey, k: int = 8) -> list[Record]:
        """Return the best traces that the same task has elsewhere, nearest first.

        Near means the same device, then the closest number of units. Traces of another kind of
        target, those known under the key itself, and those found wrong anywhere are left out.
        """
        kind = key.target.partition(" ")[0]
        excluded = "WHERE k.task = ? AND (r.key = ? OR r.wrong = 1)"
        known = {record.trace for record in self._select(excluded, (key.task, self._key_id(key)))}
        found: dict[str, Record] = {}
        others = [
            record
            for record in self.for_task(key.task, k)
            if record.key != key and record.key.target.partition(" ")[0] == kind
        ]
        others.sort(key=lambda r: (r.key.device != key.device, abs(r.key.units - key.units)))
        for record in others:
            if record.trace not in known:
                found.setdefault(record.trace, record)
        return list(found.values())[:k]

    def records(self) -> Iterator[Record]:
        """Yield every record of the store, key by key; the store may be used meanwhile."""
        for counts in self.counts():
            yield from self.all(counts.key)

    def counts(self, task: str | None = None) -> list[Counts]:
        """Return what the store holds, one row a key, of one task or of all."""
        query = (
            f"SELECT {KEY}, COALESCE(n.name, ''), COUNT(*), SUM(r.failure IS NOT NULL),"
            f" SUM(r.wrong), MIN(CASE WHEN {USABLE} THEN {FASTEST} END),"
            f" MIN(CASE WHEN {USABLE} AND r.origin = 'default' THEN {FASTEST} END)"
            " FROM records r JOIN keys k ON k.id = r.key LEFT JOIN tasks n ON n.hash = k.task"
            " WHERE ?1 IS NULL OR k.task = ?1 GROUP BY k.id ORDER BY n.name, k.id"
        )
        with self._using() as db:
            rows = db.execute(query, (task,)).fetchall()
        return [Counts(RecordKey(*row[:5]), *row[5:]) for row in rows]

    def task(self, hash: str) -> StoredTask | None:
        """Return a task that was kept, or None."""
        with self._using() as db:
            query = "SELECT hash, name, module, args FROM tasks WHERE hash = ?"
            row = db.execute(query, (hash,)).fetchone()
        return row and StoredTask(row[0], row[1], unpacked(row[2]), row[3])

    def runs(self) -> list[Run]:
        """Return every run, oldest first."""
        query = "SELECT id, status, started, finished, settings, machine, facts FROM runs"
        with self._using() as db:
            rows = db.execute(query + " ORDER BY id").fetchall()
        return [Run(*row[:4], *(json.loads(text) for text in row[4:])) for row in rows]

    def log(self, run: Run, tasks: Sequence[str] = ()) -> list[LogEntry]:
        """Return a run's records and the older ones of its keys, in the order they were made.

        Its keys are those of `tasks` on its device and units; without `tasks` they are those that
        it has measured under, which takes a pass over the whole store to find.
        """
        if tasks:
            units = list(run.machine.get("units", ()))
            keys = (
                "SELECT id FROM keys WHERE device = ? AND tvm = ?"
                f" AND units IN ({_places(units)}) AND task IN ({_places(tasks)})"
            )
            values = [run.machine.get("device"), run.machine.get("tvm"), *units, *tasks]
        else:
            keys, values = "SELECT key FROM records WHERE run = ?", [run.id]
        with self._using() as db:
            rows = db.execute(LOG.format(keys=keys), (*values, run.id, run.started)).fetchall()
        return [log_entry_of(row) for row in rows]

    # -- inside -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        with self._mutex, plain_errors(self.path):
            yield self._db

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._using() as db:
            try:
                with transaction(db):
                    yield db
            except BaseException:
                self._key_ids.clear()  # ids handed out in a transaction that was rolled back
                raise

    def _key_id(self, key: RecordKey) -> int:
        """Return the row of a key, added where it is new; -1 where only a query asks for it."""
        if key not in self._key_ids:
            values = (key.task, key.device, key.units, key.target, key.tvm)
            with self._using() as db:
                if db.in_transaction:
                    db.execute("INSERT OR IGNORE INTO keys VALUES (NULL, ?, ?, ?, ?, ?)", values)
                row = db.execute(
                    "SELECT id FROM keys WHERE task = ? AND device = ? AND units = ?"
                    " AND target = ? AND tvm = ?",
                    values,
                ).fetchone()
            if row is None:
                return -1
            if self.readonly:  # a writer elsewhere may remove the row and give its number away
                return int(row[0])
            self._key_ids[key] = row[0]
        return self._key_ids[key]

    def _select(self, clause: str, values: Iterable[Any]) -> list[Record]:
        with self._using() as db:
            rows = db.execute(f"SELECT {COLUMNS} {FROM} {clause}", tuple(values)).fetchall()
        return [record_of(row) for row in rows]

    def _close_interrupted_runs(self) -> None:
        # The lock is ours, so whoever started these is dead; its last record says until when.
        with self._using() as db:
            if not db.execute("SELECT 1 FROM runs WHERE status = 'running'").fetchone():
                return
        with self._writing() as db:
            db.execute(
                "UPDATE runs SET status = 'interrupted', finished = COALESCE("
                "(SELECT MAX(created) FROM records WHERE run = runs.id), started)"
                " WHERE status = 'running'"
            )


def _places(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))


def _dumps(value: Any) -> str:
    return json.dumps(value, default=str)
