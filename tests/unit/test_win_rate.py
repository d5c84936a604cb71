"""Win rates against values worked out by hand."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import pytest

from sgpo_dist.errors import RunFailed
from sgpo_dist.evaluate.judge import JudgeFailed
from sgpo_dist.evaluate.win_rate import WinRate, interval, length_controlled_rate, win_rate
from sgpo_dist.records import Message, Prompt


class ByNumber:
    """The larger number is better; 'x' cannot be judged."""

    async def prefer(self, prompt: Prompt, a: str, b: str) -> int:
        if "x" in (a, b):
            raise JudgeFailed("x is no number")
        return (int(a) > int(b)) - (int(a) < int(b))


def against(answers: Sequence[str], others: Sequence[str]) -> WinRate:
    prompts = [Prompt(f"p{i}", (Message("user", "?"),)) for i in range(len(answers))]
    return asyncio.run(win_rate(prompts, answers, others, ByNumber()))


def test_ties_count_half_and_what_cannot_be_judged_counts_nowhere() -> None:
    found = against(["2", "2", "1", "7", "x", "100"], ["1", "1", "3", "07", "5", "10"])
    # Three wins, one loss, one tie (7 and 07); lengths of the judged five: 1+1+1+1+3 and 1+1+1+2+2.
    assert (found.wins, found.ties, found.losses, found.unjudged) == (3, 1, 1, 1)
    assert found.rate == pytest.approx(3.5 / 5)
    assert (found.length, found.other_length) == (7 / 5, 7 / 5)


def test_the_same_text_is_a_tie_without_asking_the_judge() -> None:
    found = against(["x", "2"], [" x ", "1"])
    assert (found.wins, found.ties, found.unjudged) == (1, 1, 0)


def test_a_judge_that_decides_nothing_is_an_error_with_its_reason() -> None:
    with pytest.raises(RunFailed, match="decided none of 2 prompts; the last reason: x is no number"):
        against(["x", "x"], ["1", "2"])


def test_the_interval_holds_95_percent_of_the_resampled_rates() -> None:
    assert interval(5, 0, 0, seed=0) == (1.0, 1.0)
    assert interval(0, 3, 0, seed=0) == (0.5, 0.5)
    # Of 4 prompts half won, the rate is Binomial(4, 1/2) / 4: 0 and 1 have probability 1/16 each, more than 2.5 %.
    assert interval(2, 0, 2, seed=0) == (0.0, 1.0)
    # 100 prompts: the binomial's 2.5th and 97.5th percentiles are 40 and 60; ties halve the spread: sqrt(100 * .25 * .5) = 3.5 points, twice.
    assert interval(50, 0, 50, seed=1) == (pytest.approx(0.40, abs=0.011), pytest.approx(0.60, abs=0.011))
    assert interval(25, 50, 25, seed=1) == (pytest.approx(0.43, abs=0.011), pytest.approx(0.57, abs=0.011))
    assert interval(7, 2, 4, seed=3) == interval(7, 2, 4, seed=3)


def test_length_that_explains_nothing_changes_nothing() -> None:
    # Three of four won where the answer is longer, three of four where it is shorter: b = 0 solves the fit, so sigmoid(a) is the rate.
    scores, differences = [1, 1, 1, 0, 1, 1, 1, 0], [5, 5, 5, 5, -5, -5, -5, -5]
    assert length_controlled_rate(scores, differences) == pytest.approx(0.75)
    assert length_controlled_rate([1, 0, 0.5, 1], [0, 0, 0, 0]) == 0.625


def test_length_that_explains_all_leaves_an_even_match() -> None:
    assert length_controlled_rate([1, 1, 0, 0], [9, 9, -9, -9]) == pytest.approx(0.5)


def test_a_lead_by_length_shrinks() -> None:
    # Wins exactly where it is longer, 3 of 4 times: with z = +-1 the fit solves 3 (1 - p) = q and 3 (1 - p) + q = b,
    # where p = sigmoid(a + b), q = sigmoid(a - b). So b = 2 q; at the solution below both hold to 1e-3.
    rate = length_controlled_rate([1, 1, 1, 0], [4, 4, 4, -4])
    a = math.log(rate / (1 - rate))
    b = next(b / 1e4 for b in range(20_000) if b / 1e4 >= 2 / (1 + math.exp(b / 1e4 - a)))
    p, q = 1 / (1 + math.exp(-a - b)), 1 / (1 + math.exp(b - a))
    assert 3 * (1 - p) == pytest.approx(q, abs=1e-3)
    assert 0.5 < rate < 0.75


def test_a_clean_sweep_stays_one() -> None:
    assert length_controlled_rate([1, 1], [3, -1]) == 1.0
    assert length_controlled_rate([0, 0], [3, -1]) == 0.0


def test_the_scale_of_lengths_does_not_matter_and_sides_mirror() -> None:
    scores, differences = [1, 0, 0.5, 1, 1, 0], [30, -10, 5, 12, -7, 22]
    rate = length_controlled_rate(scores, differences)
    assert length_controlled_rate(scores, [1000 * value for value in differences]) == pytest.approx(rate)
    assert length_controlled_rate([1 - score for score in scores], [-value for value in differences]) == pytest.approx(1 - rate)
