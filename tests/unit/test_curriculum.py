"""What steps train on: filters by hand numbers, token weights by hand, orders by seed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from sgpo_dist.config import FilterConfig
from sgpo_dist.curriculum import (
    edit_fences,
    filter_revisions,
    given_pairs,
    improver_examples,
    keep_examples,
    kept_examples,
    nll_batches,
    offline_batch,
    replay_examples,
)
from sgpo_dist.errors import ConfigError, DataError, RunFailed
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Refusal, RefusalReason, Stage, TokenExample

OFF = FilterConfig(min_edit_ratio=0.0, max_length_ratio=1000.0, fence=None)
EOS = 0


class Book:
    """Tokens are the words' lengths; the end token is 0."""

    def policy_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return (100, *(len(word) for word in prompt.text.split()))

    def improver_ids(self, prompt: Prompt, draft: str) -> tuple[int, ...]:
        return (200, *self.policy_ids(prompt), *(len(word) for word in draft.split()))

    def completion_ids(self, text: str) -> tuple[int, ...]:
        return (*(len(word) for word in text.split()), EOS)

    def written(self, text: str, version: int) -> Completion:
        return Completion(text, self.completion_ids(text), FinishReason.STOP, version)


BOOK: Any = Book()


def pair(
    uid: str, draft: str, revision: str, reference: str | None = "a reference", ids: tuple[tuple[int, ...], ...] | None = None
) -> PreferencePair:
    halves = [Completion(text, BOOK.completion_ids(text), FinishReason.STOP, 0) for text in (draft, revision)]
    if ids is not None:
        halves = [Completion(half.text, given, FinishReason.STOP, 0) for half, given in zip(halves, ids, strict=True)]
    prompt = Prompt(uid, (Message("user", f"ask {uid}"),), reference)
    return PreferencePair(uid, Stage.IMPROVER, prompt, BOOK.policy_ids(prompt), halves[0], halves[1], "tidy")


def edited(uid: str, changed: int, of: int = 10) -> PreferencePair:
    """``changed`` of ``of`` words replaced: an edit ratio of changed / of."""
    kept = [f"w{place}" for place in range(of - changed)]
    return pair(uid, " ".join([*kept, *["old"] * changed]), " ".join([*kept, *["new"] * changed]))


def of_lengths(uid: str, draft: int, revision: int) -> PreferencePair:
    return pair(uid, "x y", "y z", ids=((1,) * draft, (2,) * revision))


def uids(pairs: Any) -> list[str]:
    return [one.uid for one in pairs]


# ---- floors ------------------------------------------------------------------------------------------------------------------------


def test_a_revision_that_changes_less_than_the_floor_is_a_no_op() -> None:
    settings = OFF.model_copy(update={"min_edit_ratio": 0.25})
    kept = filter_revisions([edited("a", 1, of=8), edited("b", 1, of=4), edited("c", 4, of=4)], settings)  # 0.125, 0.25, 1
    assert (uids(kept.kept), kept.dropped) == (["b", "c"], {"no_op": 1})


def test_a_revision_that_blows_up_is_dropped() -> None:
    settings = OFF.model_copy(update={"max_length_ratio": 2.5})
    kept = filter_revisions([of_lengths("a", 4, 10), of_lengths("b", 4, 11)], settings)  # 2.5 and 2.75
    assert (uids(kept.kept), kept.dropped) == (["a"], {"length_blow_up": 1})


@pytest.fixture
def graders(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("sgpo_test_graders")
    monkeypatch.setitem(sys.modules, "sgpo_test_graders", module)
    return module


def test_a_revision_must_score_above_its_draft(graders: ModuleType) -> None:
    seen = []

    def grade(text: str, reference: str | None, prompt: str) -> float:
        seen.append((text, reference, prompt))
        return float(text)

    graders.grade = grade  # type: ignore[attr-defined]
    pairs = [pair("a", "0.5", "0.5 "), pair("b", "0.25", "0.5"), pair("c", "0.25", "1.0"), pair("d", "1.0", "0.5")]
    settings = OFF.model_copy(update={"grader": "sgpo_test_graders:grade"})
    kept = filter_revisions(pairs, settings)  # gains 0, 0.25, 0.75, -0.5
    assert (uids(kept.kept), kept.dropped) == (["b", "c"], {"no_gain": 2})
    assert ("0.25", "a reference", "ask b") in seen
    stricter = filter_revisions(pairs, settings.model_copy(update={"min_gain": 0.25}))
    assert (uids(stricter.kept), stricter.dropped) == (["c"], {"no_gain": 3})


def test_a_grader_that_cannot_be_had_or_fails(graders: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"improver.filter.grader: module 'sgpo_test_graders' has no function 'none'"):
        filter_revisions([edited("a", 3)], OFF.model_copy(update={"grader": "sgpo_test_graders:none"}))
    graders.bad = lambda *_: "much"  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="prompt 'a' must return a finite number"):
        filter_revisions([edited("a", 3)], OFF.model_copy(update={"grader": "sgpo_test_graders:bad"}))


def test_each_revision_is_counted_under_its_first_reason_only() -> None:
    settings = OFF.model_copy(update={"min_edit_ratio": 0.2, "max_length_ratio": 1.5})
    same_but_long = pair("a", "x", "x", ids=((1,), (1, 1, 1)))
    kept = filter_revisions([same_but_long], settings)
    assert (kept.kept, kept.dropped) == ((), {"no_op": 1})


# ---- fences ------------------------------------------------------------------------------------------------------------------------


def test_the_fences_of_edit_ratios() -> None:
    # Sorted tenths 1 4 4 5 5 5 6 9: quartiles 4 and 5.25, so the fences with k = 1.5 are 2.125 and 7.125.
    pairs = [edited(f"p{place}", tenths) for place, tenths in enumerate([5, 1, 4, 5, 9, 4, 6, 5])]
    kept = filter_revisions(pairs, OFF.model_copy(update={"fence": 1.5}))
    assert uids(kept.kept) == ["p0", "p2", "p3", "p5", "p6", "p7"]
    assert kept.dropped == {"below_edit_ratio_fence": 1, "above_edit_ratio_fence": 1}
    assert edit_fences(pairs, 1.5) == pytest.approx((0.2125, 0.7125))


def test_what_a_floor_drops_does_not_move_the_fences() -> None:
    # Quartiles of seven 4s and an 8 are both 4, so the 8 lies outside; with eight 0s they would be 0 and 4, and it would lie inside.
    pairs = [edited(f"p{place}", tenths) for place, tenths in enumerate([4] * 7 + [8] + [0] * 8)]
    kept = filter_revisions(pairs, OFF.model_copy(update={"fence": 1.5, "min_edit_ratio": 0.1}))
    assert (len(kept.kept), kept.dropped) == (7, {"no_op": 8, "above_edit_ratio_fence": 1})


def test_the_fences_of_length_ratios() -> None:
    # Revisions of 10-token drafts: 8 9 9 10 10 11 11 30 tokens; quartiles 9 and 11, fences 6 and 14.
    pairs = [of_lengths(f"p{length}-{place}", 10, length) for place, length in enumerate([8, 9, 9, 10, 10, 11, 11, 30])]
    kept = filter_revisions(pairs, OFF.model_copy(update={"fence": 1.5, "fence_statistic": "length_ratio"}))
    assert (len(kept.kept), kept.dropped) == (7, {"above_length_ratio_fence": 1})


def test_the_fences_of_the_likelihood_gap() -> None:
    # Gaps revision - draft: -3 and seven times 0.5; all quartiles are 0.5, so only 0.5 lies inside.
    pairs = [edited(f"p{place}", 3) for place in range(8)]
    logps = {f"p{place}": (-1.0, -1.5) for place in range(7)} | {"p7": (-4.0, -1.0)}
    settings = OFF.model_copy(update={"fence": 1.5, "fence_statistic": "logp_gap"})
    kept = filter_revisions(pairs, settings, logps)
    assert (uids(kept.kept), kept.dropped) == ([f"p{place}" for place in range(7)], {"below_logp_gap_fence": 1})
    with pytest.raises(RunFailed, match="revision p0 has no log-likelihood"):
        filter_revisions(pairs, settings)


def test_the_fences_of_the_graders_gain(graders: ModuleType) -> None:
    # Gains 1 1 1 2 2 2 2 9: quartiles 1 and 2, fences -0.5 and 3.5.
    graders.grade = lambda text, reference, prompt: float(text)  # type: ignore[attr-defined]
    pairs = [pair(f"p{place}", "1", str(1 + gain)) for place, gain in enumerate([1, 1, 1, 2, 2, 2, 2, 9])]
    settings = OFF.model_copy(update={"fence": 1.5, "fence_statistic": "grader_gain", "grader": "sgpo_test_graders:grade"})
    kept = filter_revisions(pairs, settings)
    assert (len(kept.kept), kept.dropped) == (7, {"above_grader_gain_fence": 1})


def test_too_few_revisions_have_no_fences() -> None:
    pairs = [edited(f"p{place}", tenths) for place, tenths in enumerate([5, 5, 5, 5, 5, 5, 10])]
    assert len(filter_revisions(pairs, OFF.model_copy(update={"fence": 1.5})).kept) == 7
    assert edit_fences(pairs, 1.5) is None
    assert edit_fences([*pairs, edited("p7", 5)], 1.5) == pytest.approx((0.5, 0.5))


# ---- rows --------------------------------------------------------------------------------------------------------------------------


def test_the_improver_reads_prompt_and_draft_and_learns_the_revision() -> None:
    row = improver_examples([pair("a", "cold tea", "hot tea")], BOOK)[0]
    assert row == TokenExample("improve/a", (200, 100, 3, 1, 4, 3), (3, 3, EOS))
    assert row.token_weights == ()


@pytest.mark.parametrize(
    ("draft", "revision", "weights"),
    [
        ((1, 2, 3, EOS), (1, 9, 3, EOS), (1, 4, 1, 1)),  # replaced
        ((1, 2, EOS), (1, 2, 7, 8, EOS), (1, 1, 4, 4, 1)),  # added
        ((1, 2, 3, EOS), (1, 3, EOS), (1, 1, 1)),  # taken out
        ((1, 2), (1, 2, EOS), (1, 1, 4)),  # the draft was cut: the end is news
        ((5, 6), (7, 8), (4, 4)),
        ((1, 1, 1), (1, 1, 1), (1, 1, 1)),
    ],
)
def test_changed_tokens_weigh_more(draft: tuple[int, ...], revision: tuple[int, ...], weights: tuple[int, ...]) -> None:
    row = improver_examples([pair("a", "x", "y", ids=(draft, revision))], BOOK, edit_weight=4.0)[0]
    assert row.token_weights == weights


def test_replay_keeps_the_policy_role() -> None:
    pairs = [pair("a", "cold tea", "hot tea", "some water"), pair("b", "x", "y", None)]
    assert [row.completion_ids for row in replay_examples(pairs, "self", BOOK)] == [(4, 3, EOS), (1, EOS)]
    assert [(row.uid, row.prompt_ids, row.completion_ids) for row in replay_examples(pairs, "reference", BOOK)] == [
        ("replay/a", (100, 3, 1), (4, 5, EOS))
    ]
    assert replay_examples(pairs, "none", BOOK) == []


def test_given_pairs_prefer_the_reference() -> None:
    rows = [
        Prompt("a", (Message("user", "ask a"),), "good one", "user", "bad"),
        Prompt("b", (Message("user", "ask b"),), "good one"),
        Prompt("c", (Message("user", "ask c"),), None, "user", "bad"),
    ]
    pairs = given_pairs(rows, BOOK, 3)
    assert len(pairs) == 1
    made = pairs[0]
    assert (made.prompt, made.prompt_ids, made.stage, made.template, made.version) == (rows[0], (100, 3, 1), Stage.PREFERENCE, "given", 3)
    assert (made.chosen, made.rejected) == (
        Completion("good one", (4, 3, EOS), FinishReason.STOP, 3),
        Completion("bad", (3, EOS), FinishReason.STOP, 3),
    )
    assert made.uid == given_pairs(rows, BOOK, 9)[0].uid


# ---- orders ------------------------------------------------------------------------------------------------------------------------


def test_offline_batches_walk_through_epochs_without_repeats() -> None:
    rows = list("abcdefg")
    drawn = "".join("".join(offline_batch(rows, step, 3, seed=5)) for step in range(1, 15))  # 42 rows: six epochs of seven
    epochs = [drawn[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == rows for epoch in epochs)
    assert len(set(epochs)) > 1


def test_offline_batches_depend_on_step_and_seed_alone() -> None:
    rows = list(range(50))
    assert offline_batch(rows, 3, 8, 0) == offline_batch(rows, 3, 8, 0)
    assert offline_batch(rows, 3, 8, 0) != offline_batch(rows, 3, 8, 1)
    assert offline_batch(rows, 1, 8, 0) + offline_batch(rows, 2, 8, 0) == offline_batch(rows, 1, 16, 0)


def test_offline_batches_at_the_edges() -> None:
    assert offline_batch([], 1, 4, 0) == ()
    assert offline_batch(["a"], 5, 0, 0) == offline_batch(["a"], 1, 0, 0) == ()
    assert offline_batch(["a"], 2, 3, 0) == ("a", "a", "a")
    assert sorted(offline_batch(["a", "b"], 1, 5, 0))[1:4] in (["a", "b", "b"], ["a", "a", "b"])


def test_nll_batches_shuffle_each_epoch_and_keep_every_row() -> None:
    rows = [TokenExample(f"r{place}", (1,), (2,)) for place in range(5)]
    batches = nll_batches(rows, 2, 2, seed=1)
    assert [len(batch) for batch in batches] == [2, 2, 1, 2, 2, 1]
    first, second = [[row.uid for batch in part for row in batch] for part in (batches[:3], batches[3:])]
    assert sorted(first) == sorted(second) == [f"r{place}" for place in range(5)]
    assert first != second


# ---- kept drafts ---------------------------------------------------------------------------------------------------------------------


def good_draft(uid: str, text: str, finish: FinishReason = FinishReason.STOP, reason: RefusalReason = RefusalReason.NOTHING_TO_REPAIR) -> Refusal:
    return Refusal(uid, Stage.IMPROVER, f"p{uid}", reason, "", Completion(text, BOOK.completion_ids(text), finish, 0))


def test_kept_drafts_teach_to_give_the_draft_back() -> None:
    refusals = [
        good_draft("1", "all right"),
        good_draft("2", "cut off", finish=FinishReason.LENGTH),
        good_draft("3", "", reason=RefusalReason.EMPTY),
        Refusal("4", Stage.IMPROVER, "p4", RefusalReason.NOTHING_TO_REPAIR),
    ]
    prompts = {f"p{n}": Prompt(f"p{n}", (Message("user", "ask"),)) for n in range(1, 5)}
    (row,) = keep_examples(refusals, prompts, BOOK, 9, seed=0)
    assert row == TokenExample("keep/1", (200, 100, 3, 3, 5), (3, 5, 0))


def test_answers_that_the_improver_left_alone_are_policy_rows() -> None:
    refusals = [
        good_draft("1", "all right", reason=RefusalReason.IDENTICAL),
        good_draft("2", "cut off", finish=FinishReason.LENGTH, reason=RefusalReason.IDENTICAL),
        good_draft("3", "nearly so", reason=RefusalReason.NEAR_COPY),
        Refusal("4", Stage.PREFERENCE, "p4", RefusalReason.IDENTICAL),
    ]
    prompts = {f"p{n}": Prompt(f"p{n}", (Message("user", "ask"),)) for n in range(1, 5)}
    assert kept_examples(refusals, prompts, BOOK) == [TokenExample("kept/1", (100, 3), (3, 5, 0))]


def test_no_more_drafts_are_kept_than_asked_for_and_the_seed_draws_them() -> None:
    refusals = [good_draft(str(n), f"draft {n}") for n in range(20)]
    prompts = {f"p{n}": Prompt(f"p{n}", (Message("user", "ask"),)) for n in range(20)}
    drawn = [[row.uid for row in keep_examples(refusals, prompts, BOOK, 5, seed)] for seed in (0, 0, 1)]
    assert len(drawn[0]) == 5
    assert drawn[0] == drawn[1] != drawn[2]
