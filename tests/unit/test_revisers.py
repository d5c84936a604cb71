"""Each reviser on drafts small enough to revise by hand."""

from __future__ import annotations

import asyncio
import sys
import time
from types import ModuleType
from typing import Any

import pytest

from actors.revisers import Reviser, TidyLimits, blended, build_reviser, tidied
from sgpo_dist.errors import ConfigError, DataError
from sgpo_dist.records import Completion, FinishReason, Message, Prompt

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
    truth = '{"name": "A", "item": "cups", "quantity": 2, "city": "Rome", "date": "2026-01-02", "total": 8, "urgent": false}'
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
