"""Which kernel of each task goes into the library: re-measured alone, and checked for its numbers."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gpu_aware_tune.builder import CALL_FAILED, BuildPool, Built
from gpu_aware_tune.candidates import Candidate
from gpu_aware_tune.errors import TuneError
from gpu_aware_tune.events import Event, Note
from gpu_aware_tune.measure import RETIME
from gpu_aware_tune.records import Record, RecordKey, Store
from gpu_aware_tune.search import Search
from gpu_aware_tune.tasks import Task

_LOOK = 8  # fastest records looked at for a choice
_WORTH = 0.002  # tasks below this part of the model's latency are not measured again


@dataclass(frozen=True)
class Reorder:
    """Whether measuring again made another kernel the best, and what the first pick would cost."""

    changed: bool
    regret: float


@dataclass(frozen=True)
class Choice:
    """The kernel of one task on one share; `trace` "" stands for the plain loops."""

    task: Task
    units: int
    trace: str
    seconds: float
    origin: str


def retime(search: Search, top_k: int) -> Generator[Event, None, dict[tuple[str, int], Reorder]]:
    """Measure each task's `top_k` schedules again, longer and with nothing else running.

    The fast measurement of the search, next to builds and to other slices, may rank two close
    schedules the wrong way round; this decides.

    Returns:
        What the second look changed, by task hash and units.
    """
    candidates: list[Candidate] = []
    before: dict[tuple[str, int], str] = {}  # the best by the first measurement
    for task in search.tasks:
        units = [u for u in search.allocation.units_of(task.hash) if _worth(search, task, u)]
        wanted: dict[str, Record] = {}
        for count in units:
            key = search.keys[task.hash, count]
            best = search.store.best(key, top_k)
            # With the untuned one, so that before and after are told by the same measurement.
            untuned = search.store.untuned(key)
            wanted |= {r.trace: r for r in (*best, *([untuned] if untuned else []))}
            if best:
                before[task.hash, count] = best[0].trace
        fresh = {trace: record for trace, record in wanted.items() if record.retimed is None}
        candidates.extend(Candidate(task.hash, t, r.origin) for t, r in fresh.items())
    again: dict[tuple[str, int], dict[str, float]] = {}
    for outcome in search.pipeline.run(candidates, effort=RETIME, alone=True):
        for count, measurement in outcome.measurements.items():
            if measurement.seconds is not None:
                place = outcome.candidate.task, count
                again.setdefault(place, {})[outcome.candidate.trace] = measurement.seconds
                key = search.keys[place]
                search.store.set_retimed(key, outcome.candidate.trace, measurement.seconds)
    if candidates:
        yield Note(f"measured the best {len(candidates)} kernels again, alone")
    return {
        place: Reorder(before[place] != min(seconds, key=lambda t: seconds[t]),
                       seconds[before[place]] / min(seconds.values()) - 1)
        for place, seconds in again.items()
        if before.get(place) in seconds
    }  # fmt: skip


def _worth(search: Search, task: Task, units: int) -> bool:
    """Whether a task is a part of some model's latency that one can notice."""
    best_s = search.allocation.best_s(task.hash).get(units, 0.0)
    for goal in search.goals:
        if goal.units == units and task.hash in goal.weights:
            latency_s = search.allocation.latency_s(goal.model)[units]
            if goal.weights[task.hash] * best_s > _WORTH * latency_s:
                return True
    return False


def choose(
    tasks: Sequence[Task],
    units: Sequence[int],
    keys: Mapping[tuple[str, int], RecordKey],
    store: Store,
    builders: BuildPool,
    check: bool,
    target: object,
    seed: int,
) -> Iterator[Event | Choice]:
    """Give the fastest kernel of each task and share that computes the right numbers.

    Each is run against the unscheduled kernel on random inputs, in a build worker, because a wrong
    kernel may crash. A mismatch marks its record wrong, and the next best is taken.
    """
    right: set[tuple[str, str]] = set()  # (task hash, trace) that passed
    open_: list[tuple[Task, int]] = [(task, count) for task in tasks for count in units]
    while open_:
        picked = {(task.hash, count): _best(task, count, keys, store) for task, count in open_}
        todo = {}
        for task, count in open_:
            choice = picked[task.hash, count]
            if check and choice.trace and (task.hash, choice.trace) not in right:
                todo[task.hash, choice.trace] = choice
        wrong = {}
        for choice, problem in _checks(list(todo.values()), builders, target, seed):
            if problem is None:
                right.add((choice.task.hash, choice.trace))
            else:
                wrong[choice.task.hash, choice.trace] = problem
                store.mark_wrong(keys[choice.task.hash, choice.units], choice.trace)
                yield Note(f"{choice.task.name}: a kernel was wrong ({problem})", "warning")
        still_open = []
        for task, count in open_:
            choice = picked[task.hash, count]
            if (task.hash, choice.trace) in wrong:
                still_open.append((task, count))
            else:
                yield choice
        open_ = still_open


def _best(
    task: Task, units: int, keys: Mapping[tuple[str, int], RecordKey], store: Store
) -> Choice:
    best = store.best(keys[task.hash, units], _LOOK)
    if not best:
        return Choice(task, units, "", 0.0, "plain")
    # What was measured again goes first: a quick number that happens to be low must not win.
    record = min(best, key=lambda found: (found.retimed is None, found.best_s or 0.0))
    origin = record.origin if record.trace else "plain"
    return Choice(task, units, record.trace, record.best_s or 0.0, origin)


def _checks(
    choices: Sequence[Choice], builders: BuildPool, target: object, seed: int
) -> Iterator[tuple[Choice, str | None]]:
    """Check kernels in the build workers; gives what is wrong with each, or None."""
    import select

    from gpu_aware_tune.traces import module_to_json

    waiting = list(choices)
    while waiting or builders.busy:
        while waiting and builders.idle:
            choice = waiting.pop()
            module = module_to_json(choice.task.module)
            builders.call(choice, _WORKER, module, choice.trace, target, seed)
        ready = select.select(builders.busy, [], [], 0.1)[0]
        for choice, answer in builders.collect(ready):
            if not isinstance(answer, Built):
                yield choice, answer
                continue
            assert answer.failure is not None
            if (
                answer.failure.kind == CALL_FAILED
            ):  # no verdict: the record must not be marked wrong
                raise TuneError(f"checking {choice.task.name} failed: {answer.failure.text}")
            yield choice, answer.failure.kind  # the kernel crashed, hung or ate the memory


_WORKER = "gpu_aware_tune.selection:check_kernel"


def check_kernel(module_json: str, trace: str, target: dict[str, object], seed: int) -> str | None:
    """Run one kernel against the plain loops (in a worker); gives what is wrong, or None."""
    import tvm

    from gpu_aware_tune.traces import module_from_json
    from gpu_aware_tune.verify import verify_kernel

    module = module_from_json(module_json)
    check = verify_kernel(module, trace, tvm.target.Target(target), seed)
    return None if check.ok else f"error {check.max_error:.1e}"
