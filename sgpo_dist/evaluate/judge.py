"""Judges: which of two answers to one prompt is better.

Called by the rollout workers (preference pairs 'judge') and by the win rate of ``eval``. Three kinds: nearer to the reference in embedding
space, an LLM behind an OpenAI-compatible endpoint, a function of the user's. What a judge cannot decide is an error here and is counted by
the caller. Leaves out: where the answers come from, and how verdicts become rates.

An LLM judge reads texts that a model wrote, which may try to talk to it. Each call fences every text with a mark that no text can foresee, breaks
the spellings of chat tokens, asks in both orders, and takes one letter or nothing. A text that makes the judge say the same letter whatever the
order ends as a tie; a judge that can be talked into preferring a text for its promises is beyond what a fence can prevent.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Final, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sgpo_dist.config import JudgeConfig
from sgpo_dist.endpoint import Endpoint, EndpointFailed
from sgpo_dist.errors import DataError, SgpoError
from sgpo_dist.evaluate.embedding import Embedder
from sgpo_dist.evaluate.exports import instruction
from sgpo_dist.evaluate.scoring import Scorer, checked_score
from sgpo_dist.records import Message, Prompt
from sgpo_dist.user_function import load_function

TEMPLATE: Final = "judge.v1"
SAME: Final = 1e-6
"""Scores closer than this are a tie: the same text embeds a little differently in another batch."""
SCORER_DEADLINE_S: Final = 60.0
_VERDICTS: Final = {"A": 1, "B": -1, "T": 0}
_CHAT_TOKEN: Final = re.compile(r"<(?=[|｜])|<(?=/?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn|end_of_text)>)|\[(?=/?INST\])|<(?=</?SYS>>)")


class JudgeFailed(SgpoError):
    """The judge gave no verdict on a pair: the pair is left out and counted; when it recurs, change the judge."""


class PairJudge(Protocol):
    """Compares two answers to one prompt."""

    async def prefer(self, prompt: Prompt, a: str, b: str) -> int:
        """1 when ``a`` is better, -1 when ``b`` is, 0 for a tie. Raises JudgeFailed when there is no verdict."""


class Asks(Protocol):
    """What an LLM judge needs of an endpoint."""

    async def ask(self, messages: Sequence[Message]) -> str:
        """The answer to a conversation; deadlines and retries are the endpoint's. Raises EndpointFailed when there is none."""


@dataclass(frozen=True, slots=True)
class EmbeddingJudge:
    """The answer nearer to the prompt's reference (cosine of sentence embeddings)."""

    embedder: Embedder = field(default_factory=Embedder)

    async def prefer(self, prompt: Prompt, a: str, b: str) -> int:
        """JudgeFailed without a reference."""
        if prompt.reference is None:
            raise JudgeFailed(f"prompt '{prompt.prompt_id}' has no reference, which judge 'embedding' compares with; use another judge.kind")
        near_a, near_b = await asyncio.to_thread(self.embedder.similarities, [a, b], [prompt.reference] * 2)
        return sign(near_a - near_b)


@dataclass(frozen=True, slots=True)
class ScorerJudge:
    """The answer that the user's function scores higher; it runs in a thread and must answer within ``SCORER_DEADLINE_S``."""

    scorer: Scorer

    async def prefer(self, prompt: Prompt, a: str, b: str) -> int:
        """JudgeFailed when the function fails, is late or returns no finite number."""
        try:
            return sign(await self._score(prompt, a) - await self._score(prompt, b))
        except DataError as problem:
            raise JudgeFailed(str(problem)) from problem
        except TimeoutError:
            raise JudgeFailed(f"the scorer on prompt '{prompt.prompt_id}' gave no answer within {SCORER_DEADLINE_S:.0f} s") from None

    async def _score(self, prompt: Prompt, text: str) -> float:
        return await asyncio.wait_for(asyncio.to_thread(checked_score, self.scorer, text, prompt), SCORER_DEADLINE_S)


@dataclass(frozen=True, slots=True)
class LlmJudge:
    """An LLM that is asked in both orders; only a verdict that stands in both counts, anything else is a tie.

    ``seed`` enters the marks of the fences: the same comparison is the same request again.
    """

    llm: Asks
    seed: int = 0

    async def prefer(self, prompt: Prompt, a: str, b: str) -> int:
        """JudgeFailed when either answer is missing or not one of the letters that were asked for."""
        forth, back = await asyncio.gather(self._ask(prompt, a, b), self._ask(prompt, b, a))
        return forth if forth == -back else 0

    async def _ask(self, prompt: Prompt, first: str, second: str) -> int:
        try:
            return parse_verdict(await self.llm.ask(judge_messages(prompt, first, second, self.seed)))
        except EndpointFailed as problem:
            raise JudgeFailed(str(problem)) from problem


def build_judge(config: JudgeConfig, environ: Mapping[str, str], seed: int = 0) -> PairJudge:
    """The judge that a section describes; an endpoint's key comes from ``environ``. Raises ConfigError when a function cannot be had."""
    if config.kind == "scorer":
        return ScorerJudge(load_function(config.scorer, "judge.scorer"))
    if config.kind == "openai":
        return LlmJudge(Endpoint(config.endpoint, environ), seed)
    return EmbeddingJudge()


@asynccontextmanager
async def open_judge(config: JudgeConfig, environ: Mapping[str, str], seed: int = 0) -> AsyncIterator[PairJudge]:
    """``build_judge``, with its connections closed in the end."""
    judge = build_judge(config, environ, seed)
    try:
        yield judge
    finally:
        if isinstance(judge, LlmJudge) and isinstance(judge.llm, Endpoint):
            await judge.llm.close()


def judge_messages(prompt: Prompt, first: str, second: str, seed: int) -> list[Message]:
    """One user turn: the rules, the question and both answers between marks, and what to write."""
    texts = [instruction(prompt), prompt.reference or "", first, second]
    asked, reference, answer_a, answer_b = (defused(text.strip()) for text in texts)
    text = _template().render(mark=fence_mark(seed, texts), question=asked, reference=reference, first=answer_a, second=answer_b)
    return [Message("user", text.strip())]


def fence_mark(seed: int, texts: Iterable[str]) -> str:
    """Sixteen hex digits made from the seed and all texts: to foresee it, a text would have to hold its own hash."""
    joined = "\x1f".join([str(seed), *texts])
    return hashlib.blake2b(joined.encode("utf-8", "replace"), digest_size=8).hexdigest()


def parse_verdict(text: str) -> int:
    """1, -1 or 0 of exactly one letter A, B or T, white space aside. Raises JudgeFailed for anything else."""
    verdict = _VERDICTS.get(text.strip())
    if verdict is None:
        raise JudgeFailed(f"the judge answered {text.strip()!r:.60} instead of A, B or T; use a model that follows instructions")
    return verdict


def defused(text: str) -> str:
    """Spellings of chat tokens are broken by a space, so that a server's tokenizer reads them as text."""
    return _CHAT_TOKEN.sub(lambda found: f"{found[0]} ", text)


def sign(difference: float) -> int:
    """1, -1, or 0 within ``SAME``."""
    return 0 if abs(difference) <= SAME else 1 if difference > 0 else -1


def _template() -> jinja2.Template:
    text = resources.files("sgpo_dist").joinpath("templates", f"{TEMPLATE}.jinja").read_text(encoding="utf-8")
    # Plain text for a model: escaping would change what it reads.
    environment = ImmutableSandboxedEnvironment(autoescape=False, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text)
