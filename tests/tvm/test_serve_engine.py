"""The engine with real libraries, lanes and policies: right answers, refusals, changes under load."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from serve_fleet import Inputs, Oracle, draw_inputs, write_folder

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.partition import usable_cores
from gpu_aware_tune.planning.policies import POLICIES
from gpu_aware_tune.serving.deployments import Deployment
from gpu_aware_tune.serving.engine import Engine
from gpu_aware_tune.serving.model_queue import ModelQueue
from gpu_aware_tune.serving.requests import Draining, Refused, Request, RunFailed, UnknownModel

LONG_S = 60.0  # an objective that no load of a test can miss

two_cores = pytest.mark.skipif(len(usable_cores()) < 2, reason="two lanes need two cores")


@pytest.fixture(scope="module")
def engine(folders: tuple[Path, Path]) -> Iterator[Engine]:
    """Two models: one folder, and a folder for each of two batch sizes."""
    deployments = [
        Deployment((folders[0],), LONG_S, "single"),
        Deployment(folders, LONG_S, "batched"),
    ]
    with Engine(deployments, adaptive=False) as engine:
        yield engine


def answer(future: Future[Inputs]) -> Inputs:
    return future.result(timeout=60)


@pytest.mark.parametrize("model", ["single", "batched"])
def test_many_at_once_get_their_own_answers(engine: Engine, oracle: Oracle, model: str) -> None:
    inputs = [draw_inputs(seed) for seed in range(60)]
    futures = [engine.submit(model, each) for each in inputs]
    for each, future in zip(inputs, futures, strict=True):
        oracle.check(each, answer(future))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 11])
def test_requests_of_several_rows_are_put_together_and_divided(
    engine: Engine, oracle: Oracle, rows: int
) -> None:
    inputs = [draw_inputs(seed, rows) for seed in range(8)]
    futures = [engine.submit("batched", each) for each in inputs]
    for each, future in zip(inputs, futures, strict=True):
        oracle.check(each, answer(future))


def test_batches_are_really_run(folders: tuple[Path, Path], oracle: Oracle) -> None:
    """By a policy that takes as many rows as wait; how many a plan takes depends on the curves."""
    deployment = Deployment(folders, LONG_S)
    with Engine([deployment], policy="temporal-fifo", adaptive=False) as own:
        gate = hold(own)
        inputs = [draw_inputs(seed) for seed in range(40)]
        futures = [own.submit("tiny", each) for each in inputs]
        gate.set()
        for each, future in zip(inputs, futures, strict=True):
            oracle.check(each, answer(future))
        counts = own.statistics("tiny")
    assert counts.batches[4].count >= 9
    assert counts.rows == 41


def test_asyncio(engine: Engine, oracle: Oracle) -> None:
    inputs = [draw_inputs(seed) for seed in range(20)]

    async def ask() -> list[Inputs]:
        return await asyncio.gather(*[engine.infer("batched", each) for each in inputs])

    for each, outputs in zip(inputs, asyncio.run(ask()), strict=True):
        oracle.check(each, outputs)


@pytest.mark.parametrize(
    ("model", "inputs", "text"),
    [
        ("single", {"image": np.zeros((1, 3, 12, 12), "float32")}, "'bias' is missing"),
        ("single", draw_inputs(0, 2), "has shape 2x3x12x12: it must be 1x3x12x12"),
        ("batched", draw_inputs(0, 0), "a request of 0 rows"),
        ("batched", draw_inputs(0, 5000), "a request of 5000 rows"),
        ("batched", {**draw_inputs(0, 2), "bias": np.zeros((3, 20), "float32")}, "numbers of"),
        ("batched", {**draw_inputs(0), "more": np.zeros(1)}, "unknown input 'more'"),
        ("single", {**draw_inputs(0), "bias": np.zeros((1, 20))}, "has type float64"),
    ],
)
def test_bad_requests(engine: Engine, model: str, inputs: Inputs, text: str) -> None:
    with pytest.raises(UserError, match=text):
        engine.submit(model, inputs)


def test_an_unknown_model(engine: Engine) -> None:
    with pytest.raises(UnknownModel, match=r"no model 'other' \(models: batched, single\)"):
        engine.submit("other", draw_inputs(0))


def test_what_cannot_be_in_time_is_refused_at_once(engine: Engine) -> None:
    before = engine.statistics("single").refused
    with pytest.raises(Refused, match="cannot answer in time"):
        engine.submit("single", draw_inputs(0), timeout_s=1e-6)
    assert engine.statistics("single").refused == before + 1


def test_what_cannot_be_in_time_is_refused_while_all_lanes_are_busy(
    folders: tuple[Path, Path],
) -> None:
    with Engine([Deployment((folders[0],), LONG_S)], adaptive=False) as own:
        gate = hold(own)
        for run in own.dispatcher._runs:  # as if they took long
            run.end_s += 5.0
        own.dispatcher._arrange()
        with pytest.raises(Refused, match="cannot answer in time"):
            own.submit("tiny", draw_inputs(0), timeout_s=4.0)
        future = own.submit("tiny", draw_inputs(0), timeout_s=20.0)
        gate.set()
        answer(future)


def test_earlier_deadlines_go_first(engine: Engine, folders: tuple[Path, Path]) -> None:
    order: list[str] = []
    with Engine([Deployment((folders[0],), LONG_S)], units=1, adaptive=False) as own:
        gate = hold(own)
        late = [own.submit("tiny", draw_inputs(n), timeout_s=50) for n in range(4)]
        soon = own.submit("tiny", draw_inputs(9), timeout_s=20)
        for number, future in enumerate(late):
            future.add_done_callback(lambda _, n=number: order.append(f"late {n}"))  # type: ignore[misc]
        soon.add_done_callback(lambda _: order.append("soon"))
        gate.set()
        for future in (*late, soon):
            answer(future)
    assert order == ["soon", "late 0", "late 1", "late 2", "late 3"]


def hold(engine: Engine, model: str = "tiny") -> threading.Event:
    """Keep every lane busy with a request until the event that is returned."""
    gate, began = threading.Event(), threading.Semaphore(0)

    def held() -> None:
        began.release()
        gate.wait(30)

    lanes = engine.dispatcher.layout.lanes
    assert lanes is not None
    for lane in lanes:
        lane.post(held)
        began.acquire()
    for _ in lanes:  # a run for each lane, behind what holds it
        engine.submit(model, draw_inputs(100), timeout_s=LONG_S / 2)
    return gate


def test_a_full_queue_refuses(folders: tuple[Path, Path]) -> None:
    with Engine([Deployment((folders[0],), LONG_S)], adaptive=False, queue_rows=4) as own:
        gate = hold(own)
        futures: list[Future[Inputs]] = []
        waiting = own.dispatcher.layout.queues[0].slots
        while waiting.free:
            futures.append(own.submit("tiny", draw_inputs(len(futures))))
        with pytest.raises(Refused, match="queue of tiny is full"):
            own.submit("tiny", draw_inputs(0))
        gate.set()
        for future in futures:
            answer(future)
        assert own.statistics("tiny").full == 1
        answer(own.submit("tiny", draw_inputs(0)))  # and there is room again


def test_a_cancelled_request_never_runs(folders: tuple[Path, Path]) -> None:
    async def scene(own: Engine) -> None:
        gate = hold(own)
        task = asyncio.ensure_future(own.infer("tiny", draw_inputs(0)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()

    with Engine([Deployment((folders[0],), LONG_S)], adaptive=False) as own:
        asyncio.run(scene(own))
        answer(own.submit("tiny", draw_inputs(1)))
        lanes = own.dispatcher.layout.lanes
    counts = own.statistics("tiny")  # once all runs have ended
    assert counts.cancelled == 1
    assert lanes is not None
    assert counts.rows == len(lanes) + 1


def test_a_run_that_fails_costs_its_batch_and_no_more(
    folders: tuple[Path, Path], oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine([Deployment((folders[0],), LONG_S)], adaptive=False) as own:
        lanes = own.dispatcher.layout.lanes
        assert lanes is not None
        with monkeypatch.context() as patch:
            for lane in lanes:
                patch.setattr(lane, "run", lambda variant, arrays: 1 / 0)
            with pytest.raises(RunFailed, match=r"tiny failed .*division by zero"):
                answer(own.submit("tiny", draw_inputs(0)))
        inputs = draw_inputs(1)
        oracle.check(inputs, answer(own.submit("tiny", inputs)))
        assert own.statistics("tiny").fail.count == 1


def test_close_answers_what_waits_and_refuses_what_comes(folders: tuple[Path, Path]) -> None:
    before = set(threading.enumerate())
    own = Engine([Deployment((folders[0],), LONG_S)], adaptive=False)
    futures = [own.submit("tiny", draw_inputs(seed)) for seed in range(30)]
    own.close()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(Draining):
        own.submit("tiny", draw_inputs(0))
    assert not own.is_ready
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_answers_rightly(
    folders: tuple[Path, Path], oracle: Oracle, policy: str
) -> None:
    # Patient policies wait for a full batch as long as the objective allows.
    deployments = [Deployment((folders[0],), 5.0, "a"), Deployment(folders, 5.0, "b")]
    with Engine(deployments, policy=policy, adaptive=False) as own:
        inputs = [draw_inputs(seed) for seed in range(30)]
        futures = [own.submit("ab"[n % 2], each) for n, each in enumerate(inputs)]
        answered = 0
        for each, future in zip(inputs, futures, strict=True):
            try:
                outputs = answer(future)
            except Refused:  # by one that waits until the last moment, on a busy machine
                assert policy == "equal-shares"
                continue
            answered += 1
            oracle.check(each, outputs)
        assert answered >= 15


class Load:
    """A thread that asks without pause, and keeps what it asked and got."""

    def __init__(self, engine: Engine, models: tuple[str, ...], most: int = 24) -> None:
        self._engine, self._models = engine, models
        self.asked: list[tuple[Inputs, Future[Inputs]]] = []
        self._stop, self._room = threading.Event(), threading.Semaphore(most)
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._room.acquire()
            number = len(self.asked)
            inputs = draw_inputs(number % 50)
            model = self._models[number % len(self._models)]
            try:
                future = self._engine.submit(model, inputs)
            except UnknownModel:
                self._room.release()
                continue
            future.add_done_callback(lambda _: self._room.release())
            self.asked.append((inputs, future))

    def check(self, oracle: Oracle) -> None:
        wanted = {seed: oracle(draw_inputs(seed)) for seed in range(50)}
        for number, (_, future) in enumerate(self.asked):
            for name, array in answer(future).items():
                np.testing.assert_allclose(array, wanted[number % 50][name], rtol=1e-5, atol=1e-5)


@two_cores
def test_changes_of_shares_under_load_lose_nothing(
    folders: tuple[Path, Path], oracle: Oracle
) -> None:
    with Engine([Deployment(folders, LONG_S)], units=2, adaptive=False) as own:
        narrow = own.plan_dict()
        lane = narrow["lanes"][0]
        whole = {**lane, "first_unit": 0, "units": 2}
        plans = ({**narrow, "lanes": [whole]}, narrow)
        with Load(own, ("tiny",)) as load:
            for number in range(200):
                own.set_plan(plans[number % 2])
                if number % 2:  # every other change is followed by the next one at once
                    seen, end = len(own.dispatcher.switch_s), time.monotonic() + 10
                    while len(own.dispatcher.switch_s) == seen and time.monotonic() < end:
                        time.sleep(0.0002)
        load.check(oracle)
        assert len(own.dispatcher.switch_s) >= 100
        assert own.statistics("tiny").fail.count == 0


def test_what_waits_for_a_replaced_model_waits_for_the_new_one(engine: Engine) -> None:
    model = engine.model("single")
    old, new = ModelQueue(model, 8), ModelQueue(model, 4)
    requests = []
    for number in range(6):
        request = Request("single", 1, 0.0, 10.0 - number, Future(), left=1)
        first = old.slots.take(1)
        assert first is not None
        request.first_slot = first
        arrays, _ = model.check(draw_inputs(number), 1)
        old.slots.write(first, arrays, whole=True)
        old.push(request)
        requests.append(request)
    new.adopt(old)
    # The earliest deadlines found room; the others are still in the old queue.
    assert [row.request for row in new.rows] == requests[:1:-1]
    assert [row.request for row in old.rows] == requests[1::-1]
    assert list(new.deadlines) == sorted(new.deadlines)
    for row in new.rows:
        wanted = draw_inputs(requests.index(row.request))
        image, bias = new.slots.rows([row.slot], 1)
        np.testing.assert_array_equal(image[0], wanted["image"])
        np.testing.assert_array_equal(bias[0], wanted["bias"])
    assert new.slots.take(1) is None and old.slots.free == 6


def test_models_come_and_go_under_load(
    folders: tuple[Path, Path], oracle: Oracle, tmp_path: Path
) -> None:
    other = write_folder(tmp_path / "other")
    with Engine([Deployment((folders[0],), LONG_S, "a")], adaptive=False) as own:
        with Load(own, ("a",)) as load:
            own.load_model("b", other)
            inputs = draw_inputs(3)
            oracle.check(inputs, answer(own.submit("b", inputs)))
            own.load_model("a", other)  # replaced while it is asked
            own.unload_model("b")
            with pytest.raises(UnknownModel):
                own.submit("b", inputs)
            time.sleep(0.1)
        load.check(oracle)
        with pytest.raises(UserError, match="only model"):
            own.unload_model("a")
        with pytest.raises(UserError, match="is no folder"):
            own.load_model("c", tmp_path / "missing")
        assert [model.name for model in own.models] == ["a"]


def test_rates_that_change_are_planned_for(folders: tuple[Path, Path]) -> None:
    deployments = [Deployment((folders[0],), LONG_S, name, rate_per_s=1) for name in "ab"]
    with Engine(deployments) as own:
        end = time.monotonic() + 20
        with Load(own, ("a",), most=8):
            while not any(event["kind"] == "plan" for event in own.events):
                assert time.monotonic() < end, own.status()
                time.sleep(0.05)
        rates = {demand.model: demand.rate_per_s for demand in own.planned.work.demands}
        assert rates["a"] > 10 * rates["b"]
        assert "requests a second, planned for" in own.events[-1]["text"]


def test_a_plan_for_other_models_or_devices_is_refused(engine: Engine) -> None:
    plan = engine.plan_dict()
    with pytest.raises(UserError, match="is no plan"):
        engine.set_plan({"format": 1})
    wide = {**plan, "device": {**plan["device"], "units": 64}}
    with pytest.raises(UserError, match="is a plan for 64 cores, this engine has"):
        engine.set_plan(wide)
    renamed = {**plan, "models": [{**model, "model": "x"} for model in plan["models"][:1]]}
    with pytest.raises(UserError, match="this engine serves batched, single"):
        engine.set_plan(renamed)


@pytest.mark.parametrize(
    ("deploy", "text"),
    [
        (lambda f: [Deployment((f[0],), 1.0), Deployment((f[1],), 1.0)], "given twice"),
        (lambda f: [Deployment((f[0], f[0]), 1.0)], "both have batch size 1"),
        (lambda f: [Deployment((f[0],), 1e-7)], "tiny"),
        (lambda f: [], "no model"),
    ],
)
def test_fleets_that_cannot_be_served(
    folders: tuple[Path, Path], deploy: object, text: str
) -> None:
    with pytest.raises(UserError, match=text):
        Engine(deploy(folders))  # type: ignore[operator]
