"""Held-out figures and the table of models, with a hand-written similarity."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpo_dist.config import ImproverConfig, build_config
from sgpo_dist.data.loading import Corpus
from sgpo_dist.errors import ConfigError, DataError, RunFailed
from sgpo_dist.evaluate.evaluation import EvalRow, evaluate, row_from, row_tree, table
from sgpo_dist.evaluate.heldout import evaluate_heldout, improver_check, improver_verdict, sign_confidence
from sgpo_dist.evaluate.scoring import load_scorers
from sgpo_dist.records import Completion, FinishReason, Message, Prompt, TokenExample
from sgpo_dist.roles import GenerateRequest

TRUTH = '{"name": "A", "item": "cups", "quantity": 2, "city": "Rome", "date": "2026-01-02", "price": 8, "urgent": false}'
WRONG_CITY = TRUTH.replace("Rome", "Oslo")
WRONG_TWO = WRONG_CITY.replace("8", "9")


def prompt(source: str, reference: str | None) -> Prompt:
    return Prompt(f"{source}-1", (Message("user", "?"),), reference, source)


def completion(text: str, finish: FinishReason = FinishReason.STOP, tokens: int = 4) -> Completion:
    return Completion(text, tuple(range(tokens)), finish, 0)


def shared_letters(texts_a: Sequence[str], texts_b: Sequence[str]) -> list[float]:
    return [len(set(a) & set(b)) / 10 for a, b in zip(texts_a, texts_b, strict=True)]


def letters(text: str, reference: str | None, prompt: str) -> float:
    """A user's scorer: tenths of the text's length."""
    return len(text) / 10


def vowels(text: str, reference: str | None, prompt: str) -> float:
    """Another one; it needs a reference."""
    return float(text[:1] == (reference or "?")[:1])


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


# ---- the user's own scorers ------------------------------------------------------------------------------------------------------


def test_a_users_scorer_takes_the_place_of_the_reference() -> None:
    prompts = [prompt("notes", None), prompt("orders", TRUTH), prompt("chat", "abc")]
    responses, refinements = [completion("aaaa"), completion(TRUTH), completion("b")], [completion("aa"), completion(TRUTH), completion("ab")]
    notes, exact, chat = evaluate("m", prompts, responses, refinements, None, shared_letters, {"notes": letters, "chat": vowels})
    assert (notes.figures["score"], notes.figures["improver_gain"], notes.figures["improver_worse"]) == (0.4, pytest.approx(-0.2), 1.0)
    assert (chat.figures["score"], chat.figures["improver_gain"], chat.figures["improver_better"]) == (0.0, 1.0, 1.0)
    assert (exact.figures["score"], exact.figures["exact"]) == (1.0, 1.0)
    assert "similarity" not in chat.figures


def test_one_scorer_for_all_sources_scores_orders_too() -> None:
    scorers = load_scorers(f"{__name__}:letters")
    (row,) = evaluate("m", [prompt("orders", TRUTH)], [completion("aaa")], [completion("aaaa")], None, shared_letters, scorers)
    assert (row.figures["score"], row.figures["improver_gain"]) == (0.3, pytest.approx(0.1))
    assert "exact" not in row.figures


def test_scorers_are_loaded_by_source_and_refused_by_name() -> None:
    assert load_scorers("") == {}
    assert load_scorers({"chat": f"{__name__}:vowels", "default": f"{__name__}:letters"}) == {"chat": vowels, "default": letters}
    with pytest.raises(ConfigError, match=r"eval\.scorer must be 'module:function', not 'letters'"):
        load_scorers("letters")


@pytest.mark.parametrize(
    ("value", "said"),
    [(1.5, "a number from 0 to 1, not 1.5"), ("1", "a finite number, not '1'"), (float("inf"), "a finite number, not inf")],
)
def test_a_score_outside_the_scale_names_the_prompt(value: Any, said: str) -> None:
    with pytest.raises(DataError, match=f"'chat-1' must return {said}"):
        evaluate("m", [prompt("chat", "abc")], [completion("a")], [completion("b")], None, shared_letters, {"chat": lambda *_: value})


# ---- in a run --------------------------------------------------------------------------------------------------------------------


class Book:
    """Prompts and drafts as ids that the fleet below reads back: 1 for the policy's, 2 for the improver's."""

    def policy_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return (1, *map(ord, prompt.text))

    def improver_ids(self, prompt: Prompt, draft: str) -> tuple[int, ...]:
        return (2, *map(ord, draft))

    def completion_ids(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))


class Fleet:
    """The policy answers with the prompt, the improver puts an 'a' behind it, unless the draft is 'stay' or ends in 'z', which it cuts."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.temperatures: set[float] = set()

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.temperatures |= {request.sampling.temperature for request in requests}
        self.names += [request.request_id for request in requests]
        return [completion(self.text(request.prompt_ids)) for request in requests]

    def text(self, ids: Sequence[int]) -> str:
        text = "".join(map(chr, ids[1:]))
        if ids[0] == 1 or text == "stay":
            return text
        return text[:-1] if text.endswith("z") else text + "a"


class Learner:
    """Every token costs one nat."""

    async def logps(self, rows: Sequence[TokenExample]) -> list[float]:
        return [-float(len(row.completion_ids)) for row in rows]


class Recorder:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.messages: list[str] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def message(self, text: str) -> None:
        self.messages.append(text)


def a_run(directory: Path, asked: Sequence[str], scorer: str | dict[str, str], reference: str | None = None, temperature: float = 0.0) -> Any:
    heldout = tuple(Prompt(f"p{i}", (Message("user", text),), reference, "notes") for i, text in enumerate(asked))
    config = build_config({"eval": {"scorer": scorer, "max_new_tokens": 8, "temperature": temperature}})
    parts = {"config": config, "directory": directory, "corpus": Corpus((), (), heldout), "book": Book(), "fleet": Fleet(), "learner": Learner()}
    return SimpleNamespace(**parts, recorder=Recorder(), incarnation=3, progress=SimpleNamespace(global_step=7))


def test_held_out_figures_use_the_configured_scorer_and_are_kept(tmp_path: Path) -> None:
    run = a_run(tmp_path, ["aaaa", "stay"], f"{__name__}:letters", "ab")
    (row,) = asyncio.run(evaluate_heldout(cast("Any", run), "sft"))
    assert (row.figures["score"], row.figures["improver_gain"]) == (0.4, pytest.approx(0.05))
    assert row.figures["reference_logp_per_token"] == -1.0
    asked = len(run.fleet.names)
    assert asyncio.run(evaluate_heldout(cast("Any", run), "sft")) == [row]
    assert len(run.fleet.names) == asked


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_both_roles_answer_at_the_temperature_of_the_evaluation(tmp_path: Path, temperature: float) -> None:
    run = a_run(tmp_path, ["aaaa"], f"{__name__}:letters", temperature=temperature)
    asyncio.run(evaluate_heldout(cast("Any", run), "sft"))
    assert run.fleet.temperatures == {temperature}


def test_a_scorer_that_is_not_there_is_refused_before_anything_is_generated(tmp_path: Path) -> None:
    run = a_run(tmp_path, ["aaaa"], "no_such_module:score")
    with pytest.raises(ConfigError, match=r"eval\.scorer: module 'no_such_module'"):
        asyncio.run(evaluate_heldout(cast("Any", run), "sft"))
    assert run.fleet.names == []


def test_the_improver_check_gives_its_four_figures(tmp_path: Path) -> None:
    # Scores are tenths of the length: two rewrites longer (+0.1 each), one shorter (-0.1), one copy.
    run = a_run(tmp_path, ["b", "cc", "ddz", "stay"], f"{__name__}:letters")
    found = asyncio.run(improver_check(cast("Any", run), 10))
    assert found == {
        "improver/win_rate": 0.5,
        "improver/loss_rate": 0.25,
        "improver/gain": pytest.approx(0.1 / 4),
        "improver/heldout_copy_rate": 0.25,
    }
    assert len(set(run.fleet.names)) == 8


def test_the_improver_check_spreads_its_prompts_over_the_held_out_set(tmp_path: Path) -> None:
    run = a_run(tmp_path, ["b", "b", "b", "stay", "stay", "stay"], f"{__name__}:letters")
    found = asyncio.run(improver_check(cast("Any", run), 2))
    assert len(run.fleet.names) == 4
    assert (found["improver/win_rate"], found["improver/heldout_copy_rate"]) == (0.5, 0.5)


def test_the_improver_check_is_empty_when_nothing_can_be_scored(tmp_path: Path) -> None:
    assert asyncio.run(improver_check(cast("Any", a_run(tmp_path, [], "")), 4)) == {}
    assert asyncio.run(improver_check(cast("Any", a_run(tmp_path, ["a", "b"], "")), 4)) == {}


def row_with(better: float, worse: float) -> EvalRow:
    return EvalRow("improver", "chat", {"improver_better": better, "improver_worse": worse}, 9, {"improver_better": (1.0,) * 8})


def test_the_gate_passes_when_more_rewrites_are_better_than_worse() -> None:
    recorder = Recorder()
    improver_verdict([row_with(0.375, 0.25), EvalRow("improver", "bare", {"eos_share": 1.0}, 2)], ImproverConfig(gate="stop"), cast("Any", recorder))
    figures = {"source": "chat", "better": 0.375, "worse": 0.25, "ties": 0.375, "confidence": 0.5, "passed": True}
    assert recorder.events == [("improver_gate", figures)]
    assert recorder.messages == []


def test_a_gate_that_has_nothing_to_judge_says_so() -> None:
    recorder = Recorder()
    for rules in (ImproverConfig(gate="stop"), ImproverConfig(gate="warn"), ImproverConfig(gate="off")):
        improver_verdict([EvalRow("improver", "bare", {"eos_share": 1.0}, 2)], rules, cast("Any", recorder))
        improver_verdict([], rules, cast("Any", recorder))
    assert len(recorder.messages) == 4
    assert "going on unjudged" in recorder.messages[0]
    assert recorder.events == []


@pytest.mark.parametrize(("better", "worse"), [(0.25, 0.5), (0.25, 0.25), (0.0, 0.0)])
def test_the_gate_stops_or_warns_with_the_figures_otherwise(better: float, worse: float) -> None:
    line = f"on held-out 'chat' the improver's rewrite is better in {better:.0%}, worse in {worse:.0%} and as good in {1 - better - worse:.0%} of 8"
    recorder = Recorder()
    with pytest.raises(RunFailed, match=line):
        improver_verdict([row_with(better, worse)], ImproverConfig(gate="stop"), cast("Any", recorder))
    improver_verdict([row_with(better, worse)], ImproverConfig(gate="warn"), cast("Any", recorder))
    assert recorder.messages == [f"improver gate: {line} (improver.gate=warn: going on)"]
    improver_verdict([row_with(better, worse)], ImproverConfig(gate="off"), cast("Any", recorder))
    assert len(recorder.messages) == 1
    assert [fields["passed"] for _, fields in recorder.events] == [False] * 3


def test_a_gate_can_ask_to_be_surer_than_a_few_more_wins_make_it() -> None:
    recorder = Recorder()
    with pytest.raises(RunFailed, match=r"worse in 25% and as good in 38% of 8, 50% sure where 90% is asked; teach"):
        improver_verdict([row_with(0.375, 0.25)], ImproverConfig(gate="stop", gate_confidence=0.9), cast("Any", recorder))
    improver_verdict([row_with(0.5, 0.0)], ImproverConfig(gate="stop", gate_confidence=0.9), cast("Any", recorder))
    assert [fields["confidence"] for _, fields in recorder.events] == [0.5, 1 - 1 / 16]


@pytest.mark.parametrize(("wins", "losses", "p_value"), [(9, 1, 11 / 1024), (19, 8, 0.02612), (26, 25, 0.5), (2, 2, 11 / 16), (0, 3, 1), (0, 0, 1)])
def test_the_confidence_is_the_exact_sign_test_s(wins: int, losses: int, p_value: float) -> None:
    assert sign_confidence(wins, losses) == pytest.approx(1 - p_value, abs=1e-5)


@given(st.integers(0, 300), st.integers(0, 300))
def test_half_sure_is_more_wins_than_losses(wins: int, losses: int) -> None:
    assert (sign_confidence(wins, losses) >= 0.5) == (wins > losses)
