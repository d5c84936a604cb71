"""What an answer is worth when a function can say: the starter set's exact score, or the user's own function.

Called by the evaluation and by the judge of kind 'scorer'. Leaves out: sources that have neither (they are compared with their reference),
and how scores become figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from sgpo_dist.errors import DataError
from sgpo_dist.records import Prompt
from sgpo_dist.starter import orders
from sgpo_dist.user_function import load_function

Scorer = Callable[[str, str | None, str], Any]
"""(text, reference or None, prompt's text) -> a number, higher is better."""

ANY_SOURCE: Final = "default"
EXACT_SOURCE: Final = "orders"


def load_scorers(setting: str | Mapping[str, str], key: str = "eval.scorer") -> dict[str, Scorer]:
    """The functions of ``eval.scorer`` by data source; one name alone stands for every source, under ``ANY_SOURCE``.

    Raises ConfigError naming ``key`` when a function cannot be had.
    """
    named = {ANY_SOURCE: setting} if isinstance(setting, str) else setting
    return {source: load_function(name, key) for source, name in named.items() if name}


def scorer_of(source: str, scorers: Mapping[str, Scorer]) -> Scorer | None:
    """The source's own function, else the exact score of ``orders`` unless one function is set for all; None when nothing scores it."""
    if source in scorers:
        return scorers[source]
    return scorers.get(ANY_SOURCE) or (exact_score if source == EXACT_SOURCE else None)


def exact_score(text: str, reference: str | None, prompt: str) -> float:
    """Share of an order's fields that are right."""
    del prompt
    return orders.field_score(text, reference or "")


def checked_score(scorer: Scorer, text: str, prompt: Prompt) -> float:
    """The function's value as a finite number. Raises DataError naming the prompt when it fails or returns something else."""
    try:
        value = scorer(text, prompt.reference, prompt.text)
    except Exception as problem:  # the user's code may raise anything; it enters here
        raise _failure(prompt, " ".join(f"failed: {type(problem).__name__}: {problem}".split())) from problem
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise _failure(prompt, f"must return a finite number, not {value!r:.60}")
    return float(value)


def share(scorer: Scorer, text: str, prompt: Prompt) -> float:
    """``checked_score`` of a function whose values are shares. Raises DataError outside [0, 1]."""
    value = checked_score(scorer, text, prompt)
    if not 0.0 <= value <= 1.0:
        raise _failure(prompt, f"must return a number from 0 to 1, not {value}")
    return value


def _failure(prompt: Prompt, what: str) -> DataError:
    return DataError(f"the scorer on prompt '{prompt.prompt_id}' {what}")
