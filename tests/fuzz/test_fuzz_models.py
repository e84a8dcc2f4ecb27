"""ONNX files that were damaged at random: each is imported, or refused in one line, soon, in little memory.

FUZZ_CASES sets the number of cases, FUZZ_SEED the first one; a failure names its seed. The files are
the node tests of the `onnx` package, of every operator, some with their inputs as constants, as
exporters write them. Each is imported in a child, as a run does, and divided into tasks here.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tvm
from fuzz_cases import run_cases
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, numpy_helper

from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.model.tasks import extract
from gpu_aware_tune.onnx_prepare.facts import walk
from gpu_aware_tune.run import import_child
from gpu_aware_tune.run.import_child import import_apart
from gpu_aware_tune.run.session import Session
from gpu_aware_tune.workers import WorkerHost

TARGET = {"kind": "llvm", "num-cores": 2}
LIMIT_S = 120.0  # for a child that others may hold up
LARGEST_BYTES = 2 << 30  # of memory, for files of some kilobytes
LONGEST = 300  # characters, of an error

ODD_INTS = [
    -(2**63), -(2**31), -5, -1, 0, 1, 2, 3, 7, 64, 1000, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1,
]  # fmt: skip
ODD_FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-38, 1e38, float("nan"), float("inf"), -float("inf")]
ODD_TEXTS = [
    b"", b"x", b"\x1b[2J", b"a\nb", b"\xff\xfe", b"SAME_UPPER", b"linear", b"bij,bjk->", b"NOTSET",
    b"(a+)+$", 5000 * b"n", "\u202e".encode(),
]  # fmt: skip

Damage = Callable[[ModelProto, random.Random], None]


# -- kinds of damage -------------------------------------------------------------------------------


def some_node(model: ModelProto, draw: random.Random) -> NodeProto:
    return draw.choice(list(walk(model.graph)))


def change_attribute(model: ModelProto, draw: random.Random) -> None:
    attribute = draw.choice(some_node(model, draw).attribute)
    if attribute.ints:
        attribute.ints[draw.randrange(len(attribute.ints))] = draw.choice(ODD_INTS)
    elif attribute.floats:
        attribute.floats[draw.randrange(len(attribute.floats))] = draw.choice(ODD_FLOATS)
    elif attribute.strings:
        attribute.strings[draw.randrange(len(attribute.strings))] = draw.choice(ODD_TEXTS)
    elif attribute.type == AttributeProto.INT:
        attribute.i = draw.choice(ODD_INTS)
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = draw.choice(ODD_FLOATS)
    elif attribute.type == AttributeProto.STRING:
        attribute.s = draw.choice(ODD_TEXTS)


def change_attribute_kind(model: ModelProto, draw: random.Random) -> None:
    attribute = draw.choice(some_node(model, draw).attribute)
    attribute.type = draw.choice([1, 2, 3, 4, 6, 7, 8, 0])
    if draw.random() < 0.5:
        attribute.i, attribute.s = draw.choice(ODD_INTS), draw.choice(ODD_TEXTS)


def change_list(model: ModelProto, draw: random.Random) -> None:
    """An attribute with one value more or less."""
    attribute = draw.choice([a for n in walk(model.graph) for a in n.attribute if a.ints])
    if draw.random() < 0.5:
        attribute.ints.pop()
    else:
        attribute.ints.append(draw.choice(ODD_INTS))


def drop_attribute(model: ModelProto, draw: random.Random) -> None:
    attributes = some_node(model, draw).attribute
    del attributes[draw.randrange(len(attributes))]


def rename_attribute(model: ModelProto, draw: random.Random) -> None:
    draw.choice(some_node(model, draw).attribute).name = draw.choice(["axis", "", "x\x1b[0m", "to"])


def change_extent(model: ModelProto, draw: random.Random) -> None:
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    dim = draw.choice(draw.choice(values).type.tensor_type.shape.dim)
    if draw.random() < 0.2:
        dim.dim_param = draw.choice(["N", "", "\x1b[2J", 9000 * "n"])
    else:
        dim.dim_value = draw.choice(ODD_INTS)


def change_rank(model: ModelProto, draw: random.Random) -> None:
    shape = draw.choice([*model.graph.input, *model.graph.output]).type.tensor_type.shape
    if draw.random() < 0.5:
        shape.dim.pop()
    else:
        for _ in range(draw.choice([1, 1, 2, 70])):
            shape.dim.add().dim_value = draw.choice([1, 1, 2, 0])


def change_type(model: ModelProto, draw: random.Random) -> None:
    value = draw.choice([*model.graph.input, *model.graph.output])
    value.type.tensor_type.elem_type = draw.choice([*range(25), 99, -1])


def change_value_kind(model: ModelProto, draw: random.Random) -> None:
    value = draw.choice([*model.graph.input, *model.graph.output])
    element = draw.choice([1, 7])
    kind = draw.randrange(4)
    if kind == 0:
        value.type.sequence_type.elem_type.tensor_type.elem_type = element
    elif kind == 1:
        value.type.optional_type.elem_type.tensor_type.elem_type = element
    elif kind == 2:
        value.ClearField("type")
    else:
        value.type.tensor_type.ClearField("shape")


def tensors_of(model: ModelProto) -> list[TensorProto]:
    made = [a.t for n in walk(model.graph) for a in n.attribute if a.HasField("t")]
    return [*model.graph.initializer, *made]


def change_constant(model: ModelProto, draw: random.Random) -> None:
    """One number of a constant: a shape, an axis, a count perhaps."""
    tensor = draw.choice(tensors_of(model))
    array = numpy_helper.to_array(tensor).copy()
    odd = ODD_INTS if array.dtype.kind in "iub" else ODD_FLOATS
    with np.errstate(all="ignore"):
        array.reshape(-1)[draw.randrange(array.size)] = np.array(draw.choice(odd)).astype(
            array.dtype
        )
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def change_tensor(model: ModelProto, draw: random.Random) -> None:
    """What a tensor says of itself."""
    tensor = draw.choice(tensors_of(model))
    kind = draw.randrange(5)
    if kind == 0:
        tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice(ODD_INTS)
    elif kind == 1:
        tensor.dims.append(draw.choice(ODD_INTS))
    elif kind == 2:
        tensor.data_type = draw.choice([*range(25), 99, -1])
    elif kind == 3:
        tensor.raw_data = tensor.raw_data[: draw.randrange(len(tensor.raw_data) + 1)]
    else:
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", draw.choice(["/etc/passwd", "../x", "", 9000 * "d"])


def rewire(model: ModelProto, draw: random.Random) -> None:
    """An input of a node that is another value, absent, or its own output."""
    node = some_node(model, draw)
    names = [*node.output, *(v.name for v in model.graph.input), "", "nothing", "\x1b[2J"]
    names += [name for each in walk(model.graph) for name in each.output]
    place = draw.randrange(len(node.input) + 1)
    if place == len(node.input):
        node.input.append(draw.choice(names))
    else:
        node.input[place] = draw.choice(names)


def drop_input(model: ModelProto, draw: random.Random) -> None:
    some_node(model, draw).input.pop()


def change_outputs(model: ModelProto, draw: random.Random) -> None:
    node = some_node(model, draw)
    if draw.random() < 0.4:
        node.output.pop()
    elif draw.random() < 0.5:
        node.output.append(draw.choice(["more", "", *node.output]))
    else:
        node.output[draw.randrange(len(node.output))] = draw.choice(["", "other", *node.input])


def change_operator(model: ModelProto, draw: random.Random) -> None:
    node = some_node(model, draw)
    if draw.random() < 0.2:
        node.op_type = draw.choice(["", "Frobnicate", "\x1b]0;x\x07", 100_000 * "o"])
    else:
        node.op_type = draw.choice(some_base(draw).graph.node).op_type


def change_opset(model: ModelProto, draw: random.Random) -> None:
    entry = draw.choice(model.opset_import)
    if draw.random() < 0.8:
        entry.version = draw.choice([-1, 0, 1, 6, 7, 9, 10, 11, 12, 13, 15, 18, 21, 30, 2**40])
    else:
        entry.domain = draw.choice(["com.microsoft", "ai.onnx", "x", "\x1b[2J"])


def change_domain(model: ModelProto, draw: random.Random) -> None:
    some_node(model, draw).domain = draw.choice(["com.microsoft", "ai.onnx", "ai.onnx.ml", "x"])
    if draw.random() < 0.5:
        entry = model.opset_import.add()
        entry.domain, entry.version = "com.microsoft", 1


def drop_something(model: ModelProto, draw: random.Random) -> None:
    graph = model.graph
    kept: Any = draw.choice([graph.node, graph.input, graph.output, graph.initializer])
    del kept[draw.randrange(len(kept))]


def repeat_something(model: ModelProto, draw: random.Random) -> None:
    graph = model.graph
    kept: Any = draw.choice([graph.node, graph.input, graph.output, graph.initializer])
    kept.add().CopyFrom(draw.choice(kept))


def chain(model: ModelProto, draw: random.Random) -> None:
    """Nodes of another model behind this one's."""
    other = some_base(draw)
    outputs = [value.name for value in model.graph.output]
    for node in other.graph.node:
        made = model.graph.node.add()
        made.CopyFrom(node)
        made.name = f"chained_{node.name}"
        for place, name in enumerate(made.output):
            made.output[place] = f"c_{name}"
        inner = {name for each in other.graph.node for name in each.output}
        for place, name in enumerate(made.input):
            made.input[place] = f"c_{name}" if name in inner else draw.choice(outputs)
    model.graph.output[0].name = draw.choice([n for n in made.output if n] or outputs)
    model.graph.output[0].type.tensor_type.ClearField("shape")


def deepen(model: ModelProto, draw: random.Random) -> None:
    """A chain of the same node."""
    node = draw.choice(model.graph.node)
    result = model.graph.output[0].name
    for number in range(draw.choice([3, 10, 20])):
        made = model.graph.node.add()
        made.CopyFrom(node)
        made.input[0] = result
        result = f"deep_{number}"
        made.output[0] = result
        made.name = result
    model.graph.output[0].name = result


def make_function(model: ModelProto, draw: random.Random) -> None:
    """A node as a local function, which may call itself."""
    node = some_node(model, draw)
    function = model.functions.add()
    function.name, function.domain = draw.choice(["F", node.op_type]), draw.choice(["", "local"])
    function.input.extend(node.input)
    function.output.extend(node.output)
    function.node.add().CopyFrom(node)
    function.opset_import.extend(model.opset_import)
    if draw.random() < 0.5:
        function.node[0].op_type, function.node[0].domain = function.name, function.domain
    node.op_type, node.domain = function.name, function.domain
    entry = model.opset_import.add()
    entry.domain, entry.version = function.domain, 1


DAMAGE: list[Damage] = [
    change_attribute, change_attribute_kind, change_list, drop_attribute, rename_attribute,
    change_extent, change_rank, change_type, change_value_kind, change_constant, change_constant,
    change_tensor, rewire, drop_input, change_outputs, change_operator, change_opset, change_domain,
    drop_something, repeat_something, chain, deepen, make_function,
]  # fmt: skip


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    kind = draw.randrange(4)
    if kind == 0:
        del data[draw.randrange(len(data)) :]
    elif kind == 1:
        begin, end = sorted(draw.randrange(len(data)) for _ in range(2))
        data[begin:begin] = data[begin : min(end, begin + 4000)]
    else:
        for _ in range(draw.choice((1, 1, 2, 30))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


# -- the cases -------------------------------------------------------------------------------------

BASES: list[tuple[ModelProto, list[np.ndarray | None]]] = []


def some_base(draw: random.Random) -> ModelProto:
    """A node test's model, with none, some or all of its inputs as constants."""
    model, arrays = draw.choice(BASES)
    made = ModelProto()
    made.CopyFrom(model)
    frozen = draw.choice([0.0, 0.0, 0.5, 1.0])
    for value, array in zip(model.graph.input, arrays, strict=False):
        integers = array is not None and array.dtype.kind in "iub"
        if array is not None and draw.random() < (max(frozen, 0.9) if integers else frozen):
            made.graph.initializer.append(numpy_helper.from_array(array, value.name))
            made.graph.input.remove(value)
    return made


def damaged(seed: int) -> bytes:
    """An ONNX file with one to three kinds of damage; the same for the same seed."""
    draw = random.Random(seed)
    model = some_base(draw)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        with contextlib.suppress(Exception):  # the model has no place for it
            draw.choice(DAMAGE)(model, draw)
    content = bytes(model.SerializeToString())
    return damaged_bytes(content, draw) if draw.random() < 0.2 and content else content


@pytest.fixture(scope="module", autouse=True)
def bases() -> None:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    for case in sorted(cases, key=lambda case: str(case.name)):
        data = case.data_sets[0][0] if case.data_sets else []
        arrays = [array if isinstance(array, np.ndarray) else None for array in data]
        if case.model.ByteSize() < 20_000 and case.model.graph.node:
            BASES.append((case.model, arrays))


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """What of a session the import needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_child, "_LEAST_BYTES", LARGEST_BYTES)
        with WorkerHost() as host:
            settings = SimpleNamespace(import_timeout_s=LIMIT_S)
            yield cast("Session", SimpleNamespace(host=host, settings=settings))


def outcome(session: Session, path: Path) -> str:
    """ "opened", "refused", or what should not have happened."""
    try:
        model = import_apart(session, path, TARGET, {}, None)
        extract(model, tvm.target.Target(TARGET))
    except (UserError, SetupError) as error:
        text = str(error).replace(str(path), "model.onnx")
        if not text.isprintable() or len(text) > LONGEST:
            return f"not one printable line of {LONGEST} characters: {text!r}"
        if "is not imported after" in text or "MB to import" in text or "ended: " in text:
            return text
        return "refused"
    except BaseException as error:
        return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
    return "opened"


def test_damaged_models_are_imported_or_refused_in_one_line(
    session: Session, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"

    def run_case(seed: int) -> str:
        path.write_bytes(damaged(seed))
        begun = time.monotonic()
        came = outcome(session, path)
        took = time.monotonic() - begun
        return came if took < LIMIT_S else f"took {took:.0f} s: {came}"

    run_cases(run_case)
    assert not [name for name in os.listdir(tmp_path) if name != path.name]
