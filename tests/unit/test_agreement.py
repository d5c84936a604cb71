"""Votes of fresh draws, and when they are enough."""

from __future__ import annotations

import pytest

from sgpo_dist.agreement import canonical, likelihood_vote, objection, vote
from sgpo_dist.config import AgreementConfig

CHOSEN, REJECTED = "Two rolls, to go.", "Three rolls, to go."


@pytest.mark.parametrize(
    ("draw", "side"),
    [(CHOSEN, 1), (f" {CHOSEN}\n", 1), (REJECTED, -1), ("Two rolls to go.", 0), ("", 0)],
)
def test_equal_votes_for_the_text_it_is(draw: str, side: int) -> None:
    assert vote(draw, CHOSEN, REJECTED, "equal") == side


def test_equal_reads_json_by_its_values() -> None:
    chosen, rejected = '{"item": "roll", "count": 2}', '{"item": "roll", "count": 3}'
    assert vote('{"count":2,\n "item":"roll"}', chosen, rejected, "equal") == 1
    assert vote('{"count":3,"item":"roll"}', chosen, rejected, "equal") == -1
    assert vote('{"count":4,"item":"roll"}', chosen, rejected, "equal") == 0
    assert vote('{"count":2,"item":"roll"', chosen, rejected, "equal") == 0  # cut: no JSON
    assert vote(chosen, chosen, '{"count": 2, "item": "roll"}', "equal") == 0  # both halves are the same value


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000, "plain words"])
def test_what_is_no_readable_json_stands_for_itself(text: str) -> None:
    assert canonical(f" {text} ") == text


def test_true_is_not_one() -> None:
    assert canonical("[true]") != canonical("[1]")


def test_similarity_votes_for_the_likelier_text_and_for_none_when_both_are_as_like() -> None:
    chosen, rejected = "red green blue", "red green black"
    assert vote("a green blue", chosen, rejected, "similarity") == 1  # 2 of 3 words against 1 of 3
    assert vote("Red, black!", chosen, rejected, "similarity") == -1
    assert vote("red green", chosen, rejected, "similarity") == 0


def test_likelihood_is_by_token_so_that_length_does_not_decide() -> None:
    assert likelihood_vote((-1.0, -1.0, -1.0, -1.0), (-1.5, -1.5)) == 1  # -1.0 against -1.5, though the sums are -4 and -3
    assert likelihood_vote((-2.0,), (-1.0, -1.5)) == -1
    assert likelihood_vote((-2.0,), (-1.0, -3.0)) == 0


def test_the_margin_is_votes_for_less_votes_against() -> None:
    rules = AgreementConfig(draws=2, margin=2)
    assert objection([1, 1, 1, -1], rules) == ""  # 3 - 1
    assert objection([1, 1, 0, 0], rules) == ""
    assert objection([1, 1, 0, -1], rules) == "margin +1 of +2: 2 for, 1 against, 1 for neither"
    assert objection([0, 0, 0, 0], rules) == "margin +0 of +2: 0 for, 0 against, 4 for neither"


def test_of_likelihood_both_roles_must_agree_whatever_the_margin() -> None:
    rules = AgreementConfig(draws=1, vote="likelihood", margin=1)
    assert objection([1, 1], rules) == ""
    assert objection([1, 0], rules) == "margin +1 of +2: 1 for, 0 against, 1 for neither"
    assert objection([1, -1], rules) == "margin +0 of +2: 1 for, 1 against, 0 for neither"
