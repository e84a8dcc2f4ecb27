"""The inference protocol apart from its transports: what is read, what is refused, and how."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from sample_engine import AFFINE, PAIR, SampleEngine, SampleModel, typed_model

from gpu_aware_tune.errors import TuneError, UserError
from gpu_aware_tune.serving.front_end import FrontEnd, FrontEndOptions
from gpu_aware_tune.serving.grpc_messages import MESSAGES
from gpu_aware_tune.serving.grpc_requests import read_message, write_message
from gpu_aware_tune.serving.http_server import unpack
from gpu_aware_tune.serving.metrics import metrics_text
from gpu_aware_tune.serving.requests import Draining, Refused, RunFailed, UnknownModel
from gpu_aware_tune.serving.server import parse_address
from gpu_aware_tune.serving.shared_memory import Regions
from gpu_aware_tune.serving.v2 import (
    DATATYPES,
    InferRequest,
    OutputChoice,
    RegionPart,
    TooLarge,
    chosen_outputs,
    describe_error,
    input_arrays,
    json_values,
    numpy_dtype,
    raw_bytes,
)
from gpu_aware_tune.serving.v2_json import read_request, write_answer

JSON_LIMIT = 1 << 20
FUZZ_ROUNDS = 3000


def decode(
    body: bytes, model: SampleModel = AFFINE, length: int | str | None = None
) -> tuple[InferRequest, dict[str, np.ndarray]]:
    """What the HTTP server does with a body before the engine sees it."""
    header = None if length is None else str(length)
    request = read_request(memoryview(body), header, model, JSON_LIMIT)
    chosen_outputs(model, request)
    return request, input_arrays(model, request, None)


def asked(**changes: Any) -> dict[str, Any]:
    """A good request of the affine model, some fields of its input changed; None leaves one out."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4.5], **changes}
    return {"inputs": [{key: value for key, value in tensor.items() if value is not None}]}


def refusal(body: dict[str, Any] | bytes, length: int | str | None = None) -> str:
    """The one line that refuses a request."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(UserError) as caught:
        decode(text, AFFINE, length)
    facts = describe_error(caught.value)
    assert 400 <= facts.http < 500 and "\n" not in facts.text
    return facts.text


def test_a_request_in_json() -> None:
    request, arrays = decode(json.dumps({**asked(), "id": "7"}).encode())
    assert request.id == "7"
    assert arrays["x"].dtype == np.float32
    assert arrays["x"].tolist() == [[1, 2, 3, 4.5]]


def test_nested_data_is_taken_as_the_shape_is() -> None:
    _, arrays = decode(json.dumps(asked(shape=[2, 4], data=[[1, 2, 3, 4], [5, 6, 7, 8]])).encode())
    assert arrays["x"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_binary_data_is_a_view_of_the_body() -> None:
    head = json.dumps(asked(data=None, parameters={"binary_data_size": 16})).encode()
    values = np.arange(4, dtype=np.float32)
    body = head + values.tobytes()
    _, arrays = decode(body, AFFINE, len(head))
    assert arrays["x"].tolist() == [[0, 1, 2, 3]]
    assert np.shares_memory(arrays["x"], np.frombuffer(body, np.uint8))
    assert not arrays["x"].flags.writeable


def test_a_raw_binary_request() -> None:
    _, arrays = decode(np.arange(4, dtype=np.float32).tobytes(), AFFINE, 0)
    assert arrays["x"].tolist() == [[0, 1, 2, 3]]
    assert "16" in refusal(b"123", 0)


@pytest.mark.parametrize("dtype", list(DATATYPES))
def test_every_datatype_goes_through_binary_and_json(dtype: str) -> None:
    model = typed_model(dtype)
    kind = numpy_dtype(DATATYPES[dtype])
    values = np.array([[0, 1], [1, 0]] if dtype == "bool" else [[0, 1], [100, 7]]).astype(kind)
    tensor = {"name": "x", "datatype": DATATYPES[dtype], "shape": [2, 2]}
    packed = {**tensor, "parameters": {"binary_data_size": values.nbytes}}
    head = json.dumps({"inputs": [packed], "parameters": {"binary_data_output": True}}).encode()
    request, arrays = decode(head + values.tobytes(), model, len(head))
    assert arrays["x"].dtype == kind and arrays["x"].tolist() == values.tolist()
    body = write_answer(model, request, [(OutputChoice("x", binary=True), arrays["x"])])
    assert body.header_length is not None
    assert body.body[body.header_length :] == values.tobytes()

    plain = {"inputs": [{**tensor, "data": json_values("x", values)}]}
    request, arrays = decode(json.dumps(plain).encode(), model)
    assert arrays["x"].dtype == kind and arrays["x"].tolist() == values.tolist()
    answer = json.loads(write_answer(model, request, [(OutputChoice("x"), arrays["x"])]).body)
    assert answer["outputs"][0]["datatype"] == DATATYPES[dtype]
    assert (
        np.array(answer["outputs"][0]["data"]).astype(kind).tolist() == values.reshape(-1).tolist()
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": "z"}, "no input z; it has x"),
        ({"name": "z\n\x1b[2Jz"}, "no input z"),
        ({"name": 7}, "name is not a text"),
        ({"name": None}, "name is missing"),
        ({"datatype": "FP16"}, "datatype FP32, not FP16"),
        ({"datatype": "BYTES", "data": ["a"]}, "strings are not supported"),
        ({"datatype": None}, "datatype is missing"),
        ({"shape": [4]}, "shape [-1, 4]"),
        ({"shape": [0, 4], "data": []}, "shape [-1, 4]"),
        ({"shape": [-1, 4]}, "shape [-1, 4]"),
        ({"shape": [2**40, 4]}, "shape [-1, 4]"),
        ({"shape": [10**400, 4]}, "shape [-1, 4]"),
        ({"shape": [1, 4] * 50_000}, "shape [-1, 4]"),
        ({"shape": [1.0, 4]}, "not a list of integers"),
        ({"shape": [True, 4]}, "not a list of integers"),
        ({"shape": "1,4"}, "shape is not a list"),
        ({"shape": [2, 4]}, "4 values; shape [2, 4] has 8"),
        ({"shape": [2**31 - 1, 4]}, "4 values"),
        ({"data": [1, 2, 3]}, "3 values"),
        ({"data": []}, "0 values"),
        ({"data": [[1, 2], [3, 4]]}, "nested data is not of shape"),
        ({"data": [[[1, 2, 3, 4]]]}, "nested data is not of shape"),
        ({"data": [[1, 2, 3, 4], [5]]}, "nested data is not of shape"),
        ({"shape": [2, 4], "data": [[1, 2, 3, 4], 5, 6, 7, 8]}, "nested data is not of shape"),
        ({"data": [1, 2, 3, [4]]}, "type list"),
        ({"data": [1, 2, 3, "4"]}, "type str"),
        ({"data": [1, 2, 3, None]}, "type NoneType"),
        ({"data": [1, 2, 3, True]}, "type bool"),
        ({"data": [1, 2, 3, {}]}, "type dict"),
        ({"data": [1, 2, 3, 1e39]}, "float32 cannot hold"),
        ({"data": [1, 2, 3, 10**400]}, "float32 cannot hold"),
        ({"data": {"0": 1}}, "data is not a list"),
        ({"data": None}, "no data"),
        ({"parameters": []}, "parameters is not an object"),
        ({"parameters": {"binary_data_size": 16}}, "binary_data_size is not within the 0 bytes"),
        ({"parameters": {"binary_data_size": -1}}, "binary_data_size"),
        ({"parameters": {"binary_data_size": True}}, "binary_data_size"),
        ({"parameters": {"shared_memory_region": "r"}}, "shared_memory_byte_size"),
        ({"parameters": {"shared_memory_region": 5}}, "shared_memory_region"),
    ],
)
def test_a_wrong_input_is_refused(changes: dict[str, Any], text: str) -> None:
    assert text in refusal(asked(**changes))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "not JSON"),
        (b"[]", "not an object"),
        (b"{", "not JSON"),
        (b'{"inputs": [] "x": 1}', "not JSON"),
        (b"\xff\xfe{", "not UTF-8"),
        (json.dumps(asked()).encode("utf-16"), "not UTF-8"),
        (b'{"inputs":' + b"[" * 200_000, "nested too deeply"),
        (b'{"inputs": 1' + b"0" * 5000 + b"}", "not JSON"),
        (b" " * (JSON_LIMIT + 1), "are taken"),
        (json.dumps(asked(data=[1, 2, 3, float("nan")])).encode(), "NaN is not JSON"),
        (json.dumps(asked()).replace("4.5", "1e999").encode(), "cannot hold"),
        (b"{}", "inputs is missing"),
        (b'{"inputs": []}', "input x of affine is missing"),
        (b'{"inputs": [[]]}', "an input is not an object"),
        (json.dumps({"inputs": asked()["inputs"] * 2}).encode(), "given twice"),
        (json.dumps({**asked(), "id": 7}).encode(), "id is not a text"),
        (json.dumps({**asked(), "parameters": {"timeout": -1}}).encode(), "timeout"),
        (json.dumps({**asked(), "parameters": {"timeout": 10**400}}).encode(), "timeout"),
        (json.dumps({**asked(), "parameters": {"timeout": 0.5}}).encode(), "timeout"),
        (json.dumps({**asked(), "outputs": [{"name": "q"}]}).encode(), "no output q; it has y"),
        (json.dumps({**asked(), "outputs": [{"name": "y"}] * 2}).encode(), "asked for twice"),
        (json.dumps({**asked(), "outputs": ["y"]}).encode(), "an output is not an object"),
        (
            json.dumps(
                {**asked(), "outputs": [{"name": "y", "parameters": {"classification": 3}}]}
            ).encode(),
            "classification",
        ),
    ],
)
def test_a_wrong_request_is_refused(body: bytes, text: str) -> None:
    assert text in refusal(body)


@pytest.mark.parametrize("length", ["-1", "1e3", "", "999", "0x10", "１", "9" * 5000, "+5", " 5"])
def test_a_wrong_header_length_is_refused(length: str) -> None:
    assert "Inference-Header-Content-Length" in refusal(json.dumps(asked()).encode(), length)


@pytest.mark.parametrize("size", [0, 12, 15, 17, 20])
def test_binary_data_of_a_wrong_size_is_refused(size: int) -> None:
    head = json.dumps(asked(data=None, parameters={"binary_data_size": size})).encode()
    assert "bytes" in refusal(head + bytes(16), len(head))
    assert "bytes" in refusal(head + bytes(size), len(head))


def test_a_boolean_is_zero_or_one() -> None:
    head = json.dumps(
        {
            "inputs": [
                {"name": "x", "datatype": "BOOL", "shape": [2, 2]}
                | {"parameters": {"binary_data_size": 4}}
            ]
        }
    ).encode()
    with pytest.raises(UserError, match="0 or 1"):
        decode(head + b"\0\1\2\1", typed_model("bool"), len(head))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("uint8", 256), ("uint8", -1), ("int8", 128), ("int64", 2**63), ("uint64", -1), ("int32", 1.5),
     ("bool", 1), ("float16", 1e6), ("int32", True)],
)  # fmt: skip
def test_values_out_of_range_are_refused(dtype: str, value: Any) -> None:
    tensor = {"name": "x", "datatype": DATATYPES[dtype], "shape": [2, 2], "data": [value] * 4}
    with pytest.raises(UserError, match=r"cannot hold|of type"):
        decode(json.dumps({"inputs": [tensor]}).encode(), typed_model(dtype))


def test_infinity_is_refused_in_json_answers_only() -> None:
    values = np.array([1, np.inf], np.float32)
    with pytest.raises(UserError, match="ask for binary_data"):
        json_values("y", values)
    assert raw_bytes(values).tobytes() == values.tobytes()
    with pytest.raises(UserError, match="ask for binary_data"):
        json_values("y", np.array([np.nan], ml_dtypes.bfloat16))


def test_raw_bytes_of_any_layout() -> None:
    values = np.arange(6, dtype=np.int16).reshape(2, 3)
    assert raw_bytes(values.T).tobytes() == values.T.tobytes()
    assert raw_bytes(np.array(3, np.float32)).tobytes() == np.float32(3).tobytes()
    assert raw_bytes(values[:, :0]).tobytes() == b""


@pytest.mark.parametrize(
    ("error", "http", "grpc"),
    [
        (UserError("a"), 400, "INVALID_ARGUMENT"),
        (UnknownModel("a"), 404, "NOT_FOUND"),
        (TooLarge("a"), 413, "RESOURCE_EXHAUSTED"),
        (Refused("a"), 429, "RESOURCE_EXHAUSTED"),
        (Draining("a"), 503, "UNAVAILABLE"),
        (RunFailed("a"), 500, "INTERNAL"),
        (TuneError("a"), 500, "INTERNAL"),
        (KeyError("secret"), 500, "INTERNAL"),
    ],
)
def test_errors_have_a_status(error: Exception, http: int, grpc: str) -> None:
    facts = describe_error(error)
    assert (facts.http, facts.grpc) == (http, grpc)
    assert "secret" not in facts.text


@pytest.mark.parametrize("text", ["8000", ":1", "a:b", "a:70000", "a:-1", "[::1]", "a:１"])
def test_a_wrong_address_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="HOST:PORT"):
        parse_address(text)


def test_addresses() -> None:
    assert parse_address("127.0.0.1:0") == ("127.0.0.1", 0)
    assert parse_address("[::1]:8000") == ("::1", 8000)


def test_packed_bodies_are_unpacked_up_to_a_limit() -> None:
    import gzip
    import zlib

    assert unpack(gzip.compress(b"abc"), 10) == b"abc"
    assert unpack(zlib.compress(b"abc"), 3) == b"abc"
    with pytest.raises(TooLarge):
        unpack(gzip.compress(bytes(1 << 22)), 1000)
    for bad in (b"", b"abc", gzip.compress(b"abc")[:-1], gzip.compress(b"abc") + b"x"):
        with pytest.raises(UserError):
            unpack(bad, 1000)


def test_labels_of_metrics_are_escaped() -> None:
    name = 'a"b\\c\nd\ud800'
    engine = SampleEngine(dataclasses.replace(AFFINE, name=name))
    front = asyncio.run(_make_front(engine))
    lines = metrics_text(front).splitlines()
    assert r'tune_good_requests_total{model="a\"b\\c\nd?",version="1"} 0' in lines
    assert all(line.startswith(("tune_", "# HELP tune_", "# TYPE tune_")) for line in lines)


async def _make_front(engine: SampleEngine) -> FrontEnd:
    return FrontEnd(engine, FrontEndOptions())


# Fuzzing: whatever is sent, the answer is arrays made of it, or a refusal.


def mutate(body: bytearray, source: random.Random) -> bytes:
    for _ in range(source.randrange(1, 6)):
        at = source.randrange(len(body) + 1)
        match source.randrange(5):
            case 0:
                body[at : at + 1] = bytes([source.randrange(256)])
            case 1:
                del body[at : at + source.randrange(1, 9)]
            case 2:
                body[at:at] = body[source.randrange(len(body)) :][: source.randrange(12)]
            case 3:
                body[at:at] = source.choice(
                    [
                        b"[",
                        b"]",
                        b"{",
                        b"}",
                        b'"',
                        b",",
                        b"-1",
                        b"1e99",
                        b"null",
                        b"true",
                        b"NaN",
                        b"0",
                    ]
                )
            case _:
                body[at : at + 4] = b"9" * source.randrange(1, 20)
        if not body:
            body += b"{"
    return bytes(body)


def check_decoded(arrays: dict[str, np.ndarray]) -> None:
    assert set(arrays) == {"a", "b"}
    for array in arrays.values():
        assert array.shape == (2, 3) and array.dtype == np.float32


def test_fuzzed_json_is_decoded_or_refused() -> None:
    source = random.Random(1)
    tensor = {"datatype": "FP32", "shape": [2, 3], "data": [1, 2, 3.5, 4, 5, 6]}
    facts = {
        "id": "1",
        "inputs": [{"name": "a", **tensor}, {"name": "b", **tensor}],
        "outputs": [{"name": "sum", "parameters": {"binary_data": False}}],
        "parameters": {"timeout": 1000, "binary_data_output": True},
    }
    decoded, statuses = 0, set()
    for _ in range(FUZZ_ROUNDS):
        body = mutate(bytearray(json.dumps(facts).encode()), source)
        try:
            check_decoded(decode(body, PAIR)[1])
            decoded += 1
        except UserError as error:
            statuses.add(describe_error(error).http)
    assert statuses == {400}
    assert 0 < decoded < FUZZ_ROUNDS


def test_fuzzed_framing_yields_bytes_of_the_body_or_a_refusal() -> None:
    source = random.Random(2)
    values = np.arange(12, dtype=np.float32)
    decoded, statuses = 0, set()
    for _ in range(FUZZ_ROUNDS):
        sizes = [source.choice([24, 24, 24, 0, 23, 48, -24, 2**31, 2**64]) for _ in range(2)]
        facts = {
            "inputs": [
                {"name": name, "datatype": "FP32", "shape": [2, 3]}
                | {"parameters": {"binary_data_size": size}}
                for name, size in zip("ab", sizes, strict=True)
            ]
        }
        head = json.dumps(facts).encode()
        length = len(head) + source.choice([0, 0, 0, 1, -1, 24, -len(head)])
        body = head + values.tobytes()[: source.choice([48, 48, 48, 47, 0])]
        try:
            arrays = decode(body, PAIR, length)[1]
        except UserError as error:
            statuses.add(describe_error(error).http)
        else:
            check_decoded(arrays)
            assert arrays["a"].tobytes() + arrays["b"].tobytes() == body[-48:]
            decoded += 1
    assert statuses == {400}
    assert 0 < decoded < FUZZ_ROUNDS


# gRPC messages.


def message(raw: bool = True) -> Any:
    request = MESSAGES["ModelInferRequest"](model_name="affine", id="5")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    if raw:
        request.raw_input_contents.append(np.arange(4, dtype=np.float32).tobytes())
    else:
        tensor.contents.fp32_contents.extend([0, 1, 2, 3])
    return request


@pytest.mark.parametrize("raw", [True, False])
def test_a_message_and_its_answer(raw: bool) -> None:
    request = message(raw)
    request.parameters["timeout"].int64_param = 5000
    found = read_message(
        MESSAGES["ModelInferRequest"].FromString(request.SerializeToString()), JSON_LIMIT
    )
    assert (found.id, found.timeout_s) == ("5", 0.005)
    arrays = input_arrays(AFFINE, found, None)
    assert arrays["x"].tolist() == [[0, 1, 2, 3]]
    answer = write_message(AFFINE, found, [(OutputChoice("y"), arrays["x"])])
    assert answer.raw_output_contents[0] == arrays["x"].tobytes()
    assert (answer.id, list(answer.outputs[0].shape)) == ("5", [1, 4])


def test_wrong_messages_are_refused() -> None:
    def both(request: Any) -> None:
        request.inputs[0].contents.fp32_contents.append(1)

    def wrong_list(request: Any) -> None:
        del request.raw_input_contents[:]
        request.inputs[0].contents.fp64_contents.extend([1] * 4)

    def more(request: Any) -> None:
        request.raw_input_contents.append(b"")

    def none(request: Any) -> None:
        del request.raw_input_contents[:]

    def short(request: Any) -> None:
        request.raw_input_contents[0] = b"123"

    def strings(request: Any) -> None:
        del request.raw_input_contents[:]
        request.inputs[0].datatype = "BYTES"
        request.inputs[0].contents.bytes_contents.extend([b"1"] * 4)

    def negative(request: Any) -> None:
        request.inputs[0].shape[:] = [-1, 4]

    def nan(request: Any) -> None:
        request.parameters["timeout"].int64_param = -1

    for change in (both, wrong_list, more, none, short, strings, negative, nan):
        request = message()
        change(request)
        with pytest.raises(UserError):
            input_arrays(AFFINE, read_message(request, JSON_LIMIT), None)


@pytest.mark.parametrize(("dtype", "value"), [("int8", 200), ("uint16", 70000), ("int16", -40000)])
def test_typed_contents_are_checked_for_their_range(dtype: str, value: int) -> None:
    request = MESSAGES["ModelInferRequest"]()
    tensor = request.inputs.add(name="x", datatype=DATATYPES[dtype], shape=[2, 2])
    contents = tensor.contents.uint_contents if dtype[0] == "u" else tensor.contents.int_contents
    contents.extend([1, 1, 1, value])
    with pytest.raises(UserError, match="cannot hold"):
        input_arrays(typed_model(dtype), read_message(request, JSON_LIMIT), None)


def test_typed_contents_have_a_limit() -> None:
    with pytest.raises(TooLarge, match="raw_input_contents"):
        read_message(message(raw=False), 15)


def test_fuzzed_messages_are_decoded_or_refused() -> None:
    source = random.Random(3)
    good = message().SerializeToString()
    outcomes = set()
    for _ in range(FUZZ_ROUNDS):
        body = bytearray(good)
        for _ in range(source.randrange(1, 4)):
            body[source.randrange(len(body))] = source.randrange(256)
        try:
            request = MESSAGES["ModelInferRequest"].FromString(bytes(body))
        except DecodeError:  # gRPC itself answers these
            continue
        try:
            found = read_message(request, JSON_LIMIT)
            chosen_outputs(AFFINE, found)
            arrays = input_arrays(AFFINE, found, None)
            assert arrays["x"].shape == (1, 4)
            outcomes.add("decoded")
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"decoded", "refused"}


def test_messages_live_beside_those_of_a_client_library() -> None:
    from tritonclient.grpc import model_config_pb2, service_pb2

    def facts(field: Any) -> tuple[Any, ...]:
        choice = field.containing_oneof
        kind = field.message_type or field.enum_type
        return (
            field.number,
            field.type,
            field.is_repeated,
            choice and choice.name,
            kind and kind.full_name,
        )

    for name, made in MESSAGES.items():
        outer, *inner = name.split(".")
        theirs = getattr(service_pb2, outer, None) or getattr(model_config_pb2, outer)
        for part in inner:
            theirs = getattr(theirs, part)
        assert made is not theirs
        for field in made.DESCRIPTOR.fields:
            assert facts(field) == facts(theirs.DESCRIPTOR.fields_by_name[field.name]), name
    enum = MESSAGES["ModelInput"].DESCRIPTOR.fields_by_name["data_type"].enum_type
    theirs = model_config_pb2.DataType.DESCRIPTOR
    assert {v.name: v.number for v in enum.values} == {v.name: v.number for v in theirs.values}


# Shared memory.


@pytest.fixture
def regions(tmp_path: Path) -> Iterator[Regions]:
    found = Regions(1 << 20, tmp_path)
    yield found
    found.close()


def test_a_region_is_read_and_written(regions: Regions, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(bytes(range(100)))
    regions.register("r", "/key", 10, 80)
    assert regions.read(RegionPart("r", 5, 3)) == bytes([15, 16, 17])
    regions.write(RegionPart("r", 0, 4), memoryview(b"abcd"))
    assert file.read_bytes()[8:16] == bytes([8, 9]) + b"abcd" + bytes([14, 15])
    assert [one.key for one in regions.list()] == ["/key"]
    regions.unregister("r")
    regions.unregister("r")
    assert regions.list() == []


@pytest.mark.parametrize(
    "key", ["", "/", ".", "..", "../key", "a/b", "//key", "a\0b", "x" * 300, "\ud800", "sem.x", "none",
            "link", "folder", "pipe", "gpu-aware-tune-1"],
)  # fmt: skip
def test_a_key_that_is_no_region_is_refused(regions: Regions, tmp_path: Path, key: str) -> None:
    (tmp_path / "key").write_bytes(bytes(100))
    (tmp_path / "gpu-aware-tune-1").write_bytes(bytes(100))
    (tmp_path / "link").symlink_to(tmp_path / "key")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError):
        regions.register("r", key, 0, 10)
    assert regions.list() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_region_of_another_user_is_refused(regions: Regions, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(bytes(100))
    os.chown(tmp_path / "key", 12345, 12345)
    with pytest.raises(UserError, match="of this user"):
        regions.register("r", "key", 0, 10)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 101), (101, 1), (0, 0), (-1, 5), (0, -1), (2**63, 1), (1, 2**64)]
)
def test_a_region_larger_than_its_file_is_refused(
    regions: Regions, tmp_path: Path, offset: int, size: int
) -> None:
    (tmp_path / "key").write_bytes(bytes(100))
    with pytest.raises(UserError):
        regions.register("r", "key", offset, size)


@pytest.mark.parametrize(("offset", "size"), [(0, 101), (100, 1), (-1, 2), (2**62, 2**62)])
def test_parts_outside_of_a_region_are_refused(
    regions: Regions, tmp_path: Path, offset: int, size: int
) -> None:
    (tmp_path / "key").write_bytes(bytes(200))
    regions.register("r", "key", 0, 100)
    with pytest.raises(UserError):
        regions.read(RegionPart("r", offset, size))
    with pytest.raises(UserError):
        regions.write(RegionPart("r", offset, size), memoryview(b"a"))


def test_a_region_that_shrinks_or_vanishes_is_an_error(regions: Regions, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(bytes(8192))
    part = RegionPart("r", 4096, 4096)
    regions.register("r", "key", 0, 8192)
    os.truncate(file, 100)
    with pytest.raises(UserError, match="has 100 bytes"):
        regions.read(part)
    with pytest.raises(UserError, match="has 100 bytes"):
        regions.write(part, memoryview(bytes(10)))
    assert file.stat().st_size == 100
    os.truncate(file, 8192)
    assert regions.read(part) == bytes(4096)
    file.unlink()
    file.write_bytes(b"a" * 8192)  # another file of that name is another region
    with pytest.raises(UserError, match="removed"):
        regions.read(part)


def test_names_and_sizes_of_regions(regions: Regions, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(bytes(100))
    regions.register("r", "key", 0, 100)
    with pytest.raises(UserError, match="registered already"):
        regions.register("r", "key", 0, 100)
    with pytest.raises(UserError, match="256"):
        regions.register("", "key", 0, 100)
    with pytest.raises(UserError, match="no region"):
        regions.read(RegionPart("q", 0, 1))
    with pytest.raises(UserError, match="no region"):
        regions.list("q")
    with pytest.raises(UserError, match="bytes of output"):
        regions.write(RegionPart("r", 0, 3), memoryview(b"abcd"))
    os.truncate(tmp_path / "key", 1 << 22)
    regions.register("large", "key", 0, 1 << 22)
    with pytest.raises(TooLarge):
        regions.read(RegionPart("large", 0, 1 << 22))


def test_without_the_extra_one_line_says_what_to_install() -> None:
    program = """
import asyncio, sys
sys.modules["aiohttp"] = None
from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.serving.server import serve
try:
    asyncio.run(serve(None, asyncio.Event(), grpc=None))
except SetupError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "pip install 'gpu-aware-tune[serve]'" in done.stdout
