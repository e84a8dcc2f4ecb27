"""Latency against torch and ONNX Runtime in the same partition: float32, float16 and TF32.

    python -m benchmarks.gpu.vs_torch                          # what fits into --budget seconds
    python -m benchmarks.gpu.vs_torch --models bert --shares 30 --dtypes float16
    python -m benchmarks.gpu.vs_torch --null                   # without a GPU: tries the code

ours       the library that share_gain.py left in build/gpu-bench, else one tuned for --time seconds
eager      torch as it is
compile    torch.compile in its default mode, which captures no graphs: they would be captured on
           another stream and leave a green context; --mode max-autotune-no-cudagraphs takes minutes
ort        ONNX Runtime's CUDA provider on the partition's stream (not in float16)

Whoever is not installed is left out, and named in the results. Every contestant of a cell runs in
one process on the same green context and its stream, in turns. All may use TF32 where the type is
tf32, none where it is float32. What has been measured
before the time of a cell is over counts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.share_gain import KEPT, described, inside
from benchmarks.scaffold import (
    Timer,
    asked,
    die_with_parent,
    gpu_benchmark,
    gpu_parser,
    sampled,
    take_turns,
    tell,
)

_ROUNDS = 5


def main() -> None:
    """Run every cell in a process of its own until the budget is used up."""
    command = gpu_parser(__doc__)
    command.add_argument("--shares", default="30,100")
    command.add_argument("--dtypes", default="float32,float16,tf32")
    command.add_argument(
        "--time", type=float, default=20.0, help="seconds of a search, where needed"
    )
    command.add_argument("--seconds", type=float, default=1.0, help="of each contestant's timing")
    command.add_argument("--mode", default="default", help="of torch.compile")
    command.add_argument("--cell-seconds", type=float, default=120.0, help="at most, for each cell")
    command.add_argument("--budget", type=float, default=600.0, help="seconds for everything")
    command.add_argument("--cell", metavar="JSON", help=argparse.SUPPRESS)
    args = command.parse_args()
    if args.cell:
        die_with_parent()
        for row in cell(**json.loads(args.cell)):
            tell(row)
        return
    end = time.monotonic() + args.budget
    percents = [int(part) for part in args.shares.split(",")]
    rows = []
    with gpu_benchmark("gpu-vs-torch", args) as run:
        for dtype in args.dtypes.split(","):
            for name, path in run.models():
                for row in one_model(name, path, dtype, percents, args, run.scratch, end):
                    rows.append(row)
                    print(line(row), flush=True)
                    run.write(rows=rows)


def one_model(
    name: str,
    path: Path,
    dtype: str,
    percents: list[int],
    args: argparse.Namespace,
    scratch: Path,
    end: float,
) -> Iterator[dict[str, Any]]:
    """The rows of one model in one type."""
    about: dict[str, Any] = {"model": name, "dtype": dtype}
    if end - time.monotonic() < args.time:
        yield {**about, "left_out": "the budget is used up"}
        return
    library = tuned(name, path, dtype, percents, args, scratch)
    manifest = json.loads((library / "manifest.json").read_text())
    for share in manifest["shares"]:
        if share["percent"] not in percents:
            continue
        row = {**about, "percent": share["percent"], "units": share["units"]}
        left = end - time.monotonic()
        if left < 10:
            yield {**row, "left_out": "the budget is used up"}
            continue
        given = {"model": str(path), "library": str(library), "units": share["units"],
                 "dtype": dtype, "seconds": args.seconds, "mode": args.mode}  # fmt: skip
        yield {**row, **_in_process(given, min(left, args.cell_seconds))}


def tuned(
    name: str,
    path: Path,
    dtype: str,
    percents: list[int],
    args: argparse.Namespace,
    scratch: Path,
) -> Path:
    """The folder of our libraries for the shares."""
    from gpu_aware_tune.settings import Settings
    from gpu_aware_tune.tuning import tune_events

    kept = KEPT / f"{name}.tuned"
    if not args.null and dtype == "float32" and (kept / "manifest.json").is_file():
        known = {s["percent"] for s in json.loads((kept / "manifest.json").read_text())["shares"]}
        if set(percents) <= known:
            return kept
    output = scratch / f"{name}-{dtype}.tuned"
    as_it_is = dtype == "float32" or (args.null and dtype == "tf32")  # CPUs have no TF32
    settings = Settings(
        gpu_pct=tuple(percents), target="llvm" if args.null else "cuda", time_s=args.time,
        trials=4 if args.null else None, dtype=None if as_it_is else dtype,
        db=scratch / f"{name}-{dtype}-db", output=output, resume=False,
    )  # fmt: skip
    if args.null:
        settings = dataclasses.replace(settings, trials_per_iteration=4)
    for _ in tune_events(path, settings):
        pass
    return output


def _in_process(given: dict[str, Any], limit_s: float) -> dict[str, Any]:
    found, why = asked(["-m", "benchmarks.gpu.vs_torch", "--cell", json.dumps(given)], limit_s)
    if found is None:
        return {"failed": why}
    return {**found, "cut_off": why} if why else found


def cell(
    model: str, library: str, units: int, dtype: str, seconds: float, mode: str = "default"
) -> Iterator[dict[str, Any]]:
    """Milliseconds of the contestants in the partition of `units` (in the child).

    First without torch.compile, which may take longer than there is time; then with it.
    """
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401 - before TVM, which otherwise imports it in the middle of its own

    from gpu_aware_tune.library import open_vm

    root = Path(library)
    manifest, inputs = described(root)
    entry = next(e for e in manifest["libraries"] if e["units"] == units)
    name = entry.get("entry", "main")
    found = _Cell()
    with inside(manifest, units) as partition:
        program = open_vm(root / entry["file"], root / "weights.bin", entry=name)
        found.samplers["ours"] = program.timer(inputs)
        found.outputs["ours"] = program(program.place(list(inputs.values())))[0]
        stream = partition.stream if partition is not None else None
        evidence = partition.evidence() if partition is not None else None
        given = (Path(model), inputs, dtype, stream)
        found.add("eager", lambda: _torch(*given))
        found.add("ort", lambda: _onnxruntime(*given))
        yield {**found.measured(seconds), "evidence": evidence}
        found.add("compile", lambda: _torch(*given, mode=mode))
        yield {**found.measured(seconds), "evidence": evidence}


class _Cell:
    """The contestants of a cell, what each computes, and who is left out."""

    def __init__(self) -> None:
        self.samplers: dict[str, Timer] = {}
        self.outputs: dict[str, np.ndarray] = {}
        self.left_out: dict[str, str] = {}

    def add(self, name: str, make: Callable[[], tuple[Timer, np.ndarray]]) -> None:
        """Add a contestant; whatever keeps it away is said, not fatal."""
        try:
            self.samplers[name], self.outputs[name] = make()
        except Exception as error:
            self.left_out[name] = f"{type(error).__name__}: {error}"[:300]

    def measured(self, seconds: float) -> dict[str, Any]:
        """Every contestant's milliseconds, in turns, and how far its numbers are from ours."""
        samples = take_turns(self.samplers, _ROUNDS, seconds / _ROUNDS)
        ours = self.outputs["ours"].astype("float64")
        scale = float(np.abs(ours).max()) or 1.0
        return {
            "ms": {name: 1e3 * statistics.median(values) for name, values in samples.items()},
            "runs": {name: len(values) for name, values in samples.items()},
            "apart": {
                name: float(np.abs(value.astype("float64") - ours).max()) / scale
                for name, value in self.outputs.items()
            },
            "without": dict(self.left_out),
        }


def _torch(
    path: Path, inputs: dict[str, np.ndarray], dtype: str, stream: int | None, mode: str = ""
) -> tuple[Timer, np.ndarray]:
    """torch on the partition's stream; compiled where a mode is given."""
    import torch

    from benchmarks.gpu.torch_model import torch_module

    if stream is None or not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    torch.backends.cudnn.benchmark = True
    lane = torch.cuda.ExternalStream(stream)
    wanted = torch.float16 if dtype == "float16" else torch.float32
    with torch.inference_mode(), torch.cuda.stream(lane):
        module = torch_module(path).cuda().to(wanted)
        given = [torch.from_numpy(array).cuda().to(wanted) for array in inputs.values()]
        if mode:
            module = torch.compile(module, mode=mode)
        for _ in range(3):
            result = module(*given)[0]
        lane.synchronize()

    def sample(seconds: float) -> list[float]:
        with torch.inference_mode(), torch.cuda.stream(lane):
            return sampled(lambda: module(*given), seconds, lane.synchronize)

    return sample, result.float().cpu().numpy()


def _onnxruntime(
    path: Path, inputs: dict[str, np.ndarray], dtype: str, stream: int | None
) -> tuple[Timer, np.ndarray]:
    """ONNX Runtime's CUDA provider on the partition's stream, inputs and outputs on the GPU."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or stream is None:
        raise RuntimeError("this ONNX Runtime has no CUDA provider")
    if dtype == "float16":
        raise RuntimeError("the file is float32")
    options = {"user_compute_stream": str(stream), "use_tf32": str(int(dtype == "tf32"))}
    session = onnxruntime.InferenceSession(
        str(path), providers=[("CUDAExecutionProvider", options)]
    )
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError("the CUDA provider did not start")
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(
            name, onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0)
        )
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda")
    for _ in range(3):
        session.run_with_iobinding(binding)
    first = binding.copy_outputs_to_cpu()[0]
    wait = binding.synchronize_outputs
    return lambda seconds: sampled(
        lambda: session.run_with_iobinding(binding), seconds, wait
    ), first


def line(row: dict[str, Any]) -> str:
    """One cell as text."""
    where = f"{row['model']} {row['dtype']}" + (f" {row['percent']} %" if "percent" in row else "")
    if "ms" not in row:
        return f"{where}: {row.get('left_out') or 'failed: ' + row.get('failed', '')[-300:]}"
    times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in row["ms"].items())
    missing = ", ".join(f"{name} ({why})" for name, why in row["without"].items())
    return f"{where} on {row['units']} units: {times}" + (f"; without {missing}" if missing else "")


if __name__ == "__main__":
    main()
