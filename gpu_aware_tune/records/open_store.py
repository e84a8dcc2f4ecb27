"""The open file of a record store: its connection, its lock, its transactions."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.records.lock import WriterLock, is_writing
from gpu_aware_tune.records.rows import COLUMNS, FROM, DamagedRow, Record, RecordKey, record_of
from gpu_aware_tune.records.schema import open_empty, open_file, plain_errors, transaction

FILE_NAME = "records.sqlite"


def store_file(path: Path) -> Path:
    """The file of a store, which is named by its folder or itself."""
    return path if path.suffix == ".sqlite" else path / FILE_NAME


class OpenStore:
    """The records of one folder. Any number of processes may write and read.

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
        self.path = store_file(Path(path))
        self.readonly = readonly
        self._owner = os.getpid()
        self._mutex = threading.RLock()
        self._key_ids: dict[RecordKey, int] = {}
        self._lock: WriterLock | None = None
        self.damaged: set[tuple[str, object]] = (
            set()
        )  # (table, row) of what was left out as damaged
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a child forked from the writer does not."""
        if os.getpid() != self._owner:
            return
        with self._mutex:
            self._db.close()
            if self._lock:
                self._lock.release()

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
        records = []
        for row in rows:
            try:
                records.append(record_of(row))
            except DamagedRow:
                self.damaged.add(("records", row[-3]))
        return records

    def _close_interrupted_runs(self) -> None:
        """Close the runs whose process is dead; the last record of each says until when it went."""
        with self._using() as db:
            rows = db.execute("SELECT id, machine FROM runs WHERE status = 'running'").fetchall()
        dead = [(run,) for run, machine in rows if not self._goes_on(machine)]
        if not dead:
            return
        with self._writing() as db:
            db.executemany(
                "UPDATE runs SET status = 'interrupted', finished = COALESCE("
                "(SELECT MAX(created) FROM records WHERE run = runs.id), started)"
                " WHERE status = 'running' AND id = ?",
                dead,
            )

    def _goes_on(self, machine: str) -> bool:
        """Whether the process of a run, named in its row, still writes here."""
        try:
            pid = json.loads(machine).get("pid")
        except (ValueError, AttributeError):
            return False
        return isinstance(pid, int) and pid != self._owner and is_writing(self.path, pid)
