"""Asks a chat model behind an OpenAI-compatible endpoint, politely: few at a time, again after passing faults, within a token budget.

Called inside the rollout workers by the reviser ``openai`` and by the judge of that kind; one Endpoint serves all prompts of a task.
Speaks POST /chat/completions and nothing else. Leaves out: what is asked, and how an answer is read. The key never leaves this file:
it is in no log line, no error and no text form of anything here.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx

from sgpo_dist.config import ADDRESS_RULE, EndpointConfig, is_address
from sgpo_dist.errors import ConfigError, EnvironmentProblem, RunFailed
from sgpo_dist.records import Message
from sgpo_dist.sanitize import SHORTEST_SECRET, one_line, redact_text

FIRST_BACKOFF_S: Final = 1.0
LONGEST_BACKOFF_S: Final = 30.0
LONGEST_WAIT_S: Final = 300.0
"""An endpoint that asks for a longer pause is given up on for this prompt."""
BYTES_PER_TOKEN: Final = 3
"""For endpoints that report no usage: more tokens than English has, about as many as Chinese has."""
_PASSING: Final = frozenset({408, 409, 425, 429})
_NOT_UNDERSTOOD: Final = frozenset({400, 422})


class EndpointFailed(RunFailed):
    """One question got no answer, after all retries: the caller refuses that prompt and goes on."""


class BudgetSpent(EndpointFailed):
    """The token budget is used up: nothing more is asked; raise the endpoint's ``token_budget`` for more."""


@dataclass(frozen=True, slots=True)
class EndpointCounts:
    """Since the start: requests sent, retries and given-up questions by cause, tokens sent and received."""

    requests: int
    retries: Mapping[str, int]
    failures: Mapping[str, int]
    tokens: int


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why an attempt gave no answer though the next one may; ``wait_s`` is the pause that the endpoint asked for."""

    cause: str
    detail: str
    wait_s: float = 0.0


class Endpoint:
    """A client of one endpoint, for one event loop. ``close`` it in the end.

    ``environ`` holds the key under ``api_key_env``. ``clock`` is wall time in seconds (for pauses given as dates), ``sleep`` waits
    seconds, ``jitter`` draws from [0, 1). Raises ConfigError for an address that cannot be one, EnvironmentProblem for a key that cannot be one.
    """

    def __init__(
        self,
        config: EndpointConfig,
        environ: Mapping[str, str] = os.environ,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._config = config
        self._url = _chat_address(config.base_url)
        self._key = _key(environ, config.api_key_env)
        self._clock, self._sleep, self._jitter = clock, sleep, jitter
        self._places = asyncio.Semaphore(config.max_concurrency)
        self._client: httpx.AsyncClient | None = None
        self._requests = self._tokens = 0
        self._retries: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._was_reached = False
        self._takes_schema = True

    @property
    def counts(self) -> EndpointCounts:
        """What was asked so far, and how it went."""
        return EndpointCounts(self._requests, dict(self._retries), dict(self._failures), self._tokens)

    async def ask(self, messages: Sequence[Message], schema: Mapping[str, Any] | None = None) -> str:
        """The answer, not blank, to a conversation. ``schema`` (JSON schema) asks for JSON; endpoints without schemas ignore it.

        Raises EndpointFailed when the retries are used up or the request is refused, BudgetSpent beyond the token budget, and
        EnvironmentProblem for what no retry can mend: the key, the address, the model's name. Bounded by (max_retries + 1) requests of
        ``timeout_s``, the pauses between them, and the questions ahead in the queue. A pause keeps its place, so a struggling endpoint sees less.
        """
        attempt = 0
        async with self._places:  # partner: another question's end, which is bounded as this one is
            while True:
                result = await self._attempt(messages, schema if self._takes_schema else None)
                if isinstance(result, str):
                    return result
                if attempt == self._config.max_retries or result.wait_s > LONGEST_WAIT_S:
                    raise self._given_up(result, attempt + 1)
                self._retries[result.cause] += 1
                await self._sleep(result.wait_s + self._jitter() * min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(attempt, 16)))
                attempt += 1

    async def close(self) -> None:
        """Close the connections; the next question would open new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    # ---- one attempt --------------------------------------------------------------------------------------------------------------

    async def _attempt(self, messages: Sequence[Message], schema: Mapping[str, Any] | None) -> str | _Fault:
        reply = await self._post(messages, schema)
        if isinstance(reply, _Fault):
            return reply
        self._was_reached = True
        if reply.status_code == 200:
            return self._read(reply, messages)
        if reply.status_code in _NOT_UNDERSTOOD and schema is not None:  # many servers know no schemas: ask plainly before giving up
            result = await self._attempt(messages, None)
            self._takes_schema = self._takes_schema and not isinstance(result, str)
            return result
        return self._refused(reply)

    async def _post(self, messages: Sequence[Message], schema: Mapping[str, Any] | None) -> httpx.Response | _Fault:
        self._keep_to_budget()
        self._requests += 1
        client, body = self._connections(), self._body(messages, schema)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            async with asyncio.timeout(self._config.timeout_s):  # the whole answer: httpx's own limits are a pause between two bytes
                return await client.post(self._url, json=body, headers=headers)
        except TimeoutError:
            return _Fault("timeout", f"no answer within {self._config.timeout_s:g} s")
        except httpx.HTTPError as problem:
            return _Fault("connection", self._harmless(f"{type(problem).__name__}: {problem}"))

    def _connections(self) -> httpx.AsyncClient:
        if self._client is None:
            self._client = httpx.AsyncClient(timeout=None, limits=httpx.Limits())  # noqa: S113 - _places and asyncio.timeout are the limits
        return self._client

    def _body(self, messages: Sequence[Message], schema: Mapping[str, Any] | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "temperature": self._config.temperature,
            "max_tokens": self._config.max_tokens,
        }
        if schema is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
        return body

    def _read(self, reply: httpx.Response, messages: Sequence[Message]) -> str | _Fault:
        """The text of a 200, its tokens counted."""
        try:
            body = reply.json()
            choice = body["choices"][0]
            text = choice["message"]["content"] or ""
        except (ValueError, LookupError, TypeError, RecursionError):
            return _Fault("unreadable", f"the body is no chat completion: {self._harmless(reply.text)}")
        if not isinstance(text, str):
            return _Fault("unreadable", "the answer's content is no text")
        self._tokens += _tokens_used(body.get("usage"), messages, text)
        return text if text.strip() else _Fault("empty", f"the answer is empty (finish_reason {choice.get('finish_reason')!r:.40})")

    def _refused(self, reply: httpx.Response) -> _Fault:
        """What another status than 200 means: a fault that may pass, or an error."""
        status = reply.status_code
        if status in (401, 403):
            known = f"refuses the key in {self._config.api_key_env}" if self._key else f"wants a key and {self._config.api_key_env} is not set"
            raise EnvironmentProblem(f"endpoint {self._url} {known} (status {status}); put a valid key into that environment variable")
        said = self._harmless(reply.text)
        if status == 404:
            raise EnvironmentProblem(
                f"endpoint {self._url} knows no model '{self._config.model}' or no such path (status 404: {said}); "
                "correct the endpoint's model and base_url"
            )
        if status == 402 or (status == 429 and "insufficient_quota" in reply.text):
            raise EnvironmentProblem(f"endpoint {self._url}: the account has no credit left (status {status}); raise its limit, then resume")
        if status in _PASSING or status >= 500:
            return _Fault(f"status_{status}", f"status {status}: {said}", _retry_after(reply.headers.get("Retry-After"), self._clock()))
        self._failures[f"status_{status}"] += 1
        raise EndpointFailed(f"endpoint {self._url} refuses the request (status {status}: {said})")

    # ---- giving up ----------------------------------------------------------------------------------------------------------------

    def _keep_to_budget(self) -> None:
        """Requests under way may still overrun the budget, by one answer each."""
        budget = self._config.token_budget
        if budget is not None and self._tokens >= budget:
            self._failures["budget"] += 1
            raise BudgetSpent(f"endpoint {self._url}: the token budget of {budget} is spent; raise the endpoint's token_budget")

    def _given_up(self, fault: _Fault, attempts: int) -> EnvironmentProblem | EndpointFailed:
        """An address that nobody ever answered at is a mistake, not an outage."""
        self._failures[fault.cause] += 1
        if fault.cause == "connection" and not self._was_reached:
            return EnvironmentProblem(f"endpoint {self._url} cannot be reached ({fault.detail}); correct the endpoint's base_url, or start it")
        return EndpointFailed(f"endpoint {self._url} gave no answer in {attempts} attempts; the last one: {fault.detail}")

    def _harmless(self, text: str) -> str:
        """Foreign text for a message: one short line, without the key."""
        return one_line(redact_text(text, [self._key] if len(self._key) >= SHORTEST_SECRET else []), limit=200)


def shared_among(config: EndpointConfig, clients: int) -> EndpointConfig:
    """The part of one client among ``clients`` equal ones (one a rollout worker): concurrency and token budget divided, at least 1 each."""
    budget = config.token_budget
    part = {
        "max_concurrency": max(1, config.max_concurrency // clients),
        "token_budget": None if budget is None else max(1, budget // clients),
    }
    return config.model_copy(update=part)


def _chat_address(base_url: str) -> str:
    if not is_address(base_url):
        raise ConfigError(f"an endpoint's {ADDRESS_RULE}")
    return base_url.rstrip("/") + "/chat/completions"


def _key(environ: Mapping[str, str], name: str) -> str:
    """The key, or nothing. One that no header can carry is refused here: the HTTP library would quote it in its error."""
    key = environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise EnvironmentProblem(f"environment variable {name} holds characters that no key has; set it again")
    return key


def _tokens_used(usage: Any, messages: Sequence[Message], text: str) -> int:
    """Tokens sent and received: the endpoint's own figure, else an estimate from the length."""
    if isinstance(usage, dict):
        parts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        found = [part for part in parts if isinstance(part, int) and part >= 0]
        if len(found) == len(parts):
            return sum(found)
    written = "".join([*(message.content for message in messages), text])
    return math.ceil(len(written.encode("utf-8", "replace")) / BYTES_PER_TOKEN)


def _retry_after(value: str | None, now: float) -> float:
    """Seconds of a Retry-After header (a number, or a date); 0 without one that can be read."""
    if value is None:
        return 0.0
    try:
        wait = float(value)
    except ValueError:
        try:
            wait = parsedate_to_datetime(value).timestamp() - now
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, wait) if math.isfinite(wait) else 0.0
