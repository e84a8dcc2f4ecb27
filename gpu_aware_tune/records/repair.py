"""A damaged record store: what is damaged in it, and a new file with all that can be read."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.records.lock import WriterLock, other_writer
from gpu_aware_tune.records.open_store import store_file
from gpu_aware_tune.records.rows import (
    ADD_TRACE,
    COLUMNS,
    FROM,
    KEY,
    VALUES,
    DamagedRow,
    digest,
    key_of,
    record_of,
    run_of,
    task_of,
    unpacked,
)
from gpu_aware_tune.records.schema import (
    APPLICATION_ID,
    ELSEWHERE,
    TABLES,
    check_regular,
    open_file,
    plain_errors,
    transaction,
    with_functions,
)

_WAIT_S = 10.0
_UNREADABLE = (sqlite3.Error, MemoryError)  # damage may also say that a row has gigabytes
_MOST_ROWS = 10_000_000  # looked for where a damaged file does not list its rows
_AT_ONCE = 1024  # rows read together; what cannot be read is looked for in halves of them


@dataclass(frozen=True)
class Finding:
    """What a table holds.

    Args:
        sound: rows that are what was written.
        damaged: rows that are not, or that cannot be read.
    """

    sound: int
    damaged: int


Findings = dict[str, Finding]


def check_store(path: Path) -> Findings:
    """Read every row of a store and say how many are damaged, by table; changes none of them.

    Raises:
        SetupError: the file cannot be read at all.
    """
    with _reading(store_file(path)) as db:
        return {table: _walked(db, table, lambda _row: None) for table in TABLES}


def repair_store(path: Path) -> tuple[Findings, Path]:
    """Write a new file with every sound row, in the place of the old one, which is kept beside it.

    Returns:
        What was found, and where the old file is now.

    Raises:
        SetupError: the file cannot be read at all, or another process writes it.
    """
    file = store_file(path)
    if not file.exists():
        raise SetupError(f"no records at {file}: nothing to repair {ELSEWHERE}")
    if (writer := other_writer(file)) is not None:
        raise SetupError(f"{file} is being written by process {writer}; repair when that has ended")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    new, old = (file.with_name(f"{file.name}.{kind}-{stamp}") for kind in ("new", "damaged"))
    lock = WriterLock(file)
    try:
        with plain_errors(new), _reading(file) as db, _created(new) as into, transaction(into):
            found = {table: _walked(db, table, _writer(into, table)) for table in TABLES}
        for side in ("-wal", "-shm"):  # merged by the connection that has just read them
            file.with_name(file.name + side).unlink(missing_ok=True)
        file.rename(old)
        new.rename(file)
    finally:
        for side in ("", "-wal", "-shm", "-journal"):
            new.with_name(new.name + side).unlink(missing_ok=True)
        lock.release()
    return found, old


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a file of ours that may be damaged anywhere."""
    if not file.exists():
        raise SetupError(f"no records at {file} {ELSEWHERE}")
    check_regular(file)
    with plain_errors(file):
        uri = f"{file.absolute().as_uri()}?mode=rw"
        db = with_functions(sqlite3.connect(uri, uri=True, timeout=_WAIT_S, isolation_level=None))
        with contextlib.closing(db):
            (owner,) = db.execute("PRAGMA application_id").fetchone()
            if owner != APPLICATION_ID:
                raise SetupError(f"{file} is another program's database; move it away {ELSEWHERE}")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            db.execute("PRAGMA query_only = ON")
            yield db


@contextlib.contextmanager
def _created(file: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(open_file(file, readonly=False, busy_timeout_s=_WAIT_S)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        yield db


def _walked(db: sqlite3.Connection, table: str, keep: Callable[[tuple[Any, ...]], None]) -> Finding:
    """Read a table row by row; what is sound is handed to `keep`."""
    sound = damaged = 0
    for row in _rows(db, table):
        try:
            if row is None:
                raise DamagedRow("it cannot be read")
            _check(table, row)
            keep(row)
            sound += 1
        except (DamagedRow, sqlite3.IntegrityError):
            damaged += 1
    return Finding(sound, damaged)


_SELECT = {
    "tasks": "SELECT hash, name, module, args, added FROM tasks",
    "runs": "SELECT id, status, started, finished, settings, machine, facts FROM runs",
    "keys": "SELECT id, task, device, units, target, tvm FROM keys",
    "traces": "SELECT id, hash, json FROM traces",
    "records": f"SELECT {COLUMNS} {FROM}",
}

_NO_SUM = f"row_sum({KEY}, t.hash, {', '.join(f'r.{name}' for name in VALUES)})"


def _check(table: str, row: tuple[Any, ...]) -> None:
    """Raise `DamagedRow` for a row that is not what was written."""
    if table == "tasks":
        task_of(row[:4])
    elif table == "runs":
        run_of(row)
    elif table == "keys":
        key_of(row[1:])
    elif table == "traces":
        if digest(unpacked(row[2])) != row[1]:
            raise DamagedRow("its checksum differs")
    else:
        record_of(row)


def _writer(into: sqlite3.Connection, table: str) -> Callable[[tuple[Any, ...]], None]:
    """What writes a row that was selected as `_SELECT` into the new file."""
    if table in ("keys", "traces"):  # they come with the records that have them
        return lambda _row: None
    if table == "records":
        columns = f"id, key, trace, {', '.join(VALUES)}"
        key = " AND ".join(f"{name} = ?" for name in ("task", "device", "units", "target", "tvm"))
        places = ", ".join("?" * len(VALUES))

        def record(row: tuple[Any, ...]) -> None:
            *values, number, hash_, _sum = row[6:]
            into.execute("INSERT OR IGNORE INTO keys VALUES (NULL, ?, ?, ?, ?, ?)", row[:5])
            into.execute(ADD_TRACE, (hash_, row[5]))
            into.execute(
                f"INSERT INTO records ({columns}) VALUES (?, (SELECT id FROM keys WHERE {key}),"
                f" (SELECT id FROM traces WHERE hash = ?), {places})",
                (number, *row[:5], hash_, *values),
            )

        return record

    def plain(row: tuple[Any, ...]) -> None:
        into.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)

    return plain


def _rows(db: sqlite3.Connection, table: str) -> Iterator[tuple[Any, ...] | None]:
    """Every row of a table, None for each that cannot be read."""
    query = _SELECT[table]
    names = [str(row[1]) for row in db.execute("PRAGMA table_info(records)")]
    if names[-1:] == [VALUES[-1]]:  # a store of before there were checksums
        query = query.replace("r.sum", _NO_SUM)
    elif names:  # by its place: its name may be damaged, which must not pass for a store without
        query = query.replace("r.sum", 'r."{}"'.format(names[-1].replace('"', '""')))
    if table == "tasks":  # it has no row numbers: what follows damage cannot be reached
        try:
            yield from db.execute(query)
        except _UNREADABLE:
            yield None
        return
    number = "r.id" if table == "records" else "id"
    numbers = _numbers(db, table)
    if numbers is None:
        yield None
        return

    def among(wanted: Sequence[int]) -> Iterator[tuple[Any, ...] | None]:
        try:
            yield from db.execute(
                f"{query} WHERE {number} BETWEEN ? AND ? ORDER BY {number}", (wanted[0], wanted[-1])
            ).fetchall()
        except _UNREADABLE:
            if len(wanted) == 1:
                yield None
                return
            middle = len(wanted) // 2
            yield from among(wanted[:middle])
            yield from among(wanted[middle:])

    for start in range(0, len(numbers), _AT_ONCE):
        yield from among(numbers[start : start + _AT_ONCE])


def _numbers(db: sqlite3.Connection, table: str) -> Sequence[int] | None:
    """The numbers that rows of a table have, or all that they may have; None where nobody can say."""
    try:
        return [row for (row,) in db.execute(f"SELECT id FROM {table} ORDER BY id")]
    except _UNREADABLE:
        pass
    try:
        (last,) = db.execute(f"SELECT MAX(id) FROM {table}").fetchone()
    except _UNREADABLE:
        return None
    return range(1, min(last, _MOST_ROWS) + 1) if isinstance(last, int) else None
