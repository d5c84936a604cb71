"""Engines and a learner that only take time, and the fleet between them: what ``scale`` puts behind the real roles.

The engine decodes as ``cost_model`` says an engine does: all its sequences share steps, a step lasts longer the more there are, a prefill
and a sync stop everything. Lengths are drawn by the request's own seed. Texts are short; only their token counts are as long as asked for.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any, Final

from actors.rollout import RolloutSettings, RolloutWorker
from sgpo_dist.config import PairGateConfig
from sgpo_dist.cost_model import EngineRates, Rates, Workload
from sgpo_dist.pair_gate import make_outcome
from sgpo_dist.records import Completion, FinishReason, Outcome, PreferencePair, Prompt
from sgpo_dist.roles import Buffer, GenerateRequest, GenerationTask, LearnerStage, Lease, Metrics, Sampling, WorkerStats
from sgpo_dist.weights.version import ProbeRow, WeightBundle, WeightProof

WORDS: Final = ("tea", "coffee", "water", "milk", "juice", "wine", "beer", "cider")
ALMOST: Final = 1e-6
PROBE: Final = ((-1.0,),)
GATE: Final = PairGateConfig()


@dataclass(frozen=True, slots=True)
class Lengths:
    """Completions are ``spread`` shorter or longer than their mean at most, evenly drawn; 0 = all as long."""

    spread: float

    def draw(self, mean: float, seed: int) -> int:
        """Tokens of one completion."""
        return max(1, round(mean * (1 + self.spread * Random(seed).uniform(-1, 1))))

    def tail(self, pairs: int) -> float:
        """The slowest of so many pairs by the mean one, where both halves have one mean: their mean m has P(m > 1 + x) = (1 - x / spread)^2 / 2."""
        return 1 + self.spread * max(0.0, 1 - (2 / pairs) ** 0.5)


class ScriptedEngine:
    """``actors.rollout.LiveEngine`` in virtual time. ``tokens`` counts how far each of its sequences has come since it began to run."""

    def __init__(self, worker_id: str, rates: EngineRates, stall_s: float, lengths: Lengths) -> None:
        self._worker_id = worker_id
        self._rates = rates
        self._stall_s = stall_s
        self._lengths = lengths
        self._loop = asyncio.get_running_loop()
        self._running: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = count()
        self._tokens = 0.0
        self._seen_at = self._free_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self.version = -1

    async def start(self) -> None:
        """It is always ready."""

    async def check(self) -> None:
        """It never dies."""

    async def stop(self) -> None:
        """It has no processes."""

    async def logps(self, rows: Sequence[ProbeRow]) -> tuple[tuple[float, ...], ...]:
        """Nobody asks."""
        return ()

    async def generate(self, request: GenerateRequest) -> Completion:
        """Seconds by the token clock; a text of a few words that names its length."""
        tokens = self._lengths.draw(request.sampling.max_new_tokens, request.seed)
        version, done = self.version, self._loop.create_future()
        self._advance()
        self._free_at = max(self._loop.time(), self._free_at) + len(request.prompt_ids) / self._rates.prefill_tokens_per_s
        heapq.heappush(self._running, (self._tokens + tokens, next(self._numbers), done))
        self._reschedule()
        await done
        draw = Random(request.seed)
        text = f"{' '.join(draw.choices(WORDS, k=8))} {tokens}"
        return Completion(text, (7,) * tokens, FinishReason.STOP, version)

    async def receive(self, bundle: WeightBundle) -> WeightProof:
        """Stand still for the stall, then hold the new version."""
        self._advance()
        self._free_at = max(self._loop.time(), self._free_at) + self._stall_s
        self._reschedule()
        await asyncio.sleep(self._stall_s)
        self.version = bundle.version
        return WeightProof(self._worker_id, bundle.version, bundle.checksum, PROBE, self._stall_s, self._stall_s)

    def _advance(self) -> None:
        now = self._loop.time()
        self._tokens += max(0.0, now - max(self._seen_at, self._free_at)) / self._rates.step_s(max(len(self._running), 1))
        self._seen_at = now

    def _reschedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running:
            left = self._running[0][0] - self._tokens
            begins = max(self._loop.time(), self._free_at)
            self._timer = self._loop.call_at(begins + max(left, 0.0) * self._rates.step_s(len(self._running)), self._finish)

    def _finish(self) -> None:
        self._advance()
        while self._running and self._running[0][0] <= self._tokens + ALMOST:
            done = heapq.heappop(self._running)[2]
            if not done.done():
                done.set_result(None)
        self._reschedule()


@dataclass(frozen=True, slots=True)
class ScriptedBook:
    """Prompts as long as the workload's, in tokens; a draft says how long it is."""

    load: Workload
    improver_template: str = "improver.v1"
    reviser_template: str = "reviser.v1"

    def policy_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """P tokens."""
        return (1,) * round(self.load.prompt)

    def improver_ids(self, prompt: Prompt, draft: str) -> tuple[int, ...]:
        """P + C + I tokens."""
        return (1,) * (round(self.load.prompt + self.load.instruction) + int(draft.split()[-1]))

    def unwrapped(self, refinement: Completion, draft: str) -> Completion:
        """The scripted engine wraps nothing."""
        return refinement


@dataclass(slots=True)
class ScriptedLearner:
    """``roles.Learner`` for the preference stage. A step takes its tokens by the rate; ``busy_s`` adds the steps up, ``ends`` when they ended."""

    load: Workload
    rates: Rates
    busy_s: float = 0.0
    ends: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)

    async def begin_stage(self, stage: LearnerStage) -> None:
        """Nothing to load."""

    async def preference_step(self, step: int, batch: Sequence[PreferencePair], replay: Sequence[Any] = ()) -> Metrics:
        """The prompt once, both halves."""
        tokens = sum(len(pair.prompt_ids) + len(pair.response.token_ids) + len(pair.refinement.token_ids) for pair in batch)
        seconds = tokens / self.rates.learner_tokens_per_s
        await asyncio.sleep(seconds)
        self.busy_s += seconds
        self.steps_s.append(seconds)
        self.ends.append(asyncio.get_running_loop().time())
        return {"loss": 0.5, "rewards/chosen": 0.0, "rewards/rejected": 0.0, "perf/tokens": float(tokens)}

    async def publish(self, version: int) -> WeightBundle:
        """What the learner's part of a sync takes beyond the engines' stall."""
        await asyncio.sleep(self.rates.sync_s - self.rates.stall_s)
        return WeightBundle(version, "none", "", "", "0" * 32, 0, (), PROBE)

    async def retire(self, version: int) -> None:
        """Nothing to free."""


@dataclass(slots=True)
class ScriptedFleet:
    """``roles.Fleet`` of real RolloutWorkers in this process."""

    workers: list[RolloutWorker]

    async def stats(self) -> list[WorkerStats]:
        """Nobody asks for heartbeats here."""
        return []

    async def begin(self, task: GenerationTask) -> None:
        """All at once."""
        await asyncio.gather(*(worker.begin(task) for worker in self.workers))

    async def end(self) -> None:
        """All at once."""
        await asyncio.gather(*(worker.end() for worker in self.workers))

    async def publish(self, bundle: WeightBundle) -> list[WeightProof]:
        """All at once, as the real fleet does."""
        return list(await asyncio.gather(*(worker.receive(bundle) for worker in self.workers)))


class SilentRecorder:
    """``recorder.Recorder`` of which nothing is kept but each step's staleness."""

    def __init__(self) -> None:
        self.staleness: list[float] = []

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Remember how old the oldest pair was."""
        self.staleness.append(metrics["staleness"])

    def event(self, kind: str, **fields: Any) -> None:
        """Nobody reads them."""

    def message(self, text: str) -> None:
        """Nobody reads them."""

    def status(self, **fields: Any) -> None:
        """Nobody reads it."""


def scripted_worker(name: str, load: Workload, rates: Rates, lengths: Lengths, buffer: Buffer, clock: Callable[[], float]) -> RolloutWorker:
    """The real worker on a scripted engine."""
    settings = RolloutSettings(name, max_model_len=2**20, tolerance=1e-3, concurrency=load.concurrency)
    engine, book = ScriptedEngine(name, rates.engine, rates.stall_s, lengths), ScriptedBook(load)
    return RolloutWorker(settings, engine, buffer, book, gated, _die, clock=clock)  # type: ignore[arg-type]


def gated(lease: Lease, prompt_ids: tuple[int, ...], response: Completion, refinement: Completion | None, template: str) -> Outcome:
    """The real gate with its defaults."""
    return make_outcome(lease, prompt_ids, response, refinement, template, GATE)


def sampling(tokens: float) -> Sampling:
    """The scripted engine reads the mean length from the limit."""
    return Sampling(0.8, 1.0, 0, round(tokens))


def _die(reason: str) -> None:
    raise RuntimeError(f"a scripted worker ended itself: {reason}")
