"""Of each task's artifacts the fastest are kept, on each of its units; the files of others go."""

from __future__ import annotations

import random
from pathlib import Path

from gpu_aware_tune.search.best_artifacts import _MOST, BestArtifacts


def made(folder: Path, name: str) -> str:
    path = folder / name
    path.write_text(name)
    return str(path)


def test_the_fastest_on_any_units_are_kept(tmp_path: Path) -> None:
    best, draw = BestArtifacts(), random.Random(0)
    times = {f"t{n}": {1: draw.random(), 2: draw.random()} for n in range(40)}
    for trace, seconds in times.items():
        best.offer("task", [trace], made(tmp_path, trace), seconds)
    wanted = {
        trace for units in (1, 2) for trace in sorted(times, key=lambda t: times[t][units])[:_MOST]
    }
    assert {path.name for path in tmp_path.iterdir()} == wanted
    assert {trace for trace in times if best.path_of("task", trace)} == wanted
    assert best.path_of("other", next(iter(wanted))) is None
    best.clear()
    assert not list(tmp_path.iterdir())


def test_what_failed_is_removed_and_twins_share_a_file(tmp_path: Path) -> None:
    best = BestArtifacts()
    best.offer("task", ["failed"], made(tmp_path, "failed"), {1: None})
    best.offer("task", ["one", "twin"], made(tmp_path, "one"), {1: 1.0, 2: None})
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert best.path_of("task", "one") == best.path_of("task", "twin") == str(tmp_path / "one")
    for number in range(_MOST):
        best.offer("task", [f"f{number}"], made(tmp_path, f"f{number}"), {1: 0.1})
    assert best.path_of("task", "twin") is None
    assert not (tmp_path / "one").exists()


def test_tasks_do_not_compete(tmp_path: Path) -> None:
    best = BestArtifacts()
    for number in range(3 * _MOST):
        best.offer(f"task{number}", ["t"], made(tmp_path, f"{number}"), {1: float(number)})
    assert len(list(tmp_path.iterdir())) == 3 * _MOST
