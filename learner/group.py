"""The learner as the story sees it: R ranks as Ray actors behind ``sgpo_dist.roles.Learner``. Called by launch.

Starts the ranks, lets them meet, calls all of them at once with a deadline, and turns whatever goes wrong into one of our errors. When a
rank died or hung, all of them are ended by force and the next ``begin_stage`` starts new ones. torch and DeepSpeed are imported in the
actors only, so the driver stays light. Leaves out: what a rank does (learner), where a run goes on after a fault (recovery).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, cast

import psutil
import ray
from ray.exceptions import RayError, RayTaskError

from learner.heap import ALLOCATOR
from sgpo_dist.config import LearnerConfig, ModelConfig
from sgpo_dist.errors import EnvironmentProblem, SgpoError, WorkerFault
from sgpo_dist.faults import LOG_FOLLOWS
from sgpo_dist.processes import kill_exactly, telling_line
from sgpo_dist.records import PreferencePair, TokenExample
from sgpo_dist.roles import LearnerStage, Metrics
from sgpo_dist.sanitize import one_line
from sgpo_dist.turns import held
from sgpo_dist.weights.version import ProbeRow, WeightBundle

ROLE: Final = "learner"
SHM: Final = "shm"
START_TIMEOUT_S: Final = 600.0
STOP_TIMEOUT_S: Final = 20.0
PORT_ATTEMPTS: Final = 3
LOG_TAIL: Final = 4000
PORT_TAKEN: Final = "EADDRINUSE"
COMPUTING: Final = frozenset({"nll_step", "preference_step", "logps"})
"""Methods of a rank that keep all its cores busy."""


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """What a group needs. ``engine_dtype`` is what the rollout engines compute in, ``num_cpus`` what Ray reserves for a rank.

    With ``turns``, a run's id, engines of that run on a rank's machine stand still while it computes (sgpo_dist/turns.py).
    """

    model: ModelConfig
    learner: LearnerConfig
    transport: str
    engine_dtype: str
    probes: tuple[ProbeRow, ...]
    seed: int
    cache_dir: str
    num_cpus: float = 1.0
    environment: Mapping[str, str] = field(default_factory=dict)
    nonce: str = field(default_factory=lambda: secrets.token_hex(4))
    turns: str = ""

    @property
    def threads(self) -> int:
        """CPU threads of one rank."""
        return self.learner.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // self.learner.num_ranks)


class WorkersClient(Protocol):
    """The client of the live workers: vLLM's trainer engines call its four methods in the ranks, the group reads who they are."""

    @property
    def names(self) -> tuple[str, ...]:
        """Who is behind it; another tuple means that the ranks have to meet them."""

    @property
    def num_ranks(self) -> int:
        """How many device processes take weights."""


class RankHost:
    """The process of one rank: builds the rank inside the actor and passes calls on to it."""

    def __init__(self, spec: GroupSpec, rank: int) -> None:
        from learner.learner import LearnerRank, RankSpec

        self._turns = spec.turns
        self._rank = LearnerRank(
            RankSpec(
                rank=rank,
                world_size=spec.learner.num_ranks,
                model=spec.model,
                learner=spec.learner,
                transport=spec.transport,
                engine_dtype=spec.engine_dtype,
                probes=spec.probes,
                nonce=spec.nonce,
                seed=spec.seed,
                cache_dir=spec.cache_dir,
                threads=spec.threads,
                node_id=ray.get_runtime_context().get_node_id(),
            )
        )

    def address(self) -> tuple[str, int]:
        """This node's address and a port that was free a moment ago."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def process(self) -> tuple[str, int, float, str]:
        """(node, process id, creation time), which name this process exactly, and the file that it writes its errors to."""
        return ray.get_runtime_context().get_node_id(), os.getpid(), psutil.Process().create_time(), os.readlink("/proc/self/fd/2")

    def call(self, method: str, *arguments: Any) -> Any:
        """One method of the rank."""
        with held(self._turns) if self._turns and method in COMPUTING else nullcontext():
            return getattr(self._rank, method)(*arguments)


class LearnerGroup:
    """``sgpo_dist.roles.Learner`` over Ray actors. Each method raises the rank's own SgpoError, or WorkerFault when a rank died or hung."""

    def __init__(self, spec: GroupSpec, workers: Callable[[], WorkersClient] | None = None) -> None:
        """``workers`` gives the client of the workers that are live now; only the device transports (nccl, ipc) need it."""
        self._spec = spec
        self._workers = workers
        self._linked: tuple[str, ...] = ()
        self._ranks: list[Any] = []
        self._processes: list[tuple[int, float]] = []
        self._logs: list[Path] = []
        self._files: dict[int, str] = {}
        self._is_lost = False

    async def start(self) -> None:
        """Bring up the ranks and let them meet; returns when they have. Harmless when they are up; lost ones are ended and replaced.

        Ranks whose port someone else took in between are replaced, ``PORT_ATTEMPTS`` times in all: their peers still wait there.
        """
        if self._is_lost:
            self._kill()
        for attempt in range(1, PORT_ATTEMPTS + 1):
            if self._ranks:
                return
            try:
                await self._bring_up()
            except EnvironmentProblem as problem:
                if attempt == PORT_ATTEMPTS or PORT_TAKEN not in str(problem):
                    raise

    async def _bring_up(self) -> None:
        options = _actor_options(self._spec)
        ranks = [ray.remote(RankHost).options(**options).remote(self._spec, rank) for rank in range(self._spec.learner.num_ranks)]
        self._ranks = ranks
        try:
            here = ray.get_runtime_context().get_node_id()
            processes = await _answers([rank.process.remote() for rank in ranks], START_TIMEOUT_S, "start")
            self._processes = [(pid, created) for node, pid, created, _ in processes if node == here]
            self._logs = [Path(log) for node, _, _, log in processes if node == here]
            host, port = (await _answers([ranks[0].address.remote()], START_TIMEOUT_S, "start"))[0]
            await _answers([rank.call.remote("connect", host, port) for rank in ranks], START_TIMEOUT_S, "start")
        except SgpoError:
            self._kill()
            raise

    async def begin_stage(self, stage: LearnerStage) -> None:
        """See roles.Learner."""
        await self.start()
        await self._call("begin_stage", stage)

    async def nll_step(self, step: int, batch: Sequence[TokenExample]) -> Metrics:
        """See roles.Learner."""
        return cast(Metrics, (await self._call("nll_step", step, list(batch)))[0])

    async def preference_step(self, step: int, batch: Sequence[PreferencePair], replay: Sequence[TokenExample] = ()) -> Metrics:
        """See roles.Learner."""
        return cast(Metrics, (await self._call("preference_step", step, list(batch), list(replay)))[0])

    async def refresh_reference(self, directory: str) -> None:
        """See roles.Learner."""
        await self._call("refresh_reference", directory)

    async def publish(self, version: int) -> WeightBundle:
        """See roles.Learner. Over a device transport the ranks first meet the workers that are new since the last version."""
        if self._spec.transport != SHM and self._workers is not None:
            await self._meet(self._workers())
        bundle = cast(WeightBundle, (await self._call("publish", version))[0])
        self._files[version] = bundle.uri
        return bundle

    async def retire(self, version: int) -> None:
        """See roles.Learner."""
        await self._call("retire", version)
        self._files.pop(version, None)

    async def _meet(self, client: WorkersClient) -> None:
        from learner.weight_sender import DeviceLink  # loads torch into the driver, so only where devices are

        if client.names == self._linked:
            return
        options: dict[str, Any] = {}
        if self._spec.transport == "nccl":
            host, port = (await self._asked([self._ranks[0].address.remote()], START_TIMEOUT_S, "address"))[0]
            options = {"master_address": host, "master_port": port, "world_size": 1 + client.num_ranks}
        await self.link(DeviceLink(client, options))
        self._linked = client.names

    async def link(self, link: Any) -> None:
        """How a device transport reaches the workers (``weight_sender.DeviceLink``)."""
        await self._call("link", link)

    async def logps(self, rows: Sequence[TokenExample]) -> list[float]:
        """See roles.Learner."""
        return cast(list[float], (await self._call("logps", list(rows)))[0])

    async def save(self, directory: str) -> None:
        """See roles.Learner."""
        await self._call("save", directory)

    async def load(self, directory: str) -> None:
        """See roles.Learner."""
        await self._call("load", directory)

    async def export(self, directory: str) -> None:
        """See roles.Learner."""
        await self._call("export", directory)

    async def stop(self) -> None:
        """End all ranks: politely for ``STOP_TIMEOUT_S``, then by force; by force at once when one is lost, and its files are removed."""
        calls = [] if self._is_lost else [asyncio.ensure_future(_settled(rank.call.remote("stop"))) for rank in self._ranks]
        if calls:
            _, silent = await asyncio.wait(calls, timeout=STOP_TIMEOUT_S)
            if not silent:
                self._processes = []  # they have gone in good order; Ray would report a signal from us as a crash
        self._kill()
        for file in filter(None, self._files.values()):
            Path(file).unlink(missing_ok=True)
        self._files = {}

    def _kill(self) -> None:
        """End all ranks now. Published files stay: a worker that starts meanwhile takes the newest version from there.

        On this machine they are also killed by number, which reaches a stopped process; Ray's own kill waits for it to answer.
        """
        for rank in self._ranks:
            ray.kill(rank)
        for pid, created in self._processes:
            kill_exactly(pid, created)
        self._ranks, self._processes, self._linked, self._is_lost = [], [], (), False

    async def _call(self, method: str, *arguments: Any) -> list[Any]:
        """The method on every rank at once; answers in rank order."""
        if not self._ranks:
            raise WorkerFault(ROLE, "it is not running; start it first")
        calls = [rank.call.remote(method, *arguments) for rank in self._ranks]
        return await self._asked(calls, self._spec.learner.step_timeout_s, method)

    async def _asked(self, calls: Sequence[Any], timeout_s: float, method: str) -> list[Any]:
        """The answers; a fault of one rank is remembered, because the others are of no use without it."""
        try:
            return await _answers(calls, timeout_s, method)
        except WorkerFault as problem:
            self._is_lost = True
            raise WorkerFault(problem.role, problem.reason + _said(self._logs)) from problem


async def _answers(calls: Sequence[Any], timeout_s: float, method: str) -> list[Any]:
    """All answers, or the first failure as one of our errors; a rank that says nothing for ``timeout_s`` counts as hung."""
    try:
        return list(await asyncio.wait_for(asyncio.gather(*calls), timeout_s))
    except TimeoutError:
        raise WorkerFault(
            ROLE, f"{method} took over {timeout_s:.0f} s; it hangs, waits for resources, or the limit is too short (learner.step_timeout_s)"
        ) from None
    except RayTaskError as problem:
        if isinstance(problem.cause, SgpoError):
            raise problem.cause from None
        raise WorkerFault(ROLE, f"{method} failed: {type(problem.cause).__name__}: {_first_line(problem.cause)}") from problem
    except RayError as problem:
        raise WorkerFault(ROLE, f"{method} failed: {_first_line(problem)}") from problem


def _said(logs: Sequence[Path]) -> str:
    """What the ranks' logs say of an error, each once; empty when they are elsewhere or say nothing."""
    texts = [log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:] for log in logs if log.is_file()]
    lines = dict.fromkeys(filter(None, map(telling_line, texts)))
    return LOG_FOLLOWS + one_line(" | ".join(lines)) if lines else ""


async def _settled(call: Any) -> None:
    """Waits for a call whose outcome no longer matters: the rank is being ended."""
    await asyncio.gather(call, return_exceptions=True)


def _actor_options(spec: GroupSpec) -> dict[str, Any]:
    """Ray's options of a rank: never restarted by Ray (a collective cannot be re-entered), threads and allocator pinned."""
    threads = str(spec.threads)
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **ALLOCATOR}
    if not spec.learner.gpus_per_rank:
        environment["DS_ACCELERATOR"] = "cpu"
    return {
        "num_cpus": spec.num_cpus,
        "num_gpus": spec.learner.gpus_per_rank,
        "max_restarts": 0,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": environment | dict(spec.environment)},
    }


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or ["no message"])[0]
