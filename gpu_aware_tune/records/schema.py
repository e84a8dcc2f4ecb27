"""The file under the record store: opening it safely, and its schema."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gpu_aware_tune.errors import SetupError, UserError, one_line
from gpu_aware_tune.records.rows import VALUES, row_sum

APPLICATION_ID = 0x67617475  # "gatu": tells our file from any other SQLite database
REPAIR = "save what can be read with tune records repair --db FOLDER"
TABLES = ("tasks", "runs", "keys", "traces", "records")
ELSEWHERE = "or give another folder with --db"

Migration = Callable[[sqlite3.Connection], None]
_migrations: list[Migration] = []


def migration(function: Migration) -> Migration:
    """Register the next step of the schema; its place in this file is its version, from 1 on."""
    _migrations.append(function)
    return function


@migration
def first_schema(db: sqlite3.Connection) -> None:
    """Tasks, runs, and records; a trace is kept once, however many shares it was measured on."""
    for statement in (
        "CREATE TABLE tasks (hash TEXT PRIMARY KEY, name TEXT NOT NULL, module BLOB NOT NULL,"
        " args TEXT NOT NULL, added REAL NOT NULL) WITHOUT ROWID",
        "CREATE TABLE runs (id INTEGER PRIMARY KEY, status TEXT NOT NULL, started REAL NOT NULL,"
        " finished REAL, settings TEXT NOT NULL, machine TEXT NOT NULL, facts TEXT NOT NULL)",
        "CREATE TABLE keys (id INTEGER PRIMARY KEY, task TEXT NOT NULL, device TEXT NOT NULL,"
        " units INTEGER NOT NULL, target TEXT NOT NULL, tvm TEXT NOT NULL,"
        " UNIQUE (task, device, units, target, tvm))",
        "CREATE TABLE traces (id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE,"
        " json BLOB NOT NULL)",
        "CREATE TABLE records (id INTEGER PRIMARY KEY, key INTEGER NOT NULL REFERENCES keys (id),"
        " trace INTEGER NOT NULL REFERENCES traces (id), seconds REAL, failure TEXT,"
        " failure_text TEXT, origin TEXT NOT NULL, spread REAL, repeats INTEGER, run INTEGER,"
        " created REAL NOT NULL, partition TEXT NOT NULL, flags TEXT NOT NULL,"
        " wrong INTEGER NOT NULL, retimed REAL, UNIQUE (key, trace))",
        # Holds exactly the records that may be chosen, fastest first: best() reads k rows of it.
        "CREATE INDEX records_best ON records (key, COALESCE(retimed, seconds))"
        " WHERE seconds IS NOT NULL AND failure IS NULL AND wrong = 0",
    ):
        db.execute(statement)


@migration
def sums_of_records(db: sqlite3.Connection) -> None:
    """A checksum in each record, which SQLite has none of; triggers keep it up to date."""
    db.execute("ALTER TABLE records ADD COLUMN sum BLOB")
    seal = (
        "UPDATE records SET sum = row_sum("
        "(SELECT task FROM keys WHERE id = key), (SELECT device FROM keys WHERE id = key),"
        " (SELECT units FROM keys WHERE id = key), (SELECT target FROM keys WHERE id = key),"
        " (SELECT tvm FROM keys WHERE id = key), (SELECT hash FROM traces WHERE id = trace),"
        f" {', '.join(VALUES)})"
    )
    db.execute(seal)
    for event in ("INSERT", f"UPDATE OF key, trace, {', '.join(VALUES)}"):
        db.execute(
            f"CREATE TRIGGER records_sum_{event[:6].lower()} AFTER {event} ON records"
            f" BEGIN {seal} WHERE id = NEW.id; END"
        )


def open_file(path: Path, *, readonly: bool, busy_timeout_s: float) -> sqlite3.Connection:
    """Open the store's file, check that it is one, and bring its schema up to date.

    Everything is checked through a read-only connection first, so a file that is refused is
    left exactly as it was found.
    """
    if path.exists():
        _check(path, busy_timeout_s, thorough=not readonly)
    elif readonly:
        raise UserError(f"no records at {path}; tune a model first {ELSEWHERE}")
    writable = _may_write(path) if path.exists() else True
    if readonly and writable and _may_write(path.parent):
        # SQLite removes its side files when the last connection that may write is closed.
        db = _connect(path, "rw", busy_timeout_s)
        db.execute("PRAGMA query_only = ON")
        return db
    if readonly:
        return _connect_readonly(path, busy_timeout_s)
    if not writable:
        # SQLite would open it for reading, silently, and fail at the first write.
        raise SetupError(f"{path} cannot be written; make file and folder writable {ELSEWHERE}")
    db = _connect(path, "rwc", busy_timeout_s)
    try:
        # Where WAL is impossible (some network file systems) SQLite keeps its rollback journal.
        with contextlib.suppress(sqlite3.OperationalError):
            db.execute("PRAGMA journal_mode = WAL").fetchone()
        db.execute("PRAGMA synchronous = NORMAL")
        _migrate(db)
    except BaseException:
        db.close()
        raise
    return db


def open_empty() -> sqlite3.Connection:
    """Open a store without records that is on no disk, for queries only."""
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    with_functions(db)
    _migrate(db)
    db.execute("PRAGMA query_only = ON")
    return db


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Run a block as one write transaction: all of it is in the file afterwards, or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors about the file into one line; wrong use of SQLite passes unchanged."""
    try:
        yield
    except (UnicodeDecodeError, MemoryError) as error:  # of a message that quotes what was found
        raise SetupError(f"{path} is damaged; {REPAIR}, restore a copy {ELSEWHERE}") from error
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "") or ""
        if "user-defined function" in str(error):  # a text of the row that it was to sum is no text
            name = "SQLITE_CORRUPT"
        for prefixes, text in _ERRORS:
            if name.startswith(prefixes):
                raise SetupError(f"{path} {text} {ELSEWHERE} ({one_line(error, 100)})") from error
        if isinstance(error, sqlite3.OperationalError):  # tables or numbers that are not ours
            found = one_line(error, 100)
            raise SetupError(f"{path} is damaged ({found}); {REPAIR} {ELSEWHERE}") from error
        raise


_ERRORS = (
    (("SQLITE_BUSY", "SQLITE_LOCKED"), "is locked by another program; end that program"),
    (("SQLITE_CORRUPT",), f"is damaged; {REPAIR}, restore a copy"),
    (("SQLITE_NOTADB",), "is not a record store or is damaged; move it away"),
    (("SQLITE_FULL", "SQLITE_IOERR"), "cannot be written, the disk is full or failing; free space"),
    (("SQLITE_READONLY", "SQLITE_PERM"), "cannot be written; make file and folder writable"),
    (("SQLITE_CANTOPEN",), "cannot be opened; make file and folder accessible"),
)


def _may_write(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=True)


def _connect(path: Path, mode: str, busy_timeout_s: float, extra: str = "") -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}{extra}"
    return with_functions(
        sqlite3.connect(
            uri, uri=True, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False
        )
    )


def with_functions(db: sqlite3.Connection) -> sqlite3.Connection:
    """Give a connection what the store's triggers call, and texts that damage does not end."""
    db.create_function("row_sum", -1, row_sum, deterministic=True)
    db.text_factory = _text
    return db


def _text(content: bytes) -> str:
    """A text that is none any more is replaced, so that one row is damaged and not the whole answer."""
    return content.decode("utf-8", "replace")


def _connect_readonly(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    """Open for reading, also in a folder where SQLite cannot create its shared memory file."""
    db = _connect(path, "ro", busy_timeout_s)
    try:
        db.execute("PRAGMA schema_version").fetchone()
        return db
    except sqlite3.OperationalError as error:
        db.close()
        name = error.sqlite_errorname
        if name in ("SQLITE_READONLY_ROLLBACK", "SQLITE_READONLY_RECOVERY"):
            # A writer was killed without WAL: what it left half done is undone by who may write.
            with contextlib.closing(_connect(path, "rw", busy_timeout_s)) as healer:
                healer.execute("PRAGMA schema_version").fetchone()
            return _connect(path, "ro", busy_timeout_s)
        wal = path.with_name(path.name + "-wal")
        if _may_write(path.parent) or (wal.exists() and wal.stat().st_size > 0):
            raise
        return _connect(path, "ro", busy_timeout_s, "&immutable=1")


def check_regular(path: Path) -> None:
    """Refuse what is no regular file: SQLite would wait for a pipe, or read a device without end."""
    if path.is_dir():
        raise SetupError(f"{path} is a folder, it should be a file; move it away {ELSEWHERE}")
    if path.exists() and not path.is_file():
        raise SetupError(f"{path} is a pipe or a device, not a file; move it away {ELSEWHERE}")


def _check(path: Path, busy_timeout_s: float, *, thorough: bool) -> None:
    """Refuse a file that is no record store, is damaged, or is of a newer version.

    Only SQLite may open the file: closing any other descriptor of it would release the locks that
    another store of this process has on it.
    """
    check_regular(path)
    with contextlib.closing(_connect_readonly(path, busy_timeout_s)) as db:
        db.execute("BEGIN")  # one look: another process may be making the tables of a new file
        version = _pragma(db, "user_version")
        names = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        if names and _pragma(db, "application_id") != APPLICATION_ID:
            raise SetupError(f"{path} is another program's database; move it away {ELSEWHERE}")
        if version > len(_migrations):
            raise SetupError(
                f"{path} has schema {version}, this version knows up to {len(_migrations)};"
                f" update gpu_aware_tune {ELSEWHERE}"
            )
        missing = [name for name in TABLES if name not in names]
        if version < 0 or (missing if version else names):
            what = f"without table {missing[0]}" if missing else f"its schema is {version}"
            raise SetupError(f"{path} is damaged ({what}); {REPAIR}, restore a copy {ELSEWHERE}")
        if thorough:
            finding = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if finding != "ok":
                finding = " ".join(finding.split())
                raise SetupError(
                    f"{path} is damaged ({finding}); {REPAIR}, restore a copy {ELSEWHERE}"
                )
        elif version < len(_migrations):
            raise SetupError(
                f"{path} has schema {version}, which is old or empty; the next tuning run that"
                f" uses it brings it to {len(_migrations)}"
            )


def _migrate(db: sqlite3.Connection) -> None:
    """Apply what is missing, each step in one transaction together with its row in the log."""
    for version, step in enumerate(_migrations, start=1):
        if version <= _pragma(db, "user_version"):
            continue
        with transaction(db):
            if version <= _pragma(db, "user_version"):
                continue  # another process that opened the new file has been first
            db.execute("CREATE TABLE IF NOT EXISTS migrations (name TEXT, at REAL)")
            step(db)
            db.execute("INSERT INTO migrations VALUES (?, ?)", (step.__name__, time.time()))
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {version}")


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])
