"""How often one model's answers beat another's, how sure that is, and how much of it is length.

Called by ``eval --against``. The judge decides pair by pair (``judge``); here verdicts become figures. Leaves out: generating the answers.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sgpo_dist.errors import RunFailed
from sgpo_dist.evaluate.judge import JudgeFailed, PairJudge
from sgpo_dist.evaluate.text_metrics import mean
from sgpo_dist.records import Prompt

RESAMPLES: Final = 10_000
TAIL: Final = 2.5
"""Percent outside the interval on each side."""
NEWTON_STEPS: Final = 100
CONVERGED: Final = 1e-10


@dataclass(frozen=True, slots=True)
class WinRate:
    """Of ``wins + ties + losses`` judged prompts: ``rate`` counts ties half; ``low`` to ``high`` is its 95 % bootstrap interval.

    Lengths are mean characters. ``length_controlled`` estimates the rate between answers of equal length (``length_controlled_rate``).
    ``unjudged`` prompts are in none of the figures.
    """

    wins: int
    ties: int
    losses: int
    unjudged: int
    rate: float
    low: float
    high: float
    length: float
    other_length: float
    length_controlled: float


async def win_rate(prompts: Sequence[Prompt], answers: Sequence[str], others: Sequence[str], judge: PairJudge, seed: int = 0) -> WinRate:
    """``answers`` against ``others``, which run in parallel with the prompts. ``seed`` draws the bootstrap.

    Raises RunFailed with the judge's reason when it decides no prompt. An LLM judge sees each pair in both orders (``LlmJudge``).
    """
    verdicts = await asyncio.gather(*(_verdict(*pair, judge) for pair in zip(prompts, answers, others, strict=True)))
    decided = [(verdict, a, b) for verdict, a, b in zip(verdicts, answers, others, strict=True) if isinstance(verdict, int)]
    if not decided:
        raise RunFailed(f"the judge decided none of {len(verdicts)} prompts; the last reason: {verdicts[-1] if verdicts else 'there are none'}")
    scores = [(1 + verdict) / 2 for verdict, _, _ in decided]
    lengths, other_lengths = [len(a) for _, a, _ in decided], [len(b) for _, _, b in decided]
    wins, losses = scores.count(1.0), scores.count(0.0)
    ties = len(scores) - wins - losses
    low, high = interval(wins, ties, losses, seed)
    controlled = length_controlled_rate(scores, [a - b for a, b in zip(lengths, other_lengths, strict=True)])
    counts = (wins, ties, losses, len(verdicts) - len(decided))
    return WinRate(*counts, mean(scores), low, high, mean(lengths), mean(other_lengths), controlled)


def interval(wins: int, ties: int, losses: int, seed: int) -> tuple[float, float]:
    """2.5th and 97.5th percentile of the rate over ``RESAMPLES`` draws of the same number of prompts with replacement (Efron, 1979).

    Prompts differ only in their verdict, so that a draw is a draw of three counts.
    """
    import numpy as np

    total = wins + ties + losses
    counts = np.random.default_rng(seed).multinomial(total, [wins / total, ties / total, losses / total], size=RESAMPLES)
    low, high = np.percentile((counts[:, 0] + counts[:, 1] / 2) / total, [TAIL, 100 - TAIL])
    return float(low), float(high)


def length_controlled_rate(scores: Sequence[float], differences: Sequence[float]) -> float:
    """The rate that is left when no answer is longer than its rival: sigmoid(a) of the fit score ~ sigmoid(a + b * z).

    ``scores`` in [0, 1] (1 = win, 0.5 = tie), z = the difference in length over its root mean square, so that no difference stays 0.
    Maximum likelihood with a standard normal prior on b, which keeps it finite when length explains everything; a has no prior. An estimate of
    our own after the idea of AlpacaEval's length control (Dubois et al., "Length-Controlled AlpacaEval", 2024), whose model also knows each
    instruction's difficulty: the numbers are not comparable.
    """
    rate, scale = mean(scores), math.sqrt(mean([difference**2 for difference in differences]))
    if scale == 0.0 or rate in (0.0, 1.0):  # nothing to control for; or a would run to infinity
        return rate
    intercept, _ = _logistic_fit([difference / scale for difference in differences], scores)
    return 1.0 / (1.0 + math.exp(-intercept))


def _logistic_fit(z: Sequence[float], scores: Sequence[float]) -> tuple[float, float]:
    """(a, b) by Newton's method from (0, 0): the penalised likelihood is concave and has one top."""
    import numpy as np

    design_n_2, target_n = np.stack([np.ones(len(z)), np.asarray(z)], axis=1), np.asarray(scores)
    penalty, weights = np.diag([0.0, 1.0]), np.zeros(2)
    for _ in range(NEWTON_STEPS):
        p_n = 1.0 / (1.0 + np.exp(-(design_n_2 @ weights)))
        gradient = design_n_2.T @ (target_n - p_n) - penalty @ weights
        step = np.linalg.solve(design_n_2.T @ (design_n_2 * (p_n * (1 - p_n))[:, None]) + penalty, gradient)
        weights = weights + step
        if np.abs(step).max() < CONVERGED:
            break
    return float(weights[0]), float(weights[1])


async def _verdict(prompt: Prompt, answer: str, other: str, judge: PairJudge) -> int | str:
    """The judge's verdict, or why there is none. The same text is a tie without asking."""
    if answer.strip() == other.strip():
        return 0
    try:
        return await judge.prefer(prompt, answer, other)
    except JudgeFailed as problem:
        return str(problem)
