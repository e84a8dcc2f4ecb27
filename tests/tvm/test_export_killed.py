"""An export that is killed, wherever it is: the folder is the old one or the new one, whole."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tiny_library import write_library

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.library import RunFacts, export, folder, recovery
from gpu_aware_tune.library.checks import check_library, check_weights
from gpu_aware_tune.library.manifest import read_manifest
from gpu_aware_tune.model.importer import Model

OLD, NEW = 2, 3  # the units of the one library in there
# Where something happens to files: every line of these is a place to be killed at.
PLACES = (folder.__file__, recovery.__file__, shutil.__file__, os.__file__)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    return write_library(tmp_path_factory.mktemp("killed"))


def killed_at(number: int) -> Any:
    """A trace function that ends this process at the nth line of those modules."""
    left = number

    def line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return line

    return lambda frame, event, argument: line if frame.f_code.co_filename in PLACES else None


def export_until(number: int, model: Model, library: Path, target: Path) -> bool:
    """Export in a forked child that is killed at a line; whether it was, and did not end before."""
    pid = os.fork()
    if pid == 0:
        try:
            sys.settrace(killed_at(number))
            export(target, model, {NEW: library}, RunFacts())
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def whole(target: Path) -> int:
    """Check everything that is in a folder, and give the units of its library."""
    manifest = read_manifest(target)
    check_weights(target, manifest)
    (units,) = manifest.units
    check_library(target, manifest, units)
    return units


def kills(tiny: tuple[Model, Path], target: Path, step: int) -> Iterator[int]:
    """Kill an export that replaces a folder at one line after the other; what is there then."""
    model, source = tiny
    library = source / "lib-2.so"
    export(target, model, {OLD: library}, RunFacts())
    aside = target.with_name("aside")
    shutil.copytree(target, aside)
    number = 1
    while export_until(number, model, library, target):
        yield whole(target)
        if number % 10 == 1:  # what is left hinders no later export
            export(target, model, {NEW: library}, RunFacts())
            assert sorted(path.name for path in target.parent.iterdir()) == ["aside", target.name]
        for left in target.parent.iterdir():
            if left != aside:
                shutil.rmtree(left)
        shutil.copytree(aside, target)
        number += step
    yield whole(target)


@pytest.mark.parametrize("swaps", [True, False], ids=["in one step", "two renames"])
def test_a_killed_export_leaves_the_old_folder_or_the_new_one(
    tiny: tuple[Model, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    if not swaps:
        monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    found = list(kills(tiny, tmp_path / "out" / "tiny.tuned", 1))
    assert len(found) > 50, "the places that an export was killed at"
    assert found == sorted(found), "first the old one, and from some point on the new one"
    assert {OLD, NEW} == set(found)
    print(f"{len(found)} places, {found.count(OLD)} of them leave the old folder")


def test_a_killed_first_export_leaves_nothing_or_the_whole(
    tiny: tuple[Model, Path], tmp_path: Path
) -> None:
    model, source = tiny
    target = tmp_path / "tiny.tuned"
    number = 1
    while export_until(number, model, source / "lib-2.so", target):
        if target.exists():
            assert whole(target) == NEW
        for left in tmp_path.iterdir():
            shutil.rmtree(left)
        number += 5
    assert whole(target) == NEW


def test_an_export_that_fails_between_two_renames_puts_the_old_folder_back(
    tiny: tuple[Model, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source = tiny
    target = tmp_path / "tiny.tuned"
    export(target, model, {OLD: source / "lib-2.so"}, RunFacts())
    rename = Path.rename

    def failing(self: Path, goal: Path) -> Path:
        if self.name.endswith(recovery.PARTIAL):
            raise OSError(28, "No space left on device")
        return rename(self, goal)

    monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(SetupError, match="No space left"):
        export(target, model, {NEW: source / "lib-2.so"}, RunFacts())
    assert whole(target) == OLD
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
