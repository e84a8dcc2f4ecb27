"""Importing a model in a process that can be ended: the same model, the same errors, its limits."""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
import tvm
import tvm_ffi
from conftest import RunTune
from onnx import TensorProto, helper
from tiny_library import write_onnx

from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.model.importer import load_model
from gpu_aware_tune.run import import_child
from gpu_aware_tune.run.import_child import import_apart
from gpu_aware_tune.run.session import Session
from gpu_aware_tune.workers import WorkerHost
from gpu_aware_tune.workers.pool import Exit

TARGET = {"kind": "llvm", "num-cores": 2}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """What of a session the import needs."""
    with pytest.MonkeyPatch.context() as patch:
        here = Path(__file__).parent  # of this module, for the children
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent)]))
        host = WorkerHost()
    with host:
        settings = SimpleNamespace(import_timeout_s=120.0)
        yield cast("Session", SimpleNamespace(host=host, settings=settings))


def test_the_model_is_the_one_that_an_import_here_gives(session: Session, tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "net.onnx", width=12, channels=8)
    here = load_model(path, tvm.target.Target(dict(TARGET)))
    apart = import_apart(session, path, TARGET, {}, None)
    assert tvm_ffi.structural_equal(apart.module, here.module, map_free_vars=True)
    assert list(apart.weights) == list(here.weights)
    for name, array in here.weights.items():
        np.testing.assert_array_equal(apart.weights[name], array)
        assert apart.weights[name].dtype == array.dtype
        assert apart.weights[name].ctypes.data % 64 == 0
    rest: dict[str, Any] = {"module": None, "weights": {}}
    assert dataclasses.replace(apart, **rest) == dataclasses.replace(here, **rest)


@pytest.mark.parametrize("dtype", ["bfloat16", "bool"])
def test_weights_of_every_type_come_over(session: Session, tmp_path: Path, dtype: str) -> None:
    kind = {"bfloat16": TensorProto.BFLOAT16, "bool": TensorProto.BOOL}[dtype]
    weight = helper.make_tensor("w", kind, [64, 65], [1, 0] * 32 * 65)
    value = [helper.make_tensor_value_info(n, kind, [64, 65]) for n in ("x", "y")]
    operator = {"bfloat16": "Add", "bool": "And"}[dtype]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w"], ["y"])], "g", value[:1], value[1:], [weight]
    )
    path = tmp_path / "typed.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    model = import_apart(session, path, TARGET, {}, None)
    (array,) = model.weights.values()
    assert array.dtype.name == dtype
    assert array.astype(np.float32).ravel().tolist() == [1, 0] * 32 * 65


def test_values_without_elements_come_over(session: Session, tmp_path: Path) -> None:
    """All features are rotated, so that those behind them are (2, 4, 3, 0), which TVM cannot read."""
    shapes = {"x": [2, 4, 3, 8], "cos": [2, 3, 4], "sin": [2, 3, 4], "y": [2, 4, 3, 8]}
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    node = helper.make_node("RotaryEmbedding", ["x", "cos", "sin"], ["y"])
    graph = helper.make_graph([node], "g", values[:3], values[3:])
    path = tmp_path / "rotary.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    assert import_apart(session, path, TARGET, {}, None).outputs[0].shape == (2, 4, 3, 8)


def test_an_error_of_the_user_is_told_as_here(session: Session, tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "net.onnx", width=12, channels=8)
    with pytest.raises(UserError) as here:
        load_model(path, tvm.target.Target(dict(TARGET)), {"nothing": (1,)})
    with pytest.raises(UserError) as apart:
        import_apart(session, path, TARGET, {"nothing": (1,)}, None)
    assert str(apart.value) == str(here.value)
    assert "nothing" in str(apart.value)


def sleep(_connection: Connection) -> None:
    time.sleep(60)


def swell(_connection: Connection) -> None:
    kept = np.ones(600 << 20, np.uint8)
    time.sleep(60)
    del kept


def die(_connection: Connection) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def fail(connection: Connection) -> None:
    connection.send(import_child._as_told(tvm.error.InternalError("broken")))


@pytest.mark.parametrize(
    ("entry", "limit_s", "wanted", "told"),
    [
        (sleep, 0.5, UserError, r"net.onnx is not imported after 0.5 s: give it longer with --imp"),
        (swell, 30, UserError, r"net.onnx takes more than 300 MB to import: "),
        (die, 30, SetupError, r"importing .*net.onnx ended: killed by SIGSEGV"),
    ],
)
def test_a_child_that_takes_too_much_is_ended(
    session: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    entry: Any,
    limit_s: float,
    wanted: type[Exception],
    told: str,
) -> None:
    path = write_onnx(tmp_path / "net.onnx", width=12, channels=8)
    monkeypatch.setattr(import_child, "_LEAST_BYTES", 300 << 20)
    worker = session.host.spawn(entry)
    begun = time.monotonic()
    try:
        with pytest.raises(wanted, match=told) as caught:
            import_child._answer(worker, path, limit_s)
        assert "\n" not in str(caught.value)
    finally:
        worker.kill()
    assert time.monotonic() - begun < 20
    assert not Path(f"/proc/{worker.pid}").exists()


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ("", "killed by SIGSEGV"),
        ("one\ntwo\n\n", "killed by SIGSEGV: two"),
        ("two\nFatal Python error: Aborted\n\nExtension modules: a, b", "killed by SIGSEGV: two"),
        ("!!!!!!! Segfault encountered !!!!!!!\n  File x, line 0, in y", "killed by SIGSEGV"),
    ],
)
def test_where_a_crash_was_is_not_what_it_said(printed: str, told: str) -> None:
    assert Exit(-signal.SIGSEGV, printed).text == told


def hold(connection: Connection) -> None:
    folder = tempfile.TemporaryDirectory()
    connection.send(folder.name)
    time.sleep(600)


def test_what_a_worker_keeps_in_tmpdir_goes_with_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parent  # of this module, for the worker
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent)]))
    with WorkerHost() as host:
        kept = Path(str(import_child._answer(host.spawn(hold), Path("net.onnx"), 30)))
        assert kept.is_dir()
    assert not kept.parent.exists()
    assert kept.parent.parent == Path(tempfile.gettempdir()), "only what belongs to the host"


def test_a_defect_comes_with_its_traceback(session: Session, tmp_path: Path) -> None:
    worker = session.host.spawn(fail)
    try:
        found = import_child._answer(worker, tmp_path / "net.onnx", 30)
    finally:
        worker.kill()
    assert isinstance(found, Exception) and "broken" in str(found)
    assert "InternalError" in found.__notes__[0]


def test_a_limit_that_is_no_duration_is_refused(run_tune: RunTune, tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "net.onnx", width=12, channels=8)
    for given, told in (("soon", "is not a duration"), ("0.5", "at least 1")):
        done = run_tune(path, "--import-timeout", given)
        assert done.returncode == 2
        assert done.stdout == "" and done.stderr.count("\n") == 1
        assert "--import-timeout" in done.stderr and told in done.stderr
