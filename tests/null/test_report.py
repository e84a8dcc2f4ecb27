"""`tune report` without TVM: the page's numbers, that it needs nothing else, and bad input."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from manifests import write_some
from matplotlib.figure import Figure
from report_store import FACTS, add, finished_store, key, machine, start

from gpu_aware_tune.cli.report import report
from gpu_aware_tune.errors import SetupError, TuneError, UserError
from gpu_aware_tune.library.manifest import TaskFacts
from gpu_aware_tune.records.store import Record, Store
from gpu_aware_tune.report.drawing import LIGHT
from gpu_aware_tune.report.figures import model_figure
from gpu_aware_tune.report.history import read_history, task_infos

VOID = {"meta", "br", "link", "img", "input"}


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return finished_store(tmp_path / "db")


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def run(db: Path, *args: str | Path) -> str:
    """Runs the command in a folder beside the store and returns the page."""
    out = db.parent / "page.html"
    words = ["--db", str(db), "-o", str(out), *map(str, args)]
    result = CliRunner().invoke(report, words)
    if isinstance(result.exception, TuneError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return out.read_text()


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    values = json.loads(found[1])
    assert isinstance(values, dict)
    return values


def profile(tuned_at: int, *latency_ms: float) -> dict[str, Any]:
    points = [
        {"units": units, "percent": 25 * units, "batch": 1, "tuned_at": tuned_at, "latency_ms": ms,
         "p10_ms": 0.9 * ms, "p90_ms": 1.1 * ms, "throughput_per_s": 1000 / ms, "efficacy": 0.5}
        for units, ms in zip((1, 2, 4), latency_ms, strict=True)
    ]  # fmt: skip
    return {"model": "net", "unit": "core", "points": points, "knees": {"1": 2}}


def test_the_numbers_of_a_run(db: Path) -> None:
    page = run(db)
    data = data_of(page)
    assert data["units"] == [2, 1]
    assert data["untuned_s"] == {"2": pytest.approx(0.009), "1": pytest.approx(0.018)}
    curve = [(round(p[0], 3), p[1], round(p[3], 6)) for p in data["model_curve"]["2"]]
    assert curve == [(2.0, 0, 0.009), (10.0, 1, 0.007), (12.0, 3, 0.0065), (14.0, 5, 0.0065)]
    assert data["model_curve"]["1"][-1][3] == pytest.approx(0.0155)
    assert data["trials"] == 5
    assert data["candidates"] == 7
    assert data["failures"] == {"build": 1, "wrong": 1}
    assert data["phases_s"]["untuned schedules and seeds"] == pytest.approx(2.0)
    assert data["phases_s"]["search"] == pytest.approx(12.0)
    assert data["latency"][0] == {"units": 2, "untuned_s": 0.0095, "tuned_s": 0.007, "whole": True}
    tasks = {task["name"]: task for task in data["tasks"]}
    assert (tasks["fused_conv2d_relu"]["trials"], tasks["fused_conv2d_relu"]["failed"]) == (3, 2)
    assert tasks["softmax"]["curves"]["1"]["final_s"] == pytest.approx(0.0015)


def test_what_a_person_reads(db: Path) -> None:
    page = run(db)
    text = re.sub(r"<[^>]*>", "", page)
    assert "net on AMD EPYC (znver4)" in text
    assert "2 cores: 9.50 ms → 7.00 ms, 1.36x as fast as untuned (whole library)" in text
    assert "1 core: 19.0 ms → 16.0 ms" in text
    assert "run 1, finished" in text
    assert "2 of 7 candidates failed" in text
    assert "error: no &lt;vector&gt;" in text
    assert "1.02 to 1.02" in text
    row = re.search(r"<th class='text'>softmax</th>(.*?)</tr>", page)
    assert row and re.findall(r"<td>(.*?)</td>", row[1])[:6] == [
        "1", "2", "", "1.00 ms", "500 us", "2.00x",
    ]  # fmt: skip


class Checker(HTMLParser):
    """Collects ids and references, and notices tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def note(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "srcset", "data", "action", "poster"):
                self.links.append(str(value))
            self.links += re.findall(r"url\(([^)]*)\)", value or "")


def test_the_page_is_whole_and_needs_nothing_else(db: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "1.json", profile(1, 4.0, 3.0, 2.9))
    second = write(tmp_path / "4.json", profile(4, 6.0, 3.1, 1.5))
    stock = write(tmp_path / "stock.json", {"stock": [[10, 0.02], [90, 0.008]]})
    page = run(db, "--profile", first, "--profile", second, "--stock", stock)
    assert "http" not in page
    assert "@import" not in page
    assert "file:" not in page
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert {link[0] for link in checker.links} == {"#"}
    assert {link[1:] for link in checker.links} <= set(checker.ids)
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(svgs) == 8
    for svg in svgs:
        ElementTree.fromstring(svg)
        assert not re.search(r"#[0-9a-f]{6}\b", svg), "a color that does not follow the theme"
        assert "font-family" not in svg
    assert len(page) < 400_000


def test_both_themes_and_paper(db: Path) -> None:
    page = run(db)
    light, dark = re.findall(r"--surface: (#\w+);", page)
    assert int(light[1:3], 16) > 200 > 60 > int(dark[1:3], 16)
    assert "@media screen and (prefers-color-scheme: dark)" in page
    assert "@media print" in page


def test_sections_without_data_say_what_gives_it(db: Path) -> None:
    page = run(db)
    missing = re.findall(r'<p class="missing">(.*?)</p>', page)
    assert len(missing) == 3
    assert "benchmarks.vs_metaschedule" in missing[0]
    assert "tune profile LIB --json" in missing[1]
    assert "--tuned-at" in missing[2]


def test_profiles_and_heat_map(db: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "1.json", profile(1, 4.0, 3.0, 2.9))
    second = write(tmp_path / "4.json", profile(4, 6.0, 3.1, 1.5))
    page = run(db, "--profile", first, "--profile", second)
    heat = re.search(r"<h2>Tuned at × run at</h2>.*?</svg>", page, re.DOTALL)
    assert heat
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", heat[0])
    for text in ("4.00 ms", "6.00 ms", "1.50×", "1.93×", "1.03×", "1.50 ms"):
        assert text in texts
    assert texts.count("1.00×") == 3
    assert "tuned at 1 core, knee at 2 = 50 %" in page
    assert "tuned at 4 cores, knee at 2 = 50 %" in page
    assert page.count("2 (knee)") == 2
    assert [p["points"][0]["latency_ms"] for p in data_of(page)["profiles"]] == [4.0, 6.0]


def test_stock_is_compared_on_its_own_tasks(db: Path, tmp_path: Path) -> None:
    def cell(side: str, model: str, seconds: float) -> dict[str, Any]:
        return {
            "cell": {"side": side, "model": model}, "trials": 64, "curve": [[100, seconds]],
            "kernels": {"softmax": {"seconds": seconds, "weight": 1}},
        }  # fmt: skip

    runs = [cell("ours", "net", 1.0), cell("stock", "other", 2.0), cell("stock", "Net", 0.004)]
    page = run(db, "--stock", write(tmp_path / "s.json", {"runs": runs}))
    assert [stock["points"] for stock in data_of(page)["stock"]] == [[[100.0, 0.004]]]
    assert "latency of 1 tasks" in page
    assert "stock TVM, 64 trials" in page
    row = re.search(r"<th class='text'>softmax</th>(.*?)</tr>", page)
    assert row and "<td>4.00 ms</td>" in row[1]


def test_pngs(db: Path, tmp_path: Path) -> None:
    run(db, "--png", tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"model.png", "tasks.png", "tasks-time.png", "time.png", "failures.png"}
    run(db, "--png", tmp_path / "all.png")
    small, whole = (
        path.read_bytes() for path in (tmp_path / "figures/time.png", tmp_path / "all.png")
    )
    assert small[:8] == whole[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(whole[20:24]) > 3 * int.from_bytes(small[20:24])  # heights


def test_weights_from_the_library_s_manifest(tmp_path: Path) -> None:
    with Store(tmp_path / "db") as store:
        run_row = start(store, machine(tasks=None))
        add(store, run_row)
        store.finish_run(run_row.id, "finished")
    plain = run(tmp_path / "db")
    assert "so each counts once here" in plain
    assert data_of(plain)["untuned_s"]["2"] == pytest.approx(0.005)
    write_some(tmp_path / "lib", tasks=(TaskFacts("conv", "1", units=2, weight=3, seconds=1.0),))
    page = run(tmp_path / "db", tmp_path / "lib")
    assert "so each counts once here" not in page
    assert data_of(page)["untuned_s"]["2"] == pytest.approx(0.012)


def test_which_run(db: Path, tmp_path: Path) -> None:
    with Store(db) as store:
        other = start(store, machine(model="other", model_hash="xyz", tasks=None))
        store.finish_run(other.id, "finished")
    assert data_of(run(db))["run"]["id"] == 2
    assert data_of(run(db, "--run", "1"))["run"]["id"] == 1
    write_some(tmp_path / "lib")
    assert data_of(run(db, tmp_path / "lib"))["run"]["id"] == 1


def test_a_run_without_records_is_no_error(tmp_path: Path) -> None:
    with Store(tmp_path / "db") as store:
        start(store)
        page = run(tmp_path / "db", "--png", tmp_path / "figures")
    assert "no latency yet" in page
    assert data_of(page)["trials"] == 0


def test_names_are_escaped(tmp_path: Path) -> None:
    with Store(tmp_path / "db") as store:
        add(store, start(store, machine(model="</script><b>", device="a/b<i>&/c")))
    page = run(tmp_path / "db")
    assert "&lt;/script&gt;&lt;b&gt; on b&lt;i&gt;&amp; (c)" in page
    assert data_of(page)["model"] == "</script><b>"


def test_a_resumed_run_begins_with_what_was_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("gpu_aware_tune.records.store.time.time", lambda: now[0])
    with Store(tmp_path) as store:
        add(store, start(store))
        now[0] = 2000.0
        second = start(store, trials=9)
        known = store.log(second, ["1", "2"])
        assert {entry.run_id for entry in known} == {1}
        add(store, second, [("1", "g", "search", 20.0, (2.0, 6.0), None)])
        now[0] = 3000.0
        fresh = start(store, resume=False)
        add(store, fresh, [("1", "h", "search", 40.0, (3.5, 9.0), None)])
        runs = store.runs()
        first, resumed, anew = (read_history(store, row, task_infos(row)) for row in runs)
    assert first.best_s(2) == pytest.approx(0.0065)  # what came later is no part of it
    assert resumed.known == 5
    assert [(p.trial, round(p.seconds, 6)) for p in resumed.model[2]] == [(0, 0.0065), (1, 0.0045)]
    assert resumed.untuned_s(2) == pytest.approx(0.009)
    assert anew.known == 0
    assert [(p.trial, round(p.seconds, 6)) for p in anew.model[2]] == [(0, 0.009), (1, 0.008)]


def test_a_run_that_found_everything_in_the_store_shows_it_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("gpu_aware_tune.records.store.time.time", lambda: now[0])
    with Store(tmp_path) as store:
        add(store, start(store))
        now[0] = 2000.0
        again = start(store)
        now[0] = 2030.0
        store.finish_run(again.id, "finished", **FACTS)
        again = store.runs()[-1]
        history = read_history(store, again, task_infos(again))
    assert history.trials == 0
    assert [(p.time_s, round(p.seconds, 6)) for p in history.model[2]] == [
        (0.0, 0.0065), (30.0, 0.0065),
    ]  # fmt: skip
    drawing = model_figure(history)
    assert drawing is not None
    figure = Figure()
    drawing.draw(figure, LIGHT)
    assert len(figure.axes) == 1, "there are no trials to show"


def test_second_measurements_count_in_the_table_alone(db: Path) -> None:
    with Store(db) as store:
        store.set_retimed(key("2", 2), "c", 0.0007)
        row = store.runs()[0]
        history = read_history(store, row, task_infos(row))
    softmax = next(task for task in history.tasks if task.name == "softmax")
    assert softmax.curves[2].final_s == 0.0007
    assert softmax.curves[2].best_s == 0.0005


def test_a_quick_number_does_not_win_over_a_second_measurement(db: Path) -> None:
    with Store(db) as store:
        row = store.runs()[0]
        wanted = key("2", 2)
        quick = Record(wanted, "quick", 1e-4, origin="default", created=row.started - 5)
        store.add([quick, Record(wanted, "twice", 2e-4, origin="default", created=row.started - 5)])
        store.set_retimed(wanted, "twice", 3e-4)
        history = read_history(store, row, task_infos(row))
    softmax = next(task for task in history.tasks if task.name == "softmax")
    assert softmax.curves[2].final_untuned_s == softmax.curves[2].final_s == 3e-4
    assert softmax.curves[2].origin == "default"


def test_one_task_s_candidates_do_not_hide_behind_another_target(db: Path) -> None:
    with Store(db) as store:
        row = store.runs()[0]
        other = key("2", 2).__class__("2", row.machine["device"], 2, "llvm -mcpu=other", "0.27.0")
        store.add([Record(other, "z", 1e-6, origin="default", created=row.started - 5)])
        history = read_history(store, row, task_infos(row))
    assert history.untuned_s(2) == pytest.approx(0.009)


BAD = [
    (["--run", "7"], UserError, "--run 7 is not in .*: it has 1 \\(net\\)"),
    (["nowhere"], UserError, "nowhere is no folder"),
    (["--profile", "missing.json"], UserError, "missing.json cannot be read"),
    (["--profile", "text.json"], UserError, "text.json is not JSON"),
    (["--profile", "empty.json"], UserError, "is no profile"),
    (["--profile", "bare.json"], UserError, "has no points"),
    (["--stock", "empty.json"], UserError, "is no curve"),
    (["--stock", "bare.json"], UserError, "has no stock curve of net"),
    (["-o", "."], UserError, "is a folder"),
    (["--png", "text.json/figures"], SetupError, "cannot write --png"),
]


@pytest.mark.parametrize(("args", "kind", "text"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input(
    db: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    kind: type[TuneError],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.json").write_text("no")
    write(tmp_path / "empty.json", {})
    write(tmp_path / "bare.json", {"points": [], "runs": []})
    with pytest.raises(kind, match=text):
        run(db, *args)


def test_no_store_and_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records at"):
        run(tmp_path / "db")
    with Store(tmp_path / "db"):
        pass
    with pytest.raises(UserError, match="holds no run"):
        run(tmp_path / "db")


def test_a_library_of_another_model(db: Path, tmp_path: Path) -> None:
    write_some(tmp_path / "lib", name="vgg", model_hash="?")
    with pytest.raises(UserError, match="no run of vgg: it has 1"):
        run(db, tmp_path / "lib")


def test_without_matplotlib_the_way_to_get_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_aware_tune.report.drawing import to_png

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SetupError, match=r"figures need matplotlib.*gpu-aware-tune\[report\]"):
        to_png([], tmp_path / "figure.png")
