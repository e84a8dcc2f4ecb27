"""The record store: what it keeps and what it finds."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpu_aware_tune.records.store import Record, RecordKey, Store

KEY = RecordKey("123", "llvm/cpu/znver5", 2, "llvm -mcpu=znver5", "0.27.0")


def trace(number: int) -> str:
    return f'[[["GetSBlock",[],["conv","main"],["b0"]]],[[0,[{number},1]]]]'


def record(
    number: int, seconds: float | None = None, key: RecordKey = KEY, **more: object
) -> Record:
    return replace(Record(key, trace(number), seconds), **more)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path) as opened:
        yield opened


def numbers(records: list[Record]) -> list[int]:
    return [int(item.trace.rpartition("[")[2].partition(",")[0]) for item in records]


def tables(path: Path, query: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


def test_a_record_comes_back_as_it_was(store: Store) -> None:
    full = Record(
        KEY, trace(1), 0.25, "timeout", "5 s passed", "seed", 0.01, 7, 3, 1e9, "cores", "coarse",
        True, 0.5,
    )  # fmt: skip
    assert store.add([full, record(2)]) == 2
    assert store.all(KEY)[0] == full
    assert store.all(KEY)[1].seconds is None


def test_best_is_fastest_first_without_failures_and_wrong_kernels(store: Store) -> None:
    store.add([record(i, i / 10) for i in (5, 3, 4, 1, 2)])
    store.add([record(6, failure="crash"), record(7), record(8, 0.01, wrong=True)])
    store.add([record(9, 0.001, failure="timeout")])
    assert numbers(store.best(KEY, 3)) == [1, 2, 3]
    assert numbers(store.best(KEY)) == [1]
    store.mark_wrong(KEY, trace(1))
    assert numbers(store.best(KEY, 9)) == [2, 3, 4, 5]
    store.set_retimed(KEY, trace(2), 0.45)
    assert numbers(store.best(KEY, 9)) == [3, 4, 2, 5]
    assert store.best(KEY, 3)[2].best_s == 0.45
    assert store.known(KEY) == 9


def test_keys_do_not_mix(store: Store) -> None:
    others = [
        replace(KEY, task="124"), replace(KEY, device="x"), replace(KEY, units=1),
        replace(KEY, target="llvm"), replace(KEY, tvm="0.28"),
    ]  # fmt: skip
    for number, key in enumerate(others):
        store.add([record(number, 0.1, key)])
    assert store.best(KEY) == []
    assert store.known(KEY) == 0
    assert [numbers(store.best(key)) for key in others] == [[0], [1], [2], [3], [4]]


def test_measuring_again_changes_a_record_only_when_told(store: Store) -> None:
    store.add([record(1, 0.5)])
    assert store.add([record(1, 0.1)]) == 0
    assert store.best(KEY)[0].seconds == 0.5
    assert store.add([record(1, 0.1)], replace=True) == 1
    assert store.best(KEY)[0].seconds == 0.1
    assert store.add([record(1, failure="lost")]) == 0
    assert store.known(KEY) == 1


def test_a_measurement_takes_the_place_of_a_failure(store: Store) -> None:
    store.add([record(1, failure="lost", failure_text="worker died")])
    assert store.add([record(1, 0.1)]) == 1
    assert store.all(KEY) == [replace(store.best(KEY)[0], failure=None, failure_text=None)]


def test_measuring_again_makes_no_kernel_right(store: Store) -> None:
    store.add([record(1, 0.5)])
    store.mark_wrong(KEY, trace(1))
    store.add([record(1, 0.1)], replace=True)
    assert store.best(KEY) == []
    assert store.all(KEY)[0].wrong


def test_a_wrong_kernel_is_wrong_on_every_share_of_its_device(store: Store) -> None:
    half, elsewhere = replace(KEY, units=1), replace(KEY, device="other")
    store.add([record(1, 0.5, key) for key in (KEY, half, elsewhere)])
    store.mark_wrong(KEY, trace(1))
    assert [len(store.best(key)) for key in (KEY, half, elsewhere)] == [0, 0, 1]


def test_a_batch_is_kept_whole_or_not_at_all(store: Store) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        store.add([record(1, 0.1), record(2, 0.1, origin=None)])
    assert store.all(KEY) == []
    assert store.add([record(3, 0.1)]) == 1
    assert numbers(store.all(KEY)) == [3]


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_times_are_refused(store: Store, seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds"):
        store.add([record(1, 0.5), record(2, seconds)])
    with pytest.raises(ValueError, match="seconds"):
        store.set_retimed(KEY, trace(1), seconds)
    assert store.all(KEY) == []


def test_one_trace_on_several_shares_is_kept_once(store: Store) -> None:
    store.add([record(1, 0.1, replace(KEY, units=units)) for units in range(1, 9)])
    assert tables(store.path, "SELECT COUNT(*) FROM traces") == [(1,)]


def test_seeds_come_nearest_first_and_only_where_they_can_work(store: Store) -> None:
    def put(number: int, seconds: float, **key: object) -> None:
        store.add([record(number, seconds, replace(KEY, **key))])  # type: ignore[arg-type]

    put(3, 0.1, device="elsewhere")
    put(2, 0.1, units=64)
    put(1, 0.9, units=1)
    put(4, 0.1, target="cuda -arch=sm_90a")
    put(5, 0.1, units=3)
    put(6, 0.1, task="another")
    store.add([record(5, 0.1)])  # known under the key itself
    put(7, 0.1, units=5)
    store.mark_wrong(replace(KEY, units=5), trace(7))
    put(7, 0.1, device="elsewhere")  # the same schedule, not yet found out
    assert numbers(store.seeds(KEY)) == [1, 2, 3]
    assert numbers(store.seeds(KEY, 2)) == [1, 2]
    assert sorted(numbers(store.for_task("123"))) == [1, 2, 3, 4, 5, 5]


def test_counts(store: Store) -> None:
    store.add_task("123", "conv", "{}")
    store.add([record(1, 0.4, origin="default"), record(2, 0.1), record(3, failure="crash")])
    store.add([record(4, 0.01, wrong=True), record(5, 0.9, replace(KEY, task="9"))])
    unnamed, named = store.counts()
    assert (unnamed.name, unnamed.trials, unnamed.default_s) == ("", 1, None)
    assert (named.name, named.trials, named.failures, named.wrong) == ("conv", 4, 1, 1)
    assert (named.best_s, named.default_s, named.key) == (0.1, 0.4, KEY)
    assert store.counts("123") == [named]
    assert len(list(store.records())) == 5


def test_tasks_are_kept_once(store: Store) -> None:
    module = '{"nodes": ["ü"]}' * 100
    store.add_task("123", "conv", module, '[["TENSOR"]]')
    store.add_task("123", "other", "{}")
    task = store.task("123")
    assert task is not None
    assert (task.name, task.module, task.args) == ("conv", module, '[["TENSOR"]]')
    assert store.task("124") is None


def test_runs(store: Store) -> None:
    run = store.start_run({"gpu_pct": (30,), "db": Path("x")}, {"cores": 2})
    assert [row.status for row in store.runs()] == ["running"]
    store.finish_run(run, "done", drift=0.01, core_seconds={"build": 3.5})
    (row,) = store.runs()
    assert (row.id, row.status, row.settings["db"]) == (run, "done", "x")
    assert row.machine == {"cores": 2, "pid": os.getpid()}
    assert row.facts["core_seconds"]["build"] == 3.5
    assert row.finished is not None
    assert row.finished >= row.started


def test_prune(store: Store) -> None:
    day = 86400.0
    store.add([record(i, i / 10) for i in range(1, 6)] + [record(9, 0.9, origin="default")])
    store.add([record(i, i / 10, replace(KEY, units=1)) for i in range(1, 4)])
    store.add([record(20, failure="crash", created=time.time() - 3 * day)])
    store.add([record(21, failure="crash"), record(22, 0.01, wrong=True)])
    assert store.prune(keep=2, failures_older_s=day, wrong=True, dry_run=True) == 6
    assert store.known(KEY) == 9
    assert store.prune(keep=2, failures_older_s=day, wrong=True) == 6
    assert numbers(store.all(KEY)) == [1, 2, 9, 21]
    assert numbers(store.all(replace(KEY, units=1))) == [1, 2]
    assert store.prune(failures_older_s=0) == 1
    assert tables(store.path, "SELECT COUNT(*) FROM traces") == [(3,)]
    store.add([record(21, 0.5)])
    assert store.prune(keep=0) == 5
    assert numbers(store.all(KEY)) == [9]
    assert store.prune() == 0
    store.add([record(30, 0.3, replace(KEY, units=7)), record(31, 0.3, replace(KEY, units=1))])
    assert numbers(store.all(replace(KEY, units=1))) == [31]


def test_pruning_gives_room_back(store: Store) -> None:
    noise = [os.urandom(500).hex() for _ in range(500)]
    store.add([Record(KEY, text, 0.1 + i / 1e3) for i, text in enumerate(noise)])
    store.prune(keep=0)
    store.close()
    assert store.path.stat().st_size < 100_000


def test_threads_share_a_store(store: Store) -> None:
    def work(first: int) -> None:
        for number in range(first, first + 25):
            store.add([record(number, 0.1)])
            assert store.best(KEY)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 100, 200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.known(KEY) == 100
