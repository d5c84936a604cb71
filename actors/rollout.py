"""A rollout worker: leases prompts, has each one walked to its outcome, puts the outcomes back, and takes new weights in between.

    lease -> walk (response, refinement, gate) -> put          one coroutine a prompt, so the engine stays full

The fleet runs one as a Ray actor; everything it works with is handed in. Knows nothing of Ray, vLLM, other workers, of how pairs are made
(``walk``), or of staleness: the buffer grants no more than may be made. A worker whose engine is dead or holds unproved weights ends
itself; the fleet replaces it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import psutil

from actors.revisers import build_reviser
from actors.walk import IMPROVER, JUDGED, OPENAI, SELF, Means, OutcomeMaker, Walker
from sgpo_dist.config import JudgeConfig
from sgpo_dist.endpoint import Endpoint
from sgpo_dist.errors import RunFailed, SgpoError, WorkerFault
from sgpo_dist.evaluate.judge import PairJudge, build_judge
from sgpo_dist.prompts import PromptBook
from sgpo_dist.records import Completion, Outcome, PreferencePair
from sgpo_dist.roles import Buffer, Engine, GenerateRequest, GenerationTask, Lease, WorkerStats
from sgpo_dist.weights.version import WeightBundle, WeightProof, check_proof

logger = logging.getLogger(__name__)
T = TypeVar("T")


class LiveEngine(Engine, Protocol):
    """An engine that can be asked whether it still lives."""

    async def check(self) -> None:
        """Returns when the engine's processes answer; raises WorkerFault when they are dead. The caller's deadline bounds it."""


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """``concurrency`` prompts in flight; ``lease_s`` is the buffer's, renewed thrice in it; ``tolerance`` (nats) bounds the proof's gap.

    ``poll_s`` is how often an idle worker asks for prompts, ``gather_s`` how long an outcome waits for company before a put.
    """

    worker_id: str
    max_model_len: int
    tolerance: float
    concurrency: int = 64
    lease_s: float = 300.0
    poll_s: float = 0.2
    gather_s: float = 0.005


class RolloutWorker:
    """See the head of the file. ``die`` ends the process after a fault that nothing here can mend; it gets the reason.

    ``make_judge`` (settings, environment, the run's seed) is called once a task of pairs "judge".
    """

    def __init__(
        self,
        settings: RolloutSettings,
        engine: LiveEngine,
        buffer: Buffer,
        book: PromptBook,
        make_outcome: OutcomeMaker,
        die: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        make_judge: Callable[[JudgeConfig, Mapping[str, str], int], PairJudge] = build_judge,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._buffer = buffer
        self._book = book
        self._make_outcome = make_outcome
        self._die = die
        self._clock = clock
        self._make_judge = make_judge
        self._task: GenerationTask | None = None
        self._endpoint: Endpoint | None = None
        self._loops: list[asyncio.Task[None]] = []
        self._walks: set[asyncio.Task[None]] = set()
        self._held: set[str] = set()
        self._outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        self._proved = asyncio.Event()
        self._proved.set()
        self._failure: SgpoError | None = None
        self._pairs = self._refusals = self._tokens = 0
        self._idle_s = 0.0
        self._idle_since = clock()

    # ---- the fleet's calls --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine; the caller's deadline bounds it."""
        await self._engine.start()

    async def begin(self, task: GenerationTask) -> None:
        """Lease and walk prompts of the task's stage from now on; a task in progress is ended first.

        Raises ConfigError or DataError when a reviser or the judge that the task names cannot be had.
        """
        await self.end()
        self._failure = None
        walker = self._walker(task)
        self._task = task
        loops = self._lease_loop(task, walker), self._put_loop(task), self._renew_loop(task)
        self._loops = [asyncio.create_task(self._guarded(loop)) for loop in loops]

    def _walker(self, task: GenerationTask) -> Walker:
        """What is dear to make (an endpoint's client, a file of revisions, a judge) is made here, once for all prompts of the task."""
        judge = self._make_judge(task.judge, os.environ, int(task.options.get("seed", 0))) if task.pairs == JUDGED else None
        names = sorted(set(task.refine_with.values()) - {IMPROVER, SELF})
        self._endpoint = Endpoint(task.endpoint) if OPENAI in names else None
        revisers = {
            name: build_reviser(
                name,
                repair=task.repair,
                blend_budget=float(task.options.get("blend_budget", 0.5)),
                book=self._book,
                endpoint=self._endpoint,
                revisions_path=str(task.options.get("revisions_path", "")),
            )
            for name in names
        }
        return Walker(task, Means(self._book, self._make_outcome, self._settings.max_model_len, self._ask, self._engine.logps, revisers, judge))

    async def end(self) -> None:
        """Stop leasing, drop what is in flight and give its leases back; idle until the next ``begin``. Outcomes made are put before."""
        task, self._task = self._task, None
        if task is None:
            return
        await _cancel(self._walks)
        left = _drained(self._outcomes)
        await _cancel(self._loops)
        if left:
            await self._put(task, left)
        if self._endpoint is not None:
            await self._endpoint.close()
        await self._buffer.give_back(task.incarnation, self._settings.worker_id, crashed=False)

    async def receive(self, bundle: WeightBundle) -> WeightProof:
        """Take and prove a version while prompts run. No outcome is put between the first new byte and the proof.

        Raises WeightSyncError when the engine's own figures do not prove it; the worker then puts nothing any more.
        """
        self._proved.clear()
        proof = await self._mortal(self._engine.receive(bundle))
        check_proof(bundle, proof, self._settings.tolerance)
        self._proved.set()
        return proof

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Completions in request order, beside whatever else runs. The caller's deadline bounds it."""
        return list(await asyncio.gather(*(self._ask(request) for request in requests)))

    async def heartbeat(self) -> WorkerStats:
        """Counters, after the engine answered. Raises what ended the loops, if something did (bad data, a fenced or broken run)."""
        if self._failure is not None:
            raise self._failure
        await self._mortal(self._engine.check())
        return WorkerStats(
            worker_id=self._settings.worker_id,
            version=self._engine.version,
            in_flight=len(self._walks),
            pairs=self._pairs,
            refusals=self._refusals,
            generated_tokens=self._tokens,
            idle_s=self._idle_s + (0.0 if self._walks else self._clock() - self._idle_since),
            rss_bytes=resident_bytes(),
        )

    async def stop(self) -> None:
        """End the task and the engine."""
        await self.end()
        await self._engine.stop()

    # ---- the loops of a task ------------------------------------------------------------------------------------------------------

    async def _lease_loop(self, task: GenerationTask, walker: Walker) -> None:
        """Keep ``concurrency`` prompts in flight. Woken by a finished walk, at the latest after ``poll_s``."""
        settings = self._settings
        while True:
            room = settings.concurrency - len(self._walks)
            if room > 0:
                grant = await self._buffer.lease(task.incarnation, settings.worker_id, task.stage, room)
                for lease in grant.leases:
                    self._begin_walk(walker, lease)
            await self._pause(settings.poll_s)

    async def _pause(self, seconds: float) -> None:
        """Until a walk ends (and a moment more, for its neighbours to end too) or ``seconds`` are over."""
        if not self._walks:
            await asyncio.sleep(seconds)
            return
        await asyncio.wait(self._walks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(self._settings.gather_s)

    def _begin_walk(self, walker: Walker, lease: Lease) -> None:
        if not self._walks:
            self._idle_s += self._clock() - self._idle_since
        self._held.add(lease.uid)
        walk = asyncio.create_task(self._guarded(self._walk(walker, lease)))
        self._walks.add(walk)
        walk.add_done_callback(self._end_walk)

    async def _walk(self, walker: Walker, lease: Lease) -> None:
        self._outcomes.put_nowait(await walker.outcome(lease))

    def _end_walk(self, walk: asyncio.Task[None]) -> None:
        self._walks.discard(walk)
        if not self._walks:
            self._idle_since = self._clock()

    async def _put_loop(self, task: GenerationTask) -> None:
        """Put outcomes in small groups. Woken by the first outcome; nothing is put while weights are unproved."""
        while True:
            first = await self._outcomes.get()
            await asyncio.sleep(self._settings.gather_s)
            await self._put(task, [first, *_drained(self._outcomes)])

    async def _put(self, task: GenerationTask, outcomes: Sequence[Outcome]) -> None:
        await self._proved.wait()  # partner: ``receive``, which the fleet bounds; a worker that fails there is replaced
        await self._buffer.put(task.incarnation, self._settings.worker_id, outcomes)
        self._held.difference_update(outcome.uid for outcome in outcomes)
        pairs = sum(isinstance(outcome, PreferencePair) for outcome in outcomes)
        self._pairs += pairs
        self._refusals += len(outcomes) - pairs

    async def _renew_loop(self, task: GenerationTask) -> None:
        """Renew what is in hand, by name: a grant whose answer was lost is in nobody's hand and must expire."""
        while True:
            await asyncio.sleep(self._settings.lease_s / 3)
            await self._buffer.renew(task.incarnation, self._settings.worker_id, tuple(self._held))

    async def _guarded(self, work: Awaitable[None]) -> None:
        """Run one of the task's coroutines; what it raises is kept for the next heartbeat, or ends the process."""
        try:
            await work
        except SgpoError as problem:
            logger.exception("the worker's task failed")
            self._fail(problem)
        except Exception as problem:
            logger.exception("the worker's task failed in a way it should not")
            self._fail(RunFailed(f"{self._settings.worker_id}: {type(problem).__name__}: {problem}"))

    def _fail(self, problem: SgpoError) -> None:
        if isinstance(problem, WorkerFault):
            self._die(str(problem))
        self._failure = self._failure or problem

    # ---- the engine ---------------------------------------------------------------------------------------------------------------

    async def _ask(self, request: GenerateRequest) -> Completion:
        answer = await self._mortal(self._engine.generate(request))
        self._tokens += len(answer.token_ids)
        return answer

    async def _mortal(self, work: Awaitable[T]) -> T:
        """Await something of the engine's; its death is this process's death."""
        try:
            return await work
        except WorkerFault as problem:
            self._die(str(problem))
            raise


def resident_bytes() -> int:
    """Memory of this process and its children."""
    total = 0
    process = psutil.Process()
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def leave(reason: str) -> None:
    """The default ``die``: end this process at once, so that the fleet sees a dead actor instead of one that fails for ever."""
    logger.critical("this worker ends itself: %s", reason)
    logging.shutdown()
    os._exit(1)


def _drained(queue: asyncio.Queue[Outcome]) -> list[Outcome]:
    return [queue.get_nowait() for _ in range(queue.qsize())]


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel and wait; a cancelled generation is aborted in the engine. Asked again each second: a library may swallow a cancellation."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=1.0)
