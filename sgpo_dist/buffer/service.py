"""The pair buffer: the ledger behind an asynchronous face, with group commit and waits that are woken.

``launch`` runs it inside one Ray actor that restarts on its file; drivers and rollout workers call it as ``roles.Buffer``. It adds to the
ledger only time: one thread owns the database, puts that arrive together share one commit (and so one flush to disk), and a wait for a
batch is woken by whatever may have made it possible. And it shares scarce prompts out: see ``_fair``. All rules are the ledger's. It does
not import Ray.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from sgpo_dist.buffer.admission import Hold
from sgpo_dist.buffer.ledger import MAX_ATTEMPTS, Ledger, PutRequest
from sgpo_dist.errors import RunFailed
from sgpo_dist.records import Outcome, PreferencePair, Prompt, Refusal, Stage
from sgpo_dist.roles import Batch, BufferCounts, LeaseGrant, PutReceipt, StagePlan

GROUP_SIZE: Final = 64
GROUP_WAIT_S: Final = 0.010
QUIET_PARTS: Final = 5
TICK_S: Final = 0.5
WAIT_TIMEOUT_S: Final = 600.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Pending:
    """A put that waits for its group's commit."""

    request: PutRequest
    answer: asyncio.Future[PutReceipt]


class PairBuffer:
    """See the head of the file. Build it anywhere; use it from one event loop. Building it again on the same file resumes where it was.

    ``group_size`` outcomes, ``group_wait_s`` seconds or a fifth of them without a put, whichever is first, make a commit. ``tick_s`` is how
    often a wait looks again unasked, since a lease that expires wakes nobody. A Ray actor needs no ``close``; a test does.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        group_size: int = GROUP_SIZE,
        group_wait_s: float = GROUP_WAIT_S,
        tick_s: float = TICK_S,
        max_attempts: int = MAX_ATTEMPTS,
        synchronous: str = "FULL",
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        crash_point: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._group_size = group_size
        self._group_wait_s = group_wait_s
        self._tick_s = tick_s
        self._clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")
        build = partial(
            Ledger, path, clock=clock, wall=wall, synchronous=synchronous, max_attempts=max_attempts, crash_point=crash_point
        )
        self._ledger = self._thread.submit(build).result()  # SQLite connections belong to the thread that opened them
        self._pending: list[_Pending] = []
        self._group_full = asyncio.Event()
        self._changed = asyncio.Condition()
        self._changes = 0
        self._last_outcome = clock()
        self._workers: set[str] = set()
        self._opened: dict[Stage, int | None] = {}
        self._flusher: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Finish the commits under way and close the file."""
        if self._flusher is not None:
            await self._flusher
        await self._run(self._ledger.close)
        self._thread.shutdown()

    # ---- the driver's calls -----------------------------------------------------------------------------------------------------

    async def begin_incarnation(self) -> int:
        """A new driver owns the run: earlier ones are fenced off, their leases return. Called once by each driver, before all else."""
        return await self._run(self._ledger.begin_incarnation)

    async def open_stage(self, incarnation: int, plan: StagePlan, prompts: Sequence[Prompt], version: int) -> None:
        """Register the stage's prompts (idempotent) and set the current version."""
        await self._run(partial(self._ledger.open_stage, incarnation, plan, prompts, version))
        self._opened[plan.stage] = None if plan.max_staleness is None else plan.batch_size * plan.weight_sync_interval
        await self._wake()

    async def assign(self, incarnation: int, stage: Stage, step: int, timeout_s: float = WAIT_TIMEOUT_S) -> Batch | None:
        """The batch of ``step``, journalled; None when it can never be filled. Woken by puts, returned leases and ``advance``; looks again each tick.

        Raises RunFailed with the stage's counts once ``timeout_s`` pass without a batch and without a new outcome.
        """
        started = self._clock()
        while True:
            seen = self._changes
            answer = await self._run(partial(self._ledger.assign, incarnation, stage, step))
            if not isinstance(answer, Hold):
                return answer
            await self._wait_for_change(seen, started, timeout_s, stage, f"no batch for step {step} ({answer})")

    async def advance(self, incarnation: int, stage: Stage, version: int) -> None:
        """``version`` is now current on every worker: frees room."""
        await self._run(partial(self._ledger.advance, incarnation, stage, version))
        await self._wake()

    async def commit(self, incarnation: int, stage: Stage, step: int) -> int:
        """A checkpoint holds everything up to ``step``: those rows are trained."""
        return await self._run(partial(self._ledger.commit, incarnation, stage, step))

    async def restore(self, incarnation: int, stage: Stage, step: int) -> int:
        """The run goes on from a checkpoint of ``step``: rows of later steps are assigned again."""
        return await self._run(partial(self._ledger.restore, incarnation, stage, step))

    async def wait_exhausted(self, stage: Stage, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Returns once every prompt has its outcome, or ``max_pairs`` are stored. Woken by puts and returned leases; looks again each tick.

        Raises RunFailed with the stage's counts once ``timeout_s`` pass without a new outcome.
        """
        started = self._clock()
        seen = self._changes
        while not await self._run(partial(self._ledger.settled, stage)):
            await self._wait_for_change(seen, started, timeout_s, stage, "the stage is not settled")
            seen = self._changes

    async def pairs(self, stage: Stage) -> list[PreferencePair]:
        """All pairs of a stage in prompt order."""
        return await self._run(partial(self._ledger.pairs, stage))

    async def refusals(self, stage: Stage) -> list[Refusal]:
        """All refusals of a stage in prompt order."""
        return await self._run(partial(self._ledger.refusals, stage))

    async def counts(self, stage: Stage) -> BufferCounts:
        """A consistent picture for people and metrics."""
        return await self._run(partial(self._ledger.counts, stage))

    async def backup(self, path: str) -> None:
        """A consistent copy of the database at ``path``, complete on disk or absent."""
        await self._run(partial(self._ledger.backup, path))

    # ---- the workers' calls -----------------------------------------------------------------------------------------------------

    async def lease(self, incarnation: int, worker_id: str, stage: Stage, limit: int) -> LeaseGrant:
        """At most ``limit`` leases, and only as many as the staleness bound has room for."""
        self._workers.add(worker_id)
        return await self._run(partial(self._ledger.lease, incarnation, worker_id, stage, self._fair(stage, limit)))

    def _fair(self, stage: Stage, limit: int) -> int:
        """At most a worker's share of what one version makes room for, so that the first to ask does not take all while others stand idle.

        A worker with more room asks again. A buffer that was restarted on its file knows no plan and shares nothing out until the next one.
        """
        opened = self._opened.get(stage)
        return limit if opened is None else min(limit, math.ceil(opened / len(self._workers)))

    async def renew(self, incarnation: int, worker_id: str, uids: Sequence[str]) -> int:
        """Heartbeat: extends the leases that the worker names; returns how many of them it still holds."""
        return await self._run(partial(self._ledger.renew, incarnation, worker_id, uids))

    async def give_back(self, incarnation: int, worker_id: str, *, crashed: bool = True) -> int:
        """Return all leases of a worker that ended; ``crashed`` False when it ended in good order and its prompts are not to blame."""
        self._workers.discard(worker_id)
        returned = await self._run(partial(self._ledger.give_back, incarnation, worker_id, crashed=crashed))
        await self._wake()
        return returned

    async def put(self, incarnation: int, worker_id: str, outcomes: Sequence[Outcome]) -> PutReceipt:
        """Store outcomes; returns when they are durable. Idempotent by uid."""
        answer: asyncio.Future[PutReceipt] = asyncio.get_running_loop().create_future()
        self._pending.append(_Pending(PutRequest(incarnation, worker_id, tuple(outcomes)), answer))
        if sum(len(pending.request.outcomes) for pending in self._pending) >= self._group_size:
            self._group_full.set()
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        return await answer

    # ---- group commit, waits, time ----------------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        """Commit group after group until nothing is pending; each waits a moment for company."""
        while self._pending:
            await self._gather_company()
            group, self._pending = self._pending, []
            self._group_full.clear()
            await self._commit_group(group)
            await self._wake()

    async def _gather_company(self) -> None:
        """Until the group is full, nobody came for a fifth of ``group_wait_s``, or all of it is over: who is alone need not wait for the rest."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._group_wait_s):
                seen = 0
                while seen < len(self._pending) and not self._group_full.is_set():
                    seen = len(self._pending)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._group_wait_s / QUIET_PARTS):
                            await self._group_full.wait()

    async def _commit_group(self, group: Sequence[_Pending]) -> None:
        work = self._run(partial(self._ledger.put_group, [pending.request for pending in group]))
        [outcome] = await asyncio.gather(work, return_exceptions=True)
        # When the whole transaction failed (the disk, for instance), every caller hears it; nobody is left waiting.
        answers = [outcome] * len(group) if isinstance(outcome, BaseException) else outcome
        for pending, answer in zip(group, answers, strict=True):
            self._answer(pending, answer)

    def _answer(self, pending: _Pending, answer: PutReceipt | BaseException) -> None:
        if isinstance(answer, PutReceipt) and answer.accepted:
            self._last_outcome = self._clock()
        if pending.answer.done():  # its caller went away; the outcomes are stored all the same
            return
        if isinstance(answer, BaseException):
            pending.answer.set_exception(answer)
        else:
            pending.answer.set_result(answer)

    async def _run(self, call: Callable[[], T]) -> T:
        """Run a ledger call in its thread, after those that came before it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def _wake(self) -> None:
        self._changes += 1
        async with self._changed:
            self._changed.notify_all()

    async def _wait_for_change(self, seen: int, started: float, timeout_s: float, stage: Stage, what: str) -> None:
        """Sleep until something changed since ``seen``, for a tick at most: then leases may have expired.

        Raises RunFailed when no outcome came for ``timeout_s`` since ``started``.
        """
        left = max(started, self._last_outcome) + timeout_s - self._clock()
        if left <= 0:
            raise RunFailed(await self._silence(timeout_s, stage, what))
        async with self._changed:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: self._changes != seen), min(left, self._tick_s))

    async def _silence(self, timeout_s: float, stage: Stage, what: str) -> str:
        counts = await self.counts(stage)
        return (
            f"stage {stage}: {what} and no new outcome for {timeout_s:g} s; waiting {counts.waiting}, in generation {counts.leased},"
            f" ready {counts.ready}, refused {sum(counts.refused.values())}, version {counts.version}; see the rollout workers' logs"
        )
