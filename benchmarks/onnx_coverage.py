"""How much of ONNX imports, compiles and matches: ours against stock TVM.

Runs the ONNX backend node tests through `load_model` and a plain TVM build, and through TVM's own
importer, each case in a forked child with a time limit, so that a crash or a hang is one failure.

Population: every node test of the standard domain whose inputs and outputs are all tensors of the
types NumPy has (no sequences, optionals, strings, or sub-byte, float8 and bfloat16 types) and of
which at least one is floating point. Shape-like inputs (`SHAPE_LIKE`) are frozen into initializers,
as exporters do, for both routes alike. Two figures come out: one case per operator (the first that
ONNX lists, without the `_expanded` twins), and all cases. A refusal counts as a failure.

With `--files` the population is every ONNX file below a folder that ONNX Runtime runs, such as a peer's
test suite: on drawn inputs, with unknown extents fixed to the first small number that it accepts.

    python -m benchmarks.onnx_coverage                 # everything, both routes
    python -m benchmarks.onnx_coverage --files FOLDER --routes ours -o burn.json
    python -m benchmarks.onnx_coverage --per-family    # one case per operator
    python -m benchmarks.onnx_coverage --family Resize --verbose
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from benchmarks.environment import RESULTS, environment, write_results

RESULTS_FILE = RESULTS / "onnx-coverage.json"
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE}
INTEGERS = {
    TensorProto.BOOL,
    *(TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64),
    *(TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
}
REDUCTIONS = ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]
# Inputs that say a shape, an axis, a count or a window, never data: operator -> input positions.
SHAPE_LIKE: dict[str, tuple[int, ...]] = {
    **{f"Reduce{kind}": (1,) for kind in REDUCTIONS},
    **dict.fromkeys(("Reshape", "Expand", "Tile", "Squeeze", "Unsqueeze", "Split"), (1,)),
    **dict.fromkeys(("TopK", "Trilu", "CenterCropPad", "AffineGrid", "Upsample"), (1,)),
    **dict.fromkeys(("CumSum", "CumProd"), (1,)),
    **dict.fromkeys(("ConstantOfShape", "HannWindow", "HammingWindow", "BlackmanWindow"), (0,)),
    "Pad": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Resize": (1, 2, 3),
    "OneHot": (1,),
    "Range": (0, 1, 2),
    "Loop": (0, 1),
    "NonMaxSuppression": (2, 3, 4),
    "MaxUnpool": (2,),
    "Col2Im": (1, 2),
    "DFT": (1, 2),
    "STFT": (1, 3),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
    "Dropout": (1, 2),
}
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli"}
Runner = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True)
class Case:
    """One node test with its shape-like inputs frozen."""

    name: str
    family: str
    first: bool
    model: onnx.ModelProto
    inputs: tuple[np.ndarray, ...]
    expected: tuple[np.ndarray, ...]
    rtol: float
    atol: float


@dataclass(frozen=True)
class Outcome:
    """What one route made of one case; `kind` is pass, import, compile, run, mismatch or crash."""

    case: str
    family: str
    first: bool
    kind: str
    text: str
    seconds: float


def population() -> list[Case]:
    """Return the cases measured, in the order in which ONNX lists them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_node_model_tests

        tests = load_node_model_tests()
    seen: set[str] = set()
    shape_like: dict[str, set[str]] = {}  # an expanded twin has the inputs of its original
    cases = []
    for test in tests:
        if not _belongs(test.model):
            continue
        family = _family(test.name, test.model)
        first = family not in seen and "_expanded" not in test.name
        if first:
            seen.add(family)
        twin = test.name.split("_expanded")[0]
        shape_like.setdefault(twin, shape_like_of(test.model))
        inputs, expected = (tuple(map(_plain, arrays)) for arrays in test.data_sets[0])
        model, kept = freeze(test.model, inputs, shape_like[twin])
        half = any(array.dtype == np.float16 for array in (*inputs, *expected))
        cases.append(
            Case(
                test.name,
                family,
                first,
                model,
                tuple(kept),
                expected,
                rtol=max(test.rtol, 1e-2 if half else 0.0),
                atol=np.inf if is_random(test.model) else max(test.atol, 1e-3 if half else 1e-5),
            )
        )
    return cases


def is_random(model: onnx.ModelProto) -> bool:
    """Whether nobody but its maker can compute the same: then only shapes and types are compared."""
    return any(
        node.op_type in _RANDOM or (node.op_type == "Dropout" and len(node.input) > 2)
        for node in model.graph.node
    )


def _belongs(model: onnx.ModelProto) -> bool:
    graph = model.graph
    values = [*graph.input, *graph.output]
    if any(node.domain not in ("", "ai.onnx") for node in graph.node):
        return False
    if any(value.type.WhichOneof("value") != "tensor_type" for value in values):
        return False
    types = {value.type.tensor_type.elem_type for value in values}
    return types <= FLOATS | INTEGERS and bool(types & FLOATS)


def _family(name: str, model: onnx.ModelProto) -> str:
    """Return the operator a case is about; expanded twins carry their operator in the name only."""
    if "_expanded" in name:
        return "(expanded) " + name.removeprefix("test_").split("_expanded")[0].split("_")[0]
    return model.graph.node[0].op_type


def _plain(value: Any) -> np.ndarray:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value)


def shape_like_of(model: onnx.ModelProto) -> set[str]:
    return {
        node.input[position]
        for node in model.graph.node
        for position in SHAPE_LIKE.get(node.op_type, ())
        if position < len(node.input)
    }


def freeze(
    model: onnx.ModelProto, inputs: Sequence[np.ndarray], names: Collection[str]
) -> tuple[onnx.ModelProto, list[np.ndarray]]:
    """Turn the graph inputs named into initializers; return the model and the inputs left."""
    frozen = onnx.ModelProto()
    frozen.CopyFrom(model)
    graph = frozen.graph
    kept_infos, kept_arrays = [], []
    for info, array in zip(list(graph.input), inputs, strict=True):
        if info.name in names:
            graph.initializer.append(numpy_helper.from_array(array, info.name))
        else:
            kept_infos.append(info)
            kept_arrays.append(array)
    del graph.input[:]
    graph.input.extend(kept_infos)
    return frozen, kept_arrays


def ours(model: onnx.ModelProto) -> tuple[Callable[[], Runner], str]:
    """Import with `load_model`; return what compiles it."""
    import tvm

    from gpu_aware_tune.model.importer import load_model

    target = tvm.target.Target("llvm")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.onnx"
        path.write_bytes(model.SerializeToString())
        loaded = load_model(path, target)
    weights = list(loaded.weights.values())
    return lambda: _compiled(loaded.module, target, weights), loaded.hash


def stock(model: onnx.ModelProto) -> tuple[Callable[[], Runner], str]:
    """Import with TVM's own importer as its documentation does; return what compiles it."""
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    module = relax.transform.DecomposeOpsForInference()(from_onnx(model))
    return lambda: _compiled(module, tvm.target.Target("llvm"), []), ""


def _compiled(module: Any, target: Any, weights: Sequence[np.ndarray]) -> Runner:
    import tvm
    import tvm_ffi
    from tvm import relax

    machine = relax.VirtualMachine(tvm.compile(module, target=target), tvm.cpu())

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        arrays = [tvm.runtime.tensor(np.array(a, order="C")) for a in (*inputs, *weights)]
        result = machine["main"](*arrays)
        return [
            _numpy(item) for item in (result if isinstance(result, tvm_ffi.Array) else [result])
        ]

    return run


def _numpy(value: Any) -> np.ndarray:
    # A shape that TVM returns as such, rather than as a tensor, still counts.
    return value.numpy() if hasattr(value, "numpy") else np.asarray(value, np.int64)


ROUTES: dict[str, Callable[[onnx.ModelProto], tuple[Callable[[], Runner], str]]] = {
    "ours": ours,
    "stock": stock,
}


def check(route: str, case: Case) -> tuple[str, str]:
    """Take one case through one route; return the kind of outcome and its text."""
    stage = "import"
    try:
        compile_, _ = ROUTES[route](case.model)
        stage = "compile"
        run = compile_()
        stage = "run"
        results = run(case.inputs)
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        return stage, f"{type(error).__name__}: {text[-1] if stage != 'import' else text[0]}"[:300]
    if len(results) < len(case.expected):
        return "mismatch", f"{len(results)} outputs instead of {len(case.expected)}"
    for got, want in zip(results, case.expected, strict=False):
        if got.shape != want.shape or got.dtype != want.dtype:
            return "mismatch", f"{got.dtype}{got.shape} instead of {want.dtype}{want.shape}"
        try:
            np.testing.assert_allclose(got, want, rtol=case.rtol, atol=case.atol)
        except AssertionError as error:
            return "mismatch", " ".join(str(error).split())[:200]
    return "pass", ""


def in_child(route: str, case: Case, timeout_s: float) -> Outcome:
    """Run `check` in a forked child that is killed at its time limit."""
    started = time.perf_counter()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os.setsid()
        with contextlib.suppress(BaseException):
            _silence()
            os.write(writer, json.dumps(check(route, case)).encode()[:60000])
        os._exit(0)
    os.close(writer)
    answer = b""
    while select.select([reader], [], [], max(0.0, started + timeout_s - time.perf_counter()))[0]:
        chunk = os.read(reader, 65536)
        if not chunk:
            break
        answer += chunk
    else:
        os.killpg(pid, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    seconds = time.perf_counter() - started
    if answer:
        kind, text = json.loads(answer)
    else:
        kind = "timeout" if seconds >= timeout_s else "crash"
        text = f"wait status {status}"
    return Outcome(case.name, case.family, case.first, kind, text, round(seconds, 3))


def _silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    warnings.simplefilter("ignore")


def rates(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, list[Outcome]]]:
    """Yield the two populations reported: one case per operator, and all cases."""
    yield "one case per operator", [outcome for outcome in outcomes if outcome.first]
    yield "all cases", list(outcomes)


def report(results: dict[str, list[Outcome]]) -> dict[str, Any]:
    """Print the table and return what goes into the results file."""
    summary: dict[str, Any] = {}
    print(f"{'population':24}{'route':8}{'pass':>14}{'rate':>9}   failures by kind")
    for route, outcomes in results.items():
        for label, chosen in rates(outcomes):
            kinds = collections.Counter(o.kind for o in chosen)
            passed = kinds.pop("pass", 0)
            share = 100.0 * passed / max(1, len(chosen))
            summary.setdefault(label, {})[route] = {
                "cases": len(chosen),
                "passed": passed,
                "percent": round(share, 1),
                "failures": dict(kinds),
            }
            failures = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
            print(f"{label:24}{route:8}{passed:7}/{len(chosen):<6}{share:8.1f}%   {failures}")
    for route, outcomes in results.items():
        by_operator = collections.Counter(o.family for o in outcomes if o.kind != "pass")
        failed = ", ".join(f"{name} {count}" for name, count in by_operator.most_common())
        print(f"\n{route} fails: {failed or 'nothing'}")
    return summary


def main() -> None:
    """Measure, print, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--files", type=Path, help="the ONNX files below this folder instead")
    parser.add_argument("--limit", type=int, help="only the first N cases")
    parser.add_argument("--family", help="only the cases of these operators, comma-separated")
    parser.add_argument("--per-family", action="store_true", help="only one case per operator")
    parser.add_argument("--routes", default="ours,stock", help="ours, stock or both")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds a case may take")
    parser.add_argument("--verbose", action="store_true", help="print each failure")
    parser.add_argument("-o", "--output", type=Path, help=f"default {RESULTS_FILE} for a whole run")
    options = parser.parse_args()
    from benchmarks.onnx_files import files_of  # which takes cases from here

    cases, left_out = files_of(options.files) if options.files else (population(), {})
    if options.family:
        wanted = set(options.family.split(","))
        cases = [case for case in cases if case.family in wanted]
    if options.per_family:
        cases = [case for case in cases if case.first]
    cases = cases[: options.limit]
    import onnxruntime  # noqa: F401  all of these once, before forking
    import tvm.relax.frontend.onnx  # noqa: F401

    import gpu_aware_tune.onnx_prepare  # noqa: F401

    about = environment()
    started = time.time()
    results: dict[str, list[Outcome]] = {}
    for route in options.routes.split(","):
        results[route] = []
        for number, case in enumerate(cases, 1):
            outcome = in_child(route, case, options.timeout)
            results[route].append(outcome)
            if options.verbose and outcome.kind != "pass":
                print(f"{route:6}{outcome.kind:9}{case.name}: {outcome.text}", flush=True)
            elif sys.stderr.isatty():
                print(f"\r{route} {number}/{len(cases)}", end="", file=sys.stderr, flush=True)
    summary = report(results)
    sample = options.limit or options.family or options.per_family or options.files
    partial = bool(sample or len(results) < 2)
    output = options.output or (None if partial else RESULTS_FILE)
    if output is None:
        print("\na sample: no results file written (use -o)")
        return
    facts = {
        "population": " ".join((__doc__ or "").split("Population: ")[1].split("\n\n")[0].split()),
        "files": str(options.files.name) if options.files else None,
        "left_out": left_out,
        "seconds": round(time.time() - started),
        "summary": summary,
        "failures": {
            route: [asdict(o) for o in outcomes if o.kind != "pass"]
            for route, outcomes in results.items()
        },
    }
    write_results(output, about, facts)
    print(f"\nwritten: {output}")


if __name__ == "__main__":
    main()
