"""Our tuner against TVM's own `tune_tasks` on the whole GPU: trials per minute, GPU busy share.

    python -m benchmarks.gpu.vs_metaschedule                       # about four minutes
    python -m benchmarks.gpu.vs_metaschedule --models bert --seconds 120
    python -m benchmarks.gpu.vs_metaschedule --null                # without a GPU: tries the code

Both sides get the same model, target and trials and at most `--seconds` of search, imports not
counted. TVM runs with its defaults: LocalBuilder, LocalRunner, XGBModel, population 512. The GPU's
busy share is NVML's: the part of the time in which some kernel ran, sampled ten times a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.scaffold import die_with_parent, gpu_benchmark, gpu_parser
from benchmarks.vs_metaschedule import stock_contexts

_START_S = 60.0  # imports and reading the model


def main() -> None:
    """Run each side on each model in a process of its own, and print the comparison."""
    command = gpu_parser(__doc__)
    command.add_argument("--trials", type=int, default=512, help="for each model and side")
    command.add_argument("--per-iter", type=int, default=64, help="candidates an iteration")
    command.add_argument("--seconds", type=float, default=45.0, help="for each model and side")
    command.add_argument("--side", nargs=2, metavar=("SIDE", "JSON"), help=argparse.SUPPRESS)
    args = command.parse_args()
    if args.side:
        die_with_parent()
        run_side(args.side[0], **json.loads(args.side[1]))
        return
    rows: dict[str, dict[str, Any]] = {}
    settings = {"trials": args.trials, "per_iter": args.per_iter, "seconds": args.seconds}
    with gpu_benchmark("gpu-vs-metaschedule", args) as run:
        for name, path in run.models():
            for side in ("stock", "ours"):
                cell = {"model": str(path), "trials": args.trials, "per_iter": args.per_iter,
                        "null": args.null}  # fmt: skip
                rows.setdefault(name, {})[side] = found = measured(side, cell, args.seconds)
                print(f"{name} {side}: {line(found)}", flush=True)
                run.write(settings=settings, models=rows)


def measured(side: str, cell: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One side for at most so many seconds of search; what it told until then."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.vs_metaschedule",
        "--side",
        side,
        json.dumps(cell),
    ]
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, bufsize=0, cwd=ROOT, start_new_session=True
        )  # unbuffered, since `select` does not see what Python holds back
        try:
            told, busy = _listen(child, seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        log.seek(0)
        tail = [text for text in log.read().splitlines() if text.strip()][-3:]
    result: dict[str, Any] = {
        "busy_share": statistics.fmean(busy) if busy else None,
        "latency_s": told[-1].get("latency_s") if told else None,
        "trials": told[-1]["trials"] if told else 0,
        "failed": told[-1]["failed"] if told else 0,
        "history": told,
    }
    spent = told[-1]["at_s"] if told else seconds
    result["per_minute"] = 60 * result["trials"] / max(spent, 1e-9)
    return result if told else {**result, "log": tail}


def _listen(
    child: subprocess.Popen[bytes], seconds: float
) -> tuple[list[dict[str, Any]], list[float]]:
    """Read the side's lines until it ends or its time is over; sample how busy the GPU is."""
    from gpu_aware_tune.partition import Nvml

    assert child.stdout is not None
    told: list[dict[str, Any]] = []
    busy: list[float] = []
    end, begun = time.monotonic() + _START_S, False
    with Nvml(0) as nvml:
        while (left := end - time.monotonic()) > 0:
            if select.select([child.stdout], [], [], min(0.1, left))[0]:
                text = child.stdout.readline().decode()
                if not text:
                    break
                if text.startswith("BEGIN") and not begun:
                    begun, end = True, time.monotonic() + seconds
                elif text.startswith("TOLD "):
                    told.append(json.loads(text[5:]))
            elif begun and (percent := nvml.snapshot().busy_percent) is not None:
                busy.append(percent / 100)
    return told, busy


def run_side(side: str, model: str, trials: int, per_iter: int, null: bool) -> None:
    """Tune with one side, telling on stdout how far it is."""
    from gpu_aware_tune.codegen.cuda_toolchain import preload_runtime

    preload_runtime()
    (run_stock if side == "stock" else run_ours)(Path(model), trials, per_iter, null)


def run_ours(path: Path, trials: int, per_iter: int, null: bool) -> None:
    """Our tuner up to the end of the search; the untuned schedules it measures first count as time."""
    from gpu_aware_tune.events import Progress, Stage, Trial
    from gpu_aware_tune.settings import Settings
    from gpu_aware_tune.tuning import tune_events

    done = failed = 0
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            target="llvm" if null else "cuda", trials=trials, trials_per_iteration=per_iter,
            patience=0, db=Path(folder), output=Path(folder) / "out", resume=False,
        )  # fmt: skip
        for event in tune_events(path, settings):
            if isinstance(event, Stage) and event.name == "search":
                if done == 0:
                    begun = time.monotonic()
                    print("BEGIN", flush=True)
            elif isinstance(event, Stage) and event.name == "retime":
                return
            elif isinstance(event, Trial) and event.origin == "search":
                done, failed = done + 1, failed + (event.failure is not None)
            elif isinstance(event, Progress):
                latency_s = next(iter(event.best_s.values()), None)
                _tell(time.monotonic() - begun, done, failed, latency_s)


def run_stock(path: Path, trials: int, per_iter: int, null: bool) -> None:
    """TVM's tuner with its defaults on the same tasks; a callback tells when results came in."""
    from gpu_aware_tune.workers.warm import load_tvm

    load_tvm()
    import tvm
    from tvm.ir.utils import derived_object
    from tvm.s_tir import meta_schedule as ms
    from tvm.s_tir.meta_schedule.measure_callback import PyMeasureCallback

    from gpu_aware_tune.codegen.cuda_toolchain import environment, runtime_environment
    from gpu_aware_tune.model.importer import load_model
    from gpu_aware_tune.model.tasks import extract
    from gpu_aware_tune.partition import find_device

    device, _ = find_device("llvm" if null else "cuda", 0, None)
    if not null:  # TVM's own compile, with the wheels' headers and no toolkit
        os.environ.update({k: v for k, v in environment().items() if "FALLBACK" not in k})
        os.environ.update(runtime_environment())  # TVM's workers are processes of their own
        _hide_torch()
    target = tvm.target.Target(device.target(device.units_total))
    tasks = extract(load_model(path, target, {}, None), target)
    best = [float("inf")] * len(tasks)
    contexts = stock_contexts(tasks, target, seed=1)
    done = failed = 0

    @derived_object
    class Teller(PyMeasureCallback):
        def apply(self, task_scheduler: Any, task_id: int, measure_candidates: Any,
                  builder_results: Any, runner_results: Any) -> None:  # fmt: skip
            nonlocal done, failed
            for result in runner_results:
                done += 1
                if result.run_secs is None:
                    failed += 1
                    continue
                seconds = statistics.fmean(float(value) for value in result.run_secs)
                best[task_id] = min(best[task_id], seconds)
            whole = sum(task.weight * found for task, found in zip(tasks, best, strict=True))
            _tell(time.monotonic() - begun, done, failed, whole if whole < 1e9 else None)

    print("BEGIN", flush=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ms.tune.tune_tasks(
            tasks=contexts, task_weights=[float(task.weight) for task in tasks], work_dir=folder,
            max_trials_global=trials, num_trials_per_iter=per_iter, builder=ms.builder.LocalBuilder(),
            runner=ms.runner.LocalRunner(),
            measure_callbacks=[Teller(), *ms.measure_callback.MeasureCallback.create("default")],
        )  # fmt: skip


def _hide_torch() -> None:
    """Keep TVM's workers from importing torch, which takes seconds and is no part of tuning."""
    folder = tempfile.mkdtemp(prefix="no-torch-")
    Path(folder, "torch.py").write_text('raise ImportError("hidden from TVM")\n')
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, path]))


def _tell(at_s: float, trials: int, failed: int, latency_s: float | None) -> None:
    told = {"at_s": at_s, "trials": trials, "failed": failed, "latency_s": latency_s}
    print("TOLD " + json.dumps(told), flush=True)


def line(found: dict[str, Any]) -> str:
    """One side's figures as text."""
    busy = found["busy_share"]
    latency = found["latency_s"]
    shown = (
        f"{found['per_minute']:.1f} trials a minute ({found['trials']}, {found['failed']} failed)"
    )
    shown += f", GPU busy {100 * busy:.0f} %" if busy is not None else ""
    shown += f", kernels {1e3 * latency:.3f} ms" if latency else ""
    return shown + (f"; {found['log'][-1][:200]}" if found.get("log") else "")


if __name__ == "__main__":
    main()
