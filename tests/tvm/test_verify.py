"""Verification against the original file: what is compared, how closely, and that faults show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_library import write_onnx

from gpu_aware_tune.errors import TuneError, UserError
from gpu_aware_tune.finalize import oracle
from gpu_aware_tune.finalize.oracle import Noise, Reference, make_reference
from gpu_aware_tune.finalize.results import share_results
from gpu_aware_tune.finalize.verify import AS_ORACLE, compare
from gpu_aware_tune.model.draws import ORDINARY, DrawKind
from gpu_aware_tune.partition import Device, Share

F32 = 1e-4


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[int]]],
    outputs: dict[str, int],
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 17,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(name, kind, shape)
            for name, (kind, shape) in inputs.items()
        ],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    path = write_onnx(tmp_path_factory.mktemp("verify") / "net.onnx")
    return make_reference(path, {}, 0, None, None)


Change = Callable[[np.ndarray], np.ndarray]


def outputs(
    reference: Reference, change: Change, kinds: tuple[DrawKind, ...] = ()
) -> list[list[np.ndarray]]:
    """The right outputs, the first of each draw (of some kinds) changed."""
    found = []
    for draw in reference.draws:
        own = [array.copy() for array in draw.outputs]
        if not kinds or draw.kind in kinds:
            own[0] = change(own[0])
        found.append(own)
    return found


def test_the_oracle_is_the_file_itself_and_every_draw_is_compared(reference: Reference) -> None:
    report = compare(reference, outputs(reference, lambda a: a), F32)
    assert report.ok and report.max_error == 0 and report.special == AS_ORACLE
    assert "on the original file" in report.oracle
    assert set(report.draws) == {*ORDINARY, DrawKind.NAN, DrawKind.INFINITE}
    assert [check.name for check in report.outputs] == ["scores", "features"]


@pytest.mark.parametrize("kind", ORDINARY)
def test_an_error_in_any_draw_is_seen(reference: Reference, kind: DrawKind) -> None:
    def off(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[3] += 0.01 * (np.abs(array).max() or 1)
        return array

    report = compare(reference, outputs(reference, off, (kind,)), F32)
    assert not report.ok
    assert report.outputs[0].error == pytest.approx(0.01, rel=0.1)
    assert report.outputs[1].ok


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[:, :-1],
        lambda a: a.astype("float64"),
        lambda a: np.full_like(a, np.nan),
        lambda a: np.where(np.arange(a.size).reshape(a.shape) == 2, np.inf, a).astype(a.dtype),
        lambda a: np.roll(a, 1, -1),
        lambda a: a + np.float32(3e-4) * np.abs(a).max(),
    ],
    ids=["shape", "type", "nan", "one infinity", "shifted", "a small bias everywhere"],
)
def test_what_is_wrong_is_refused(reference: Reference, change: Change) -> None:
    assert not compare(reference, outputs(reference, change, ORDINARY), F32).ok


def test_nan_that_is_hidden_is_told_apart_from_wrong_numbers(reference: Reference) -> None:
    hidden = outputs(reference, np.nan_to_num, (DrawKind.NAN,))
    report = compare(reference, hidden, F32)
    assert report.ok
    assert "draw nan: 'scores' differs" in report.special
    assert "draw nan" in report.text


def test_a_sensitive_output_is_allowed_its_own_noise_and_no_more(tmp_path: Path) -> None:
    """A sigmoid far below zero: a last bit of its input moves it by many last bits."""
    path = save(
        tmp_path / "s.onnx",
        [
            helper.make_node("Mul", ["x", "k"], ["a"]),
            helper.make_node("Sub", ["a", "k"], ["b"]),
            helper.make_node("Exp", ["b"], ["y"]),
        ],
        {"x": (TensorProto.FLOAT, [1, 64])},
        {"y": TensorProto.FLOAT},
        {"k": np.array(20, "float32")},
    )
    reference = make_reference(path, {}, 0, None, None)
    normal = next(draw for draw in reference.draws if draw.kind == DrawKind.NORMAL)
    scale = float(np.abs(normal.outputs[0]).max())
    noise = normal.noise[0].largest / scale
    assert 1e-5 < noise < 1e-3

    def off(part: float) -> list[list[np.ndarray]]:
        return outputs(reference, lambda a: a * np.float32(1 + part), (DrawKind.NORMAL,))

    assert compare(reference, off(0.8 * noise), 1e-6).ok
    assert not compare(reference, off(40 * noise), 1e-6).ok


def test_integers_must_be_equal_unless_the_model_itself_is_undecided(reference: Reference) -> None:
    draw = reference.draws[0]
    classes = np.arange(2000) % 7
    exact = dataclasses.replace(draw, outputs=(classes,), noise=(Noise(0.0, 0.0),))
    one = dataclasses.replace(reference, draws=(exact,), outputs=("classes",))
    off_by = classes.copy()
    off_by[:1] += 1
    assert compare(one, [[off_by]], F32).ok, "one of 2000"
    off_by[:20] += 1
    assert not compare(one, [[off_by]], F32).ok
    noisy = dataclasses.replace(exact, noise=(Noise(0.01, 0.01),))
    assert compare(dataclasses.replace(one, draws=(noisy,)), [[off_by]], F32).ok


def test_inputs_that_index_stay_within_what_they_index(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((50, 8)).astype("float32")
    path = save(
        tmp_path / "g.onnx",
        [
            helper.make_node("Cast", ["ids"], ["wide"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "wide"], ["e"]),
            helper.make_node("Cast", ["mask"], ["m"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["e", "m"], ["y"]),
        ],
        {"ids": (TensorProto.INT32, [4, 30]), "mask": (TensorProto.INT64, [4, 30, 1])},
        {"y": TensorProto.FLOAT},
        {"table": table},
    )
    reference = make_reference(path, {}, 0, None, None)
    assert len(reference.draws) == 2 and reference.notes == ()
    drawn = reference.plan.arrays(DrawKind.NORMAL)
    assert drawn["ids"].max() >= 40 and drawn["ids"].dtype == np.int32
    assert set(np.unique(drawn["mask"])) == {0, 1}


def test_half_precision_that_onnxruntime_cannot_run_is_widened(tmp_path: Path) -> None:
    import ml_dtypes

    weight = np.random.default_rng(0).standard_normal((16, 8)).astype(ml_dtypes.bfloat16)
    path = save(
        tmp_path / "b.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": (TensorProto.BFLOAT16, [4, 16])},
        {"y": TensorProto.BFLOAT16},
        {"w": weight},
    )
    reference = make_reference(path, {}, 0, None, None)
    assert reference.is_widened and "float32 copy" in reference.oracle
    arrays = reference.plan.arrays(DrawKind.NORMAL)
    wanted = arrays["x"].astype("float32") @ weight.astype("float32")
    np.testing.assert_allclose(reference.draws[0].outputs[0], wanted, rtol=1e-5)
    rounded = [[array.astype(ml_dtypes.bfloat16) for array in d.outputs] for d in reference.draws]
    assert compare(reference, rounded, 4e-2).ok


def test_a_users_own_inputs_come_first(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "net.onnx")
    mine = {"image": np.ones((1, 3, 12, 12), "float32"), "bias": np.full((1, 20), 7, "float32")}
    np.savez(tmp_path / "mine.npz", allow_pickle=False, **mine)
    reference = make_reference(path, {}, 0, tmp_path / "mine.npz", None)
    assert reference.draws[0].kind == DrawKind.USER
    np.testing.assert_array_equal(reference.plan.arrays(DrawKind.USER)["bias"], mine["bias"])


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"image": np.ones((1, 3, 12, 12))}, "lacks the input 'bias'"),
        ({"image": np.ones((1, 3, 13, 12)), "bias": np.ones((1, 20))}, "has shape"),
        (None, "cannot be read"),
    ],
)
def test_inputs_that_do_not_fit_are_one_line(
    arrays: dict[str, np.ndarray] | None, told: str, tmp_path: Path
) -> None:
    path = write_onnx(tmp_path / "net.onnx")
    given = tmp_path / "mine.npz"
    if arrays is None:
        given.write_text("no arrays")
    else:
        np.savez(given, allow_pickle=False, **arrays)
    with pytest.raises(UserError, match=f"--verify-inputs .*{told}"):
        make_reference(path, {}, 0, given, None)


def test_a_file_that_nobody_can_run_is_told_with_each_reason(tmp_path: Path) -> None:
    path = save(
        tmp_path / "n.onnx",
        [helper.make_node("Nonsense", ["x"], ["y"])],
        {"x": (TensorProto.FLOAT, [1])},
        {"y": TensorProto.FLOAT},
    )
    with pytest.raises(TuneError, match=r"ONNX Runtime: .*float32: .*reference evaluator: "):
        make_reference(path, {}, 0, None, None)


@pytest.mark.parametrize("order", [0, 1])
def test_an_order_that_is_free_is_the_sorted_one(tmp_path: Path, order: int) -> None:
    """ONNX Runtime leaves the largest in any order where TopK has `sorted` 0."""
    path = save(
        tmp_path / "top.onnx",
        [helper.make_node("TopK", ["x", "k"], ["v", "i"], axis=1, sorted=order)],
        {"x": (TensorProto.FLOAT, [2, 64])},
        {"v": TensorProto.FLOAT, "i": TensorProto.INT64},
        {"k": np.array([40])},
    )
    found = make_reference(path, {}, 0, None, None)
    for draw in found.draws:
        if draw.kind in ORDINARY:
            np.testing.assert_array_equal(draw.outputs[0], -np.sort(-draw.outputs[0], axis=1))


def test_a_file_that_onnxruntime_cannot_optimise_is_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its optimiser writes a QGemm of int8 beside uint8, for which it has no kernel."""
    import onnxruntime

    whole = oracle._session

    def refusing(model: str | bytes, level: object, names: tuple[str, ...]) -> oracle.Run:
        if level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL:
            raise RuntimeError("no kernel")
        return whole(model, level, names)

    monkeypatch.setattr(oracle, "_session", refusing)
    found = make_reference(write_onnx(tmp_path / "net.onnx"), {}, 0, None, None)
    assert "on the original file" in found.oracle


def test_what_vanishes_in_float16_may_be_off_by_its_smallest_steps() -> None:
    step = np.float16(2.0**-24)
    right = np.array([0, 1, 2, 1], np.float16) * step
    draw = oracle.DrawReference(DrawKind.NORMAL, (right,), (Noise(0.0, 0.0),))
    found = Reference(None, "", (draw,), ("y",))  # type: ignore[arg-type]
    assert compare(found, [[right + step]], 1e-2).ok
    assert not compare(found, [[right + np.float16(8) * step]], 1e-2).ok


@pytest.mark.parametrize("kind", [DrawKind.NORMAL, DrawKind.LARGE])
def test_large_inputs_that_overflow_float16_in_the_oracle_are_compared_apart(
    kind: DrawKind,
) -> None:
    right = np.array([np.inf, 6e4, 1, 2], np.float16)
    draw = oracle.DrawReference(kind, (right,), (Noise(0.0, 0.0),))
    found = Reference(None, "", (draw,), ("y",))  # type: ignore[arg-type]
    report = compare(found, [[np.array([6.5e4, np.inf, 1, 2], np.float16)]], 1e-2)
    assert report.ok == (kind == DrawKind.LARGE)
    assert (report.special == AS_ORACLE) == (kind == DrawKind.NORMAL)


def test_a_draw_on_which_the_model_is_chaotic_tells_nothing(reference: Reference) -> None:
    noisy = []
    for draw in reference.draws:
        if draw.kind == DrawKind.LARGE:
            largest = [0.3 * float(np.abs(array).max()) for array in draw.outputs]
            noise = tuple(Noise(each, each) for each in largest)
            draw = dataclasses.replace(draw, noise=noise)
        noisy.append(draw)
    chaotic = dataclasses.replace(reference, draws=tuple(noisy))
    off = outputs(chaotic, lambda a: a * np.float32(1.2), (DrawKind.LARGE,))
    report = compare(chaotic, off, F32)
    assert report.ok and report.max_error < F32 and not report.undecided
    assert any("draw large tells nothing" in note for note in report.notes)
    off = outputs(chaotic, lambda a: a + 2 * np.abs(a).max(), (DrawKind.LARGE,))
    assert not compare(chaotic, off, F32).ok, "more than its noise is wrong in any draw"


def test_an_output_that_is_all_noise_is_not_called_verified() -> None:
    right = np.array([1, 2, 3, 4], np.float32)
    draw = oracle.DrawReference(DrawKind.NORMAL, (right,), (Noise(2.0, 1.0),))
    found = Reference(None, "", (draw,), ("y",))  # type: ignore[arg-type]
    report = compare(found, [[right + np.float32(1)]], F32)
    assert report.ok and report.undecided == ("y",)
    assert "not verified: the model's own noise would hide any error of 'y'" in report.text
    device = Device("llvm", 0, "cpu", "znver4", 2, "core")
    (share,) = share_results([Share(100, 2, device)], {}, {2: report}, {})
    assert not share.verified


def test_inputs_that_are_single_numbers_are_drawn_and_nudged(tmp_path: Path) -> None:
    number = [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Exp", ["x"], ["y"])], "g", number[:1], number[1:])
    path = tmp_path / "number.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    made = make_reference(path, {}, 0, None, None)
    assert not made.notes and {draw.kind for draw in made.draws} >= set(ORDINARY)
    assert max(draw.noise[0].largest for draw in made.draws) > 0


def test_a_model_that_only_runs_on_nan_is_not_verified(reference: Reference) -> None:
    def run(arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if all(np.isfinite(array).all() for array in arrays.values()):
            raise RuntimeError("no such luck")
        return [array.copy() for array in reference.draws[0].outputs]

    found = oracle._Oracle("somebody", run)
    with pytest.raises(
        TuneError, match=r"cannot be run on ordinary inputs: draw normal: .*no such"
    ):
        oracle._run_draws(reference.plan, found, reference.outputs, "float32")


def test_an_output_that_is_the_same_in_every_draw_is_named(reference: Reference) -> None:
    assert not compare(reference, outputs(reference, lambda a: a), F32).unvarying
    zeros, moving = np.zeros(3, np.float32), np.arange(3, dtype=np.float32)
    draws = tuple(
        oracle.DrawReference(kind, (zeros, moving * at), (Noise(0.0, 0.0),) * 2)
        for at, kind in enumerate([DrawKind.NORMAL, DrawKind.LARGE, DrawKind.NAN])
    )
    found = Reference(None, "", draws, ("still", "moving"))  # type: ignore[arg-type]
    report = compare(found, [list(draw.outputs) for draw in draws], F32)
    assert report.ok and report.unvarying == ("still",)
    assert report.text.endswith("in every draw the same values, where errors may not show: 'still'")
    assert report.notes == ("the same values in every draw: 'still'",)
    for few in (draws[:1], draws[2:], ()):
        reduced = dataclasses.replace(found, draws=few)
        given = [list(draw.outputs) for draw in few]
        assert not compare(reduced, given, F32).unvarying, "nothing to compare it with"
