"""Revisers: who rewrites a draft while improver data is built (stage 1). One step toward better, never a new answer.

Called by the rollout workers in place of the improver role. ``tidy`` and ``blend`` are plain text work, ``repair`` calls the user's own
function, ``self`` asks the model with the reference in view. None means that there is nothing to repair. Leaves out: sampling, turning
text into tokens, and the gate that judges the result.
"""

from __future__ import annotations

import asyncio
import importlib
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from sgpo_dist.errors import ConfigError, DataError
from sgpo_dist.prompts import PromptBook, parse_refinement
from sgpo_dist.records import Completion, FinishReason, Prompt
from sgpo_dist.textual import ends_complete, overlap, plain_words, sentences, similarity

Ask = Callable[[tuple[int, ...]], Awaitable[Completion]]
"""Generates from token ids; seeded, sampled and bounded in time by whoever hands it in."""
Repair = Callable[[str, str | None, str], str | None]

DEFAULT: Final = "default"
_STRUCTURED: Final = re.compile(r"\s*[{\[]|.*```", re.DOTALL)
_LEAD_IN: Final = (":", ",", ";", "-")


class Reviser(Protocol):
    """Rewrites a draft; None when it finds nothing to repair."""

    async def revise(self, prompt: Prompt, draft: Completion) -> str | None:
        """The rewritten text, to be ended by an end-of-turn token."""


@dataclass(frozen=True, slots=True)
class TidyLimits:
    """What a tidy answer may have: at most so many sentences and words; sentences this similar to an earlier one are repeats."""

    max_sentences: int = 3
    max_words: int = 60
    repeat_similarity: float = 0.7


TIDY_LIMITS: Final = TidyLimits()


@dataclass(frozen=True, slots=True)
class Tidy:
    """Model-free and without a reference: no unfinished end, no repeats, not too long, a final mark."""

    limits: TidyLimits = TIDY_LIMITS

    async def revise(self, prompt: Prompt, draft: Completion) -> str | None:
        """None when the draft is tidy and ended by itself, is JSON or code, or holds no finished sentence."""
        return tidied(draft.text, draft.finish_reason is FinishReason.STOP, self.limits)


@dataclass(frozen=True, slots=True)
class Blend:
    """Sentences of the reference take the place of the draft's, up to ``budget`` (a share of the draft's sentences)."""

    budget: float = 0.5

    async def revise(self, prompt: Prompt, draft: Completion) -> str | None:
        """None without a reference, for JSON and code, and when the draft says all that the reference says."""
        if prompt.reference is None:
            return None
        return blended(draft.text, draft.finish_reason is FinishReason.STOP, prompt.reference, self.budget)


@dataclass(frozen=True, slots=True)
class Repairer:
    """The user's function of (draft, reference, prompt text); it runs in a thread and must answer within ``timeout_s``."""

    name: str
    function: Repair
    timeout_s: float = 60.0

    async def revise(self, prompt: Prompt, draft: Completion) -> str | None:
        """What the function returns; None also when it returns the draft itself. Raises DataError when it fails."""
        try:
            text = await asyncio.wait_for(asyncio.to_thread(self.function, draft.text, prompt.reference, prompt.text), self.timeout_s)
        except TimeoutError:
            raise self._failure(prompt, f"gave no answer within {self.timeout_s:.0f} s") from None
        except Exception as problem:  # the user's code may raise anything; it enters here
            raise self._failure(prompt, f"failed: {_one_line(problem)}") from problem
        if text is not None and not isinstance(text, str):
            raise self._failure(prompt, f"must return a string or None, not {type(text).__name__}")
        return None if text is None or text.strip() == draft.text.strip() else text.strip()

    def _failure(self, prompt: Prompt, what: str) -> DataError:
        return DataError(f"improver.repair '{self.name}' on prompt '{prompt.prompt_id}' {what}")


@dataclass(frozen=True, slots=True)
class SelfReviser:
    """The model itself, with the reference in its prompt."""

    book: PromptBook
    ask: Ask

    async def revise(self, prompt: Prompt, draft: Completion) -> str | None:
        """None without a reference, and when the model did not end by itself: a text cut anywhere teaches nothing."""
        if prompt.reference is None:
            return None
        answer = await self.ask(self.book.revise_ids(prompt, draft.text, prompt.reference))
        return parse_refinement(answer.text, draft.text) if answer.finish_reason is FinishReason.STOP else None


@dataclass(frozen=True, slots=True)
class ByPromptSource:
    """Another reviser for each source of prompts; ``default`` for the rest."""

    revisers: Mapping[str, Reviser]

    async def revise(self, prompt: Prompt, draft: Completion) -> str | None:
        """Raises ConfigError for a source that has no reviser when there is no default."""
        reviser = self.revisers.get(prompt.source) or self.revisers.get(DEFAULT)
        if reviser is None:
            raise ConfigError(f"improver.reviser names no reviser for source '{prompt.source}' and no '{DEFAULT}'; add one of them")
        return await reviser.revise(prompt, draft)


def build_reviser(
    name: str | Mapping[str, str],
    *,
    repair: str = "",
    blend_budget: float = 0.5,
    limits: TidyLimits = TIDY_LIMITS,
    book: PromptBook | None = None,
    ask: Ask | None = None,
) -> Reviser:
    """The reviser of a name (self, blend, tidy, repair), or one by source. ``self`` needs ``book`` and ``ask``, ``repair`` its function.

    Raises ConfigError for an unknown name, a function that cannot be imported, or a missing need.
    """
    if not isinstance(name, str):
        build = partial(build_reviser, repair=repair, blend_budget=blend_budget, limits=limits, book=book, ask=ask)
        parts = {source: build(one) for source, one in name.items()}
        return parts[DEFAULT] if set(parts) == {DEFAULT} else ByPromptSource(parts)
    if name == "tidy":
        return Tidy(limits)
    if name == "blend":
        return Blend(blend_budget)
    if name == "repair":
        return Repairer(repair, load_repair(repair))
    if name == "self" and book is not None and ask is not None:
        return SelfReviser(book, ask)
    raise ConfigError(f"improver.reviser '{name}' is not available here; choose one of self, blend, tidy, repair")


def load_repair(name: str) -> Repair:
    """The user's 'module:function'. Raises ConfigError, one line, when it cannot be had."""
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise ConfigError(f"improver.repair must be 'module:function', not '{name}'")
    try:
        module = importlib.import_module(module_name)
    except Exception as problem:  # importing runs the user's code
        raise ConfigError(f"improver.repair: module '{module_name}' cannot be imported: {_one_line(problem)}") from problem
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"improver.repair: module '{module_name}' has no function '{function_name}'")
    repair: Repair = function
    return repair


def tidied(text: str, ended: bool, limits: TidyLimits = TIDY_LIMITS) -> str | None:
    """The tidy text, or None when there is nothing to do (or nothing to keep). ``ended`` = the draft ended by itself."""
    if _STRUCTURED.match(text):
        return None
    pieces = _without_repeats(_finished(sentences(text), ended), limits.repeat_similarity)
    pieces = _first_that_fit(pieces, limits)
    while pieces and _leads_on(pieces):
        pieces = pieces[:-1]
    result = "".join(pieces).strip()
    if result and not ends_complete(result):
        result += "."
    return None if not result or (ended and result == text.strip()) else result


def blended(text: str, ended: bool, reference: str, budget: float) -> str | None:
    """The draft with its unfinished end dropped and missing sentences of the reference put where they fit best; None if nothing changes.

    A reference sentence is missing when no draft sentence is 0.8 like it. In the reference's order, each takes the place of the free draft
    sentence that shares most words with it, or comes at the end when none shares any; ``budget`` times the draft's sentences at most.
    JSON and code have no sentences and stay as they are.
    """
    if _STRUCTURED.match(text) or _STRUCTURED.match(reference):
        return None
    pieces = _finished(sentences(text), ended)
    missing = [new for new in sentences(reference) if all(similarity(new, old) < 0.8 for old in pieces)]
    allowed = max(1, round(budget * len(pieces))) if budget > 0 else 0
    result, free = list(pieces), set(range(len(pieces)))
    for new in missing[:allowed]:
        place = max(free, key=lambda i: (overlap(pieces[i], new), -i), default=None)
        if place is None or overlap(pieces[place], new) == 0.0:
            result.append(new if new[0].isspace() else f" {new}")
        else:
            result[place] = _leading_space(pieces[place]) + new.strip()
            free.remove(place)
    joined = "".join(result).strip()
    return None if not joined or joined == text.strip() else joined


def _finished(pieces: list[str], ended: bool) -> list[str]:
    """Without the last sentence when the token limit cut it."""
    return pieces if ended or not pieces or ends_complete(pieces[-1]) else pieces[:-1]


def _without_repeats(pieces: list[str], limit: float) -> list[str]:
    kept: list[str] = []
    for piece in pieces:
        if not any(similarity(piece, earlier) >= limit for earlier in kept):
            kept.append(piece)
    return kept


def _first_that_fit(pieces: list[str], limits: TidyLimits) -> list[str]:
    """As many whole sentences from the start as the limits allow; the first one always stays."""
    kept: list[str] = []
    total = 0
    for piece in pieces[: limits.max_sentences]:
        total += len(plain_words(piece))
        if kept and total > limits.max_words:
            break
        kept.append(piece)
    return kept


def _one_line(problem: Exception) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())


def _leads_on(pieces: list[str]) -> bool:
    """Whether more must follow: a colon or comma at the end, or a quotation that is still open."""
    return pieces[-1].rstrip().endswith(_LEAD_IN) or "".join(pieces).count('"') % 2 == 1


def _leading_space(piece: str) -> str:
    return piece[: len(piece) - len(piece.lstrip())]
