"""Latency against torch and ONNX Runtime in the same partition, float32 and float16.

    python -m benchmarks.gpu.vs_torch                          # what fits into --budget seconds
    python -m benchmarks.gpu.vs_torch --models bert --shares 30 --dtypes float16
    python -m benchmarks.gpu.vs_torch --null                   # without a GPU: tries the code

ours       the library that share_gain.py left in build/gpu-bench, else one tuned for --time seconds
eager      torch as it is
compile    torch.compile(mode="max-autotune-no-cudagraphs"): its own graphs would be captured on
           another stream and leave a green context
ort        ONNX Runtime's CUDA provider on the partition's stream (float32)

Whoever is not installed is left out, and named in the results. Every contestant of a cell runs in
one process on the same green context and its stream, in turns; TF32 is off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cells import FLAG, CellFailed, answer, run_apart
from benchmarks.gpu.environment import NO_GPU, RESULTS, require_gpu, write_results
from benchmarks.gpu.models import MODELS, write_model
from benchmarks.gpu.share_gain import KEPT, described, inside

_ROUNDS = 5
Sampler = Callable[[float], list[float]]


def main() -> None:
    """Run every cell in a process of its own until the budget is used up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--shares", default="30,100")
    parser.add_argument("--dtypes", default="float32,float16")
    parser.add_argument(
        "--time", type=float, default=20.0, help="seconds of a search, where needed"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="of each contestant's timing")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--null", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")
    parser.add_argument(FLAG, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        answer(args.cell, cell)
        return
    if not require_gpu(args.null):
        sys.exit(NO_GPU)
    end = time.monotonic() + args.budget
    percents = [int(part) for part in args.shares.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in args.dtypes.split(","):
            for name in args.models.split(","):
                path = write_model(name, Path(folder), tiny=args.null)
                for row in one_model(name, path, dtype, percents, args, Path(folder), end):
                    rows.append(row)
                    print(line(row), flush=True)
    folder = Path(tempfile.mkdtemp()) if args.null else args.results
    write_results("gpu-vs-torch", {"rows": rows}, args.null, folder)


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
                 "dtype": dtype, "seconds": args.seconds}  # fmt: skip
        yield {**row, **_in_process(given, left)}


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
    settings = Settings(
        gpu_pct=tuple(percents), target="llvm" if args.null else "cuda", time_s=args.time,
        trials=4 if args.null else None, dtype=dtype if dtype == "float16" else None,
        db=scratch / f"{name}-{dtype}-db", output=output, resume=False,
        **({"trials_per_iteration": 4} if args.null else {}),
    )  # fmt: skip
    for _ in tune_events(path, settings):
        pass
    return output


def _in_process(given: dict[str, Any], limit_s: float) -> dict[str, Any]:
    try:
        return run_apart("benchmarks.gpu.vs_torch", given, limit_s)
    except subprocess.TimeoutExpired:
        return {"left_out": f"not done in {limit_s:.0f} s, the rest of the budget"}
    except CellFailed as failed:
        return {"failed": failed.stderr[-2000:]}


def cell(model: str, library: str, units: int, dtype: str, seconds: float) -> dict[str, Any]:
    """Milliseconds of every contestant in the partition of `units` (in the child)."""
    from gpu_aware_tune.library import open_vm

    root = Path(library)
    manifest, inputs = described(root)
    entry = next(e for e in manifest["libraries"] if e["units"] == units)
    samplers: dict[str, Sampler] = {}
    outputs: dict[str, np.ndarray] = {}
    left_out: dict[str, str] = {}
    with inside(manifest, units) as partition:
        program = open_vm(root / entry["file"], root / "weights.bin")
        samplers["ours"] = program.timer(inputs)
        outputs["ours"] = program(program.place(list(inputs.values())))[0]
        stream = partition.stream if partition is not None else None
        for name, make in (("eager", _torch), ("compile", _torch), ("ort", _onnxruntime)):
            try:
                samplers[name], outputs[name] = make(name, Path(model), inputs, dtype, stream)
            except Exception as error:  # whatever keeps a contestant away is said, not fatal
                left_out[name] = f"{type(error).__name__}: {error}"[:300]
        samples: dict[str, list[float]] = {name: [] for name in samplers}
        for _ in range(_ROUNDS):
            for name, sampler in samplers.items():
                samples[name].extend(sampler(seconds / _ROUNDS))
    scale = float(np.abs(outputs["ours"].astype("float64")).max()) or 1.0
    return {
        "ms": {name: 1e3 * statistics.median(values) for name, values in samples.items()},
        "runs": {name: len(values) for name, values in samples.items()},
        "apart": {
            name: float(np.abs(value.astype("float64") - outputs["ours"].astype("float64")).max())
            / scale
            for name, value in outputs.items()
        },
        "without": left_out,
        "evidence": partition.evidence() if partition is not None else None,
    }


def _torch(
    kind: str, path: Path, inputs: dict[str, np.ndarray], dtype: str, stream: int | None
) -> tuple[Sampler, np.ndarray]:
    """torch on the partition's stream."""
    import torch

    from benchmarks.gpu.torch_model import torch_module

    if stream is None or not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    lane = torch.cuda.ExternalStream(stream)
    wanted = torch.float16 if dtype == "float16" else torch.float32
    with torch.inference_mode(), torch.cuda.stream(lane):
        module = torch_module(path).cuda().to(wanted)
        given = [torch.from_numpy(array).cuda().to(wanted) for array in inputs.values()]
        if kind == "compile":
            module = torch.compile(module, mode="max-autotune-no-cudagraphs")
        for _ in range(3):
            result = module(*given)[0]
        lane.synchronize()

    def sample(seconds: float) -> list[float]:
        with torch.inference_mode(), torch.cuda.stream(lane):
            return _sampled(lambda: module(*given), lane.synchronize, seconds)

    return sample, result.float().cpu().numpy()


def _onnxruntime(
    kind: str, path: Path, inputs: dict[str, np.ndarray], dtype: str, stream: int | None
) -> tuple[Sampler, np.ndarray]:
    """ONNX Runtime's CUDA provider on the partition's stream, inputs and outputs on the GPU."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or stream is None:
        raise RuntimeError("this ONNX Runtime has no CUDA provider")
    if dtype != "float32":
        raise RuntimeError("the file is float32")
    options = {"user_compute_stream": str(stream), "use_tf32": "0"}
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
    return lambda seconds: _sampled(
        lambda: session.run_with_iobinding(binding), wait, seconds
    ), first


def _sampled(run: Callable[[], object], wait: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each inference, waited for."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        begun = time.perf_counter()
        run()
        wait()
        samples.append(time.perf_counter() - begun)
    return samples


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
