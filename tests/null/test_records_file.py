"""The record store's file: who may write it, what is refused and left alone, migrations."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_records import KEY, numbers, record, tables

from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.records import schema as records_schema
from gpu_aware_tune.records.lock import is_writing
from gpu_aware_tune.records.store import FILE_NAME, Record, Store

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path) as opened:
        yield opened


# -- any number of writers and readers --------------------------------------------------------


def child(code: str, *args: object) -> subprocess.Popen[str]:
    """Start Python code that prints a line when it is ready; the caller kills it."""
    program = (
        f"import os, sys, time\nfrom test_records_file import KEY, Path, Store, record\n{code}"
    )
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


@contextlib.contextmanager
def killed(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    with process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_readers_are_welcome_while_a_writer_is_at_work(store: Store, tmp_path: Path) -> None:
    store.add([record(1, 0.1)])
    with Store(tmp_path, readonly=True) as reader:
        store.add([record(2, 0.01)])
        assert numbers(reader.best(KEY)) == [2]
        with Store(tmp_path / FILE_NAME, readonly=True) as second:
            assert second.known(KEY) == 2
        with pytest.raises(SetupError, match="cannot be written"):
            reader.add([record(3, 0.1)])
    assert store.known(KEY) == 2
    store.close()
    with Store(tmp_path, readonly=True) as reader:
        assert reader.known(KEY) == 2
    assert os.listdir(tmp_path) == [FILE_NAME], "readers leave nothing behind"


def test_two_writers_of_one_process_share_a_store(store: Store, tmp_path: Path) -> None:
    store.add([record(1, 0.1)])
    with Store(tmp_path) as other:
        other.add([record(2, 0.2)])
        assert numbers(store.all(KEY)) == [1, 2]
    store.add([record(3, 0.3)])
    assert is_writing(tmp_path / FILE_NAME, os.getpid()), "closing one leaves the other's mark"
    store.close()
    assert not is_writing(tmp_path / FILE_NAME, os.getpid())
    assert os.listdir(tmp_path) == [FILE_NAME]


def test_writers_of_several_processes_share_a_store_until_they_are_killed(tmp_path: Path) -> None:
    code = "s = Store(Path(sys.argv[1])); n = int(sys.argv[2]); run = s.start_run({}, {})\n"
    code += "s.add([record(n * 10 + i, .1, run_id=run, created=i * 1e9) for i in (1, 3, 2)])\n"
    code += "print('up', flush=True)\n"
    first = child(code + "time.sleep(60)", tmp_path, 1)
    second = child(code + "time.sleep(60)", tmp_path, 2)
    with killed(first), killed(second):
        assert line(first) == line(second) == "up"
        with Store(tmp_path) as third:
            assert [run.status for run in third.runs()] == ["running", "running"]
            assert len(third.all(KEY)) == 6
            with pytest.raises(SetupError, match=r"is being written by process .*; prune when"):
                third.prune(keep=1)
        first.kill()
        first.wait()
        with Store(tmp_path) as successor:
            done = {run.machine["pid"]: (run.status, run.finished) for run in successor.runs()}
            assert done[first.pid] == ("interrupted", 3e9)
            assert done[second.pid] == ("running", None)
        second.kill()
        second.wait()
        with Store(tmp_path) as successor:
            assert {run.status for run in successor.runs()} == {"interrupted"}
            assert successor.prune(keep=1) > 0
    assert os.listdir(tmp_path) == [FILE_NAME]


def test_processes_that_open_a_new_store_at_once_all_get_it(tmp_path: Path) -> None:
    code = "for folder in sys.argv[1:]:\n"
    code += "    print('there', flush=True); input(); Store(Path(folder)).close()\n"
    code += "print('done', flush=True)"
    folders = [tmp_path / str(number) for number in range(20)]
    together = [child(code, *folders) for _ in range(4)]
    for _ in folders:
        assert [line(each) for each in together] == ["there"] * 4
        for each in together:
            assert each.stdin is not None
            each.stdin.write("\n")
            each.stdin.flush()
    assert [line(each) for each in together] == ["done"] * 4
    for each in together:
        each.communicate()


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_that_is_no_file_is_refused_and_left_alone(kind: str, tmp_path: Path) -> None:
    """A symbolic link would have its target truncated, a pipe would hang."""
    target = tmp_path / "precious"
    target.write_text("precious")
    lock = tmp_path / "db" / f"{FILE_NAME}.writer"
    lock.parent.mkdir()
    if kind == "link":
        lock.symlink_to(target)
    else:
        os.mkfifo(lock)
    with pytest.raises(SetupError, match="cannot lock"):
        Store(tmp_path / "db")
    assert target.read_text() == "precious"


def test_forked_workers_neither_hold_nor_release_the_lock(tmp_path: Path) -> None:
    code = """
s = Store(Path(sys.argv[1]))
for act in (lambda: time.sleep(60), s.close):
    pid = os.fork()
    if not pid:
        act(); os._exit(0)
    print(pid, flush=True)
os.waitpid(pid, 0); print('up', flush=True); time.sleep(60)
"""
    with killed(child(code, tmp_path)) as writer:
        worker = int(line(writer))
        assert line(writer)
        assert line(writer) == "up"
        try:
            assert is_writing(tmp_path / FILE_NAME, writer.pid)
            assert not is_writing(tmp_path / FILE_NAME, worker)
            writer.kill()
            writer.wait()
            assert not is_writing(tmp_path / FILE_NAME, writer.pid)
            os.kill(worker, 0)  # it was alive all the time
        finally:
            os.kill(worker, signal.SIGKILL)


def test_nothing_reported_is_lost_when_the_writer_is_killed(tmp_path: Path) -> None:
    code = """
with Store(Path(sys.argv[1])) as s:
    first = s.known(KEY)
    while True:
        s.add([record(first + i, 0.1) for i in range(16)]); first += 16
        print(first, flush=True)
"""
    for wait_s in (0.02, 0.11, 0.3):
        with killed(child(code, tmp_path)) as writer:
            reported = int(line(writer))
            time.sleep(wait_s)
            writer.kill()
            assert writer.stdout is not None
            lines = writer.stdout.read().split("\n")[:-1]
            reported = int(lines[-1]) if lines else reported
        with Store(tmp_path, readonly=True) as reader:
            found = reader.known(KEY)
            assert found >= reported
            assert found % 16 == 0, "half a batch"
            assert len(set(numbers(reader.all(KEY)))) == found


def test_without_wal_the_store_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = records_schema._connect

    def no_shared_memory(path: Path, mode: str, timeout_s: float, extra: str = "") -> object:
        return connect(path, mode, timeout_s, extra + "&vfs=unix-dotfile")

    monkeypatch.setattr(records_schema, "_connect", no_shared_memory)
    with Store(tmp_path) as store:
        store.add([record(1, 0.1)])
        assert tables(store.path, "PRAGMA journal_mode") == [("delete",)]
    with Store(tmp_path, readonly=True) as store:
        assert store.known(KEY) == 1


def test_with_wal_where_it_is_possible(store: Store) -> None:
    assert tables(store.path, "PRAGMA journal_mode") == [("wal",)]


# -- refused files stay as they are -----------------------------------------------------------


def filled(folder: Path) -> Path:
    with Store(folder) as store:
        store.add([Record(KEY, os.urandom(1000).hex(), 0.1) for _ in range(300)])
    return store.path


def overwrite(path: Path, start: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


def newer(path: Path) -> None:
    tables(path, "PRAGMA user_version = 99")


def foreign(path: Path) -> None:
    tables(path, "PRAGMA application_id = 7")


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("no database\n"), "not a record store or is damaged"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "is damaged"),
    "first page": (lambda path: overwrite(path, 100, b"\xff" * 900), "is damaged"),
    "a page": (lambda path: overwrite(path, 4096 * 30, b"\xff" * 4096), "is damaged"),
    "newer": (newer, "has schema 99, this version knows up to 2; update"),
    "foreign": (foreign, "another program's database"),
}


@pytest.mark.parametrize("damage", BAD_FILES)
def test_bad_files_are_named_and_left_alone(tmp_path: Path, damage: str) -> None:
    path = filled(tmp_path)
    harm, text = BAD_FILES[damage]
    harm(path)
    before = path.read_bytes()
    with pytest.raises(SetupError) as error:
        Store(tmp_path)
    assert text in str(error.value)
    assert str(path) in str(error.value)
    assert "--db" in str(error.value)
    assert "\n" not in str(error.value)
    if damage != "a page":  # a reader only finds what it reads
        with pytest.raises(SetupError, match=text):
            Store(tmp_path, readonly=True)
    assert path.read_bytes() == before
    path.unlink()
    Store(tmp_path).close()  # the refusal left no lock behind


def test_a_newer_file_with_unmerged_changes_is_left_alone(tmp_path: Path) -> None:
    code = "s = Store(Path(sys.argv[1])); s.add([record(1, 0.1)])\n"
    code += "s._db.execute('PRAGMA user_version = 99'); print('up', flush=True); time.sleep(60)"
    with killed(child(code, tmp_path)) as writer:
        assert line(writer) == "up"
    path = tmp_path / FILE_NAME
    wal = path.with_name(FILE_NAME + "-wal")
    before = path.read_bytes(), wal.read_bytes()
    assert before[1]
    with pytest.raises(SetupError, match="has schema 99"):
        Store(tmp_path)
    assert (path.read_bytes(), wal.read_bytes()) == before


def test_damage_found_late_is_one_line_too(tmp_path: Path) -> None:
    path = filled(tmp_path)
    overwrite(path, 4096 * 30, b"\xff" * 4096)
    with Store(tmp_path, readonly=True) as store, pytest.raises(SetupError, match="is damaged"):
        store.all(KEY)


def test_a_file_locked_by_another_program(tmp_path: Path) -> None:
    path = filled(tmp_path)
    tables(path, "PRAGMA journal_mode = DELETE")
    before = path.read_bytes()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(SetupError, match="is locked by another program"):
            Store(tmp_path, busy_timeout_s=0.05)
    assert path.read_bytes() == before


def test_locked_while_writing(store: Store, tmp_path: Path) -> None:
    store._db.execute("PRAGMA busy_timeout = 50")
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(SetupError, match="is locked by another program"):
            store.add([record(1, 0.1)])
    assert store.add([record(1, 0.1)]) == 1


@pytest.fixture
def plain_user() -> Iterator[Path]:
    """A folder, and a user whom permissions bind: root may write what nobody else may."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        if root:
            os.chown(name, 65534, -1)
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(name, 0o777)


def test_a_folder_that_cannot_be_written(plain_user: Path) -> None:
    path = filled(plain_user)
    before = path.read_bytes()
    os.chmod(plain_user, 0o555)
    with pytest.raises(SetupError, match=r"cannot lock .*Permission denied.*folder writable"):
        Store(plain_user)
    with pytest.raises(SetupError, match="cannot create the folder"):
        Store(plain_user / "sub")
    with Store(plain_user, readonly=True) as reader:
        assert reader.known(KEY) == 300
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_written(plain_user: Path) -> None:
    with Store(plain_user) as store:
        store.add([record(1, 0.1)])
    before = store.path.read_bytes()
    os.chmod(store.path, 0o444)
    with Store(plain_user, readonly=True) as reader:
        assert reader.known(KEY) == 1
    with pytest.raises(SetupError, match="cannot be written; make file and folder writable"):
        Store(plain_user)
    os.chmod(store.path, 0)
    with pytest.raises(SetupError, match="cannot be opened; make file and folder accessible"):
        Store(plain_user, readonly=True)
    os.chmod(store.path, 0o444)
    assert store.path.read_bytes() == before


def test_a_full_disk_loses_only_what_did_not_fit(tmp_path: Path) -> None:
    path = filled(tmp_path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Store(tmp_path) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
        try:
            with pytest.raises(SetupError, match="the disk is full or failing"):
                store.add([Record(KEY, os.urandom(1000).hex(), 0.1) for _ in range(300)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        # Read by another process: closing the file in this one would release SQLite's locks.
        assert subprocess.check_output(["cat", path]) == before
        assert store.known(KEY) == 300
        assert store.add([record(1, 0.01)]) == 1
    with Store(tmp_path, readonly=True) as reader:
        assert reader.known(KEY) == 301


def test_a_full_database_is_a_full_disk(store: Store) -> None:
    store._db.execute("PRAGMA max_page_count = 30")
    with pytest.raises(SetupError, match="the disk is full or failing"):
        store.add([Record(KEY, os.urandom(1000).hex(), 0.1) for _ in range(300)])
    assert store.known(KEY) == 0
    assert store.add([record(1, 0.1)]) == 1
    assert numbers(store.best(KEY)) == [1]


def test_no_records_yet(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no records at .* tune a model first"):
        Store(tmp_path / "none", readonly=True)
    assert not (tmp_path / "none").exists()
    (tmp_path / FILE_NAME).touch()
    with pytest.raises(SetupError, match="old or empty"):
        Store(tmp_path, readonly=True)
    Store(tmp_path).close()
    Store(tmp_path, readonly=True).close()


def test_a_store_that_is_not_there_can_be_looked_at_as_an_empty_one(tmp_path: Path) -> None:
    with Store(tmp_path / "none", readonly=True, missing_ok=True) as store:
        assert store.best(KEY) == [] and store.counts() == [] and store.task("1") is None
        with pytest.raises(SetupError, match="cannot be written"):
            store.add([record(1, 0.1)])
    assert list(tmp_path.iterdir()) == []
    with Store(tmp_path) as store:
        store.add([record(1, 0.1)])
        with Store(tmp_path, readonly=True, missing_ok=True) as reader:
            assert numbers(reader.best(KEY)) == [1], "a store that is there is the one looked at"


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(SetupError, match="is a folder"):
        Store(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="cannot create the folder"):
        Store(tmp_path / "file")


# -- migrations -------------------------------------------------------------------------------


def test_a_migration_is_logged_and_keeps_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(tmp_path)

    def add_mood(db: sqlite3.Connection) -> None:
        db.execute("ALTER TABLE runs ADD COLUMN mood TEXT")

    monkeypatch.setattr(records_schema, "_migrations", [*records_schema._migrations, add_mood])
    with pytest.raises(SetupError, match="has schema 2, which is old"):
        Store(tmp_path, readonly=True)
    with Store(tmp_path) as store:
        assert store.known(KEY) == 300
    assert tables(path, "SELECT name FROM migrations") == [
        ("first_schema",), ("sums_of_records",), ("add_mood",),
    ]  # fmt: skip
    assert tables(path, "PRAGMA user_version") == [(3,)]


def test_a_migration_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(tmp_path)

    def half(db: sqlite3.Connection) -> None:
        db.execute("ALTER TABLE runs ADD COLUMN mood TEXT")
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(records_schema, "_migrations", [*records_schema._migrations, half])
        with pytest.raises(RuntimeError, match="power cut"):
            Store(tmp_path)
    assert "mood" not in str(tables(path, "SELECT sql FROM sqlite_master"))
    with Store(tmp_path) as store:
        assert store.known(KEY) == 300
