"""Which kernel of each task goes into the library: the best one whose numbers are right."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gpu_aware_tune.codegen.build_pool import CALL_FAILED, BuildPool, Built
from gpu_aware_tune.errors import TuneError
from gpu_aware_tune.events import Event, Note
from gpu_aware_tune.model.tasks import Task
from gpu_aware_tune.records.rows import UNFIT
from gpu_aware_tune.records.store import RecordKey, Store
from gpu_aware_tune.search.objectives import ONE_SET, one_for_all, usable
from gpu_aware_tune.settings import Settings


@dataclass(frozen=True)
class Choice:
    """The kernel of one task on one share; `trace` "" stands for the plain loops."""

    task: Task
    units: int
    trace: str
    seconds: float
    origin: str


def choose(
    tasks: Sequence[Task],
    units: Sequence[int],
    keys: Mapping[tuple[str, int], RecordKey],
    store: Store,
    builders: BuildPool,
    settings: Settings,
    target: object,
) -> Iterator[Event | Choice]:
    """Give the kernel of each task and share: the fastest there or, with `robust` and `mean`, on all.

    Each is run against the unscheduled kernel on random inputs, in a build worker, because a wrong
    kernel may crash. A mismatch marks its record wrong, and the next best is taken. So is it where
    a trace cannot be applied to its kernel; that is checked without `settings.verify`, too.
    """
    right: set[tuple[str, str]] = set()  # (task hash, trace) that passed
    together = settings.objective in ONE_SET
    places = [tuple(units)] if together else [(count,) for count in units]
    open_ = [(task, place) for task in tasks for place in places]
    seed = settings.seed if settings.verify else None
    unfit = 0
    while open_:
        picked = [_best(task, place, keys, store, settings.objective) for task, place in open_]
        unchecked = {
            (choices[0].task.hash, choices[0].trace): choices[0]
            for choices in picked
            if choices[0].trace
        }
        todo = [choice for name, choice in unchecked.items() if name not in right]
        wrong = set()
        for choice, problem in _checks(todo, builders, target, seed):
            name = choice.task.hash, choice.trace
            if problem is None:
                right.add(name)
                continue
            wrong.add(name)
            if problem == UNFIT:
                unfit += 1
                store.mark_unfit(*name)
                continue
            for count in units:
                store.mark_wrong(keys[choice.task.hash, count], choice.trace)
            yield Note(f"{choice.task.name}: a kernel was wrong ({problem})", "warning")
        still_open = []
        for place, choices in zip(open_, picked, strict=True):
            if (choices[0].task.hash, choices[0].trace) in wrong:
                still_open.append(place)
            else:
                yield from choices
        open_ = still_open
    if unfit:
        yield Note(f"{unfit} schedules in the records do not fit their kernels; left out")


def _best(
    task: Task,
    units: Sequence[int],
    keys: Mapping[tuple[str, int], RecordKey],
    store: Store,
    objective: str,
) -> list[Choice]:
    """The best kernel of a task for some units together; the plain loops where nothing has run.

    What was measured again goes first: a quick number that happens to be low must not win.
    """
    records = {u: store.all(keys[task.hash, u]) for u in units}
    known = usable(records)
    again = usable({u: [r for r in found if r.retimed] for u, found in records.items()})
    ranked = one_for_all(again, objective) or one_for_all(known, objective)
    if not ranked:
        return [Choice(task, count, "", 0.0, "plain") for count in units]
    trace = ranked[0][0]
    origin = next(r.origin for r in records[units[0]] if r.trace == trace) if trace else "plain"
    return [Choice(task, u, trace, known[trace].get(u, 0.0), origin) for u in units]


def fastest_s(key: RecordKey, store: Store) -> float | None:
    """Seconds of the best kernel on one share, by the second measurement where there is one."""
    records = [r for r in store.all(key) if r.usable]
    again = [r for r in records if r.retimed is not None]
    return min((r.best_s for r in again or records if r.best_s is not None), default=None)


def _checks(
    choices: Sequence[Choice], builders: BuildPool, target: object, seed: int | None
) -> Iterator[tuple[Choice, str | None]]:
    """Check kernels in the build workers; gives what is wrong with each, or None."""
    from gpu_aware_tune.kernels.traces import module_to_json

    def start(choice: Choice) -> None:
        module = module_to_json(choice.task.module)
        builders.call(choice, _WORKER, module, choice.trace, target, seed)

    for choice, answer in builders.work_off(choices, start):
        if not isinstance(answer, Built):
            yield choice, answer
            continue
        assert answer.failure is not None
        if answer.failure.kind == CALL_FAILED:  # no verdict: the record must not be marked wrong
            raise TuneError(f"checking {choice.task.name} failed: {answer.failure.text}")
        yield choice, answer.failure.kind  # the kernel crashed, hung or ate the memory


_WORKER = "gpu_aware_tune.finalize.selection:check_kernel"


def check_kernel(
    module_json: str, trace: str, target: dict[str, object], seed: int | None
) -> str | None:
    """Run one kernel against the unscheduled one (in a worker); returns what is wrong, or None.

    Args:
        module_json, trace, target: the kernel.
        seed: of the inputs; None: only see whether the trace can be applied.
    """
    import tvm

    from gpu_aware_tune.finalize.verify import verify_kernel
    from gpu_aware_tune.kernels.traces import TraceError, apply_trace, module_from_json

    module, on = module_from_json(module_json), tvm.target.Target(target)
    try:
        apply_trace(trace, module)
    except TraceError:
        return UNFIT
    if seed is None:
        return None
    try:
        check = verify_kernel(module, trace, on, seed)
    except Exception:
        if on.kind.name == "cuda" and tvm.cuda().exist:
            # The kernel's fault has ended this process's context, for the next kernel too: to end
            # the process counts as this one's crash, and the pool starts another.
            traceback.print_exc()
            os._exit(1)
        raise
    return None if check.ok else f"error {check.max_error:.1e}"
