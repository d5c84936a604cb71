"""Held-out figures of one model in both roles, and models side by side.

``evaluate`` is called once a model with what the workers generated; ``table`` by the command line and the report. Every figure is a mean
over prompts, so two models answer the same prompts and differences can be paired. A source is scored by the user's function if it has one,
the starter set ``orders`` exactly, all others by how close they come to the reference. Leaves out: generating, and storing the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sgpo_dist.evaluate.embedding import similarities
from sgpo_dist.evaluate.scoring import Scorer, exact_score, scorer_of, share
from sgpo_dist.evaluate.text_metrics import ended, mean, repetitions, rouge_l, standard_error, token_counts
from sgpo_dist.prompts import parse_refinement
from sgpo_dist.records import Completion, Prompt
from sgpo_dist.starter import orders

Similarity = Callable[[Sequence[str], Sequence[str]], list[float]]
Values = Mapping[str, tuple[float, ...]]

NO_SCORERS: Final[Mapping[str, Scorer]] = {}
SAME: Final = 1e-6
"""Scores closer than this are equal: the same text embeds a little differently in another batch."""
DISPLAY_ORDER: Final = (
    "score",
    "exact",
    "similarity",
    "rouge_l",
    "reference_logp_per_token",
    "eos_share",
    "mean_tokens",
    "repetition",
    "improver_gain",
    "improver_better",
    "improver_worse",
    "improver_identical",
)


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One model on the ``n`` held-out prompts of one source.

    ``figures`` are means; ``per_prompt`` holds the values behind them, in prompt order, without prompts that a figure does not apply to.
    ``improver_gain`` is score(refinement) - score(response), its standard error beside it as ``improver_gain_se``.
    """

    model: str
    source: str
    figures: Mapping[str, float]
    n: int
    per_prompt: Values = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Item:
    prompt: Prompt
    response: Completion
    refinement: Completion
    logp: float | None

    @property
    def answer(self) -> str:
        return self.response.text.strip()

    @property
    def rewrite(self) -> str:
        return parse_refinement(self.refinement.text, self.response.text)


def evaluate(
    model: str,
    prompts: Sequence[Prompt],
    responses: Sequence[Completion],
    refinements: Sequence[Completion],
    reference_logps: Sequence[float | None] | None = None,
    similarity: Similarity = similarities,
    scorers: Mapping[str, Scorer] = NO_SCORERS,
) -> list[EvalRow]:
    """One row a source, in order of first appearance; the four sequences run in parallel over the held-out prompts.

    ``reference_logps`` are log-likelihoods per token (nats) of the references. ``scorers`` are the user's functions by source. Without one,
    scores need a reference, and a source without any gets the figures that need none. Raises DataError when a function fails.
    """
    logps = [None] * len(prompts) if reference_logps is None else reference_logps
    items = [_Item(*parts) for parts in zip(prompts, responses, refinements, logps, strict=True)]
    sources = list(dict.fromkeys(item.prompt.source for item in items))
    parts = {source: [item for item in items if item.prompt.source == source] for source in sources}
    return [_row(model, source, part, _score_values(part, similarity, scorer_of(source, scorers))) for source, part in parts.items()]


def table(rows: Sequence[EvalRow]) -> list[list[str]]:
    """A header and one line a source and figure, one column a model in order of first appearance.

    From the second column on, the difference to the column before it and its paired standard error stand in brackets
    where both rows still hold their values per prompt. The improver's gain carries its own standard error instead.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    cells = {(row.source, row.model): row for row in rows}
    lines = [["source", "figure", *models]]
    for source in dict.fromkeys(row.source for row in rows):
        here = [cells.get((source, model)) for model in models]
        present = {name for row in here if row for name in row.figures}
        for name in [known for known in DISPLAY_ORDER if known in present]:
            before = [None, *here[:-1]]
            lines.append([source, name, *(_cell(name, row, last) for row, last in zip(here, before, strict=True))])
    return lines


def row_tree(row: EvalRow) -> dict[str, Any]:
    """The row as JSON stores it."""
    per_prompt = {name: list(values) for name, values in row.per_prompt.items()}
    return {"model": row.model, "source": row.source, "n": row.n, "figures": dict(row.figures), "per_prompt": per_prompt}


def row_from(tree: Mapping[str, Any]) -> EvalRow:
    """A row as ``row_tree`` wrote it."""
    per_prompt = {name: tuple(values) for name, values in tree.get("per_prompt", {}).items()}
    return EvalRow(tree["model"], tree["source"], dict(tree["figures"]), tree["n"], per_prompt)


def _row(model: str, source: str, items: Sequence[_Item], scores: dict[str, tuple[float, ...]]) -> EvalRow:
    values = _plain_values(items) | scores
    figures = {name: mean(column) for name, column in values.items()}
    if "improver_gain" in values:
        figures["improver_gain_se"] = standard_error(values["improver_gain"])
    return EvalRow(model, source, figures, len(items), values)


def _plain_values(items: Sequence[_Item]) -> dict[str, tuple[float, ...]]:
    responses = [item.response for item in items]
    values = {
        "eos_share": tuple(ended(responses)),
        "mean_tokens": tuple(token_counts(responses)),
        "repetition": tuple(repetitions(responses)),
        "improver_identical": tuple(float(item.answer == item.rewrite) for item in items),
    }
    logps = tuple(item.logp for item in items if item.logp is not None)
    return values | ({"reference_logp_per_token": logps} if logps else {})


def _score_values(items: Sequence[_Item], similarity: Similarity, scorer: Scorer | None) -> dict[str, tuple[float, ...]]:
    """Nothing when there is neither a function of the user's nor a reference."""
    known = [item for item in items if item.prompt.reference is not None]
    if scorer is not None and scorer is not exact_score:
        return _scored_values(items, scorer)
    if not known:
        return {}
    return _likeness_values(known, similarity) if scorer is None else _exact_values(known)


def _scored_values(items: Sequence[_Item], scorer: Scorer) -> dict[str, tuple[float, ...]]:
    before = [share(scorer, item.answer, item.prompt) for item in items]
    after = [share(scorer, item.rewrite, item.prompt) for item in items]
    return {"score": tuple(before)} | _gains(items, before, after)


def _exact_values(items: Sequence[_Item]) -> dict[str, tuple[float, ...]]:
    exact = tuple(float(orders.exact(item.answer, _reference(item))) for item in items)
    return {"exact": exact} | _scored_values(items, exact_score)


def _likeness_values(items: Sequence[_Item], similarity: Similarity) -> dict[str, tuple[float, ...]]:
    references = [_reference(item) for item in items]
    texts = [item.answer for item in items] + [item.rewrite for item in items]
    scores = similarity(texts, references * 2)
    before, after = scores[: len(items)], scores[len(items) :]
    rouge = tuple(rouge_l(item.answer, _reference(item)) for item in items)
    return {"similarity": tuple(before), "rouge_l": rouge} | _gains(items, before, after)


def _gains(items: Sequence[_Item], before: Sequence[float], after: Sequence[float]) -> dict[str, tuple[float, ...]]:
    gains = tuple(0.0 if item.answer == item.rewrite else b - a for item, a, b in zip(items, before, after, strict=True))
    return {
        "improver_gain": gains,
        "improver_better": tuple(float(gain > SAME) for gain in gains),
        "improver_worse": tuple(float(gain < -SAME) for gain in gains),
    }


def _reference(item: _Item) -> str:
    return item.prompt.reference or ""


def _cell(name: str, row: EvalRow | None, before: EvalRow | None) -> str:
    if row is None or name not in row.figures:
        return "-"
    digits = 1 if name == "mean_tokens" else 3
    text = f"{row.figures[name]:.{digits}f}"
    if name == "improver_gain":
        return f"{row.figures[name]:+.3f} ± {row.figures['improver_gain_se']:.3f}" if "improver_gain_se" in row.figures else text
    new, old = row.per_prompt.get(name), before.per_prompt.get(name) if before else None
    if not new or not old or len(new) != len(old):
        return text
    changes = [a - b for a, b in zip(new, old, strict=True)]
    return f"{text} ({mean(changes):+.{digits}f} ± {standard_error(changes):.{digits}f})"
