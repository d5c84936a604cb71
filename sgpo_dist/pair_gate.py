"""Which (response, refinement) pairs may train, and the one counted reason why another may not. Pure.

Called by the rollout workers on every finished prompt. The checks run from the cheapest fact to the vaguest one, and the first that
fires is the reason. Leaves out: generation, storage, and statistics over many pairs (``curriculum``).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, Protocol

from sgpo_dist.prompts import IMPROVER, REVISER, instruction
from sgpo_dist.records import Completion, FinishReason, PreferencePair, Refusal, RefusalReason
from sgpo_dist.roles import Lease
from sgpo_dist.textual import edit_ratio, length_ratio, overlap, plain_words

LEAK_WORDS: Final = 5
"""So many words of the instruction in a row count as a leak of it."""
ENDPOINT_REVISER: Final = "endpoint_reviser"
"""Templates of this name are read by a model behind an endpoint."""
REFERENCE: Final = "reference"
"""What a pair whose refinement is the prompt's reference, untouched, names in place of a template."""
_EDGE: Final = 100
"""Characters at either end in which talk about the task is looked for."""
_REVISED: Final = r"(?:improved|revised|rewritten|updated|corrected|refined|polished|edited|enhanced)"
_TEXT: Final = r"(?:version|answer|response|text|draft|reply|rewrite)"
_META_START: Final = re.compile(
    rf"(?:sure|certainly|of course|okay|ok|absolutely)?[\s,.!:]*(?:"
    rf"here(?:'s| is| are) (?:the|a|an|my|your|one) (?:\w+ ){{0,2}}?(?:{_REVISED}\b|(?:better|new) {_TEXT}\b)"
    rf"|(?:the |my |an? )?(?:\w+ )?{_REVISED} {_TEXT}\b\W*(?:is\b|of the (?:original|answer|text)\b|below\b|:|\n)"
    rf"|(?:new )?answer:"
    rf")"
)
_META_ANYWHERE: Final = re.compile(
    rf"\b(?:the|your) (?:original|previous|given|draft) {_TEXT}\b"
    rf"|\bthis (?:{_REVISED} )?(?:version|rewrite|revision) (?:is|has|keeps|fixes|improves|adds|now|corrects)\b"
    rf"|\bi(?:'ve| have)? (?:rewritten|rewrote|revised|improved|corrected) (?:the|your|this)\b"
)


class GateRules(Protocol):
    """The gate's values; ``config.PairGateConfig`` has them."""

    @property
    def near_copy_ratio(self) -> float:
        """Edit ratio at or below which two texts count as the same."""

    @property
    def max_length_ratio(self) -> float:
        """Longest refinement, as a multiple of the response's tokens."""

    @property
    def require_eos(self) -> bool:
        """The refinement must end by itself."""

    @property
    def allow_truncated_rejected(self) -> bool:
        """The response may be cut at the token limit."""

    @property
    def max_reference_overlap(self) -> float:
        """Word overlap with the reference above which a refinement counts as its copy; 1 = never."""


def judge(response: Completion, refinement: Completion, reference: str | None, gate: GateRules, told: str = "") -> RefusalReason | None:
    """The reason to refuse the pair, or None. ``told`` is the instruction the refinement must not repeat."""
    return (
        _unusable(response, refinement, gate)
        or _talk(response.text, refinement.text, told)
        or _disproportion(response, refinement, reference, gate)
    )


def make_outcome(
    lease: Lease,
    prompt_ids: tuple[int, ...],
    response: Completion,
    refinement: Completion | None,
    template: str,
    gate: GateRules,
) -> PreferencePair | Refusal:
    """The one outcome of a leased prompt. No refinement means that the reviser found nothing to repair.

    ``template`` names what made the refinement: a template ('improver.v1'), or a reviser that writes by itself ('tidy'). Only what a
    model was told to write can leak its instruction or the reference; a written revision may use the reference, that is its purpose. The
    reference itself (template 'reference') is no rewrite: it need only be whole and another text, whatever its length and its words.
    """
    if refinement is None:
        return _refusal(lease, RefusalReason.NOTHING_TO_REPAIR, response, None)
    if template == REFERENCE:
        reason = _unusable(response, refinement, gate)
    else:
        sampled = template.partition(".")[0] in (IMPROVER, REVISER, ENDPOINT_REVISER)
        reference = lease.prompt.reference if sampled else None
        reason = judge(response, refinement, reference, gate, instruction(template) if sampled else "")
    if reason is not None:
        return _refusal(lease, reason, response, refinement)
    return PreferencePair(lease.uid, lease.stage, lease.prompt, prompt_ids, response, refinement, template)


def fenced(pair: PreferencePair, edit_ratios: tuple[float, float] | None) -> Refusal | None:
    """The refusal of a pair whose edit ratio lies outside the fences (low, high), limits included; None when it may stay."""
    if edit_ratios is None:
        return None
    changed = edit_ratio(pair.rejected.text, pair.chosen.text)
    low, high = edit_ratios
    return None if low <= changed <= high else refused(pair, RefusalReason.FENCED_OUT, f"edit ratio {changed:.3f}, fences {low:.3f} to {high:.3f}")


def refused(pair: PreferencePair, reason: RefusalReason, detail: str) -> Refusal:
    """The refusal that takes a pair's place; its texts are kept."""
    return Refusal(pair.uid, pair.stage, pair.prompt.prompt_id, reason, detail, pair.response, pair.refinement)


def _refusal(lease: Lease, reason: RefusalReason, response: Completion, refinement: Completion | None) -> Refusal:
    detail = f"response {len(response.token_ids)} tokens ({response.finish_reason})"
    if refinement is not None:
        changed = edit_ratio(response.text, refinement.text)
        detail += f", refinement {len(refinement.token_ids)} tokens ({refinement.finish_reason}), edit ratio {changed:.3f}"
    return Refusal(lease.uid, lease.stage, lease.prompt.prompt_id, reason, detail, response, refinement)


def _unusable(response: Completion, refinement: Completion, gate: GateRules) -> RefusalReason | None:
    return _incomplete(response, refinement, gate) or _no_change(response.text.strip(), refinement.text.strip(), gate)


def _incomplete(response: Completion, refinement: Completion, gate: GateRules) -> RefusalReason | None:
    if not response.text.strip() or not refinement.text.strip():
        return RefusalReason.EMPTY
    if gate.require_eos and refinement.finish_reason is FinishReason.LENGTH:
        return RefusalReason.TRUNCATED
    if not gate.allow_truncated_rejected and response.finish_reason is FinishReason.LENGTH:
        return RefusalReason.TRUNCATED
    aborted = FinishReason.ABORT in (response.finish_reason, refinement.finish_reason)
    return RefusalReason.NO_EOS if aborted else None


def _no_change(response: str, refinement: str, gate: GateRules) -> RefusalReason | None:
    if response == refinement:
        return RefusalReason.IDENTICAL
    return RefusalReason.NEAR_COPY if edit_ratio(response, refinement) <= gate.near_copy_ratio else None


def _talk(response: str, refinement: str, told: str) -> RefusalReason | None:
    if talks_about_the_task(refinement) and not talks_about_the_task(response):
        return RefusalReason.META_TALK
    repeated = _instruction_runs(told) & _runs(refinement)
    leaked = repeated and repeated - _runs(response)
    return RefusalReason.INSTRUCTION_LEAK if leaked else None


def talks_about_the_task(text: str) -> bool:
    """Whether the text speaks of itself as a rewrite, at its start or its end."""
    text = text.casefold().strip().replace("’", "'")
    plain = text.lstrip("*_#\"'“ ")
    return bool(_META_START.match(plain) or _META_ANYWHERE.search(text[:_EDGE]) or _META_ANYWHERE.search(text[-_EDGE:]))


@lru_cache(maxsize=16)  # a run has as many as it has templates
def _instruction_runs(told: str) -> frozenset[tuple[str, ...]]:
    return _runs(told)


def _runs(text: str) -> frozenset[tuple[str, ...]]:
    found = plain_words(text)
    return frozenset(zip(*(found[start:] for start in range(LEAK_WORDS)), strict=False))


def _disproportion(response: Completion, refinement: Completion, reference: str | None, gate: GateRules) -> RefusalReason | None:
    limit = gate.max_reference_overlap
    if reference is not None and overlap(refinement.text, reference) > limit >= overlap(response.text, reference):
        return RefusalReason.REFERENCE_LEAK
    if length_ratio(len(refinement.token_ids), len(response.token_ids)) > gate.max_length_ratio:
        return RefusalReason.LENGTH_BLOW_UP
    return None
