"""Real clients of the inference protocol: HTTP, gRPC, streams, shared memory, and bad ones."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import json
import queue
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
from sample_engine import SampleEngine, SampleModel
from serve_thread import Served, served
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.model.importer import TensorSpec
from gpu_aware_tune.serving.front_end import FrontEndOptions
from gpu_aware_tune.serving.requests import Draining, Refused, RunFailed

# Both clients have the same calls but for how outputs are described.
Client = Any
X = np.array([[1, 2, 3, 4.5]], np.float32)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """Models `affine` (any rows up to 8) and `pair`; another engine with these models does, too."""
    with served(SampleEngine(), FrontEndOptions(shared_memory=True)) as found:
        yield found


@pytest.fixture(scope="module")
def http(server: Served) -> Iterator[Client]:
    client = triton_http.InferenceServerClient(server.http, concurrency=4)
    yield client
    client.close()


@pytest.fixture(scope="module")
def grpc(server: Served) -> Iterator[Client]:
    client = triton_grpc.InferenceServerClient(server.grpc)
    yield client
    client.close()


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest) -> Client:
    return request.getfixturevalue(request.param)


def module_of(client: Client) -> Any:
    return triton_http if isinstance(client, triton_http.InferenceServerClient) else triton_grpc


def plain(facts: Any) -> Any:
    """Facts as Python values, from either client."""
    if isinstance(facts, dict | list):
        return facts
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(facts, preserving_proto_field_name=True)


def tensor(module: Any, name: str, array: np.ndarray, **kwargs: Any) -> Any:
    datatype = {"f": "FP32", "i": "INT32"}[array.dtype.kind]
    found = module.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array, **kwargs)
    return found


def call(
    served: Served, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    """Status and JSON of a plain HTTP request."""
    request = urllib.request.Request(f"http://{served.http}/{path}", body, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def request_body(**more: Any) -> bytes:
    facts = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": X.reshape(-1).tolist()}
    return json.dumps({"inputs": [facts], **more}).encode()


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.005)


# What is served.


def test_health_and_metadata(client: Client) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("affine") and client.is_model_ready("affine", "1")
    facts = plain(client.get_server_metadata())
    assert facts["name"] == "gpu-aware-tune"
    assert {"binary_tensor_data", "statistics", "system_shared_memory"} <= set(facts["extensions"])
    facts = plain(client.get_model_metadata("affine"))
    assert facts["versions"] == ["1"] and facts["inputs"][0]["name"] == "x"
    assert facts["inputs"][0]["datatype"] == "FP32"
    assert [int(extent) for extent in facts["inputs"][0]["shape"]] == [-1, 4]


def test_model_config(client: Client) -> None:
    facts = plain(client.get_model_config("affine"))
    facts = facts.get("config", facts)
    assert facts["max_batch_size"] == 8
    assert facts["input"][0]["data_type"] == "TYPE_FP32"
    assert [int(extent) for extent in facts["input"][0]["dims"]] == [4]
    facts = plain(client.get_model_config("pair"))
    facts = facts.get("config", facts)
    assert facts.get("max_batch_size", 0) == 0
    assert [int(extent) for extent in facts["output"][1]["dims"]] == [2, 3]


def test_repository_index(client: Client) -> None:
    facts = plain(client.get_model_repository_index())
    models = facts if isinstance(facts, list) else facts["models"]
    assert [(model["name"], model["state"]) for model in models] == [
        ("affine", "READY"),
        ("pair", "READY"),
    ]


def test_statistics_count_requests(client: Client) -> None:
    def count() -> tuple[int, int]:
        facts = plain(client.get_inference_statistics("affine"))["model_stats"][0]
        success = facts.get("inference_stats", {}).get("success", {})
        return int(facts.get("inference_count", 0)), int(success.get("count", 0))

    rows, requests = count()
    client.infer("affine", [tensor(module_of(client), "x", np.repeat(X, 3, 0))])
    assert count() == (rows + 3, requests + 1)
    assert len(plain(client.get_inference_statistics())["model_stats"]) == 2


# Inference.


def test_inference(client: Client) -> None:
    module = module_of(client)
    answer = client.infer("affine", [tensor(module, "x", X)], request_id="abc")
    assert answer.as_numpy("y").tolist() == (X * 2 + 1).tolist()
    assert answer.as_numpy("y").dtype == np.float32
    assert plain(answer.get_response())["id"] == "abc"
    assert plain(answer.get_response())["model_name"] == "affine"


def test_several_inputs_and_chosen_outputs(client: Client) -> None:
    module = module_of(client)
    a, b = np.ones((2, 3), np.float32), np.full((2, 3), 3, np.float32)
    inputs = [tensor(module, "b", b), tensor(module, "a", a)]
    outputs = [module.InferRequestedOutput("difference")]
    answer = client.infer("pair", inputs, outputs=outputs)
    assert answer.as_numpy("difference").tolist() == (a - b).tolist()
    assert answer.as_numpy("sum") is None
    answer = client.infer("pair", inputs)
    assert answer.as_numpy("sum").tolist() == (a + b).tolist()


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_json_and_binary_over_http(http: Client, binary_in: bool, binary_out: bool) -> None:
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    output = triton_http.InferRequestedOutput("y", binary_data=binary_out)
    answer = http.infer(
        "affine", [tensor(triton_http, "x", x, binary_data=binary_in)], outputs=[output]
    )
    assert answer.as_numpy("y").tobytes() == (x * 2 + 1).tobytes()


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_packed_requests(http: Client, algorithm: str) -> None:
    answer = http.infer(
        "affine", [tensor(triton_http, "x", X)], request_compression_algorithm=algorithm
    )
    assert answer.as_numpy("y").tolist() == (X * 2 + 1).tolist()


def test_a_raw_request_as_curl_sends_it(server: Served) -> None:
    headers = {"Inference-Header-Content-Length": "0"}
    status, facts = call(server, "v2/models/affine/infer", X.tobytes(), headers)
    assert (status, facts["outputs"][0]["data"]) == (200, (X * 2 + 1).reshape(-1).tolist())


def test_typed_contents_over_grpc(server: Served) -> None:
    import grpc as grpc_package
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with grpc_package.insecure_channel(server.grpc) as channel:
        request = service_pb2.ModelInferRequest(model_name="affine")
        entry = request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        entry.contents.fp32_contents.extend(X.reshape(-1).tolist())
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert answer.raw_output_contents[0] == (X * 2 + 1).tobytes()


def test_many_requests_at_once(server: Served, client: Client) -> None:
    """32 at a time, each with numbers of its own, over several connections."""
    module = module_of(client)

    def work(worker: int) -> None:
        own = (
            triton_http.InferenceServerClient(server.http)
            if module is triton_http
            else triton_grpc.InferenceServerClient(server.grpc)
        )
        for index in range(6):
            x = np.full((1 + index % 8, 4), worker * 100 + index, np.float32)
            answer = own.infer("affine", [tensor(module, "x", x)], request_id=f"{worker}-{index}")
            assert answer.as_numpy("y").tolist() == (x * 2 + 1).tolist()
            assert plain(answer.get_response())["id"] == f"{worker}-{index}"
        own.close()

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(work, range(32)))


def test_the_asyncio_client(server: Served) -> None:
    async def main() -> None:
        async with triton_grpc_aio.InferenceServerClient(server.grpc) as own:
            inputs = [tensor(triton_grpc, "x", X * k) for k in range(32)]
            answers = await asyncio.gather(*(own.infer("affine", [one]) for one in inputs))
            for k, answer in enumerate(answers):
                assert answer.as_numpy("y").tolist() == (X * k * 2 + 1).tolist()

    asyncio.run(main())


def test_a_stream_answers_in_order_and_goes_on_after_an_error(grpc: Client) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    grpc.start_stream(lambda result, error: answers.put((result, error)))
    for index in range(100):
        name = "nothing" if index == 50 else "affine"
        x = np.full((1, 4), index, np.float32)
        grpc.async_stream_infer(name, [tensor(triton_grpc, "x", x)], request_id=str(index))
    for index in range(100):
        result, error = answers.get(timeout=10)
        if index == 50:
            assert "NOT_FOUND" in str(error)
        else:
            assert result.as_numpy("y")[0, 0] == index * 2 + 1
            assert result.get_response().id == str(index)
    grpc.stop_stream()


# Errors.


@pytest.mark.parametrize(
    ("model", "name", "array", "status", "text"),
    [
        ("nothing", "x", X, ("404", "StatusCode.NOT_FOUND"), "no model nothing"),
        ("affine", "z", X, ("400", "StatusCode.INVALID_ARGUMENT"), "no input z"),
        ("affine", "x", X[0], ("400", "StatusCode.INVALID_ARGUMENT"), "shape [-1, 4]"),
        ("affine", "x", X.astype(np.int32), ("400", "StatusCode.INVALID_ARGUMENT"), "FP32"),
        ("affine", "x", np.repeat(X, 9, 0), ("400", "StatusCode.INVALID_ARGUMENT"), "9 rows"),
        ("pair", "a", np.ones((2, 3), np.float32), ("400", "StatusCode.INVALID_ARGUMENT"), "input b"),
    ],
)  # fmt: skip
def test_bad_requests(
    client: Client, model: str, name: str, array: np.ndarray, status: tuple[str, str], text: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, [tensor(module_of(client), name, array)])
    assert caught.value.status() in status
    assert text in caught.value.message()


def test_bytes_that_are_no_message(server: Served) -> None:
    import grpc as grpc_package

    with grpc_package.insecure_channel(server.grpc) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for data in (b"\xff", b"\x0a\x02\xff\xfe", b"\x2a\xff\xff\xff\xff\x0f"):
            with pytest.raises(grpc_package.RpcError) as caught:
                infer(data)
            assert caught.value.code() == grpc_package.StatusCode.INVALID_ARGUMENT
            assert "not a message" in caught.value.details()
        with pytest.raises(grpc_package.RpcError) as caught:
            channel.unary_unary("/inference.GRPCInferenceService/LogSettings")(b"")
        assert caught.value.code() == grpc_package.StatusCode.UNIMPLEMENTED


def test_unknown_versions_and_models(client: Client) -> None:
    with pytest.raises(InferenceServerException, match="version 1"):
        client.get_model_metadata("affine", "2")
    with pytest.raises(InferenceServerException, match="no model"):
        client.get_model_config("q")


@pytest.mark.parametrize(
    ("error", "http_status", "grpc_status"),
    [
        (Refused("no time"), 429, "RESOURCE_EXHAUSTED"),
        (Draining("closing"), 503, "UNAVAILABLE"),
        (RunFailed("lane died"), 500, "INTERNAL"),
        (ValueError("a secret\nTraceback"), 500, "INTERNAL"),
    ],
)
def test_errors_of_the_engine(error: Exception, http_status: int, grpc_status: str) -> None:
    engine = SampleEngine()
    engine.error = error
    with served(engine) as server:
        status, facts = call(server, "v2/models/affine/infer", request_body())
        assert status == http_status
        with pytest.raises(InferenceServerException) as caught:
            triton_grpc.InferenceServerClient(server.grpc).infer(
                "affine", [tensor(triton_grpc, "x", X)]
            )
    assert caught.value.status() == f"StatusCode.{grpc_status}"
    assert facts["error"] == caught.value.message() and "secret" not in facts["error"]


@pytest.mark.parametrize(
    ("path", "status"),
    [("", 404), ("v2/nothing", 404), ("v2/models/affine/infer", 405), ("v2/models/%00/infer", 405),
     ("v2/models/..%2f..%2fetc", 404), ("v2/systemsharedmemory/region/q/status", 400)],
)  # fmt: skip
def test_wrong_paths(server: Served, path: str, status: int) -> None:
    found, facts = call(server, path)
    assert found == status and isinstance(facts["error"], str)


# Time and cancelling.


@pytest.fixture(scope="module")
def slow() -> Iterator[Served]:
    engine = SampleEngine()
    options = FrontEndOptions(
        max_request_bytes=100_000,
        max_held_bytes=250_000,
        max_connections=40,
        header_timeout_s=0.4,
        body_timeout_s=0.4,
        drain_timeout_s=5,
    )
    with served(engine, options) as found:
        yield found


@pytest.fixture
def slow_engine(slow: Served) -> Iterator[SampleEngine]:
    engine: SampleEngine = slow.engine
    yield engine
    engine.delay_s = 0.0


def send(server: Served, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.http_port), timeout=10)
    connection.sendall(data)
    return connection


def received(connection: socket.socket) -> bytes:
    with connection:
        data = b""
        while chunk := connection.recv(65536):
            data += chunk
    return data


def head(length: int | str, *more: str, model: str = "affine") -> bytes:
    lines = [
        f"POST /v2/models/{model}/infer HTTP/1.1",
        "Host: a",
        f"Content-Length: {length}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def test_the_timeout_of_a_request_reaches_the_engine(slow: Served) -> None:
    body = request_body(parameters={"timeout": 250_000})
    assert call(slow, "v2/models/affine/infer", body)[0] == 200
    assert slow.engine.timeout_s == 0.25
    own = triton_grpc.InferenceServerClient(slow.grpc)
    own.infer("affine", [tensor(triton_grpc, "x", X)], timeout=300_000)
    assert slow.engine.timeout_s == 0.3
    own.infer("affine", [tensor(triton_grpc, "x", X)], client_timeout=2.0)
    assert 1.0 < slow.engine.timeout_s < 2.1  # gRPC rounds up
    own.infer("affine", [tensor(triton_grpc, "x", X)])
    assert slow.engine.timeout_s is None
    own.close()


def test_a_client_that_goes_away_cancels_over_http(slow: Served, slow_engine: SampleEngine) -> None:
    slow_engine.delay_s, before = 30.0, slow_engine.cancelled
    body = request_body()
    connection = send(slow, head(len(body)) + body)
    wait_until(lambda: slow_engine.running == 1)
    connection.close()
    wait_until(lambda: slow_engine.cancelled == before + 1)


def test_a_call_that_is_cancelled_over_grpc(slow: Served, slow_engine: SampleEngine) -> None:
    slow_engine.delay_s, before = 30.0, slow_engine.cancelled
    own = triton_grpc.InferenceServerClient(slow.grpc)
    errors: queue.Queue[Any] = queue.Queue()
    context = own.async_infer(
        "affine", [tensor(triton_grpc, "x", X)], lambda result, error: errors.put(error)
    )
    wait_until(lambda: slow_engine.running == 1)
    context.cancel()
    assert "CANCELLED" in str(errors.get(timeout=5).status())
    wait_until(lambda: slow_engine.cancelled == before + 1)
    with pytest.raises(InferenceServerException, match="Deadline"):
        own.infer("affine", [tensor(triton_grpc, "x", X)], client_timeout=0.1)
    wait_until(lambda: slow_engine.cancelled == before + 2)
    own.close()


def test_a_stream_that_is_cancelled(slow: Served, slow_engine: SampleEngine) -> None:
    slow_engine.delay_s, before = 30.0, slow_engine.cancelled
    own = triton_grpc.InferenceServerClient(slow.grpc)
    own.start_stream(lambda result, error: None)
    for _ in range(5):
        own.async_stream_infer("affine", [tensor(triton_grpc, "x", X)])
    wait_until(lambda: slow_engine.running == 5)
    own.stop_stream(cancel_requests=True)
    wait_until(lambda: slow_engine.cancelled == before + 5)
    own.close()


def test_a_long_stream_keeps_nothing_of_what_it_has_answered(
    slow: Served, slow_engine: SampleEngine
) -> None:
    slow_engine.delay_s, count = 0.0, 100
    before = futures_in_memory()
    own = triton_grpc.InferenceServerClient(slow.grpc)
    answers: queue.Queue[Any] = queue.Queue()
    own.start_stream(lambda result, error: answers.put(error))
    for _ in range(count):
        own.async_stream_infer("affine", [tensor(triton_grpc, "x", X)])
    assert [answers.get(timeout=10) for _ in range(count)] == [None] * count
    wait_until(lambda: futures_in_memory() < before + count // 2)
    own.stop_stream()
    own.close()


def futures_in_memory() -> int:
    """How many calls this process, which is the server too, has not forgotten."""
    gc.collect()
    return sum(type(each) is Future for each in gc.get_objects())


@pytest.mark.parametrize(
    "data",
    [b"", b"POST /v2/mod", b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: ", head(100), head(100) + b"{"],
)
def test_a_slow_client_is_sent_away(slow: Served, data: bytes) -> None:
    begin_s = time.monotonic()
    answer = received(send(slow, data))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"error" in answer
    assert time.monotonic() - begin_s < 5


def test_a_slow_client_on_a_used_connection_is_sent_away(slow: Served) -> None:
    body = request_body()
    connection = send(slow, head(len(body)) + body)
    assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    connection.sendall(b"POST /v2")
    assert received(connection).startswith(b"HTTP/1.1 408 ")


def test_bodies_that_are_too_large(slow: Served) -> None:
    assert received(send(slow, head(10**12))).startswith(b"HTTP/1.1 413 ")
    assert received(send(slow, head(100_001) + bytes(100_001))).startswith(b"HTTP/1.1 413 ")
    chunked = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    chunk = b"1000\r\n" + bytes(4096) + b"\r\n"
    assert received(send(slow, chunked + chunk * 30)).startswith(b"HTTP/1.1 413 ")
    packed = gzip.compress(bytes(50 << 20))
    answer = received(send(slow, head(len(packed), "Content-Encoding: gzip") + packed))
    assert answer.startswith(b"HTTP/1.1 413 ")
    own = triton_grpc.InferenceServerClient(slow.grpc)
    x = np.zeros((100_000, 4), np.float32)
    with pytest.raises(InferenceServerException) as caught:
        own.infer("affine", [tensor(triton_grpc, "x", x)])
    assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    x = np.zeros((8_000_000, 4), np.float32)
    with pytest.raises(InferenceServerException) as caught:
        own.infer("affine", [tensor(triton_grpc, "x", x)], compression_algorithm="gzip")
    assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    own.close()


def test_requests_are_refused_where_too_many_bytes_are_held(slow: Served) -> None:
    stalled = [send(slow, head(100_000) + b"{") for _ in range(2)]
    body = request_body() + b" " * 60_000
    wait_until(lambda: call(slow, "v2/models/affine/infer", body)[0] == 429, 0.3)
    assert call(slow, "v2/models/affine/infer", request_body())[0] == 200
    for connection in stalled:
        connection.close()
    wait_until(lambda: call(slow, "v2/models/affine/infer", body)[0] == 200)


def test_a_client_that_does_not_read_is_sent_away() -> None:
    spec = TensorSpec("x", (1_500_000,), "float32")
    model = SampleModel("large", (spec,), (spec,), 0, lambda inputs: {"x": inputs["x"].copy()})
    body = np.full(spec.shape, 1 / 3, np.float32).tobytes()  # 28 MB as JSON
    header = "Inference-Header-Content-Length: 0"
    engine = SampleEngine(model)
    with served(engine, FrontEndOptions(write_timeout_s=0.3)) as server:
        connection = send(server, head(len(body), header, model="large") + body)
        wait_until(lambda: engine.statistics("large").success.count == 1, 20)
        wait_until(lambda: "tune_requests_in_flight 0\n" in metrics(server), 20)
        time.sleep(1.0)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            answer = received(connection)
        assert len(answer) < 20_000_000


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
        head("abc"),
        head(-5),
        b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        head(5, "Content-Encoding: br") + b"12345",
        head(5, "Content-Encoding: gzip") + b"12345",
        head(5, "Inference-Header-Content-Length: 6") + b"12345",
        head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"zz\r\n",
        head(2, "Transfer-Encoding: chunked") + b"{}",
    ],
)
def test_broken_http_is_answered_with_4xx(slow: Served, data: bytes) -> None:
    connection = send(slow, data)
    connection.settimeout(5)
    answer = connection.recv(65536)
    assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer
    assert b"Traceback" not in answer
    connection.close()
    assert call(slow, "v2/health/live")[0] == 200


def test_more_connections_than_are_taken(slow: Served) -> None:
    connections = [send(slow, b"") for _ in range(41)]
    assert received(connections[-1]).startswith(b"HTTP/1.1 503 ")
    for connection in connections:
        connection.close()
    wait_until(lambda: _is_live(slow))


def _is_live(server: Served) -> bool:
    try:
        return call(server, "v2/health/live")[0] == 200
    except OSError:
        return False


def test_stopping_answers_what_was_accepted() -> None:
    engine = SampleEngine()
    engine.delay_s = 0.5
    with served(engine) as server, ThreadPoolExecutor(2) as pool:
        own = triton_grpc.InferenceServerClient(server.grpc)
        first = pool.submit(call, server, "v2/models/affine/infer", request_body())
        second = pool.submit(own.infer, "affine", [tensor(triton_grpc, "x", X)])
        wait_until(lambda: engine.running == 2)
        server.begin_stop()
        wait_until(lambda: call(server, "v2/health/ready")[0] == 503)
        assert call(server, "v2/models/affine/infer", request_body())[0] == 503
        assert first.result()[0] == 200
        assert second.result().as_numpy("y").tolist() == (X * 2 + 1).tolist()
        server.thread.join(10)
        assert not server.thread.is_alive()
    assert engine.cancelled == 0


@pytest.mark.parametrize("which", ["http", "grpc"])
def test_a_taken_port_is_one_line(which: str) -> None:
    from gpu_aware_tune.serving.server import serve

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        http, grpc = (address, None) if which == "http" else (None, address)
        with pytest.raises(SetupError, match="cannot listen on 127") as caught:
            asyncio.run(serve(SampleEngine(), asyncio.Event(), http, grpc))
    assert "\n" not in str(caught.value)


# Shared memory.


@pytest.fixture
def region(server: Served) -> Iterator[Any]:
    """64 bytes that a client owns."""
    handle = shm.create_shared_memory_region("r", f"tune-test-{server.http_port}", 64)
    yield handle
    shm.destroy_shared_memory_region(handle)


def test_tensors_in_shared_memory(server: Served, client: Client, region: Any) -> None:
    module = module_of(client)
    key = f"tune-test-{server.http_port}"
    client.unregister_system_shared_memory()  # as the clients' examples begin
    client.unregister_cuda_shared_memory()
    client.register_system_shared_memory("r", key, 64)
    try:
        facts = plain(client.get_system_shared_memory_status())
        entry = facts[0] if isinstance(facts, list) else facts["regions"]["r"]
        assert (entry["key"], int(entry["byte_size"])) == (key, 64)
        shm.set_shared_memory_region(region, [X])
        x = module.InferInput("x", [1, 4], "FP32")
        x.set_shared_memory("r", 16)
        y = module.InferRequestedOutput("y")
        y.set_shared_memory("r", 16, offset=32)
        answer = client.infer("affine", [x], outputs=[y])
        assert plain(answer.get_output("y"))["name"] == "y"
        found = shm.get_contents_as_numpy(region, np.float32, [1, 4], offset=32)
        assert found.tolist() == (X * 2 + 1).tolist()

        y.set_shared_memory("r", 15, offset=32)
        with pytest.raises(InferenceServerException, match="16 bytes of output for 15"):
            client.infer("affine", [x], outputs=[y])
        y.set_shared_memory("r", 16, offset=50)
        with pytest.raises(InferenceServerException, match="not within region"):
            client.infer("affine", [x], outputs=[y])
    finally:
        client.unregister_system_shared_memory("r")
    with pytest.raises(InferenceServerException, match="no region r"):
        client.infer("affine", [x])


def test_shared_memory_that_shrinks_is_an_error(
    server: Served, client: Client, region: Any
) -> None:
    import os

    module = module_of(client)
    key = f"tune-test-{server.http_port}"
    client.register_system_shared_memory("r", key, 64)
    try:
        x = module.InferInput("x", [1, 4], "FP32")
        x.set_shared_memory("r", 16)
        os.truncate(f"/dev/shm/{key}", 8)
        with pytest.raises(InferenceServerException, match="has 8 bytes, not 64"):
            client.infer("affine", [x])
    finally:
        client.unregister_system_shared_memory()


def test_shared_memory_is_off_unless_asked_for(slow: Served) -> None:
    own = triton_grpc.InferenceServerClient(slow.grpc)
    with pytest.raises(InferenceServerException, match="shared memory is off") as caught:
        own.register_system_shared_memory("r", "key", 64)
    assert caught.value.status() == "StatusCode.PERMISSION_DENIED"
    assert call(slow, "v2/systemsharedmemory/region/r/register", b'{"key": "k"}')[0] == 403
    body = request_body(outputs=[{"name": "y", "parameters": {
        "shared_memory_region": "r", "shared_memory_byte_size": 16}}])  # fmt: skip
    assert call(slow, "v2/models/affine/infer", body)[0] == 403
    own.close()


# Beyond the protocol.


def test_changes_are_off_unless_asked_for(server: Served, client: Client) -> None:
    with pytest.raises(InferenceServerException, match="is off"):
        client.load_model("affine")
    with pytest.raises(InferenceServerException, match="is off"):
        client.unload_model("affine")
    assert call(server, "v2/plan", b"{}")[0] == 403


def test_models_and_plans_are_changed_where_it_is_on() -> None:
    engine = SampleEngine()
    with served(engine, FrontEndOptions(admin=True)) as server:
        own = triton_http.InferenceServerClient(server.http)
        own.load_model("affine")
        own.unload_model("affine")
        body = json.dumps({"parameters": {"folder": "/models/b.tuned"}}).encode()
        assert call(server, "v2/repository/models/b/load", body)[0] == 200
        assert [(name, str(path)) for name, path in engine.loaded] == [("b", "/models/b.tuned")]
        grpc_client = triton_grpc.InferenceServerClient(server.grpc)
        grpc_client.load_model("c")
        assert engine.loaded[-1] == ("c", None)
        grpc_client.close()
        assert call(server, "v2/plan", b'{"format": 1, "lanes": [5]}')[0] == 200
        assert call(server, "v2/plan")[1]["lanes"] == [5]
        assert call(server, "v2/plan", b'{"format": 2}') == (400, {"error": "plan: format is 1"})
        origin = {"Origin": "http://evil.example"}
        assert call(server, "v2/plan", b'{"format": 1}', origin)[0] == 403


@pytest.mark.parametrize("name", ["server", "slow"])
def test_nothing_is_left_of_requests(request: pytest.FixtureRequest, name: str) -> None:
    """After everything above, answered, cancelled and refused."""
    found: Served = request.getfixturevalue(name)
    call(found, "v2/health/live")

    def left() -> set[str]:
        lines = metrics(found).splitlines()
        return {line for line in lines if line.startswith(("tune_requests_in", "tune_held"))}

    wait_until(lambda: left() == {"tune_requests_in_flight 0", "tune_held_bytes 0"})


def metrics(served: Served) -> str:
    with urllib.request.urlopen(f"http://{served.http}/metrics", timeout=10) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        return str(response.read().decode())


def test_status_and_metrics(server: Served) -> None:
    assert call(server, "v2/status")[1]["policy"] == "sample"
    assert call(server, "v2/models/affine/infer", request_body())[0] == 200
    text = metrics(server)
    samples = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert name not in samples
            samples[name] = float(value)
    labels = 'model="affine",version="1"'
    assert samples["tune_ready"] == 1
    assert samples[f'tune_requests_total{{{labels},result="success"}}'] >= 1
    count = samples[f"tune_request_latency_seconds_count{{{labels}}}"]
    assert samples[f'tune_request_latency_seconds_bucket{{{labels},le="+Inf"}}'] == count
    assert samples['tune_lane_share_ratio{lane="1"}'] == 0.75
    assert samples['tune_latency_p99_seconds{model="pair"}'] == 0.0015
    assert samples['tune_answers_total{transport="http",status="200"}'] >= 1
