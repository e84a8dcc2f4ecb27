"""Handing work to machines that come and go, with machines that only pretend to measure."""

from __future__ import annotations

import itertools
import socket
import sys
from collections.abc import Callable, Generator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from mock_gpu.devices import fake_gpu

from gpu_aware_tune.cluster import ClusterPipeline
from gpu_aware_tune.cluster.connection import connected
from gpu_aware_tune.cluster.ledger import PendingCandidates
from gpu_aware_tune.cluster.members import Member, Members, _places, gpu_fraction
from gpu_aware_tune.cluster.messages import (
    Artifact,
    Ask,
    Batch,
    Begin,
    DraftRequest,
    End,
    Gone,
    Learn,
    Made,
    Measure,
    Measured,
    NodeSetup,
    Ready,
    Status,
    Work,
)
from gpu_aware_tune.errors import SetupError, UserError
from gpu_aware_tune.measure.measurement import Measurement
from gpu_aware_tune.partition import Share
from gpu_aware_tune.search.candidates import Candidate, NewTask
from gpu_aware_tune.search.pipeline import TaskSpec
from gpu_aware_tune.search.pools import PoolSettings
from gpu_aware_tune.search.sources import CandidateSource
from gpu_aware_tune.settings import Settings

TASKS = {str(number): TaskSpec((((4,), "float32"),), (2,)) for number in range(1, 6)}


class Machine:
    """Measures whatever it is given in no time, and drafts four candidates when asked.

    One that `lacks` the device only builds; its artifacts are the traces.
    """

    def __init__(self, key: str, searchers: int = 1, lacks: str = "", capacity: int = 6) -> None:
        self.member = Member(key, key, None, may_measure=not lacks)
        self.ready = Ready(capacity, searchers, 2, "workers", lacks)
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
            elif isinstance(message, Work) and self.ready.lacks:
                data = message.candidate.trace.encode()
                found.append(Made(message.candidate.id, Artifact(data, "digest")))
            elif isinstance(message, Work | Measure):
                assert self.runs, "work came before its run began"
                if isinstance(message, Measure):
                    assert not self.ready.lacks
                    assert message.artifact.data == message.candidate.trace.encode()
                found.append(Measured(message.candidate.id, {2: Measurement(1e-3)}))
            elif isinstance(message, Ask):
                names = [f"{self.member.key}.{next(self.count)}" for _ in range(4)]
                drafted = tuple(
                    Candidate(message.task, name, "search", number)
                    for number, name in enumerate(names)
                )
                found.append(DraftRequest(self.runs[-1].run, message.task, drafted))
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
        return sum(machine.member.measures for machine in self.joining)

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
            machine.member.ready = machine.ready
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


class Budget(CandidateSource):
    """Asks for drafts of any task until so many candidates were accepted."""

    def __init__(self, trials: int) -> None:
        self.left = trials
        self.notes: list[str] = []
        self.turn = itertools.cycle(TASKS)

    def warn(self, text: str) -> None:
        self.notes.append(text)

    def next_task(self, busy: Any) -> str | None:
        if not self.left or len(busy) == len(TASKS):
            return None
        return next(task for task in self.turn if task not in busy)

    def accept(self, task: str, drafted: Any) -> Any:
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
    outcomes = list(pipeline.run((), Budget(101)))
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
    stream = pipeline.run((), Budget(50))
    next(stream)
    under_way = [message for message in one.inbox if isinstance(message, Ask)]
    assert len({int(ask.task) % 2 for ask in under_way}) == len(under_way)
    assert isinstance(stream, Generator)
    stream.close()
    members.flush()
    assert isinstance(one.heard[-1], End)


def test_a_lost_machines_candidates_and_searches_go_elsewhere() -> None:
    one, two = Machine("one"), Machine("two")
    pipeline, members = cluster(one, two)
    budget = Budget(80)
    outcomes = []
    for outcome in pipeline.run(given(10), budget):
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
    ledger = PendingCandidates()
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
    stream = pipeline.run((), budget, alone=True)
    for _ in range(8):
        next(stream)
    members.join(late)
    for _ in range(20):
        next(stream)
    assert late.of(Work) and any("late works" in note for note in budget.notes)
    assert late.runs[0].alone
    members.kill("one")
    members.kill("late")
    with pytest.raises(
        SetupError, match="no machine of the Ray cluster is left to measure on; what"
    ):
        list(stream)


def builder(key: str = "builder", capacity: int = 40) -> Machine:
    return Machine(key, lacks="it has no GPU", capacity=capacity)


def test_what_a_machine_without_the_device_builds_is_measured_elsewhere() -> None:
    one, two, other = Machine("one"), Machine("two"), builder()
    pipeline, _ = cluster(one, two, other)
    budget = Budget(40)
    outcomes = list(pipeline.run(given(60), budget))
    assert len(outcomes) == 100 and len({o.candidate.trace for o in outcomes}) == 100
    assert all(outcome.failure is None for outcome in outcomes)
    built, measured = other.of(Work), [*one.of(Measure), *two.of(Measure)]
    assert len(built) == len(measured) > 20
    assert {w.candidate.trace for w in built} == {m.candidate.trace for m in measured}
    assert one.of(Work) and two.of(Work), "machines that measure still build"
    assert one.of(Measure) and two.of(Measure)
    assert other.of(Ask), "it searches too"
    assert pipeline.cores == 6


def test_people_are_told_which_machine_only_builds_and_why() -> None:
    members = Machines(Machine("one"), builder())
    assert ClusterPipeline(members, TASKS).wait() == [
        "one works for this run: workers",
        "builder builds for this run: it has no GPU; workers",
    ]


def test_building_does_not_run_ahead_of_measuring_without_limit() -> None:
    one, others = Machine("one"), [builder("a"), builder("b")]
    pipeline, _ = cluster(one, *others)
    one.answers = lambda at_most=3: []  # type: ignore[method-assign]
    looks = itertools.count()
    budget = Budget(1000)
    budget.stop = lambda: next(looks) > 60  # type: ignore[method-assign]
    assert list(pipeline.run(given(200), budget)) == []
    assert len(one.of(Work)) + len(one.of(Measure)) == 6
    begun = sum(len(machine.of(Work)) for machine in others)
    assert begun == 12 + len(one.of(Measure)), "twice what the measuring machine holds"
    assert budget.left == 1000, "no draft while candidates wait"


def test_an_artifact_is_kept_until_it_is_measured() -> None:
    one, two, other = Machine("one"), Machine("two"), builder()
    pipeline, members = cluster(one, two, other)

    def measure_none(at_most: int = 3) -> list[Any]:
        one.inbox = [message for message in one.inbox if not isinstance(message, Measure)]
        return Machine.answers(one, at_most)

    one.answers = measure_none  # type: ignore[method-assign]

    def strike() -> None:
        if len(one.of(Measure)) >= 3 and "one" in members.machines:
            members.kill("one")

    members.before = strike
    outcomes = list(pipeline.run(given(60)))
    assert "one" not in members.machines
    assert sorted(o.candidate.trace for o in outcomes) == sorted(c.trace for c in given(60))
    traces = [w.candidate.trace for w in other.of(Work)]
    assert len(traces) == len(set(traces)), "nothing is built twice"
    again = {m.candidate.trace for m in one.of(Measure)}
    assert again <= {m.candidate.trace for m in two.of(Measure)}


def test_what_a_lost_machine_was_building_is_built_elsewhere() -> None:
    one, other = Machine("one"), builder()
    pipeline, members = cluster(one, other)
    other.answers = lambda at_most=3: []  # type: ignore[method-assign]

    def strike() -> None:
        if other.of(Work) and "builder" in members.machines:
            members.kill("builder")

    members.before = strike
    outcomes = list(pipeline.run(given(30)))
    assert other.of(Work) and len(outcomes) == 30 and not one.of(Measure)


def test_machines_that_only_build_are_not_enough() -> None:
    with pytest.raises(SetupError, match=r"can measure: none has the device"):
        ClusterPipeline(Machines(builder()), TASKS).wait()
    small = builder("small")
    small.member.may_measure = True  # as far as is known before its workers stand
    with pytest.raises(SetupError, match=r"can measure: small builds for this run: it has no GPU"):
        ClusterPipeline(Machines(small), TASKS).wait()

    pipeline, members = cluster(Machine("one"), builder())
    stream = pipeline.run((), Budget(60))
    next(stream)
    members.kill("one")
    with pytest.raises(SetupError, match="is left to measure on"):
        list(stream)


def test_a_run_waits_for_a_measuring_machine_that_is_on_its_way_back() -> None:
    one, again = Machine("one"), Machine("again")
    pipeline, members = cluster(one, builder())
    looks = itertools.count()
    outcomes = []
    for outcome in pipeline.run((), Budget(60)):
        outcomes.append(outcome)
        if len(outcomes) == 30:
            members.kill("one")
            members.join(again)
            receive, members.receive = members.receive, lambda wait_s: iter(())  # type: ignore[method-assign]

            def slowly(receive: Any = receive) -> None:
                if next(looks) == 5:
                    members.receive = receive  # type: ignore[method-assign]

            members.before = slowly
    assert len(outcomes) == 60 and again.of(Measure)


def test_the_ledger_keeps_artifacts_and_counts_what_each_machine_has() -> None:
    ledger, artifact = PendingCandidates(), Artifact(b"code", "digest")
    ledger.add(given(3))
    (number, first), _ = ledger.give("builder", 2)
    assert (ledger.load("builder"), ledger.waiting, ledger.open()) == (2, 1, 3)
    ledger.keep(number, artifact)
    ledger.keep(99, artifact)
    assert (ledger.made, ledger.load("builder"), ledger.open()) == (1, 1, 3)
    ((passed, candidate, got),) = ledger.pass_on("one", 5)
    assert candidate == first and got == artifact and passed != number
    assert ledger.lose("one") == [] and ledger.made == 1 and ledger.load("one") == 0
    assert ledger.lose("builder") == [] and ledger.waiting == 2
    ledger.orphan([first.task])
    ((passed, _, _),) = ledger.pass_on("two", 5)
    assert ledger.finish(number) is None, "its number from the machine that built it"
    assert ledger.lose("two") == [first], "on two machines that were lost"
    ledger.clear()
    assert ledger.open() == ledger.made == ledger.load("builder") == 0


def test_nobody_can_work() -> None:
    machine = Machine("one")
    machine.refuses = "its device is another one"
    with pytest.raises(SetupError, match=r"no machine .* can measure: .*its device is another one"):
        ClusterPipeline(Machines(machine), TASKS).wait()


def node(name: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    facts = {"NodeID": name * 8, "NodeManagerHostname": name, "Alive": alive}
    return {**facts, "Resources": resources}


def test_one_actor_for_each_machine_or_each_gpu() -> None:
    nodes = [node("a", CPU=8), node("b", alive=False, CPU=8), node("c", CPU=16, GPU=2)]
    assert [(p.node[0], p.cpus, p.gpus, p.may_measure) for p in _places(nodes, None)] == [
        ("a", 8, 0, True),
        ("c", 16, 0, True),
    ]
    assert [(p.node[0], p.part, p.cpus, p.gpus, p.may_measure) for p in _places(nodes, 0.25)] == [
        ("a", (0, 1), 8, 0, False),
        ("c", (0, 2), 8, 1, True),
        ("c", (1, 2), 8, 1, True),
    ]


def test_an_only_gpu_is_asked_for_in_part_and_one_that_is_unfit_not_at_all() -> None:
    nodes = [node("a", CPU=8, GPU=1), node("b", CPU=4, GPU=2), node("c", CPU=0, GPU=1)]
    found = [(p.name, p.gpus) for p in _places(nodes, 0.25)]
    assert found == [
        ("a (aaaaaa) GPU 0", 0.25),
        ("b (bbbbbb) GPU 0", 1),
        ("b (bbbbbb) GPU 1", 1),
        ("c (cccccc) GPU 0", 0.25),
    ]
    unfit = {"a" * 8 + "/0", "b" * 8 + "/0", "c" * 8 + "/0"}
    left = [(p.name, p.cpus, p.gpus, p.may_measure) for p in _places(nodes, 0.25, unfit)]
    assert left == [
        ("a (aaaaaa)", 8, 0, False),  # all of its cores build
        ("b (bbbbbb) GPU 0", 2, 1, True),  # not started again: it has refused
        ("b (bbbbbb) GPU 1", 2, 1, True),
    ]


def setup_for(units: list[int], backend: str = "green", exclusive: bool = False) -> NodeSetup:
    device = fake_gpu()
    slices = tuple((Share(1, count, device), Share(1, 8, device)) for count in units)
    search: Any = None
    pools = PoolSettings(device, backend, slices, {}, search, 1.0, 1.0, 1)
    return NodeSetup(pools, TASKS, {}, None, ("1", "2"), exclusive)


def test_the_part_of_a_gpu_that_a_run_asks_for() -> None:
    assert gpu_fraction(setup_for([32])) == 0.25, "32 of 132 SMs"
    assert gpu_fraction(setup_for([66])) == 0.5
    assert gpu_fraction(setup_for([32, 32, 16])) == 0.61
    assert gpu_fraction(setup_for([132])) == 1
    assert gpu_fraction(setup_for([32], exclusive=True)) == 1
    assert gpu_fraction(setup_for([132], backend="full")) == 1


class FakeRay:
    """Ray as far as `Members` uses it: polls are answered by `answer`, told which actor was asked."""

    def __init__(self, nodes: list[dict[str, Any]], answer: Callable[[Any], Batch]) -> None:
        self.nodes = lambda: nodes
        self.answer = answer
        self.started: list[tuple[dict[str, Any], bool]] = []
        self.put = lambda value: value
        self.kill = lambda actor: None

    def options(self, **options: Any) -> Any:
        def remote(setup: Any, part: Any, measures: bool) -> Any:
            self.started.append((options, measures))
            asked = len(self.started), measures
            return SimpleNamespace(poll=SimpleNamespace(remote=lambda wait_s: asked))

        return SimpleNamespace(remote=remote)

    def wait(
        self, polls: list[Any], num_returns: int, timeout: float
    ) -> tuple[list[Any], list[Any]]:
        return polls[:num_returns], []

    def get(self, poll: Any) -> Batch:
        return self.answer(poll)


def test_a_machine_whose_gpu_is_another_one_builds_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray")

    def answer(poll: Any) -> Batch:
        _, measures = poll
        if measures:
            return Batch((Gone("another GPU", refused=True, can_build=True),), Status())
        return Batch((Ready(6, 1, 2, "workers", "it has none"),), Status())

    machine = {**node("a", CPU=8, GPU=1), "NodeID": "a" * 56}  # Ray looks at the length
    ray = FakeRay([machine], answer)
    monkeypatch.setattr("ray.put", ray.put)
    monkeypatch.setattr("gpu_aware_tune.cluster.actor.NodeActor", ray)
    members = Members(setup_for([32]))
    members._ray = ray
    members.refresh(at_once=True)
    assert members.starting == 1
    for _ in range(3):
        list(members.receive(0))
        members.refresh(at_once=True)
    asked = [(options["num_gpus"], options["num_cpus"], fit) for options, fit in ray.started]
    assert asked == [(0.25, 8, True), (0, 8, False)]
    assert members.starting == 0, "nothing that may measure is waited for"
    assert [member.measures for member in members.active] == [False]


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
    with pytest.raises(SetupError, match=r"gpu-aware-tune\[ray\]"), connected("auto"):
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
