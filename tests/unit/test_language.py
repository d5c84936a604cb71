"""The local-repair language: what is right, what a repair may do, that splits never meet, and that the tiny model reads its words."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from bench.quality import language
from sgpo_dist.data.loading import load_rows

PROMPT = "bam dok fel gin hup jas kev lor"
RIGHT = "bama doko felu gina hupo jasu keva loro"


def test_any_synonym_of_the_class_is_right() -> None:
    assert language.accuracy(RIGHT, PROMPT) == 1.0
    assert language.accuracy("bamu doka felo ginu hupu jasa kevo loru", PROMPT) == 1.0


def test_a_word_of_another_class_is_wrong_only_at_its_place() -> None:
    assert language.accuracy("bama bama felu gina hupo jasu keva loro", PROMPT) == 7 / 8


@pytest.mark.parametrize(
    ("text", "value"),
    [("", 0.0), ("bama doko", 2 / 8), (f"{RIGHT} bama bama", 8 / 10), (RIGHT.partition(" ")[2], 0.0), ("bam dok fel gin hup jas kev lor", 0.0)],
)
def test_missing_superfluous_and_shifted_words_cost(text: str, value: float) -> None:
    assert language.accuracy(text, PROMPT) == value


def test_the_score_does_not_look_at_a_noisy_reference() -> None:
    assert language.score(RIGHT, "ruka ruka ruka ruka ruka ruka ruka ruka", PROMPT) == 1.0
    assert language.score(RIGHT, None, PROMPT) == 1.0


# ---- repair ----------------------------------------------------------------------------------------------------------------------


def changed(draft: str, mended: str | None) -> list[int]:
    assert mended is not None
    return [place for place, (old, new) in enumerate(zip(draft.split(), mended.split(), strict=True)) if old != new]


def test_half_of_the_wrong_words_are_mended_and_own_synonyms_stay() -> None:
    draft = "ruka ruka ruka ruka hupu jasa kevo loru"  # four wrong ones, then four right ones in a style of their own
    mended = language.repair(draft, RIGHT, PROMPT)
    places = changed(draft, mended)
    assert len(places) == 2
    assert set(places) <= {0, 1, 2, 3}
    assert mended is not None
    assert [mended.split()[place] for place in places] == [RIGHT.split()[place] for place in places]


def test_a_single_wrong_word_is_mended() -> None:
    draft = "bama doko felu ruka hupo jasu keva loro"
    assert language.repair(draft, RIGHT, PROMPT) == RIGHT


def test_a_wrong_word_of_the_reference_is_never_taken() -> None:
    draft = "ruka ruka felu gina hupo jasu keva loro"
    noisy = "bama mita felu gina hupo jasu keva loro"
    assert language.repair(draft, noisy, PROMPT) == "bama ruka felu gina hupo jasu keva loro"


def test_nothing_to_mend() -> None:
    assert language.repair("bamu doka felo ginu hupu jasa kevo loru", RIGHT, PROMPT) is None
    assert language.repair("ruka " + RIGHT.partition(" ")[2], "mita " + RIGHT.partition(" ")[2], PROMPT) is None
    assert language.repair("ruka", None, PROMPT) is None


def test_a_draft_of_another_length_is_brought_to_the_prompts() -> None:
    assert language.repair("bamu doka", RIGHT, PROMPT) == "bamu doka felu gina hupo jasu keva loro"
    assert language.repair(f"{RIGHT} bama", RIGHT, PROMPT) == RIGHT


def test_every_place_has_its_turn() -> None:
    mended: set[int] = set()
    for number in range(100):
        prompt = language.prompts("train", 1, number)[0]
        draft = language.corrupt(language.rows("train", 1, number)[0]["reference"], prompt, 1.0)
        mended |= set(changed(draft, language.repair(draft, language.rows("train", 1, number)[0]["reference"], prompt)))
    assert mended == set(range(8))


def test_a_repair_is_never_worse_and_mends_at_most_half() -> None:
    rng = random.Random(1)
    for row in language.rows("train", 100, seed=3, noise=0.2):
        draft = language.habitual_answer(row["prompt"], rng)
        mended = language.repair(draft, row["reference"], row["prompt"])
        if mended is not None:
            wrong = round(8 * (1 - language.accuracy(draft, row["prompt"])))
            gained = round(8 * (language.accuracy(mended, row["prompt"]) - language.accuracy(draft, row["prompt"])))
            assert 1 <= gained <= max(1, wrong // 2)
            assert len(changed(draft, mended)) == gained


def test_a_given_weaker_answer_has_that_many_wrong_words() -> None:
    assert language.accuracy(language.corrupt(RIGHT, PROMPT, 0.5), PROMPT) == 0.5
    assert language.accuracy(language.corrupt(RIGHT, PROMPT, 0.01), PROMPT) == 7 / 8


# ---- rows ------------------------------------------------------------------------------------------------------------------------


def test_splits_never_meet_whatever_the_seeds() -> None:
    drawn = {split: {prompt for seed in range(3) for prompt in language.prompts(split, 200, seed)} for split in language.SPLITS}
    assert all(len(prompts) == 600 for prompts in drawn.values())
    assert all(language.split_of(prompt) == split for split, prompts in drawn.items() for prompt in prompts)


def test_same_seed_same_rows_and_a_longer_draw_begins_with_the_shorter() -> None:
    assert language.rows("train", 5, seed=2, noise=0.2) == language.rows("train", 9, seed=2, noise=0.2)[:5]
    assert language.rows("train", 5, seed=2) != language.rows("train", 5, seed=3)


def test_clean_references_are_right_and_noisy_ones_wrong_at_the_rate_asked_for() -> None:
    def mean(noise: float) -> float:
        return sum(language.accuracy(row["reference"], row["prompt"]) for row in language.rows("train", 500, noise=noise)) / 500

    assert mean(0.0) == 1.0
    assert mean(0.2) == pytest.approx(0.8, abs=0.025)  # 4,000 words: four standard errors


def test_an_unknown_split_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no split 'test'; write one of pretraining, train, bare"):
        language.rows("test", 1)


def test_the_product_reads_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "language.jsonl"
    rows = [*language.pair_rows("train", 2), *language.bare_rows(1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given, _, bare = load_rows(str(path))
    assert (given.text, given.reference, given.source) == (rows[0]["prompt"], rows[0]["reference"], "language")
    assert given.rejected == rows[0]["rejected"]
    assert (bare.text, bare.reference) == (rows[2]["prompt"], None)


# ---- habits and drift ------------------------------------------------------------------------------------------------------------


def test_a_habit_is_a_distribution_with_the_shares_it_promises() -> None:
    for number, stem in enumerate(language.CLASSES):
        shares = language.habit(stem)
        right = 0.4 + 0.3 * number / 11
        assert sum(shares.values()) == pytest.approx(1.0)
        assert sum(shares[word] for word in language.SYNONYMS[stem]) == pytest.approx(right)
        # 60 % of the wrong ones, and the pet's part of the evenly spread rest over 33 words
        assert shares[language.pet_error(stem)] == pytest.approx((1 - right) * (0.6 + 0.4 / 33))


def test_the_initial_model_prefers_a_wrong_word_where_it_knows_least() -> None:
    def favourite(stem: str) -> str:
        shares = language.habit(stem)
        return max(shares, key=shares.__getitem__)

    assert [stem for stem in language.CLASSES if favourite(stem) == language.pet_error(stem)] == ["bam", "dok", "fel", "gin"]


def test_drift_is_the_divergence_of_synonym_shares() -> None:
    before = [("bam", "bama")] * 3 + [("bam", "bamo")]
    after = [("bam", "bama")] + [("bam", "bamo")] * 3
    # shares with 0.5 added: 3.5, 1.5, 0.5 of 5.5 against 1.5, 3.5, 0.5; the eleven other classes are equal
    expected = (3.5 * math.log(3.5 / 1.5) + 1.5 * math.log(1.5 / 3.5)) / 5.5 / 12
    assert language.drift(before, after) == pytest.approx(expected)
    assert language.drift(before, before) == 0.0


def test_drift_overlooks_wrong_words() -> None:
    assert language.drift([("bam", "ruka")] * 9, []) == 0.0
