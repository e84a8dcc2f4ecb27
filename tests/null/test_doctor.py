"""What `tune doctor` knows: version clashes, missing tools, folders that cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_aware_tune.cli import machine
from gpu_aware_tune.cli.doctor import lines
from gpu_aware_tune.cli.machine import Check
from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.partition.linking import find_compiler, find_linker

PINS = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}


@pytest.fixture(autouse=True)
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine with the pinned versions; a test changes what it is about."""
    have = {**PINS, "numpy": "2.4.6"}
    monkeypatch.setattr(machine, "installed", have.get)
    monkeypatch.setattr(machine, "required", lambda package: PINS.get(package, ""))
    return have


def test_the_known_clash_of_tvm_and_its_ffi_is_a_failure() -> None:
    check = machine.ffi_check("0.27.0.post1", "0.1.15.post2")
    assert (check.status, "crashes" in check.value) == ("fail", True)
    assert check.fix == "pip install apache-tvm-ffi==0.1.14.post1"
    assert machine.ffi_check("0.27.0.post1", "0.1.14.post1").status == "ok"


def test_packages_missing_or_of_another_version(versions: dict[str, str]) -> None:
    assert machine.package_check("apache-tvm", "the compiler").status == "ok"
    versions["apache-tvm"] = "0.28.0"
    other = machine.package_check("apache-tvm", "the compiler")
    assert (other.status, other.value) == ("warn", "0.28.0, tested with 0.27.0.post1")
    missing = machine.package_check("onnx", "reads models")
    assert (missing.status, missing.fix) == ("fail", "pip install onnx")


@pytest.mark.parametrize(
    ("full", "cpu", "status"),
    [(None, None, "fail"), ("3.2", None, "ok"), (None, "3.2", "ok"), ("3.2", "3.2", "warn")],
)
def test_the_two_distributions_of_xgboost(full: str | None, cpu: str | None, status: str) -> None:
    check = machine.xgboost_check(full, cpu)
    assert check.status == status
    assert bool(check.fix) == (status != "ok" or full is not None)


def test_no_compiler_is_a_set_up_error_that_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="install gcc"):
        find_compiler()
    for name in ("cc", "gcc"):
        (tmp_path / name).touch(0o755)
    assert find_compiler() == str(tmp_path / "gcc"), "the first that TVM would try"
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SetupError, match="no-such-compiler"):
        find_compiler()


def test_no_compiler_is_a_failure_and_no_linker_only_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    found = {check.name: check.status for check in machine._toolchain()}
    assert found == {"compiler": "fail", "linker": "warn"}


def test_a_linker_is_found_else_the_compiler_in_front_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="install binutils"):
        find_linker()
    (tmp_path / "gcc").touch(0o755)
    assert find_linker() == [str(tmp_path / "gcc"), "-nostdlib"]
    with pytest.raises(SetupError, match="install binutils"):
        find_linker(packs=True)
    (tmp_path / "ld").touch(0o755)
    assert find_linker() == find_linker(packs=True) == [str(tmp_path / "ld")]


def test_a_folder_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    assert machine.folder_check("records", tmp_path / "new" / "folder").status == "ok"
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    check = machine.folder_check("records", file / "inside")
    assert (check.status, "--db" in check.fix) == ("fail", True)


def test_lines_align_and_put_the_fix_below() -> None:
    found = [Check("a", "ok", "fine"), Check("longer", "warn", "odd", "mend it")]
    assert lines(found) == ["  ok  a       fine", "WARN  longer  odd", " " * 14 + "-> mend it"]
