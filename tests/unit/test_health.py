"""The improver's health is counted right, and each brake holds at its limit and not before."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sgpo_dist.config import BrakesConfig
from sgpo_dist.health import IDLE_WINDOW_S, Brakes, Idleness, language_of, pair_health, refusal_health, switches_language
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Stage
from sgpo_dist.roles import BufferCounts, WorkerStats

ENGLISH = "This is the answer that you asked for, and it was easy."
GERMAN = "Das ist die Antwort, und sie war nicht schwer für eine Maschine."


def pair(response: str, refinement: str, tokens: tuple[int, int] = (1, 1), finish: FinishReason = FinishReason.STOP) -> PreferencePair:
    prompt = Prompt("p", (Message("user", "question"),))
    halves = (Completion(response, (7,) * tokens[0], finish, 0), Completion(refinement, (7,) * tokens[1], FinishReason.STOP, 0))
    return PreferencePair("u", Stage.PREFERENCE, prompt, (1,), *halves, "v1")


def counts(ready: int = 0, trained: int = 0, stale: int = 0, **refused: int) -> BufferCounts:
    return BufferCounts(9, 0, ready, 0, trained, refused, None, 0, 0, 0, 0, stale=stale)


# ---- pairs and refusals --------------------------------------------------------------------------------------------------------------


def test_pair_health_is_the_mean_over_the_pairs() -> None:
    one = pair("the cat sat", "the red cat sat", (4, 5))  # 3 of 3 + 4 words common: 1 - 6/7
    two = pair("a b a b a b", "a b a b a b", (6, 10), FinishReason.LENGTH)  # triples aba bab aba bab: half repeat
    found = pair_health([one, two])
    assert found == pytest.approx(
        {
            "improver/edit_ratio": 1 / 14,
            "improver/length_ratio": 15 / 10,
            "improver/language_switch": 0.0,
            "completions/response_length": 5.0,
            "completions/repetition": 0.25,
            "completions/eos_share": 0.5,
        }
    )
    assert pair_health([]) == {}


def test_a_switched_language_counts_once_a_pair() -> None:
    found = pair_health([pair(ENGLISH, GERMAN), pair(ENGLISH, ENGLISH), pair("Да, это так.", "Yes."), pair("", "Yes.")])
    assert found["improver/language_switch"] == 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ENGLISH, ("LATIN", "en")),
        (GERMAN, ("LATIN", "de")),
        ("Les villes de la côte sont belles, et une mer qui brille est dans cette baie.", ("LATIN", "fr")),
        ("El libro está en la mesa del profesor, pero los alumnos no lo ven.", ("LATIN", "es")),
        ("Il libro che leggo è più bello della storia, anche questo.", ("LATIN", "it")),
        ("Não sei se você vai, mas os livros são para uma pessoa que lê mais.", ("LATIN", "pt")),
        ("Het boek van een man is niet voor deze vrouw.", ("LATIN", "nl")),
        ("To nie jest dla mnie, że się boję, ale jak?", ("LATIN", "pl")),
        ('{"total": 12, "currency": "EUR"}', ("LATIN", "")),
        ("the of", ("LATIN", "")),  # two votes are too few
        ("the of and der und", ("LATIN", "")),  # 3 against 2 is no clear lead
        ("你好，世界 hi", ("CJK", "")),
        ("東京都は日本国の首都である", ("KANA", "")),  # 4 kana of 13
        ("東京都庁舎展望台入場券の", ("CJK", "")),  # 1 kana of 12 is under a tenth
        ("Это был print(x) тест", ("CYRILLIC", "")),
        ("안녕하세요", ("HANGUL", "")),
        ("1 + 1 = 2", ("", "")),
        ("", ("", "")),
    ],
)
def test_language_of(text: str, expected: tuple[str, str]) -> None:
    assert language_of(text) == expected


def test_what_cannot_be_told_is_no_switch() -> None:
    assert switches_language(ENGLISH, GERMAN)
    assert switches_language("你好", "hello")
    assert not switches_language(ENGLISH, "Short answer.")
    assert not switches_language("", "hello")
    assert not switches_language("42", "hello")


def test_refusals_are_shares_of_the_outcomes_since_the_last_step() -> None:
    before = counts(ready=2, trained=4, identical=3, meta_talk=1)
    after = counts(ready=3, trained=6, stale=1, identical=4, near_copy=1, meta_talk=2, empty=1)  # 4 more pairs, one of them stale by now
    found = refusal_health(before, after)  # 4 refusals: 2 copies, 1 talk, 1 empty
    assert found == {"improver/copy_rate": 2 / 8, "improver/meta_talk_rate": 1 / 8, "improver/refused_rate": 4 / 8, "improver/outcomes": 8}
    since_the_start = {"improver/copy_rate": 0.3, "improver/meta_talk_rate": 0.1, "improver/refused_rate": 0.4, "improver/outcomes": 10}
    assert refusal_health(None, before) == since_the_start


def test_no_outcome_since_the_last_step_says_nothing() -> None:
    assert refusal_health(counts(ready=2, identical=1), counts(trained=2, identical=1)) == {}
    assert refusal_health(None, counts()) == {}


def test_the_metrics_page_explains_every_name() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = {*pair_health([pair("a", "b")]), *refusal_health(None, counts(ready=1))}
    assert sorted(name for name in names if f"`{name}`" not in page) == []


# ---- brakes --------------------------------------------------------------------------------------------------------------------------


def idle(**seconds: float) -> list[WorkerStats]:
    return [WorkerStats(worker, 0, 0, 0, 0, 0, idle_s, 0) for worker, idle_s in seconds.items()]


def test_idleness_is_of_a_whole_window_and_of_workers_that_were_there_all_the_time() -> None:
    seen = Idleness()
    assert seen.observe(idle(a=100.0, b=0.0), 0.0) == {}
    assert seen.observe(idle(a=101.0, b=1.0), IDLE_WINDOW_S / 2) == {}
    assert seen.observe(idle(a=101.0, b=9.0, new=500.0), IDLE_WINDOW_S) == {"perf/worker_idle": pytest.approx(10 / 2 / IDLE_WINDOW_S)}
    assert seen.observe(idle(a=140.0, b=40.0), 1.5 * IDLE_WINDOW_S) == {"perf/worker_idle": pytest.approx(10 / 2 / IDLE_WINDOW_S)}
    assert seen.observe(idle(a=140.0, b=40.0), 2 * IDLE_WINDOW_S) == {"perf/worker_idle": 1.0}  # a heartbeat that came late
    assert seen.observe(idle(other=3.0), 3 * IDLE_WINDOW_S) == {"perf/worker_idle": 1.0}  # nobody to compare: the last that is known


def observed(*steps: dict[str, float], beta: float = 0.1, reference_free: bool = False, **limits: float) -> list[str | None]:
    brakes = Brakes(BrakesConfig.model_validate(limits), beta, reference_free=reference_free)
    return [brakes.observe(step) for step in steps]


def test_a_chosen_text_may_lose_three_nats_and_no_more() -> None:
    kept, lost = {"rewards/chosen": -0.29}, {"rewards/chosen": -0.31}
    assert observed(kept, kept) == [None, None]
    assert observed(lost, lost) == [None, "chosen texts lost 3.1 nats against the reference model (preference.brakes.max_chosen_drop 3)"]
    assert observed({"rewards/chosen": 9.0}, {"rewards/chosen": 9.0}) == [None, None]


def test_drift_is_in_nats_whatever_beta_is() -> None:
    assert observed({"rewards/chosen": -0.31}, beta=0.2, window=1) == [None]  # 1.55 nats
    assert observed({"rewards/chosen": -0.031}, beta=0.01, window=1) != [None]  # 3.1 nats


def test_a_rejected_text_may_lose_fifteen_nats() -> None:
    assert observed({"rewards/rejected": -1.49}, window=1) == [None]
    assert observed({"rewards/rejected": -1.51}, window=1) == [
        "rejected texts lost 15.1 nats against the reference model (preference.brakes.max_rejected_drop 15)"
    ]


def test_rewards_that_are_no_ratios_do_not_drift() -> None:
    far = {"rewards/chosen": -90.0, "rewards/rejected": -90.0}
    assert observed(far, window=1, reference_free=True) == [None]
    assert observed(far | {"completions/repetition": 0.9}, window=1, reference_free=True) != [None]


def lengths(*values: float) -> list[dict[str, float]]:
    return [{"completions/response_length": value} for value in values]


def test_length_is_held_against_the_first_steps() -> None:
    first = lengths(90, 110)  # mean 100
    assert observed(*first, *lengths(60, 60)) == [None] * 4
    assert observed(*first, *lengths(60, 58))[2:] == [
        None,  # (110 + 60) / 2 = 85
        "responses are 0.59 times as long as in the stage's first steps (preference.brakes.min_length_ratio 0.6)",
    ]
    assert observed(*first, *lengths(170, 170)) == [None] * 4
    assert observed(*first, *lengths(170, 172))[3] == (
        "responses are 1.71 times as long as in the stage's first steps (preference.brakes.max_length_ratio 1.7)"
    )


def test_repetition() -> None:
    assert observed({"completions/repetition": 0.4}, window=1) == [None]
    assert observed({"completions/repetition": 0.41}, window=1) == [
        "the share of repeated word triples in responses is 0.41 (preference.brakes.max_repetition 0.4)"
    ]


def test_the_win_rate_counts_where_it_was_measured_and_a_limit_is_set() -> None:
    assert observed({"improver/win_rate": 0.0}, window=1) == [None]
    assert observed({"improver/win_rate": 0.3}, {}, {}, min_improver_win_rate=0.3) == [None] * 3
    said = "the share of held-out drafts that the improver betters is 0.29 (preference.brakes.min_improver_win_rate 0.3)"
    assert observed({}, {"improver/win_rate": 0.29}, {}, {}, min_improver_win_rate=0.3) == [None, said, said, None]  # leaves the window


def refused(share: float, outcomes: int) -> dict[str, float]:
    return {"improver/refused_rate": share, "improver/outcomes": outcomes}


def test_refusals_are_counted_over_the_window_whatever_a_step_had_of_them() -> None:
    assert observed(refused(0.98, 400), window=1) == [None]
    said = "the share of prompts that gave no pair is 0.99 (preference.brakes.max_refused_rate 0.98)"
    assert observed(refused(0.99, 400), window=1) == [said]
    assert observed(refused(0.0, 8), refused(0.999, 1000)) == [None, said.replace("0.99 ", "0.991 ")]
    assert observed(refused(0.97, 400), refused(1.0, 3), {}) == [None] * 3  # 391 of 403, then 3 of 3
    assert [said is None for said in observed(refused(1.0, 199), {}, refused(1.0, 200))] == [True, True, False]
    assert observed(refused(1.0, 400), window=1, max_refused_rate=1) == [None]


def test_what_was_refused_after_the_last_step_counts_as_that_step_s() -> None:
    brakes = Brakes(BrakesConfig(max_chosen_drop=3.0), 0.1)
    assert brakes.amend(refused(1.0, 400)) is None  # no step yet
    for chosen in (-0.2, -0.39):
        assert brakes.observe({"rewards/chosen": chosen} | refused(0.5, 16)) is None
    assert brakes.amend(refused(0.9, 400)) is None  # and the drop is still that of both steps
    said = brakes.amend(refused(0.999, 4000))
    assert said is not None
    assert said.startswith("the share of prompts that gave no pair is 0.997")


def test_one_bad_step_in_the_window_is_averaged_and_a_short_window_says_nothing() -> None:
    bad, good = {"rewards/chosen": -0.5}, {"rewards/chosen": 0.0}
    assert observed(bad, good, bad, bad, window=2) == [None, None, None, observed(bad, window=1)[0]]


def test_a_value_that_is_not_a_number_is_a_collapse() -> None:
    assert observed({"rewards/chosen": math.nan}, window=1) == [
        "chosen texts lost nan nats against the reference model (preference.brakes.max_chosen_drop 3)"
    ]


def test_several_reasons_are_one_line() -> None:
    (said,) = observed({"rewards/chosen": -0.31, "completions/repetition": 0.5}, window=1)
    assert said is not None
    assert said.count("; ") == 1
    assert said.startswith("chosen texts lost 3.1 nats")


def test_a_crossing_is_new_once_until_the_limit_was_kept() -> None:
    brakes = Brakes(BrakesConfig(window=1), 0.1)
    bad, worse, good = {"rewards/chosen": -0.5}, {"rewards/chosen": -0.5, "completions/repetition": 0.5}, {"rewards/chosen": 0.0}
    found = []
    for step in (bad, bad, worse, bad, good, bad):
        brakes.observe(step)
        found.append(brakes.is_new)
    assert found == [True, False, True, False, False, True]


def test_a_resumed_stage_brakes_as_if_it_had_gone_on() -> None:
    steps = [*lengths(100, 100, 80, 61), {"completions/response_length": 50.0}]
    brakes = Brakes(BrakesConfig(), 0.1)
    for row in steps[:3]:
        brakes.observe(row)
    assert [brakes.observe(row) for row in steps[3:]] == observed(*steps)[3:]
    assert observed(*steps)[4] is not None  # (61 + 50) / 2 = 55.5
