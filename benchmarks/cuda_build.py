"""Build throughput of sm_90a candidates: where the time goes, and what lean sources save.

Real candidates of three tasks are built with TVM and compiled with NVRTC in several ways,
interleaved on each candidate, so that a busy machine disturbs all of them alike. Times are CPU
seconds of this process. Needs no GPU, only the wheels of `pip install "gpu-aware-tune[cuda]"`.

    python -m benchmarks.cuda_build --candidates 12 --repeats 3
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cubin import machine_code
from benchmarks.draws import random_schedules
from benchmarks.environment import RESULTS, environment, write_results
from benchmarks.scaffold import parser
from gpu_aware_tune.codegen import cuda_toolchain
from gpu_aware_tune.codegen.cuda_source import lean_source
from gpu_aware_tune.partition import device as devices
from gpu_aware_tune.workers.warm import load_tvm

ARCH = "sm_90a"
RESULTS_FILE = RESULTS / "cuda-build.json"
# What TVM's callback puts in front of every source it compiles.
HEADERS = "".join(f"#include <cuda/std/{name}>\n" for name in ("cstdint", "limits", "type_traits"))
PHASES = {
    "CUDA C++ Frontend": "front end",
    "NVVM Optimizer": "optimiser",
    "PTX Translation": "ptxas",
}


@dataclass
class Candidate:
    """One candidate: its source, and CPU seconds by stage and by way of compiling."""

    source: str
    stages: dict[str, float]
    compile_s: dict[str, list[float]] = field(default_factory=dict)
    cubin: dict[str, bytes] = field(default_factory=dict)
    phases_ms: dict[str, dict[str, float]] = field(default_factory=dict)


def conv2d(channels: int, size: int) -> Any:
    """A 3x3 convolution with ReLU, float32."""
    from tvm import te, topi

    data = te.placeholder((1, channels, size, size), name="data")
    weight = te.placeholder((channels, channels, 3, 3), name="weight")
    return te.create_prim_func(
        [data, weight, topi.nn.relu(topi.nn.conv2d_nchw(data, weight, 1, 1, 1))]
    )


def matmul(size: int) -> Any:
    """A square matrix product, float16, for tensor cores."""
    from tvm import te

    a, b = (te.placeholder((size, size), name=name, dtype="float16") for name in "ab")
    k = te.reduce_axis((0, size), name="k")
    return te.create_prim_func(
        [a, b, te.compute((size, size), lambda i, j: te.sum(a[i, k] * b[k, j], k), name="c")]
    )


def candidates(function: Any, count: int, seed: int) -> tuple[list[Candidate], list[str]]:
    """Random candidates of a task, built with TVM; and what the failed ones said."""
    import tvm
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

    target = tvm.target.Target(devices._absent_gpu(0, ARCH, "").target(132))
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    found, failed = [], []
    for schedule in random_schedules(module, target, "post-order-apply", count, seed):
        try:
            start = time.process_time()
            lowered = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(schedule.mod)
            built = tvm.tirx.build(lowered, target=target)
            build_s = time.process_time() - start
            (source,) = cuda_toolchain.cuda_sources(built)
            found.append(Candidate(source, {"lower": build_s, "pack": _pack_s(built)}))
        except Exception as error:  # counted: part of the candidates cannot be built at all
            failed.append(str(error).strip().splitlines()[-1][:200])
    return found, failed


def _pack_s(built: Any) -> float:
    """Seconds to write the host object and link it with a cubin, NVRTC left out."""
    compile_cubin = cuda_toolchain.compile_cubin
    try:
        cuda_toolchain.compile_cubin = lambda source, arch: bytes(30_000)
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            cuda_toolchain.export_module(built, Path(folder) / "kernel.so", ARCH)
            return time.process_time() - start
    finally:
        cuda_toolchain.compile_cubin = compile_cubin


def ways(folder: Path) -> dict[str, Callable[[str], bytes]]:
    """How a source can be compiled: TVM's way, with a precompiled header, and ours."""
    toolchain = cuda_toolchain.find_toolchain()

    def nvrtc(source: str, *options: str) -> bytes:
        flags = cuda_toolchain._FLAGS
        try:
            cuda_toolchain._FLAGS = (*flags, *options)
            return cuda_toolchain._nvrtc(source, ARCH, toolchain)
        finally:
            cuda_toolchain._FLAGS = flags

    def lean(source: str) -> str:
        text = lean_source(source)
        assert text is not None
        return text

    def full(source: str) -> str:
        return HEADERS + source.replace("#include <cuda.h>", "")

    def precompiled(source: str) -> bytes:
        text = full(source).replace(HEADERS, HEADERS + "#pragma nv_hdrstop\n")
        return nvrtc(text, "--pch", f"--pch-dir={folder}")

    return {
        "tvm": lambda source: cuda_toolchain._compile_as_tvm(source, ARCH),
        "tvm+pch": precompiled,
        "lean": lambda source: cuda_toolchain.compile_cubin(source, ARCH),
        # Known to be other machine code; shown for what they would save.
        "lean, ptxas -O1": lambda source: nvrtc(lean(source), "--ptxas-options=-O1"),
        "lean, Ofast-compile=mid": lambda source: nvrtc(lean(source), "--Ofast-compile=mid"),
        "phases tvm": lambda source: nvrtc(full(source), f"--time={folder}/tvm.csv"),
        "phases lean": lambda source: nvrtc(lean(source), f"--time={folder}/lean.csv"),
    }


def measure(found: list[Candidate], repeats: int, folder: Path) -> None:
    """Compile every candidate in every way, round-robin."""
    all_ways = ways(folder)
    timed = [name for name in all_ways if not name.startswith("phases")]
    for name in timed[:3]:  # loads the library and makes the precompiled header
        all_ways[name](found[0].source)
    for number, candidate in enumerate(found):
        for repeat in range(repeats):
            shift = (number + repeat) % len(timed)
            for name in timed[shift:] + timed[:shift]:
                start = time.process_time()
                candidate.cubin[name] = all_ways[name](candidate.source)
                candidate.compile_s.setdefault(name, []).append(time.process_time() - start)
        for name in ("tvm", "lean"):
            all_ways[f"phases {name}"](candidate.source)
            table = folder / f"{name}.csv"
            candidate.phases_ms[name] = read_phases(table.read_text())
            table.unlink()


def read_phases(table: str) -> dict[str, float]:
    """NVRTC's --time table: milliseconds by phase."""
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines()[1:] if line]
    return {PHASES[row[1]]: float(row[2]) for row in rows if row[1] in PHASES}


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's coefficient."""
    ranks = [[sorted(values).index(value) for value in values] for values in (first, second)]
    return statistics.correlation(*ranks) if len(first) > 2 else 0.0


def summary(found: list[Candidate], failed: list[str]) -> dict[str, Any]:
    """Medians of one task, or of all of them."""
    names = list(found[0].compile_s)
    typical = {name: [statistics.median(c.compile_s[name]) for c in found] for name in names}
    rest = [sum(c.stages.values()) for c in found]
    sizes = [float(len(c.source)) for c in found]

    def phases(way: str) -> dict[str, float]:
        keys = PHASES.values()
        return {k: round(statistics.fmean(c.phases_ms[way].get(k, 0) for c in found)) for k in keys}

    return {
        "candidates": len(found),
        "build_failures": len(failed),
        "failure_texts": sorted(set(failed))[:3],
        "lower_and_codegen_s": round(statistics.median(c.stages["lower"] for c in found), 3),
        "pack_and_link_s": round(statistics.median(c.stages["pack"] for c in found), 3),
        "nvrtc_median_s": {name: round(statistics.median(typical[name]), 3) for name in names},
        "nvrtc_mean_s": {name: round(statistics.fmean(typical[name]), 3) for name in names},
        "nvrtc_speedup_median": round(
            statistics.median(a / b for a, b in zip(typical["tvm"], typical["lean"], strict=True)),
            2,
        ),
        "candidates_per_cpu_minute": {
            name: round(60 * len(found) / (sum(typical[name]) + sum(rest)), 1) for name in names
        },
        "phases_mean_ms": {way: phases(way) for way in ("tvm", "lean")},
        "cubin_kb": {
            name: round(statistics.median(len(c.cubin[name]) for c in found) / 1000, 1)
            for name in names
        },
        "same_machine_code_as_tvm": {
            name: sum(machine_code(c.cubin[name]) == machine_code(c.cubin["tvm"]) for c in found)
            for name in names
        },
        "source_kb_median": round(statistics.median(sizes) / 1000, 1),
        "time_against_source_size": {
            name: round(rank_correlation(sizes, typical[name]), 2) for name in ("tvm", "lean")
        },
        "tensor_cores": sum("mma_sync" in c.source for c in found),
    }


def show(title: str, facts: dict[str, Any]) -> None:
    """Print one table."""
    print(f"\n{title}: {facts['candidates']} candidates, {facts['build_failures']} not buildable")
    print(
        f"  TVM lowering and code generation {facts['lower_and_codegen_s']:.3f} s, "
        f"packing and linking {facts['pack_and_link_s']:.3f} s (medians, CPU)"
    )
    columns = f"{'median s':>9} {'mean s':>7} {'cand./CPU min':>14} {'cubin kB':>9} same code"
    print(f"  {'NVRTC':24} {columns}")
    for name, median_s in facts["nvrtc_median_s"].items():
        same = facts["same_machine_code_as_tvm"][name]
        print(
            f"  {name:24} {median_s:9.3f} {facts['nvrtc_mean_s'][name]:7.3f} "
            f"{facts['candidates_per_cpu_minute'][name]:14.1f} {facts['cubin_kb'][name]:9.1f} "
            f"{same}/{facts['candidates']}"
        )
    for way, table in facts["phases_mean_ms"].items():
        print(f"  phases, {way}: " + ", ".join(f"{k} {v:.0f} ms" for k, v in table.items()))


def main() -> None:
    """Run the benchmark and write its figures."""
    command = parser(__doc__, RESULTS_FILE)
    command.add_argument("--candidates", type=int, default=12, help="drawn for each task")
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument("--seed", type=int, default=3)
    options = command.parse_args()
    toolchain = cuda_toolchain.find_toolchain()
    load_tvm()
    about = environment()
    tasks = {
        "conv2d 64x56x56 float32": conv2d(64, 56),
        "conv2d 256x14x14 float32": conv2d(256, 14),
        "matmul 1024 float16": matmul(1024),
    }
    results, everything, nothing = {}, [], []
    with tempfile.TemporaryDirectory() as folder:
        for title, function in tasks.items():
            found, failed = candidates(function, options.candidates, options.seed)
            measure(found, options.repeats, Path(folder))
            results[title] = summary(found, failed)
            show(title, results[title])
            everything += found
            nothing += failed
    results["all"] = summary(everything, nothing)
    show("all", results["all"])
    facts = {
        "what": "CPU seconds to build sm_90a candidates, by stage and way of compiling",
        "arch": ARCH,
        "nvrtc": ".".join(map(str, toolchain.version)),
        "candidates_drawn": options.candidates,
        "repeats": options.repeats,
        "seed": options.seed,
        "tasks": results,
    }
    write_results(options.results, about, facts)
    print(f"\nwritten to {options.results}")


if __name__ == "__main__":
    main()
