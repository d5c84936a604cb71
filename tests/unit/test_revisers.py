"""Each reviser on drafts small enough to revise by hand."""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from actors.revisers import Reviser, ReviserRefused, TidyLimits, blended, build_reviser, parse_revision, tidied
from sgpo_dist.config import EndpointConfig
from sgpo_dist.endpoint import Endpoint
from sgpo_dist.errors import ConfigError, DataError, EnvironmentProblem
from sgpo_dist.records import Completion, FinishReason, Message, Prompt, RefusalReason
from tests.fake_endpoint import EMPTY, HANGS, JUNK, FakeEndpoint, broken, overloaded

REFERENCE = "Boil the water first. Add the leaves to the pot. Wait three minutes."


def draft(text: str, finish: FinishReason = FinishReason.STOP) -> Completion:
    return Completion(text, (1, 2), finish, 0)


def prompt(reference: str | None = REFERENCE, source: str = "user") -> Prompt:
    return Prompt("p1", (Message("user", "How do I make tea?"),), reference, source)


def revise(reviser: Reviser, text: str, finish: FinishReason = FinishReason.STOP, asked: Prompt | None = None) -> str | None:
    return asyncio.run(reviser.revise(asked or prompt(), draft(text, finish)))


def test_tidy_drops_the_sentence_that_the_limit_cut() -> None:
    assert tidied("Heat water. Add the leaves. Then you wai", ended=False) == "Heat water. Add the leaves."


def test_tidy_leaves_a_tidy_answer_that_ended_alone_but_ends_one_that_was_cut() -> None:
    assert tidied("Heat water. Add leaves.", ended=True) is None
    assert tidied("Heat water. Add leaves.", ended=False) == "Heat water. Add leaves."


def test_tidy_drops_near_repeats() -> None:
    # "add the leaves to the pot" and "add the leaves to a pot": 2*5/12 = 0.83, a repeat; "stir the pot" is none.
    text = "Add the leaves to the pot. Stir the pot. Add the leaves to a pot."
    assert tidied(text, ended=True) == "Add the leaves to the pot. Stir the pot."
    assert tidied(text, ended=True, limits=TidyLimits(repeat_similarity=0.9)) is None


def test_tidy_keeps_at_most_so_many_sentences_and_words() -> None:
    assert tidied("One. Two. Three. Four.", ended=True) == "One. Two. Three."
    assert tidied("One two. Three four. Five.", ended=True, limits=TidyLimits(max_words=4)) == "One two. Three four."
    assert tidied("One two three. Four.", ended=True, limits=TidyLimits(max_words=2)) == "One two three."


def test_tidy_ends_with_a_mark_and_not_with_a_lead_in() -> None:
    assert tidied("Heat the water", ended=True) == "Heat the water."
    assert tidied("Tea is easy. Do this:\n1. Heat wa", ended=False) == "Tea is easy."
    assert tidied('Tea is easy. He said "heat it. Then sti', ended=False) == "Tea is easy."
    assert tidied("Buy:\n- tea\n- milk\n- pears", ended=True) == "Buy:\n- tea\n- milk."


@pytest.mark.parametrize("text", ['{"a": 1. B', "[1, 2", "Run this:\n```py\nx = 1. Y", "no finished sentence at all", ""])
def test_tidy_leaves_data_code_and_hopeless_cases_alone(text: str) -> None:
    assert tidied(text, ended=False) is None


def test_blend_puts_missing_sentences_where_they_fit_best_within_the_budget() -> None:
    text = "Tea is nice. Throw the leaves into the pot. Boil milk. Enjoy it."
    # Four sentences: a budget of 0.25 allows one; "Boil the water first" shares "boil" with the third one only, but "the" twice with none.
    assert blended(text, True, "Boil water first.", 0.25) == "Tea is nice. Throw the leaves into the pot. Boil water first. Enjoy it."
    assert (
        blended(text, True, "Boil water first. Add leaves to a pot.", 0.5)
        == "Tea is nice. Add leaves to a pot. Boil water first. Enjoy it."
    )
    assert (
        blended(text, True, "Boil water first. Add leaves to a pot.", 0.25)
        == "Tea is nice. Throw the leaves into the pot. Boil water first. Enjoy it."
    )


def test_blend_replaces_a_sentence_only_once() -> None:
    text, reference = "Heat the pot. Rest.", "Boil the pot now. Clean the pot after."
    assert blended(text, True, reference, 1.0) == "Boil the pot now. Rest. Clean the pot after."


def test_blend_appends_what_fits_nowhere_and_drops_an_unfinished_end() -> None:
    assert blended("Heat it. Now take so", False, "Wait three minutes.", 0.5) == "Heat it. Wait three minutes."
    assert blended("Now take so", False, REFERENCE, 0.5) == "Boil the water first."


def test_blend_without_budget_or_without_anything_missing() -> None:
    assert blended("Heat it.", True, REFERENCE, 0.0) is None
    assert blended('{"a": 1}', True, REFERENCE, 1.0) is None
    assert blended("Heat it.", True, '{"a": 1}', 1.0) is None
    assert blended(REFERENCE, True, REFERENCE, 0.5) is None
    assert blended("Wait three minutes! Then dri", False, REFERENCE, 0.0) == "Wait three minutes!"


def test_revisers_by_name() -> None:
    assert revise(build_reviser("tidy"), "One. Tw", FinishReason.LENGTH) == "One."
    assert revise(build_reviser("blend", blend_budget=1.0), "Wait a bit.") == "Wait a bit. Boil the water first."
    assert revise(build_reviser("blend"), "Wait.", asked=prompt(None)) is None
    assert revise(build_reviser({"default": "tidy"}), "One. Tw", FinishReason.LENGTH) == "One."
    with pytest.raises(ConfigError, match="'polish' is not available"):
        build_reviser("polish")
    with pytest.raises(ConfigError, match="'self' is not available"):
        build_reviser("self")
    with pytest.raises(ConfigError, match="'openai' is not available"):
        build_reviser("openai")


def test_another_reviser_for_another_source() -> None:
    mixed = build_reviser({"notes": "blend", "chat": "tidy"})
    assert revise(mixed, "Heat. Th", FinishReason.LENGTH, prompt(source="chat")) == "Heat."
    assert revise(mixed, "Heat. Th", FinishReason.LENGTH, prompt(source="notes")) == "Heat. Boil the water first."
    with pytest.raises(ConfigError, match="source 'orders'"):
        revise(mixed, "Heat.", asked=prompt(source="orders"))


def test_self_shows_the_model_the_reference_and_drops_what_was_cut() -> None:
    class Book:
        def revise_ids(self, asked: Prompt, text: str, reference: str) -> tuple[int, ...]:
            assert (asked.prompt_id, text, reference) == ("p1", "Heat.", REFERENCE)
            return (5, 6)

    async def answers(ids: tuple[int, ...]) -> Completion:
        assert ids == (5, 6)
        return draft('"Boil it."')

    async def cut(ids: tuple[int, ...]) -> Completion:
        return draft("Boil i", FinishReason.LENGTH)

    book: Any = Book()
    assert revise(build_reviser("self", book=book, ask=answers), "Heat.") == "Boil it."
    assert revise(build_reviser("self", book=book, ask=cut), "Heat.") is None
    assert revise(build_reviser("self", book=book, ask=answers), "Heat.", asked=prompt(None)) is None


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("sgpo_test_hooks")
    monkeypatch.setitem(sys.modules, "sgpo_test_hooks", module)
    return module


def repairer(hooks: ModuleType, function: Any) -> Reviser:
    hooks.fix = function  # type: ignore[attr-defined]
    return build_reviser("repair", repair="sgpo_test_hooks:fix")


def test_repair_calls_the_users_function_with_texts(hooks: ModuleType) -> None:
    seen = []

    def fix(text: str, reference: str | None, question: str) -> str:
        seen.append((text, reference, question))
        return " Hot water. "

    assert revise(repairer(hooks, fix), "Cold water.") == "Hot water."
    assert seen == [("Cold water.", REFERENCE, "How do I make tea?")]


def test_repair_that_changes_nothing_is_nothing_to_repair(hooks: ModuleType) -> None:
    assert revise(repairer(hooks, lambda text, *_: text + "\n"), "Cold.") is None
    assert revise(repairer(hooks, lambda *_: None), "Cold.") is None


def test_repair_mends_a_starter_order() -> None:
    reviser = build_reviser("repair", repair="sgpo_dist.starter.orders:repair")
    truth = '{"name": "A", "item": "cups", "quantity": 2, "city": "Rome", "date": "2026-01-02", "price": 8, "urgent": false}'
    assert revise(reviser, truth.replace("Rome", "Oslo"), asked=prompt(truth)) == truth


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda *_: 1 / 0, "failed: ZeroDivisionError"),
        (lambda *_: 7, "must return a string or None, not int"),
        (lambda: "x", "failed: TypeError"),
    ],
)
def test_a_repair_function_that_fails_is_a_data_error_naming_the_prompt(hooks: ModuleType, function: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"'sgpo_test_hooks:fix' on prompt 'p1' {message}") as caught:
        revise(repairer(hooks, function), "Cold.")
    assert "\n" not in str(caught.value)


def test_a_repair_function_that_hangs_meets_its_deadline(hooks: ModuleType) -> None:
    from dataclasses import replace

    hooks.fix = lambda *_: time.sleep(0.3)  # type: ignore[attr-defined]
    slow: Any = build_reviser("repair", repair="sgpo_test_hooks:fix")
    with pytest.raises(DataError, match="no answer within"):
        revise(replace(slow, timeout_s=0.02), "Cold.")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "must be 'module:function'"),
        ("module", "must be 'module:function'"),
        ("no_such_module_here:fix", "cannot be imported: ModuleNotFoundError"),
        ("sgpo_dist.starter.orders:nothing", "has no function 'nothing'"),
        ("sgpo_dist.starter.orders:KEYS", "has no function 'KEYS'"),
    ],
)
def test_a_repair_function_that_cannot_be_had_is_a_config_error(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_reviser("repair", repair=name)


# ---- reference -------------------------------------------------------------------------------------------------------------------


def refusal(reviser: Reviser, text: str, asked: Prompt | None = None) -> tuple[RefusalReason, str]:
    with pytest.raises(ReviserRefused) as caught:
        revise(reviser, text, asked=asked)
    return caught.value.reason, caught.value.detail


def test_reference_is_the_revision() -> None:
    assert revise(build_reviser("reference"), "Heat.") == REFERENCE
    assert revise(build_reviser("reference"), f" {REFERENCE}\n") is None
    assert refusal(build_reviser("reference"), "Heat.", prompt(None))[0] is RefusalReason.NO_REFERENCE


def test_a_refusal_crosses_process_borders() -> None:
    copy = pickle.loads(pickle.dumps(ReviserRefused(RefusalReason.UNJUDGED, "no answer")))  # noqa: S301
    assert (copy.reason, copy.detail, str(copy)) == (RefusalReason.UNJUDGED, "no answer", "unjudged: no answer")


# ---- file ------------------------------------------------------------------------------------------------------------------------


def revisions(path: Path, *rows: Any) -> Reviser:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return build_reviser("file", revisions_path=str(path))


def test_file_finds_the_revision_by_id_and_then_by_text(tmp_path: Path) -> None:
    by_both = revisions(
        tmp_path / "r.jsonl", {"id": "p1", "revision": " By id. "}, {"prompt": "How do  I make tea?\n", "revision": "By text."}
    )
    assert revise(by_both, "Heat.") == "By id."
    assert revise(by_both, "By id.") is None
    assert revise(by_both, "Heat.", asked=Prompt("p2", (Message("system", "Be kind."), Message("user", "How do I make tea?")))) == "By text."


def test_file_knows_conversations_and_numbers(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "How?"}]
    reviser = revisions(tmp_path / "r.jsonl", {"prompt": turns, "revision": "Boil."}, {"id": 7, "revision": "Seven."})
    asked = Prompt("p2", tuple(Message(turn["role"], turn["content"]) for turn in turns))
    assert revise(reviser, "Heat.", asked=asked) == "Boil."
    assert revise(reviser, "Heat.", asked=Prompt("7", (Message("user", "Six?"),))) == "Seven."
    reason, detail = refusal(reviser, "Heat.", Prompt("p3", (Message("user", "How?"),)))
    assert (reason, detail) == (RefusalReason.NOTHING_TO_REPAIR, "improver.revisions_path has no row for the prompt")


def test_file_reads_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"id": ["p1", "p2"], "prompt": [None, "How?"], "revision": ["Boil.", "So."]})
    pyarrow.parquet.write_table(table, tmp_path / "r.parquet")
    reviser = build_reviser("file", revisions_path=str(tmp_path / "r.parquet"))
    assert revise(reviser, "Heat.") == "Boil."
    assert revise(reviser, "Heat.", asked=Prompt("other", (Message("user", "How?"),))) == "So."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "line 2: the row must be a JSON object"),
        ({"id": "a"}, "line 2: column 'revision' must hold a text"),
        ({"id": "a", "revision": " "}, "line 2: column 'revision' must hold a text"),
        ({"revision": "x"}, "line 2: needs a column 'id' or 'prompt'"),
        ({"id": True, "revision": "x"}, "line 2: needs a column 'id' or 'prompt'"),
        ({"prompt": [], "revision": "x"}, "line 2: 'prompt' must be a text, or a list"),
        ({"prompt": [{"content": "x"}], "revision": "x"}, "line 2: 'prompt' must be a text, or a list"),
        ({"prompt": 5, "revision": "x"}, "line 2: 'prompt' must be a text, or a list"),
        ({"id": "good", "revision": "x"}, "line 2: the same prompt has a revision at .*r.jsonl line 1"),
    ],
)
def test_file_names_the_line_of_a_bad_row(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        revisions(tmp_path / "r.jsonl", {"id": "good", "revision": "y"}, row)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"improver.revisions_path '' must name"):
        build_reviser("file")
    with pytest.raises(DataError, match="holds no revisions"):
        revisions(tmp_path / "r.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "revision": "b"}\n{oh')
    with pytest.raises(DataError, match="line 2: invalid JSON"):
        build_reviser("file", revisions_path=str(tmp_path / "bad.jsonl"))


# ---- openai ----------------------------------------------------------------------------------------------------------------------


async def no_pause(seconds: float) -> None:
    await asyncio.sleep(0)


def endpoint_of(server: FakeEndpoint, **settings: Any) -> Endpoint:
    config = EndpointConfig.model_validate({"base_url": server.url, "model": "m", "timeout_s": 0.4, "max_retries": 1, **settings})
    return Endpoint(config, {}, sleep=no_pause)


def ask(server: FakeEndpoint, text: str, asked: Prompt | None = None, **settings: Any) -> str | None:
    endpoint = endpoint_of(server, **settings)

    async def whole() -> str | None:
        try:
            return await build_reviser("openai", endpoint=endpoint).revise(asked or prompt(), draft(text))
        finally:
            await endpoint.close()

    return asyncio.run(whole())


def answering(revision: str) -> FakeEndpoint:
    return FakeEndpoint(lambda body: json.dumps({"reasoning": "It is cold.", "revision": revision}))


def test_openai_shows_draft_and_reference_and_asks_for_two_fields() -> None:
    turns = (Message("user", "Tea?"), Message("assistant", "Yes."), Message("user", "How, {{ x }} <b>?"))
    with answering(" Hot water. ") as server:
        assert ask(server, "Cold water.", Prompt("p1", turns, REFERENCE)) == "Hot water."
    told = server.bodies[0]["messages"][0]["content"]
    assert "<conversation>\nUser: Tea?\nAssistant: Yes.\nUser: How, {{ x }} <b>?\n</conversation>" in told
    assert "<draft>\nCold water.\n</draft>" in told
    assert f"<trusted>\n{REFERENCE}\n</trusted>" in told
    assert server.bodies[0]["response_format"]["json_schema"]["schema"]["required"] == ["reasoning", "revision"]


def test_openai_tells_no_change_from_no_revision() -> None:
    with answering("Cold water.") as server:
        assert ask(server, " Cold water.") is None
    with answering(REFERENCE) as server, pytest.raises(ReviserRefused, match="reference_leak"):
        ask(server, "Cold water.")
    with answering(REFERENCE) as server:
        assert ask(server, REFERENCE) is None
    with FakeEndpoint(lambda body: "I would rather not.") as server, pytest.raises(ReviserRefused, match="unjudged: the endpoint's answer is not"):
        ask(server, "Cold water.")
    with answering("x") as server, pytest.raises(ReviserRefused, match="no_reference"):
        ask(server, "Cold water.", prompt(None))
    assert server.bodies == []


def test_openai_failures_refuse_a_prompt_but_a_bad_key_ends_the_run() -> None:
    with FakeEndpoint(fault=lambda number: broken()) as server, pytest.raises(ReviserRefused, match=r"unjudged: .*no answer in 2 attempts"):
        ask(server, "Cold water.")
    with FakeEndpoint(fault=lambda number: broken(401)) as server, pytest.raises(EnvironmentProblem, match="OPENAI_API_KEY"):
        ask(server, "Cold water.")


def test_openai_in_a_storm_revises_or_refuses_every_draft() -> None:
    weather = [overloaded("0"), None, HANGS, None, JUNK, None, EMPTY, None, broken(503), None, None]

    def answer(body: dict[str, Any]) -> str:
        text = body["messages"][0]["content"].partition("<draft>\n")[2].partition("\n</draft>")[0]
        return "Sorry?" if text.endswith("3.") else json.dumps({"reasoning": "", "revision": text.replace("Cold", "Hot")})

    with FakeEndpoint(answer, lambda number: weather[number % len(weather)]) as server:
        endpoint = endpoint_of(server, max_concurrency=15, max_retries=20)
        reviser = build_reviser({"default": "openai"}, endpoint=endpoint)

        async def outcome(number: int) -> str | None:
            try:
                return await reviser.revise(prompt(), draft(f"Cold {number}."))
            except ReviserRefused as problem:
                return problem.reason

        async def whole() -> list[str | None]:
            try:
                return await asyncio.gather(*(outcome(number) for number in range(15)))
            finally:
                await endpoint.close()

        outcomes = asyncio.run(whole())
    assert outcomes == ["unjudged" if number % 10 == 3 else f"Hot {number}." for number in range(15)]


def test_openai_stops_at_its_budget_and_refuses_the_rest() -> None:
    answer = json.dumps({"reasoning": "", "revision": "Hot."})
    with FakeEndpoint(lambda body: answer, usage={"prompt_tokens": 60, "completion_tokens": 40}) as server:
        endpoint = endpoint_of(server, token_budget=150)
        reviser = build_reviser("openai", endpoint=endpoint)

        async def whole() -> None:
            assert await reviser.revise(prompt(), draft("Cold.")) == "Hot."
            assert await reviser.revise(prompt(), draft("Cold.")) == "Hot."
            with pytest.raises(ReviserRefused, match=r"unjudged: .*budget of 150 is spent"):
                await reviser.revise(prompt(), draft("Cold."))
            await endpoint.close()

        asyncio.run(whole())
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    ("answer", "revision"),
    [
        ('{"reasoning": "r", "revision": " Hot. "}', "Hot."),
        ('```json\n{"reasoning": "r", "revision": "Hot."}\n```', "Hot."),
        ('<think>{maybe}</think> Here: {"reasoning": "r", "revision": "Hot."} Good?', "Hot."),
        ('{"reasoning": "r", "revision": "Hot.\nTea."}', "Hot.\nTea."),
        ('{"answer": {"revision": "Hot."}}', "Hot."),
        ('{"revision": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"reasoning": "r", "revision": "Ho', None),
        ('{"reasoning": "r"}', None),
        ('{"revision": "  "}', None),
        ('{"revision": ["Hot."]}', None),
        ('["Hot."]', None),
        ("Hot.", None),
        ("", None),
        ("{" * 100_000, None),
        ('{"a":' * 100_000, None),
    ],
)
def test_reading_an_endpoints_answer(answer: str, revision: str | None) -> None:
    assert parse_revision(answer) == revision
