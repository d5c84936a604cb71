"""The roles as the story sees them: protocols, and the small values that cross between them.

``launch`` puts real parts behind these (Ray actors), tests put hand-written ones. All methods with ``async`` may cross a process
border: every caller bounds them with a deadline, and a part that died or hung raises WorkerFault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sgpo_dist.config import AgreementConfig, EndpointConfig, JudgeConfig
from sgpo_dist.records import Completion, FinishReason, Outcome, PreferencePair, Prompt, Refusal, Stage, TokenExample
from sgpo_dist.weights.version import ProbeRow, WeightBundle, WeightProof

Metrics = Mapping[str, float]


# ---- generation -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one role samples. ``top_k`` 0 means off; temperature 0 is greedy. ``max_new_tokens`` counts the end token."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One generation: token ids in, token ids out. ``request_id`` must be unique while it runs."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    seed: int


class Engine(Protocol):
    """What generates, inside a rollout worker. One file implements it on vLLM."""

    async def start(self) -> None:
        """Load the model; returns when ready to generate."""

    async def generate(self, request: GenerateRequest) -> Completion:
        """One completion, stamped with the oldest version that sampled any of its tokens."""

    async def receive(self, bundle: WeightBundle) -> WeightProof:
        """Take a version in flight: pause keeping requests, load, reset the prefix cache, prove, resume."""

    async def logps(self, rows: Sequence[ProbeRow]) -> tuple[tuple[float, ...], ...]:
        """Per-token log-probs (nats) of each row's completion under the live weights."""

    @property
    def version(self) -> int:
        """The version that new tokens are sampled from; -1 before the first proved version."""

    async def stop(self) -> None:
        """End the engine and its child processes."""


# ---- the buffer ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What a stage asks of the buffer.

    ``batch_size`` is in pairs, ``weight_sync_interval`` in steps. ``max_staleness`` (weight versions) bounds generation by
    capacity = (max_staleness + 1) * batch_size * weight_sync_interval pairs ahead of training; None = no bound (a stage that
    only collects). ``max_pairs`` ends the stage's generation once that many pairs exist (None = until prompts run out).
    """

    stage: Stage
    run_seed: int
    batch_size: int
    weight_sync_interval: int = 1
    max_staleness: int | None = None
    max_pairs: int | None = None
    samples_per_prompt: int = 1
    epochs: int = 1
    lease_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Lease:
    """A prompt handed to a worker until ``lease_s`` after its last renewal. ``version`` was current when it was granted."""

    uid: str
    stage: Stage
    prompt: Prompt
    epoch: int
    sample: int
    version: int
    attempt: int


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """Leases, and when there are none: ``exhausted`` tells whether the stage will never grant another."""

    leases: tuple[Lease, ...]
    exhausted: bool = False


@dataclass(frozen=True, slots=True)
class PutReceipt:
    """What became of the outcomes put: how many were new; the rest were known (idempotent) or came too late and were counted."""

    accepted: int
    duplicates: int
    late: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The recorded batch of one step. ``replayed`` tells that it was journalled by an earlier attempt at this step."""

    stage: Stage
    step: int
    pairs: tuple[PreferencePair, ...]
    version: int
    replayed: bool


@dataclass(frozen=True, slots=True)
class BufferCounts:
    """A consistent picture of one stage: rows by state, refusals by reason, and what bounds generation now."""

    waiting: int
    leased: int
    ready: int
    assigned: int
    trained: int
    refused: Mapping[str, int]
    capacity: int | None
    version: int
    duplicates: int
    late: int
    expired_leases: int
    returned_leases: int = 0  # given back by workers that ended
    stale: int = 0  # ready pairs that a driver ahead of lockstep made too old; their prompts wait again


class Buffer(Protocol):
    """The one truth about prompts, leases, pairs and which pairs a step trained on. ``incarnation`` fences off earlier writers."""

    async def open_stage(self, incarnation: int, plan: StagePlan, prompts: Sequence[Prompt], version: int) -> None:
        """Register the stage's prompts (idempotent: known uids stay as they are) and set the current version."""

    async def lease(self, incarnation: int, worker_id: str, stage: Stage, limit: int) -> LeaseGrant:
        """At most ``limit`` leases, and only as many as the staleness bound has room for."""

    async def renew(self, incarnation: int, worker_id: str, uids: Sequence[str]) -> int:
        """Heartbeat: extends the leases that the worker names; returns how many of them it still holds."""

    async def put(self, incarnation: int, worker_id: str, outcomes: Sequence[Outcome]) -> PutReceipt:
        """Store outcomes; returns when they are durable. Idempotent by uid."""

    async def give_back(self, incarnation: int, worker_id: str, *, crashed: bool = True) -> int:
        """Return all leases of a worker that ended; they are leased again in prompt order. ``crashed`` False holds nothing against them."""

    async def assign(self, incarnation: int, stage: Stage, step: int) -> Batch | None:
        """The batch of ``step`` (1-based), journalled before it is returned; None when the stage can never fill it.

        Waits until enough pairs are there, and until no older pair in flight would become too stale; a caller's deadline bounds it.
        """

    async def advance(self, incarnation: int, stage: Stage, version: int) -> None:
        """``version`` is now current on every worker: frees room."""

    async def commit(self, incarnation: int, stage: Stage, step: int) -> int:
        """A checkpoint holds everything up to ``step``: those rows are trained. Returns how many changed."""

    async def restore(self, incarnation: int, stage: Stage, step: int) -> int:
        """The run goes on from a checkpoint that holds everything up to ``step``: rows of later steps are assigned again, to be replayed."""

    async def pairs(self, stage: Stage) -> list[PreferencePair]:
        """All pairs of a stage in prompt order."""

    async def refusals(self, stage: Stage) -> list[Refusal]:
        """All refusals of a stage in prompt order."""

    async def wait_exhausted(self, stage: Stage) -> None:
        """Returns once every prompt of the stage has its outcome (or ``max_pairs`` is reached); a caller's deadline bounds it."""

    async def counts(self, stage: Stage) -> BufferCounts:
        """A consistent picture for people and metrics."""

    async def backup(self, path: str) -> None:
        """A consistent copy of the database at ``path``."""


# ---- the learner -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OptimiserPlan:
    """How a stage optimises. Steps are optimiser steps; lr warms up linearly over ``warmup_ratio`` then follows ``schedule``."""

    learning_rate: float
    total_steps: int
    warmup_ratio: float = 0.1
    schedule: str = "linear"  # linear | cosine | constant
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99


@dataclass(frozen=True, slots=True)
class LossPlan:
    """Which preference loss, and its numbers."""

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_coef: float = 0.0
    simpo_gamma: float = 0.5
    dpop_lambda: float = 5.0


@dataclass(frozen=True, slots=True)
class LearnerStage:
    """What the learner needs for a stage: where it starts from, and the frozen reference (None for NLL stages)."""

    stage: Stage
    model_dir: str
    optimiser: OptimiserPlan
    loss: LossPlan = field(default_factory=LossPlan)
    reference_dir: str | None = None
    packing: bool = False


class Learner(Protocol):
    """What differentiates. One to many ranks behind one face; it never drives and never knows a worker."""

    async def begin_stage(self, stage: LearnerStage) -> None:
        """Load the model fresh, build a new optimiser."""

    async def nll_step(self, step: int, batch: Sequence[TokenExample]) -> Metrics:
        """One optimiser step on mean weighted NLL over completion tokens; TRL's metric names."""

    async def preference_step(self, step: int, batch: Sequence[PreferencePair], replay: Sequence[TokenExample] = ()) -> Metrics:
        """One optimiser step on the stage's preference loss; reference log-probs are computed once per pair.

        ``replay`` rows add their mean NLL, weighted by their share ``len(replay) / len(batch)``.
        """

    async def refresh_reference(self, directory: str) -> None:
        """From now on the frozen reference is the model in ``directory``; cached reference log-probs are forgotten."""

    async def publish(self, version: int) -> WeightBundle:
        """Make the current weights ready to be received as ``version``, with the probe log-probs of the learner itself."""

    async def retire(self, version: int) -> None:
        """Free the bytes of a version that nobody will read any more."""

    async def logps(self, rows: Sequence[TokenExample]) -> list[float]:
        """Sum of completion log-probs (nats) a row under the current weights."""

    async def save(self, directory: str) -> None:
        """Write optimiser, weights and random state of every rank under ``directory``."""

    async def load(self, directory: str) -> None:
        """Read back what ``save`` wrote; raises CheckpointError when it cannot."""

    async def export(self, directory: str) -> None:
        """Write a Hugging Face model directory (safetensors, tokenizer)."""

    async def stop(self) -> None:
        """End all ranks."""


# ---- the fleet -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GenerationTask:
    """What workers do with leased prompts of ``stage``.

    ``refine_with``: "improver" (the model's own improver role) or a reviser's name (stage 1a); a mapping by the prompt's source may mix
    them, with key "default". ``pairs`` is who makes the halves (config.PreferenceConfig.pairs). With ``rungs`` > 1 a lease's sample number
    is chain * rungs + rung: rung r is the pair (refinement r + 1 > refinement r of that chain's response), and all rungs of a chain draw from
    the chain's seeds. ``agreement`` and ``edit_ratios`` (fences) refuse pairs; ``judge`` picks for pairs "judge", ``endpoint`` serves
    the reviser "openai".
    """

    stage: Stage
    incarnation: int
    policy: Sampling
    improver: Sampling
    refine_with: Mapping[str, str]
    repair: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    pairs: str = "improver"
    rungs: int = 1
    agreement: AgreementConfig = field(default_factory=AgreementConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    edit_ratios: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """Counters of one worker since it started."""

    worker_id: str
    version: int
    in_flight: int
    pairs: int
    refusals: int
    generated_tokens: int
    idle_s: float
    rss_bytes: int


class Fleet(Protocol):
    """The rollout workers as one: supervised, replaceable, all on the current version before they lease."""

    async def start(self, count: int) -> None:
        """Bring up ``count`` workers; returns when all of them can generate."""

    async def begin(self, task: GenerationTask) -> None:
        """Workers start leasing prompts of the task's stage."""

    async def end(self) -> None:
        """Workers stop leasing, give back what they hold and idle."""

    async def publish(self, bundle: WeightBundle) -> list[WeightProof]:
        """Every live worker takes and proves the version; one that fails is rebuilt. A late starter gets it before its first lease."""

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Completions in request order, spread over the workers (evaluation)."""

    async def supervise(self) -> None:
        """Watches heartbeats, replaces workers with back-off; returns only by raising (crash loop) or cancellation."""

    async def stats(self) -> list[WorkerStats]:
        """One row a live worker."""

    async def stop(self) -> None:
        """End all workers and their engine children."""


__all__ = [
    "Batch",
    "Buffer",
    "BufferCounts",
    "Engine",
    "FinishReason",
    "Fleet",
    "GenerateRequest",
    "GenerationTask",
    "Learner",
    "LearnerStage",
    "Lease",
    "LeaseGrant",
    "LossPlan",
    "Metrics",
    "OptimiserPlan",
    "PutReceipt",
    "Sampling",
    "StagePlan",
    "WorkerStats",
]
