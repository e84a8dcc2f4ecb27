"""`tune serve`, `tune load` and `tune watch` as processes: ready, used by real clients, stopped."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from conftest import ROOT
from serve_fleet import Oracle, draw_inputs

from gpu_aware_tune.cli.main import main

TUNE = [sys.executable, str(ROOT / "cli.py")]


@contextlib.contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A server on free ports, and its addresses by protocol."""
    command = [
        *TUNE,
        "serve",
        *map(str, arguments),
        "--http",
        "127.0.0.1:0",
        "--grpc",
        "127.0.0.1:0",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            addresses: dict[str, str] = {}
            said = []
            while len(addresses) < 2:
                line = process.stdout.readline()
                said.append(line)
                assert line, "".join(said)
                if found := re.match(r"ready: (http|grpc)://(\S+)", line):
                    addresses[found[1]] = found[2]
            yield process, addresses
        finally:
            process.kill()


def test_from_folders_to_clients_and_back(folders: tuple[Path, Path], tmp_path: Path) -> None:
    oracle = Oracle(folders[0])
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(
        f"[[models]]\nlibrary = '{folders[0]}'\nname = 'one'\nslo = '2s'\nrate = 10\n"
        f"[[models]]\nlibrary = ['{folders[0]}', '{folders[1]}']\nname = 'many'\nslo = '4s'\n"
    )
    with serving(fleet) as (process, addresses):
        for model, rows in (("one", 1), ("many", 3)):
            inputs = draw_inputs(rows, rows)
            for module, address in ((triton_http, "http"), (triton_grpc, "grpc")):
                with module.InferenceServerClient(addresses[address]) as client:
                    assert client.is_server_ready() and client.is_model_ready(model)
                    tensors = []
                    for name, array in inputs.items():
                        tensors.append(module.InferInput(name, array.shape, "FP32"))
                        tensors[-1].set_data_from_numpy(array)
                    result = client.infer(model, tensors)
                    outputs = {name: result.as_numpy(name) for name in ("scores", "features")}
                    oracle.check(inputs, outputs)
        url = f"http://{addresses['http']}"
        report = output_of("load", url, "--rate", "20,10", "--duration", "2s", "--json")
        outcome = json.loads(report)
        assert [model["model"] for model in outcome["models"]] == ["one", "many"]
        assert all(model["offered"] > 5 for model in outcome["models"])
        assert outcome["attainment"] > 0.5
        shown = output_of("watch", url, "--once")
        assert re.search(r"one +\d+\.\d +0 ", shown), shown
        assert "policy plan" in shown
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert process.stdout is not None
        assert "what was accepted is answered" in process.stdout.read()


def output_of(*arguments: str) -> str:
    done = subprocess.run([*TUNE, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ctrl_c_during_load_answers_what_was_accepted(folders: tuple[Path, Path]) -> None:
    with serving(folders[0], "--slo", "10s", "--units", 1) as (process, addresses):
        client = triton_http.InferenceServerClient(addresses["http"], concurrency=8)
        inputs = []
        for name, array in draw_inputs(0).items():
            inputs.append(triton_http.InferInput(name, array.shape, "FP32"))
            inputs[-1].set_data_from_numpy(array)
        asked = [client.async_infer("tiny", inputs) for _ in range(8)]
        deadline = time.monotonic() + 20
        first = asked[0].get_result(timeout=20)
        process.send_signal(signal.SIGINT)
        for each in asked[1:]:
            with contextlib.suppress(triton_http.InferenceServerException):  # not accepted any more
                result = each.get_result(timeout=max(1, deadline - time.monotonic()))
                np.testing.assert_array_equal(result.as_numpy("scores"), first.as_numpy("scores"))
        assert process.wait(timeout=30) == 0
        client.close()


def test_a_plan_is_carried_out(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with serving(folders[0], "--slo", "1s", "--units", 1) as (_, addresses):
        shown = json.loads(fetch(f"http://{addresses['http']}/v2/plan"))
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(shown))
    with serving(folders[0], "--slo", "1s", "--units", 1, "--plan", plan) as (_, addresses):
        status = json.loads(fetch(f"http://{addresses['http']}/v2/status"))
        assert any("a plan was given" in event["text"] for event in status["events"])


def fetch(url: str) -> str:
    import urllib.request

    with urllib.request.urlopen(url, timeout=20) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "no SOURCE given"),
        (["missing.tuned", "--slo", "1s"], 2, "missing.tuned is no tuned model"),
        (["{one}"], 2, "--slo is missing"),
        (["{one}", "--slo", "1s,2s"], 2, "2 values for 1 model"),
        (["{one}", "--slo", "fast"], 2, "give a form such as 25ms"),
        (["{one}", "--slo", "1s", "--rate", "0"], 2, "give requests a second above 0"),
        (["{one}", "--slo", "1ns"], 2, "1ns"),
        (["{one}", "--slo", "1s", "--http", "off", "--grpc", "off"], 2, "leave one of them on"),
        (["{one}", "--slo", "1s", "--http", "8000"], 2, "HOST:PORT"),
        (["{one}", "--slo", "1s", "--policy", "best"], 2, "'best' is not known; allowed: plan"),
        (["{one}", "--slo", "1s", "--units", "99"], 2, "this process may use 1 to"),
        (["{one}", "--slo", "1s", "--curves", "nowhere"], 2, "tune profile"),
        (["{one}", "--slo", "1s", "--plan", "nowhere.json"], 2, "cannot read --plan nowhere.json"),
        (["{one}", "{one}", "--slo", "1s"], 2, "both have batch size 1"),
        (["fleet.toml", "--slo", "1s"], 2, "fleet.toml"),
        (["{one}", "--slo", "1s", "--http", "{taken}", "--grpc", "off"], 3, "cannot listen on"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    folders: tuple[Path, Path],
    arguments: list[str],
    code: int,
    text: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    interval = sys.getswitchinterval()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = f"127.0.0.1:{taken.getsockname()[1]}"
        given = [each.format(one=folders[0], taken=port) for each in arguments]
        assert main(["serve", *given]) == code
    sys.setswitchinterval(interval)
    said = capfd.readouterr().err.strip()
    assert text in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["load", "http://127.0.0.1:9", "--rate", "1"], 3, "no server answers at"),
        (["load", "http://127.0.0.1:9"], 2, "--rate"),
        (["load", "--rate", "1", "--arrivals", "odd"], 2, "--arrivals 'odd' is not known"),
        (["load", "--rate", "1", "--duration", "soon"], 2, "--duration 'soon' is not a duration"),
        (["watch", "--interval", "soon"], 2, "--interval 'soon' is not a duration"),
        (["watch", "http://127.0.0.1:9", "--once"], 3, "no server answers at"),
        (["watch", "127.0.0.1:9", "--once"], 2, "no address of a server"),
    ],
)
def test_no_server(
    arguments: list[str], code: int, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    assert text in capfd.readouterr().err
