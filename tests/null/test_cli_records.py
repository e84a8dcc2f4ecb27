"""`tune records` without TVM: list, best, prune, their forms, and what users get wrong."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gpu_aware_tune.cli.records import records
from gpu_aware_tune.errors import SetupError, TuneError, UserError
from gpu_aware_tune.records.store import FILE_NAME, Record, RecordKey, Store

CONV = RecordKey("111222", "llvm/cpu/znver5", 2, "llvm -mcpu=znver5", "0.27.0")
HALF = RecordKey("111222", "llvm/cpu/znver5", 1, "llvm -mcpu=znver5", "0.27.0")
CUDA = RecordKey("333", "cuda/NVIDIA H200/sm_90a", 32, "cuda -arch=sm_90a", "0.27.0")


@pytest.fixture
def db(tmp_path: Path) -> Path:
    old = time.time() - 10 * 86400
    with Store(tmp_path) as store:
        store.add_task("111222", "fused_conv2d_relu", "{}")
        store.add(
            [
                Record(CONV, "[1]", 0.004, origin="default", created=1e9),
                Record(CONV, "[2]", 0.001, retimed=0.002, partition="cores"),
                Record(CONV, "[3]", 0.003, origin="seed"),
                Record(CONV, "[4]", failure="crash", failure_text="signal 11\nin f", created=old),
                Record(CONV, "[5]", failure="timeout", created=time.time() - 86400),
                Record(CONV, "[6]", 0.0001, wrong=True),
                Record(HALF, "[2]", 0.005),
                Record(CUDA, "[7]", 0.00002),
            ]
        )
    return tmp_path


def run(*args: str | Path) -> str:
    """Runs a command and returns what it prints; an error of ours is raised as it is."""
    result = CliRunner().invoke(records, [str(arg) for arg in args])
    if isinstance(result.exception, TuneError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def rows(*args: str | Path) -> list[dict[str, Any]]:
    found = json.loads(run(*args, "--json"))
    assert isinstance(found, list)
    return found


def test_list_as_json(db: Path) -> None:
    found = {(row["task"], row["units"]): row for row in rows("list", "--db", db)}
    assert found["111222", 2] == {
        "task": "111222", "name": "fused_conv2d_relu", "device": "llvm/cpu/znver5", "units": 2,
        "target": "llvm -mcpu=znver5", "tvm": "0.27.0", "trials": 6, "failures": 2, "wrong": 1,
        "best_s": 0.002, "default_s": 0.004, "gain": 2.0,
    }  # fmt: skip
    assert (found["333", 32]["name"], found["333", 32]["gain"]) == ("", None)
    assert len(found) == 3


def test_list_as_table(db: Path) -> None:
    text = run("list", "--db", db)
    line = next(line for line in text.splitlines() if "fused_conv2d_relu" in line and " 6 " in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == [
        "111222", "fused_conv2d_relu", "llvm/cpu/znver5", "2", "6", "2", "1", "2", "4", "2.00x",
    ]  # fmt: skip
    assert "cuda/NVIDIA H200/sm_90a" in text
    alone = run("list", "--db", db, "--device", "h200")
    assert alone.splitlines()[0].strip() == "cuda/NVIDIA H200/sm_90a"
    assert alone.count("H200") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--task", "conv2d"], [1, 2]),
        (["--task", "333"], [32]),
        (["--task", "33"], [32]),
        (["--task", "222"], []),
        (["--device", "CPU"], [1, 2]),
        (["--units", "2"], [2]),
        (["--units", "1", "--device", "cuda"], []),
    ],
)
def test_filters(db: Path, options: list[str], expected: list[int]) -> None:
    assert sorted(row["units"] for row in rows("list", "--db", db, *options)) == expected
    assert sorted(row["units"] for row in rows("best", "--db", db, *options)) == expected


def test_list_as_csv(db: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    text = run("list", "--trials", "--db", db, "--csv", "-")
    assert run("list", "--trials", "--db", db, "--csv", file) == ""
    assert file.read_text() == text
    assert b"\r" not in file.read_bytes()
    found = list(csv.DictReader(io.StringIO(text)))
    assert len(found) == 8
    crash = next(row for row in found if row["failure"] == "crash")
    assert (crash["failure_text"], crash["seconds"]) == ("signal 11\nin f", "")
    assert {row["created"] for row in found} >= {"2001-09-09T01:46:40+00:00"}


def test_list_trials_as_table_and_json(db: Path) -> None:
    text = run("list", "--trials", "--db", db, "--task", "conv")
    assert [text.count(word) for word in ("crash", "timeout", "seed")] == [1, 1, 1]
    assert len(rows("list", "--trials", "--db", db)) == 8


def test_best(db: Path) -> None:
    found = rows("best", "--db", db, "--units", "2", "-k", "2")
    assert [(row["place"], row["best_s"], row["trace"]) for row in found] == [
        (1, 0.002, "[2]"),
        (2, 0.003, "[3]"),
    ]
    assert [(row["gain"], row["origin"], row["retimed"]) for row in found] == [
        (2.0, "search", True),
        (0.004 / 0.003, "seed", False),
    ]
    table = run("best", "--db", db)
    assert "cores" in table
    assert "[2]" not in table, "traces are too long for a table"


def test_nothing_found(db: Path) -> None:
    assert run("list", "--db", db, "--task", "none") == "no records match\n"
    assert rows("list", "--db", db, "--task", "none") == []
    assert run("list", "--db", db, "--task", "none", "--csv", "-").count("\n") == 1


def test_looking_does_not_close_a_run_that_goes_on(db: Path) -> None:
    with Store(db) as writer:
        writer.start_run({}, {})
        run("list", "--db", db)
        run("best", "--db", db)
        assert [row.status for row in writer.runs()] == ["running"]


def test_check_and_repair(db: Path) -> None:
    assert "8 records" in run("check", "--db", db)
    assert "damaged" not in run("check", "--db", db)
    with contextlib.closing(sqlite3.connect(db / FILE_NAME, isolation_level=None)) as raw:
        raw.execute("DROP TRIGGER records_sum_update")
        raw.execute("UPDATE records SET seconds = 9 WHERE id = 1")
        total = raw.execute("SELECT COUNT(*) FROM records").fetchone()[0]
    done = CliRunner().invoke(records, ["check", "--db", str(db)])
    assert isinstance(done.exception, SetupError) and f"repair --db {db}" in str(done.exception)
    assert f"{total - 1} records (1 damaged)" in done.output
    warned = CliRunner().invoke(records, ["list", "--trials", "--db", str(db)])
    assert "damaged rows are left out (1 of the records)" in warned.stderr
    assert f"{total - 1} records (1 damaged)" in run("repair", "--db", db)
    assert "damaged" not in run("check", "--db", db)
    assert len(list(db.glob("*.damaged-*"))) == 1, "the old file stays"


def test_a_column_of_sums_under_another_name_is_no_store_without_sums(db: Path) -> None:
    """One flipped bit of the schema: what was changed besides must not be taken for sound."""
    with contextlib.closing(sqlite3.connect(db / FILE_NAME, isolation_level=None)) as raw:
        for event in ("insert", "update"):
            raw.execute(f"DROP TRIGGER records_sum_{event}")
        raw.execute("UPDATE records SET seconds = 9 WHERE id = 1")
        raw.execute("ALTER TABLE records RENAME COLUMN sum TO sux")
        total = raw.execute("SELECT COUNT(*) FROM records").fetchone()[0]
    assert f"{total - 1} records (1 damaged)" in run("repair", "--db", db)
    assert "damaged" not in run("check", "--db", db)


def test_prune(db: Path) -> None:
    before = (db / FILE_NAME).read_bytes()
    dry = run("prune", "--keep", "1", "--failures", "--wrong", "--db", db, "--dry-run")
    assert dry == "4 of 8 records would be removed\n"
    assert (db / FILE_NAME).read_bytes() == before
    done = run("prune", "--failures", "--older-than", "5", "--db", db)
    assert done == "1 of 8 records removed\n"
    assert run("prune", "--failures", "--db", db) == "1 of 7 records removed\n"
    assert run("prune", "--keep", "1", "--db", db) == "1 of 6 records removed\n"
    assert run("prune", "--wrong", "--db", db) == "1 of 5 records removed\n"
    assert [row["trials"] for row in rows("list", "--db", db, "--units", "2")] == [2]


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        (["list", "--json", "--csv", "-"], UserError, "give one of them"),
        (["list", "--csv", "/nowhere/x.csv"], SetupError, "cannot write --csv /nowhere/x.csv"),
        (["prune"], UserError, "nothing to prune; give --keep N"),
        (["prune", "--wrong", "--older-than", "3"], UserError, "give --failures too"),
        (["import", "/nowhere"], UserError, "/nowhere is not a folder"),
    ],
)
def test_mistakes(db: Path, args: list[str], error: type[TuneError], text: str) -> None:
    with pytest.raises(error) as raised:
        run(*args, "--db", db)
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("command", [["list"], ["best"], ["export", "x"], ["prune", "--wrong"]])
def test_no_store_is_said_and_not_created(tmp_path: Path, command: list[str]) -> None:
    with pytest.raises(UserError, match=r"no records at .*none.* tune a model first"):
        run(*command, "--db", tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_store_is_one_line(db: Path) -> None:
    (db / FILE_NAME).write_bytes(b"x" * 5000)
    with pytest.raises(SetupError, match="not a record store or is damaged"):
        run("list", "--db", db)


def test_options_out_of_range_are_refused(db: Path) -> None:
    for args in (["prune", "--keep", "-1"], ["best", "-k", "0"], ["list", "--units", "two"]):
        result = CliRunner().invoke(records, [*args, "--db", str(db)])
        assert result.exit_code == 2


def test_a_store_of_the_future(db: Path) -> None:
    connection = sqlite3.connect(db / FILE_NAME)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(SetupError, match="has schema 99"):
        run("best", "--db", db)
