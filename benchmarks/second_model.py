"""What a model costs that shares most of its kernels with one that is tuned already.

    python -m benchmarks.second_model           # about ten minutes

resnet50 is tuned, then the same network with another head. Three ways: the second after the first
with the first's records, both in one run, and the second alone without records. Told are the
trials and the seconds of search, and those of the whole run, in which importing, compiling, timing
and verifying the second model are the same in every way.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, numpy_helper

from benchmarks.environment import RESULTS, environment, write_results
from benchmarks.light_models import seeded
from benchmarks.scaffold import parser

RESULTS_FILE = RESULTS / "second-model.json"


def main() -> None:
    """Run the three ways and print a row for each run."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("--model", default="resnet50")
    command.add_argument("--classes", type=int, default=100, help="of the second model")
    command.add_argument("--trials", type=int, default=256)
    args = command.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="second-model-") as name:
        folder = Path(name)
        first, second = folder / "first.onnx", folder / "second.onnx"
        model = seeded(args.model, 0)
        onnx.save(model, first)
        onnx.save(with_head(model, args.classes), second)
        rows.append(tuned("first", [first], folder / "a", args.trials))
        rows.append(tuned("second, with records", [second], folder / "a", args.trials))
        rows.append(tuned("second, alone", [second], folder / "b", args.trials))
        rows.append(tuned("both in one run", [first, second], folder / "c", args.trials))
    print(f"{'run':22} trials  search s   whole s")
    for row in rows:
        print(f"{row['run']:22} {row['trials']:6} {row['search_s']:9.1f} {row['whole_s']:9.1f}")
    search = [row["search_s"] for row in rows]
    print(f"second with records: {search[1] / search[2]:.1%} of the search it costs alone")
    print(f"both in one run: {search[3] / search[0] - 1:.1%} more search than the first alone")
    write_results(args.results, environment(), {"trials": args.trials, "runs": rows})


def with_head(model: ModelProto, classes: int) -> ModelProto:
    """A copy whose last layer has another number of outputs."""
    copy = ModelProto()
    copy.CopyFrom(model)
    head = [node for node in copy.graph.node if node.op_type == "Gemm"][-1]
    for tensor in copy.graph.initializer:
        if tensor.name in head.input[1:]:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(array[:classes].copy(), tensor.name))
    for value in (*copy.graph.output, *copy.graph.input):
        if value.name in (*head.input[1:], *(output.name for output in copy.graph.output)):
            dims = value.type.tensor_type.shape.dim
            axis = 0 if value.name in head.input[1:] else len(dims) - 1
            dims[axis].dim_value = classes
    del copy.graph.value_info[:]
    return copy


def tuned(run: str, models: list[Path], folder: Path, trials: int) -> dict[str, Any]:
    """Tune once; the search's seconds run from its first stage to the one after it."""
    from gpu_aware_tune.events import Finished, Stage, Trial
    from gpu_aware_tune.run.jobs import make_jobs
    from gpu_aware_tune.tuning import tune_jobs

    print(f"running {run} ...", flush=True)
    jobs = make_jobs(
        models, target="llvm", gpu_pct=100, trials=trials, db=folder, output=folder / "out"
    )
    started = time.monotonic()
    marks: dict[str, float] = {}
    searched = 0
    finished: list[Finished] = []
    for event in tune_jobs(jobs):
        if isinstance(event, Stage):
            marks.setdefault(event.name, time.monotonic())
        elif isinstance(event, Trial):
            searched += event.origin == "search"
        elif isinstance(event, Finished):
            finished.append(event)
    return {
        "run": run,
        "trials": searched,
        "search_s": marks["retime"] - marks["search"],
        "whole_s": time.monotonic() - started,
        "latency_ms": {f.model: 1e3 * (f.shares[0].tuned_s or 0.0) for f in finished},
    }


if __name__ == "__main__":
    main()
