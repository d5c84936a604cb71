"""Figures of completions against values worked out by hand."""

import pytest

from sgpo_dist.evaluate.text_metrics import ended, mean, repetitions, rouge_l, standard_error, token_counts
from sgpo_dist.records import Completion, FinishReason

TWO = [
    Completion("a b c a b c", (1, 2, 3), FinishReason.STOP, 0),
    Completion("a b", (1,), FinishReason.LENGTH, 0),
]


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # the cat sat / the dog sat down: common the, sat; precision 2/3, recall 2/4.
    assert rouge_l("the cat sat", "the dog sat down") == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert rouge_l("", "the dog") == 0.0
    assert rouge_l("The dog!", "the dog") == 1.0


def test_counts_of_completions() -> None:
    assert ended(TWO) == [1.0, 0.0]
    assert token_counts(TWO) == [3.0, 1.0]
    assert repetitions(TWO) == [0.25, 0.0]


def test_mean_and_its_standard_error() -> None:
    # Mean 2; squared deviations 1 + 0 + 1 = 2; variance 1; standard error sqrt(1/3).
    assert mean([1, 2, 3]) == 2
    assert standard_error([1, 2, 3]) == pytest.approx((1 / 3) ** 0.5)
    assert standard_error([5.0]) == 0.0
