"""The chat task of the quality benchmark: roles that share no row, answers cut at a sentence, rows of a file read and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.quality import chat
from sgpo_dist.errors import DataError
from sgpo_dist.starter import chat as starter


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_starter_sets_held_out_rows_are_the_test_and_no_role_shares_a_row() -> None:
    splits = chat.starter_splits()
    assert [row["id"] for row in splits.test] == [row["id"] for row in starter.rows("heldout")]
    roles = [{row["prompt"] for row in rows} for rows in (splits.references, splits.prompts, splits.validation, splits.test)]
    assert [len(role) for role in roles] == [80, 80, 30, 81]
    assert len(set().union(*roles)) == 80 + 80 + 30 + 81


def test_consecutive_parts() -> None:
    rows = [{"id": number} for number in range(5)]
    assert [[row["id"] for row in part] for part in chat.cut(rows, 2, 1, 9)] == [[0, 1], [2], [3, 4]]


@pytest.mark.parametrize(
    ("limit", "kept"), [(100, "One is here. Two is there. Three."), (32, "One is here. Two is there."), (25, "One is here."), (11, "")]
)
def test_whole_sentences_within_the_limit(limit: int, kept: str) -> None:
    assert chat.shortened(" One is here. Two is there. Three.", limit) == kept


def test_a_files_rows_are_cut_and_useless_ones_left_out(tmp_path: Path) -> None:
    long = "word " * 60
    rows = [
        {"prompt": "Why?", "good": f"Because. {long.capitalize()}", "weak": "Dunno."},
        {"prompt": " Why? ", "good": "Asked before.", "weak": "Dunno."},
        {"prompt": long, "good": "A prompt too long.", "weak": "Dunno."},
        {"prompt": "How?", "good": long, "weak": "No sentence ends within the limit of the good one."},
        {"prompt": "When?", "good": "Now.", "weak": "Now."},
    ]
    found = chat.usable(chat.RowsFile(write(tmp_path / "mine.jsonl", rows), "good", "weak"))
    assert found == [
        {"id": "mine-00001", "prompt": "Why?", "reference": "Because.", "source": "chat", "rejected": "Dunno."},
        {"id": "mine-00005", "prompt": "When?", "reference": "Now.", "source": "chat"},  # its weaker answer is the better one
    ]


def test_a_file_gives_disjoint_roles_whatever_its_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {number}?", "reference": f"Answer {number}."} for number in range(250)]
    splits = chat.file_splits(chat.RowsFile(write(tmp_path / "a.jsonl", rows)))
    roles = [{row["prompt"] for row in part} for part in (splits.test, splits.validation, splits.references, splits.prompts)]
    assert [len(role) for role in roles] == [80, 30, 64, 64]
    assert len(set().union(*roles)) == 238
    assert [row["id"] for row in splits.test[:3]] != ["a-00001", "a-00002", "a-00003"]  # shuffled: a file may be sorted by topic


def test_too_few_rows_and_a_missing_column_are_refused_with_what_to_do(tmp_path: Path) -> None:
    few = chat.RowsFile(write(tmp_path / "few.jsonl", [{"prompt": "Why?", "reference": "Because."}]))
    with pytest.raises(DataError, match=r"has 1 rows .* the chat task needs 238"):
        chat.file_splits(few)
    with pytest.raises(DataError, match="line 1: has no text in column 'answer'; name the columns with --reference-key"):
        chat.usable(chat.RowsFile(few.path, "answer"))


def test_an_empty_answer_is_like_nothing() -> None:
    assert chat.similarity("  ", "A reference.", "Why?") == 0.0
