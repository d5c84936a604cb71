"""The pointer into the draft: what it proposes for rewrites of every kind, and that it stops where proposals do not pay."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_prompts import WordTokenizer

from actors.draft_pointer import CONFIG_KEY, Frame, PointerProposer, Trail, begun, expanded, follow, last_place, speculation_arguments
from sgpo_dist.config import build_config
from sgpo_dist.launch import engine_spec
from sgpo_dist.prompts import PromptBook
from sgpo_dist.records import Message, Prompt

FRAME = Frame((7, 8, 7), (2, 9))
DRAFT = tuple(range(100, 160))
STEP_TOKENS = 8.0


def prompt(draft: Sequence[int]) -> list[int]:
    return [1, 30, 31, 7, 8, 7, *draft, 2, 9]


ROW = np.array(prompt(DRAFT))
TRAIL = Trail(6, 67, 6)
"""At the begin of the draft in ``ROW``; the token that ends its turn is the draft's last one."""


def foreseen(draft: Sequence[int], rewrite: Sequence[int], busy: int = 1, most: int = 6) -> tuple[int, int]:
    """Tokens that were kept, and proposals made for nothing, when the model goes on as ``rewrite`` does."""
    start = len(prompt(draft))
    row = np.array([*prompt(draft), *rewrite])
    trail, end, kept, wasted = Trail(6, start - 1, 6), start, 0, 0
    while end < len(row):
        proposed = trail.proposals(row[:end], STEP_TOKENS, busy, most)
        right = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(proposed, row[end:].tolist(), strict=False)))
        kept, wasted = kept + right, wasted + len(proposed) - right
        for _ in range(min(right + 1, len(row) - end)):  # what was kept, and the one that the model sampled itself
            end += 1
            trail = follow(trail, row[:end])
    return kept, wasted


def test_a_copy_is_foreseen_from_its_first_token() -> None:
    assert TRAIL.proposals(ROW, STEP_TOKENS, 1, 6) == [*DRAFT[:5]]  # 1.2 / 9 = 0.133; 0.7^5 = 0.168, 0.7^6 = 0.118
    kept, wasted = foreseen(DRAFT, (*DRAFT, 2))
    assert kept == 53  # of 61 tokens eight are the model's own: one after five proposals, seven after six; the end is foreseen
    assert wasted == 0


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: [*d[:20], 500, *d[21:]],
        lambda d: [*d[:20], 500, 501, *d[20:]],
        lambda d: [*d[:20], *d[24:]],
        lambda d: [*d[:20], 500, 501, 502, *d[22:]],
        lambda d: [500, *d],
        lambda d: [*d[:40], *d[30:]],
    ],
    ids=["replaced", "inserted", "deleted", "rewritten", "begun otherwise", "repeated"],
)
def test_the_place_is_found_again_after_an_edit(edit: Callable[[list[int]], list[int]]) -> None:
    rewrite = [*edit(list(DRAFT)), 2]
    kept, wasted = foreseen(DRAFT, rewrite)
    assert kept > 0.7 * len(rewrite)
    assert wasted <= 20


@pytest.mark.parametrize(
    ("draft", "rewrite", "next_token"),
    [
        ((10, 51, 20, 13, 40, 51, 13, 60), (10, 51, 13), 60),  # the token before it fits as well, though another 13 is nearer
        ((10, 51, 20, 13, 40, 51, 13, 60), (51, 13, 77, 10, 51, 13), 60),  # in the draft rather than where the rewrite said so
        ((10, 31, 12, 13), (30, 80, 30, 31), 7),  # two tokens of the prompt rather than one of the draft
        ((10, 11, 30, 13), (10, 30, 77, 90, 30), 13),  # one token: in the draft rather than in the rewrite
        ((10, 11, 12, 13), (10, 31), 7),  # one token of the prompt
        ((10, 11, 12, 13), (10, 80, 81, 82, 11, 80, 81), 82),  # what the rewrite itself said before
        ((10, 11, 12, 13), (10, 99), 12),  # an unknown token replaced one of the draft's
    ],
)
def test_after_an_edit_the_likeliest_place_is_taken(draft: tuple[int, ...], rewrite: tuple[int, ...], next_token: int) -> None:
    start = len(prompt(draft))
    row = np.array([*prompt(draft), *rewrite])
    trail = Trail(6, start - 1, 6)
    for end in range(start, len(row)):
        trail = follow(trail, row[: end + 1])
    assert row[trail.place] == next_token


def test_unrelated_text_costs_a_handful_of_proposals() -> None:
    rewrite = [1000 + n for n in range(200)]
    assert foreseen(DRAFT, rewrite) == (0, pytest.approx(14, abs=6))
    assert foreseen(DRAFT, rewrite, busy=64) == (0, 0)
    draw = random.Random(3)
    common = [draw.randrange(100, 160) for _ in range(200)]  # the draft's own tokens, in no order
    assert foreseen(DRAFT, common, busy=16)[1] <= 10


def test_proposals_are_those_that_pay() -> None:
    """By hand: 1.2 / (8 / 3 + 1) = 0.33 is how often a proposal must be kept; 0.7^3 = 0.34, 0.7^4 = 0.24."""
    assert len(TRAIL.proposals(ROW, 8.0, 3, 12)) == 3
    assert len(TRAIL.proposals(ROW, 8.0, 3, 2)) == 2
    assert len(replace(TRAIL, rate=0.96).proposals(ROW, 8.0, 16, 12)) == 5  # 1.2 * 16 / 24 = 0.8; 0.96^5 = 0.815, 0.96^6 = 0.783
    assert replace(TRAIL, rate=0.79).proposals(ROW, 8.0, 16, 12) == []
    for busy in (40, 64):  # 1.2 * 40 / 48 = 1
        assert replace(TRAIL, rate=1.0).proposals(ROW, 8.0, busy, 12) == []
    assert replace(TRAIL, place=64).proposals(ROW, 8.0, 1, 6) == [158, 159, 2]
    assert replace(TRAIL, place=67).proposals(ROW, 8.0, 1, 6) == [9]  # there is no more of the row


def test_the_draft_is_found_in_the_prompt_of_a_rewrite_only() -> None:
    tokens = np.array([*prompt([40, 7, 8, 7, 41]), 50, 51], dtype=np.int32)
    assert begun(tokens, FRAME, len(tokens) - 2) == (Trail(10, 12, 10), len(tokens) - 2)  # the last opening counts
    assert begun(np.array([1, 30, 31, 2, 9, 50]), FRAME, 5) is None
    assert begun(np.array([1, 7, 8, 7, 30, 50]), FRAME, 5) is None
    assert last_place(np.array([1, 2]), (1, 2, 3)) == -1
    assert last_place(np.array([1, 2, 1, 2, 1]), (1, 2)) == 2


def test_the_frame_of_the_real_template_stands_in_every_prompt() -> None:
    book = PromptBook(WordTokenizer())
    before, after = book.improver_frame()
    question = Prompt("p", (Message("system", "be kind"), Message("user", "what now?"), Message("assistant", "well."), Message("user", "go on")))
    ids = np.array(book.improver_ids(question, "  one two, three. "))
    found = begun(ids, Frame(before, after), len(ids))
    assert found is not None
    draft = ids[found[0].begin : found[0].end].tolist()
    assert book.decode(draft) == "one two, three."
    assert draft[-1] == after[0]
    assert found[1] == len(ids)
    policy = np.array(book.policy_ids(question))
    assert begun(policy, Frame(before, after), len(policy)) is None


# ---- as vLLM calls it ------------------------------------------------------------------------------------------------------------------


def proposer(most: int = 4, longest: int = 128, busy: int = 0) -> PointerProposer:
    extra = speculation_arguments(FRAME, most, STEP_TOKENS, busy)["additional_config"]
    assert CONFIG_KEY in extra
    return PointerProposer(
        SimpleNamespace(
            additional_config=extra,
            speculative_config=SimpleNamespace(num_speculative_tokens=most),
            model_config=SimpleNamespace(max_model_len=longest),
            device_config=SimpleNamespace(device_type="cuda"),  # nothing to mend
        )
    )


def table(rows: Sequence[Sequence[int]], longest: int = 128) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((8, longest), dtype=np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return np.array([len(row) for row in rows] + [0] * (8 - len(rows)), dtype=np.int32), ids


def test_rows_that_move_come_and_go_get_what_fresh_ones_would() -> None:
    """Two rewrites, one of them put off and moved to another row, and a policy's request; a proposer that remembers and one that never does."""
    kept = proposer()
    first, second, plain = prompt(DRAFT[:30]), prompt(DRAFT[30:50]), [1, 30, 31, 2, 9]
    steps = [
        ([[*first, 100], [*second, 130], [*plain, 5]], [1, 1, 1]),
        ([[*first, 100, 101, 102], [*second, 130, 77], [*plain, 5, 6]], [2, 1, 1]),
        ([[*second, 130, 77, 132], [*plain, 5, 6, 7]], [1, 1]),
        ([[*plain, 5, 6, 7, 8], [*second, 130, 77, 132, 133], [*first, 100, 101, 102, 103]], [1, 1, 1]),
    ]
    for rows, fresh in steps:
        counts, ids = table(rows)
        sampled = [row[len(row) - count :] for row, count in zip(rows, fresh, strict=True)]
        found = kept.propose(sampled, counts, ids)
        assert found == proposer().propose(sampled, counts, ids)
        assert found[rows.index(next(row for row in rows if row[: len(plain)] == plain))] == []
    assert found[1] == [134, 135, 136]
    assert found[2] == [104, 105, 106, 107]


def test_a_row_s_value_is_given_to_each_of_its_tokens() -> None:
    ends = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    temperature = torch.tensor([0.7, 9.0, 0.0, 1.5])
    assert expanded(temperature, ends, 6, 0, 1).tolist() == pytest.approx([0.7, 0.7, 1.0, 1.0, 1.0, 1.5])
    assert expanded(torch.tensor([40, 1, 50, 3], dtype=torch.int32), ends, 6).tolist() == [40, 40, 50, 50, 50, 3]


def test_rows_that_are_not_sampled_get_nothing_and_the_context_is_never_overrun() -> None:
    row = [*prompt(DRAFT[:20]), 100]
    counts, ids = table([row, row])
    assert proposer().propose([[100], []], counts, ids) == [list(DRAFT[1:5]), []]
    assert proposer(longest=len(row) + 3).propose([[100]], *table([row])) == [list(DRAFT[1:3])]
    assert proposer(longest=len(row) + 1).propose([[100]], *table([row])) == [[]]


def test_proposals_are_weighed_for_those_that_run_or_for_as_many_as_told() -> None:
    rows = [[*prompt(DRAFT), 100]] * 8
    counts, ids = table(rows)
    assert [len(found) for found in proposer(most=9).propose([[100]], counts, ids)] == [7]  # 0.76^7 = 0.146 > 1.2 / 9 > 0.76^8
    assert {len(found) for found in proposer(most=9).propose([[100]] * 8, counts, ids)} == {1}  # 0.76 > 1.2 * 8 / 16 > 0.76^2
    for company in (1, 8):
        assert [len(found) for found in proposer(most=9, busy=2).propose([[100]] * company, counts, ids)] == [5] * company


def test_trails_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.draft_pointer.MOST_TRAILS", 2)
    mine = proposer()
    for number in range(5):
        row = [*prompt((200 + number, 300)), 200 + number]
        assert mine.propose([[200 + number]], *table([row])) == [[300, 2]]
    assert len(mine._trails) == 2


@pytest.mark.parametrize(("temperature", "busy"), [(0.7, 24), (0.0, 0)])
def test_what_else_runs_does_not_decide_of_proposals_for_sampled_rewrites(tmp_path: Path, temperature: float, busy: int) -> None:
    config = build_config({"output_dir": str(tmp_path), "rollout": {"concurrency": 24, "improver": {"temperature": temperature}}})
    assert engine_spec(config, (), tmp_path).speculation_busy == busy
