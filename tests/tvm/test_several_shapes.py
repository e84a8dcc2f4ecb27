"""`--input` with several shapes: one folder, whose library takes each of them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tuned_sizes import tuned_once

from gpu_aware_tune import load
from gpu_aware_tune.errors import UserError
from gpu_aware_tune.events import Finished
from gpu_aware_tune.library import read_manifest
from gpu_aware_tune.records.store import Store
from gpu_aware_tune.run.jobs import make_jobs
from gpu_aware_tune.serving.deployments import Deployment
from gpu_aware_tune.serving.engine import Engine

SHAPES = [(1, 8, 12, 12), (2, 8, 17, 17)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Finished]]:
    return tuned_once(
        tmp_path_factory, "several_shapes", {"batch": "N", "size": "S"}, inputs={"x": SHAPES}
    )


@pytest.fixture
def finished(made: tuple[Path, list[Finished]]) -> list[Finished]:
    return made[1]


@pytest.fixture
def folder(made: tuple[Path, list[Finished]]) -> Path:
    return made[0] / "net.tuned"


@pytest.fixture
def model(made: tuple[Path, list[Finished]]) -> Path:
    return made[0] / "net.onnx"


def draw(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype("float32")


def test_each_shape_is_verified_and_named(finished: list[Finished], folder: Path) -> None:
    names = [f"net, x:{'x'.join(map(str, shape))}" for shape in SHAPES]
    assert [event.model for event in finished] == names
    assert all(share.verified for event in finished for share in event.shares)
    assert {event.output for event in finished} == {folder}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["db", "net.onnx", "net.tuned"]
    assert read_manifest(folder).further_shapes == 1
    assert read_manifest(folder / "shape-2").inputs[0].shape == SHAPES[1]


def test_the_further_shapes_start_from_what_the_first_found(
    finished: list[Finished], folder: Path
) -> None:
    with Store(folder.parent / "db", readonly=True) as store:
        first, second = [
            [record.origin for record in store.records() if record.run_id == run.id]
            for run in sorted(store.runs(), key=lambda run: run.id)
        ]
    assert "seed" not in first
    assert second.count("default") < first.count("default")
    assert "seed" in second


def test_weights_are_there_once(folder: Path) -> None:
    assert os.path.samefile(folder / "weights.bin", folder / "shape-2" / "weights.bin")


def test_a_call_runs_the_code_for_its_shape(folder: Path, model: Path) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    with load(folder) as library:
        assert library.inputs[0].shape == (-1, 8, -1, -1)
        assert library.outputs[0].shape == (-1, 10)
        for shape in [*SHAPES, *SHAPES]:
            x = draw(shape)
            outputs = library({"x": x})["y"]
            np.testing.assert_allclose(
                outputs, session.run(None, {"x": x})[0], rtol=1e-4, atol=1e-5
            )
            assert library.benchmark(repeat=2, inputs={"x": x}).n == 2


def test_bad_calls(folder: Path) -> None:
    with load(folder, preload=True) as library:
        with pytest.raises(
            UserError, match=r"x:1x8x17x17: it was tuned for x:1x8x12x12; x:2x8x17x17"
        ):
            library({"x": draw((1, 8, 17, 17))})
        with pytest.raises(UserError, match=r"it must be \?x8x\?x\?"):
            library({"x": draw((1, 4, 12, 12))})
    for shape in SHAPES:
        with pytest.raises(UserError, match="closed"):
            library({"x": draw(shape)})


def test_a_server_says_what_it_needs(folder: Path) -> None:
    with (
        pytest.raises(UserError, match="code for 2 shapes"),
        Engine([Deployment((folder,), 60.0)], adaptive=False),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch": "1,4"}, "do not go together"),
        ({"verify_inputs": "x.npz"}, "leave --input with several shapes out"),
    ],
)
def test_what_does_not_go_together(model: Path, options: dict[str, str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        make_jobs([model], inputs={"x": SHAPES}, **options)


def test_several_models_are_refused(model: Path) -> None:
    with pytest.raises(UserError, match="for one model"):
        make_jobs([model, model], inputs={"x": SHAPES}, gpu_pct=50)
