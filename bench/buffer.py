"""How many pairs a second the buffer takes, and what the framework costs a pair (goal C13).

``python -m bench buffer``. The ceiling: the buffer's real Ray actor, made as ``launch`` makes it, SQLite with synchronous=FULL on this disk, and
clients in processes of their own that put pairs of about 5 KB; a put counts once it is acknowledged. The tax: CPU seconds of a real RolloutWorker
a pair with an engine that answers at once, templates, tokenizer and gate included, with the buffer in the same process.
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any, Final

import ray

from actors.handles import RemoteBuffer
from actors.rollout import RolloutSettings, RolloutWorker
from bench.scale import LEAST_RANKS, QWEN_LOAD, QWEN_RATES
from bench.scripted import SilentRecorder, gated, sampling
from sgpo_dist.buffer.service import PairBuffer
from sgpo_dist.data.embedded_model import embedded_model_dir
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Stage
from sgpo_dist.roles import GenerateRequest, GenerationTask, Lease, StagePlan

STAGE: Final = Stage.PREFERENCE
CLIENTS: Final = 3
IN_FLIGHT: Final = 16
TEXT: Final = "A sentence of an answer, as long as they are. " * 25
IDS: Final = tuple(range(1000, 1300))
LEAST_PAIRS_PER_S: Final = 5000.0
MOST_TAX: Final = 0.02


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Pairs a second over all clients; seconds of a put's acknowledgement."""

    pairs_per_s: float
    p50_s: float
    p99_s: float


class Client:
    """Puts leased prompts as pairs, ``together`` in a call, ``IN_FLIGHT`` calls at once. A Ray actor."""

    def __init__(self, name: str, handle: Any) -> None:
        self._name = name
        self._buffer = RemoteBuffer(handle)
        self._groups: list[list[PreferencePair]] = []

    async def prepare(self, incarnation: int, pairs: int, together: int) -> None:
        """Lease and make all pairs before anything is timed."""
        leases: list[Lease] = []
        while len(leases) < pairs:
            leases += (await self._buffer.lease(incarnation, self._name, STAGE, pairs - len(leases))).leases
        made = [_pair(lease) for lease in leases]
        self._groups = [made[start : start + together] for start in range(0, pairs, together)]

    async def run(self, incarnation: int) -> list[float]:
        """Seconds of each put."""
        took: list[float] = []

        async def lane() -> None:
            while self._groups:
                group = self._groups.pop()
                began = time.perf_counter()
                await self._buffer.put(incarnation, self._name, group)
                took.append(time.perf_counter() - began)

        await asyncio.gather(*(lane() for _ in range(IN_FLIGHT)))
        return took


def _pair(lease: Lease) -> PreferencePair:
    response = Completion(TEXT, IDS, FinishReason.STOP, lease.version)
    refinement = Completion(TEXT + "better", IDS, FinishReason.STOP, lease.version)
    return PreferencePair(lease.uid, STAGE, lease.prompt, IDS[:100], response, refinement, "improver.v1")


def ceiling(pairs: int, together: int) -> Ceiling:
    """``pairs`` a client through a fresh actor; Ray must be up."""
    with TemporaryDirectory() as place:
        actor = ray.remote(PairBuffer).options(num_cpus=0, max_restarts=0, max_concurrency=1000).remote(str(Path(place) / "buffer.db"))
        clients = [ray.remote(Client).options(num_cpus=0, max_concurrency=64).remote(f"w{n}", actor) for n in range(CLIENTS)]
        prompts = tuple(Prompt(f"p{n}", (Message("user", f"question {n} {TEXT[:300]}"),)) for n in range(CLIENTS * pairs))
        incarnation = ray.get(actor.begin_incarnation.remote(), timeout=60)
        ray.get(actor.open_stage.remote(incarnation, StagePlan(STAGE, 7, batch_size=8), prompts, 0), timeout=60)
        ray.get([client.prepare.remote(incarnation, pairs, together) for client in clients], timeout=120)
        began = time.perf_counter()
        took = [seconds for part in ray.get([client.run.remote(incarnation) for client in clients], timeout=120) for seconds in part]
        seconds = time.perf_counter() - began
        for one in (*clients, actor):
            ray.kill(one)
    return Ceiling(CLIENTS * pairs / seconds, median(took), quantiles(took, n=100)[98])


# ---- the tax -----------------------------------------------------------------------------------------------------------------------


class FreeEngine:
    """``actors.rollout.LiveEngine`` that answers at once."""

    version = 0

    async def generate(self, request: GenerateRequest) -> Completion:
        """Two texts that differ by the seed."""
        return Completion(f"{TEXT}{request.seed} {request.seed + 1} {request.seed + 2}", IDS, FinishReason.STOP, 0)

    async def logps(self, rows: Any) -> tuple[tuple[float, ...], ...]:
        """Nobody asks."""
        return ()

    async def start(self) -> None:
        """It is always ready."""

    async def check(self) -> None:
        """It never dies."""

    async def stop(self) -> None:
        """It has no processes."""


def worker_seconds(pairs: int) -> float:
    """CPU seconds a pair of everything around the engine."""
    book = PromptBook(load_tokenizer(embedded_model_dir()))
    with TemporaryDirectory() as place:
        return asyncio.run(_walk_all(pairs, book, Path(place)))


async def _walk_all(pairs: int, book: PromptBook, place: Path) -> float:
    buffer = PairBuffer(place / "buffer.db")
    incarnation = await buffer.begin_incarnation()
    prompts = tuple(Prompt(f"p{n}", (Message("user", f"question {n} {TEXT[:300]}"),)) for n in range(pairs))
    await buffer.open_stage(incarnation, StagePlan(STAGE, 7, batch_size=8), prompts, 0)
    worker = RolloutWorker(RolloutSettings("w0", 4096, 1e-3), FreeEngine(), buffer, book, gated, SilentRecorder().message)  # type: ignore[arg-type]
    task = GenerationTask(STAGE, incarnation, sampling(384), sampling(384), {"default": "improver"})
    began = time.process_time()
    await worker.begin(task)
    await buffer.wait_exhausted(STAGE)
    took = time.process_time() - began
    counts = await buffer.counts(STAGE)
    await worker.end()
    await buffer.close()
    if counts.ready != pairs:
        raise RuntimeError(f"{counts.ready} of {pairs} prompts gave a pair: {dict(counts.refused)}")
    return took / pairs


# ---- the part ----------------------------------------------------------------------------------------------------------------------


def measure(quick: bool) -> list[str]:
    """Remarks: the ceiling by pairs a call, and the tax. Below the goal is said, not failed: it depends on the machine's cores and disk."""
    remarks = []
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=100 * 2**20)
    try:
        for together in (1, 8, 32):
            found = ceiling(960 if quick else 2880, together)
            remarks.append(
                f"buffer, {together} pairs a put, {CLIENTS} clients with {IN_FLIGHT} puts in flight each: {found.pairs_per_s:,.0f} pairs/s"
                f" (goal {LEAST_PAIRS_PER_S:,.0f}), acknowledged in {1e3 * found.p50_s:.1f} ms (p50), {1e3 * found.p99_s:.1f} ms (p99)"
            )
    finally:
        ray.shutdown()
    return [*remarks, tax_line(worker_seconds(300 if quick else 1000))]


def tax_line(own_s: float) -> str:
    """The worker's own seconds a pair beside an engine's: Qwen2.5-7B on an H100 by the rates of ``scale``."""
    engine = QWEN_RATES(LEAST_RANKS).engine.prompt_s(QWEN_LOAD, QWEN_LOAD.concurrency)
    return (
        f"framework tax: {1e3 * own_s:.2f} ms of CPU a pair around the engine, worker and buffer together: {own_s / engine:.1%} of the"
        f" {1e3 * engine:.0f} ms that a 7B engine on an H100 is assumed to take (goal {MOST_TAX:.0%}), {own_s / 2.0:.2%} of 2 s, about a pair's"
        " time on two CPU cores"
    )


if __name__ == "__main__":
    print("\n".join(measure("--quick" in sys.argv)))
