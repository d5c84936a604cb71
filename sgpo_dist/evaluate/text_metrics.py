"""Figures of single texts and of lists of completions that need no model. Called by ``evaluation``."""

from __future__ import annotations

from collections.abc import Sequence

from sgpo_dist.records import Completion, FinishReason
from sgpo_dist.textual import repetition


def rouge_l(candidate: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, in [0, 1]; no stemming (Lin, "ROUGE", 2004; package rouge_score)."""
    from rouge_score import rouge_scorer  # loads a second's worth of language tools

    score = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False).score(reference, candidate)
    return float(score["rougeL"].fmeasure)


def ended(completions: Sequence[Completion]) -> list[float]:
    """1 for each completion that ended by itself, else 0."""
    return [float(completion.finish_reason is FinishReason.STOP) for completion in completions]


def token_counts(completions: Sequence[Completion]) -> list[float]:
    """Tokens of each completion, end token included."""
    return [float(len(completion.token_ids)) for completion in completions]


def repetitions(completions: Sequence[Completion]) -> list[float]:
    """Share of repeated word triples of each completion."""
    return [repetition(completion.text) for completion in completions]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; ``values`` must not be empty."""
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean, sample variance; 0 for fewer than two values. Of paired differences: the paired standard error."""
    count = len(values)
    if count < 2:
        return 0.0
    centre = mean(values)
    return float((sum((value - centre) ** 2 for value in values) / (count - 1) / count) ** 0.5)
