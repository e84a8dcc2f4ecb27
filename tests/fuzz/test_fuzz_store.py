"""Record stores that were damaged at random: each opens, or is refused in one line.

What a damaged store answers is what was written, or is left out and counted; it never is something
else. A repaired store opens, and holds sound records alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz_cases import outcome, run_cases

from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.records.repair import check_store, repair_store
from gpu_aware_tune.records.rows import VALUES
from gpu_aware_tune.records.store import FILE_NAME, Record, RecordKey, Store, damaged_text

Damage = Callable[[Path, random.Random], None]
TABLES = ("tasks", "runs", "keys", "traces", "records")


def key(task: int, units: int) -> RecordKey:
    return RecordKey(str(task), "llvm/x", units, "llvm -mcpu=znver5", "0.27")


def write_store(folder: Path) -> None:
    draw = random.Random(1)
    with Store(folder) as store:
        run = store.start_run({"trials": 5}, {"model": "m", "device": "llvm/x"})
        for task in range(12):
            store.add_task(str(task), f"fused_conv2d_{task}", '{"module": "%s"}' % ("x" * 400))
            records = [
                Record(
                    key(task, units), f"[{task}, {number}, {'y' * draw.randrange(600)}]",
                    None if number == 7 else draw.uniform(1e-5, 1e-2),
                    failure="crash" if number == 7 else None,
                    origin="default" if number == 0 else "search", run_id=run, repeats=5,
                )
                for units in (1, 2)
                for number in range(8)
            ]  # fmt: skip
            store.add(records)
            store.set_retimed(key(task, 1), records[1].trace, 0.5e-3)
        store.mark_wrong(key(3, 1), records[2].trace)
        store.finish_run(run, "finished", trials=80)


# -- kinds of damage -------------------------------------------------------------------------------


def flip_bits(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 1, 3, 40))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def overwrite(file: Path, draw: random.Random) -> None:
    with file.open("r+b") as out:
        out.seek(draw.randrange(file.stat().st_size))
        out.write(draw.choice((b"\0", b"\xff", b"SQLite format 3\0")) * draw.randrange(1, 2000))


def truncate(file: Path, draw: random.Random) -> None:
    size = file.stat().st_size
    os.truncate(file, draw.choice((0, 1, 100, size - 1, size // 2, draw.randrange(size))))


def change_values(file: Path, draw: random.Random) -> None:
    table = draw.choice(TABLES)
    odd = draw.choice((None, "", "x", -1, 0, 1e308, b"\x00\xff", "{", "[]", 2**62))
    with statements(file) as db:
        names = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        for trigger in ("insert", "update"):
            db.execute(f"DROP TRIGGER IF EXISTS records_sum_{trigger}")
        with contextlib.suppress(sqlite3.IntegrityError):
            db.execute(
                f"UPDATE {table} SET {draw.choice(names)} = ? WHERE abs(random() % 4) = 0", (odd,)
            )


def change_schema(file: Path, draw: random.Random) -> None:
    with statements(file) as db:
        db.execute(
            draw.choice(
                (
                    f"DROP TABLE {draw.choice(TABLES)}",
                    f"PRAGMA user_version = {draw.choice((0, -5, 1, 3, 99, -(2**31)))}",
                    f"PRAGMA application_id = {draw.choice((0, 7))}",
                    "DROP INDEX records_best",
                    "DROP TRIGGER records_sum_update",
                    f"ALTER TABLE records RENAME COLUMN {draw.choice((*VALUES, 'sum'))} TO y",
                )
            )
        )


def delete_rows(file: Path, draw: random.Random) -> None:
    with statements(file) as db:
        db.execute(f"DELETE FROM {draw.choice(TABLES)} WHERE abs(random() % 3) = 0")


def replace(file: Path, draw: random.Random) -> None:
    file.unlink()
    kind = draw.choice(("fifo", "link", "folder", "text", "device"))
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "link":
        file.symlink_to("/nowhere/at/all")
    elif kind == "folder":
        file.mkdir()
    elif kind == "text":
        file.write_text("no database")
    else:
        file.symlink_to("/dev/zero")


@contextlib.contextmanager
def statements(file: Path):  # type: ignore[no-untyped-def]
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        yield db


KINDS: tuple[Damage, ...] = (
    flip_bits, flip_bits, overwrite, truncate, change_values, change_values, change_schema, delete_rows,
    replace,
)  # fmt: skip


# -- the cases -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder)
    return folder


@pytest.fixture(scope="module")
def written(sound: Path) -> set[Record]:
    return set(answers(sound))


def answers(folder: Path) -> list[Record]:
    """All that a reader asks for; what is left out is counted."""
    with Store(folder, readonly=True) as store:
        found = list(store.records())
        for counts in store.counts():
            store.best(counts.key, 3)
            store.seeds(counts.key)
            store.task(counts.key.task)
        for run in store.runs():
            store.log(run)
        assert not store.damaged or "\n" not in damaged_text(store)
    return found


def use(folder: Path, written: set[Record]) -> None:
    """A reader and a writer, then check and repair."""
    try:
        found = answers(folder)
        assert set(found) <= written, "a record that nobody wrote"
        with Store(folder) as store:
            store.add_task("1", "fused", "{}")
            store.add([Record(key(1, 1), "[new]", 0.25)])
            store.finish_run(store.start_run({}, {"model": "m"}), "finished")
    except (UserError, SetupError):
        check_then_repair(folder, written)
        raise
    check_then_repair(folder, written)


def check_then_repair(folder: Path, written: set[Record]) -> None:
    """A store whose file can be read at all is sound afterwards."""
    try:
        check_store(folder)
        repair_store(folder)
    except (UserError, SetupError):
        return
    with Store(folder) as store:
        found = list(store.records())
        store.runs()
        assert not store.damaged, "left after the repair"
    same = {dataclasses.replace(record, created=0) for record in written}
    new = "[new]"
    assert {dataclasses.replace(r, created=0) for r in found if r.trace != new} <= same
    assert all(finding.damaged == 0 for finding in check_store(folder).values())


def run_case(seed: int, sound: Path, scratch: Path, written: set[Record]) -> str:
    draw = random.Random(seed)
    folder = scratch / str(seed)
    shutil.copytree(sound, folder)
    try:
        for _ in range(draw.choice((1, 1, 1, 2))):
            if not (folder / FILE_NAME).is_symlink() and (folder / FILE_NAME).is_file():
                with contextlib.suppress(sqlite3.Error, OSError, LookupError, ValueError):
                    draw.choice(KINDS)(folder / FILE_NAME, draw)
        return outcome(lambda path: use(path, written), folder)
    finally:
        shutil.rmtree(folder)


def test_a_sound_store_opens(sound: Path, written: set[Record], tmp_path: Path) -> None:
    copy = shutil.copytree(sound, tmp_path / "copy")
    assert outcome(lambda path: use(path, written), copy) == "opened"
    assert len(written) == 192


def test_a_flipped_bit_in_a_number_is_seen(sound: Path, tmp_path: Path) -> None:
    """SQLite itself does not: the row would say another time."""
    copy = shutil.copytree(sound, tmp_path / "copy")
    with statements(copy / FILE_NAME) as db:
        db.execute("DROP TRIGGER records_sum_update")
        db.execute("UPDATE records SET seconds = seconds / 2 WHERE id = 5")
    with Store(copy, readonly=True) as store:
        assert len(list(store.records())) == 191
        assert store.damaged == {("records", 5)}
        assert "1 of the records" in damaged_text(store) and "tune records repair" in damaged_text(
            store
        )


def test_damaged_stores_open_or_are_refused_in_one_line(
    sound: Path, written: set[Record], tmp_path: Path
) -> None:
    run_cases(lambda seed: run_case(seed, sound, tmp_path, written))
