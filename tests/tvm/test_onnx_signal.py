"""Operators that move, transform or draw values, against ONNX Runtime, NumPy or their definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_check import assert_correct, computed, imported
from onnx_graphs import F32, I64, make_model, numbers, value

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.finalize.oracle import make_reference
from gpu_aware_tune.finalize.verify import compare
from gpu_aware_tune.onnx_prepare.random_values import NOTE


def one_node(
    kind: str,
    data: np.ndarray,
    constants: dict[str, Any] | None = None,
    opset: int = 20,
    outputs: int = 1,
    dtype: int = F32,
    **attributes: Any,
) -> onnx.ModelProto:
    names = [f"y{number}" for number in range(outputs)]
    inputs = ["x", *(constants or {})]
    node = helper.make_node(kind, inputs, names, **attributes)
    kind_of = helper.np_dtype_to_tensor_dtype(data.dtype)
    infos = [value("x", kind_of, list(data.shape))]
    return make_model([node], infos, [(name, dtype) for name in names], constants or {}, opset)


# -- Fourier transforms ----------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-2, 1])
@pytest.mark.parametrize("length", [None, 6, 21])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("inverse", [0, 1])
def test_dft(axis: int, length: int | None, parts: int, inverse: int) -> None:
    x = numbers(2, 15, 4, parts)
    complex_x = x[..., 0] + (1j * x[..., 1] if parts == 2 else 0)
    given: dict[str, Any] = {"axis": np.array(axis)}
    given = {"n": np.array(length if length else x.shape[axis]), **given}
    transform = np.fft.ifft if inverse else np.fft.fft
    wanted = transform(complex_x, n=int(given["n"]), axis=axis % 4)
    wanted = np.stack([wanted.real, wanted.imag], -1).astype("float32")
    model = one_node("DFT", x, given, inverse=inverse)
    assert_correct(model, {"x": x}, [wanted], 1e-5)


@pytest.mark.parametrize("extent", [8, 9])
def test_a_real_signal_there_and_back(extent: int) -> None:
    x = numbers(3, extent, 1)
    half = np.fft.rfft(x[..., 0], axis=1)
    half = np.stack([half.real, half.imag], -1).astype("float32")
    assert_correct(one_node("DFT", x, opset=17, axis=1, onesided=1), {"x": x}, [half], 1e-5)
    back = one_node("DFT", half, {"n": np.array(extent), "a": np.array(1)}, inverse=1, onesided=1)
    assert_correct(back, {"x": half}, [x], 1e-5)


@pytest.mark.parametrize("onesided", [0, 1])
@pytest.mark.parametrize("windowed", [True, False])
def test_stft(onesided: int, windowed: bool) -> None:
    x = numbers(2, 128, 1)
    window = np.hanning(16).astype("float32")
    node_inputs: dict[str, Any] = {"step": np.array(8)}
    if windowed:
        node_inputs["window"] = window
    model = one_node("STFT", x, {**node_inputs, "length": np.array(16)}, onesided=onesided)
    if not windowed:
        model.graph.node[0].input[:] = ["x", "step", "", "length"]
    assert_correct(model, {"x": x}, tolerance=1e-5)


# -- patches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "block", "attributes"),
    [
        ([5, 6], [2, 3], {}),
        ([7, 8], [3, 3], {"strides": [2, 2], "pads": [1, 0, 1, 1]}),
        ([9, 9], [2, 2], {"dilations": [3, 2]}),
        ([3, 4, 5], [1, 2, 3], {"strides": [1, 2, 1]}),
        ([11], [4], {"strides": [3]}),
    ],
)
def test_col2im(image: list[int], block: list[int], attributes: dict[str, Any]) -> None:
    rank = len(image)
    ones = [1] * rank
    strides, dilations = attributes.get("strides", ones), attributes.get("dilations", ones)
    pads = attributes.get("pads", [0] * (2 * rank))
    grid = [
        (image[at] + pads[at] + pads[at + rank] - dilations[at] * (block[at] - 1) - 1)
        // strides[at]
        + 1
        for at in range(rank)
    ]
    x = numbers(2, 3 * int(np.prod(block)), int(np.prod(grid)))
    wanted = np.zeros((2, 3, *image), "float32")
    rows = x.reshape(2, 3, *block, *grid)
    for tap in np.ndindex(*block):
        for place in np.ndindex(*grid):
            at = [
                place[axis] * strides[axis] + tap[axis] * dilations[axis] - pads[axis]
                for axis in range(rank)
            ]
            if all(0 <= a < extent for a, extent in zip(at, image, strict=True)):
                wanted[:, :, *at] += rows[:, :, *tap, *place]
    given = {"image": np.array(image), "block": np.array(block)}
    assert_correct(one_node("Col2Im", x, given, **attributes), {"x": x}, [wanted])


@pytest.mark.parametrize(
    ("groups", "own", "attributes", "mask", "bias"),
    [
        (1, 1, {}, False, False),
        (1, 1, {}, False, True),
        (2, 2, {"strides": [2, 1], "pads": [1, 1, 1, 1]}, True, True),
        (1, 2, {"dilations": [2, 1]}, True, False),
    ],
)
def test_deform_conv(
    groups: int, own: int, attributes: dict[str, Any], mask: bool, bias: bool
) -> None:
    rows, columns = 3, 2
    strides, pads = attributes.get("strides", [1, 1]), attributes.get("pads", [0, 0, 0, 0])
    dilations = attributes.get("dilations", [1, 1])
    outputs = [
        (7 + pads[at] + pads[at + 2] - dilations[at] * (kernel - 1) - 1) // strides[at] + 1
        for at, kernel in enumerate((rows, columns))
    ]
    x = numbers(2, 4, 7, 7)
    given = {
        "w": numbers(6, 4 // groups, rows, columns),
        "offset": 3 * numbers(2, own * rows * columns * 2, *outputs),
    }
    if bias:
        given["b"] = numbers(6)
    if mask:
        given["mask"] = numbers(2, own * rows * columns, *outputs)
    model = one_node("DeformConv", x, given, 19, group=groups, offset_group=own, **attributes)
    if mask and not bias:
        model.graph.node[0].input[:] = ["x", "w", "offset", "", "mask"]
    assert_correct(model, {"x": x}, tolerance=1e-4)


def test_displacements_that_are_no_numbers_read_nothing_outside() -> None:
    x, offset = numbers(1, 2, 5, 5), numbers(1, 8, 4, 4)
    offset[0, :, 1] = np.nan
    offset[0, :, 2] = np.inf
    offset[0, :, 3] = -1e30
    model = one_node("DeformConv", x, {"w": numbers(1, 2, 2, 2), "offset": offset}, 19)
    (got,) = computed(imported(model), {"x": x})
    assert got.shape == (1, 1, 4, 4) and np.isfinite(got[:, :, [0, 2, 3]]).all()
    np.testing.assert_array_equal(got[:, :, 2:], 0)


# -- along one axis --------------------------------------------------------------------------------


@pytest.mark.parametrize(("time", "batch"), [(0, 1), (1, 0)])
def test_reverse_sequence(time: int, batch: int) -> None:
    x = numbers(4, 4, 3)
    model = one_node("ReverseSequence", x, {"lengths": np.array([1, 4, 2, 3])}, 17,
                     time_axis=time, batch_axis=batch)  # fmt: skip
    assert_correct(model, {"x": x})


def test_lengths_that_are_known_at_run_time() -> None:
    x, lengths = numbers(5, 2, 3), np.array([2, 5])
    model = one_node("ReverseSequence", x, {"lengths": lengths}, 17)
    del model.graph.initializer[:]
    model.graph.input.append(value("lengths", I64, [2]))
    assert_correct(model, {"x": x, "lengths": lengths})


@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("axis", [0, -1])
def test_cum_prod(axis: int, exclusive: int, reverse: int) -> None:
    x = 1 + 0.3 * numbers(3, 7)
    flipped = np.flip(x, axis) if reverse else x
    wanted = np.cumprod(flipped, axis)
    if exclusive:
        ones = np.ones_like(np.take(wanted, [0], axis))
        wanted = np.concatenate([ones, np.delete(wanted, -1, axis)], axis)
    wanted = np.flip(wanted, axis) if reverse else wanted
    model = one_node(
        "CumProd", x, {"axis": np.array(axis)}, 26, exclusive=exclusive, reverse=reverse
    )
    assert_correct(model, {"x": x}, [wanted.astype("float32")], 1e-5)


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_a_cache_that_is_written_to(mode: str) -> None:
    cache, update = numbers(2, 3, 6, 4), numbers(2, 3, 2, 4)
    starts = np.array([1, 5 if mode == "circular" else 4])
    wanted = cache.copy()
    for batch, start in enumerate(starts):
        for step in range(2):
            wanted[batch, :, (start + step) % 6] = update[batch, :, step]
    model = one_node("TensorScatter", cache, {"update": update, "starts": starts}, 24, mode=mode)
    assert_correct(model, {"x": cache}, [wanted])


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_det(size: int) -> None:
    x = numbers(2, 3, size, size)
    wanted = np.linalg.det(x.astype("float64")).astype("float32")
    assert_correct(one_node("Det", x, opset=17), {"x": x}, [wanted], 1e-5)


def test_det_of_large_matrices_is_refused() -> None:
    with pytest.raises(UserError, match="operator Det"):
        imported(one_node("Det", numbers(6, 6), opset=17))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_mod_of_floats_takes_the_divisors_sign(dtype: str) -> None:
    x = np.array([5.3, -5.3, 5.3, -5.3, 4, -4, 0, 1, -1], dtype)
    by = np.array([2, 2, -2, -2, 2, 2, 3, np.inf, np.inf], dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = one_node("Mod", x, {"by": by}, 13, dtype=kind, fmod=0)
    assert_correct(model, {"x": x}, [np.mod(x, by)])


@pytest.mark.parametrize(
    "shapes", [((3, 4), (4,)), ((4,), (4, 3)), ((4,), (4,)), ((2, 3, 4), (4,))]
)
def test_integer_products_of_vectors(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    generator = np.random.default_rng(0)
    x, w = (generator.integers(-100, 100, shape).astype("int8") for shape in shapes)
    model = one_node("MatMulInteger", x, {"w": w}, 13, dtype=TensorProto.INT32)
    wanted = np.asarray(np.matmul(x.astype("int32"), w.astype("int32")))
    assert_correct(model, {"x": x}, [wanted])


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
def test_scales_of_blocks(axis: int, zero: bool) -> None:
    shape = [4, 6]
    blocks = [2, 6] if axis == 0 else [4, 3]
    x = np.random.default_rng(1).integers(0, 255, shape).astype("uint8")
    given: dict[str, Any] = {"scale": 0.1 + np.abs(numbers(*blocks))}
    if zero:
        given["zero"] = np.random.default_rng(2).integers(100, 150, blocks).astype("uint8")
    scale = np.repeat(given["scale"], 2, axis)
    offset = np.repeat(given.get("zero", np.zeros(blocks)), 2, axis).astype("float32")
    wanted = ((x - offset) * scale).astype("float32")
    model = one_node("DequantizeLinear", x, given, 21, axis=axis, block_size=2)
    assert_correct(model, {"x": x}, [wanted])
    back = one_node(
        "QuantizeLinear", wanted, given, 21, dtype=TensorProto.UINT8, axis=axis, block_size=2
    )
    assert_correct(back, {"x": wanted}, [x])


# -- random values ---------------------------------------------------------------------------------


def noisy(path: Path) -> Path:
    """Random values of every kind that ONNX has, all of which the output depends on."""
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["n"], mean=0.5, scale=2.0, seed=3.0),
        helper.make_node("RandomUniform", [], ["u"], shape=[64, 64], low=-1.0, high=3.0),
        helper.make_node("Sigmoid", ["x"], ["p"]),
        helper.make_node("Bernoulli", ["p"], ["b"], seed=1.0),
        helper.make_node("Dropout", ["x", "ratio", "train"], ["d"]),
        helper.make_node("Add", ["n", "x"], ["y0"]),
        helper.make_node("Mul", ["u", "x"], ["y1"]),
        helper.make_node("Identity", ["b"], ["y2"]),
        helper.make_node("Identity", ["d"], ["y3"]),
    ]
    given = {"ratio": np.float32(0.25), "train": np.array(True)}
    names = [(f"y{number}", F32) for number in range(4)]
    onnx.save(make_model(nodes, [value("x", F32, [64, 64])], names, given, 17), path)
    return path


def test_random_values_have_their_moments_and_are_the_same_in_every_call(tmp_path: Path) -> None:
    model = imported(onnx.load(noisy(tmp_path / "noisy.onnx")))
    assert NOTE in model.notes
    zero, one = np.zeros((64, 64), "float32"), np.ones((64, 64), "float32")
    normal, _, coins, _ = computed(model, {"x": zero})
    assert abs(normal.mean() - 0.5) < 0.15 and abs(normal.std() - 2) < 0.1
    assert abs(coins.mean() - 0.5) < 0.05 and set(np.unique(coins)) == {0, 1}
    again, uniform, _, dropped = computed(model, {"x": one})
    np.testing.assert_allclose(again, normal + 1, rtol=1e-6)
    assert -1 <= uniform.min() < -0.9 and 2.9 < uniform.max() <= 3
    assert abs(uniform.mean() - 1) < 0.1 and abs(uniform.std() - 4 / np.sqrt(12)) < 0.1
    assert abs((dropped == 0).mean() - 0.25) < 0.03
    np.testing.assert_allclose(dropped[dropped != 0], 1 / 0.75, rtol=1e-6)


def test_the_oracle_runs_the_file_with_the_same_random_values(tmp_path: Path) -> None:
    path = noisy(tmp_path / "noisy.onnx")
    reference = make_reference(path, {}, 0, None, None)
    assert "on the original file" in reference.oracle
    model = imported(onnx.load(path))
    draws = [reference.plan.arrays(draw.kind) for draw in reference.draws]
    got = [computed(model, arrays) for arrays in draws]
    assert compare(reference, got, 1e-4).ok
    got[0][1] = got[0][1] + np.float32(0.5)
    assert not compare(reference, got, 1e-4).ok


def test_random_values_of_unknown_shape_are_refused() -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Cast", ["places"], ["f"], to=F32),
        helper.make_node("RandomNormalLike", ["f"], ["n"]),
        helper.make_node("ReduceSum", ["n"], ["y"], keepdims=0),
    ]
    model = make_model(nodes, [value("x", F32, [3])], [("y", F32)], {}, 17)
    with pytest.raises(UserError, match=r"RandomNormalLike|NonZero"):
        imported(model)


def test_an_empty_list_of_axes_means_all(tmp_path: Path) -> None:
    node = helper.make_node("ReduceMax", ["x"], ["y"], keepdims=0)
    node.attribute.append(onnx.AttributeProto(name="axes", type=onnx.AttributeProto.INTS))
    x = numbers(2, 3)
    model = make_model([node], [value("x", F32, [2, 3])], [("y", F32)], {}, 13)
    assert_correct(model, {"x": x}, [np.asarray(x.max())])


def test_an_axis_that_is_not_in_a_list() -> None:
    x = numbers(2, 3)
    given = {"axis": np.array(1)}
    model = make_model(
        [helper.make_node("Unsqueeze", ["x", "axis"], ["y"])],
        [value("x", F32, [2, 3])], [("y", F32)], given, 13,
    )  # fmt: skip
    assert numpy_helper.to_array(model.graph.initializer[0]).ndim == 0
    assert_correct(model, {"x": x}, [x[:, None]])
