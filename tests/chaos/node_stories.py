"""Stories of nodes that go, drain, die and come, each told in a process of its own: ``python node_stories.py STORY FOLDER``.

A Ray cluster of several raylets on this machine, the real fleet with its real Ray adapter and the real buffer; only the engine is
scripted, so that a worker starts in a moment. What was seen lies in ``FOLDER/seen.json``. Called by test_nodes.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.fleet import FleetSpec, RayFleet, RayLauncher, RolloutActor
from actors.handles import RemoteBuffer
from actors.nodes import RayNodes, look_at_ray
from actors.rollout import RolloutSettings, RolloutWorker, leave
from actors.vllm_engine import EngineSpec
from sgpo_dist.buffer.service import PairBuffer
from sgpo_dist.config import PairGateConfig
from sgpo_dist.errors import EnvironmentProblem
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Stage
from sgpo_dist.roles import GenerateRequest, GenerationTask, Sampling, StagePlan
from sgpo_dist.weights.version import WeightBundle, WeightProof

HOW = Sampling(0.0, 1.0, 0, 8)
ANSWER_S = 0.2
HUNGRY = "SGPO_TEST_HUNGRY"
"""On a node with this in its environment, a file's path, the first worker takes memory without end as soon as it generates."""


class ScriptedEngine:
    """Answers every request after ``ANSWER_S``, with the version it was last given."""

    def __init__(self) -> None:
        self.version = -1
        self._held: list[bytearray] = []
        self._is_hungry = False

    async def start(self) -> None:
        flag = Path(os.environ.get(HUNGRY, "/"))
        if not flag.exists():
            flag.touch()
            self._is_hungry = True

    async def generate(self, request: GenerateRequest) -> Completion:
        if self._is_hungry:
            self._held.append(bytearray(b"x" * (64 << 20)))
        await asyncio.sleep(ANSWER_S)
        return Completion(f"text {request.seed}", (1, 2, 3), FinishReason.STOP, self.version)

    async def receive(self, bundle: WeightBundle) -> WeightProof:
        self.version = bundle.version
        return WeightProof("w", bundle.version, bundle.checksum, ((-1.0,),), 0.0, 0.0)

    async def logps(self, rows: Sequence[Any]) -> tuple[tuple[float, ...], ...]:
        return tuple((-1.0,) for _ in rows)

    async def pids(self) -> list[int]:
        return []

    async def check(self) -> None: ...

    async def stop(self) -> None: ...


class Words:
    """A prompt book of one token a character."""

    improver_template = "v1"

    def policy_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(range(len(prompt.text)))

    def improver_ids(self, prompt: Prompt, draft: str) -> tuple[int, ...]:
        return tuple(range(len(prompt.text) + len(draft)))

    def unwrapped(self, refinement: Completion, draft: str) -> Completion:
        return refinement


def pair(lease: Any, prompt_ids: tuple[int, ...], response: Completion, refinement: Completion | None, template: str) -> PreferencePair:
    assert refinement is not None
    return PreferencePair(lease.uid, lease.stage, lease.prompt, prompt_ids, response, refinement, template)


class ScriptedActor(RolloutActor):
    """``RolloutActor`` around the scripted engine."""

    def _assemble(self) -> None:
        fleet = self._spec.fleet
        settings = RolloutSettings(self._spec.worker_id, 1024, fleet.tolerance, fleet.concurrency, fleet.lease_s)
        self._engine = ScriptedEngine()  # type: ignore[assignment]
        self._worker = RolloutWorker(settings, self._engine, self._buffer, Words(), pair, leave)  # type: ignore[arg-type]


@dataclass
class World:
    """A cluster whose head holds the driver and the buffer only, and a fleet on its other nodes."""

    folder: Path
    cluster: Cluster
    max_restarts: int = 0
    prompts: int = 4000
    events: list[dict[str, Any]] = field(default_factory=list)
    marks: dict[str, float] = field(default_factory=dict)

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, "at": time.monotonic(), **fields})

    def add_node(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=80 << 20)

    def mark(self, name: str) -> None:
        self.marks[name] = time.monotonic()

    def seen(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    async def open(self, workers: int, start_timeout_s: float = 30.0) -> None:
        """The buffer with its prompts, and ``workers`` on the task."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": 1000, "scheduling_strategy": here}
        self.handle = ray.remote(PairBuffer).options(**options).remote(str(self.folder / "buffer.db"))
        self.buffer = RemoteBuffer(self.handle)
        self.incarnation = await self.buffer.begin_incarnation()
        spec = FleetSpec(
            engine=EngineSpec("scripted"),
            template="v1",
            gate=PairGateConfig(),
            concurrency=4,
            lease_s=600.0,  # whatever comes back was given back, not expired
            request_timeout_s=60.0,
            start_timeout_s=start_timeout_s,
            heartbeat_timeout_s=20.0,
            receive_timeout_s=20.0,
            max_restarts=self.max_restarts,
            tolerance=0.01,
            log_dir=str(self.folder / "logs"),
            num_cpus=0.6,  # one on a node
            heartbeat_every_s=0.5,
        )
        nodes = RayNodes(partial(look_at_ray, spec.num_cpus, spec.num_gpus))
        self.fleet = RayFleet(spec, self.buffer, self.event, RayLauncher(spec, self.handle, ScriptedActor), nodes)
        await self.fleet.start(workers)
        await self.fleet.publish(WeightBundle(0, "shm", "", "node", "sum", 0, (), ((-1.0,),)))
        questions = tuple(Prompt(f"q{i}", (Message("user", f"question {i}"),)) for i in range(self.prompts))
        plan = StagePlan(Stage.PREFERENCE, run_seed=1, batch_size=4, max_staleness=None, lease_s=600.0)
        await self.buffer.open_stage(self.incarnation, plan, questions, 0)
        await self.fleet.begin(GenerationTask(Stage.PREFERENCE, self.incarnation, HOW, HOW, {"default": "improver"}))
        self.watching = asyncio.ensure_future(self.fleet.supervise())
        await self.until(lambda: self.pairs_beyond(3))

    async def until(self, done: Callable[[], Awaitable[bool]], seconds: float = 30.0) -> None:
        async with asyncio.timeout(seconds):
            while not await done():
                if self.watching.done():
                    self.watching.result()
                await asyncio.sleep(0.05)

    async def pairs_beyond(self, count: int) -> bool:
        return await self.pairs() > count

    async def pairs(self) -> int:
        counts = await self.buffer.counts(Stage.PREFERENCE)
        return counts.ready

    async def started(self, count: int) -> bool:
        return len(self.seen("worker_started")) >= count

    async def noticed(self) -> bool:
        return bool(self.seen("worker_lost"))

    async def rate(self, seconds: float = 3.0) -> float:
        """Pairs a second."""
        before, began = await self.pairs(), time.monotonic()
        await asyncio.sleep(seconds)
        return (await self.pairs() - before) / (time.monotonic() - began)

    async def close(self) -> dict[str, Any]:
        await self.fleet.end()
        counts = await self.buffer.counts(Stage.PREFERENCE)
        self.watching.cancel()
        await self.fleet.stop()
        ray.kill(self.handle)
        return {
            "events": self.events,
            "marks": self.marks,
            "crashes": self.fleet._policy.total,
            "leased": counts.leased,
            "ready": counts.ready,
        }


# ---- the stories -------------------------------------------------------------------------------------------------------------------


async def a_node_is_lost(world: World) -> dict[str, Any]:
    """Row 13. Two workers on two nodes; one node dies, the other goes on; a new node comes and the second worker is back."""
    lost = world.add_node()
    await world.open(1)
    world.add_node()
    await world.fleet.scale(2)
    await world.until(lambda: world.started(2))
    world.mark("fault")
    world.cluster.remove_node(lost, allow_graceful=False)
    world.mark("killed")

    await world.until(world.noticed)
    before = await world.pairs()
    await world.until(lambda: world.pairs_beyond(before + 10))
    world.mark("went on")
    world.add_node()
    world.mark("room")
    await world.until(lambda: world.started(3))
    return {"lost": lost._node_id, **await world.close()}


async def a_node_is_drained(world: World) -> dict[str, Any]:
    """Row 14. The only worker's node is drained with a deadline; the worker moves to another node before it, and gives back what it held."""
    going = world.add_node()
    await world.open(1)
    other = world.add_node()
    client = ray._raylet.GcsClient(address=world.cluster.address)
    deadline = time.time() + 12.0
    world.mark("fault")
    accepted, _ = client.drain_node(going._node_id, DRAIN_NODE_REASON_PREEMPTION, "spot", int(deadline * 1000))
    assert accepted
    await world.until(lambda: world.started(2))
    before = await world.pairs()
    await world.until(lambda: world.pairs_beyond(before + 4))
    world.mark("went on")

    async def is_gone() -> bool:
        return not any("ScriptedActor" in " ".join(child.cmdline()) for child in raylet_children(going))

    await world.until(is_gone)
    world.mark("gone")
    early = deadline - time.time()
    world.cluster.remove_node(going, allow_graceful=False)
    await asyncio.sleep(2.0)
    return {"going": going._node_id, "other": other._node_id, "early": early, **await world.close()}


async def nodes_come_and_go(world: World) -> dict[str, Any]:
    """Row 16. One worker; a second and third place is asked for and waits for nodes; they come; then one leaves in good order."""
    world.add_node()
    await world.open(1)
    one = await world.rate()
    await world.fleet.scale(2)
    await asyncio.sleep(1.0)
    waiting = len(world.seen("worker_started"))
    second = world.add_node()
    world.mark("fault")
    await world.until(lambda: world.started(2))
    two = await world.rate()
    world.cluster.remove_node(second, allow_graceful=False)

    await world.until(world.noticed)
    again = await world.rate()
    return {"second": second._node_id, "one": one, "two": two, "again": again, "waiting": waiting, **await world.close()}


async def memory_runs_out(world: World) -> dict[str, Any]:
    """Row 22. Ray kills a worker that takes more memory than its node may use; its successor asks for less."""
    world.max_restarts = 3
    memory = psutil.virtual_memory()
    used = 1 - memory.available / memory.total
    tight = {"RAY_memory_usage_threshold": str(used + (3 << 29) / memory.total), "RAY_memory_monitor_refresh_ms": "100"}
    tight[HUNGRY] = str(world.folder / "was hungry")
    os.environ.update(tight)
    world.add_node()
    for name in tight:
        del os.environ[name]
    world.mark("fault")
    await world.open(1)

    await world.until(lambda: world.started(2))
    before = await world.pairs()
    await world.until(lambda: world.pairs_beyond(before + 4))
    return await world.close()


async def the_head_is_lost(world: World) -> dict[str, Any]:
    """Row 15, the driver's part. Head and driver's raylet are killed: supervision ends with one error, and tidying up ends too."""
    world.add_node()
    await world.open(1)
    world.mark("fault")
    for kind in ("gcs_server", "raylet"):
        for info in world.cluster.head_node.all_processes[kind]:
            info.process.kill()
    said = ""
    try:
        async with asyncio.timeout(55):
            await world.watching
    except EnvironmentProblem as problem:
        said = str(problem)
    world.mark("said")
    await world.fleet.stop()
    world.mark("fleet stopped")
    blocked = {name: blocks(work) for name, work in (("kill", partial(ray.kill, world.handle)), ("shutdown", ray.shutdown))}
    seen = {"said": said, "events": world.events, "marks": world.marks, "blocked": blocked}
    (world.folder / "seen.json").write_text(json.dumps(seen))
    world.cluster.shutdown()
    os._exit(0)  # what blocks would hold this process until Ray ends it


def blocks(work: Callable[[], None], seconds: float = 6.0) -> bool:
    """Whether it takes longer than that."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return thread.is_alive()


def raylet_children(node: Any) -> list[psutil.Process]:
    """The worker processes of a node."""
    raylet = next(iter(node.all_processes["raylet"])).process
    if not psutil.pid_exists(raylet.pid):
        return []  # Ray ends a drained node as soon as nothing runs there
    return [child for child in psutil.Process(raylet.pid).children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


STORIES = {story.__name__: story for story in (a_node_is_lost, a_node_is_drained, nodes_come_and_go, memory_runs_out, the_head_is_lost)}


def main(name: str, folder: Path) -> None:
    """Tell one story."""
    cluster = Cluster()
    cluster.add_node(num_cpus=0, include_dashboard=False, object_store_memory=80 << 20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    seen: dict[str, Any] = {}
    began = time.monotonic()
    try:
        seen = asyncio.run(STORIES[name](World(folder, cluster)))
        began = time.monotonic()
    finally:
        ray.shutdown()
        (folder / "seen.json").write_text(json.dumps({**seen, "shutdown_s": time.monotonic() - began}))
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
