"""The rollout worker with a hand-written engine, buffer and book: what it asks, what it puts, and when it gives up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from actors.rollout import RolloutSettings, RolloutWorker
from sgpo_dist.config import AgreementConfig, JudgeConfig
from sgpo_dist.errors import ConfigError, DataError, FencedError, WeightSyncError, WorkerFault
from sgpo_dist.records import Completion, FinishReason, Message, Outcome, PreferencePair, Prompt, Refusal, RefusalReason, Role, Stage, sampling_seed
from sgpo_dist.roles import GenerateRequest, GenerationTask, Lease, LeaseGrant, PutReceipt, Sampling
from sgpo_dist.weights.version import ProbeRow, WeightBundle, WeightProof

POLICY = Sampling(0.8, 0.9, 0, 20)
IMPROVER = Sampling(0.5, 1.0, 0, 30)


def lease(name: str, source: str = "user", reference: str | None = None) -> Lease:
    prompt = Prompt(name, (Message("user", name),), reference, source)
    return Lease(f"uid-{name}", Stage.PREFERENCE, prompt, 0, 0, version=0, attempt=1)


@dataclass
class FakeEngine:
    """Answers 'text <number of prompt tokens>' at once, or when ``gate`` is set; ``faults`` are raised instead."""

    version: int = 0
    asked: list[GenerateRequest] = field(default_factory=list)
    gate: asyncio.Event | None = None
    fault: Exception | None = None
    gap: float = 0.0
    text: str = "text"
    receiving: asyncio.Event | None = None
    running: int = 0
    most: int = 0

    async def start(self) -> None: ...

    async def generate(self, request: GenerateRequest) -> Completion:
        self.asked.append(request)
        if self.fault is not None:
            raise self.fault
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self.running -= 1
        return Completion(f"{self.text} {len(request.prompt_ids)}".strip(), (7, 8, 9), FinishReason.STOP, self.version)

    async def receive(self, bundle: WeightBundle) -> WeightProof:
        if self.receiving is not None:
            await self.receiving.wait()
        self.version = bundle.version
        return WeightProof("w", bundle.version, bundle.checksum, ((-1.0 + self.gap,),), 0.1, 0.2)

    async def logps(self, rows: Sequence[ProbeRow]) -> tuple[tuple[float, ...], ...]:
        raise WorkerFault("engine", "died while it scored")

    async def check(self) -> None:
        if self.fault is not None:
            raise self.fault

    async def stop(self) -> None: ...


@dataclass
class FakeBuffer:
    """Hands out ``left`` in order and remembers what comes back."""

    left: list[Lease]
    put_groups: list[list[Outcome]] = field(default_factory=list)
    given_back: list[bool] = field(default_factory=list)
    renewed: list[tuple[str, ...]] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    fault: Exception | None = None

    async def lease(self, incarnation: int, worker_id: str, stage: Stage, limit: int) -> LeaseGrant:
        self.limits.append(limit)
        granted, self.left = self.left[:limit], self.left[limit:]
        return LeaseGrant(tuple(granted), exhausted=not granted)

    async def put(self, incarnation: int, worker_id: str, outcomes: Sequence[Outcome]) -> PutReceipt:
        if self.fault is not None:
            raise self.fault
        self.put_groups.append(list(outcomes))
        return PutReceipt(len(outcomes), 0, 0)

    async def renew(self, incarnation: int, worker_id: str, uids: Sequence[str]) -> int:
        self.renewed.append(tuple(sorted(uids)))
        return 0

    async def give_back(self, incarnation: int, worker_id: str, *, crashed: bool = True) -> int:
        self.given_back.append(crashed)
        return 0

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for group in self.put_groups for outcome in group]


class FakeBook:
    """One token a character."""

    improver_template = "improver.v1"
    reviser_template = "reviser.v1"

    def policy_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(range(len(prompt.text)))

    def improver_ids(self, prompt: Prompt, draft: str) -> tuple[int, ...]:
        return tuple(range(len(prompt.text) + len(draft)))

    def revise_ids(self, prompt: Prompt, draft: str, reference: str) -> tuple[int, ...]:
        return tuple(range(len(prompt.text) + len(draft) + len(reference)))

    def completion_ids(self, text: str) -> tuple[int, ...]:
        return (*range(len(text)), 99)

    def written(self, text: str, version: int) -> Completion:
        return Completion(text, self.completion_ids(text), FinishReason.STOP, version)

    def unwrapped(self, refinement: Completion, draft: str) -> Completion:
        return refinement


def always_a_pair(lease: Lease, prompt_ids: tuple[int, ...], response: Completion, refinement: Completion | None, template: str) -> Outcome:
    if refinement is None:
        return Refusal(lease.uid, lease.stage, lease.prompt.prompt_id, RefusalReason.NOTHING_TO_REPAIR, template, response)
    return PreferencePair(lease.uid, lease.stage, lease.prompt, prompt_ids, response, refinement, template)


class FakeJudge:
    """Always prefers the second."""

    async def prefer(self, prompt: Prompt, a: str, b: str) -> int:
        return -1


@dataclass
class World:
    worker: RolloutWorker
    engine: FakeEngine
    buffer: FakeBuffer
    deaths: list[str]
    judges: list[JudgeConfig]

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(2):
            while not done():
                await asyncio.sleep(0.002)


def task(**changes: Any) -> GenerationTask:
    values: dict[str, Any] = {"refine_with": {"default": "improver"}} | changes
    return GenerationTask(Stage.PREFERENCE, 3, POLICY, IMPROVER, **values)


def world(leases: Sequence[Lease], concurrency: int = 4, max_model_len: int = 100, lease_s: float = 60.0) -> World:
    engine, buffer, deaths = FakeEngine(), FakeBuffer(list(leases)), list[str]()
    settings = RolloutSettings("w", max_model_len, tolerance=0.01, concurrency=concurrency, lease_s=lease_s, poll_s=0.01, gather_s=0.005)
    judges = list[JudgeConfig]()

    def make_judge(config: JudgeConfig, environ: Mapping[str, str], seed: int) -> FakeJudge:
        judges.append(config)
        return FakeJudge()

    worker = RolloutWorker(settings, engine, buffer, FakeBook(), always_a_pair, deaths.append, make_judge=make_judge)
    return World(worker, engine, buffer, deaths, judges)


def play(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work, 5)

    asyncio.run(bounded())


def test_a_prompt_walks_from_answer_over_refinement_to_the_buffer() -> None:
    async def story() -> None:
        w = world([lease("hello")])
        w.engine.version = 4
        await w.worker.begin(task())
        await w.until(lambda: bool(w.buffer.outcomes))
        policy, improver = w.engine.asked
        assert policy == GenerateRequest("uid-hello-policy-1", tuple(range(5)), POLICY, sampling_seed("uid-hello", Role.POLICY))
        assert improver.prompt_ids == tuple(range(len("hello") + len("text 5")))
        assert (improver.sampling, improver.seed) == (IMPROVER, sampling_seed("uid-hello", Role.IMPROVER))
        [pair] = w.buffer.outcomes
        assert isinstance(pair, PreferencePair)
        assert (pair.prompt_ids, pair.response.text, pair.refinement.text) == (tuple(range(5)), "text 5", "text 11")
        assert (pair.version, pair.template) == (4, "improver.v1")
        stats = await w.worker.heartbeat()
        assert (stats.pairs, stats.refusals, stats.generated_tokens, stats.version, stats.in_flight) == (1, 0, 6, 4, 0)
        assert stats.rss_bytes > 1_000_000

    play(story())


def test_never_more_prompts_in_flight_than_concurrency_and_outcomes_travel_in_groups() -> None:
    async def story() -> None:
        w = world([lease(f"p{i}") for i in range(10)], concurrency=4)
        w.engine.gate = asyncio.Event()
        await w.worker.begin(task())
        await w.until(lambda: w.engine.running == 4)
        await asyncio.sleep(0.03)
        assert (w.engine.most, len(w.buffer.left), w.buffer.limits[0]) == (4, 6, 4)
        w.engine.gate.set()
        await w.until(lambda: len(w.buffer.outcomes) == 10)
        assert w.engine.most == 4
        assert max(len(group) for group in w.buffer.put_groups) > 1

    play(story())


def test_a_prompt_without_room_is_refused_and_one_with_little_room_is_cut() -> None:
    async def story() -> None:
        w = world([lease("x" * 93), lease("y" * 85), lease("z" * 10)], max_model_len=100)
        await w.worker.begin(task())
        await w.until(lambda: len(w.buffer.outcomes) == 3)
        by_uid = {outcome.uid[4]: outcome for outcome in w.buffer.outcomes}
        refused = by_uid["x"]  # 7 tokens of room
        assert isinstance(refused, Refusal)
        assert (refused.reason, refused.detail) == (RefusalReason.PROMPT_TOO_LONG, "the prompt has 93 tokens")
        tight = by_uid["y"]  # 15 for the response, then 85 + 7 characters leave 8 for the refinement
        assert isinstance(tight, PreferencePair)
        assert sorted(request.sampling.max_new_tokens for request in w.engine.asked if "uid-y" in request.request_id) == [8, 15]

    play(story())


def test_an_empty_answer_is_refused_without_asking_for_a_rewrite() -> None:
    async def story() -> None:
        w = world([lease("hello")])

        async def nothing(request: GenerateRequest) -> Completion:
            w.engine.asked.append(request)
            return Completion("  ", (9,), FinishReason.STOP, 0)

        w.engine.generate = nothing  # type: ignore[method-assign]
        await w.worker.begin(task())
        await w.until(lambda: bool(w.buffer.outcomes))
        [refusal] = w.buffer.outcomes
        assert isinstance(refusal, Refusal)
        assert (refusal.reason, len(w.engine.asked)) == (RefusalReason.EMPTY, 1)

    play(story())


def test_revisers_by_source_write_with_their_own_ids_and_the_reviser_self_asks_the_model() -> None:
    async def story() -> None:
        w = world([lease("tidy me"), lease("ask", "chat", reference="gold"), lease("bare", "chat")])
        w.engine.text = "One sentence. An unfinished"
        await w.worker.begin(task(refine_with={"default": "tidy", "chat": "self"}))
        await w.until(lambda: len(w.buffer.outcomes) == 3)
        found = {outcome.uid: outcome for outcome in w.buffer.outcomes}
        tidy, own, bare = found["uid-tidy me"], found["uid-ask"], found["uid-bare"]
        assert isinstance(tidy, PreferencePair)
        assert (tidy.refinement.text, tidy.template) == ("One sentence. An unfinished 7.", "tidy")
        assert tidy.refinement.token_ids == (*range(30), 99)
        assert tidy.refinement.finish_reason is FinishReason.STOP
        assert isinstance(own, PreferencePair)
        assert own.template == "reviser.v1"
        assert isinstance(bare, Refusal)  # no reference: nothing to revise with
        assert bare.reason is RefusalReason.NOTHING_TO_REPAIR
        roles = sorted(request.request_id for request in w.engine.asked)
        assert roles == ["uid-ask-improver-1", "uid-ask-policy-1", "uid-bare-policy-1", "uid-tidy me-policy-1"]

    play(story())


def test_one_judge_serves_all_prompts_of_a_task() -> None:
    async def story() -> None:
        w = world([lease("a"), lease("b")])
        plain = w.engine.generate

        async def numbered(request: GenerateRequest) -> Completion:
            answer = await plain(request)
            return replace(answer, text=f"text {len(w.engine.asked)}")

        w.engine.generate = numbered  # type: ignore[method-assign]
        config = JudgeConfig(kind="scorer", scorer="m:f")
        await w.worker.begin(task(pairs="judge", judge=config))
        await w.until(lambda: len(w.buffer.outcomes) == 2)
        assert all(isinstance(outcome, PreferencePair) for outcome in w.buffer.outcomes)
        assert w.judges == [config]
        await w.worker.begin(task())
        assert w.judges == [config]

    play(story())


def test_draws_that_vote_count_as_generated_tokens() -> None:
    async def story() -> None:
        w = world([lease("hello")])
        await w.worker.begin(task(agreement=AgreementConfig(draws=1, margin=1)))  # fresh draws are the pair's own texts: one vote each
        await w.until(lambda: bool(w.buffer.outcomes))
        [refusal] = w.buffer.outcomes
        assert isinstance(refusal, Refusal)
        assert (refusal.reason, refusal.detail) == (RefusalReason.DISAGREEMENT, "margin +0 of +1: 1 for, 1 against, 0 for neither")
        stats = await w.worker.heartbeat()
        assert (stats.pairs, stats.refusals, stats.generated_tokens) == (0, 1, 4 * 3)

    play(story())


def test_an_engine_that_dies_while_it_scores_ends_the_process() -> None:
    async def story() -> None:
        w = world([lease("hello")])
        await w.worker.begin(task(agreement=AgreementConfig(draws=1, vote="likelihood")))
        await w.until(lambda: bool(w.deaths))
        assert set(w.deaths) == {"engine: died while it scored"}

    play(story())


def test_a_reviser_that_cannot_be_had_is_told_at_once_and_nothing_is_leased() -> None:
    async def story() -> None:
        w = world([lease("hello")])
        with pytest.raises(ConfigError, match=r"improver\.repair"):
            await w.worker.begin(task(refine_with={"default": "repair"}, repair="no_such_module:function"))
        await w.worker.end()
        assert (w.buffer.limits, w.buffer.given_back) == ([], [])

    play(story())


def bundle(version: int) -> WeightBundle:
    return WeightBundle(version, "shm", "", "node", "sum", 0, (), ((-1.0,),))


@pytest.mark.fault(19, invariants="I3")
def test_nothing_is_put_between_new_bytes_and_their_proof() -> None:
    async def story() -> None:
        w = world([lease("hello")])
        w.engine.receiving = asyncio.Event()
        receiving = asyncio.create_task(w.worker.receive(bundle(1)))
        await asyncio.sleep(0)
        await w.worker.begin(task())
        await w.until(lambda: len(w.engine.asked) == 2)
        await asyncio.sleep(0.03)
        assert w.buffer.outcomes == []
        w.engine.receiving.set()
        assert (await receiving).version == 1
        await w.until(lambda: len(w.buffer.outcomes) == 1)

    play(story())


@pytest.mark.fault(19, invariants="I3")
def test_a_worker_that_cannot_prove_its_weights_puts_nothing_any_more() -> None:
    async def story() -> None:
        w = world([lease("hello")])
        w.engine.gap = 0.02
        with pytest.raises(WeightSyncError, match="computes other log-probs"):
            await w.worker.receive(bundle(1))
        await w.worker.begin(task())
        await w.until(lambda: len(w.engine.asked) == 2)
        await asyncio.sleep(0.03)
        assert w.buffer.outcomes == []

    play(story())


@pytest.mark.fault(4, invariants="I7")
def test_a_dead_engine_ends_the_process() -> None:
    async def story() -> None:
        w = world([lease("hello")])
        w.engine.fault = WorkerFault("engine", "vLLM's engine process died")
        await w.worker.begin(task())
        await w.until(lambda: bool(w.deaths))
        assert set(w.deaths) == {"engine: vLLM's engine process died"}
        assert w.buffer.outcomes == []
        w.deaths.clear()
        with pytest.raises((WorkerFault,)):
            await w.worker.heartbeat()

    play(story())


def test_the_end_of_a_task_drops_what_flies_keeps_what_is_made_and_blames_nobody() -> None:
    async def story() -> None:
        w = world([lease("a"), lease("b")])
        w.engine.gate = asyncio.Event()
        await w.worker.begin(task())
        await w.until(lambda: w.engine.running == 2)
        await w.worker.end()
        assert (w.engine.running, w.buffer.outcomes, w.buffer.given_back) == (0, [], [False])
        asked = len(w.buffer.limits)
        await asyncio.sleep(0.05)
        assert len(w.buffer.limits) == asked  # it leases no more
        await w.worker.end()
        assert w.buffer.given_back == [False]

    play(story())


def test_bad_data_reaches_the_fleet_with_the_next_heartbeat_and_kills_nothing() -> None:
    async def story() -> None:
        w = world([lease("hello")])
        await w.worker.begin(task(refine_with={"default": "repair"}, repair=f"{__name__}:failing_repair"))
        await w.until(lambda: len(w.engine.asked) == 1)
        await asyncio.sleep(0.05)
        with pytest.raises(DataError, match="on prompt 'hello' failed: ValueError: no"):
            await w.worker.heartbeat()
        assert w.deaths == []

    play(story())


def failing_repair(draft: str, reference: str | None, prompt: str) -> str:
    raise ValueError("no")


@pytest.mark.fault(3, invariants="I2")
def test_a_fenced_worker_says_so() -> None:
    async def story() -> None:
        w = world([lease("hello")])
        w.buffer.fault = FencedError("incarnation 3 is fenced off")
        await w.worker.begin(task())
        await w.until(lambda: len(w.engine.asked) == 2)
        await asyncio.sleep(0.03)
        with pytest.raises(FencedError):
            await w.worker.heartbeat()

    play(story())


def test_a_worker_ends_although_a_cancellation_is_swallowed() -> None:
    """As ``asyncio.wait_for`` does before Python 3.12 when the answer comes in the same moment."""

    async def story() -> None:
        w = world([])
        granted, swallowed = w.buffer.lease, []

        async def lease_once_more(*arguments: Any) -> LeaseGrant:
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                if swallowed:
                    raise
                swallowed.append(True)
            return await granted(*arguments)

        w.buffer.lease = lease_once_more  # type: ignore[method-assign]
        await w.worker.begin(task())
        await asyncio.sleep(0.02)
        await asyncio.wait_for(w.worker.end(), 5)
        assert swallowed

    play(story())


def test_leases_are_renewed_three_times_in_their_life() -> None:
    async def story() -> None:
        slow = lease("slow")
        w = world([slow], lease_s=0.06)
        w.engine.gate = asyncio.Event()
        await w.worker.begin(task())
        await asyncio.sleep(0.11)
        assert 3 <= len(w.buffer.renewed) <= 6
        assert set(w.buffer.renewed) == {(slow.uid,)}  # by name: a grant whose answer was lost must expire
        await w.worker.end()

    play(story())
