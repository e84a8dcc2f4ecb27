"""The engine under Ray Serve, on a real cluster of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import tritonclient.http as triton_http
from serve_fleet import Oracle, draw_inputs, write_folder

from gpu_aware_tune.serving.deployments import Deployment
from gpu_aware_tune.serving.front_end import FrontEndOptions
from gpu_aware_tune.serving.ray_app import RayApplication, ReplicaOptions, served_by_ray
from gpu_aware_tune.serving.requests import Refused, UnknownModel


@pytest.fixture
def cluster() -> Iterator[None]:
    """A cluster of this test's own: `auto` could find another test's."""
    for left in (2, 1, 0):
        try:
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
            break
        except Exception:  # Ray gives its own processes 30 s, which a busy machine may not have
            ray.shutdown()
            if not left:
                raise
    yield
    ray.shutdown()


def test_deploy_ask_replan_kill_and_remove(cluster: None, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "one")
    oracle = Oracle(folder)
    options = ReplicaOptions(
        engine={"units": 1, "adaptive": False},
        http="127.0.0.1:0",
        grpc=None,
        front_end=FrontEndOptions(),
    )
    with served_by_ray("auto", [Deployment((folder,), 30.0)], options, replicas=1, cores=1) as app:
        inputs = draw_inputs(1)
        oracle.check(inputs, app.infer("tiny", inputs))
        with pytest.raises(UnknownModel):
            app.infer("other", inputs)
        with pytest.raises(Refused):
            app.infer("tiny", inputs, timeout_s=1e-6)

        (first,) = app.where()
        plan = ask(first, "v2/plan")
        app.carry_out(plan)
        assert app.where()[0]["pid"] == first["pid"], "a plan needs no restart"
        assert any("a plan was given" in each["text"] for each in ask(first, "v2/status")["events"])

        os.kill(first["pid"], signal.SIGKILL)
        second = wait_for_another(app, first["pid"])
        with triton_http.InferenceServerClient(second["http"]) as client:
            tensors = []
            for name, array in inputs.items():
                tensors.append(triton_http.InferInput(name, array.shape, "FP32"))
                tensors[-1].set_data_from_numpy(array)
            result = client.infer("tiny", tensors)
        outputs = {name: result.as_numpy(name) for name in ("scores", "features")}
        oracle.check(inputs, outputs)
    with pytest.raises(OSError, match="refused"):
        ask(second, "v2")


def ask(replica: dict[str, Any], path: str) -> Any:
    with urllib.request.urlopen(f"http://{replica['http']}/{path}", timeout=20) as answer:
        return json.load(answer)


def wait_for_another(app: RayApplication, pid: int) -> dict[str, Any]:
    """The replica that has come in the place of a killed one."""
    end = time.monotonic() + 240  # on a machine that is busy with other tests
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            for replica in app.where(timeout_s=5):
                if replica["pid"] != pid:
                    return replica
        time.sleep(0.5)
    raise AssertionError("no replica came back")
