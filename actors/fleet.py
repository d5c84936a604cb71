"""The fleet: all rollout workers as one, supervised, replaceable, and on the current version before they lease.

The driver holds one ``RayFleet`` (``roles.Fleet``). Each worker is a Ray actor with an engine of its own; a worker that dies, hangs, or
fails to prove a version is killed, its leases go back, and a fresh one takes its place after a pause. What a worker does is
``rollout``'s business; how actors are reached, ``handles``'. Decisions about restarts are pure (``RestartPolicy``), with time passed in.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil
import ray

from actors.handles import RemoteBuffer, WeightClient, call
from actors.rollout import RolloutSettings, RolloutWorker, leave
from actors.vllm_engine import EngineSpec, VllmEngine, engine_environment
from sgpo_dist.config import PairGateConfig
from sgpo_dist.errors import EnvironmentProblem, RunFailed, SgpoError, WeightSyncError, WorkerFault
from sgpo_dist.pair_gate import make_outcome
from sgpo_dist.processes import kill_exactly
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.records import Completion, Outcome
from sgpo_dist.roles import Buffer, GenerateRequest, GenerationTask, Lease, WorkerStats
from sgpo_dist.weights.version import WeightBundle, WeightProof, check_proof

OnEvent = Callable[..., None]

HEARTBEAT_EVERY_S = 2.0
STEADY_S = 60.0
"""Deadline of a call that only changes a worker's mind (begin, end)."""
STOP_S = 40.0
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

    A crash is answered with a pause of ``base_s`` doubled with each crash before it, at most ``cap_s``; more than ``max_restarts``
    crashes without a pair between them end the run.
    """

    max_restarts: int
    base_s: float = 1.0
    cap_s: float = 60.0
    crashes: int = 0
    total: int = 0

    def progressed(self) -> None:
        """Somebody made a pair: whatever went wrong before is over."""
        self.crashes = 0

    def crashed(self) -> float | None:
        """Seconds to wait before the replacement, or None when the budget is used up."""
        self.crashes += 1
        self.total += 1
        if self.crashes > self.max_restarts:
            return None
        return min(self.base_s * 2.0 ** (self.crashes - 1), self.cap_s)


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

    async def start(self) -> None:
        """Returns when it can generate."""

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

    async def stop(self) -> None:
        """End it in good order."""

    def kill(self) -> None:
        """End it now, with all its processes."""

    def last_words(self) -> str:
        """The end of its log, if it can be read from here."""


class Launcher(Protocol):
    """Makes workers; ``index`` of ``count`` tells which part of a machine is the worker's."""

    def __call__(self, worker_id: str, index: int, count: int) -> Worker:
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
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._spec = spec
        self._buffer: Buffer = buffer if launcher is not None else RemoteBuffer(buffer)
        self._launch = launcher if launcher is not None else RayLauncher(spec, buffer)
        self._on_event = on_event
        self._clock = clock
        self._sleep = sleep
        self._policy = RestartPolicy(spec.max_restarts)
        self._live: dict[int, _Member] = {}
        self._rebuilds: dict[int, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._was_live = False
        self._launched = 0
        self._count = 0
        self._bundle: WeightBundle | None = None
        self._proofs: dict[str, WeightProof] = {}
        self._task: GenerationTask | None = None

    async def start(self, count: int) -> None:
        """Bring up ``count`` workers side by side.

        Raises EnvironmentProblem when an engine cannot start here, RunFailed when workers keep dying.
        """
        await self.scale(count)
        await self._settled(lambda: len(self._live) == self._count)

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
        await asyncio.gather(*(self._attempt(member, self._hand_task(member)) for member in list(self._live.values())))

    async def end(self) -> None:
        """Workers stop leasing, give back what they hold and idle."""
        self._task = None
        await asyncio.gather(*(self._attempt(member, self._hand_task(member)) for member in list(self._live.values())))

    async def publish(self, bundle: WeightBundle) -> list[WeightProof]:
        """Every live worker takes and proves the version; one that fails is rebuilt. When all fail, waits for the first rebuilt one.

        Raises RunFailed when the restart budget is used up before anyone proved it.
        """
        self._bundle = bundle
        self._proofs = {}
        await asyncio.gather(*(self._attempt(member, self._hand_weights(member)) for member in list(self._live.values())))
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
            rounds = (self._attempt(member, self._ask(member, requests, [owed[i] for i in part], answers)) for member, part in parts)
            await asyncio.gather(*rounds)
        return [answers[number] for number in range(len(requests))]

    async def supervise(self) -> None:
        """Watch heartbeats, replace workers; returns only by raising (a crash loop, bad data, a fenced run) or by cancellation."""
        while True:
            await self._sleep(self._spec.heartbeat_every_s)
            self._raise_failure()
            await asyncio.gather(*(self._attempt(member, self._check(member)) for member in list(self._live.values())))

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

    # ---- dealing with one member ----------------------------------------------------------------------------------------------------

    async def _attempt(self, member: _Member, work: Coroutine[Any, Any, None]) -> None:
        """Do something with a worker; a fault of the worker's (or weights it cannot prove) means its replacement."""
        try:
            await work
        except (WorkerFault, WeightSyncError) as problem:
            await self._replace(member, _reason(problem))

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

    async def _ask(self, member: _Member, requests: Sequence[GenerateRequest], numbers: Sequence[int], answers: dict[int, Completion]) -> None:
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

    # ---- replacing ------------------------------------------------------------------------------------------------------------------

    async def _replace(self, member: _Member, reason: str) -> None:
        """Kill a worker, give its leases back, and bring up another in its place."""
        if self._live.get(member.index) is not member:
            return  # somebody else saw it first
        del self._live[member.index]
        self._end(member.worker, reason)
        if member.index < self._count:  # before anything is awaited: whoever waits for the fleet must find somebody being started
            self._rebuild(member.index, self._pause_after_crash(member.worker, reason))
        await self._return_leases(member.worker)

    def _end(self, worker: Worker, reason: str) -> None:
        self._on_event("worker_lost", worker=worker.worker_id, reason=reason)
        worker.kill()

    async def _return_leases(self, worker: Worker) -> None:
        if self._task is not None:
            await self._buffer.give_back(self._task.incarnation, worker.worker_id, crashed=True)

    def _pause_after_crash(self, worker: Worker, reason: str) -> float:
        delay = self._policy.crashed()
        if delay is None:
            times = f"rollout workers crashed {self._policy.crashes} times without making a pair"
            raise RunFailed(f"{times}; the last was {worker.worker_id}: {reason}{worker.last_words()}")
        return delay

    def _rebuild(self, index: int, delay: float) -> None:
        task = asyncio.create_task(self._bring_up(index, delay))
        self._rebuilds[index] = task
        self._background.add(task)
        task.add_done_callback(self._rebuild_ended)

    def _rebuild_ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()

    async def _bring_up(self, index: int, delay: float) -> None:
        """Start a worker for a place until one lives: started, on the version of the moment, on the task of the moment."""
        while True:
            await self._sleep(delay)
            self._launched += 1
            began = self._clock()
            member = _Member(index, self._launch(f"rollout-{index}.{self._spec.attempt}.{self._launched}", index, self._count))
            try:
                await member.worker.start()
                await self._hand_weights(member)
            except SgpoError as problem:
                if not self._worth_another(problem):
                    member.worker.kill()
                    raise
                self._end(member.worker, _reason(problem))
                await self._return_leases(member.worker)
                delay = self._pause_after_crash(member.worker, _reason(problem))
            except asyncio.CancelledError:
                member.worker.kill()
                raise
            else:
                self._on_event("worker_started", worker=member.worker.worker_id, seconds=round(self._clock() - began, 1))
                return await self._go_live(member)

    async def _go_live(self, member: _Member) -> None:
        """Nothing awaits between the last look at the version and this: from here on ``publish`` reaches the worker. Then it may lease."""
        del self._rebuilds[member.index]
        self._live[member.index] = member
        self._was_live = True
        await self._attempt(member, self._hand_task(member))

    def _worth_another(self, problem: SgpoError) -> bool:
        """Whether a start that failed may succeed next time. What this machine lacks from the beginning, it will lack again."""
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

    def __call__(self, worker_id: str, index: int, count: int) -> RayWorker:
        """An actor; Ray places it when its resources are free, which the start's deadline bounds."""
        alone = len([node for node in ray.nodes() if node["Alive"]]) == 1
        worker_spec = WorkerSpec(self.spec, worker_id, index if alone else 0, count if alone else 1)
        handle = (
            ray.remote(RolloutActor)
            .options(num_cpus=self.spec.num_cpus, num_gpus=self.spec.num_gpus, max_restarts=0, max_task_retries=0, max_concurrency=1000)
            .remote(worker_spec, RemoteBuffer(self.buffer))
        )
        return RayWorker(worker_id, handle, self.spec)


@dataclass(slots=True)
class RayWorker:
    """``Worker`` over a Ray actor handle, a deadline for each call."""

    worker_id: str
    handle: Any
    spec: FleetSpec
    processes: tuple[tuple[int, float], ...] = field(default=())

    async def start(self) -> None:
        """Within ``start_timeout_s``, the actor's placement included."""
        node_id, processes = await call(self.handle.start.remote(), self.worker_id, self.spec.start_timeout_s)
        if node_id == ray.get_runtime_context().get_node_id():
            self.processes = tuple(processes)

    async def begin(self, task: GenerationTask) -> None:
        """Within ``STEADY_S``."""
        await call(self.handle.begin.remote(task), self.worker_id, STEADY_S)

    async def end(self) -> None:
        """Within ``STEADY_S``."""
        await call(self.handle.end.remote(), self.worker_id, STEADY_S)

    async def receive(self, bundle: WeightBundle) -> WeightProof:
        """Within ``receive_timeout_s``."""
        return await call(self.handle.receive.remote(bundle), self.worker_id, self.spec.receive_timeout_s)

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Within ``generate_timeout_s``."""
        return await call(self.handle.generate.remote(list(requests)), self.worker_id, self.spec.generate_timeout_s)

    async def heartbeat(self) -> WorkerStats:
        """Within ``heartbeat_timeout_s``."""
        return await call(self.handle.heartbeat.remote(), self.worker_id, self.spec.heartbeat_timeout_s)

    async def stop(self) -> None:
        """Within ``STOP_S``. An actor that stopped in good order is left to Ray, which would report a signal from us as a crash."""
        await call(self.handle.stop.remote(), self.worker_id, STOP_S)
        self.processes = self.processes[1:]

    def kill(self) -> None:
        """Ray kills the actor and its engine follows; on this machine all are also killed by number, which reaches a stopped one."""
        ray.kill(self.handle, no_restart=True)
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

    def _assemble(self) -> None:
        spec = self._spec
        log_to_file(log_path(spec.fleet.log_dir, spec.worker_id), spec.fleet.engine.log_level)
        fleet = spec.fleet
        engine_spec = replace(fleet.engine, worker_id=spec.worker_id, stuck_s=fleet.request_timeout_s)
        if engine_spec.device == "cpu" and engine_spec.cpu_cores is None:
            cores = share_cores(sorted(os.sched_getaffinity(0)), spec.index, spec.count)
            engine_spec = replace(engine_spec, cpu_cores=cores)
        os.environ.update(engine_environment(engine_spec))
        book = PromptBook(load_tokenizer(engine_spec.model_dir), fleet.template)
        self._engine = VllmEngine(replace(engine_spec, stop_token_ids=(book.eos_id,)))
        self._worker = RolloutWorker(
            RolloutSettings(spec.worker_id, engine_spec.max_model_len, fleet.tolerance, fleet.concurrency, fleet.lease_s),
            self._engine,
            self._buffer,
            book,
            partial(gated_outcome, fleet.gate),
            leave,
        )

    async def start(self) -> tuple[str, list[tuple[int, float]]]:
        """Start the engine; the node's id, and (pid, creation time) of every process that must end with this worker."""
        self._assemble()
        await self._worker.start()
        mine = [os.getpid(), *await self._engine.pids()]
        return ray.get_runtime_context().get_node_id(), [(pid, psutil.Process(pid).create_time()) for pid in mine]

    async def begin(self, task: GenerationTask) -> None:
        """See RolloutWorker."""
        await self._worker.begin(task)

    async def end(self) -> None:
        """See RolloutWorker."""
        await self._worker.end()

    async def receive(self, bundle: WeightBundle) -> WeightProof:
        """See RolloutWorker."""
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

    async def stop(self) -> None:
        """See RolloutWorker."""
        await self._worker.stop()


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
