"""The endpoint's client against a real local server that misbehaves on request."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any

import pytest

from sgpo_dist.config import EndpointConfig
from sgpo_dist.endpoint import BudgetSpent, Endpoint, EndpointFailed, shared_among
from sgpo_dist.errors import ConfigError, EnvironmentProblem
from sgpo_dist.records import Message
from tests.fake_endpoint import DROPS, EMPTY, HANGS, JUNK, WRONG_JSON, FakeEndpoint, Fault, broken, in_order, overloaded

KEY = "sk-hush-hush-0123456789"
HELLO = [Message("user", "hello")]
NOW = 1_700_000_000.0


class Pauses:
    """Sleeps no time and remembers how long it should have."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await asyncio.sleep(0)


def client(server: FakeEndpoint, pauses: Pauses | None = None, jitter: float = 0.5, key: str = KEY, **settings: Any) -> Endpoint:
    config = EndpointConfig.model_validate({"base_url": server.url, "model": "m", "timeout_s": 20.0, **settings})
    return Endpoint(config, {"OPENAI_API_KEY": key}, clock=lambda: NOW, sleep=pauses or Pauses(), jitter=lambda: jitter)


def run(endpoint: Endpoint, work: Callable[[], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        try:
            return await work()
        finally:
            await endpoint.close()

    return asyncio.run(whole())


def answer(endpoint: Endpoint, **more: Any) -> str:
    text: str = run(endpoint, lambda: endpoint.ask(HELLO, **more))
    return text


def test_sends_what_the_settings_say_and_gives_the_text() -> None:
    with FakeEndpoint(lambda body: body["messages"][0]["content"] + " you") as server:
        assert answer(client(server, temperature=0.3, max_tokens=77)) == "hello you"
    assert server.bodies == [{"model": "m", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.3, "max_tokens": 77}]
    assert server.keys == [f"Bearer {KEY}"]


def test_an_endpoint_without_keys_gets_none() -> None:
    with FakeEndpoint() as server:
        answer(client(server, key=""))
    assert server.keys == [None]


@pytest.mark.fault(25, invariants="I9")
def test_passing_faults_are_tried_again_after_growing_jittered_pauses() -> None:
    pauses = Pauses()
    with FakeEndpoint(fault=in_order(overloaded("7"), broken(500), broken(503), overloaded())) as server:
        endpoint = client(server, pauses, jitter=0.5)
        assert answer(endpoint) == "fine"
    # half of 1, 2, 4 and 8 s, the first one on top of the 7 s that were asked for
    assert pauses.seconds == [7.5, 1.0, 2.0, 4.0]
    assert endpoint.counts.requests == 5
    assert endpoint.counts.retries == {"status_429": 2, "status_500": 1, "status_503": 1}
    assert endpoint.counts.failures == {}


def test_a_pause_may_be_asked_for_as_a_date_and_nonsense_is_none() -> None:
    pauses = Pauses()
    faults = overloaded(formatdate(NOW + 20, usegmt=True)), overloaded("soon"), overloaded("-5"), overloaded("nan")
    with FakeEndpoint(fault=in_order(*faults)) as server:
        answer(client(server, pauses, jitter=0.0))
    assert pauses.seconds == [20.0, 0.0, 0.0, 0.0]


def test_pauses_stop_growing_and_retries_end() -> None:
    pauses = Pauses()
    with FakeEndpoint(fault=lambda number: broken()) as server:
        endpoint = client(server, pauses, jitter=1.0, max_retries=7)
        with pytest.raises(EndpointFailed, match="no answer in 8 attempts; the last one: status 500"):
            answer(endpoint)
    assert pauses.seconds == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert (len(server.bodies), endpoint.counts.failures) == (8, {"status_500": 1})


def test_a_pause_of_hours_is_not_waited_for() -> None:
    pauses = Pauses()
    with FakeEndpoint(fault=in_order(overloaded("7200"))) as server, pytest.raises(EndpointFailed):
        answer(client(server, pauses))
    assert (len(server.bodies), pauses.seconds) == (1, [])


@pytest.mark.fault(25, invariants="I9")
def test_hangs_drops_and_unreadable_bodies_are_tried_again() -> None:
    with FakeEndpoint(fault=in_order(JUNK, HANGS, WRONG_JSON, DROPS, EMPTY)) as server:
        endpoint = client(server, timeout_s=0.4)
        assert answer(endpoint) == "fine"
    assert endpoint.counts.retries == {"unreadable": 2, "timeout": 1, "connection": 1, "empty": 1}


@pytest.mark.parametrize(
    "body",
    ["", "[]", "{}", "null", '{"choices": [{"message": {"content": 7}}]}', '{"choices": [{"message": "x"}]}', "[" * 100_000, '{"choices": "x"}'],
)
def test_bodies_that_are_no_answer(body: str) -> None:
    with FakeEndpoint(fault=lambda number: Fault(body=body)) as server, pytest.raises(EndpointFailed, match="2 attempts") as caught:
        answer(client(server, max_retries=1))
    assert len(str(caught.value)) < 500


def test_the_reason_of_an_empty_answer_is_told() -> None:
    with FakeEndpoint(fault=lambda number: EMPTY) as server, pytest.raises(EndpointFailed, match=r"empty .finish_reason 'length'"):
        answer(client(server, max_retries=0))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (broken(401), "refuses the key in OPENAI_API_KEY .status 401.; put a valid key"),
        (broken(403), "refuses the key"),
        (broken(404), "knows no model 'm'.*correct the endpoint's model and base_url"),
        (broken(402), "no credit left"),
        (Fault(429, '{"error": {"code": "insufficient_quota"}}'), "no credit left"),
    ],
)
def test_what_no_retry_can_mend_ends_at_once(fault: Fault, message: str) -> None:
    with FakeEndpoint(fault=lambda number: fault) as server, pytest.raises(EnvironmentProblem, match=message) as caught:
        answer(client(server))
    assert (len(server.bodies), "\n" in str(caught.value), KEY in str(caught.value)) == (1, False, False)


def test_a_missing_key_is_named() -> None:
    with FakeEndpoint(fault=in_order(broken(401))) as server, pytest.raises(EnvironmentProblem, match="OPENAI_API_KEY is not set"):
        answer(client(server, key=""))


def test_an_address_nobody_ever_answered_at_is_a_mistake_and_a_lost_connection_later_is_not() -> None:
    with FakeEndpoint() as server:
        pass
    with pytest.raises(EnvironmentProblem, match="cannot be reached"):
        answer(client(server, max_retries=1))
    with FakeEndpoint(fault=lambda number: DROPS if number else None) as server:
        endpoint = client(server, max_retries=0)

        async def twice() -> None:
            await endpoint.ask(HELLO)
            await endpoint.ask(HELLO)

        with pytest.raises(EndpointFailed, match="no answer in 1 attempts"):
            run(endpoint, twice)


def test_a_request_that_is_refused_is_not_repeated() -> None:
    with FakeEndpoint(fault=in_order(broken(400))) as server:
        endpoint = client(server)
        with pytest.raises(EndpointFailed, match="status 400"):
            answer(endpoint)
    assert (len(server.bodies), endpoint.counts.failures) == (1, {"status_400": 1})


def test_an_endpoint_without_schemas_is_asked_plainly_from_then_on() -> None:
    with FakeEndpoint(fault=in_order(broken(400))) as server:
        endpoint = client(server)

        async def twice() -> list[str]:
            return [await endpoint.ask(HELLO, {"type": "object"}) for _ in range(2)]

        assert run(endpoint, twice) == ["fine", "fine"]
    assert [("response_format" in body) for body in server.bodies] == [True, False, False]
    assert server.bodies[0]["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_one_refused_request_does_not_end_schemas_for_the_rest() -> None:
    with FakeEndpoint(fault=in_order(broken(400), broken(400))) as server:
        endpoint = client(server)

        async def twice() -> str:
            with pytest.raises(EndpointFailed):
                await endpoint.ask(HELLO, {"type": "object"})
            return await endpoint.ask(HELLO, {"type": "object"})

        assert run(endpoint, twice) == "fine"
    assert [("response_format" in body) for body in server.bodies] == [True, False, True]


def test_a_passing_fault_of_the_plain_question_does_not_end_schemas_either() -> None:
    with FakeEndpoint(fault=in_order(broken(400), broken(500))) as server:
        assert answer(client(server), schema={"type": "object"}) == "fine"
    assert [("response_format" in body) for body in server.bodies] == [True, False, True]


def test_the_key_is_in_no_error_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    seen = []
    for status in (400, 404, 418, 500):  # each of these echoes the header that it got
        with FakeEndpoint(fault=lambda number, status=status: broken(status)) as server:
            endpoint = client(server, max_retries=1)
            with pytest.raises((EndpointFailed, EnvironmentProblem)) as caught:
                answer(endpoint)
            seen += [str(caught.value), repr(caught.value), repr(caught.value.__cause__), repr(endpoint), repr(endpoint.counts)]
            assert "you sent Bearer [hidden]" in seen[-5]
    assert caplog.text
    assert not any(KEY in text for text in [*seen, caplog.text, str([vars(record) for record in caplog.records])])


@pytest.mark.parametrize("key", ["sk-hush\nInjected: 1", "sk-hüsh", "sk-\x00hush"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(key: str) -> None:
    with pytest.raises(EnvironmentProblem, match="OPENAI_API_KEY holds characters") as caught:
        Endpoint(EndpointConfig(), {"OPENAI_API_KEY": key})
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["ftp://h/v1", "h/v1", "http:///v1", "http://h:port/v1", "http://me:hushhush@h/v1", "http://h/v1?key=hushhush", "http://[h/v1"]
)
def test_addresses_that_cannot_be_one(address: str) -> None:
    with pytest.raises(ConfigError, match="base_url must be") as caught:
        Endpoint(EndpointConfig(base_url=address), {})
    assert "hushhush" not in str(caught.value)


def test_the_budget_stops_the_asking() -> None:
    with FakeEndpoint(usage={"prompt_tokens": 30, "completion_tokens": 10, "total_tokens": 40}) as server:
        endpoint = client(server, token_budget=100)

        async def many() -> list[str]:
            return [await endpoint.ask(HELLO) for _ in range(4)]

        with pytest.raises(BudgetSpent, match="budget of 100 is spent"):
            run(endpoint, many)  # 40, 80, 120: the fourth is not asked
    assert (len(server.bodies), endpoint.counts.tokens, endpoint.counts.failures) == (3, 120, {"budget": 1})


def test_without_usage_tokens_are_estimated_from_the_bytes() -> None:
    with FakeEndpoint(lambda body: "ok 42 !") as server:  # "hello" and the answer: 12 bytes
        endpoint = client(server)
        answer(endpoint)
    assert endpoint.counts.tokens == 4


def test_an_answer_that_is_thrown_away_still_counts_its_tokens() -> None:
    body = '{"choices": [{"message": {"content": null}}], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}'
    with FakeEndpoint(fault=in_order(Fault(body=body)), usage={"prompt_tokens": 5, "completion_tokens": 6}) as server:
        endpoint = client(server)
        answer(endpoint)
    assert endpoint.counts.tokens == 18


def test_at_most_so_many_requests_at_once() -> None:
    with FakeEndpoint(pause_s=0.02) as server:
        endpoint = client(server, max_concurrency=3)
        run(endpoint, lambda: asyncio.gather(*(endpoint.ask(HELLO) for _ in range(12))))
    assert (len(server.bodies), server.most_at_once <= 3) == (12, True)


@pytest.mark.fault(25, invariants="I6")
def test_in_a_storm_every_question_is_answered_or_counted() -> None:
    weather = [overloaded("0"), None, HANGS, JUNK, None, broken(502), EMPTY, DROPS, None, WRONG_JSON, broken(400)]
    with FakeEndpoint(lambda body: f"re: {body['messages'][0]['content']}", lambda number: weather[number % len(weather)]) as server:
        endpoint = client(server, max_retries=2, timeout_s=0.4, max_concurrency=5)

        async def ask(number: int) -> str:
            try:
                return await endpoint.ask([Message("user", f"q{number}")])
            except EndpointFailed:
                return "refused"

        answers = run(endpoint, lambda: asyncio.gather(*(ask(number) for number in range(22))))
    counts = endpoint.counts
    answered = [answer == f"re: q{number}" for number, answer in enumerate(answers)]
    assert sum(answered) + answers.count("refused") == 22
    assert answers.count("refused") == sum(counts.failures.values()) > 0
    assert counts.requests == len(server.bodies) == 22 + sum(counts.retries.values())


def test_a_part_for_each_worker() -> None:
    whole = EndpointConfig(max_concurrency=8, token_budget=1000, model="m")
    assert shared_among(whole, 3) == EndpointConfig(max_concurrency=2, token_budget=333, model="m")
    assert shared_among(EndpointConfig(max_concurrency=2), 5) == EndpointConfig(max_concurrency=1)


def test_errors_cross_process_borders() -> None:
    assert str(pickle.loads(pickle.dumps(BudgetSpent("spent")))) == "spent"  # noqa: S301
