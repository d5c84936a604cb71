"""Held-out figures and the table of models, with a hand-written similarity."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from sgpo_dist.evaluate.evaluation import EvalRow, evaluate, row_from, row_tree, table
from sgpo_dist.records import Completion, FinishReason, Message, Prompt

TRUTH = '{"name": "A", "item": "cups", "quantity": 2, "city": "Rome", "date": "2026-01-02", "total": 8, "urgent": false}'
WRONG_CITY = TRUTH.replace("Rome", "Oslo")
WRONG_TWO = WRONG_CITY.replace("8", "9")


def prompt(source: str, reference: str | None) -> Prompt:
    return Prompt(f"{source}-1", (Message("user", "?"),), reference, source)


def completion(text: str, finish: FinishReason = FinishReason.STOP, tokens: int = 4) -> Completion:
    return Completion(text, tuple(range(tokens)), finish, 0)


def shared_letters(texts_a: Sequence[str], texts_b: Sequence[str]) -> list[float]:
    return [len(set(a) & set(b)) / 10 for a, b in zip(texts_a, texts_b, strict=True)]


def test_orders_are_scored_exactly() -> None:
    prompts = [prompt("orders", TRUTH)] * 4
    responses = [completion(TRUTH), completion(WRONG_CITY), completion(TRUTH), completion("nonsense", FinishReason.LENGTH, 8)]
    refinements = [completion(TRUTH), completion(TRUTH), completion(WRONG_TWO), completion(f"```json\n{WRONG_CITY}\n```")]
    (row,) = evaluate("sft", prompts, responses, refinements, [-1.0, -2.0, -3.0, None], shared_letters)
    # Scores 7/7, 6/7, 7/7, 0 and after refinement 7/7, 7/7, 5/7, 6/7: gains 0, 1/7, -2/7, 6/7.
    assert row.figures["score"] == pytest.approx(20 / 28)
    assert row.figures["exact"] == 0.5
    assert row.figures["improver_gain"] == pytest.approx(5 / 28)
    assert (row.figures["improver_better"], row.figures["improver_worse"], row.figures["improver_identical"]) == (0.5, 0.25, 0.25)
    assert (row.figures["eos_share"], row.figures["mean_tokens"]) == (0.75, 5.0)
    assert row.figures["reference_logp_per_token"] == -2.0
    # Deviations of the gains from 5/28, in 28ths: -5, -1, -13, 19; squares sum to 556.
    assert row.figures["improver_gain_se"] == pytest.approx((556 / 28**2 / 3 / 4) ** 0.5)
    assert "similarity" not in row.figures
    assert (row.model, row.source, row.n) == ("sft", "orders", 4)


def test_other_sources_are_scored_by_likeness_to_the_reference() -> None:
    prompts = [prompt("chat", "abc"), prompt("chat", "abc")]
    responses, refinements = [completion("ax"), completion("ab")], [completion("abx"), completion(" ab ")]
    (row,) = evaluate("initial", prompts, responses, refinements, None, shared_letters)
    # Similarities 0.1 and 0.2; after refinement 0.2 and, being the same text, unchanged.
    assert row.figures["similarity"] == pytest.approx(0.15)
    assert row.figures["improver_gain"] == pytest.approx(0.05)
    assert (row.figures["improver_better"], row.figures["improver_worse"], row.figures["improver_identical"]) == (0.5, 0.0, 0.5)
    assert row.figures["rouge_l"] == 0.0
    assert "reference_logp_per_token" not in row.figures


def test_identical_texts_gain_nothing_whatever_their_embedding_says() -> None:
    def noisy(texts_a: Sequence[str], texts_b: Sequence[str]) -> list[float]:
        return [place / 100 for place, _ in enumerate(texts_a)]

    (row,) = evaluate("m", [prompt("chat", "abc")], [completion("same")], [completion("same")], None, noisy)
    assert (row.figures["improver_gain"], row.figures["improver_better"]) == (0.0, 0.0)


def test_prompts_without_references_give_the_figures_that_need_none() -> None:
    (row,) = evaluate("m", [prompt("notes", None)], [completion("a")], [completion("b")], [None], shared_letters)
    assert set(row.figures) == {"eos_share", "mean_tokens", "repetition", "improver_identical"}


def test_one_row_a_source() -> None:
    prompts = [prompt("chat", "abc"), prompt("orders", TRUTH), prompt("chat", "abc")]
    answers = [completion("a"), completion(TRUTH), completion("b")]
    rows = evaluate("m", prompts, answers, answers, None, shared_letters)
    assert [(row.source, row.n) for row in rows] == [("chat", 2), ("orders", 1)]


def test_rows_survive_json() -> None:
    row = EvalRow("m", "chat", {"score": 0.5}, 2, {"score": (0.0, 1.0)})
    assert row_from(json.loads(json.dumps(row_tree(row)))) == row
    assert row_from({"model": "m", "source": "chat", "n": 2, "figures": {"score": 0.5}}) == EvalRow("m", "chat", {"score": 0.5}, 2)


def test_table_stands_models_side_by_side_with_paired_errors() -> None:
    rows = [
        EvalRow("initial", "orders", {"score": 0.25, "mean_tokens": 40.0}, 4, {"score": (0.0, 0.0, 0.5, 0.5)}),
        EvalRow("initial", "chat", {"eos_share": 0.5}, 2),
        EvalRow(
            "sft",
            "orders",
            {"score": 0.75, "improver_gain": 0.1, "improver_gain_se": 0.02, "mean_tokens": 30.0},
            4,
            {"score": (0.5, 0.5, 1.0, 1.0)},
        ),
        EvalRow("sft", "chat", {"eos_share": 0.75}, 2),
    ]
    assert table(rows) == [
        ["source", "figure", "initial", "sft"],
        ["orders", "score", "0.250", "0.750 (+0.500 ± 0.000)"],
        ["orders", "mean_tokens", "40.0", "30.0"],
        ["orders", "improver_gain", "-", "+0.100 ± 0.020"],
        ["chat", "eos_share", "0.500", "0.750"],
    ]
    assert table([]) == [["source", "figure"]]


def test_paired_error_is_that_of_the_differences() -> None:
    rows = [
        EvalRow("a", "chat", {"eos_share": 0.5}, 2, {"eos_share": (0.0, 1.0)}),
        EvalRow("b", "chat", {"eos_share": 1.0}, 2, {"eos_share": (1.0, 1.0)}),
    ]
    # Differences 1 and 0: mean 0.5, variance 0.5, standard error sqrt(0.25).
    assert table(rows)[1] == ["chat", "eos_share", "0.500", "1.000 (+0.500 ± 0.500)"]
