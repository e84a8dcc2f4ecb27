"""`tune plan` and the saving of curves: files in, tables and pages out, and one line for mistakes."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT
from manifests import some_manifest
from plan_instances import GPU, curve

from gpu_aware_tune.cli.main import main
from gpu_aware_tune.errors import UserError
from gpu_aware_tune.library.manifest import write_manifest
from gpu_aware_tune.model.importer import TensorSpec
from gpu_aware_tune.planning.curve_file import read_curve
from gpu_aware_tune.planning.fleet import read_fleet
from gpu_aware_tune.planning.planner import plan_workload
from gpu_aware_tune.planning.schedule import PlanObjective, plan_from_dict
from gpu_aware_tune.profiling.curves import Curve, Point
from gpu_aware_tune.profiling.profiles import group_by_model

Capture = pytest.CaptureFixture[str]

FLEET = """
margin = 1.2
batching = "padded"
objective = "units"

[device]
name = "GPU"
units = 132

[[models]]
curve = "curves/a.json"
rate = 50
slo = "50ms"

[[models]]
name = "b2"
curve = "curves/b.json"
rate = 30.5
slo = "0.1s"
percentile = 95
weight = 2
cv = 1

[interference]
default = 1.1
"a,b2" = 1.3
"""


def save_curve(path: Path, name: str, device: str = "cuda/GPU/sm_90a", units: int = 132) -> None:
    """Writes a curve as `tune profile --save` does."""
    points = [
        Point(p.units, 1, p.batch, p.units, p.latency_ms, p.latency_ms, p.p90_ms, 1.0, 1.0, 1)
        for p in curve(name, GPU).points
    ]
    made = Curve(name, device, "green", "SM", units, tuple(points))
    path.write_text(json.dumps(made.as_dict()))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with curves of three models, two tuned folders and a fleet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "curves").mkdir()
    for name in "abc":
        save_curve(tmp_path / "curves" / f"{name}.json", name)
    for name in "ad":
        (tmp_path / f"{name}.tuned").mkdir()
        manifest = json.dumps({"model": {"name": name}})
        (tmp_path / f"{name}.tuned" / "manifest.json").write_text(manifest)
    (tmp_path / "fleet.toml").write_text(FLEET)
    return tmp_path


def test_folders_and_curves_make_a_table(folder: Path, capsys: Capture) -> None:
    args = ["a.tuned", "curves/b.json", "--rate", "50,20", "--slo", "50ms,0.1s"]
    assert main(["plan", *args, "--simulate", "1s", "--policy", "plan,d-stack"]) == 0
    out = capsys.readouterr().out
    assert "GPU, 132 SMs: fits: " in out
    assert re.search(r"^A +a +50 +50 ", out, re.MULTILINE)
    assert re.search(r"^lane +0 +units +0-\d+ +\|[AB.]{48}\| [\d.]+ ms$", out, re.MULTILINE)
    assert re.search(r"^d-stack +all ", out, re.MULTILINE)


def test_what_does_not_fit_is_explained_and_placed(folder: Path, capsys: Capture) -> None:
    args = ["curves/a.json", "curves/b.json", "--rate", "900,700", "--slo", "50ms"]
    assert main(["plan", *args]) == 0
    out = capsys.readouterr().out
    assert "does not fit: " in out
    assert re.search(r"^why: [ab]: \d+ requests/s within 50 ms at p99 need ", out, re.MULTILINE)
    assert "would help: 2 devices of this kind" in out
    assert "device 2 of 2" in out


def test_json_keeps_its_schema_and_is_read_back(folder: Path, capsys: Capture) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "gpu_aware_tune/planning/plan.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    for rate in ("50,20", "900,700"):
        args = ["curves/a.json", "curves/b.json", "--rate", rate, "--slo", "50ms"]
        assert main(["plan", *args, "--simulate", "1s", "--json", "-o", "plan.json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert json.loads(Path("plan.json").read_text()) == facts
        assert [error.message for error in validator.iter_errors(facts)] == []
        made = plan_from_dict(facts, "plan.json")
        assert made.fits == (rate == "50,20")
        assert len(facts["devices"]) == (0 if made.fits else 2)
        assert facts["simulation"][0]["policy"] == "plan"
    facts["lanes"][0]["units"] = "8"
    assert list(validator.iter_errors(facts))


class _Tags(HTMLParser):
    """Counts the elements of a page, and finds what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_else_and_follows_the_readers_colors(folder: Path) -> None:
    save_curve(Path("curves/odd.json"), "<odd> & co")
    args = ["curves/a.json", "curves/odd.json", "--rate", "50", "--slo", "50ms"]
    assert main(["plan", *args, "--simulate", "1s", "--html", "plan.html", "--json"]) == 0
    text = Path("plan.html").read_text()
    page = _Tags()
    page.feed(text)
    assert page.loads == []
    assert page.tags.count("rect") > 16
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r'fill="#|fill="(?!var\()', text)  # no color of its own
    assert "<odd>" not in text and "&lt;odd&gt; &amp; co" in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert [model["model"] for model in json.loads(data[1])["models"]] == ["a", "<odd> & co"]


def test_a_fleet_is_a_file(folder: Path, capsys: Capture) -> None:
    fleet = read_fleet(Path("fleet.toml"))
    assert (fleet.margin, fleet.batching, fleet.objective) == (1.2, "padded", PlanObjective.UNITS)
    assert [(d.model, d.rate_per_s, d.slo_s, d.weight, d.cv) for d in fleet.demands] == [
        ("a", 50, 0.05, 1, 0),
        ("b2", 30.5, 0.1, 2, 1),
    ]
    assert fleet.interference.factor("a", "b2") == 1.3
    assert fleet.interference.factor("b2", "a") == 1.1
    assert main(["plan", "fleet.toml", "--json", "--margin", "1.1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["margin"] == 1.1
    assert facts["objective"] == "units"
    expected = plan_workload(
        dataclasses.replace(fleet, margin=1.1).workload(), PlanObjective.UNITS, 1.1
    )
    assert plan_from_dict(facts, "") == expected


BOTH = ["curves/a.json", "curves/b.json"]
GOOD = [*BOTH, "--rate", "50", "--slo", "50ms"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "no SOURCE given: name tuned folders, curves, or a fleet.toml"),
        (BOTH, 2, "--rate is missing: give one for each model, such as 120,40"),
        ([*BOTH, "--rate", "5"], 2, "--slo is missing"),
        ([*BOTH, "--rate", "5,6,7", "--slo", "50ms"], 2, "--rate 5,6,7: 3 values for 2 models"),
        ([*BOTH, "--rate", "5,x", "--slo", "50ms"], 2, "--rate '5,x' is no list of numbers"),
        ([*BOTH, "--rate", "-5", "--slo", "50ms"], 2, "rate -5 of a is not allowed: give requests"),
        ([*BOTH, "--rate", "nan", "--slo", "50ms"], 2, "rate nan of a is not allowed"),
        ([*BOTH, "--rate", "5", "--slo", "50"], 2, "slo '50' is no latency above 0: give a form"),
        ([*BOTH, "--rate", "5", "--slo", "0ms"], 2, "slo '0ms' is no latency above 0"),
        ([*BOTH, "--rate", "5", "--slo", "50ms,1s,2s"], 2, "--slo 50ms,1s,2s: 3 values for 2"),
        ([*BOTH, "--rate", "5", "--slo", "5ms"], 2, "slo 5ms of a is below the best that can be"),
        ([*GOOD, "--percentile", "30"], 2, "percentile 30 of a is not allowed"),
        ([*GOOD, "--weight", "0"], 2, "weight 0 of a is not allowed"),
        ([*GOOD, "--device", "H100"], 2, "--device 'H100' is not NAME, N SMs"),
        (
            [*GOOD, "--device", "A100, 108 SMs"],
            2,
            "the curve of a was measured on GPU with 132 SMs",
        ),
        ([*GOOD, "--margin", "0.9"], 2, "--margin 0.9 is not allowed"),
        ([*GOOD, "--interference", "0"], 2, "interference 0 of every pair is not allowed"),
        ([*GOOD, "--objective", "speed"], 2, "--objective 'speed' is not known; allowed: headroom"),
        ([*GOOD, "--batching", "x"], 2, "--batching 'x' is not known; allowed: affine, padded"),
        ([*GOOD, "--arrivals", "often"], 2, "--arrivals 'often' is not known; allowed: poisson"),
        (
            [*GOOD, "--policy", "x", "--simulate", "1s"],
            2,
            "--policy 'x' is not known; allowed: plan",
        ),
        ([*GOOD, "--simulate", "soon"], 2, "'soon' is not a duration"),
        ([*GOOD, "--simulate", "0s"], 2, "--simulate 0s: give a duration above 0"),
        ([*GOOD, "--html", "nowhere/x.html"], 3, "cannot write --html nowhere/x.html"),
        ([*GOOD, "-o", "."], 3, "cannot write --output . (it is a folder)"),
        (["curves/none.json", *GOOD[2:]], 2, "curves/none.json is no tuned model and no curve"),
        (["d.tuned", *GOOD[2:]], 2, "no curve of d.tuned in curves: run `tune profile d.tuned"),
        (["curves/a.json", "a.tuned", *GOOD[2:]], 2, "a is asked for twice: add up its rates"),
        (["fleet.toml", "a.tuned"], 2, "a fleet.toml names all models: give it alone"),
        (["fleet.toml", "--rate", "5"], 2, "--rate: fleet.toml says that for each model"),
        (["none.toml"], 2, "cannot read none.toml"),
    ],
)
def test_mistakes_give_one_line(
    folder: Path, capsys: Capture, args: list[str], code: int, message: str
) -> None:
    assert main(["plan", *args]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[device]", "[device", "is no TOML"),
        ("margin = 1.2", "margins = 1.2", "margins is not known; allowed: batching, device,"),
        ("margin = 1.2", "margin = 'much'", "margin 'much' is no number"),
        ('"padded"', '"some"', "batching 'some' is not known; allowed: affine, padded"),
        ('"units"', '"fun"', "objective 'fun' is not known; allowed: headroom"),
        ("units = 132", "units = 66", "the curve of a was measured on GPU with 132 SMs"),
        ("units = 132", "size = 132", "size is not known; allowed: name, step, unit, units"),
        ("rate = 50", "rates = 50", "model 1: rates is not known; allowed: curve, cv, library"),
        ("rate = 50", "rate = '50'", "model 1: rate '50' is no number"),
        ("rate = 50", "", "model 1: rate (requests a second) and slo"),
        ('slo = "50ms"', "slo = 50", "model 1: rate (requests a second) and slo"),
        ('curve = "curves/a.json"', "", "model 1: give either curve = 'FILE.json' or library"),
        ("curves/b.json", "curves/x.json", "cannot read curve curves/x.json"),
        ('"a,b2" = 1.3', "ab = 1.3", "interference 'ab' names no two models"),
        ('"a,b2" = 1.3', '"a,b2" = 0.3', "interference 0.3 of ('a', 'b2') is not allowed"),
        ("[interference]", "[[interference]]", "interference is no table"),
    ],
)
def test_a_malformed_fleet_is_told(folder: Path, old: str, new: str, message: str) -> None:
    path = Path("fleet.toml")
    assert old in FLEET
    path.write_text(FLEET.replace(old, new))
    with pytest.raises(UserError, match=re.escape(message)):
        read_fleet(path).workload()


def test_a_damaged_curve_is_told(folder: Path, capsys: Capture) -> None:
    Path("curves/a.json").write_text('{"model": "a"}')
    assert main(["plan", *GOOD]) == 2
    assert capsys.readouterr().err.startswith("error: curve curves/a.json: device None is no name")


def test_folders_are_sorted_by_model_and_chosen_by_batch(tmp_path: Path) -> None:
    paths = {}
    for name, batch in (("a", 1), ("b", 1), ("a", 8), ("b", 2)):
        path = tmp_path / f"{name}{batch}.tuned"
        path.mkdir()
        spec = TensorSpec("x", (batch, 3), "float32")
        write_manifest(path, dataclasses.replace(some_manifest(name), inputs=(spec,)))
        paths[name, batch] = path
    a1, b1, a8, b2 = paths.values()
    assert group_by_model([a1, b1, a8, b2]) == [[a1, a8], [b1, b2]]
    assert group_by_model([a1, a8], [8]) == [[a8]]
    with pytest.raises(UserError, match=r"--batch 2: there is no folder of a .* \(there is 1, 8\)"):
        group_by_model([a1, a8], [1, 2])


def test_profile_saves_a_curve_for_each_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from gpu_aware_tune.profiling import profiles

    def measure(folders: list[Path], *_: object, **__: object) -> Curve:
        name = folders[0].stem
        point = Point(8, 7, 1, 8, 5.0, 4.0, 6.0, 200.0, 1.0, 9)
        return Curve(name, "cuda/GPU/sm_90a", "green", "SM", 132, (point,))

    monkeypatch.setattr(profiles, "group_by_model", lambda paths, _: [[path] for path in paths])
    monkeypatch.setattr(profiles, "profile", measure)
    assert main(["profile", "a.tuned", "d.tuned", "--save", "new/curves", "--json"]) == 0
    assert [each["model"] for each in json.loads(capsys.readouterr().out)["curves"]] == ["a", "d"]
    assert read_curve(Path("new/curves/d.json")).points[0].p90_ms == 6.0
    assert main(["profile", "a.tuned", "--save", "fleet.toml"]) == 3
    assert "cannot write --save fleet.toml" in capsys.readouterr().err
    assert main(["profile", "a.tuned", "--batch", "one"]) == 2
    assert "--batch 'one' is no list of batch sizes" in capsys.readouterr().err
