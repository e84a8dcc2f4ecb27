"""Importer converters of our own, where TVM's lose precision or what they make would be slow.

A converter takes a relax block builder, the inputs (None where one is left out) and the attributes
of a node, and returns a relax expression, or None to leave the node to TVM's importer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tvm

HALF = ("float16", "bfloat16")
Converter = Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]


def dtype_of(value: Any) -> str:
    """The type of a relax expression's elements, "" for what is no tensor."""
    return str(value.ty.dtype) if hasattr(value.ty, "dtype") else ""


def _matmul(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    """Half-precision MatMul with float32 accumulators, which tensor cores have too."""
    from tvm import relax

    dtype = dtype_of(inputs[0])
    if dtype not in HALF:
        return None
    product = builder.normalize(relax.op.matmul(inputs[0], inputs[1], out_dtype="float32"))
    return relax.op.astype(product, dtype)


def _gemm(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    """Half-precision Gemm; scaled and added to in float32 as well."""
    from tvm import relax

    dtype = dtype_of(inputs[0])
    if dtype not in HALF:
        return None
    a, b = (
        relax.op.permute_dims(value, [1, 0]) if attributes.get(flag, 0) else value
        for value, flag in zip(inputs[:2], ("transA", "transB"), strict=True)
    )
    result = relax.op.matmul(a, b, out_dtype="float32")
    alpha = attributes.get("alpha", 1.0)
    if alpha != 1.0:
        result = relax.op.multiply(result, relax.const(alpha, "float32"))
    if len(inputs) > 2 and inputs[2] is not None:
        result = biased(result, relax.op.astype(inputs[2], "float32"), attributes)
    return relax.op.astype(builder.normalize(result), dtype)


def biased(result: Any, bias: Any, attributes: Mapping[str, Any]) -> Any:
    """The product of a Gemm with its bias, both float32."""
    from tvm import relax

    beta = attributes.get("beta", 1.0)
    if beta != 1.0:
        bias = relax.op.multiply(bias, relax.const(beta, "float32"))
    return relax.op.add(result, bias)


def _conv(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    from tvm import relax

    nn = relax.op.nn
    operators = {1: nn.conv1d, 2: nn.conv2d, 3: nn.conv3d}
    return _convolved(builder, inputs, attributes, operators, "OI", {})


def _conv_transpose(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    from tvm import relax

    nn = relax.op.nn
    operators = {1: nn.conv1d_transpose, 2: nn.conv2d_transpose, 3: nn.conv3d_transpose}
    rank = len(inputs[1].ty.shape) - 2
    extra = {"output_padding": attributes.get("output_padding", [0] * rank)}
    return _convolved(builder, inputs, attributes, operators, "IO", extra)


def pads_are_given(attributes: Mapping[str, Any]) -> bool:
    """Whether a convolution says how it pads: otherwise that was made explicit where shapes are known."""
    return attributes.get("auto_pad", b"NOTSET") in (b"NOTSET", b"")


def steps_of(attributes: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Strides, padding and dilation of a convolution over `rank` axes, as relax names them."""
    return {
        "strides": attributes.get("strides", [1] * rank),
        "padding": attributes.get("pads", [0] * (2 * rank)),
        "dilation": attributes.get("dilations", [1] * rank),
    }


def _convolved(
    builder: Any,
    inputs: Sequence[Any],
    attributes: Mapping[str, Any],
    operators: Mapping[int, Callable[..., Any]],
    channels: str,
    extra: Mapping[str, Any],
) -> Any:
    """Half-precision convolutions with float32 accumulators, the bias added in float32."""
    from tvm import relax

    dtype = dtype_of(inputs[0])
    rank = len(inputs[1].ty.shape) - 2
    if dtype not in HALF or rank not in operators or not pads_are_given(attributes):
        return None
    pixels = "DHW"[-rank:]
    result = operators[rank](
        inputs[0],
        inputs[1],
        **steps_of(attributes, rank),
        groups=attributes.get("group", 1),
        data_layout=f"NC{pixels}",
        kernel_layout=f"{channels}{pixels}",
        out_dtype="float32",
        **extra,
    )
    if len(inputs) > 2 and inputs[2] is not None:
        bias = relax.op.reshape(inputs[2], [1, -1] + [1] * rank)
        result = relax.op.add(builder.normalize(result), relax.op.astype(bias, "float32"))
    return relax.op.astype(builder.normalize(result), dtype)


def _clip(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    """Clip of floats in one selection per bound, which keeps NaN; see `legalize`."""
    from gpu_aware_tune.model.legalize import clamped, is_float, scalar

    if not is_float(inputs[0]):
        return None
    bounds = [inputs[place] if place < len(inputs) else None for place in (1, 2)]
    numbers = [None if bound is None else scalar(bound) for bound in bounds]
    chosen = [b if n is None else n for b, n in zip(bounds, numbers, strict=True)]
    return builder.emit_te(clamped, inputs[0], *chosen, primfunc_name_hint="clip")


def _gather(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    """Gather at constant places, as unrolled loops do for each step.

    TVM's importer emits what brings a negative index into range, and then compiles a kernel for each
    of these operators to fold them.
    """
    import numpy as np
    import tvm
    from tvm import relax

    data, index = inputs[:2]
    is_known = isinstance(index, tvm.ir.GenericConst) and isinstance(data.ty, relax.TensorType)
    if not is_known or data.ty.shape is None:
        return None
    places = np.asarray(index.value.numpy())
    axis = attributes.get("axis", 0)
    extent = data.ty.shape[axis]
    if not places.size or not isinstance(extent, tvm.tirx.IntImm):
        return None
    fixed = relax.const(np.asarray(places % int(extent), np.int64), "int64")
    return relax.op.take(data, fixed, axis=axis, mode="clip")


def _pad(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    """Pad of a constant, as the filters of transposed convolutions have; TVM makes a kernel of it."""
    import numpy as np
    import tvm
    from tvm import relax

    given = [value for value in inputs if value is not None]
    known = len(given) == 2 and all(isinstance(value, tvm.ir.GenericConst) for value in given)
    if not known or attributes.get("mode", b"constant") != b"constant":
        return None
    array, pads = (np.asarray(value.value.numpy()) for value in given)
    before, after = np.split(pads, 2)
    if pads.size != 2 * array.ndim or pads.min(initial=0) < 0:
        return None
    padded = np.pad(array, list(zip(before, after, strict=True)))
    return relax.const(padded, str(given[0].ty.dtype))


def _depth_to_space(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    """DepthToSpace in one step, which says of every result where it comes from.

    TVM's importer writes two reshapes and a transpose, in which no rule sees the channels any more.
    """
    import tvm
    from tvm import te

    block = int(attributes["blocksize"])
    blocks_first = attributes.get("mode", b"DCR") == b"DCR"
    shape = inputs[0].ty.shape
    if shape is None or not all(isinstance(extent, tvm.tirx.IntImm) for extent in shape):
        return None

    def depth_to_space(x: te.Tensor) -> te.Tensor:
        batch, channels, height, width = x.shape
        left = channels // (block * block)

        def element(n: Any, c: Any, h: Any, w: Any) -> Any:
            place = h % block * block + w % block
            channel = place * left + c if blocks_first else c * block * block + place
            return x(n, channel, h // block, w // block)

        shape = (batch, left, height * block, width * block)
        return te.compute(shape, element, name="depth_to_space")

    return builder.emit_te(depth_to_space, inputs[0], primfunc_name_hint="depth_to_space")


def _roi_align(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    from gpu_aware_tune.model.roi_align import roi_align

    return roi_align(builder, inputs, attributes)


def _chained(name: str) -> Converter:
    """Max, Min and Sum of several values as so many binary operators, which TVM can fuse.

    Its importer stacks the values and reduces the stack.
    """

    def convert(builder: Any, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        from tvm import relax

        operator = getattr(relax.op, name)
        result = inputs[0]
        for value in inputs[1:]:
            result = builder.normalize(operator(result, value))
        return result

    return convert


CONVERTERS: dict[str, Converter] = {
    "Clip": _clip,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "Gather": _gather,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Max": _chained("maximum"),
    "Min": _chained("minimum"),
    "Pad": _pad,
    "RoiAlign": _roi_align,
    "Sum": _chained("add"),
}


def converters_for(target: tvm.target.Target) -> dict[str, list[Converter]]:
    """The converters of each operator for a target, in the order in which they are asked."""
    from gpu_aware_tune.kernels.schedules.cpu import machine_of

    found = {name: [convert] for name, convert in CONVERTERS.items()}
    if target.kind.name != "llvm":
        return found
    from gpu_aware_tune.model.integer_products import integer_converters
    from gpu_aware_tune.model.merged_groups import merge_groups
    from gpu_aware_tune.model.whole_vectors import whole_vector_converters

    machine = machine_of(target)
    of_kinds: list[dict[str, Converter]] = [
        {"Conv": partial(merge_groups, lanes=machine.lanes)},
        whole_vector_converters(machine.lanes),
    ]
    if machine.dots is not None:
        of_kinds.append(integer_converters(machine.dots))
    for converters in of_kinds:
        for name, convert in converters.items():
            found[name] = [convert, *found.get(name, ())]
    return found
