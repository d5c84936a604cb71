"""Whether fresh draws of the model's two roles side with a pair: each votes for the chosen text, for the rejected one, or for neither. Pure.

Called by the rollout workers on pairs that passed the gate; they hand in the draws, or the log-probs of both texts. A pair that the model
itself would not make again in the same order teaches noise. Leaves out: drawing, scoring, and what becomes of the pair.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import fmean
from typing import Final

from sgpo_dist.config import AgreementConfig
from sgpo_dist.textual import similarity

LIKELIHOOD: Final = "likelihood"
_ROLES: Final = 2


def vote(draw: str, chosen: str, rejected: str, how: str) -> int:
    """+1 for the chosen text, -1 for the rejected one, 0 for neither. ``how`` is "equal" or "similarity"."""
    if how == "similarity":
        return _sign(similarity(draw, chosen) - similarity(draw, rejected))
    same = canonical(draw)
    return (same == canonical(chosen)) - (same == canonical(rejected))


def likelihood_vote(chosen_logps: Sequence[float], rejected_logps: Sequence[float]) -> int:
    """+1 when the chosen text has more log-prob (nats) per token than the rejected one, -1 when it has less. Each needs a token or more."""
    return _sign(fmean(chosen_logps) - fmean(rejected_logps))


def objection(votes: Sequence[int], rules: AgreementConfig) -> str:
    """Empty when the votes side with the chosen text by the margin asked for (likelihood: both roles must); else the count, for people."""
    needed = _ROLES if rules.vote == LIKELIHOOD else rules.margin
    margin = sum(votes)
    if margin >= needed:
        return ""
    return f"margin {margin:+d} of {needed:+d}: {votes.count(1)} for, {votes.count(-1)} against, {votes.count(0)} for neither"


def canonical(text: str) -> str:
    """The text without space around it; JSON in one spelling, so that neither its spacing nor the order of its keys matters."""
    text = text.strip()
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or nesting as deep
        return text


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)
