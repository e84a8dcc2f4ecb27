"""The machines (or GPUs) of a cluster that work for a run: found, started, listened to, replaced."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu_aware_tune.cluster.messages import Batch, Gone, NodeSetup, Ready, Status, ToNode
from gpu_aware_tune.errors import SetupError

_LOOK_S = 2.0  # between two looks at which machines there are
_POLL_S = 0.5
_SILENT_S = 30.0  # a machine that does not answer for so long is given up
_START_S = 180.0  # until workers stand: TVM's import, on a machine that is busy
_STARTS = 3  # of one machine's actor, before it is left alone
_CLOSE_S = 20.0
# In an actor's environment before it starts: CUDA_VISIBLE_DEVICES is left to the partitions, and the
# worker host is left to end by itself when the actor has ended, so that it can tidy up.
_ENV = {
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    "RAY_kill_child_processes_on_worker_exit": "0",
}


@dataclass(eq=False)
class Member:
    """One actor; `ready` is None until its workers stand, `may_measure` is what is known till then."""

    key: str
    name: str
    actor: Any
    may_measure: bool = True
    poll: Any = None  # the reference of the poll under way
    asked_at: float = field(default_factory=time.monotonic)
    ready: Ready | None = None
    status: Status = field(default_factory=Status)
    outgoing: list[ToNode] = field(default_factory=list)

    @property
    def measures(self) -> bool:
        """Whether it measures, or may, as far as is known; else it only builds."""
        return self.may_measure if self.ready is None else not self.ready.lacks

    def send(self, *messages: ToNode) -> None:
        """Queue messages; `Members.flush` sends them."""
        self.outgoing.extend(messages)


@dataclass(frozen=True)
class _Place:
    """Where an actor can run: a node, or one GPU of it (`gpus`: how much of that it asks for)."""

    key: str
    name: str
    node: str
    part: tuple[int, int]
    cpus: float
    gpus: float
    may_measure: bool = True


class Members:
    """Starts an actor on every machine, or on every GPU that the run needs, also on those that join later.

    A machine without a GPU, or whose GPUs are not the run's, has one that only builds.

    Args:
        setup: what each actor is started with.
    """

    def __init__(self, setup: NodeSetup) -> None:
        import ray

        self._ray = ray
        self._gpus = gpu_fraction(setup) if setup.pools.device.kind == "cuda" else None
        self._unfit: set[str] = set()  # the places at which a GPU cannot be measured on
        self._setup = ray.put(setup)
        self._members: dict[str, Member] = {}
        self._starts: Counter[str] = Counter()
        self._looked_at = 0.0

    @property
    def active(self) -> list[Member]:
        """Those that can be given work."""
        return [member for member in self._members.values() if member.ready is not None]

    @property
    def starting(self) -> int:
        """How many that may measure have been started and do not stand yet."""
        return sum(m.ready is None and m.measures for m in self._members.values())

    def refresh(self, at_once: bool = False) -> None:
        """Every few seconds, start an actor wherever one is missing.

        Raises:
            SetupError: the cluster itself is gone.
        """
        now = time.monotonic()
        if not at_once and now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        try:
            nodes = self._ray.nodes()
        except Exception as error:  # what Ray raises depends on what of it is gone
            raise _cluster_gone(error) from error
        for place in _places(nodes, self._gpus, self._unfit):
            if place.key not in self._members and self._starts[place.key] < _STARTS:
                self._start(place)

    def receive(self, wait_s: float) -> Iterator[tuple[Member, Batch | Gone]]:
        """What members tell, as it comes in; a member that is gone is told once."""
        polls = {member.poll: member for member in self._members.values()}
        if not polls:
            time.sleep(wait_s)
            return
        try:
            done, _ = self._ray.wait(list(polls), num_returns=1, timeout=wait_s)
            if done and len(polls) > 1:
                done, _ = self._ray.wait(list(polls), num_returns=len(polls), timeout=0)
        except Exception as error:  # what Ray raises depends on what of it is gone
            raise _cluster_gone(error) from error
        for poll in done:
            yield from self._answered(polls[poll], poll)
        for member in list(self._members.values()):
            limit_s = _SILENT_S if member.ready else _START_S
            if time.monotonic() - member.asked_at > limit_s:
                why = "" if member.ready else ": are its CPUs or GPUs taken by other work?"
                yield member, self._drop(member, f"no answer for {limit_s:.0f} s{why}")

    def flush(self) -> None:
        """Send what was queued for the members."""
        for member in self._members.values():
            if member.outgoing:
                messages, member.outgoing = member.outgoing, []
                member.actor.post.remote(messages)

    def close(self) -> None:
        """End every actor: in good order where it answers, at once where it does not."""
        closing = [member.actor.close.remote() for member in self._members.values()]
        with contextlib.suppress(Exception):  # a cluster that is gone has nothing to end
            self._ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_S)
        for member in list(self._members.values()):
            self._kill(member)
        self._members.clear()

    def _start(self, place: _Place) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from gpu_aware_tune.cluster.actor import NodeActor

        self._starts[place.key] += 1
        remote: Any = NodeActor  # what the decorator made of it is not typed
        actor = remote.options(
            num_cpus=place.cpus,
            num_gpus=place.gpus,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=False),
            runtime_env={"env_vars": _ENV},
        ).remote(self._setup, place.part, place.may_measure)
        member = Member(place.key, place.name, actor, place.may_measure)
        self._members[place.key] = member
        self._ask(member)

    def _ask(self, member: Member) -> None:
        member.asked_at = time.monotonic()
        # Until the workers stand nothing but that is waited for.
        member.poll = member.actor.poll.remote(_POLL_S if member.ready else _START_S)

    def _answered(self, member: Member, poll: Any) -> Iterator[tuple[Member, Batch | Gone]]:
        try:
            batch: Batch = self._ray.get(poll)
        except Exception as error:  # an actor, a worker, a node or a network that is gone
            yield member, self._drop(member, _short(error))
            return
        member.status = batch.status
        for message in batch.messages:
            if isinstance(message, Ready):
                member.ready = message
                self._starts[member.key] = 0  # only failing starts are counted
        gone = next((m for m in batch.messages if isinstance(m, Gone)), None)
        if gone is None:
            self._ask(member)
        yield member, batch
        if gone is not None:
            if gone.refused:
                self._starts[member.key] = _STARTS
            if gone.can_build:
                self._unfit.add(member.key)
            self._drop(member, gone.text)
            yield member, gone

    def _drop(self, member: Member, text: str) -> Gone:
        self._members.pop(member.key, None)
        self._kill(member)
        self._looked_at = 0.0  # look at once for a replacement
        return Gone(text)

    def _kill(self, member: Member) -> None:
        with contextlib.suppress(Exception):  # it may be dead, and its node too
            self._ray.kill(member.actor)


def gpu_fraction(setup: NodeSetup) -> float:
    """How much of a GPU a run occupies: what its slices add up to, or all of it."""
    pools = setup.pools
    if setup.exclusive or pools.backend == "full":
        return 1.0
    units = sum(shares[0].units for shares in pools.slices)
    return min(100, -(-100 * units // pools.device.units_total)) / 100


def _places(
    nodes: Sequence[dict[str, Any]], gpus: float | None, unfit: Collection[str] = ()
) -> Iterator[_Place]:
    """Where actors can run: on each machine one, or one for each GPU.

    Args:
        nodes: as Ray lists them.
        gpus: how much of a GPU each needs; None: the run is for CPUs.
        unfit: keys of places whose GPU is not the run's; without any other the machine builds.
    """
    for node in nodes:
        if not node["Alive"]:
            continue
        node_id, name = node["NodeID"], f"{node['NodeManagerHostname']} ({node['NodeID'][:6]})"
        cpus, count = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
        # Of several GPUs each actor takes a whole one: Ray would put two fractions on one of them.
        asked = gpus if count == 1 and gpus else 1.0
        keys = [f"{node_id}/{number}" for number in range(count if gpus else 0)]
        if any(key not in unfit for key in keys):
            for number, key in enumerate(keys):
                part, share = (number, count), max(1, cpus // count)
                yield _Place(key, f"{name} GPU {number}", node_id, part, share, asked)
        elif cpus >= 1:
            # All cores: where kernels are measured, another task of Ray would be measured too.
            yield _Place(node_id, name, node_id, (0, 1), cpus, 0, may_measure=gpus is None)


def _cluster_gone(error: Exception) -> SetupError:
    return SetupError(
        f"the Ray cluster is gone ({type(error).__name__}); what was measured is kept:"
        " run the same command again"
    )


def _short(error: Exception) -> str:
    """What Ray has to say in the end, without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line or "cause" in line.lower()]
    sentence = (named or lines or [""])[-1].split(". ")[0]
    return f"{type(error).__name__}: {sentence[:200]}"
