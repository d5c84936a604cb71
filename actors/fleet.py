"""The fleet: all rollout workers as one, supervised, replaceable, and on the current version before they lease.

The driver holds one ``RayFleet`` (``roles.Fleet``). Each worker is a Ray actor with an engine of its own; a worker that dies, hangs, or
fails to prove a version is killed, its leases go back, and a fresh one takes its place after a pause. A worker whose node is about to be
taken away leaves in good order and is replaced elsewhere; one that went with its node is no crash. What a worker does is ``rollout``'s
business; how actors are reached, ``handles``'; what is known of nodes, ``nodes``'. Decisions about restarts are pure (``RestartPolicy``).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil
import ray

from actors.carrier import Carrier, LocalCopy, Payload
from actors.draft_pointer import Frame
from actors.handles import NoAnswer, NodeLost, NoRoom, RemoteBuffer, Unavailable, WeightClient, call
from actors.nodes import HeadLost, NodeRecord, NodeView, RayNodes, away_from, look_at_ray, one_machine
from actors.rollout import RolloutSettings, RolloutWorker, leave
from actors.vllm_engine import ROLE as ENGINE
from actors.vllm_engine import EngineSpec, VllmEngine, engine_environment
from sgpo_dist.config import PairGateConfig
from sgpo_dist.errors import EnvironmentProblem, RunFailed, SgpoError, WeightSyncError, WorkerFault
from sgpo_dist.pair_gate import make_outcome
from sgpo_dist.processes import kill_exactly, note_segments, one_ends, remove_segments, telling_line
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.records import Completion, Outcome
from sgpo_dist.roles import Buffer, GenerateRequest, GenerationTask, Lease, WorkerStats
from sgpo_dist.weights.version import WeightBundle, WeightProof, check_proof

OnEvent = Callable[..., None]

HEARTBEAT_EVERY_S = 2.0
STEADY_S = 60.0
"""Deadline of a call that only changes a worker's mind (begin, end)."""
STOP_S = 40.0
VERDICT_S = 10.0
LEAVE_MARGIN_S = 2.0
"""A worker on a draining node is gone so long before the node's deadline."""
TAIL_LINES = 15


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """What the fleet makes its workers from, and how patient it is. All times in seconds; ``tolerance`` in nats.

    ``request_timeout_s`` bounds the silence of an engine that has requests; ``receive_timeout_s`` the taking and proving of a version.
    ``attempt`` names this driver's logs apart from an earlier one's. ``num_cpus`` and ``num_gpus`` are what Ray reserves for one worker.
    """

    engine: EngineSpec
    template: str
    gate: PairGateConfig
    concurrency: int
    lease_s: float
    request_timeout_s: float
    start_timeout_s: float
    heartbeat_timeout_s: float
    receive_timeout_s: float
    max_restarts: int
    tolerance: float
    log_dir: str
    attempt: int = 1
    num_cpus: float = 0.5
    num_gpus: float = 0.0
    generate_timeout_s: float = 1800.0
    heartbeat_every_s: float = HEARTBEAT_EVERY_S


# ---- restarts: when, and when no more --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class RestartPolicy:
    """Counts crashes of the fleet's workers since the last pair any of them made.

    The first crash is answered at once, the next with a pause of ``base_s``, doubled with each crash after it, at most ``cap_s``; more than
    ``max_restarts`` crashes without a pair between them end the run. Workers that went with their node are paused for in the same way and
    end nothing.
    """

    max_restarts: int
    base_s: float = 1.0
    cap_s: float = 60.0
    crashes: int = 0
    losses: int = 0
    total: int = 0

    def progressed(self) -> None:
        """Somebody made a pair: whatever went wrong before is over."""
        self.crashes = self.losses = 0

    def crashed(self) -> float | None:
        """Seconds to wait before the replacement, or None when the budget is used up."""
        self.crashes += 1
        self.total += 1
        return None if self.crashes > self.max_restarts else self._pause(self.crashes)

    def lost_node(self) -> float:
        """Seconds to wait before the replacement of a worker whose node went away."""
        self.losses += 1
        return self._pause(self.losses)

    def _pause(self, times: int) -> float:
        return min(self.base_s * 2.0 ** (times - 2), self.cap_s) if times > 1 else 0.0


def share_cores(cores: Sequence[int], index: int, workers: int) -> tuple[int, ...]:
    """Worker ``index``'s part of a machine's cores, contiguous and as equal as can be; all of them when workers outnumber cores."""
    if workers > len(cores):
        return tuple(cores)
    return tuple(cores[index * len(cores) // workers : (index + 1) * len(cores) // workers])


def spread(count: int, parts: int) -> list[list[int]]:
    """0..count-1 dealt out to ``parts`` like cards, so that each gets long and short ones."""
    return [list(range(first, count, parts)) for first in range(parts)]


# ---- one worker, as the fleet sees it --------------------------------------------------------------------------------------------


class Worker(Protocol):
    """A worker that may be elsewhere. Every call raises WorkerFault when it is dead or late, or what the worker itself raised."""

    worker_id: str
    node: str
    """Where it is; empty until it has a place."""

    async def start(self) -> None:
        """Returns when it can generate. Raises NoRoom when it never got a place."""

    async def begin(self, task: GenerationTask) -> None:
        """Lease and walk prompts."""

    async def end(self) -> None:
        """Stop leasing, give leases back."""

    async def receive(self, bundle: WeightBundle) -> WeightProof:
        """Take and prove a version."""

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Completions in request order."""

    async def heartbeat(self) -> WorkerStats:
        """Counters; also the sign of life."""

    async def wait(self) -> None:
        """Never returns; raises as soon as the worker's process or its engine's is known to have ended, long before a heartbeat would miss it."""

    async def stop(self) -> None:
        """End it in good order."""

    def kill(self) -> None:
        """End it now, with all its processes."""

    def last_words(self) -> str:
        """The end of its log, if it can be read from here."""


class Launcher(Protocol):
    """Makes workers; ``index`` of ``count`` tells which part of a machine is the worker's, ``avoid`` the nodes to keep away from."""

    def __call__(self, worker_id: str, index: int, count: int, avoid: tuple[str, ...]) -> Worker:
        """A worker that is not started yet."""


@dataclass(slots=True, eq=False)
class _Member:
    """A place in the fleet and who fills it. ``bundle`` is the newest that this worker proved."""

    index: int
    worker: Worker
    bundle: WeightBundle | None = None
    task: GenerationTask | None = None
    stats: WorkerStats | None = None
    pairs: int = 0


# ---- the fleet -------------------------------------------------------------------------------------------------------------------


class RayFleet:
    """See the head of the file. Used from one event loop. ``on_event(kind, **fields)`` hears what happens to workers."""

    def __init__(
        self,
        spec: FleetSpec,
        buffer: Any,
        on_event: OnEvent,
        launcher: Launcher | None = None,
        nodes: Callable[[], Awaitable[NodeView]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._spec = spec
        self._buffer: Buffer = buffer if launcher is not None else RemoteBuffer(buffer)
        self._launch = launcher if launcher is not None else RayLauncher(spec, buffer)
        self._look = nodes or (one_machine if launcher is not None else RayNodes(partial(look_at_ray, spec.num_cpus, spec.num_gpus)))
        self._on_event = on_event
        self._clock = clock
        self._sleep = sleep
        self._policy = RestartPolicy(spec.max_restarts)
        self._record = NodeRecord()
        self._live: dict[int, _Member] = {}
        self._rebuilds: dict[int, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._waits: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._is_cut_off = False
        self._was_live = False
        self._was_complete = False
        self._launched = 0
        self._count = 0
        self._bundle: WeightBundle | None = None
        self._proofs: dict[str, WeightProof] = {}
        self._task: GenerationTask | None = None

    async def start(self, count: int) -> None:
        """Bring up ``count`` workers side by side.

        Raises EnvironmentProblem when an engine cannot start here or there is no room for all, RunFailed when workers keep dying.
        """
        await self.scale(count)
        await self._settled(lambda: len(self._live) == self._count)
        self._was_complete = True

    async def scale(self, count: int) -> None:
        """Have ``count`` workers from now on: starts more in the background, or stops the last ones."""
        self._count = count
        for index in range(count):
            if index not in self._live and index not in self._rebuilds:
                self._rebuild(index, delay=0.0)
        for index in sorted({*self._live, *self._rebuilds}):
            if index >= count:
                await self._dismiss(index)

    async def begin(self, task: GenerationTask) -> None:
        """Workers start leasing prompts of the task's stage; a worker that fails to is replaced."""
        self._task = task
        await asyncio.gather(*(self._attempt(member, self._hand_task) for member in list(self._live.values())))

    async def end(self) -> None:
        """Workers stop leasing, give back what they hold and idle."""
        self._task = None
        await asyncio.gather(*(self._attempt(member, self._hand_task) for member in list(self._live.values())))

    async def publish(self, bundle: WeightBundle) -> list[WeightProof]:
        """Every live worker takes and proves the version; one that fails is rebuilt. When all fail, waits for the first rebuilt one.

        Raises RunFailed when the restart budget is used up before anyone proved it.
        """
        self._bundle = bundle
        self._proofs = {}
        await asyncio.gather(*(self._attempt(member, self._hand_weights) for member in list(self._live.values())))
        await self._settled(lambda: any(proof.version == bundle.version for proof in self._proofs.values()))
        return [proof for proof in self._proofs.values() if proof.version == bundle.version]

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Completions in request order, spread over the workers. What a lost worker owed is asked of the others."""
        answers: dict[int, Completion] = {}
        began = self._clock()
        while len(answers) < len(requests):
            if self._clock() - began > self._spec.generate_timeout_s:
                missing = len(requests) - len(answers)
                raise RunFailed(f"{missing} of {len(requests)} requests had no answer within {self._spec.generate_timeout_s:g} s")
            await self._settled(lambda: bool(self._live))
            owed = [number for number in range(len(requests)) if number not in answers]
            members = list(self._live.values())
            parts = zip(members, spread(len(owed), len(members)), strict=True)
            asked = ((member, partial(self._ask, requests, [owed[i] for i in part], answers)) for member, part in parts)
            await asyncio.gather(*(self._attempt(member, ask) for member, ask in asked))
        return [answers[number] for number in range(len(requests))]

    async def supervise(self) -> None:
        """Watch heartbeats and nodes, replace workers; returns only by raising or by cancellation.

        Raises what ends a run: a crash loop, bad data, a fenced run, a cluster whose head is gone.
        """
        watches = [asyncio.ensure_future(watch) for watch in (self._watch_workers(), self._watch_nodes())]
        try:
            ended, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            ended.pop().result()
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)

    async def _watch_workers(self) -> None:
        while True:
            await self._sleep(self._spec.heartbeat_every_s)
            self._raise_failure()
            await asyncio.gather(*(self._attempt(member, self._check) for member in list(self._live.values())))

    async def _watch_nodes(self) -> None:
        """Beside the heartbeats, because a hung worker may keep those waiting longer than a node or the head lasts."""
        while True:
            await self._sleep(self._spec.heartbeat_every_s)
            view = await self._seen()
            for member in list(self._live.values()):
                if member.worker.node in view.draining:
                    self._move(member, view.draining[member.worker.node])

    async def stats(self) -> list[WorkerStats]:
        """The last heartbeat of each live worker."""
        return [member.stats for member in self._live.values() if member.stats is not None]

    def processes(self) -> list[list[int]]:
        """Process ids of each live worker of this machine: its actor's first, then its engine's."""
        workers = [member.worker for _, member in sorted(self._live.items())]
        return [[pid for pid, _ in worker.processes] for worker in workers if isinstance(worker, RayWorker)]

    def weight_client(self) -> WeightClient:
        """What the learner's device sender drives the live workers with ("nccl" and "ipc")."""
        workers = [member.worker for _, member in sorted(self._live.items())]
        handles = [worker.handle for worker in workers if isinstance(worker, RayWorker)]
        return WeightClient(handles, self._spec.engine.tensor_parallel_size, self._spec.receive_timeout_s)

    async def stop(self) -> None:
        """End all workers and their engine children; never raises for a worker that is gone already."""
        self._count = 0
        await asyncio.gather(*(self._dismiss(index) for index in sorted({*self._live, *self._rebuilds})))
        for wait in self._waits:
            wait.cancel()
        await asyncio.gather(*self._waits, *self._background, return_exceptions=True)  # workers that leave their nodes, each bounded

    # ---- dealing with one member ----------------------------------------------------------------------------------------------------

    async def _attempt(self, member: _Member, work: Callable[[_Member], Awaitable[None]]) -> None:
        """Do something with a worker; a fault of the worker's (or weights it cannot prove) means its replacement."""
        try:
            await work(member)
        except (WorkerFault, WeightSyncError) as problem:
            await self._replace(member, problem)

    async def _hand_task(self, member: _Member) -> None:
        """Bring a worker to the task of the moment, which may change meanwhile."""
        while member.task is not self._task:
            task = self._task
            await (member.worker.end() if task is None else member.worker.begin(task))
            member.task = task

    async def _hand_weights(self, member: _Member) -> None:
        """Bring a worker to the version of the moment, which may change meanwhile; its proofs are judged here."""
        while (bundle := self._bundle) is not None and member.bundle is not bundle:
            proof = await member.worker.receive(bundle)
            check_proof(bundle, proof, self._spec.tolerance)
            member.bundle = bundle
            self._proofs[member.worker.worker_id] = proof

    async def _ask(self, requests: Sequence[GenerateRequest], numbers: Sequence[int], answers: dict[int, Completion], member: _Member) -> None:
        """Some requests of one worker, in rounds of what it can run at once, so that a loss costs one round."""
        size = self._spec.concurrency
        for first in range(0, len(numbers), size):
            part = numbers[first : first + size]
            answers.update(zip(part, await member.worker.generate([requests[number] for number in part]), strict=True))

    async def _check(self, member: _Member) -> None:
        stats = await member.worker.heartbeat()
        member.stats = stats
        if stats.pairs > member.pairs:
            member.pairs = stats.pairs
            self._policy.progressed()
            self._record.progressed(member.worker.node)

    # ---- replacing ------------------------------------------------------------------------------------------------------------------

    async def _replace(self, member: _Member, problem: SgpoError) -> None:
        """Kill a worker, give its leases back, and bring up another in its place."""
        if self._live.get(member.index) is not member:
            return  # somebody else saw it first
        del self._live[member.index]
        self._end(member.worker, problem)
        if member.index < self._count:  # before anything is awaited: whoever waits for the fleet must find somebody being started
            self._rebuild(member.index, self._pause_after(member.worker, problem))
        await self._return_leases(member.worker, crashed=not isinstance(problem, NodeLost))

    async def _seen(self) -> NodeView:
        try:
            return await self._look()
        except HeadLost:
            self._is_cut_off = True
            raise

    def _move(self, member: _Member, seconds_left: float) -> None:
        """A worker's node is about to be taken away: it leaves, and another is brought up elsewhere meanwhile."""
        del self._live[member.index]
        left = None if seconds_left == float("inf") else round(seconds_left, 1)
        self._on_event("worker_leaves", worker=member.worker.worker_id, node=member.worker.node, seconds_left=left)
        if member.index < self._count:
            self._rebuild(member.index, delay=0.0)
        self._in_background(self._retire(member.worker, min(STOP_S, seconds_left - LEAVE_MARGIN_S)), self._background)

    async def _retire(self, worker: Worker, seconds: float) -> None:
        """End a worker in good order, which gives its leases back, or by force when ``seconds`` are over."""
        try:
            async with asyncio.timeout(seconds):
                await worker.stop()
        except (SgpoError, TimeoutError) as problem:
            reason = f"while leaving its node: {str(problem) or 'too late'}"
            self._on_event("worker_lost", worker=worker.worker_id, node=worker.node, reason=reason)
            await self._return_leases(worker, crashed=False)
        finally:
            worker.kill()

    def _end(self, worker: Worker, problem: SgpoError) -> None:
        if isinstance(problem, NoRoom):
            self._on_event("worker_waits", worker=worker.worker_id, reason=str(problem))
        else:
            log = telling_line(worker.last_words())
            self._on_event("worker_lost", worker=worker.worker_id, node=worker.node, reason=_reason(problem), log=log)
        worker.kill()

    async def _return_leases(self, worker: Worker, *, crashed: bool = True) -> None:
        if self._task is not None:
            await self._buffer.give_back(self._task.incarnation, worker.worker_id, crashed=crashed)

    def _pause_after(self, worker: Worker, problem: SgpoError) -> float:
        """How long to wait before the replacement; what went wrong is put to the account of the node, the workers or nobody."""
        if isinstance(problem, NoRoom):
            return 0.0  # the wait for a place was the pause
        if isinstance(problem, NodeLost):
            self._record.lost(worker.node, self._clock())
            return self._policy.lost_node()
        if worker.node and self._record.failed(worker.node, self._clock()):
            self._on_event("node_avoided", node=worker.node, failures=self._record.failures[worker.node], seconds=self._record.quarantine_s)
        delay = self._policy.crashed()
        if delay is None:
            times = f"rollout workers crashed {self._policy.crashes} times without making a pair"
            raise RunFailed(f"{times}; the last was {worker.worker_id}: {_reason(problem)}{worker.last_words()}")
        return delay

    def _rebuild(self, index: int, delay: float) -> None:
        self._rebuilds[index] = self._in_background(self._bring_up(index, delay), self._background)

    def _in_background(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
        """Work that nobody awaits, kept in ``tasks`` until it ends; what it raises ends the run."""
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(partial(self._background_ended, tasks))
        return task

    def _background_ended(self, tasks: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()

    async def _bring_up(self, index: int, delay: float) -> None:
        """Start a worker for a place until one lives: started, on the version of the moment, on the task of the moment."""
        while True:
            await self._sleep(delay)
            began = self._clock()
            member = await self._launch_member(index)
            try:
                await member.worker.start()
                await self._hand_weights(member)
            except SgpoError as problem:
                if not self._worth_another(problem):
                    member.worker.kill()
                    raise
                self._end(member.worker, problem)
                delay = self._pause_after(member.worker, problem)
            except asyncio.CancelledError:
                member.worker.kill()
                raise
            else:
                seconds = round(self._clock() - began, 1)
                self._on_event("worker_started", worker=member.worker.worker_id, node=member.worker.node, seconds=seconds)
                return await self._go_live(member)

    async def _launch_member(self, index: int) -> _Member:
        """A worker for a place, away from bad nodes; on a cluster of one machine, with its part of that machine."""
        view = await self._seen()
        avoid = self._record.avoided(view.able, self._clock())
        self._launched += 1
        part = (index, self._count) if len(view.alive) == 1 else (0, 1)
        return _Member(index, self._launch(f"rollout-{index}.{self._spec.attempt}.{self._launched}", *part, avoid))

    async def _go_live(self, member: _Member) -> None:
        """Nothing awaits between the last look at the version and this: from here on ``publish`` reaches the worker. Then it may lease."""
        del self._rebuilds[member.index]
        self._live[member.index] = member
        self._was_live = True
        self._in_background(self._attempt(member, lambda one: one.worker.wait()), self._waits)
        await self._attempt(member, self._hand_task)

    def _worth_another(self, problem: SgpoError) -> bool:
        """Whether a start that failed may succeed next time. What this machine lacks from the beginning, it will lack again.

        A place is waited for again as long as others work; a fleet that never was complete, or has nobody left, asks for too much.
        """
        if isinstance(problem, NoRoom):
            return self._was_complete and bool(self._live)
        return isinstance(problem, WorkerFault | WeightSyncError) or (isinstance(problem, EnvironmentProblem) and self._was_live)

    async def _dismiss(self, index: int) -> None:
        """End the worker of a place in good order, or by force."""
        rebuild = self._rebuilds.pop(index, None)
        if rebuild is not None:
            rebuild.cancel()
            await asyncio.gather(rebuild, return_exceptions=True)
        member = self._live.pop(index, None)
        if member is None:
            return
        try:
            if not self._is_cut_off:  # without the head a good order takes longer than Ray lets this process live
                await member.worker.stop()
        except SgpoError as problem:
            self._on_event("worker_lost", worker=member.worker.worker_id, reason=f"while stopping: {problem}")
        finally:
            member.worker.kill()

    # ---- waiting ----------------------------------------------------------------------------------------------------------------------

    async def _settled(self, done: Callable[[], bool]) -> None:
        """Until ``done``. Woken by finished rebuilds, which their start deadline and the restart budget bound. Raises what ended one."""
        while not done():
            self._raise_failure()
            if not self._rebuilds:
                raise RunFailed("no rollout worker is left and none is being started")
            await asyncio.wait(list(self._rebuilds.values()), timeout=self._spec.start_timeout_s, return_when=asyncio.FIRST_COMPLETED)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def _reason(problem: SgpoError) -> str:
    return problem.reason if isinstance(problem, WorkerFault) else str(problem)


# ---- workers on Ray ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What one actor needs to build its worker. ``index`` of ``count`` workers share a machine's cores."""

    fleet: FleetSpec
    worker_id: str
    index: int
    count: int


@dataclass(slots=True)
class RayLauncher:
    """Makes rollout actors."""

    spec: FleetSpec
    buffer: Any
    actor: type = field(default_factory=lambda: RolloutActor)
    carrier: Carrier = field(default_factory=Carrier)

    def __call__(self, worker_id: str, index: int, count: int, avoid: tuple[str, ...]) -> RayWorker:
        """An actor; Ray places it when its resources are free, which the start's deadline bounds."""
        size = {"num_cpus": self.spec.num_cpus, "num_gpus": self.spec.num_gpus, "label_selector": away_from(avoid)}
        handle = (
            ray.remote(self.actor)
            .options(**size, max_restarts=0, max_task_retries=0, max_concurrency=1000)
            .remote(WorkerSpec(self.spec, worker_id, index, count), RemoteBuffer(self.buffer))
        )
        return RayWorker(worker_id, handle, self.spec, self.carrier)


@dataclass(slots=True)
class RayWorker:
    """``Worker`` over a Ray actor handle, a deadline for each call."""

    worker_id: str
    handle: Any
    spec: FleetSpec
    carrier: Carrier
    processes: tuple[tuple[int, float], ...] = field(default=())
    node: str = ""
    held: str = ""

    async def start(self) -> None:
        """``start_timeout_s`` for a place on a node, and again for the engine."""
        try:
            self.node = await self._call("where", self.spec.start_timeout_s)
        except NoAnswer:
            size = f"{self.spec.num_cpus:g} CPU" + (f" and {self.spec.num_gpus:g} GPU" if self.spec.num_gpus else "")
            needs = f"no node had room for {self.worker_id} ({size}) within {self.spec.start_timeout_s:g} s"
            raise NoRoom(f"{needs}; add a node or lower rollout.num_rollout_workers") from None
        processes = await self._call("start", self.spec.start_timeout_s)
        if self.node == ray.get_runtime_context().get_node_id():
            self.processes = tuple(processes)

    async def begin(self, task: GenerationTask) -> None:
        """Within ``STEADY_S``."""
        await self._call("begin", STEADY_S, task)

    async def end(self) -> None:
        """Within ``STEADY_S``."""
        await self._call("end", STEADY_S)

    async def receive(self, bundle: WeightBundle) -> WeightProof:
        """Within ``receive_timeout_s``. To a worker on another node than the version's file the bytes go along."""
        along = (self.carrier.payload(bundle, self.held),) if bundle.uri and bundle.node_id != self.node else ()
        try:
            proof: WeightProof = await self._call("receive", self.spec.receive_timeout_s, bundle, *along)
        except Exception:
            self.carrier.forget()
            raise
        self.held = bundle.uri
        return proof

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Within ``generate_timeout_s``."""
        return list(await self._call("generate", self.spec.generate_timeout_s, list(requests)))

    async def heartbeat(self) -> WorkerStats:
        """Within ``heartbeat_timeout_s``."""
        stats: WorkerStats = await self._call("heartbeat", self.spec.heartbeat_timeout_s)
        return stats

    async def wait(self) -> None:
        """A call that fails when the actor's process ends (by Ray) or its engine's (by the actor). Bounded by the heartbeats beside it."""
        await self._call("wait", None)

    async def stop(self) -> None:
        """Within ``STOP_S``. An actor that stopped in good order is left to Ray, which would report a signal from us as a crash."""
        await self._call("stop", STOP_S)
        self.processes = self.processes[1:]

    async def _call(self, method: str, timeout: float | None, *arguments: Any) -> Any:
        try:
            return await call(getattr(self.handle, method).remote(*arguments), self.worker_id, timeout)
        except Unavailable:
            raise await self._verdict() from None

    async def _verdict(self) -> WorkerFault:
        """Why an actor that is never restarted is away: of a dead process Ray knows by the second question, of a dead node much later."""
        try:
            await call(self.handle.where.remote(), self.worker_id, VERDICT_S)
        except Unavailable:
            return NodeLost(self.worker_id, "its node cannot be reached")
        except WorkerFault as problem:
            return problem
        return WorkerFault(self.worker_id, "was away while it was called")

    def kill(self) -> None:
        """Ray kills the actor and its engine follows; on this machine all are also killed by number, which reaches a stopped one."""
        threading.Thread(target=ray.kill, args=(self.handle,), daemon=True).start()  # in a thread: it blocks while the head is away
        for pid, created in self.processes:
            kill_exactly(pid, created)

    def last_words(self) -> str:
        """The last lines of its log, each on a line of its own."""
        return tail(log_path(self.spec.log_dir, self.worker_id))


class RolloutActor:
    """The process of one rollout worker: its log file, its environment, its parts. Ray makes it.

    Nothing that can fail happens before ``start``, because Ray hides what a constructor raises; vLLM is not imported before it either.
    """

    _engine: VllmEngine
    _worker: RolloutWorker

    def __init__(self, spec: WorkerSpec, buffer: RemoteBuffer) -> None:
        self._spec = spec
        self._buffer = buffer
        self._copy: LocalCopy | None = None

    def _assemble(self) -> None:
        spec = self._spec
        log_to_file(log_path(spec.fleet.log_dir, spec.worker_id), spec.fleet.engine.log_level)
        remove_segments(Path(spec.fleet.log_dir))  # of killed engines; 400 MB each
        fleet = spec.fleet
        engine_spec = replace(fleet.engine, worker_id=spec.worker_id, stuck_s=fleet.request_timeout_s)
        if engine_spec.device == "cpu" and engine_spec.cpu_cores is None:
            cores = share_cores(sorted(os.sched_getaffinity(0)), spec.index, spec.count)
            engine_spec = replace(engine_spec, cpu_cores=cores)
        os.environ.update(engine_environment(engine_spec))
        book = PromptBook(load_tokenizer(engine_spec.model_dir), fleet.template)
        self._engine = VllmEngine(replace(engine_spec, stop_token_ids=(book.eos_id,), draft_frame=Frame(*book.improver_frame())))
        self._worker = RolloutWorker(
            RolloutSettings(spec.worker_id, engine_spec.max_model_len, fleet.tolerance, fleet.concurrency, fleet.lease_s),
            self._engine,
            self._buffer,
            book,
            partial(gated_outcome, fleet.gate),
            leave,
        )

    async def where(self) -> str:
        """The node's id: the first answer of an actor that got a place."""
        return str(ray.get_runtime_context().get_node_id())

    async def start(self) -> list[tuple[int, float]]:
        """Start the engine; (pid, creation time) of every process that must end with this worker."""
        self._assemble()
        await self._worker.start()
        mine = [os.getpid(), *await self._engine.pids()]
        note_segments(Path(self._spec.fleet.log_dir), mine)
        return [(pid, psutil.Process(pid).create_time()) for pid in mine]

    async def begin(self, task: GenerationTask) -> None:
        """See RolloutWorker."""
        await self._worker.begin(task)

    async def end(self) -> None:
        """See RolloutWorker."""
        await self._worker.end()

    async def receive(self, bundle: WeightBundle, payload: Payload | None = None) -> WeightProof:
        """See RolloutWorker. ``payload`` brings the bytes to a node that does not have the file."""
        if payload is not None:
            self._copy = self._copy or LocalCopy(self._spec.worker_id)
            bundle = await asyncio.to_thread(self._copy.take, bundle, payload)
        return await self._worker.receive(bundle)

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """See VllmEngine; these four are what ``handles.WeightClient`` calls."""
        await self._engine.init_weight_transfer_engine(init_info)

    async def start_weight_update(self) -> None:
        """See VllmEngine."""
        await self._engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """See VllmEngine."""
        await self._engine.update_weights(update_info)

    async def finish_weight_update(self) -> None:
        """See VllmEngine."""
        await self._engine.finish_weight_update()

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """See RolloutWorker."""
        return await self._worker.generate(requests)

    async def heartbeat(self) -> WorkerStats:
        """See RolloutWorker."""
        return await self._worker.heartbeat()

    async def wait(self) -> None:
        """Until this process ends, or raises WorkerFault when a process of the engine does."""
        await one_ends(await self._engine.pids())
        raise WorkerFault(ENGINE, "vLLM's engine process died")

    async def stop(self) -> None:
        """See RolloutWorker."""
        await self._worker.stop()
        if self._copy is not None:
            self._copy.close()


def gated_outcome(
    gate: PairGateConfig, lease: Lease, prompt_ids: tuple[int, ...], response: Completion, refinement: Completion | None, template: str
) -> Outcome:
    """``pair_gate.make_outcome`` with its rules first, to be bound."""
    return make_outcome(lease, prompt_ids, response, refinement, template, gate)


def log_path(log_dir: str, worker_id: str) -> Path:
    """Where a worker's log lies."""
    return Path(log_dir) / f"{worker_id}.log"


def log_to_file(path: Path, level: str) -> None:
    """Send everything this process and its children print to ``path``: vLLM's lines belong in a file, not on somebody's screen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sink = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    logging.basicConfig(level=level, stream=sys.stderr, force=True, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a file, each after a line break; empty when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "".join(f"\n    {line}" for line in text.splitlines()[-lines:])
