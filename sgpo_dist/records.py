"""The vocabulary: what travels between the roles. Plain frozen values without behaviour of their own.

Every package uses these. Token ids are tuples of int and are the truth that is trained on; text is for people.
Versions are weight versions: 0 is the initial model, each proved publication adds one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Any, TypeVar

T = TypeVar("T")


def pickled_as_a_call(cls: type[T]) -> type[T]:
    """Class decorator, above ``dataclass(slots=True)``: a pickled instance is a call of its class with its fields.

    Left alone, a frozen dataclass with slots is taken apart and put together again in Python, field by field, which a buffer pays for each pair.
    """
    values = attrgetter(*cls.__slots__)  # type: ignore[attr-defined]

    def reduce(self: T) -> tuple[type[T], tuple[Any, ...]]:
        return cls, values(self)

    cls.__reduce__ = reduce  # type: ignore[assignment]
    return cls


class Role(StrEnum):
    """Which of its two roles the one model plays."""

    POLICY = "policy"
    IMPROVER = "improver"


class Stage(StrEnum):
    """The stages of a run, in their order."""

    SFT = "sft"
    IMPROVER = "improver"
    PREFERENCE = "preference"


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class RefusalReason(StrEnum):
    """Why a prompt gave no pair; every refusal is counted under exactly one of these."""

    IDENTICAL = "identical"
    NEAR_COPY = "near_copy"
    EMPTY = "empty"
    TRUNCATED = "truncated"
    NO_EOS = "no_eos"
    META_TALK = "meta_talk"
    INSTRUCTION_LEAK = "instruction_leak"
    REFERENCE_LEAK = "reference_leak"
    LENGTH_BLOW_UP = "length_blow_up"
    NOTHING_TO_REPAIR = "nothing_to_repair"
    PROMPT_TOO_LONG = "prompt_too_long"
    FENCED_OUT = "fenced_out"
    DISAGREEMENT = "disagreement"
    NO_REFERENCE = "no_reference"
    TIE = "tie"
    UNJUDGED = "unjudged"
    POISON = "poison"


@pickled_as_a_call
@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn."""

    role: str
    content: str


@pickled_as_a_call
@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy is asked. ``reference`` is a trusted answer, or None for a bare prompt.

    ``rejected`` is a given weaker answer; with it the reference is a given pair's chosen half. Pairs of this kind never enter the buffer.
    """

    prompt_id: str
    messages: tuple[Message, ...]
    reference: str | None = None
    source: str = "user"
    rejected: str | None = None

    @property
    def text(self) -> str:
        """The last user turn, for people and for text measures."""
        return self.messages[-1].content


@pickled_as_a_call
@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled (or written) answer. ``token_ids`` include the end token when ``finish_reason`` is STOP.

    ``version`` is the oldest weight version that sampled any of its tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    version: int


@pickled_as_a_call
@dataclass(frozen=True, slots=True)
class PreferencePair:
    """(prompt, response, refinement): refinement is preferred. In the improver stage the refinement is a reviser's revision."""

    uid: str
    stage: Stage
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    response: Completion
    refinement: Completion
    template: str

    @property
    def chosen(self) -> Completion:
        """The preferred text: the refinement."""
        return self.refinement

    @property
    def rejected(self) -> Completion:
        """The text it is preferred over: the policy's own response."""
        return self.response

    @property
    def version(self) -> int:
        """The oldest weight version either half was sampled from; staleness counts from here."""
        return min(self.response.version, self.refinement.version)


@pickled_as_a_call
@dataclass(frozen=True, slots=True)
class Refusal:
    """A prompt that gave no pair, and why. The texts are kept for people where there are any."""

    uid: str
    stage: Stage
    prompt_id: str
    reason: RefusalReason
    detail: str = ""
    response: Completion | None = None
    refinement: Completion | None = None


Outcome = PreferencePair | Refusal


@dataclass(frozen=True, slots=True)
class TokenExample:
    """One row of NLL training: loss on ``completion_ids`` only, given ``prompt_ids``; ``weight`` scales its share of the mean.

    ``token_weights`` scale single completion tokens (one each); empty = all 1.
    """

    uid: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    weight: float = 1.0
    token_weights: tuple[float, ...] = ()


def outcome_uid(run_seed: int, stage: Stage, prompt_id: str, epoch: int, sample: int) -> str:
    """Deterministic name of an outcome (32 hex digits): a retried generation maps to the same row."""
    key = f"{run_seed}\x1f{stage}\x1f{prompt_id}\x1f{epoch}\x1f{sample}"
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def sampling_seed(uid: str, role: Role, attempt: int = 0) -> int:
    """Seed of one generation in [0, 2**31): a function of the outcome's uid and the role, so any worker draws the same."""
    digest = hashlib.blake2b(f"{uid}\x1f{role}\x1f{attempt}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF
