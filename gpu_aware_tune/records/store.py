"""The record store: every measurement and failure ever made here, in one SQLite file."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.records.lock import other_writer
from gpu_aware_tune.records.open_store import FILE_NAME, OpenStore
from gpu_aware_tune.records.rows import (
    ADD_RECORD,
    ADD_TRACE,
    FASTEST,
    FROM,
    KEY,
    LOG,
    UNFIT,
    USABLE,
    Counts,
    DamagedRow,
    LogEntry,
    Record,
    RecordKey,
    Run,
    StoredTask,
    check_seconds,
    digest,
    key_of,
    log_entry_of,
    packed,
    prune_condition,
    row_of,
    run_of,
    task_of,
    unpacked,
)

__all__ = [
    "FILE_NAME",
    "Counts",
    "LogEntry",
    "Record",
    "RecordKey",
    "Run",
    "Store",
    "StoredTask",
    "damaged_text",
]


class Store(OpenStore):
    """The records of one folder; see `OpenStore` for how they are opened."""

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
            return db.executemany(ADD_RECORD.format(replace=int(replace)), values).rowcount

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
        if self.task(hash) is not None:
            return
        with self._writing() as db:
            module = zlib.compress(module_json.encode())
            db.execute(
                "INSERT OR REPLACE INTO tasks VALUES (?, ?, ?, ?, ?)",
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
                try:
                    trace = unpacked(text)
                except DamagedRow:
                    continue
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
                (time.time(), _dumps(settings), _dumps({"pid": os.getpid(), **machine})),
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

        Raises:
            SetupError: another process writes the store; it may be using what would be removed.
        """
        where, values = prune_condition(keep, failures_older_s, wrong)
        if dry_run:
            with self._using() as db:
                query = f"SELECT COUNT(*) FROM records WHERE {where}"
                return int(db.execute(query, values).fetchone()[0])
        if (writer := other_writer(self.path)) is not None:
            raise SetupError(
                f"{self.path} is being written by process {writer}; prune when that has ended"
            )
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

    def all(self, key: RecordKey) -> list[Record]:
        """Return every record of a key, failures included, in the order they were added."""
        return self._select("WHERE r.key = ? ORDER BY r.id", (self._key_id(key),))

    def last_id(self) -> int:
        """Return the number of the newest record; those that come later have larger ones."""
        with self._using() as db:
            return int(db.execute("SELECT COALESCE(MAX(id), 0) FROM records").fetchone()[0])

    def added_since(self, last_id: int, runs: Sequence[int]) -> list[Record]:
        """Return the records that other runs have added after a record's number.

        Args:
            last_id: see `last_id`.
            runs: ids of the caller's own runs.
        """
        where = f"WHERE r.id > ? AND COALESCE(r.run, -1) NOT IN ({_places(runs)}) ORDER BY r.id"
        return self._select(where, (last_id, *runs))

    def known(self, key: RecordKey) -> int:
        """Return how many trials, failures included, the store holds under a key."""
        with self._using() as db:
            query = "SELECT COUNT(*) FROM records WHERE key = ?"
            return int(db.execute(query, (self._key_id(key),)).fetchone()[0])

    def for_task(self, task_hash: str, k: int = 1) -> list[Record]:
        """Return the k fastest usable records of a task under each of its keys."""
        with self._using() as db:
            query = f"SELECT {KEY}, k.id FROM keys k WHERE k.task = ? ORDER BY k.id"
            rows = db.execute(query, (task_hash,)).fetchall()
        return [record for _, key in self._keys(rows) for record in self.best(key, k)]

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
            f"SELECT {KEY}, k.id, COALESCE(n.name, ''), COUNT(*), SUM(r.failure IS NOT NULL),"
            f" SUM(r.wrong), MIN(CASE WHEN {USABLE} THEN {FASTEST} END),"
            f" MIN(CASE WHEN {USABLE} AND r.origin = 'default' THEN {FASTEST} END)"
            " FROM records r JOIN keys k ON k.id = r.key LEFT JOIN tasks n ON n.hash = k.task"
            " WHERE ?1 IS NULL OR k.task = ?1 GROUP BY k.id ORDER BY n.name, k.id"
        )
        with self._using() as db:
            rows = db.execute(query, (task,)).fetchall()
        return [Counts(key, *row[6:]) for row, key in self._keys(rows)]

    def _keys(self, rows: Iterable[Sequence[Any]]) -> Iterator[tuple[Sequence[Any], RecordKey]]:
        """Rows that start with a key and its number, with the key; damaged ones are left out."""
        for row in rows:
            try:
                yield row, key_of(row)
            except DamagedRow:
                self.damaged.add(("keys", row[5]))

    def task(self, hash: str) -> StoredTask | None:
        """Return a task that was kept, or None: it is not there, or its row is damaged."""
        with self._using() as db:
            query = "SELECT hash, name, module, args FROM tasks WHERE hash = ?"
            row = db.execute(query, (hash,)).fetchone()
        try:
            return row and task_of(row)
        except DamagedRow:
            self.damaged.add(("tasks", hash))
            return None

    def runs(self) -> list[Run]:
        """Return every run, oldest first; those whose row is damaged are left out."""
        query = "SELECT id, status, started, finished, settings, machine, facts FROM runs"
        with self._using() as db:
            rows = db.execute(query + " ORDER BY id").fetchall()
        runs = []
        for row in rows:
            try:
                runs.append(run_of(row))
            except DamagedRow:
                self.damaged.add(("runs", row[0]))
        return runs

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


def damaged_text(store: Store) -> str:
    """What was left out of a store's answers so far, and what to do about it."""
    tables = Counter(table for table, _ in store.damaged)
    told = ", ".join(f"{count} of the {table}" for table, count in sorted(tables.items()))
    folder = store.path.parent if store.path.name == FILE_NAME else store.path
    return (
        f"{store.path}: damaged rows are left out ({told}); tune records repair --db {folder}"
        " removes them"
    )


def _places(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))


def _dumps(value: Any) -> str:
    return json.dumps(value, default=str)
