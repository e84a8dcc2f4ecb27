"""Checks 1 to 6 and 10: green contexts, timers, graphs, interference."""

from __future__ import annotations

import functools
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpu.check_children import enter_thread
from gpu.lab import LOADS, TvmKernel, answer
from gpu_aware_tune.errors import SetupError
from gpu_aware_tune.measure.timing import spread_of
from gpu_aware_tune.partition import Nvml, disturbances

_GROUP = 16
_SPIN_S = 0.03


def primary_function(lab: Any) -> dict[str, Any]:
    """1. A kernel that TVM loaded in the primary context runs right on a green stream."""
    with lab.split([_GROUP]) as (lane,):
        kernel = TvmKernel(lane, 1 << 20)
        error = kernel.error()
        evaluator_s = min(kernel.evaluator(10, 3))
        ids = lane.sm_ids()
    return {
        "passed": error == 0 and evaluator_s > 0 and 0 < len(ids) <= _GROUP,
        "text": f"error {error:g}, time_evaluator {1e6 * evaluator_s:.1f} us, on {len(ids)} SMs",
        "error_max": error,
        "evaluator_s": evaluator_s,
        "sm_ids": list(ids),
    }


def sm_identity(lab: Any) -> dict[str, Any]:
    """2. Groups of 16 SMs are 16 SMs, disjoint, and the same ones in the next process."""
    for groups in range(lab.sms // _GROUP, 0, -1):
        try:
            with lab.split([_GROUP] * groups) as lanes:
                sets = [lane.sm_ids() for lane in lanes]
            break
        except SetupError as error:
            refused = str(error)
    with lab.whole() as lane:
        everything = lane.sm_ids()
    again = lab.child("sm_sets", groups=groups, size=_GROUP)
    union = {number for ids in sets for number in ids}
    disjoint = len(union) == sum(map(len, sets))
    within = all(0 < len(ids) <= _GROUP for ids in sets)
    stable = again.get("sets") == [list(ids) for ids in sets]
    return {
        "passed": disjoint and within and len(everything) == lab.sms,
        "text": f"{groups} groups of {sorted({len(ids) for ids in sets})} SMs, "
        f"{'disjoint' if disjoint else 'OVERLAPPING'}, rest {lab.sms - len(union)}, whole GPU "
        f"{len(everything)}, {'the same' if stable else 'OTHERS'} in a second process",
        "sets": [list(ids) for ids in sets],
        "whole": len(everything),
        "stable": stable,
        "refused": refused if groups < lab.sms // _GROUP else None,
    }


def sm_ladder(lab: Any) -> dict[str, Any]:
    """3. A compute-bound kernel's time goes with one over the SMs."""
    sizes = [*range(_GROUP // 2, lab.sms, 2 * _GROUP), lab.sms]
    with lab.whole() as lane:
        rounds = lane.rounds_for("compute", 2e-3)
    samples = {}
    for size in sizes:
        with lab.split([size], disjoint=False) as (lane,):
            samples[size] = lane.timed("compute", rounds, 15)
    typical = {size: statistics.median(values) for size, values in samples.items()}
    work = {
        size: size * seconds / (lab.sms * typical[lab.sms]) for size, seconds in typical.items()
    }
    spread = statistics.median(spread_of(values) for values in samples.values())
    worst = max(abs(ratio - 1) for ratio in work.values())
    return {
        "passed": worst < 0.1 and spread < 0.02,
        "text": f"SMs x seconds is constant to {100 * worst:.1f} %, spread {100 * spread:.2f} %",
        "seconds": typical,
        "work": work,
        "spread": spread,
    }


def concurrency(lab: Any) -> dict[str, Any]:
    """4. Two halves work at the same time, given enough hardware queues."""
    found = {}
    for queues in ("", "1", "8", "32"):
        env = {"CUDA_DEVICE_MAX_CONNECTIONS": queues} if queues else {}
        found[queues or "unset"] = lab.child(
            "pair", env, size=lab.sms // 2 // 8 * 8, seconds=_SPIN_S
        )
    stretch = {name: each.get("stretch", math.inf) for name, each in found.items()}
    shown = ", ".join(f"{name}: {value:.2f}" for name, value in stretch.items())
    return {
        "passed": max(stretch["8"], stretch["32"]) < 1.15,
        "text": f"together over alone, by queues: {shown} (2 = one after the other)",
        "pairs": found,
    }


def timer_agreement(lab: Any) -> dict[str, Any]:
    """5. TVM's timer, events and graphs agree above 100 us; what they differ by below."""
    rows = []
    with lab.split([_GROUP]) as (lane,):
        for elements in (
            (1 << 10, 1 << 18, 1 << 22, 1 << 26) if not lab.mock else (1 << 10, 1 << 16)
        ):
            kernel = TvmKernel(lane, elements)
            row = {"elements": elements, "evaluator_1": statistics.median(kernel.evaluator(1, 9))}
            row["evaluator_100"] = statistics.median(kernel.evaluator(100, 3))
            timer = lane.partition.launch_timer(kernel.launch)
            if timer is not None:
                with lane.partition.timing_context():
                    row["events_1"] = statistics.median(timer(1, 9))
                    row["many"] = statistics.median(timer(100, 3))
                row["many_by"] = timer.kind
                timer.close()
            rows.append(row)
        stale = _stale_read(lane)
    apart = [
        abs(row["many"] / row["evaluator_100"] - 1)
        for row in rows
        if "many" in row and row["evaluator_100"] > 100e-6
    ]
    return {
        "passed": all(value < 0.02 for value in apart) if apart else None,
        "text": f"above 100 us apart by {100 * max(apart, default=0):.2f} %; shortest: one launch "
        f"{1e6 * rows[0]['evaluator_1']:.1f} us, many {1e6 * rows[0]['evaluator_100']:.1f} us, graph "
        f"{1e6 * rows[0].get('many', 0):.1f} us; reading without waiting gave "
        f"{'OLD data' if stale else 'new data'}",
        "rows": rows,
        "stale_read": stale,
    }


def _stale_read(lane: Any) -> bool:
    """Whether a tensor read without waiting for the lane's stream holds old data."""
    kernel = TvmKernel(lane, 1 << 20)
    with lane.partition.timing_context():
        lane.launch("compute", lane.rounds_for("compute", _SPIN_S))
        kernel.launch()
        seen = kernel.output.numpy()
    lane.wait()
    return not np.array_equal(seen, kernel.output.numpy())


def graph_escape(lab: Any) -> dict[str, Any]:
    """6. Whether TVM's own CUDA graphs leave the partition that they are replayed in."""
    found = {
        mode: lab.child("relax_graph", graph=mode == "on", size=_GROUP) for mode in ("off", "on")
    }
    gains = {mode: each.get("gain", math.nan) for mode, each in found.items()}
    if not found["on"].get("captured"):
        return {"passed": None, "text": "TVM captured no graph: nothing was learnt", "modes": found}
    escapes = gains["on"] < 0.5 * gains["off"]
    return {
        # Off is what libraries are compiled with; with it, 16 SMs have to be slower than all.
        "passed": None if lab.mock else gains["off"] > 2,
        "text": f"time on {_GROUP} SMs over time on all: graphs off {gains['off']:.2f}, on "
        f"{gains['on']:.2f}: graphs {'LEAVE' if escapes else 'stay in'} the partition",
        "modes": found,
    }


def interference(lab: Any) -> dict[str, Any]:
    """10. What a neighbour on the other half costs; and that processes take turns without MPS."""
    size = lab.sms // 2 // 8 * 8
    slower: dict[str, dict[str, float]] = {}
    flags: set[str] = set()
    with Nvml(0) as nvml, lab.split([size, size]) as (victim, neighbour):
        for own in LOADS:
            rounds = victim.rounds_for(own, 0.01)
            idle_s = statistics.median(victim.timed(own, rounds, 5))
            for other in LOADS:
                before = nvml.quick_snapshot()
                timed = functools.partial(victim.timed, own, rounds, 5)
                beside_s = _beside(neighbour, other, timed)
                flags.update(disturbances(before, nvml.quick_snapshot()))
                slower.setdefault(own, {})[other] = beside_s / idle_s
        snapshot = nvml.snapshot()
    turns = _two_processes(lab, size)
    same = slower["compute"]["compute"]
    return {
        "passed": same < 1.03,
        "text": f"compute beside compute {same:.3f}, beside DRAM {slower['compute']['dram']:.2f}, "
        f"DRAM beside DRAM {slower['dram']['dram']:.2f}, L2 beside DRAM {slower['l2']['dram']:.2f}; two "
        f"processes without MPS take {turns:.2f} times as long together",
        "slower": slower,
        "two_processes": turns,
        "flags": sorted(flags),
        "readable": {name: value is not None for name, value in vars(snapshot).items()},
    }


def _beside(neighbour: Any, load: str, measure: Callable[[], Sequence[float]]) -> float:
    """Median of what `measure` gives while the neighbour is kept busy from a thread of its own."""
    stop, busy = threading.Event(), threading.Event()
    rounds = neighbour.rounds_for(load, 0.005)

    def work() -> None:
        enter_thread(neighbour)
        while not stop.is_set():
            for _ in range(4):  # a queue of work, so that there is no gap
                neighbour.launch(load, rounds)
            busy.set()
            neighbour.wait()

    thread = threading.Thread(target=work)
    thread.start()
    busy.wait(10)
    try:
        return statistics.median(measure())
    finally:
        stop.set()
        thread.join()


def _two_processes(lab: Any, size: int) -> float:
    """Seconds of two processes' green contexts at the same time over one alone."""
    alone = lab.child("spin_green", size=size, seconds=0.5, start_at=0)
    at = time.time() + (5 if lab.mock else 15)  # both have started by then
    both = [lab.start_child("spin_green", size=size, seconds=0.5, start_at=at) for _ in range(2)]
    found = [answer(child) for child in both]
    if any("seconds" not in each for each in (alone, *found)):
        return math.nan
    return float(max(each["seconds"] for each in found) / alone["seconds"])
