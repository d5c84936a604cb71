"""``eval --against``: arguments that cannot go together, and the way from two lists of answers to tables and JSON. No model is loaded."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from sgpo_dist.cli.comparison import check_comparison, compare
from sgpo_dist.cli.main import parse
from sgpo_dist.cli.session import Session
from sgpo_dist.errors import ConfigError
from sgpo_dist.evaluate.exports import Answer
from sgpo_dist.records import Completion, FinishReason, Message, Prompt

BASE = ("eval", "--model", "embedded", "--data", "chat")


def length(text: str, reference: str | None, prompt: str) -> float:
    return len(text) / 100


def answer(number: int, text: str) -> Answer:
    return Answer(Prompt(f"p{number}", (Message("user", "?"),)), Completion(text, (1,), FinishReason.STOP, 0), text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--judge", "embedding"), "need --against"),
        (("--alpaca-eval", "--judge-model", "m"), "need --against"),
        (("--against", "embedded", "--judge", "openai"), "need --judge-model"),
        (("--against", "embedded", "--alpaca-eval"), "need --judge-model"),
        (("--against", "embedded", "--judge", "scorer"), "needs --scorer"),
        (("--against", "no/such/thing"), "neither a file nor a Hugging Face model directory"),
    ],
)
def test_arguments_that_cannot_go_together_are_refused(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_comparison(parse([*BASE, *arguments]))


def test_arguments_that_go_together_are_let_through(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("")
    check_comparison(parse(BASE))
    check_comparison(parse([*BASE, "--against", "embedded"]))
    check_comparison(parse([*BASE, "--against", str(tmp_path / "answers.jsonl"), "--judge", "openai", "--judge-model", "m", "--alpaca-eval"]))


def test_answers_are_compared_with_those_of_a_file(tmp_path: Path) -> None:
    # Longer is better: one win, one loss, two ties (the same length, the same text).
    others = {"p0": "a", "p1": "longest", "p2": "xy", "p3": "same"}
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps({"id": name, "answer": text}) + "\n" for name, text in others.items()))
    args = parse([*BASE, "--against", str(file), "--judge", "scorer", "--scorer", f"{__name__}:length"])
    screen = io.StringIO()
    session = Session(Console(file=screen, width=200), Console(file=io.StringIO()))
    tree = compare(args, "mine", [answer(0, "abcd"), answer(1, "b"), answer(2, "ab"), answer(3, "same")], session)
    found = tree["against"]
    assert (found["wins"], found["ties"], found["losses"], found["unjudged"], found["rate"]) == (1, 2, 1, 0, 0.5)
    assert (found["length"], found["other_length"]) == (11 / 4, 14 / 4)
    assert json.loads(json.dumps(tree)) == tree
    shown = screen.getvalue()
    assert "mine against other.jsonl, judged by scorer" in shown
    assert "1, 2, 1" in shown
    assert "50.0% (" in shown
