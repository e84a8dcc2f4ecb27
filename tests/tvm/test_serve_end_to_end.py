"""From a client over the protocol to tuned libraries and back: right answers, whatever else is sent."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
from serve_fleet import Inputs, Oracle, draw_inputs
from serve_thread import Served, served
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from gpu_aware_tune.serving.deployments import Deployment
from gpu_aware_tune.serving.engine import Engine
from gpu_aware_tune.serving.front_end import FrontEndOptions

LONG_S = 60.0


@pytest.fixture(scope="module")
def server(folders: tuple[Path, Path]) -> Iterator[Served]:
    deployments = [
        Deployment((folders[0],), LONG_S, "single"),
        Deployment(folders, LONG_S, "batched"),
    ]
    options = FrontEndOptions(
        admin=True, shared_memory=True, body_timeout_s=2.0, header_timeout_s=2.0
    )
    with Engine(deployments, adaptive=False) as engine, served(engine, options) as found:
        yield found


def tensors(module: Any, inputs: Inputs) -> list[Any]:
    found = []
    for name, array in inputs.items():
        tensor = module.InferInput(name, list(array.shape), "FP32")
        tensor.set_data_from_numpy(array)
        found.append(tensor)
    return found


def outputs_of(answer: Any) -> Inputs:
    return {name: answer.as_numpy(name) for name in ("scores", "features")}


def make_client(module: Any, server: Served) -> Any:
    address = server.http if module is triton_http else server.grpc
    return module.InferenceServerClient(address)


def call(server: Served, path: str, body: bytes | None = None) -> tuple[int, Any]:
    request = urllib.request.Request(f"http://{server.http}/{path}", body)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize("module", [triton_http, triton_grpc], ids=["http", "grpc"])
def test_clients_get_what_the_library_answers(module: Any, server: Served, oracle: Oracle) -> None:
    def ask(worker: int) -> None:
        client = make_client(module, server)
        for index in range(3):
            rows = 1 + (worker + index) % 6
            for model, inputs in (
                ("batched", draw_inputs(100 * worker + index, rows)),
                ("single", draw_inputs(100 * worker + index)),
            ):
                found.append((inputs, outputs_of(client.infer(model, tensors(module, inputs)))))
        client.close()

    found: list[tuple[Inputs, Inputs]] = []
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(16)))
    assert len(found) == 96
    for inputs, outputs in found:
        oracle.check(inputs, outputs)


def test_shared_memory(server: Served, oracle: Oracle) -> None:
    inputs = draw_inputs(5, 2)
    key = f"tune-test-end-{server.http_port}"
    sizes = {name: array.nbytes for name, array in inputs.items()}
    total = sum(sizes.values())
    client = make_client(triton_grpc, server)
    handle = shm.create_shared_memory_region("both", key, total + 160)
    try:
        client.register_system_shared_memory("both", key, total + 160)
        shm.set_shared_memory_region(handle, list(inputs.values()))
        asked, offset = tensors(triton_grpc, inputs), 0
        for tensor, size in zip(asked, sizes.values(), strict=True):
            tensor.set_shared_memory("both", size, offset=offset)
            offset += size
        scores = triton_grpc.InferRequestedOutput("scores")
        scores.set_shared_memory("both", 160, offset=total)
        client.infer("batched", asked, outputs=[scores])
        found = shm.get_contents_as_numpy(handle, np.float32, [2, 20], offset=total)
        np.testing.assert_allclose(found, oracle(inputs)["scores"], rtol=1e-5, atol=1e-5)
    finally:
        client.unregister_system_shared_memory()
        shm.destroy_shared_memory_region(handle)
        client.close()


def test_plan_status_and_metrics(server: Served) -> None:
    status, plan = call(server, "v2/plan")
    assert status == 200 and {model["model"] for model in plan["models"]} == {"single", "batched"}
    assert call(server, "v2/plan", json.dumps(plan).encode())[0] == 200
    status, facts = call(server, "v2/plan", b'{"format": 1}')
    assert status == 400 and "\n" not in facts["error"]
    status, facts = call(server, "v2/status")
    assert status == 200 and {model["name"] for model in facts["models"]} == {"single", "batched"}
    with urllib.request.urlopen(f"http://{server.http}/metrics", timeout=10) as response:
        text = response.read().decode()
    assert 'tune_requests_total{model="batched",version="1",result="success"}' in text
    assert 'tune_lane_share_ratio{lane="0"}' in text
    status, facts = call(server, "v2/models/batched/config")
    assert facts["max_batch_size"] == 4


def test_a_model_is_added_replaced_and_removed(
    server: Served, folders: tuple[Path, Path], oracle: Oracle
) -> None:
    client = make_client(triton_http, server)
    body = json.dumps({"parameters": {"folder": str(folders[0])}}).encode()
    assert call(server, "v2/repository/models/added/load", body) == (200, {})
    assert client.is_model_ready("added")
    inputs = draw_inputs(9)
    oracle.check(inputs, outputs_of(client.infer("added", tensors(triton_http, inputs))))
    client.load_model("added")
    oracle.check(inputs, outputs_of(client.infer("added", tensors(triton_http, inputs))))
    client.unload_model("added")
    assert not client.is_model_ready("added")
    with pytest.raises(InferenceServerException, match="no model 'added'"):
        client.infer("added", tensors(triton_http, inputs))
    bad = json.dumps({"parameters": {"folder": "/nothing"}}).encode()
    status, facts = call(server, "v2/repository/models/added/load", bad)
    assert status == 400 and "/nothing" in facts["error"]
    client.close()


def test_cancelled_requests_leave_the_others_right(server: Served, oracle: Oracle) -> None:
    source = random.Random(4)

    async def main() -> list[tuple[Inputs, Inputs]]:
        async with triton_grpc_aio.InferenceServerClient(server.grpc) as client:

            async def ask(seed: int) -> tuple[Inputs, Inputs] | None:
                inputs = draw_inputs(seed, 1 + seed % 4)
                task = asyncio.create_task(client.infer("batched", tensors(triton_grpc, inputs)))
                if seed % 2:
                    await asyncio.sleep(source.random() * 0.02)
                    task.cancel()
                try:
                    return inputs, outputs_of(await task)
                except (asyncio.CancelledError, InferenceServerException):
                    assert seed % 2
                    return None

            return [one for one in await asyncio.gather(*map(ask, range(120))) if one]

    found = asyncio.run(main())
    assert len(found) >= 60
    for inputs, outputs in found:
        oracle.check(inputs, outputs)


def test_nonsense_beside_good_requests(server: Served, oracle: Oracle) -> None:
    """Broken requests get 4xx or a closed connection; good ones their own answers all the time."""
    source = random.Random(5)
    good = json.dumps(
        {
            "inputs": [
                {"name": name, "datatype": "FP32", "shape": list(array.shape)}
                | {"parameters": {"binary_data_size": array.nbytes}}
                for name, array in draw_inputs(0).items()
            ]
        }
    ).encode()
    data = b"".join(array.tobytes() for array in draw_inputs(0).values())
    statuses = []

    def break_one(port: int, on_http: bool) -> None:
        body = bytearray(good + data)
        for _ in range(source.randrange(1, 8)):
            body[source.randrange(len(good))] = source.randrange(256)
        lines = ["POST /v2/models/batched/infer HTTP/1.1", "Host: a", "Connection: close",
                 f"Content-Length: {len(body)}",
                 f"Inference-Header-Content-Length: {len(good) + source.choice([0, 0, 1, -1])}"]  # fmt: skip
        head = bytearray("\r\n".join([*lines, "", ""]).encode())
        if source.random() < 0.3 or not on_http:
            head[source.randrange(len(head))] = source.randrange(256)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            try:
                connection.sendall(bytes(head + body))
                if not on_http or source.random() < 0.2:
                    return
                answer = connection.recv(65536)
            except ConnectionResetError:
                return
        statuses.append(int(answer.split()[1]) if answer else 0)

    def break_all() -> None:
        while not done.is_set():
            break_one(server.http_port, True)
            break_one(int(server.grpc.rpartition(":")[2]), False)

    done = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        breaker = pool.submit(break_all)
        clients = [make_client(module, server) for module in (triton_http, triton_grpc)]
        end_s = time.monotonic() + 3
        seed = 0
        while time.monotonic() < end_s:
            seed += 1
            for module, client in zip((triton_http, triton_grpc), clients, strict=True):
                inputs = draw_inputs(seed, 1 + seed % 4)
                answer = client.infer("batched", tensors(module, inputs), request_id=str(seed))
                oracle.check(inputs, outputs_of(answer))
        done.set()
        breaker.result()
        for client in clients:
            client.close()
    assert len(statuses) > 20
    assert all(status == 200 or 400 <= status < 500 or status == 0 for status in statuses), statuses
