"""The GPU benchmarks without a GPU: models, tables, and a cell each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from tiny_library import write_library

from benchmarks import scaffold
from benchmarks.gpu import (
    neighbour_order,
    share_gain,
    vs_metaschedule,
    vs_torch,
)
from benchmarks.gpu.models import MODELS, bert_encoder, write_model
from gpu_aware_tune.partition import usable_cores
from gpu_aware_tune.partition.gpu_query import query_gpus

no_gpu = pytest.mark.skipif(bool(query_gpus()[0]), reason="a GPU is here")


@no_gpu
@pytest.mark.parametrize(
    "module", [vs_metaschedule, share_gain, neighbour_order, vs_torch], ids=lambda m: m.__name__
)
def test_without_a_gpu_one_line_says_so(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 3
    text = capsys.readouterr().out
    assert text.startswith("skipped: ") and text.count("\n") == 1


def test_the_models_run_and_are_always_the_same(tmp_path: Path) -> None:
    for name in MODELS:
        path = write_model(name, tmp_path, tiny=True)
        first = path.read_bytes()
        assert write_model(name, tmp_path, tiny=True).read_bytes() == first
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        (result,) = session.run(None, {given.name: np.ones(given.shape, "float32")})
        assert np.isfinite(result).all()


def test_the_bert_encoder_is_what_its_name_says() -> None:
    model = bert_encoder(layers=2)
    onnx.checker.check_model(model)
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("MatMul"), kinds.count("LayerNormalization")) == (2 * 8, 2 * 2)
    size = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    assert size == pytest.approx(2 * 7.1e6, rel=0.01), "BERT-base has 7.1 M weights a layer"


def test_libraries_are_timed_inside_a_share(tmp_path: Path) -> None:
    _, folder = write_library(tmp_path)
    units = [e["units"] for e in json.loads((folder / "manifest.json").read_text())["libraries"]]
    found = share_gain.latencies(str(folder), units[0], 0.02)
    assert sorted(found) == sorted(map(str, units))
    assert all(0 < seconds < 1 for seconds in found.values())
    first, row = vs_torch.cell(str(tmp_path / "none.onnx"), str(folder), units[0], "float32", 0.02)
    assert set(first["without"]) == {"eager", "ort"}
    assert row["ms"]["ours"] > 0 and row["apart"]["ours"] == 0
    assert set(row["without"]) == {"eager", "compile", "ort"}
    about = {"model": "bert", "dtype": "float32", "percent": 30, "units": units[0]}
    assert "ours " in vs_torch.line({**about, **row})


def test_a_library_of_several_shares_is_timed_too(tmp_path: Path) -> None:
    """Its functions have the units in their names."""
    import tvm
    from tiny_library import default_traces, target, target_json, write_onnx

    from gpu_aware_tune.codegen.compile import compile_shares
    from gpu_aware_tune.library import RunFacts, export, link
    from gpu_aware_tune.model.importer import load_model

    model = load_model(write_onnx(tmp_path / "tiny.onnx"), target())
    shares = {n: (tvm.target.Target(target_json(n)), default_traces(model)) for n in (1, 2)}
    link(compile_shares(model.module, shares), tmp_path / "shares.so")
    folder = tmp_path / "tiny.tuned"
    paths = dict.fromkeys(shares, tmp_path / "shares.so")
    export(folder, model, paths, RunFacts(device="llvm/test/cpu"), entry="main_{units}")
    assert sorted(share_gain.latencies(str(folder), 2, 0.02)) == ["1", "2"]
    *_, row = vs_torch.cell(str(tmp_path / "none.onnx"), str(folder), 2, "float32", 0.02)
    assert row["ms"]["ours"] > 0


def test_what_a_child_told_before_it_hung_counts() -> None:
    program = "from benchmarks.scaffold import tell; import time; tell({'n': 1}); time.sleep(60)"
    begun = time.monotonic()
    found, why = scaffold.asked(["-c", program], 2)
    assert found == {"n": 1} and why.startswith("not done in 2 s")
    assert time.monotonic() - begun < 10
    found, why = scaffold.asked(["-c", "raise SystemExit('no such thing')"], 20)
    assert found is None and why == "exit code 1: no such thing"


def test_gains_are_against_the_whole_gpus_library() -> None:
    lines = {"32": {"32": 2.0, "132": 3.0}, "132": {"32": 1.5, "132": 1.0}}
    row = share_gain.gains(lines, [32, 132])
    assert row["gain"] == {"32": 1.5, "132": 1.0}
    text = share_gain.table(
        "bert",
        {"units": [32, 132], "on": lines, **row,
         "four": {"trials_per_min": 50.0}, "one": {"trials_per_min": 100.0}},
    )  # fmt: skip
    assert "1.50x" in text and "50 trials a minute, one share 100" in text


def run_of(way: str, tasks: int, gains: list[float], beside: int) -> dict[str, Any]:
    """A run as `neighbour_order.tuned` tells it; so many tasks changed as there are gains."""
    again = [{"changed": True, "regret": gain} for gain in gains]
    again += [{"changed": False, "regret": 0.0}] * (tasks - len(gains))
    return {
        "way": way, "repeat": 0, "tasks": again, "trials": {"a": 64, "b": 60},
        "trials_per_min": 90.0, "beside": beside, "measured": 130, "backend": "green",
        "slices": 2, "units": [64, 64],
    }  # fmt: skip


def test_order_is_kept_where_neighbours_change_no_more_tasks() -> None:
    runs = [run_of("together", 20, [0.01, 0.03], 110), run_of("exclusive", 20, [0.01] * 2, 0)]
    found = neighbour_order.verdict(runs)
    assert found["kept"] is True
    assert found["together"] == {
        "tasks": 20, "changed": 2, "share": 0.1, "mean_gain": 0.02, "most_gain": 0.03,
    }  # fmt: skip
    text = neighbour_order.closing(found)
    assert text.startswith("order kept beside a neighbour: together 2 of 20 tasks changed (10 %)")
    assert "gain 2.0 % on average, 3.0 % at most; exclusive 2 of 20" in text
    text = neighbour_order.line(runs[0])
    assert "124 trials, 90 a minute; 110 of 130 candidates had a neighbour (green, 2 " in text


def test_order_is_not_kept_where_neighbours_change_more_tasks() -> None:
    runs = [run_of("together", 20, [0.1] * 6, 110), run_of("exclusive", 20, [], 0)]
    few = neighbour_order.verdict(runs)
    assert few["kept"] is False and few["chance"] == pytest.approx(0.0101, abs=1e-4)
    assert neighbour_order.closing(few).startswith("order NOT kept beside a neighbour: together 6")
    more = neighbour_order.verdict(runs * 3)
    assert more["together"]["tasks"] == 60 and more["chance"] < 1e-4, "of all repeats"


@pytest.mark.parametrize(
    "runs",
    [
        [run_of("together", 20, [], 110)],
        [run_of("together", 20, [], 110), run_of("exclusive", 0, [], 0)],
        [run_of("together", 20, [], 0), run_of("exclusive", 20, [], 0)],
    ],
)
def test_nothing_is_said_of_order_without_neighbours_and_tasks(runs: list[dict[str, Any]]) -> None:
    found = neighbour_order.verdict(runs)
    assert found["kept"] is None
    assert neighbour_order.closing(found).startswith("no verdict")


def test_the_ways_take_turns_at_being_first() -> None:
    assert list(neighbour_order.turns(2)) == [
        ("together", 0), ("exclusive", 0), ("exclusive", 1), ("together", 1),
    ]  # fmt: skip


@pytest.mark.skipif(len(usable_cores()) < 2, reason="two slices need two cores")
def test_order_beside_a_neighbour_on_cores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaffold, "stop_orderly", lambda: None)  # this is pytest's process
    argv = ["neighbour_order", "--null", "--models", "resnet50", "--trials", "4"]
    monkeypatch.setattr(sys, "argv", argv)
    neighbour_order.main()
    text = capsys.readouterr().out
    written = json.loads(Path(text.rpartition("written to ")[2].strip()).read_text())
    together, exclusive = written["runs"]
    assert (together["slices"], exclusive["slices"]) == (2, 2)
    assert together["beside"] > 0 and exclusive["beside"] == 0
    assert together["trials"] == exclusive["trials"] == {"resnet50": 4}
    assert together["tasks"] and exclusive["tasks"], "both were measured again"
    assert written["verdict"]["kept"] in (True, False)
    assert written["environment"]["tvm"]


def test_a_side_is_cut_off_after_its_time() -> None:
    program = (
        "import time, json\nprint('BEGIN', flush=True)\nfor n in range(100):\n"
        "    told = {'at_s': n, 'trials': n, 'failed': 0, 'latency_s': None}\n"
        "    print('TOLD ' + json.dumps(told), flush=True)\n    time.sleep(0.05)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, bufsize=0, env={**os.environ}
    )
    begun = time.monotonic()
    told, _busy = vs_metaschedule._listen(child, 0.5)
    child.kill()
    child.wait()
    assert child.stdout is not None
    child.stdout.close()
    assert 1 < len(told) < 50 and time.monotonic() - begun < 5
    assert told[-1]["trials"] == len(told) - 1
