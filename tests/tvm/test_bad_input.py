"""What cannot work gives one clear line, the right exit code, and leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
from conftest import RunTune
from onnx import TensorProto, helper

USER, SETUP = 2, 3


def save_model(
    path: Path, operator: str, shape: Sequence[int | str], domain: str = "", **attributes: object
) -> None:
    """Writes a model of one node, "the_node", with the input x and the output y."""
    node = helper.make_node(operator, ["x"], ["y"], name="the_node", domain=domain, **attributes)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "g", [value("x", TensorProto.FLOAT, shape)], [value("y", TensorProto.FLOAT, None)]
    )
    opsets = [helper.make_opsetid("", 17)]
    opsets += [helper.make_opsetid(domain, 1)] if domain else []
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, light_model: Callable[[str], Path]) -> Path:
    """A folder with every kind of model file that the cases need."""
    folder = tmp_path_factory.mktemp("models")
    whole = light_model("squeezenet").read_bytes()
    (folder / "truncated.onnx").write_bytes(whole[: len(whole) // 2])
    (folder / "text.onnx").write_text("This is not a model.\n" * 100)
    (folder / "empty.onnx").touch()
    save_model(folder / "good.onnx", "Relu", [1, 3, 8, 8])
    save_model(folder / "dynamic.onnx", "Relu", ["N", 3, "H", 8])
    save_model(folder / "foreign.onnx", "Frobnicate", [1, 3], domain="my.company")
    save_model(folder / "draw.onnx", "Multinomial", [1, 3])
    save_model(folder / "window.onnx", "AveragePool", [1, 3, 8, 8], kernel_shape=[10, 10])
    save_model(
        folder / "invalid.onnx", "LpPool", [1, 3, 8, 8], kernel_shape=[3], auto_pad="SAME_UPPER"
    )
    constant = onnx.load(folder / "good.onnx")
    constant.graph.initializer.append(
        helper.make_tensor("k", TensorProto.FLOAT, [300], [1.5] * 300)
    )
    constant.graph.node[0].input[0] = "k"
    onnx.save(constant, folder / "constant.onnx")
    few = onnx.load(folder / "good.onnx")
    del few.graph.node[0].input[:]
    onnx.save(few, folder / "few.onnx")
    (folder / "corrupt").mkdir()
    (folder / "corrupt" / "records.sqlite").write_bytes(b"not a database at all" * 100)
    return folder


@dataclass(frozen=True)
class Case:
    args: str
    code: int
    words: tuple[str, ...]  # the value, what is allowed, the fix
    env: tuple[tuple[str, str], ...] = ()


CASES = [
    # Told before anything is loaded.
    Case("missing.onnx", USER, ("missing.onnx", "No such file", ".onnx file")),
    Case(".", USER, ("folder", ".onnx file")),
    Case("empty.onnx", USER, ("empty.onnx", "empty")),
    Case("good.onnx --gpu-pct 0", USER, ("--gpu-pct 0", "1 to 100")),
    Case("good.onnx --gpu-pct 101", USER, ("--gpu-pct 101", "1 to 100")),
    Case("good.onnx --gpu-pct abc", USER, ("--gpu-pct 'abc'", "1 to 100")),
    Case("good.onnx --target rocm", USER, ("--target 'rocm'", "auto, cuda, llvm")),
    Case("good.onnx -o text.onnx/out", SETUP, ("-o 'text.onnx/out'", "Not a directory")),
    Case("good.onnx -o /proc/out", SETUP, ("-o '/proc/out'", "cannot be written")),
    Case("good.onnx --db text.onnx/db", SETUP, ("--db 'text.onnx/db'", "cannot be written")),
    Case("good.onnx", SETUP, ("no C compiler", "install gcc"), env=(("PATH", ""),)),
    # Told by the file itself.
    Case("text.onnx", USER, ("text.onnx", "not an ONNX model")),
    Case("truncated.onnx", USER, ("truncated.onnx", "truncated")),
    Case("dynamic.onnx", USER, ("'x'", "dynamic", "--input x:")),
    Case("dynamic.onnx --input data:1x3x8x8", USER, ("'data'", "no such input", "x")),
    Case("dynamic.onnx --input x:1x3", USER, ("x:1x3", "2 dimensions", "4")),
    Case("good.onnx --input x:1x3x9x8", USER, ("fixed to 8",)),
    Case("foreign.onnx", USER, ("Frobnicate", "the_node", "opset")),
    Case("window.onnx", USER, ("AveragePool", "the_node", "[1, 3, -1, -1]")),
    Case("invalid.onnx", USER, ("invalid.onnx", "ONNX Runtime", "kernel_shape", "export it again")),
    Case("constant.onnx", USER, ("constant.onnx", "the same for all inputs")),
    Case("few.onnx", USER, ("Relu", "the_node", "0 inputs", "1 to 1")),
    # Told by the machine.
    Case("good.onnx --arch nonsense", USER, ("nonsense", "arch")),
    Case("good.onnx --target cuda --arch sm_1", USER, ("sm_1",)),
    Case("good.onnx --db corrupt", SETUP, ("records.sqlite",)),
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: case.args + (" (no PATH)" if case.env else "")
)
def test_one_clear_line(run_tune: RunTune, folder: Path, case: Case) -> None:
    before = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    target = () if "--target" in case.args else ("--target", "llvm")
    done = run_tune(
        "-q", *case.args.split(), *target, "--trials", "4", cwd=folder, env=dict(case.env)
    )
    lines = done.stderr.splitlines()
    assert done.returncode == case.code, done.stderr
    assert done.stdout == ""
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in case.words:
        assert word in lines[0]
    after = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert {path: size for path, size in after.items() if path in before} == before
    assert not (folder / f"{case.args.split('.')[0]}.tuned").exists()


def test_without_quiet_the_error_is_still_the_last_line(run_tune: RunTune, folder: Path) -> None:
    done = run_tune("draw.onnx", "--target", "llvm", cwd=folder)
    assert done.returncode == USER
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    for word in ("Multinomial", "the_node", "opset 17"):
        assert word in last


def test_debug_shows_where_it_came_from(run_tune: RunTune, folder: Path) -> None:
    done = run_tune("text.onnx", "--debug", cwd=folder, env={"COLUMNS": "100", **os.environ})
    assert done.returncode == USER
    assert "Traceback" in done.stderr
