"""What serving costs beside the run: in process, over HTTP, gRPC and shared memory; changes of shares.

    python -m benchmarks.serving_overhead             # about five minutes
    python -m benchmarks.serving_overhead --quick     # one minute; nothing is written

The model does next to nothing on an input of 600 kB (the mean of an image), so what is measured is the
way there and back. In process, `Engine.infer` and `Engine.submit` take turns with the library alone. Over
a transport, one client sends one request after the other to a server in a process of its own; the machine
has two cores, which client, front end and lane share. Needs tritonclient (the dev extra).

Changes of shares: the plan moves between one lane of two cores and two of one, a thousand times, while a
thread keeps both busy. Counted is the time from the decision, or from the end of the run that was on the
cores, to the first run on the new lane; and, beside it, what opening the engine anew takes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.environment import RESULTS, ROOT, environment, stamp, write_results
from gpu_aware_tune.library import load
from gpu_aware_tune.serving.deployments import Deployment
from gpu_aware_tune.serving.engine import Engine
from gpu_aware_tune.serving.server import SWITCH_INTERVAL_S

SHAPE = (1, 3, 224, 224)
_SLO_S = 10.0


def main() -> None:
    """Measure everything, print it, write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="requests of each kind")
    parser.add_argument("--soak", type=float, default=120.0, help="seconds of load for the memory")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS / "serving-overhead.json")
    args = parser.parse_args()
    count, soak_s = (100, 5.0) if args.quick else (args.count, args.soak)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    about = environment()
    with tempfile.TemporaryDirectory() as name:
        folder = tuned(Path(name))
        found = {
            "in_process": in_process(folder, count),
            "switches": switches(folder, count),
            "server": over_the_wire(folder, count, soak_s),
        }
    print_found(found)
    if not args.quick:
        write_results(args.results, about, {**found, "measured": stamp(about)})


def tuned(folder: Path) -> Path:
    """The mean of an image, tuned for one core and for two."""
    import onnx
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["m"]),
        helper.make_node("Flatten", ["m"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
    )
    path = folder / "mean.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path
    )
    output = folder / "mean.tuned"
    command = [sys.executable, str(ROOT / "cli.py"), str(path), "--target", "llvm", "-q"]
    command += ["--gpu-pct", "50,100", "--trials", "1", "--effort", "quick"]
    subprocess.run([*command, "--db", str(folder / "db"), "-o", str(output)], check=True)
    return output


def in_process(folder: Path, count: int) -> dict[str, Any]:
    """The library alone, `submit` and `infer`, in turns."""
    x = {"x": np.random.default_rng(0).random(SHAPE, dtype="float32")}
    with (
        load(folder, units=1) as library,
        Engine([Deployment((folder,), _SLO_S)], units=1, adaptive=False) as engine,
    ):

        async def rounds() -> dict[str, list[float]]:
            taken: dict[str, list[float]] = {"library": [], "submit": [], "infer": []}
            for _ in range(count):
                begin = time.perf_counter()
                library(x)
                taken["library"].append(time.perf_counter() - begin)
                begin = time.perf_counter()
                engine.submit("mean", x).result()
                taken["submit"].append(time.perf_counter() - begin)
                begin = time.perf_counter()
                await engine.infer("mean", x)
                taken["infer"].append(time.perf_counter() - begin)
            return taken

        taken = asyncio.run(rounds())
        run_ms = 1e3 * engine.statistics("mean").run.seconds / engine.statistics("mean").run.count
    return {**{name: quantiles(each) for name, each in taken.items()}, "run_ms": run_ms}


def switches(folder: Path, count: int) -> dict[str, Any]:
    """Change between one lane of two cores and two lanes of one, under load."""
    begin = time.perf_counter()
    with Engine([Deployment((folder,), _SLO_S)], units=2, adaptive=False) as engine:
        opened_s = time.perf_counter() - begin
        plan = engine.plan_dict()
        lane = {**plan["lanes"][0], "first_unit": 0, "units": 1}
        wide = {**plan, "lanes": [{**lane, "units": 2}]}
        narrow = {**plan, "lanes": [lane, {**lane, "first_unit": 1}]}
        wrong = [0]
        with busy(engine, wrong):
            for number in range(count):
                engine.set_plan((wide, narrow)[number % 2])
                time.sleep(0.002)
        counts = engine.statistics("mean")
        return {
            "changes": count,
            "first_run": quantiles(list(engine.dispatcher.switch_s)),
            "answered": counts.success.count,
            "failed_or_wrong": counts.fail.count + wrong[0],
            "open_engine_s": opened_s,
        }


@contextlib.contextmanager
def busy(engine: Engine, wrong: list[int]) -> Iterator[None]:
    """Keep eight requests waiting, and check every answer."""
    x = np.random.default_rng(0).random(SHAPE, dtype="float32")
    wanted = x.mean(axis=(2, 3))
    stop, room = threading.Event(), threading.Semaphore(8)

    def done(future: Any) -> None:
        if future.exception() is not None or not np.allclose(future.result()["y"], wanted, 1e-4):
            wrong[0] += 1
        room.release()

    def ask() -> None:
        while not stop.is_set():
            room.acquire()
            engine.submit("mean", {"x": x}).add_done_callback(done)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for _ in range(8):
            room.acquire(timeout=10)


def over_the_wire(folder: Path, count: int, soak_s: float) -> dict[str, Any]:
    """Clients of a server process: one request at a time, then as many as go, and the memory."""
    import tritonclient.grpc as triton_grpc
    import tritonclient.http as triton_http

    x = np.random.default_rng(0).random(SHAPE, dtype="float32")
    with server(folder) as (process, addresses):
        found: dict[str, Any] = {}
        for name, module in (("http", triton_http), ("grpc", triton_grpc)):
            client = module.InferenceServerClient(addresses[name])
            tensor = module.InferInput("x", x.shape, "FP32")

            def ask(client: Any = client, tensor: Any = tensor) -> None:
                tensor.set_data_from_numpy(x)
                client.infer("mean", [tensor]).as_numpy("y")

            found[name] = timed(ask, count)
            client.close()
        found["http_shared_memory"] = shared_memory(addresses["http"], x, count)
        memory = psutil.Process(process.pid)
        before, cpu = memory.memory_info().rss, sum(memory.cpu_times()[:2])
        begin = time.perf_counter()
        answered = asyncio.run(flood(addresses["http"], soak_s))
        seconds = time.perf_counter() - begin
        found["many_at_once"] = {
            "requests_per_s": answered / seconds,
            "server_cpu_ms_per_request": 1e3 * (sum(memory.cpu_times()[:2]) - cpu) / answered,
            "seconds": seconds,
            "rss_before_mb": before / 1e6,
            "rss_after_mb": memory.memory_info().rss / 1e6,
            "open_files": memory.num_fds(),
        }
        return found


def shared_memory(address: str, x: np.ndarray, count: int) -> dict[str, float]:
    """Over HTTP, with input and output in system shared memory."""
    import tritonclient.http as triton
    from tritonclient.utils import shared_memory as shm

    client = triton.InferenceServerClient(address)
    key = f"/overhead-{os.getpid()}"
    region = shm.create_shared_memory_region("x", key, x.nbytes)
    try:
        client.register_system_shared_memory("x", key, x.nbytes)
        tensor = triton.InferInput("x", x.shape, "FP32")
        tensor.set_shared_memory("x", x.nbytes)

        def ask() -> None:
            shm.set_shared_memory_region(region, [x])
            client.infer("mean", [tensor]).as_numpy("y")

        return timed(ask, count)
    finally:
        client.unregister_system_shared_memory()
        shm.destroy_shared_memory_region(region)
        client.close()


async def flood(address: str, seconds: float) -> int:
    """Sixteen connections that ask as fast as they are answered, with a small JSON part."""
    import aiohttp

    body = np.zeros(SHAPE, "float32").tobytes()
    headers = {"Inference-Header-Content-Length": "0"}
    answered = 0
    end = time.monotonic() + seconds

    async with aiohttp.ClientSession() as session:

        async def ask() -> None:
            nonlocal answered
            while time.monotonic() < end:
                url = f"http://{address}/v2/models/mean/infer"
                async with session.post(url, data=body, headers=headers) as response:
                    await response.read()
                    answered += response.status == 200

        await asyncio.gather(*[ask() for _ in range(16)])
    return answered


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A server on free ports, and its addresses."""
    command = [sys.executable, str(ROOT / "cli.py"), "serve", str(folder), "--slo", "10s"]
    command += ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--shared-memory"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        addresses: dict[str, str] = {}
        while len(addresses) < 2:
            line = process.stdout.readline()
            if not line:
                raise SystemExit("the server did not start")
            if found := re.match(r"ready: (http|grpc)://(\S+)", line):
                addresses[found[1]] = found[2]
        try:
            yield process, addresses
        finally:
            process.terminate()


def timed(ask: Callable[[], None], count: int) -> dict[str, float]:
    """Latencies of calls one after the other."""
    for _ in range(10):
        ask()
    taken = []
    for _ in range(count):
        begin = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - begin)
    return quantiles(taken)


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    names = ("p50_ms", "p90_ms", "p99_ms")
    values = 1e3 * np.percentile(seconds, (50, 90, 99)) if seconds else np.zeros(3)
    return {
        "count": len(seconds),
        **{name: round(float(value), 4) for name, value in zip(names, values, strict=True)},
    }


def print_found(found: dict[str, Any]) -> None:
    """One line each."""
    for part, facts in found.items():
        for name, value in facts.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {each:.4g}" for key, each in value.items())
            print(f"{part}: {name}: {value}")


if __name__ == "__main__":
    main()
