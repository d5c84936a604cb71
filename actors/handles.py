"""Remote roles as if they were here: one deadline a call, and Ray's exceptions turned into ours once.

The driver and the rollout workers reach the buffer through ``RemoteBuffer``, the fleet reaches its actors through ``call``. What Ray
raises (dead, unavailable or hung actors, lost objects, out of memory) becomes WorkerFault; what our own code raised over there arrives
as it was. Starting, replacing and killing actors is the fleet's business.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import ray
from ray import exceptions

from sgpo_dist.errors import EnvironmentProblem, SgpoError, WorkerFault
from sgpo_dist.records import Outcome, PreferencePair, Prompt, Refusal, Stage
from sgpo_dist.roles import Batch, BufferCounts, LeaseGrant, PutReceipt, StagePlan

T = TypeVar("T")

BUFFER = "pair buffer"
CALL_S = 60.0
"""Deadline of one ordinary buffer call."""
OUTAGE_S = 120.0
"""How long the buffer may be away (Ray restarts it on its file) before callers give up."""
ALIVE_S = 30.0
"""How often a caller that waits long for the buffer asks whether it still lives."""


class Unavailable(WorkerFault):
    """The actor was away while it was called; the call may or may not have run. Only idempotent calls may be repeated."""


class NoAnswer(WorkerFault):
    """The actor did not answer within the call's deadline."""


class NodeLost(WorkerFault):
    """The node under the actor died, was taken away or cannot be reached: neither the actor nor what it worked on is to blame."""


class NoRoom(EnvironmentProblem):
    """Ray found no node for an actor in the time for it: add a node, or ask for fewer or smaller workers."""


async def call(ref: Awaitable[T], role: str, timeout: float | None) -> T:
    """The result of a remote call, within ``timeout`` seconds if given. Raises WorkerFault for a lost or hung actor, our own errors as they were."""
    try:
        async with asyncio.timeout(timeout):  # not wait_for: before Python 3.12 that swallows a cancellation which meets the answer
            return await ref
    except (exceptions.RayError, SgpoError) as problem:  # before TimeoutError: what timed out over there is Ray's error here
        raise mapped(problem, role) from None
    except TimeoutError:
        raise NoAnswer(role, f"no answer within {timeout:g} s") from None


def mapped(problem: BaseException, role: str) -> SgpoError:
    """Our error for what a remote call raised: ours as it was, Ray's as WorkerFault."""
    cause = getattr(problem, "cause", None)
    if isinstance(cause, SgpoError):
        return cause
    if isinstance(problem, SgpoError):
        return problem
    if isinstance(problem, exceptions.ActorUnavailableError):
        return Unavailable(role, "away for a moment")
    loss = _loss_of_node(problem)
    return NodeLost(role, loss) if loss else WorkerFault(role, _reason(problem, cause))


def _loss_of_node(problem: BaseException) -> str:
    """How Ray says that the node is the cause, or nothing. A dead actor's cause is only told in words, unless the node was drained."""
    if isinstance(problem, exceptions.RayActorError) and problem.preempted:
        return "its node was drained and is gone"
    if isinstance(problem, exceptions.NodeDiedError) or "because its node has died" in str(problem):
        return "its node died"
    if isinstance(problem, exceptions.ObjectLostError) and not isinstance(problem, exceptions.OwnerDiedError):
        return "its node died with the answer"
    return ""


def _reason(problem: BaseException, cause: BaseException | None) -> str:
    if isinstance(problem, exceptions.RayTaskError) and cause is not None:
        return f"{type(cause).__name__}: {_last_line(str(cause))}"
    if isinstance(problem, exceptions.OutOfMemoryError):
        return "killed because its node ran out of memory; lower rollout.kv_cache_gib, rollout.concurrency or rollout.num_rollout_workers"
    if isinstance(problem, exceptions.RayActorError):
        return "its process died"
    return f"{type(problem).__name__}: {_last_line(str(problem))}"


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


class RemoteBuffer:
    """``roles.Buffer`` over a Ray actor that Ray restarts on its file: a call that meets the restart is repeated, with back-off.

    Every method is safe to repeat: puts by uid, ``assign`` by its journal, the rest by meaning. Travels between processes with its handle.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __reduce__(self) -> tuple[type[RemoteBuffer], tuple[Any]]:
        return RemoteBuffer, (self._handle,)

    async def begin_incarnation(self) -> int:
        """A new driver owns the run; returns its number."""
        return int(await self._call("begin_incarnation"))

    async def open_stage(self, incarnation: int, plan: StagePlan, prompts: Sequence[Prompt], version: int) -> None:
        """Register the stage's prompts."""
        await self._call("open_stage", incarnation, plan, tuple(prompts), version)

    async def lease(self, incarnation: int, worker_id: str, stage: Stage, limit: int) -> LeaseGrant:
        """At most ``limit`` leases."""
        grant: LeaseGrant = await self._call("lease", incarnation, worker_id, stage, limit)
        return grant

    async def renew(self, incarnation: int, worker_id: str, uids: Sequence[str]) -> int:
        """Extend the leases that the worker names."""
        return int(await self._call("renew", incarnation, worker_id, tuple(uids)))

    async def put(self, incarnation: int, worker_id: str, outcomes: Sequence[Outcome]) -> PutReceipt:
        """Store outcomes; returns when they are durable."""
        receipt: PutReceipt = await self._call("put", incarnation, worker_id, tuple(outcomes))
        return receipt

    async def give_back(self, incarnation: int, worker_id: str, *, crashed: bool = True) -> int:
        """Return all leases of a worker that ended."""
        return int(await self._call("give_back", incarnation, worker_id, crashed=crashed))

    async def assign(self, incarnation: int, stage: Stage, step: int) -> Batch | None:
        """The batch of ``step``. Waits as long as the buffer itself sees outcomes come (its own deadline is on silence)."""
        batch: Batch | None = await self._wait(stage, "assign", incarnation, stage, step)
        return batch

    async def advance(self, incarnation: int, stage: Stage, version: int) -> None:
        """``version`` is now current on every worker."""
        await self._call("advance", incarnation, stage, version)

    async def commit(self, incarnation: int, stage: Stage, step: int) -> int:
        """A checkpoint holds everything up to ``step``."""
        return int(await self._call("commit", incarnation, stage, step))

    async def restore(self, incarnation: int, stage: Stage, step: int) -> int:
        """The run goes on from a checkpoint of ``step``."""
        return int(await self._call("restore", incarnation, stage, step))

    async def pairs(self, stage: Stage) -> list[PreferencePair]:
        """All pairs of a stage in prompt order."""
        return list(await self._call("pairs", stage))

    async def refusals(self, stage: Stage) -> list[Refusal]:
        """All refusals of a stage in prompt order."""
        return list(await self._call("refusals", stage))

    async def wait_exhausted(self, stage: Stage) -> None:
        """Returns once every prompt of the stage has its outcome. Bounded as ``assign`` is."""
        await self._wait(stage, "wait_exhausted", stage)

    async def counts(self, stage: Stage) -> BufferCounts:
        """A consistent picture of one stage."""
        counts: BufferCounts = await self._call("counts", stage)
        return counts

    async def backup(self, path: str) -> None:
        """A consistent copy of the database at ``path``."""
        await self._call("backup", path)

    async def _call(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        """One ordinary call within ``CALL_S``."""
        return await through_outages(lambda: call(self._submit(method, arguments, keywords), BUFFER, CALL_S))

    async def _wait(self, stage: Stage, method: str, *arguments: Any) -> Any:
        """A call that may take long: as long as the buffer lives, which is asked every ``ALIVE_S``."""
        return await through_outages(lambda: self._wait_once(stage, method, arguments))

    async def _wait_once(self, stage: Stage, method: str, arguments: tuple[Any, ...]) -> Any:
        answer = asyncio.ensure_future(self._submit(method, arguments, {}))
        try:
            while not (await asyncio.wait({answer}, timeout=ALIVE_S))[0]:
                await call(self._submit("counts", (stage,), {}), BUFFER, CALL_S)
            return await call(answer, BUFFER, CALL_S)
        finally:
            answer.cancel()

    async def _submit(self, method: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        return await getattr(self._handle, method).remote(*arguments, **keywords)


async def through_outages(
    attempt: Callable[[], Awaitable[T]],
    outage_s: float = OUTAGE_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    jitter: Callable[[], float] = random.random,
) -> T:
    """The first answer of ``attempt``, repeated while the actor is away: after 0.1, 0.2 ... 5 s, each spread by half, for ``outage_s``."""
    began = clock()
    delay = 0.1
    while True:
        try:
            return await attempt()
        except Unavailable as problem:
            if clock() - began + delay > outage_s:
                raise WorkerFault(problem.role, f"away for more than {outage_s:g} s") from None
            await sleep(delay * (0.5 + jitter()))
            delay = min(2 * delay, 5.0)


class WeightClient:
    """What vLLM's trainer engines drive the workers with: its four methods, synchronous, over the rollout actors. Lives in the learner.

    ``gpus_per_engine`` counts the ranks of one engine: with "nccl" the first engine's start at 1 (0 is the sender), the next one's after
    them. Every call waits at most ``timeout_s`` for all workers and raises WorkerFault for the first that fails.
    """

    def __init__(self, handles: Sequence[Any], gpus_per_engine: int = 1, timeout_s: float = 300.0) -> None:
        self._handles = list(handles)
        self._gpus_per_engine = gpus_per_engine
        self._timeout_s = timeout_s

    def __reduce__(self) -> tuple[type[WeightClient], tuple[Any, ...]]:
        return WeightClient, (self._handles, self._gpus_per_engine, self._timeout_s)

    @property
    def names(self) -> tuple[str, ...]:
        """Who is behind it: another fleet has other names."""
        return tuple(map(repr, self._handles))

    @property
    def num_ranks(self) -> int:
        """How many device processes take weights, over all engines."""
        return len(self._handles) * self._gpus_per_engine

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """Meet the sender; each engine is told where its ranks begin."""
        infos = init_infos(init_info, len(self._handles), self._gpus_per_engine)
        self._gather([handle.init_weight_transfer_engine.remote(info) for handle, info in zip(self._handles, infos, strict=True)])

    def start_weight_update(self) -> None:
        """Freeze requests, prepare layers."""
        self._gather([handle.start_weight_update.remote() for handle in self._handles])

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Take tensors."""
        self._gather([handle.update_weights.remote(dict(update_info)) for handle in self._handles])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Finish layers, go on."""
        self._gather([handle.finish_weight_update.remote() for handle in self._handles])

    def _gather(self, refs: list[Any]) -> None:
        try:
            ray.get(refs, timeout=self._timeout_s)
        except exceptions.RayError as problem:
            raise mapped(problem, "rollout workers") from None


def init_infos(init_info: Mapping[str, Any], engines: int, gpus_per_engine: int) -> list[dict[str, Any]]:
    """The hand-shake for each engine; only "nccl"'s has ranks, which follow one another."""
    if "rank_offset" not in init_info:
        return [dict(init_info)] * engines
    return [{**init_info, "rank_offset": init_info["rank_offset"] + index * gpus_per_engine} for index in range(engines)]
