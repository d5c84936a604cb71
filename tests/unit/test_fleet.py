"""The fleet with hand-written workers: who is replaced when, who gets which version before its first lease, and when the run ends.

And the doors to remote roles: retries through outages, and what Ray's exceptions become.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray import exceptions
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo

from actors import carrier
from actors.fleet import FleetSpec, RayFleet, RayWorker, RestartPolicy, share_cores, spread, tail
from actors.handles import NodeLost, NoRoom, Unavailable, call, init_infos, mapped, through_outages
from actors.nodes import HeadLost, NodeRecord, NodeView, RayNodes, away_from, one_machine, view_of
from actors.vllm_engine import EngineSpec, engine_arguments, engine_environment, finish_reason, metadata_digest, sampling_arguments
from sgpo_dist.config import PairGateConfig
from sgpo_dist.errors import DataError, EnvironmentProblem, FencedError, RunFailed, SgpoError, WorkerFault
from sgpo_dist.records import Completion, FinishReason, Stage
from sgpo_dist.roles import GenerateRequest, GenerationTask, Sampling, WorkerStats
from sgpo_dist.weights.checksum import checksum_tensors
from sgpo_dist.weights.version import WeightBundle, WeightProof

GREEDY = Sampling(0.0, 1.0, 0, 4)
TASK = GenerationTask(Stage.PREFERENCE, 5, GREEDY, GREEDY, {"default": "improver"})


def bundle(version: int) -> WeightBundle:
    return WeightBundle(version, "shm", "", "node", f"sum{version}", 0, (), ((-1.0,),))


@dataclass
class FakeWorker:
    """Does what it is told, unless ``plan`` has an exception for the call; notes everything in the common diary."""

    worker_id: str
    plan: dict[str, SgpoError]
    diary: list[str]
    pairs: int = 0
    logp: float = -1.0
    held: asyncio.Event | None = None
    node: str = "n1"
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def _do(self, what: str, note: str = "") -> None:
        await asyncio.sleep(0)
        self.diary.append(f"{self.worker_id} {note or what}")
        if what in self.plan:
            raise self.plan[what]

    async def start(self) -> None:
        await self._do("start")

    async def begin(self, task: GenerationTask) -> None:
        await self._do("begin")

    async def end(self) -> None:
        await self._do("end")

    async def receive(self, bundle: WeightBundle) -> WeightProof:
        if self.held is not None:
            await self.held.wait()
        await self._do("receive", f"receive {bundle.version}")
        return WeightProof(self.worker_id, bundle.version, bundle.checksum, ((self.logp,),), 0.0, 0.0)

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        await self._do("generate", f"generate {len(requests)}")
        return [Completion(f"{request.request_id} by {self.worker_id}", (1,), FinishReason.STOP, 0) for request in requests]

    async def heartbeat(self) -> WorkerStats:
        await asyncio.sleep(0)
        if "heartbeat" in self.plan:
            raise self.plan["heartbeat"]
        return WorkerStats(self.worker_id, 0, 0, self.pairs, 0, 0, 0.0, 0)

    async def wait(self) -> None:
        await self.gone.wait()
        raise FAULT

    async def stop(self) -> None:
        if self.held is not None:
            await self.held.wait()
        await self._do("stop")

    def kill(self) -> None:
        self.diary.append(f"{self.worker_id} kill")

    def last_words(self) -> str:
        return "\n    out of luck"


@dataclass
class FakeBuffer:
    diary: list[str]

    async def give_back(self, incarnation: int, worker_id: str, *, crashed: bool = True) -> int:
        self.diary.append(f"{worker_id} gives back for {incarnation}, crashed {crashed}")
        return 0


@dataclass
class SlowToTakeBack(FakeBuffer):
    async def give_back(self, incarnation: int, worker_id: str, *, crashed: bool = True) -> int:
        for _ in range(50):  # long enough for everybody else to look
            await asyncio.sleep(0)
        return await super().give_back(incarnation, worker_id, crashed=crashed)


@dataclass
class World:
    """A fleet whose n-th launched worker follows ``plans[n]`` (or none)."""

    plans: list[dict[str, SgpoError]] = field(default_factory=list)
    max_restarts: int = 3
    diary: list[str] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    workers: list[FakeWorker] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    held: dict[int, asyncio.Event] = field(default_factory=dict)
    view: NodeView = field(default_factory=lambda: NodeView(frozenset({"n1"}), frozenset({"n1"})))
    head: SgpoError | None = None
    avoids: list[tuple[str, ...]] = field(default_factory=list)
    parts: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        spec = FleetSpec(
            engine=EngineSpec("model"),
            template="v1",
            gate=PairGateConfig(),
            concurrency=2,
            lease_s=60.0,
            request_timeout_s=60.0,
            start_timeout_s=60.0,
            heartbeat_timeout_s=60.0,
            receive_timeout_s=60.0,
            max_restarts=self.max_restarts,
            tolerance=0.01,
            log_dir="nowhere",
            attempt=7,
            heartbeat_every_s=2.5,
        )
        buffer = FakeBuffer(self.diary)
        self.fleet = RayFleet(spec, buffer, lambda kind, **fields: self.events.append((kind, fields)), self.launch, self.look, sleep=self.sleep)

    async def look(self) -> NodeView:
        await asyncio.sleep(0)
        if self.head is not None:
            raise self.head
        return self.view

    def launch(self, worker_id: str, index: int, count: int, avoid: tuple[str, ...]) -> FakeWorker:
        self.avoids.append(avoid)
        self.parts.append((index, count))
        number = len(self.workers)
        plan = self.plans[number] if number < len(self.plans) else {}
        self.workers.append(FakeWorker(worker_id, plan, self.diary, held=self.held.get(number)))
        return self.workers[-1]

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0.001 if seconds else 0)

    @property
    def crash_pauses(self) -> list[float]:
        return [pause for pause in self.pauses if pause not in (0.0, 2.5)]


def play(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work, 5)

    asyncio.run(bounded())


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(2):
        while not done():
            await asyncio.sleep(0.001)


FAULT = WorkerFault("rollout-0", "its process died")


# ---- pure decisions ------------------------------------------------------------------------------------------------------------------


def test_pauses_double_up_to_a_minute_and_the_budget_ends() -> None:
    policy = RestartPolicy(max_restarts=8)
    assert [policy.crashed() for _ in range(9)] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, None]
    policy.progressed()
    assert policy.crashed() == 0.0
    assert policy.total == 10
    assert RestartPolicy(max_restarts=0).crashed() is None


@pytest.mark.fault(13, invariants="I6")
def test_workers_that_went_with_their_node_spend_no_budget() -> None:
    policy = RestartPolicy(max_restarts=1)
    assert [policy.lost_node() for _ in range(8)] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]
    assert (policy.crashed(), policy.crashed()) == (0.0, None)
    policy.progressed()
    assert policy.lost_node() == 0.0


def test_a_node_is_avoided_after_three_failures_without_a_pair_and_for_ten_minutes() -> None:
    both, record = frozenset({"a", "b"}), NodeRecord()
    assert [record.failed("a", now) for now in (0.0, 1.0)] == [False, False]
    assert record.avoided(both, 2.0) == ()
    record.progressed("a")
    assert [record.failed("a", now) for now in (3.0, 4.0, 5.0)] == [False, False, True]
    assert record.avoided(both, 604.0) == ("a",)
    assert record.avoided(frozenset({"a"}), 604.0) == ()  # better a bad node than none
    assert record.avoided(both, 605.0) == ()
    assert record.failed("a", 606.0)  # it had its one chance
    record.lost("b", 606.0)
    assert record.avoided(frozenset({"a", "b", "c"}), 607.0) == ("a", "b")


def test_nodes_to_avoid_in_ray_s_words() -> None:
    assert away_from(()) == {}
    assert away_from(("aa",)) == {"ray.io/node-id": "!aa"}
    assert away_from(("aa", "bb")) == {"ray.io/node-id": "!in(aa, bb)"}


def test_ray_s_rows_become_a_view() -> None:
    def row(node: str, alive: bool, **resources: float) -> dict[str, Any]:
        return {"NodeID": node, "Alive": alive, "Resources": resources}

    rows = [row("big", True, CPU=8.0, GPU=1.0), row("small", True, CPU=8.0), row("gone", False)]
    view = view_of(rows, {"big": 1_090_000, "small": 0}, now=1000.0, num_cpus=0.5, num_gpus=1.0)
    assert view == NodeView(frozenset({"big", "small"}), frozenset({"big"}), {"big": 90.0, "small": float("inf")})


def test_a_head_that_does_not_answer_is_an_error_and_later_the_end_of_a_process_that_hangs() -> None:
    said: list[str] = []
    gone = threading.Event()

    def never() -> NodeView:
        gone.wait(5)
        raise exceptions.RaySystemError("gone")

    async def story() -> None:
        with pytest.raises(HeadLost, match=r"has not answered for 0\.15 s; start the cluster again"):
            await RayNodes(never, 0.15, 0.15, said.append)()
        assert said == []
        await until(lambda: bool(said))
        assert said[0].startswith("the Ray cluster's head (GCS) has not answered")
        gone.set()
        view = await one_machine()
        assert await RayNodes(lambda: view, 0.15, 0.15, said.append)() is view
        await asyncio.sleep(0.35)
        assert len(said) == 1  # whoever has an answer is left alone

    play(story())


def test_cores_are_shared_evenly_and_requests_dealt_like_cards() -> None:
    assert [share_cores((0, 1), i, 2) for i in range(2)] == [(0,), (1,)]
    assert [share_cores(range(8), i, 3) for i in range(3)] == [(0, 1), (2, 3, 4), (5, 6, 7)]
    assert share_cores((0, 1), 2, 3) == (0, 1)
    assert spread(5, 2) == [[0, 2, 4], [1, 3]]
    assert spread(1, 2) == [[0], []]


# ---- the fleet -----------------------------------------------------------------------------------------------------------------------


def test_workers_start_side_by_side_and_serve_in_order() -> None:
    async def story() -> None:
        w = World()
        await w.fleet.start(2)
        assert [worker.worker_id for worker in w.workers] == ["rollout-0.7.1", "rollout-1.7.2"]
        requests = [GenerateRequest(f"r{i}", (1,), GREEDY, 0) for i in range(7)]
        texts = [answer.text.split()[0] for answer in await w.fleet.generate(requests)]
        assert texts == [f"r{i}" for i in range(7)]
        rounds = sorted(line for line in w.diary if "generate" in line)  # 4 and 3 requests, 2 at a time
        assert rounds == ["rollout-0.7.1 generate 2", "rollout-0.7.1 generate 2", "rollout-1.7.2 generate 1", "rollout-1.7.2 generate 2"]
        await w.fleet.stop()
        assert sorted(w.diary[-4:]) == ["rollout-0.7.1 kill", "rollout-0.7.1 stop", "rollout-1.7.2 kill", "rollout-1.7.2 stop"]

    play(story())


@pytest.mark.fault(1, invariants="I6")
def test_a_process_that_ends_is_replaced_before_any_heartbeat_misses_it() -> None:
    async def story() -> None:
        w = World()
        await w.fleet.start(1)
        await w.fleet.begin(TASK)
        w.workers[0].gone.set()
        await until(lambda: "rollout-0.7.2 begin" in w.diary)
        assert w.pauses == [0.0, 0.0]  # two starts, no heartbeat
        w.workers[1].gone.set()
        await until(lambda: "rollout-0.7.3 begin" in w.diary)
        assert w.pauses == [0.0, 0.0, 1.0]
        events = len(w.events)
        await w.fleet.stop()
        w.workers[2].gone.set()
        await asyncio.sleep(0.01)
        assert len(w.events) == events

    play(story())


@pytest.mark.fault(1, invariants="I3 I6")
def test_a_lost_worker_s_leases_return_and_its_successor_has_the_version_before_the_task() -> None:
    async def story() -> None:
        w = World()
        await w.fleet.start(1)
        await w.fleet.publish(bundle(3))
        await w.fleet.begin(TASK)
        watching = asyncio.create_task(w.fleet.supervise())
        w.workers[0].plan["heartbeat"] = FAULT
        await until(lambda: "rollout-0.7.2 begin" in w.diary)
        after = w.diary[w.diary.index("rollout-0.7.1 kill") :]
        assert after == [
            "rollout-0.7.1 kill",
            "rollout-0.7.1 gives back for 5, crashed True",
            "rollout-0.7.2 start",
            "rollout-0.7.2 receive 3",
            "rollout-0.7.2 begin",
        ]
        assert w.crash_pauses == []
        assert [kind for kind, _ in w.events] == ["worker_started", "worker_lost", "worker_started"]
        assert w.events[1][1] == {"worker": "rollout-0.7.1", "node": "n1", "reason": "its process died", "log": "out of luck"}
        watching.cancel()

    play(story())


@pytest.mark.fault(19, invariants="I3")
def test_a_worker_that_cannot_prove_a_version_is_rebuilt_and_the_others_proofs_count() -> None:
    async def story() -> None:
        w = World()
        await w.fleet.start(2)
        w.workers[1].logp = -1.5
        proofs = await w.fleet.publish(bundle(1))
        assert [proof.worker_id for proof in proofs] == ["rollout-0.7.1"]
        assert "rollout-1.7.2 kill" in w.diary
        await until(lambda: "rollout-1.7.3 receive 1" in w.diary)

    play(story())


@pytest.mark.fault(5, invariants="I3")
def test_when_nobody_proves_a_version_the_first_rebuilt_worker_is_waited_for() -> None:
    async def story() -> None:
        w = World()
        await w.fleet.start(1)
        w.workers[0].plan["receive"] = FAULT
        proofs = await w.fleet.publish(bundle(2))
        assert [(proof.worker_id, proof.version) for proof in proofs] == [("rollout-0.7.2", 2)]

    play(story())


def test_a_version_that_meets_the_only_worker_s_replacement_waits_for_its_successor() -> None:
    """Its heartbeat failed, its leases are on their way back, and the kill has just ended its ``receive``: somebody is being started."""

    async def story() -> None:
        w = World()
        slow = SlowToTakeBack(w.diary)
        w.fleet._buffer = slow
        await w.fleet.start(1)
        await w.fleet.begin(TASK)
        worker, killed = w.workers[0], asyncio.Event()

        async def receive(_: WeightBundle) -> WeightProof:
            await killed.wait()
            raise FAULT

        worker.receive, worker.kill = receive, killed.set  # type: ignore[method-assign]
        worker.plan["heartbeat"] = FAULT
        watch = asyncio.create_task(w.fleet.supervise())
        proofs = await w.fleet.publish(bundle(2))
        assert [(proof.worker_id, proof.version) for proof in proofs] == [("rollout-0.7.2", 2)]
        watch.cancel()

    play(story())


def test_a_version_published_while_a_worker_starts_is_the_one_it_gets_live_with() -> None:
    async def story() -> None:
        w = World()
        await w.fleet.start(1)
        await w.fleet.publish(bundle(1))
        held = w.held[1] = asyncio.Event()
        await w.fleet.scale(2)
        await until(lambda: "rollout-1.7.2 start" in w.diary)
        await w.fleet.begin(TASK)
        assert [proof.worker_id for proof in await w.fleet.publish(bundle(2))] == ["rollout-0.7.1"]
        held.set()
        await until(lambda: "rollout-1.7.2 begin" in w.diary)
        mine = [line.removeprefix("rollout-1.7.2 ") for line in w.diary if line.startswith("rollout-1.7.2")]
        assert mine == ["start", "receive 1", "receive 2", "begin"]

    play(story())


@pytest.mark.fault(5, invariants="I9")
def test_a_crash_loop_ends_the_run_with_the_log_s_last_lines() -> None:
    async def story() -> None:
        w = World([{"start": FAULT} for _ in range(9)], max_restarts=3)
        with pytest.raises(RunFailed) as caught:
            await w.fleet.start(1)
        assert str(caught.value) == (
            "rollout workers crashed 4 times without making a pair; the last was rollout-0.7.4: its process died\n    out of luck"
        )
        assert w.crash_pauses == [1.0, 2.0]

    play(story())


def test_a_pair_in_between_starts_the_count_afresh() -> None:
    async def story() -> None:
        w = World(max_restarts=1)
        await w.fleet.start(1)
        watching = asyncio.create_task(w.fleet.supervise())
        for life in range(3):
            await until(lambda life=life: len(w.workers) > life and bool(w.fleet._live))
            w.workers[life].pairs = 1
            pauses = len(w.pauses)
            await until(lambda pauses=pauses: len(w.pauses) > pauses + 4)  # a heartbeat has seen the pair
            w.workers[life].plan["heartbeat"] = FAULT
        await until(lambda: len(w.workers) == 4)
        assert w.crash_pauses == []  # a second crash in a row would have been paused for
        assert not watching.done()
        watching.cancel()

    play(story())


def test_what_the_machine_lacks_at_the_first_start_is_said_at_once() -> None:
    async def story() -> None:
        w = World([{"start": EnvironmentProblem("vLLM did not start: too little memory")}])
        with pytest.raises(EnvironmentProblem, match="too little memory"):
            await w.fleet.start(1)
        assert w.diary[-1] == "rollout-0.7.1 kill"

    play(story())


def test_bad_data_ends_supervision_and_replaces_nobody() -> None:
    async def story() -> None:
        w = World()
        await w.fleet.start(1)
        w.workers[0].plan["heartbeat"] = DataError("row 3 is malformed")
        with pytest.raises(DataError):
            await w.fleet.supervise()
        assert len(w.workers) == 1

    play(story())


def test_requests_of_a_lost_worker_are_asked_of_the_others() -> None:
    async def story() -> None:
        w = World()
        await w.fleet.start(2)
        w.workers[0].plan["generate"] = FAULT
        answers = await w.fleet.generate([GenerateRequest(f"r{i}", (1,), GREEDY, 0) for i in range(4)])
        assert [answer.text.split()[0] for answer in answers] == ["r0", "r1", "r2", "r3"]
        assert not any("rollout-0.7.1" in answer.text for answer in answers)

    play(story())


@pytest.mark.fault(16, invariants="I6")
def test_end_reaches_everyone_and_scale_dismisses_the_last() -> None:
    async def story() -> None:
        w = World()
        await w.fleet.start(2)
        await w.fleet.begin(TASK)
        await w.fleet.end()
        assert [line for line in w.diary if line.endswith(" end")] == ["rollout-0.7.1 end", "rollout-1.7.2 end"]
        w.workers[1].plan["stop"] = FAULT
        await w.fleet.scale(1)
        assert w.diary[-2:] == ["rollout-1.7.2 stop", "rollout-1.7.2 kill"]
        await w.fleet.begin(TASK)
        assert w.diary[-1] == "rollout-0.7.1 begin"

    play(story())


# ---- nodes that go, drain and are bad -------------------------------------------------------------------------------------------------


@pytest.mark.fault(13, invariants="I6")
def test_a_worker_that_went_with_its_node_is_no_crash_and_its_prompts_are_not_to_blame() -> None:
    async def story() -> None:
        w = World(max_restarts=0, view=NodeView(frozenset({"n1", "n2"}), frozenset({"n1", "n2"})))
        await w.fleet.start(1)
        await w.fleet.begin(TASK)
        w.workers[0].plan["heartbeat"] = NodeLost("rollout-0.7.1", "its node died")
        watching = asyncio.create_task(w.fleet.supervise())
        await until(lambda: "rollout-0.7.2 begin" in w.diary)
        assert "rollout-0.7.1 gives back for 5, crashed False" in w.diary
        assert w.avoids == [(), ("n1",)]
        assert w.crash_pauses == []
        assert not watching.done()
        watching.cancel()

    play(story())


@pytest.mark.fault(14, invariants="I6")
def test_a_worker_on_a_draining_node_leaves_in_good_order_and_is_replaced_at_once() -> None:
    async def story() -> None:
        w = World(max_restarts=0)
        await w.fleet.start(2)
        await w.fleet.begin(TASK)
        w.workers[1].node = "n2"
        watching = asyncio.create_task(w.fleet.supervise())
        w.view = NodeView(frozenset({"n1", "n2"}), frozenset({"n1"}), {"n2": 90.0, "n3": 5.0})
        await until(lambda: "rollout-1.7.3 begin" in w.diary and "rollout-1.7.2 kill" in w.diary)
        leaver = [line.removeprefix("rollout-1.7.2 ") for line in w.diary if line.startswith("rollout-1.7.2")]
        assert leaver == ["start", "begin", "stop", "kill"]
        assert ("worker_leaves", {"worker": "rollout-1.7.2", "node": "n2", "seconds_left": 90.0}) in w.events
        assert not any(kind == "worker_lost" for kind, _ in w.events)
        assert w.crash_pauses == []
        assert len(w.workers) == 3  # the other one stays where it is
        assert w.parts == [(0, 2), (1, 2), (0, 1)]  # on a cluster of two machines nobody shares cores
        watching.cancel()

    play(story())


@pytest.mark.fault(14, invariants="I6")
def test_a_worker_that_does_not_leave_in_time_is_ended_before_the_node_is() -> None:
    async def story() -> None:
        w = World(max_restarts=0)
        await w.fleet.start(1)
        await w.fleet.begin(TASK)
        w.workers[0].node, w.workers[0].held = "n2", asyncio.Event()
        watching = asyncio.create_task(w.fleet.supervise())
        w.view = NodeView(frozenset({"n1", "n2"}), frozenset({"n1"}), {"n2": 2.01})  # 0.01 s, after the margin of 2
        await until(lambda: "rollout-0.7.1 kill" in w.diary)
        assert "rollout-0.7.1 gives back for 5, crashed False" in w.diary
        assert "rollout-0.7.1 stop" not in w.diary
        assert [fields["reason"] for kind, fields in w.events if kind == "worker_lost"] == ["while leaving its node: too late"]
        watching.cancel()

    play(story())


def test_a_node_where_three_workers_in_a_row_crashed_is_avoided_once_another_can_hold_them() -> None:
    async def story() -> None:
        w = World([{"start": FAULT} for _ in range(3)], max_restarts=10, view=NodeView(frozenset({"n1", "n2"}), frozenset({"n1", "n2"})))
        await w.fleet.start(1)
        assert w.avoids == [(), (), (), ("n1",)]
        assert ("node_avoided", {"node": "n1", "failures": 3, "seconds": 600.0}) in w.events

        w = World([{"start": FAULT}, {"start": FAULT}], max_restarts=10, view=w.view)
        await w.fleet.start(1)
        watching = asyncio.create_task(w.fleet.supervise())
        w.workers[2].pairs = 1
        pauses = len(w.pauses)
        await until(lambda: len(w.pauses) > pauses + 4)  # a heartbeat has seen the pair
        w.workers[2].plan["heartbeat"] = FAULT
        await until(lambda: len(w.workers) == 4)
        assert w.avoids == [(), (), (), ()]  # a pair was made there
        watching.cancel()

    play(story())


def test_no_room_is_waited_out_while_somebody_works_and_ends_a_run_that_has_nobody() -> None:
    no_room = NoRoom("no node had room for rollout-1")

    async def story() -> None:
        w = World(max_restarts=0)
        await w.fleet.start(1)
        w.plans = [{}, {"start": no_room}, {"start": no_room}]
        await w.fleet.scale(2)
        await until(lambda: len(w.fleet._live) == 2)  # the third one found room
        assert len(w.workers) == 4
        assert w.crash_pauses == []
        assert [kind for kind, _ in w.events] == ["worker_started", "worker_waits", "worker_waits", "worker_started"]

        w = World([{}, {"start": no_room}], max_restarts=0)
        with pytest.raises(EnvironmentProblem, match="no node had room"):
            await w.fleet.start(2)  # two were asked for and there is room for one

        w = World([{}, {"start": no_room}], max_restarts=0)
        await w.fleet.start(1)
        w.workers[0].plan["heartbeat"] = NodeLost("rollout-0", "its node died")
        with pytest.raises(EnvironmentProblem, match="no node had room"):
            await w.fleet.supervise()

    play(story())


@pytest.mark.fault(15, invariants="I9")
def test_a_lost_head_ends_supervision_though_a_heartbeat_hangs() -> None:
    async def story() -> None:
        w = World()
        await w.fleet.start(1)

        async def never() -> WorkerStats:
            await asyncio.Event().wait()
            raise AssertionError

        w.workers[0].heartbeat = never  # type: ignore[method-assign]
        w.head = HeadLost("the head has not answered")
        with pytest.raises(EnvironmentProblem, match="the head has not answered"):
            await w.fleet.supervise()
        await w.fleet.stop()
        assert w.diary[-2:] == ["rollout-0.7.1 start", "rollout-0.7.1 kill"]  # for a good order there is no time

    play(story())


# ---- remote roles --------------------------------------------------------------------------------------------------------------------


@dataclass
class Outages:
    """Fails ``left`` times before it answers; its clock moves only by sleeping."""

    left: int
    now: float = 0.0
    sleeps: list[float] = field(default_factory=list)

    async def attempt(self) -> str:
        if self.left:
            self.left -= 1
            raise Unavailable("pair buffer", "away for a moment")
        return "here"

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(round(seconds, 3))
        self.now += seconds

    def run(self, outage_s: float) -> str:
        return asyncio.run(through_outages(self.attempt, outage_s, clock=lambda: self.now, sleep=self.sleep, jitter=lambda: 0.5))


def test_an_outage_is_waited_out_with_growing_pauses() -> None:
    outages = Outages(8)
    assert outages.run(120.0) == "here"
    assert outages.sleeps == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_an_outage_that_does_not_end_is_a_fault() -> None:
    outages = Outages(10**6)
    with pytest.raises(WorkerFault, match="away for more than 10 s"):
        outages.run(10.0)
    assert 5.0 < outages.now <= 10.0


@pytest.mark.fault(22, invariants="I9")
def test_rays_exceptions_become_ours_and_ours_come_back_as_they_were() -> None:
    fenced = FencedError("incarnation 1 is fenced off")
    wrapped = exceptions.RayTaskError("put", "traceback", fenced)
    assert mapped(wrapped, "pair buffer") is fenced
    fault = WorkerFault("engine", "gone")
    assert mapped(exceptions.RayTaskError("generate", "traceback", fault), "rollout-0") is fault
    bug = mapped(exceptions.RayTaskError("put", "traceback", KeyError("x")), "rollout-0")
    assert str(bug) == "rollout-0: KeyError: 'x'"
    assert isinstance(mapped(exceptions.ActorUnavailableError("gone", None), "b"), Unavailable)
    died = mapped(exceptions.ActorDiedError(), "rollout-0")
    assert (type(died), str(died)) == (WorkerFault, "rollout-0: its process died")
    assert "ran out of memory" in str(mapped(exceptions.OutOfMemoryError("oom"), "rollout-0"))


def test_a_node_s_end_is_told_from_its_actor_s() -> None:
    died = ActorDiedErrorContext(actor_id=b"0" * 16, error_message="The actor died because its node has died. Node Id: 1f")
    killed = ActorDiedErrorContext(actor_id=b"0" * 16, error_message="The actor is dead because its worker process has died.")
    drained = ActorDiedErrorContext(actor_id=b"0" * 16, node_death_info=NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED))
    reasons = [str(mapped(exceptions.ActorDiedError(context), "w")) for context in (died, killed, drained)]
    assert reasons == ["w: its node died", "w: its process died", "w: its node was drained and is gone"]
    lost = [mapped(exceptions.ActorDiedError(context), "w") for context in (died, drained)]
    lost += [mapped(exceptions.NodeDiedError("gone"), "w"), mapped(exceptions.ObjectLostError("1f", None, ""), "w")]
    assert [type(one) for one in lost] == [NodeLost] * 4
    assert type(mapped(exceptions.ActorDiedError(killed), "w")) is WorkerFault
    assert type(mapped(exceptions.OwnerDiedError("1f", None, ""), "w")) is WorkerFault


def test_a_call_has_a_deadline() -> None:
    async def late() -> None:
        await asyncio.sleep(5)

    with pytest.raises(WorkerFault, match=r"rollout-0: no answer within 0\.01 s"):
        asyncio.run(call(late(), "rollout-0", 0.01))


class Made:
    """In the place of the task that makes payloads, and of an actor that takes none."""

    def __init__(self) -> None:
        self.payloads = 0
        self.refused: list[object] = []
        self.receive = SimpleNamespace(remote=self.refuse)

    def options(self, **_: object) -> SimpleNamespace:
        return SimpleNamespace(remote=self.make)

    def make(self, uri: str, held: str) -> str:
        assert held == ""
        self.payloads += 1
        return f"{uri}, made {self.payloads} times"

    async def refuse(self, bundle: WeightBundle, payload: object) -> None:
        self.refused.append(payload)
        raise WorkerFault("rollout-0", f"could not read {bundle.uri}")


def test_a_payload_that_a_worker_could_not_take_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made()
    monkeypatch.setattr(carrier, "_READ", made)
    newest = replace(bundle(1), uri="v1", node_id="a" * 56)
    worker = RayWorker("rollout-0", made, cast("Any", SimpleNamespace(receive_timeout_s=5.0)), carrier.Carrier(), node="another")
    for _ in range(2):
        with pytest.raises(WorkerFault, match="could not read v1"):
            asyncio.run(worker.receive(newest))
    assert made.refused == ["v1, made 1 times", "v1, made 2 times"]


def test_nccl_ranks_of_the_engines_follow_one_another() -> None:
    info = {"master_address": "a", "rank_offset": 1, "world_size": 7}
    assert [one["rank_offset"] for one in init_infos(info, engines=3, gpus_per_engine=2)] == [1, 3, 5]
    assert init_infos({"packed": True}, 2, 2) == [{"packed": True}, {"packed": True}]


# ---- what vLLM is told ---------------------------------------------------------------------------------------------------------------


def test_a_cpu_engine_uses_the_cores_it_was_given_and_never_cuts_prefills(tmp_path: Path) -> None:
    spec = EngineSpec(str(tmp_path), cpu_cores=(0, 1), kv_cache_gib=0.5, max_model_len=4096, engine_kwargs={"block_size": 64, "seed": 9})
    environment = engine_environment(spec)
    assert (environment["VLLM_CPU_OMP_THREADS_BIND"], environment["OMP_NUM_THREADS"], environment["HF_HUB_OFFLINE"]) == ("0,1", "2", "1")
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in environment
    arguments = engine_arguments(spec)
    assert (arguments["enforce_eager"], arguments["enable_chunked_prefill"], arguments["max_num_batched_tokens"]) == (True, False, 4096)
    assert (arguments["kv_cache_memory_bytes"], arguments["block_size"], arguments["seed"]) == (1 << 29, 64, 9)
    on_gpu = engine_arguments(EngineSpec("hub/name", device="cuda", gpu_memory_utilization=0.7))
    assert on_gpu["gpu_memory_utilization"] == 0.7
    assert not {"enforce_eager", "kv_cache_memory_bytes", "enable_chunked_prefill"} & on_gpu.keys()
    assert "VLLM_CPU_OMP_THREADS_BIND" not in engine_environment(EngineSpec("hub/name", device="cuda"))


def test_huge_pages_are_asked_for_beside_the_users_own_tunables(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"": "glibc.malloc.hugetlb=1", "glibc.malloc.check=1": "glibc.malloc.check=1:glibc.malloc.hugetlb=1", "glibc.malloc.hugetlb=0": None}
    for own, expected in asked.items():
        monkeypatch.setenv("GLIBC_TUNABLES", own)
        assert engine_environment(EngineSpec("name", cpu_cores=(0,)))["GLIBC_TUNABLES"] == (expected or own)


def test_sampling_and_finish_reasons_in_vllm_s_words() -> None:
    assert sampling_arguments(Sampling(0.7, 0.9, 5, 12), 3, (7,)) == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "max_tokens": 12,
        "seed": 3,
        "stop_token_ids": [7],
        "skip_special_tokens": True,
    }
    assert [finish_reason(name) for name in ("stop", "length", "abort", None)] == ["stop", "length", "abort", "abort"]


def test_device_weights_are_digested_by_name_type_and_shape() -> None:
    info = {"names": ["b", "a"], "dtype_names": ["float32", "bfloat16"], "shapes": [[2], [3, 4]]}
    assert metadata_digest(info) == checksum_tensors([("a", "BF16", (3, 4), b""), ("b", "F32", (2,), b"")])
    assert metadata_digest({**info, "shapes": [[2], [4, 3]]}) != metadata_digest(info)


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    log.write_text("".join(f"line {i}\n" for i in range(30)))
    assert tail(log, 2) == "\n    line 28\n    line 29"
    assert tail(tmp_path / "none") == ""
