"""Walks with a scripted engine: who makes the halves, the ladder, and what fresh draws do to a pair."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest

from actors.fleet import gated_outcome
from actors.revisers import ReviserRefused
from actors.walk import Means, Walker
from sgpo_dist.config import AgreementConfig, PairGateConfig
from sgpo_dist.evaluate.judge import JudgeFailed
from sgpo_dist.records import (
    Completion,
    FinishReason,
    Message,
    Outcome,
    PreferencePair,
    Prompt,
    Refusal,
    RefusalReason,
    Role,
    Stage,
    outcome_uid,
    sampling_seed,
)
from sgpo_dist.roles import GenerateRequest, GenerationTask, Lease, Sampling
from sgpo_dist.weights.version import ProbeRow

POLICY = Sampling(0.8, 0.9, 5, 20)
IMPROVER = Sampling(0.5, 1.0, 0, 30)
SEED = 7
PROMPT = Prompt("p", (Message("user", "Tea or coffee?"),))
POLICY_IDS = tuple(range(10))


def lease(sample: int = 0, version: int = 3, reference: str | None = None, source: str = "user") -> Lease:
    uid = outcome_uid(SEED, Stage.PREFERENCE, "p", 0, sample)
    return Lease(uid, Stage.PREFERENCE, replace(PROMPT, reference=reference, source=source), 0, sample, version, attempt=1)


class Book:
    """The policy reads ten tokens, the improver ten and one for each word of the draft."""

    improver_template = "improver.v1"
    reviser_template = "reviser.v1"

    def policy_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return POLICY_IDS

    def improver_ids(self, prompt: Prompt, draft: str) -> tuple[int, ...]:
        return (*POLICY_IDS, *range(len(draft.split())))

    def revise_ids(self, prompt: Prompt, draft: str, reference: str) -> tuple[int, ...]:
        return tuple(range(95))

    def unwrapped(self, refinement: Completion, draft: str) -> Completion:
        return refinement

    def written(self, text: str, version: int) -> Completion:
        return Completion(text, (*range(len(text.split())), 99), FinishReason.STOP, version)


def by_seed(request: GenerateRequest) -> str:
    return f"words and number {request.seed}"


@dataclass
class Engine:
    """Says what the script makes of a request; log-probs are looked up by (prompt tokens, completion)."""

    script: Callable[[GenerateRequest], str] = by_seed
    version: int = 3
    logps_of: dict[tuple[int, tuple[int, ...]], tuple[float, ...]] = field(default_factory=dict)
    asked: list[GenerateRequest] = field(default_factory=list)

    async def generate(self, request: GenerateRequest) -> Completion:
        self.asked.append(request)
        await asyncio.sleep(0)
        text = self.script(request)
        return Completion(text, (*map(len, text.split()), 99), FinishReason.STOP, self.version)

    async def logps(self, rows: Sequence[ProbeRow]) -> Sequence[Sequence[float]]:
        return [self.logps_of[len(row.prompt_ids), row.completion_ids] for row in rows]


@dataclass
class Judge:
    """Sides with the text that the script names best."""

    script: Callable[[str, str], int]
    asked: list[tuple[str, str]] = field(default_factory=list)

    async def prefer(self, prompt: Prompt, a: str, b: str) -> int:
        self.asked.append((a, b))
        return self.script(a, b)


class NoRevision:
    """A reviser that gives up."""

    async def revise(self, prompt: Prompt, draft: Completion) -> str | None:
        raise ReviserRefused(RefusalReason.UNJUDGED, "nobody answered")


def walker(engine: Engine, judge: Judge | None = None, **changes: Any) -> Walker:
    values: dict[str, Any] = {"refine_with": {"default": "improver", "ask": "self", "away": "openai"}, "options": {"seed": SEED}}
    task = GenerationTask(Stage.PREFERENCE, 1, POLICY, IMPROVER, **values | changes)
    book: Any = Book()
    make = partial(gated_outcome, PairGateConfig())
    return Walker(task, Means(book, make, 100, engine.generate, engine.logps, {"openai": NoRevision()}, judge))


def walked(one: Walker, *leases: Lease) -> list[Outcome]:
    async def story() -> list[Outcome]:
        async with asyncio.timeout(5):
            return await asyncio.gather(*map(one.outcome, leases))

    return asyncio.run(story())


def pair_of(outcome: Outcome) -> PreferencePair:
    assert isinstance(outcome, PreferencePair), outcome
    return outcome


def refusal_of(outcome: Outcome) -> Refusal:
    assert isinstance(outcome, Refusal), outcome
    return outcome


# ---- who makes the halves ---------------------------------------------------------------------------------------------------------


def test_without_more_being_asked_a_pair_is_two_requests_seeded_by_the_uid() -> None:
    engine = Engine()
    pair = pair_of(walked(walker(engine), lease())[0])
    uid = lease().uid
    policy, improver = sampling_seed(uid, Role.POLICY), sampling_seed(uid, Role.IMPROVER)
    assert engine.asked == [
        GenerateRequest(f"{uid}-policy-1", POLICY_IDS, POLICY, policy),
        GenerateRequest(f"{uid}-improver-1", (*POLICY_IDS, *range(4)), IMPROVER, improver),
    ]
    assert (pair.rejected.text, pair.chosen.text) == (f"words and number {policy}", f"words and number {improver}")


def test_the_reference_is_the_chosen_half_spelled_as_the_model_would() -> None:
    engine = Engine(lambda request: "Tea.", version=4)
    reference = "Coffee, which keeps you up, but tea when it is late and you want to sleep."
    pair = pair_of(walked(walker(engine, pairs="reference"), lease(reference=reference))[0])
    assert pair.chosen == Completion(reference, (*range(16), 99), FinishReason.STOP, 4)
    assert (pair.rejected.text, pair.version, pair.template, pair.prompt_ids) == ("Tea.", 4, "reference", POLICY_IDS)
    assert [request.request_id for request in engine.asked] == [f"{lease().uid}-policy-1"]


def test_without_a_reference_there_is_no_pair_and_no_draw() -> None:
    engine = Engine()
    refusal = refusal_of(walked(walker(engine, pairs="reference"), lease())[0])
    assert (refusal.reason, refusal.uid, engine.asked) == (RefusalReason.NO_REFERENCE, lease().uid, [])


def first_or_second(request: GenerateRequest) -> str:
    return "the second text" if request.request_id.endswith("-second") else "the first text"


@pytest.mark.parametrize(("verdict", "chosen", "rejected"), [(1, "the first text", "the second text"), (-1, "the second text", "the first text")])
def test_a_judge_orders_two_responses(verdict: int, chosen: str, rejected: str) -> None:
    engine, judge = Engine(first_or_second), Judge(lambda a, b: verdict)
    pair = pair_of(walked(walker(engine, judge, pairs="judge"), lease())[0])
    assert (pair.chosen.text, pair.rejected.text, pair.template) == (chosen, rejected, "judge")
    assert judge.asked == [("the first text", "the second text")]
    assert [request.seed for request in engine.asked] == [sampling_seed(lease().uid, Role.POLICY, attempt) for attempt in (0, 1)]
    assert {request.prompt_ids for request in engine.asked} == {POLICY_IDS}


def test_a_tie_is_no_pair() -> None:
    refusal = refusal_of(walked(walker(Engine(first_or_second), Judge(lambda a, b: 0), pairs="judge"), lease())[0])
    assert refusal.reason is RefusalReason.TIE
    assert refusal.response is not None
    assert refusal.refinement is not None


@pytest.mark.fault(25, invariants="I6")
def test_a_judge_that_fails_is_counted() -> None:
    def fails(a: str, b: str) -> int:
        raise JudgeFailed("no letter")

    refusal = refusal_of(walked(walker(Engine(first_or_second), Judge(fails), pairs="judge"), lease())[0])
    assert (refusal.reason, refusal.detail) == (RefusalReason.UNJUDGED, "no letter")


@pytest.mark.parametrize(("second", "reason"), [(" same ", RefusalReason.IDENTICAL), ("", RefusalReason.EMPTY)])
def test_no_judge_is_asked_about_equal_or_empty_texts(second: str, reason: RefusalReason) -> None:
    judge = Judge(lambda a, b: 1)
    engine = Engine(lambda request: second if request.request_id.endswith("-second") else "same")
    assert refusal_of(walked(walker(engine, judge, pairs="judge"), lease())[0]).reason is reason
    assert judge.asked == []


def test_a_reviser_that_gives_up_says_why() -> None:
    refusal = refusal_of(walked(walker(Engine()), lease(source="away"))[0])
    assert (refusal.reason, refusal.detail) == (RefusalReason.UNJUDGED, "nobody answered")
    assert refusal.response is not None


def test_a_reviser_without_room_for_its_question_is_refused() -> None:
    engine = Engine()
    refusal = refusal_of(walked(walker(engine), lease(reference="Coffee.", source="ask"))[0])  # 95 of 100 tokens: 5 are left
    assert (refusal.reason, refusal.detail) == (RefusalReason.PROMPT_TOO_LONG, "the reviser's prompt has 95 tokens")
    assert len(engine.asked) == 1


# ---- the ladder -------------------------------------------------------------------------------------------------------------------


def test_each_rung_is_a_pair_with_the_one_below_and_the_chain_is_drawn_once() -> None:
    engine = Engine()
    first, second, third = map(pair_of, walked(walker(engine, rungs=3), lease(0), lease(1), lease(2)))
    assert [first.chosen, second.chosen] == [second.rejected, third.rejected]
    assert len({first.rejected.text, first.chosen.text, second.chosen.text, third.chosen.text}) == len(engine.asked) == 4
    assert [pair.uid for pair in (first, second, third)] == [lease(sample).uid for sample in range(3)]
    assert len({request.request_id for request in engine.asked}) == 4


def test_any_worker_makes_the_same_rung_alone() -> None:
    together = walked(walker(Engine(), rungs=3), lease(3), lease(4), lease(5))
    for place, outcome in enumerate(together):
        engine = Engine()
        assert walked(walker(engine, rungs=3), lease(3 + place)) == [outcome]
        assert len({request.request_id for request in engine.asked}) == len(engine.asked) == place + 2


def test_the_first_rung_draws_what_a_prompt_without_a_ladder_draws_and_chains_differ() -> None:
    first = pair_of(walked(walker(Engine(), rungs=3), lease(0))[0])
    assert first == walked(walker(Engine()), lease(0))[0]
    assert first.rejected != pair_of(walked(walker(Engine(), rungs=3), lease(3))[0]).rejected


def test_a_rung_granted_at_a_later_version_draws_the_chain_anew() -> None:
    engine = Engine()
    one = walker(engine, rungs=2)
    walked(one, lease(0, version=3))
    engine.version = 4
    assert pair_of(walked(one, lease(1, version=4))[0]).version == 4
    assert len(engine.asked) == 2 + 3


def test_a_chain_is_forgotten_when_its_rungs_are_done() -> None:
    engine = Engine()
    one = walker(engine, rungs=2)
    walked(one, lease(0), lease(1))
    assert len(engine.asked) == 3
    walked(one, lease(0))
    assert len(engine.asked) == 3 + 2


def test_a_refused_rung_takes_those_above_with_it() -> None:
    by_length = {10: "one two", 12: "one two three", 13: "one two three"}  # tokens read: the prompt's 10 and the words of a draft
    engine = Engine(lambda request: by_length[len(request.prompt_ids)])
    outcomes = walked(walker(engine, rungs=4), *(lease(sample) for sample in range(4)))
    assert pair_of(outcomes[0]).chosen.text == "one two three"
    second, third, fourth = map(refusal_of, outcomes[1:])
    assert second.reason is third.reason is fourth.reason is RefusalReason.IDENTICAL
    assert third.detail == fourth.detail == f"rung 1 of the ladder: {second.detail}"
    assert [refusal.uid for refusal in (third, fourth)] == [lease(2).uid, lease(3).uid]
    assert len(engine.asked) == 3  # nothing is refined that no pair can use


def test_a_rung_without_room_takes_those_above_with_it() -> None:
    engine = Engine(lambda request: "word " * (40 if len(request.prompt_ids) == 10 else 90))  # the second refinement would read 10 + 90
    outcomes = walked(walker(engine, rungs=3), lease(0), lease(1), lease(2))
    assert len(pair_of(outcomes[0]).chosen.token_ids) == 91
    second, third = map(refusal_of, outcomes[1:])
    assert second.reason is third.reason is RefusalReason.PROMPT_TOO_LONG
    assert [second.detail, third.detail] == ["the improver's prompt has 100 tokens", "rung 1 of the ladder: the improver's prompt has 100 tokens"]


# ---- fences and votes -------------------------------------------------------------------------------------------------------------

CHOSEN, REJECTED = "a b c d x", "a b c d ee"
"""Edit ratio 1 - 2*4/10 = 0.2."""


def drawing(*draws: str) -> Callable[[GenerateRequest], str]:
    """The pair's own texts first; then draw n of the policy is ``draws[n]``, and draw n of the improver follows all of the policy's."""

    def script(request: GenerateRequest) -> str:
        improver = "-improver-" in request.request_id
        if "-draw-" not in request.request_id:
            return CHOSEN if improver else REJECTED
        return draws[int(request.request_id.rpartition("-")[2]) + improver * len(draws) // 2]

    return script


def test_pairs_outside_the_fences_are_refused_before_anybody_votes() -> None:
    engine = Engine(drawing("", ""))
    rules = AgreementConfig(draws=1)
    refusal = refusal_of(walked(walker(engine, edit_ratios=(0.3, 0.5), agreement=rules), lease())[0])
    assert (refusal.reason, refusal.detail) == (RefusalReason.FENCED_OUT, "edit ratio 0.200, fences 0.300 to 0.500")
    assert len(engine.asked) == 2
    assert pair_of(walked(walker(engine, edit_ratios=(0.1, 0.3)), lease())[0]).chosen.text == CHOSEN


def test_draws_vote_with_seeds_of_their_own_at_their_own_temperature() -> None:
    engine = Engine(drawing("neither", CHOSEN, f" {CHOSEN}", "neither"))
    pair = pair_of(walked(walker(engine, agreement=AgreementConfig(draws=2, margin=2, temperature=1.3)), lease())[0])
    assert (pair.rejected.text, pair.chosen.text) == (REJECTED, CHOSEN)
    own, votes = engine.asked[:2], engine.asked[2:]
    seeds = [sampling_seed(lease().uid, role, attempt) for role in (Role.POLICY, Role.IMPROVER) for attempt in (2, 3)]
    assert [request.seed for request in votes] == seeds
    assert [request.sampling for request in votes] == [replace(POLICY, temperature=1.3)] * 2 + [replace(IMPROVER, temperature=1.3)] * 2
    assert [request.prompt_ids for request in votes] == [own[0].prompt_ids] * 2 + [own[1].prompt_ids] * 2
    assert len({request.request_id for request in engine.asked}) == 6


def test_below_the_margin_the_votes_are_the_reason() -> None:
    engine = Engine(drawing(REJECTED, CHOSEN, CHOSEN, "neither"))
    refusal = refusal_of(walked(walker(engine, agreement=AgreementConfig(draws=2, margin=2)), lease())[0])
    assert refusal.reason is RefusalReason.DISAGREEMENT
    assert refusal.detail == "margin +1 of +2: 2 for, 1 against, 1 for neither"
    assert refusal.refinement is not None
    assert refusal.refinement.text == CHOSEN


def test_draws_of_a_later_version_leave_the_pairs_version_alone() -> None:
    engine = Engine(drawing(CHOSEN, CHOSEN))

    def later(request: GenerateRequest) -> str:
        engine.version = 4 if "-draw-" in request.request_id else 3
        return CHOSEN if "-improver-" in request.request_id or "-draw-" in request.request_id else REJECTED

    engine.script = later
    assert pair_of(walked(walker(engine, agreement=AgreementConfig(draws=1)), lease())[0]).version == 3


def likelihoods(policy: tuple[float, float], improver: tuple[float, float]) -> Engine:
    """Log-prob of each token of (chosen, rejected) under the ten tokens of the policy's prompt and the fifteen of the improver's."""
    texts = (1, 1, 1, 1, 1, 99), (1, 1, 1, 1, 2, 99)
    table = {(length, text): (value,) * 6 for length, values in ((10, policy), (15, improver)) for text, value in zip(texts, values, strict=True)}
    return Engine(drawing(), logps_of=table)


def test_likelihood_draws_nothing_and_needs_both_roles() -> None:
    rules = AgreementConfig(draws=3, vote="likelihood")
    both = likelihoods((-1.0, -1.1), (-0.5, -0.7))
    pair_of(walked(walker(both, agreement=rules), lease())[0])
    assert len(both.asked) == 2
    one = refusal_of(walked(walker(likelihoods((-1.0, -1.1), (-0.5, -0.4)), agreement=rules), lease())[0])
    assert (one.reason, one.detail) == (RefusalReason.DISAGREEMENT, "margin +0 of +2: 1 for, 1 against, 0 for neither")


def test_texts_that_no_engine_can_score_are_refused() -> None:
    rules = AgreementConfig(draws=1, vote="likelihood")
    long = " ".join(f"w{n}" for n in range(44))  # the improver's prompt of 10 + 44 and the text of 44 + 2 tokens fill all 100
    engine = Engine(lambda request: f"{long} y" if "-improver-" in request.request_id else long)
    refusal = refusal_of(walked(walker(engine, agreement=rules), lease())[0])
    assert (refusal.reason, refusal.detail) == (RefusalReason.PROMPT_TOO_LONG, "a prompt and a text to score have 100 tokens")
