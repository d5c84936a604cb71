"""What a step trains on, and in which order: functions of the data, the seed and the settings.

Used by the sft and improver stages, and by the preference stage for the data's own pairs. Because batches are a function of their inputs,
a resumed stage sees the very same ones. Leaves out: pairs that the model makes (the buffer's journal has those), tokenising rules
(prompts) and the loss (learner).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Final, TypeVar

from sgpo_dist.config import FilterConfig
from sgpo_dist.errors import RunFailed
from sgpo_dist.evaluate.scoring import checked_score
from sgpo_dist.prompts import PromptBook
from sgpo_dist.records import FinishReason, PreferencePair, Prompt, Refusal, RefusalReason, Stage, TokenExample, outcome_uid
from sgpo_dist.textual import edit_ratio, length_ratio, quartile_fences
from sgpo_dist.user_function import load_function

Row = TypeVar("Row")

FEWEST_FOR_FENCES: Final = 8
"""Quartiles of fewer values say nothing."""
GIVEN: Final = "given"
"""Stands where a made pair names what made it."""


@dataclass(frozen=True, slots=True)
class FilteredRevisions:
    """Revisions that may teach, and how many were dropped, by reason."""

    kept: tuple[PreferencePair, ...]
    dropped: Mapping[str, int]


def nll_batches(rows: Sequence[TokenExample], batch_size: int, epochs: int, seed: int) -> list[tuple[TokenExample, ...]]:
    """All batches of a stage: each epoch a fresh seeded order, the last batch of an epoch may be short."""
    batches = []
    for epoch in range(epochs):
        order = list(rows)
        random.Random(f"{seed}/{epoch}").shuffle(order)
        batches += [tuple(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    return batches


def sft_examples(references: Sequence[Prompt], book: PromptBook) -> list[TokenExample]:
    """prompt -> reference, for rows that have one."""
    return [
        TokenExample(f"sft/{prompt.prompt_id}", book.policy_ids(prompt), book.completion_ids(prompt.reference))
        for prompt in references
        if prompt.reference is not None
    ]


def filter_revisions(
    pairs: Sequence[PreferencePair], settings: FilterConfig, logps: Mapping[str, tuple[float, float]] | None = None
) -> FilteredRevisions:
    """Drop what teaches nothing (floors), then what jumps too far (Tukey's fences over the statistic of those left).

    ``logps``: log-likelihood per token (nats) of (revision, draft) under the drafting model by uid, for the statistic logp_gap.
    Reasons: no_op, length_blow_up, no_gain, and below_ or above_STATISTIC_fence. Raises ConfigError or DataError for a grader that
    cannot be had or fails, RunFailed for a pair without log-likelihoods.
    """
    dropped: Counter[str] = Counter()
    gains = _gains(pairs, settings.grader) if settings.grader else {}
    kept = []
    for pair in pairs:
        reason = _floor(pair, settings, gains)
        if reason is None:
            kept.append(pair)
        else:
            dropped[reason] += 1
    if settings.fence is not None and len(kept) >= FEWEST_FOR_FENCES:
        values = [_statistic(pair, settings.fence_statistic, gains, logps or {}) for pair in kept]
        low, high = quartile_fences(values, settings.fence)
        dropped[f"below_{settings.fence_statistic}_fence"] += sum(value < low for value in values)
        dropped[f"above_{settings.fence_statistic}_fence"] += sum(value > high for value in values)
        kept = [pair for pair, value in zip(kept, values, strict=True) if low <= value <= high]
    return FilteredRevisions(tuple(kept), {reason: count for reason, count in dropped.items() if count})


def edit_fences(pairs: Sequence[PreferencePair], k: float) -> tuple[float, float] | None:
    """Tukey's fences of the pairs' edit ratios; None for so few pairs that they would mean nothing."""
    if len(pairs) < FEWEST_FOR_FENCES:
        return None
    return quartile_fences([_edit_ratio(pair) for pair in pairs], k)


def improver_examples(pairs: Sequence[PreferencePair], book: PromptBook, edit_weight: float = 1.0) -> list[TokenExample]:
    """IMPROVE(prompt, draft) -> revision; the reference is not in the prompt. Tokens that the revision changes weigh ``edit_weight``."""
    return [
        TokenExample(
            f"improve/{pair.uid}",
            book.improver_ids(pair.prompt, pair.response.text),
            pair.refinement.token_ids,
            token_weights=() if edit_weight == 1.0 else _edit_weights(pair, edit_weight),
        )
        for pair in pairs
    ]


def keep_examples(
    refusals: Sequence[Refusal], prompts: Mapping[str, Prompt], book: PromptBook, count: int, seed: int
) -> list[TokenExample]:
    """At most ``count`` rows IMPROVE(prompt, draft) -> the same draft, of drafts that ended and had nothing to repair, drawn by ``seed``.

    An improver that is taught on repairs alone changes every draft, right ones too.
    """
    good = [(refusal, refusal.response) for refusal in refusals if refusal.reason is RefusalReason.NOTHING_TO_REPAIR]
    whole = [(refusal, draft) for refusal, draft in good if draft is not None and draft.finish_reason is FinishReason.STOP]
    drawn = random.Random(f"{seed}/keep").sample(whole, min(count, len(whole)))
    return [
        TokenExample(f"keep/{refusal.uid}", book.improver_ids(prompts[refusal.prompt_id], draft.text), draft.token_ids) for refusal, draft in drawn
    ]


def kept_examples(refusals: Sequence[Refusal], prompts: Mapping[str, Prompt], book: PromptBook) -> list[TokenExample]:
    """prompt -> own answer, of every answer that ended and that its rewrite repeats.

    Pairs say only what is wrong. Where a model errs to one side more often, they are one-sided too, and DPO on them alone overshoots to the other.
    """
    same = [(refusal, refusal.response) for refusal in refusals if refusal.reason is RefusalReason.IDENTICAL]
    return [
        TokenExample(f"kept/{refusal.uid}", book.policy_ids(prompts[refusal.prompt_id]), answer.token_ids)
        for refusal, answer in same
        if answer is not None and answer.finish_reason is FinishReason.STOP
    ]


def replay_examples(pairs: Sequence[PreferencePair], kind: str, book: PromptBook) -> list[TokenExample]:
    """Policy rows that keep the policy role while the improver role is learned, one a revision: own drafts, references, or none."""
    if kind == "self":
        return [TokenExample(f"replay/{pair.uid}", pair.prompt_ids, pair.response.token_ids) for pair in pairs]
    if kind == "reference":
        return [
            TokenExample(f"replay/{pair.uid}", pair.prompt_ids, book.completion_ids(pair.prompt.reference))
            for pair in pairs
            if pair.prompt.reference is not None
        ]
    return []


def given_pairs(rows: Sequence[Prompt], book: PromptBook, version: int) -> list[PreferencePair]:
    """The data's own pairs, reference over rejected answer, of the rows that have both; ``version`` is the stage's first one."""
    return [
        PreferencePair(
            outcome_uid(0, Stage.PREFERENCE, row.prompt_id, 0, 0),
            Stage.PREFERENCE,
            row,
            book.policy_ids(row),
            response=book.written(row.rejected, version),
            refinement=book.written(row.reference, version),
            template=GIVEN,
        )
        for row in rows
        if row.reference is not None and row.rejected is not None
    ]


def offline_batch(rows: Sequence[Row], step: int, size: int, seed: int) -> tuple[Row, ...]:
    """The ``size`` rows of ``step`` (from 1): the next of an endless row of epochs, each a fresh seeded order of all rows. No rows, no batch."""
    if not rows:
        return ()
    first = (step - 1) * size
    epochs = range(first // len(rows), (first + size - 1) // len(rows) + 1)
    order = [place for epoch in epochs for place in _epoch_order(len(rows), epoch, seed)]
    start = first % len(rows)
    return tuple(rows[place] for place in order[start : start + size])


def _epoch_order(count: int, epoch: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/given/{epoch}").shuffle(order)
    return order


def _floor(pair: PreferencePair, settings: FilterConfig, gains: Mapping[str, float]) -> str | None:
    """Why a revision teaches nothing, or None."""
    if _edit_ratio(pair) < settings.min_edit_ratio:
        return "no_op"
    if _length_ratio(pair) > settings.max_length_ratio:
        return "length_blow_up"
    return "no_gain" if settings.grader and gains[pair.uid] <= settings.min_gain else None


def _gains(pairs: Sequence[PreferencePair], grader: str) -> dict[str, float]:
    """The grader's score of each revision minus that of its draft, by uid."""
    score = load_function(grader, "improver.filter.grader")
    return {
        pair.uid: checked_score(score, pair.refinement.text, pair.prompt) - checked_score(score, pair.response.text, pair.prompt) for pair in pairs
    }


def _statistic(pair: PreferencePair, name: str, gains: Mapping[str, float], logps: Mapping[str, tuple[float, float]]) -> float:
    if name == "length_ratio":
        return _length_ratio(pair)
    if name == "grader_gain":
        return gains[pair.uid]
    if name == "logp_gap":
        if pair.uid not in logps:
            raise RunFailed(f"improver.filter.fence_statistic logp_gap: revision {pair.uid} has no log-likelihood")
        revision, draft = logps[pair.uid]
        return revision - draft
    return _edit_ratio(pair)


def _edit_ratio(pair: PreferencePair) -> float:
    return edit_ratio(pair.response.text, pair.refinement.text)


def _length_ratio(pair: PreferencePair) -> float:
    return length_ratio(len(pair.refinement.token_ids), len(pair.response.token_ids))


def _edit_weights(pair: PreferencePair, weight: float) -> tuple[float, ...]:
    """One weight a token of the revision: 1 where a diff of the token ids finds it in the draft, ``weight`` where it is new."""
    draft, revision = pair.response.token_ids, pair.refinement.token_ids
    weights = [weight] * len(revision)
    for block in SequenceMatcher(None, draft, revision, autojunk=False).get_matching_blocks():
        weights[block.b : block.b + block.size] = [1.0] * block.size
    return tuple(weights)
