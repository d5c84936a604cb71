"""Revisers: who rewrites a draft while improver data is built (stage 1). One step toward better, never a new answer.

Called by the rollout workers in place of the improver role. ``tidy`` and ``blend`` are plain text work, ``repair`` calls the user's own
function, ``self`` asks the model and ``openai`` a stronger one with the reference in view, ``file`` has the rows already, ``reference``
jumps straight to the reference. None means that there is nothing to repair, ReviserRefused that a revision could not be had.
Leaves out: sampling, turning text into tokens, and the gate that judges the result.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Final, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sgpo_dist.data.revisions import Revisions, load_revisions
from sgpo_dist.endpoint import Endpoint, EndpointFailed
from sgpo_dist.errors import ConfigError, DataError, SgpoError
from sgpo_dist.prompts import PromptBook, parse_refinement
from sgpo_dist.records import Completion, FinishReason, Message, Prompt, RefusalReason
from sgpo_dist.textual import ends_complete, overlap, plain_words, sentences, similarity
from sgpo_dist.user_function import load_function

Ask = Callable[[tuple[int, ...]], Awaitable[Completion]]
"""Generates from token ids; seeded, sampled and bounded in time by whoever hands it in."""
Repair = Callable[[str, str | None, str], str | None]

DEFAULT: Final = "default"
_STRUCTURED: Final = re.compile(r"\s*[{\[]|.*```", re.DOTALL)
_LEAD_IN: Final = (":", ",", ";", "-")
_MOST_OBJECTS: Final = 32
"""So many opening braces of an endpoint's answer are tried as the start of its JSON object."""
_ANSWER_SCHEMA: Final = {
    "type": "object",
    "properties": {"reasoning": {"type": "string"}, "revision": {"type": "string"}},
    "required": ["reasoning", "revision"],
    "additionalProperties": False,
}


class ReviserRefused(SgpoError):
    """This draft gets no revision, for a reason other than that it needs none: its prompt is refused under ``reason``, the run goes on."""

    def __init__(self, reason: RefusalReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class Reviser(Protocol):
    """Rewrites a draft; None when it finds nothing to repair. One serves many prompts at once, but for ``self``, whose ``ask`` is a prompt's own."""

    async def revise(self, prompt: Prompt, draft: Completion) -> str | None:
        """The rewritten text, to be ended by an end-of-turn token. Raises ReviserRefused when it could not be had."""


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
class EndpointReviser:
    """A model behind an endpoint compares the draft with the reference, reasons, then edits as little as it can."""

    endpoint: Endpoint
    template: jinja2.Template

    async def revise(self, prompt: Prompt, draft: Completion) -> str | None:
        """None when the draft comes back as it was. Raises ReviserRefused: no reference, no readable answer, or the reference itself."""
        reference = _reference(prompt)
        question = self.template.render(turns=prompt.messages, draft=draft.text.strip(), reference=reference)
        try:
            answer = await self.endpoint.ask([Message("user", question)], _ANSWER_SCHEMA)
        except EndpointFailed as problem:
            raise ReviserRefused(RefusalReason.UNJUDGED, str(problem)) from problem
        revision = parse_revision(answer)
        if revision is None:
            raise ReviserRefused(RefusalReason.UNJUDGED, "the endpoint's answer is not the JSON object that was asked for")
        if revision == reference != draft.text.strip():
            raise ReviserRefused(RefusalReason.REFERENCE_LEAK, "the endpoint gave the reference back in place of a revision")
        return None if revision == draft.text.strip() else revision


@dataclass(frozen=True, slots=True)
class FileReviser:
    """Revisions that were made before, by prompt."""

    revisions: Revisions

    async def revise(self, prompt: Prompt, draft: Completion) -> str | None:
        """None when the draft is the revision. Raises ReviserRefused for a prompt without a row."""
        revision = self.revisions.of(prompt)
        if revision is None:
            raise ReviserRefused(RefusalReason.NOTHING_TO_REPAIR, "improver.revisions_path has no row for the prompt")
        return None if revision == draft.text.strip() else revision


@dataclass(frozen=True, slots=True)
class ReferenceReviser:
    """The reference is the revision: a jump instead of a step, the improver target of SynPO."""

    async def revise(self, prompt: Prompt, draft: Completion) -> str | None:
        """None when the draft is the reference. Raises ReviserRefused without a reference."""
        reference = _reference(prompt)
        return None if reference == draft.text.strip() else reference


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
    endpoint: Endpoint | None = None,
    revisions_path: str = "",
) -> Reviser:
    """The reviser of a name, or one by source. ``self`` needs ``book`` and ``ask``, ``repair`` its function, ``openai`` an ``endpoint``.

    Build once a task (``file`` reads its rows here), but ``self`` once a prompt. Raises ConfigError for an unknown name, a function or
    file that cannot be had, or a missing need, and DataError for a bad row.
    """
    if not isinstance(name, str):
        build = partial(build_reviser, repair=repair, blend_budget=blend_budget, limits=limits, book=book, ask=ask)
        build = partial(build, endpoint=endpoint, revisions_path=revisions_path)
        parts = {source: build(one) for source, one in name.items()}
        return parts[DEFAULT] if set(parts) == {DEFAULT} else ByPromptSource(parts)
    makers: dict[str, Callable[[], Reviser]] = {
        "tidy": lambda: Tidy(limits),
        "blend": lambda: Blend(blend_budget),
        "repair": lambda: Repairer(repair, load_function(repair, "improver.repair")),
        "file": lambda: FileReviser(load_revisions(revisions_path)),
        "reference": ReferenceReviser,
    }
    if book is not None and ask is not None:
        makers["self"] = partial(SelfReviser, book, ask)
    if endpoint is not None:
        makers["openai"] = lambda: EndpointReviser(endpoint, _endpoint_template())
    if name not in makers:
        raise ConfigError(f"improver.reviser '{name}' is not available here; choose one of {', '.join(sorted(makers))}")
    return makers[name]()


def parse_revision(answer: str) -> str | None:
    """The field ``revision`` of the first JSON object in an endpoint's answer that has one, not blank; None without one.

    Text around the object (fences, thoughts, greetings) and raw line breaks in its strings are let pass; a truncated object is not.
    """
    decoder = json.JSONDecoder(strict=False)
    for brace in [match.start() for match in re.finditer(r"\{", answer)][:_MOST_OBJECTS]:
        try:
            found, _ = decoder.raw_decode(answer, brace)
        except (ValueError, RecursionError):
            continue
        revision = found.get("revision")
        if isinstance(revision, str) and revision.strip():
            return revision.strip()
    return None


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


def _reference(prompt: Prompt) -> str:
    if prompt.reference is None:
        raise ReviserRefused(RefusalReason.NO_REFERENCE, "the prompt has no reference to revise toward")
    return prompt.reference.strip()


def _endpoint_template() -> jinja2.Template:
    text = (resources.files("sgpo_dist") / "templates" / "endpoint_reviser.v1.jinja").read_text(encoding="utf-8")
    environment = ImmutableSandboxedEnvironment(autoescape=False, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text)


def _leads_on(pieces: list[str]) -> bool:
    """Whether more must follow: a colon or comma at the end, or a quotation that is still open."""
    return pieces[-1].rstrip().endswith(_LEAD_IN) or "".join(pieces).count('"') % 2 == 1


def _leading_space(piece: str) -> str:
    return piece[: len(piece) - len(piece.lstrip())]
