"""One prompt's walk from lease to outcome, for every way of making pairs.

    improver     response, its refinement (stage 1a: a reviser's revision)     SGPO; with rungs, each refinement is refined again
    reference    response, the prompt's reference                              SPIN
    judge        two responses, the better one preferred                       online DPO
    then         gate -> fences -> vote of fresh draws -> PreferencePair or Refusal

The rollout worker makes one Walker a task and lends it the engine. Every draw is seeded by the lease alone, so any worker draws the same.
Leaves out: leasing and putting, the engine's life, and the texts' measures (``pair_gate``, ``agreement``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, Protocol

from actors.revisers import Ask, Reviser, ReviserRefused, build_reviser
from sgpo_dist.agreement import LIKELIHOOD, likelihood_vote, objection, vote
from sgpo_dist.evaluate.judge import JudgeFailed, PairJudge
from sgpo_dist.pair_gate import ENDPOINT_REVISER, REFERENCE, fenced, refused
from sgpo_dist.prompts import PromptBook
from sgpo_dist.records import Completion, Outcome, PreferencePair, Refusal, RefusalReason, Role, outcome_uid, sampling_seed
from sgpo_dist.roles import GenerateRequest, GenerationTask, Lease
from sgpo_dist.weights.version import ProbeRow

IMPROVER: Final = "improver"
JUDGED: Final = "judge"
SELF: Final = "self"
OPENAI: Final = "openai"
DEFAULT: Final = "default"
MIN_ROOM: Final = 8
"""Fewer new tokens than this are not worth a generation: the prompt counts as too long."""
FIRST_DRAW: Final = 2
"""Seeds of a role: attempt 0 is the pair's own text, 1 the second response that a judge compares, those from here on are for the vote."""
REMEMBERED: Final = 256
"""Ladders, and prompts as ids, that a walker remembers; what it forgets too early it makes again, the same."""


class OutcomeMaker(Protocol):
    """Turns the texts of one prompt into its outcome; ``pair_gate.make_outcome`` with its rules bound."""

    def __call__(self, lease: Lease, prompt_ids: tuple[int, ...], response: Completion, refinement: Completion | None, template: str) -> Outcome:
        """The pair, or the refusal that says why there is none."""


@dataclass(frozen=True, slots=True)
class Means:
    """What a task's walks work with. ``generate`` and ``logps`` are the engine's.

    ``revisers`` are by name, without "self", which asks anew for every prompt. ``judge`` is there for pairs "judge" only.
    """

    book: PromptBook
    make_outcome: OutcomeMaker
    max_model_len: int
    generate: Callable[[GenerateRequest], Awaitable[Completion]]
    logps: Callable[[Sequence[ProbeRow]], Awaitable[Sequence[Sequence[float]]]]
    revisers: Mapping[str, Reviser]
    judge: PairJudge | None = None


class Walker:
    """Makes the outcomes of one task's leases, many at once."""

    def __init__(self, task: GenerationTask, means: Means) -> None:
        self._task = task
        self._means = means
        self._book = means.book
        self._policy_ids = lru_cache(REMEMBERED)(means.book.policy_ids)
        self._improver_ids = lru_cache(REMEMBERED)(means.book.improver_ids)
        self._chains: dict[tuple[str, int, int, int], _Chain] = {}

    async def outcome(self, lease: Lease) -> Outcome:
        """The lease's one outcome. Raises what the engine, a reviser, a judge or the tokenizer raises for faults and bad data."""
        made = await _told(lease, self._made(lease))
        return made if isinstance(made, Refusal) else await _told(lease, self._sifted(lease, made))

    async def _made(self, lease: Lease) -> Outcome:
        if self._means.judge is not None:
            return await self._judged(lease, self._means.judge)
        if self._task.pairs == REFERENCE:
            return await self._referred(lease)
        name = self._task.refine_with.get(lease.prompt.source) or self._task.refine_with[DEFAULT]
        if name != IMPROVER:
            return await self._revised(lease, name)
        return await (self._improved(lease) if self._task.rungs == 1 else self._climbed(lease))

    # ---- who makes the halves -----------------------------------------------------------------------------------------------------

    async def _improved(self, lease: Lease) -> Outcome:
        draw = _Draw(lease.uid)
        response = await self._respond(lease, draw)
        return self._gated(lease, response, await self._refine(lease, response, draw), self._book.improver_template)

    async def _referred(self, lease: Lease) -> Outcome:
        reference = lease.prompt.reference
        if reference is None:
            raise _Refused(RefusalReason.NO_REFERENCE, "the prompt has no reference to prefer")
        response = await self._respond(lease, _Draw(lease.uid))
        return self._gated(lease, response, self._book.written(reference, response.version), REFERENCE)

    async def _judged(self, lease: Lease, judge: PairJudge) -> Outcome:
        draws = _Draw(lease.uid), _Draw(lease.uid, attempt=1, tag="-second")
        first, second = await asyncio.gather(*(self._means.generate(self._policy_request(lease, draw)) for draw in draws))
        texts = first.text.strip(), second.text.strip()
        if not all(texts) or texts[0] == texts[1]:
            return self._gated(lease, first, second, JUDGED)  # the gate has its reason; no judge is asked
        try:
            side = await judge.prefer(lease.prompt, first.text, second.text)
        except JudgeFailed as problem:
            raise _Refused(RefusalReason.UNJUDGED, str(problem), first, second) from None
        if side == 0:
            raise _Refused(RefusalReason.TIE, "the judge prefers neither response", first, second)
        return self._gated(lease, second, first, JUDGED) if side > 0 else self._gated(lease, first, second, JUDGED)

    async def _revised(self, lease: Lease, name: str) -> Outcome:
        """A reviser's rewrite, spelled as the model would have sampled it."""
        response = await self._respond(lease, _Draw(lease.uid))
        versions = [response.version]
        reviser = build_reviser(SELF, book=self._book, ask=self._ask(lease, response, versions)) if name == SELF else self._means.revisers[name]
        try:
            text = await reviser.revise(lease.prompt, response)
        except ReviserRefused as problem:
            raise _Refused(problem.reason, problem.detail, response) from None
        template = {SELF: self._book.reviser_template, OPENAI: f"{ENDPOINT_REVISER}.v1"}.get(name, name)
        return self._gated(lease, response, None if text is None else self._book.written(text, min(versions)), template)

    def _ask(self, lease: Lease, response: Completion, versions: list[int]) -> Ask:
        """What a reviser asks the model with: seeded and sampled as the improver role. Versions that answered are added to ``versions``."""

        async def ask(ids: tuple[int, ...]) -> Completion:
            request = self._request(lease, Role.IMPROVER, ids, _Draw(lease.uid), "the reviser's prompt", response)
            answer = await self._means.generate(request)
            versions.append(answer.version)
            return answer

        return ask

    # ---- the ladder ---------------------------------------------------------------------------------------------------------------

    async def _climbed(self, lease: Lease) -> Outcome:
        """The pair of one rung. The rungs under it are made and gated here too: a refused one takes those above it with it."""
        chain, rung = self._chain(lease), lease.sample % self._task.rungs
        try:
            for below in range(rung):
                outcome = await _told(lease, self._stepped(lease, chain, below))
                if isinstance(outcome, Refusal):
                    return replace(outcome, detail=f"rung {below} of the ladder: {outcome.detail}")
            return await self._stepped(lease, chain, rung)
        finally:
            self._leave(lease, chain)

    async def _stepped(self, lease: Lease, chain: _Chain, rung: int) -> Outcome:
        draft = await self._text(lease, chain, rung)
        return self._gated(lease, draft, await self._text(lease, chain, rung + 1), self._book.improver_template)

    def _text(self, lease: Lease, chain: _Chain, level: int) -> asyncio.Future[Completion]:
        """Text 0 of a chain is the response, each further one refines the one before; drawn once for all the rungs that wait for it."""
        while len(chain.texts) <= level:
            chain.texts.append(asyncio.ensure_future(self._drawn(lease, chain, len(chain.texts))))
        return chain.texts[level]

    async def _drawn(self, lease: Lease, chain: _Chain, level: int) -> Completion:
        """Seeded as the first rung's response, or as the refinement of the rung that ends in this text, whichever rung asks for it."""
        draw = _Draw(self._rung_uid(lease, max(level - 1, 0)), tag=f"-{level}")
        return await (self._refine(lease, await chain.texts[level - 1], draw) if level else self._respond(lease, draw))

    def _rung_uid(self, lease: Lease, rung: int) -> str:
        first = lease.sample - lease.sample % self._task.rungs
        return outcome_uid(int(self._task.options.get("seed", 0)), lease.stage, lease.prompt.prompt_id, lease.epoch, first + rung)

    def _chain(self, lease: Lease) -> _Chain:
        """The chain of a lease's rungs at the version it was granted at: an older text may be staler than the buffer allows."""
        chain = self._chains.setdefault(self._chain_key(lease), _Chain([], self._task.rungs))
        if len(self._chains) > REMEMBERED:
            del self._chains[next(iter(self._chains))]
        return chain

    def _leave(self, lease: Lease, chain: _Chain) -> None:
        """The last rung to be done takes the chain with it."""
        chain.rungs_left -= 1
        if chain.rungs_left == 0 and self._chains.get(self._chain_key(lease)) is chain:
            del self._chains[self._chain_key(lease)]

    def _chain_key(self, lease: Lease) -> tuple[str, int, int, int]:
        return lease.prompt.prompt_id, lease.epoch, lease.sample // self._task.rungs, lease.version

    # ---- what becomes of a pair ---------------------------------------------------------------------------------------------------

    def _gated(self, lease: Lease, response: Completion, refinement: Completion | None, template: str) -> Outcome:
        return self._means.make_outcome(lease, self._policy_ids(lease.prompt), response, refinement, template)

    async def _sifted(self, lease: Lease, pair: PreferencePair) -> Outcome:
        """The pair, unless it is fenced out or fresh draws do not side with it."""
        rules = self._task.agreement
        outside = fenced(pair, self._task.edit_ratios)
        if outside is not None or not rules.draws:
            return outside or pair
        votes = await (self._likelihood_votes(pair) if rules.vote == LIKELIHOOD else self._draw_votes(lease, pair))
        against = objection(votes, rules)
        return refused(pair, RefusalReason.DISAGREEMENT, against) if against else pair

    async def _draw_votes(self, lease: Lease, pair: PreferencePair) -> list[int]:
        """Of ``draws`` fresh responses and as many fresh refinements of the pair's response, all asked at once."""
        rules = self._task.agreement
        draws = [_Draw(lease.uid, FIRST_DRAW + n, f"-draw-{n}", rules.temperature) for n in range(rules.draws)]
        requests = [self._policy_request(lease, draw) for draw in draws]
        requests += [self._improver_request(lease, pair.response, draw) for draw in draws]
        answers = await asyncio.gather(*(self._means.generate(request) for request in requests))
        texts = [answer.text for answer in answers[: rules.draws]]
        texts += [self._book.unwrapped(answer, pair.response.text).text for answer in answers[rules.draws :]]
        return [vote(text, pair.chosen.text, pair.rejected.text, rules.vote) for text in texts]

    async def _likelihood_votes(self, pair: PreferencePair) -> list[int]:
        """One of each role: which of the two texts the live weights find likelier, each token counting alike."""
        halves = pair.chosen.token_ids, pair.rejected.token_ids
        prompts = pair.prompt_ids, self._improver_ids(pair.prompt, pair.response.text)
        longest = max(map(len, prompts)) + max(map(len, halves))
        if longest >= self._means.max_model_len:
            detail = f"a prompt and a text to score have {longest} tokens"
            raise _Refused(RefusalReason.PROMPT_TOO_LONG, detail, pair.response, pair.refinement)
        scores = await self._means.logps([ProbeRow(ids, half) for ids in prompts for half in halves])
        return [likelihood_vote(chosen, rejected) for chosen, rejected in (scores[:2], scores[2:])]

    # ---- asking the model -----------------------------------------------------------------------------------------------------------

    async def _respond(self, lease: Lease, draw: _Draw) -> Completion:
        response = await self._means.generate(self._policy_request(lease, draw))
        if not response.text.strip():
            raise _Refused(RefusalReason.EMPTY, "the response is empty", response)
        return response

    async def _refine(self, lease: Lease, draft: Completion, draw: _Draw) -> Completion:
        """The model's own rewrite; the ids that were sampled are kept."""
        answer = await self._means.generate(self._improver_request(lease, draft, draw))
        return self._book.unwrapped(answer, draft.text)

    def _policy_request(self, lease: Lease, draw: _Draw) -> GenerateRequest:
        return self._request(lease, Role.POLICY, self._policy_ids(lease.prompt), draw, "the prompt")

    def _improver_request(self, lease: Lease, draft: Completion, draw: _Draw) -> GenerateRequest:
        ids = self._improver_ids(lease.prompt, draft.text)
        return self._request(lease, Role.IMPROVER, ids, draw, "the improver's prompt", draft)

    def _request(
        self, lease: Lease, role: Role, ids: tuple[int, ...], draw: _Draw, what: str, response: Completion | None = None
    ) -> GenerateRequest:
        """The request, its length cut to the context's room; refused when there is no room worth a generation."""
        how = self._task.policy if role is Role.POLICY else self._task.improver
        room = min(how.max_new_tokens, self._means.max_model_len - len(ids))
        if room < min(MIN_ROOM, how.max_new_tokens):
            raise _Refused(RefusalReason.PROMPT_TOO_LONG, f"{what} has {len(ids)} tokens", response)
        temperature = how.temperature if draw.temperature is None else draw.temperature
        sampling = replace(how, temperature=temperature, max_new_tokens=room)
        name = f"{lease.uid}-{role}-{lease.attempt}{draw.tag}"
        return GenerateRequest(name, ids, sampling, sampling_seed(draw.seed_uid, role, draw.attempt))


@dataclass(frozen=True, slots=True)
class _Draw:
    """Which draw it is: what seeds it, what tells its request from the lease's others, and a temperature of its own."""

    seed_uid: str
    attempt: int = 0
    tag: str = ""
    temperature: float | None = None


@dataclass(slots=True)
class _Chain:
    """A response and its refinements, as far as somebody asked for them."""

    texts: list[asyncio.Future[Completion]]
    rungs_left: int


class _Refused(Exception):
    """A walk ends here without a pair; never leaves this file."""

    def __init__(self, reason: RefusalReason, detail: str, response: Completion | None = None, refinement: Completion | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.response = response
        self.refinement = refinement


async def _told(lease: Lease, work: Awaitable[Outcome]) -> Outcome:
    """What the work makes, or the refusal it ended with."""
    try:
        return await work
    except _Refused as no:
        return Refusal(lease.uid, lease.stage, lease.prompt.prompt_id, no.reason, no.detail, no.response, no.refinement)
