"""Handing work to machines that come and go, with machines that only pretend to measure."""

from __future__ import annotations

import itertools
import socket
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gpu_aware_tune.candidates import Candidate, NewTask
from gpu_aware_tune.cluster import ClusterPipeline
from gpu_aware_tune.cluster.connection import connected
from gpu_aware_tune.cluster.ledger import Ledger
from gpu_aware_tune.cluster.members import Member, _places
from gpu_aware_tune.cluster.messages import (
    Ask,
    Batch,
    Begin,
    Draft,
    End,
    Gone,
    Learn,
    Measured,
    Ready,
    Status,
    Work,
)
from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.measurement import Measurement
from gpu_aware_tune.pipeline import Demand, TaskSpec
from gpu_aware_tune.settings import Settings

TASKS = {str(number): TaskSpec((((4,), "float32"),), (2,)) for number in range(1, 6)}


class Machine:
    """Measures whatever it is given in no time, and drafts four candidates when asked."""

    def __init__(self, key: str, searchers: int = 1) -> None:
        self.member = Member(key, key, None)
        self.searchers = searchers
        self.inbox: list[Any] = []
        self.heard: list[Any] = []
        self.runs: list[Begin] = []
        self.count = itertools.count()
        self.refuses = ""

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]

    def answers(self, at_most: int = 3) -> list[Any]:
        """Answers a few messages; the others wait."""
        found: list[Any] = []
        for message in self.inbox[:at_most]:
            if isinstance(message, Begin):
                self.runs.append(message)
            elif isinstance(message, End):
                self.runs.pop()
            elif isinstance(message, Work):
                assert self.runs, "work came before its run began"
                found.append(Measured(message.candidate.id, {2: Measurement(1e-3)}))
            elif isinstance(message, Ask):
                names = [f"{self.member.key}.{next(self.count)}" for _ in range(4)]
                drafted = tuple(
                    Candidate(message.task, name, "search", number)
                    for number, name in enumerate(names)
                )
                found.append(Draft(self.runs[-1].run, message.task, drafted))
        del self.inbox[:at_most]
        return found


class Machines:
    """What `Members` is to the pipeline; `before` is called at each look and may change things."""

    def __init__(self, *machines: Machine) -> None:
        self.machines = {machine.member.key: machine for machine in machines}
        self.joining = list(self.machines.values())
        self.gone: list[tuple[Member, str]] = []
        self.before: Callable[[], None] = lambda: None

    @property
    def active(self) -> list[Member]:
        return [m.member for m in self.machines.values() if m.member.ready]

    @property
    def starting(self) -> int:
        return len(self.joining)

    def refresh(self, at_once: bool = False) -> None:
        self.before()

    def join(self, machine: Machine) -> None:
        self.machines[machine.member.key] = machine
        self.joining.append(machine)

    def kill(self, key: str) -> None:
        self.gone.append((self.machines.pop(key).member, "killed"))

    def flush(self) -> None:
        for machine in self.machines.values():
            machine.inbox += machine.member.outgoing
            machine.heard += machine.member.outgoing
            machine.member.outgoing = []

    def receive(self, wait_s: float) -> Iterator[tuple[Member, Batch | Gone]]:
        for machine in self.joining:
            if machine.refuses:
                yield self.machines.pop(machine.member.key).member, Gone(machine.refuses, True)
                continue
            machine.member.ready = Ready(6, machine.searchers, 2, "workers")
            yield machine.member, Batch((machine.member.ready,), Status())
        self.joining = []
        while self.gone:
            member, text = self.gone.pop()
            yield member, Gone(text)
        for machine in list(self.machines.values()):
            yield machine.member, Batch(tuple(machine.answers()), Status())

    def close(self) -> None:
        self.machines.clear()


def cluster(*machines: Machine) -> tuple[ClusterPipeline, Machines]:
    members = Machines(*machines)
    pipeline = ClusterPipeline(members, TASKS)
    pipeline.wait()
    for task in TASKS:
        pipeline.add_task(
            NewTask(task, "{}", known=((f"old {task}", 2e-3),), tried=(f"bad {task}",))
        )
    return pipeline, members


def given(count: int) -> list[Candidate]:
    return [Candidate(str(1 + n % 5), f"trace {n}", "default") for n in range(count)]


class Budget:
    """Asks for drafts of any task until so many candidates were accepted."""

    def __init__(self, trials: int) -> None:
        self.left = trials
        self.notes: list[str] = []
        self.turn = itertools.cycle(TASKS)

    def demand(self) -> Demand:
        return Demand(next_task=self._next, accept=self._accept, note=self.notes.append)

    def _next(self, busy: Any) -> str | None:
        if not self.left or len(busy) == len(TASKS):
            return None
        return next(task for task in self.turn if task not in busy)

    def _accept(self, task: str, drafted: Any) -> Any:
        taken = drafted[: self.left]
        self.left -= len(taken)
        return taken


def test_every_candidate_comes_back_once_and_every_machine_has_some() -> None:
    one, two = Machine("one"), Machine("two")
    pipeline, _ = cluster(one, two)
    outcomes = list(pipeline.run(given(40)))
    assert sorted(o.candidate.trace for o in outcomes) == sorted(c.trace for c in given(40))
    assert len(one.of(Work)) + len(two.of(Work)) == 40
    assert min(len(one.of(Work)), len(two.of(Work))) > 10


def test_a_budget_is_met_exactly_and_each_task_is_drafted_for_on_one_machine() -> None:
    one, two = Machine("one"), Machine("two")
    pipeline, _ = cluster(one, two)
    outcomes = list(pipeline.run((), Budget(101).demand()))
    assert len(outcomes) == 101
    asked = [{ask.task for ask in machine.of(Ask)} for machine in (one, two)]
    assert asked[0] | asked[1] == set(TASKS) and not asked[0] & asked[1]
    first = next(ask for ask in one.of(Ask))
    assert first.new is not None and first.new.known == ((f"old {first.task}", 2e-3),)
    assert all(
        ask.new is None for ask in one.of(Ask) if ask is not first and ask.task == first.task
    )


def test_only_one_draft_at_a_time_is_asked_of_a_searcher() -> None:
    one = Machine("one", searchers=2)
    pipeline, members = cluster(one)
    stream = pipeline.run((), Budget(50).demand())
    next(stream)
    under_way = [message for message in one.inbox if isinstance(message, Ask)]
    assert len({int(ask.task) % 2 for ask in under_way}) == len(under_way)
    stream.close()
    members.flush()
    assert isinstance(one.heard[-1], End)


def test_a_lost_machines_candidates_and_searches_go_elsewhere() -> None:
    one, two = Machine("one"), Machine("two")
    pipeline, members = cluster(one, two)
    budget = Budget(80)
    outcomes = []
    for outcome in pipeline.run(given(10), budget.demand()):
        outcomes.append(outcome)
        pipeline.tell(outcome.candidate, 1e-3)
        if len(outcomes) == 40:
            members.kill("one")
    traces = [outcome.candidate.trace for outcome in outcomes]
    assert len(traces) == len(set(traces)) == 90
    assert all(outcome.failure is None for outcome in outcomes)
    assert any("one" in note and "elsewhere" in note for note in budget.notes)
    moved = [ask for ask in two.of(Ask) if ask.new and len(ask.new.known) > 1]
    assert moved, "the search that moved starts from what is known"
    drafted = {trace for trace in traces if trace.startswith("one.")}
    assert any(drafted & set(ask.new.tried) for ask in moved)
    learned = {(message.task, message.number) for message in two.of(Learn)}
    own = {(o.candidate.task, o.candidate.number) for o in outcomes if "two." in o.candidate.trace}
    assert learned <= own, "a searcher hears only of what it drafted itself"


def test_a_candidate_that_two_machines_died_with_is_a_failure() -> None:
    ledger = Ledger()
    ledger.add(given(2))
    ledger.give("one", 2)
    assert ledger.lose("one") == [] and ledger.waiting == 2
    ((number, first),) = ledger.give("two", 1)
    assert ledger.lose("two") == [first]
    assert ledger.finish(number) is None, "a late answer counts for nothing"
    assert ledger.open() == 1

    pipeline, members = cluster(Machine("one"), Machine("two"), Machine("three"))
    for machine in members.machines.values():
        machine.answers = lambda at_most=3: []  # type: ignore[method-assign]

    def strike() -> None:
        for key, machine in list(members.machines.items()):
            if machine.of(Work):
                members.kill(key)

    members.before = strike
    (outcome,) = pipeline.run(given(1))
    assert outcome.failure == "lost" and set(outcome.measurements) == {2}
    assert len(members.machines) == 1, "the third machine never had it"


def test_a_machine_that_joins_gets_work_and_the_last_one_that_goes_ends_the_run() -> None:
    one, late = Machine("one"), Machine("late")
    pipeline, members = cluster(one)
    budget = Budget(60)
    stream = pipeline.run((), budget.demand(), alone=True)
    for _ in range(8):
        next(stream)
    members.join(late)
    for _ in range(20):
        next(stream)
    assert late.of(Work) and any("late works" in note for note in budget.notes)
    assert late.runs[0].alone
    members.kill("one")
    members.kill("late")
    with pytest.raises(SetupError, match="no machine of the Ray cluster is left; what was"):
        list(stream)


def test_nobody_can_work() -> None:
    machine = Machine("one")
    machine.refuses = "its device is another one"
    with pytest.raises(SetupError, match=r"no machine .* can work: .*its device is another one"):
        ClusterPipeline(Machines(machine), TASKS).wait()


def node(name: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    facts = {"NodeID": name * 8, "NodeManagerHostname": name, "Alive": alive}
    return {**facts, "Resources": resources}


def test_one_actor_for_each_machine_or_each_gpu() -> None:
    nodes = [node("a", CPU=8), node("b", alive=False, CPU=8), node("c", CPU=16, GPU=2)]
    assert [(p.node[0], p.cpus, p.gpus) for p in _places(nodes, on_gpu=False)] == [
        ("a", 8, 0),
        ("c", 16, 0),
    ]
    assert [(p.part, p.cpus, p.gpus) for p in _places(nodes, on_gpu=True)] == [
        ((0, 2), 8, 1),
        ((1, 2), 8, 1),
    ]


@pytest.mark.parametrize(
    "address", ["", "head", "ray://head:10001", "head:", "a b:1", "head:123456"]
)
def test_an_address_that_cannot_be_one_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"--ray .* is not an address: give auto, or HOST:PORT"):
        Settings(ray=address)


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:6379", "head.example:6379", "[::1]:6379"])
def test_an_address_is_kept(address: str) -> None:
    assert Settings(ray=address).as_dict()["ray"] == address


def test_nothing_at_the_address_is_one_line_and_soon() -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(SetupError, match="nothing answers there") as caught, connected(address):
            pass
    assert "\n" not in str(caught.value)


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SetupError, match="pip install ray"), connected("auto"):
        pass


def fake_ray(error: Exception) -> Any:
    """A Ray whose `init` fails."""

    def init(**options: Any) -> None:
        raise error

    return SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: None)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9\n"),
            "Version mismatch: .* Ray: 2.9.: install the cluster's versions",
        ),
        (ConnectionError("no raylet"), "this machine is no part of that cluster: run `ray start"),
        (ValueError("bad\n\nvalue"), "Ray refused .bad value.: see `ray status"),
    ],
)
def test_what_ray_refuses_is_one_line_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", fake_ray(error))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(SetupError, match=text) as caught, connected(address):
            pass
    assert "\n" not in str(caught.value)
