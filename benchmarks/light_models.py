"""The light models of the onnx wheel with seeded random weights in place of their constant fills.

As shipped, every weight is 0.02 and every output 0.001, which hides wrong numerics.

    python -m benchmarks.light_models squeezenet squeezenet.onnx    # writes one; --seed 0
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, numpy_helper


def light_models() -> dict[str, Path]:
    """Return the path of each light model by its name, such as "squeezenet"."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    paths = sorted(folder.glob("light_*.onnx"))
    return {path.stem.removeprefix("light_"): path for path in paths}


def seeded(name: str, seed: int) -> ModelProto:
    """Return a light model whose weights are random, the same for the same seed.

    Convolutions and matrices get He's scale, so that activations keep their size; batch norms are
    near the identity, those at the end of a residual branch small. The last layer is scaled so that
    its results have a standard deviation of 1 and the softmax behind it does not saturate.
    """
    model = onnx.load(light_models()[name])
    graph = model.graph
    generator = np.random.default_rng(seed)
    shapes = {t.name: tuple(numpy_helper.to_array(t)) for t in graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    kept, weights = [], []
    for node in graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        shape = tuple(int(extent) for extent in shapes[node.input[0]])
        values = _weights(generator, shape, node.output[0], readers)
        weights.append(numpy_helper.from_array(values.astype(np.float32), node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)
    used = {value for node in kept for value in node.input}
    others = [tensor for tensor in graph.initializer if tensor.name in used]
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    del graph.initializer[:], graph.input[:]
    graph.initializer.extend([*others, *weights])
    graph.input.extend(inputs)
    model.ir_version = 8  # from 4 on, initializers need not be listed as inputs
    _calm_last_layer(model, generator)
    return model


def write_seeded(name: str, folder: Path) -> Path:
    """Write a light model with the weights of seed 0 as `folder`/`name`.onnx."""
    path = folder / f"{name}.onnx"
    onnx.save(seeded(name, 0), path)
    return path


def _calm_last_layer(model: ModelProto, generator: np.random.Generator) -> None:
    graph = model.graph
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    last = next((node for node in reversed(layers) if node.op_type == "Gemm"), layers[-1])
    probe = ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.append(onnx.ValueInfoProto(name=last.output[0]))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {
        value.name: generator.standard_normal(value.shape).astype(np.float32)
        for value in session.get_inputs()
    }
    # Rounded, so that the last bits of a sum, which differ between machines, do not show.
    spread = float(f"{np.std(session.run(None, feeds)[0]):.2g}")
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Reshape"}
    names = {sources.get(value, value) for value in last.input[1:]}
    for tensor in graph.initializer:
        if tensor.name in names:
            scaled = numpy_helper.to_array(tensor) / np.float32(spread)
            tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))


def _weights(
    generator: np.random.Generator,
    shape: tuple[int, ...],
    name: str,
    readers: dict[str, list[NodeProto]],
) -> np.ndarray:
    node = readers[name][0]
    if node.op_type in ("Unsqueeze", "Reshape"):
        return _weights(generator, shape, node.output[0], readers)
    position = list(node.input).index(name)
    if node.op_type in ("Conv", "Gemm") and position == 1:
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        rows, columns = shape[-2:]  # of a matrix, which may have leading ones before its Reshape
        fan_in = (columns if transposed else rows) if node.op_type == "Gemm" else np.prod(shape[1:])
        return generator.standard_normal(shape) * np.sqrt(2.0 / fan_in)
    is_norm = node.op_type == "BatchNormalization"
    if (is_norm and position == 1) or (node.op_type == "Mul" and len(shape) > 0):
        ends_branch = any(reader.op_type == "Sum" for reader in readers.get(node.output[0], []))
        return generator.uniform(0.8, 1.2, shape) * (0.2 if ends_branch else 1.0)
    if is_norm and position == 4:
        return generator.uniform(0.8, 1.2, shape)
    return generator.standard_normal(shape) * 0.1  # biases and means


def main() -> None:
    """Write one seeded model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", choices=sorted(light_models()), metavar="MODEL",
                        help=", ".join(light_models()))  # fmt: skip
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(seeded(args.model, args.seed), args.path)


if __name__ == "__main__":
    main()
