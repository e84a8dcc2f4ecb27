"""Names from models, records and folders of others: they neither run nor control anything."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from report_store import add, machine, start
from rich.table import Table
from rich.text import Text

from gpu_aware_tune.cli import profile as profile_command
from gpu_aware_tune.cli.csv_cells import csv_row
from gpu_aware_tune.cli.main import main
from gpu_aware_tune.cli.records import records
from gpu_aware_tune.cli.report import report
from gpu_aware_tune.display.console import open_console
from gpu_aware_tune.errors import printable
from gpu_aware_tune.profiling.curves import Curve, Point
from gpu_aware_tune.records.store import Record, RecordKey, Store

HOSTILE = "net\x1b[2J\x1b]0;owned\x07\x9b31m\u202etxt.exe\r"
NAMES = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "plain", "a=b", ""]


def raw(text: str) -> set[str]:
    """What in a text would control a terminal."""
    return {c for c in text if not c.isprintable() and c not in "\n\t"}


def test_printable_keeps_lines_and_escapes_the_rest() -> None:
    assert printable("a\tb\nç │ █ 日本") == "a\tb\nç │ █ 日本"
    assert printable("\x1b[2J\x9b\x7f\u202e\ud800\r") == "\\x1b[2J\\x9b\\x7f\\u202e\\ud800\\r"
    assert not raw(printable(HOSTILE))


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_console_prints_no_foreign_control_character(is_terminal: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    stream = Stream()
    console = open_console(stream)
    console.print(HOSTILE)
    console.print(Text(HOSTILE), soft_wrap=True)
    table = Table(HOSTILE, title=HOSTILE, title_style="bold")
    table.add_row(HOSTILE)
    console.print(table)
    text = stream.getvalue()
    assert "\x1b[2J" not in text and "\x1b]0" not in text
    assert not raw(text) - {"\x1b"}
    assert text.count("\\x1b[2J") >= 4
    if not is_terminal:
        assert "\x1b" not in text


def test_cells_that_begin_like_a_formula_are_texts() -> None:
    row = csv_row({str(number): name for number, name in enumerate(NAMES)})
    assert [cell[:2] for cell in row.values()] == [
        "'=",
        "'+",
        "'-",
        "'@",
        "'\t",
        "'\\",
        "pl",
        "a=",
        "",
    ]
    assert csv_row({"seconds": -1.5, "units": -2, "none": None}) == {
        "seconds": -1.5, "units": -2, "none": None,
    }  # fmt: skip


@pytest.fixture
def db(tmp_path: Path) -> Path:
    with Store(tmp_path / "db") as store:
        for number, name in enumerate([*NAMES, HOSTILE]):
            store.add_task(str(number), name, "{}")
            device = "llvm/=cpu\x1b[2J/znver4"
            store.add([Record(RecordKey(str(number), device, 2, "llvm", "0.27"), "[1]", 1e-3)])
    return tmp_path / "db"


def test_records_as_csv_and_table(db: Path) -> None:
    found = CliRunner().invoke(records, ["list", "--csv", "-", "--db", str(db)])
    assert found.exit_code == 0 and not raw(found.stdout)
    names = {row["name"] for row in csv.DictReader(io.StringIO(found.stdout))}
    assert "'=cmd|' /C calc'!A0" in names and "plain" in names
    assert not any(name.startswith(("=", "+", "-", "@", "\t", "\r")) for name in names)
    shown = CliRunner().invoke(records, ["list", "--db", str(db)])
    assert shown.exit_code == 0 and not raw(shown.stdout)
    assert "\\x1b" in shown.stdout


def test_a_profile_as_csv(tmp_path: Path) -> None:
    fields = {field.name: 1 for field in dataclasses.fields(Point)}
    curve = Curve("=1+1", "llvm/a/b", "cores", "core", 2, (Point(**fields),))
    profile_command._write_csv([curve], tmp_path / "curve.csv")
    with (tmp_path / "curve.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["model"] == "'=1+1"


@pytest.mark.parametrize(
    "name", ["$\\frac{$", HOSTILE.replace("\r", ""), "<script>alert(1)</script>"]
)
def test_a_report_takes_any_name(tmp_path: Path, name: str) -> None:
    tasks = [{"hash": "1", "name": name, "weight": 2}, {"hash": "2", "name": "b", "weight": 1}]
    with Store(tmp_path / "db") as store:
        add(store, start(store, machine(model=name, device=f"llvm/{name}/x", tasks=tasks)))
    page, figures = tmp_path / "page.html", tmp_path / "figures"
    args = ["--db", str(tmp_path / "db"), "-o", str(page), "--png", str(figures)]
    result = CliRunner().invoke(report, args)
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert not raw(text) - {"\u2009"}
    assert "<script>alert" not in text
    assert not raw(result.output)


def test_errors_are_printed_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", f"/nowhere/{HOSTILE}"]) == 2
    told = capsys.readouterr().err
    assert "/nowhere/net\\x1b[2J" in told
    assert not raw(told)


def test_tune_run_shows_names_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np
    from manifests import some_manifest

    from gpu_aware_tune.cli import run as run_command
    from gpu_aware_tune.library.latency import LatencyStats

    loaded = SimpleNamespace(about=some_manifest(HOSTILE), units=2, evidence={})
    stats = LatencyStats.of([1e-3])
    run_command._show(loaded, {HOSTILE: np.zeros(3)}, stats)  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert shown.count("\\x1b[2J") == 2
    assert not raw(shown)
