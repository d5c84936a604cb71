"""Answers as files: every field of every format, and reading them back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sgpo_dist.errors import DataError
from sgpo_dist.evaluate.exports import (
    Answer,
    alpaca_rows,
    answer_rows,
    arena_rows,
    markdown_counts,
    read_answers,
    write_lines,
    write_list,
)
from sgpo_dist.records import Completion, FinishReason, Message, Prompt

MOON = Prompt("q1", (Message("user", "How far is the Moon?"),), "Far.", "space")
CHAT = Prompt("q2", (Message("system", "Be brief."), Message("user", "Hi")))
ANSWERS = (
    Answer(MOON, Completion(" About **384** Mm.\n", (5, 6, 7), FinishReason.STOP, 0), "384,400 km."),
    Answer(CHAT, Completion("Hello", (8,), FinishReason.LENGTH, 0), "Hello!"),
)


def test_our_own_rows_hold_all_that_is_known() -> None:
    assert answer_rows("tiny", ANSWERS)[0] == {
        "id": "q1",
        "source": "space",
        "model": "tiny",
        "messages": [{"role": "user", "content": "How far is the Moon?"}],
        "reference": "Far.",
        "answer": "About **384** Mm.",
        "rewrite": "384,400 km.",
        "tokens": 3,
        "ended": True,
    }
    assert answer_rows("tiny", ANSWERS)[1]["ended"] is False


def test_alpaca_rows_have_its_four_fields() -> None:
    rows = alpaca_rows("tiny", [(answer.prompt, answer.text) for answer in ANSWERS])
    assert rows == [
        {"instruction": "How far is the Moon?", "output": "About **384** Mm.", "generator": "tiny", "dataset": "space"},
        {"instruction": "System: Be brief.\n\nUser: Hi", "output": "Hello", "generator": "tiny", "dataset": "user"},
    ]


def test_arena_rows_serve_both_versions() -> None:
    row, other = arena_rows("tiny", ANSWERS, wall=12.5)
    counts = {
        "token_len": 3,
        "header_count": {"h1": 0, "h2": 0, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 0, "unordered": 0},
        "bold_count": {"**": 1, "__": 0},
    }
    second = {
        "uid": "q1",
        "model": "tiny",
        "messages": [
            {"role": "user", "content": "How far is the Moon?"},
            {"role": "assistant", "content": {"answer": "About **384** Mm."}},
        ],
        "metadata": counts,
        "tstamp": 12.5,
    }
    first = {
        "question_id": "q1",
        "model_id": "tiny",
        "choices": [{"index": 0, "turns": [{"content": "About **384** Mm.", "token_len": 3}]}],
        "conv_metadata": counts,
        "tstamp": 12.5,
    }
    names = {"ans_id": row["ans_id"], "answer_id": row["ans_id"]}
    assert row == second | first | names
    assert other["ans_id"] != row["ans_id"]
    assert [message["role"] for message in other["messages"]] == ["system", "user", "assistant"]


def test_markdown_is_counted_outside_of_code() -> None:
    text = "# One\n## Two\n## Three\n1. a\n2. b\n- c\n  * d\n**bold** and __strong__\n```\n# no\n- no\n**no**\n```\n#no"
    assert markdown_counts(text) == {
        "header_count": {"h1": 1, "h2": 2, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 2},
        "bold_count": {"**": 1, "__": 1},
    }


def test_our_own_file_is_read_back_by_id(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", answer_rows("tiny", ANSWERS))
    assert read_answers(tmp_path / "a.jsonl", [CHAT, MOON]) == ["Hello", "About **384** Mm."]


def test_an_alpaca_file_is_read_back_by_instruction(tmp_path: Path) -> None:
    write_list(tmp_path / "a.json", alpaca_rows("tiny", [(answer.prompt, answer.text) for answer in ANSWERS]))
    assert read_answers(tmp_path / "a.json", [CHAT, MOON]) == ["Hello", "About **384** Mm."]
    renamed = Prompt("another id", MOON.messages)
    assert read_answers(tmp_path / "a.json", [renamed]) == ["About **384** Mm."]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[not json", "neither JSON lines nor one JSON list"),
        ('{"id": "q1"}\n', "row 1 has neither 'answer' nor 'output'"),
        ('["text"]', "row 1 has neither 'answer' nor 'output'"),
        ('{"id": "q2", "answer": "x"}\n', "no answer to 1 of 1 prompts, 'q1' among them"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=said):
        read_answers(tmp_path / "a.json", [MOON])


def test_lines_separated_by_unicode_marks_stay_one_row(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"id": "q1", "answer": "one\u2028two"}])
    assert read_answers(tmp_path / "a.jsonl", [MOON]) == ["one\u2028two"]


def test_json_is_plain(tmp_path: Path) -> None:
    write_list(tmp_path / "a.json", [{"output": "é"}])
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == [{"output": "é"}]
