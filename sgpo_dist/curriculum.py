"""What an NLL step trains on, and in which order: pure functions of the data, the seed and the settings.

Used by the sft and improver stages. Because batches are a function of their inputs, a resumed stage sees the very same ones.
Leaves out: tokenising rules (prompts) and the loss (learner).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sgpo_dist.config import FilterConfig
from sgpo_dist.prompts import PromptBook
from sgpo_dist.records import PreferencePair, Prompt, TokenExample
from sgpo_dist.textual import edit_ratio, quartile_fences


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


def filter_revisions(pairs: Sequence[PreferencePair], settings: FilterConfig) -> FilteredRevisions:
    """Drop no-ops (edit ratio under the floor), blown-up lengths, and what lies outside Tukey's fences of the statistic."""
    dropped: Counter[str] = Counter()
    kept = []
    for pair in pairs:
        if edit_ratio(pair.response.text, pair.refinement.text) < settings.min_edit_ratio:
            dropped["no_op"] += 1
        elif _length_ratio(pair) > settings.max_length_ratio:
            dropped["length_blow_up"] += 1
        else:
            kept.append(pair)
    if settings.fence is not None and len(kept) >= 8:  # quartiles of fewer values say nothing
        values = [_statistic(pair, settings.fence_statistic) for pair in kept]
        low, high = quartile_fences(values, settings.fence)
        inside = [pair for pair, value in zip(kept, values, strict=True) if low <= value <= high]
        dropped["fenced_out"] += len(kept) - len(inside)
        kept = inside
    return FilteredRevisions(tuple(kept), dict(dropped))


def improver_examples(pairs: Sequence[PreferencePair], book: PromptBook) -> list[TokenExample]:
    """IMPROVE(prompt, draft) -> revision; the reference is not in the prompt."""
    return [TokenExample(f"improve/{pair.uid}", book.improver_ids(pair.prompt, pair.response.text), pair.refinement.token_ids) for pair in pairs]


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


def _length_ratio(pair: PreferencePair) -> float:
    return len(pair.refinement.token_ids) / max(1, len(pair.response.token_ids))


def _statistic(pair: PreferencePair, name: str) -> float:
    return _length_ratio(pair) if name == "length_ratio" else edit_ratio(pair.response.text, pair.refinement.text)
