"""Makes the inputs of an ONNX graph real inputs, static, with the shapes that the user gives."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from onnx import ModelProto, TensorProto, TensorShapeProto, ValueInfoProto

from gpu_aware_tune.errors import MESSAGE_LENGTH, UserError, one_line, quoted

NAMELESS = {"", "?", "-1", "None"}  # what exporters write for dimensions that they do not know


def drop_inputs(model: ModelProto, names: Collection[str]) -> None:
    """Remove inputs of the graph."""
    kept = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def drop_weight_inputs(model: ModelProto) -> None:
    """Leave only real inputs: up to IR version 3 the initializers are listed as inputs too."""
    drop_inputs(model, {tensor.name for tensor in model.graph.initializer})


def fix_inputs(model: ModelProto, input_shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Leave only real inputs, static, with the shapes given.

    A first dimension that is neither given nor known is taken for the batch, and becomes 1.

    Returns:
        Notes on what was assumed, for the user.

    Raises:
        UserError: another dimension is missing, or a shape does not fit.
    """
    drop_weight_inputs(model)
    inputs = {value.name: value for value in model.graph.input}
    for name in input_shapes:
        if name not in inputs:
            known = ", ".join(inputs) or "none"
            raise UserError(
                f"--input {name!r}: the model has no such input; its inputs are {known}"
            )
    symbols: dict[str, int] = {}
    for name, value in inputs.items():
        if value.type.WhichOneof("value") != "tensor_type":
            raise UserError(
                f"input {name!r} is not a tensor; sequences and optionals are not taken"
            )
        if value.type.tensor_type.elem_type == TensorProto.STRING:
            raise UserError(f"input {name!r} holds strings; only numbers are taken")
        if name in input_shapes:
            _fix_input(value, tuple(input_shapes[name]), symbols)
    # Exporters of old wrote 0 for a dimension that they did not know.
    smallest = 1 if model.ir_version < 4 else 0
    _set_symbols(inputs, symbols)
    notes = _assume_batch(inputs, symbols, smallest)
    _refuse_dynamic(list(inputs.values()), smallest)
    for value in model.graph.output:
        if value.type.WhichOneof("value") not in ("tensor_type", None):
            raise UserError(
                f"output {quoted(value.name)} is no tensor; sequences and optionals are not returned"
            )
        if value.type.HasField("tensor_type"):  # what it says may be stale, and is inferred anyway
            value.type.tensor_type.ClearField("shape")
    return notes


def batch_shapes(
    model: ModelProto, batch: int, input_shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the inputs at a batch size: their first dimensions, as far as they are dynamic.

    Args:
        model: as read; it is not changed.
        batch: the batch size.
        input_shapes: of inputs with other dynamic dimensions; their first extent does not matter.

    Raises:
        UserError: no input has a dynamic first dimension, or another one is dynamic.
    """
    smallest = 1 if model.ir_version < 4 else 0
    weights = {tensor.name for tensor in model.graph.initializer}
    found = dict(input_shapes)
    changed = False
    for value in model.graph.input:
        dims = list(value.type.tensor_type.shape.dim)
        if value.name in weights or not dims or not _is_dynamic(dims[0], smallest):
            continue
        changed = True
        if value.name in input_shapes:
            found[value.name] = (batch, *input_shapes[value.name][1:])
        elif not any(_is_dynamic(dim, smallest) for dim in dims[1:]):
            found[value.name] = (batch, *[dim.dim_value for dim in dims[1:]])
    if not changed:
        raise UserError(
            f"--batch {batch}: no input of the model has a dynamic first dimension; export it with a"
            " dynamic batch axis, or leave --batch out"
        )
    return found


def _set_symbols(inputs: Mapping[str, ValueInfoProto], symbols: Mapping[str, int]) -> None:
    for value in inputs.values():
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_value = symbols[dim.dim_param]


def _is_dynamic(dim: TensorShapeProto.Dimension, smallest: int) -> bool:
    return not dim.HasField("dim_value") or dim.dim_value < smallest


def _assume_batch(
    inputs: Mapping[str, ValueInfoProto], symbols: dict[str, int], smallest: int
) -> list[str]:
    """Make the first dimension 1 where it alone is dynamic in every input that has dynamic ones."""
    found: dict[str, TensorShapeProto.Dimension] = {}
    for name, value in inputs.items():
        dynamic = [dim for dim in value.type.tensor_type.shape.dim if _is_dynamic(dim, smallest)]
        first = list(value.type.tensor_type.shape.dim[:1])
        if not value.type.tensor_type.HasField("shape") or dynamic not in ([], first):
            return []
        if dynamic:
            found[name] = dynamic[0]
    for dim in found.values():
        if dim.dim_param not in NAMELESS:
            symbols[dim.dim_param] = 1
        dim.dim_value = 1
    _set_symbols(inputs, symbols)
    if not found:
        return []
    name = next(iter(found))
    shown = _shape_text(inputs[name])
    names = ", ".join(quoted(name) for name in list(found)[:3])
    return [
        f"the first dimension of {names} is dynamic and taken as 1; "
        f"for another batch use --input {one_line(name, 60)}:{shown}"
    ]


def _fix_input(value: ValueInfoProto, shape: tuple[int, ...], symbols: dict[str, int]) -> None:
    tensor = value.type.tensor_type
    given = f"--input {value.name}:{'x'.join(map(str, shape))}"
    if any(extent < 1 for extent in shape):
        raise UserError(f"{given}: every dimension must be at least 1")
    if not tensor.HasField("shape"):
        for extent in shape:
            tensor.shape.dim.add().dim_value = extent
        return
    dims = tensor.shape.dim
    if len(dims) != len(shape):
        raise UserError(
            f"{given}: {len(shape)} dimensions, but the model's input has {len(dims)}: "
            f"{_shape_text(value)}"
        )
    for axis, (dim, extent) in enumerate(zip(dims, shape, strict=True)):
        if dim.HasField("dim_value") and dim.dim_value > 0 and dim.dim_value != extent:
            raise UserError(
                f"{given}: dimension {axis} is fixed to {dim.dim_value} in the model "
                f"({_shape_text(value)}); only dynamic dimensions can be set"
            )
        if dim.dim_param not in NAMELESS and symbols.setdefault(dim.dim_param, extent) != extent:
            raise UserError(
                f"{given}: dimension {axis} ({dim.dim_param}) is already "
                f"{symbols[dim.dim_param]} elsewhere; use one value for it"
            )
        dim.dim_value = extent


def _refuse_dynamic(values: list[ValueInfoProto], smallest: int) -> None:
    problems, flags = [], []
    for value in values:
        tensor = value.type.tensor_type
        if not tensor.HasField("shape"):
            problems.append(f"input {quoted(value.name)} has no shape")
            flags.append(f"--input {value.name}:1x3x224x224")
            continue
        dims = list(tensor.shape.dim)
        unknown = [axis for axis, dim in enumerate(dims) if _is_dynamic(dim, smallest)]
        if not unknown:
            continue
        named = ", ".join(
            f"{axis} ({one_line(dims[axis].dim_param or 'unnamed', 40)})" for axis in unknown
        )
        problems.append(f"input {quoted(value.name)} has dynamic dimension {named}")
        guesses = [1, 3, 224, 224] if len(dims) == 4 else [1] + [128] * (len(dims) - 1)
        example = [dim.dim_value or guess for dim, guess in zip(dims, guesses, strict=False)]
        flags.append(f"--input {value.name}:{'x'.join(map(str, example))}")
    if problems:
        text, fix = "; ".join(problems), f": fix it, for example with {' '.join(flags)}"
        if len(text) + len(fix) > MESSAGE_LENGTH and problems[1:]:
            text = f"{problems[0]}; {len(problems) - 1} inputs more are dynamic"
        raise UserError(one_line(text + fix))


def _shape_text(value: ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    return "x".join(
        str(dim.dim_value) if dim.dim_value > 0 else one_line(dim.dim_param or "?", 40)
        for dim in dims
    )
