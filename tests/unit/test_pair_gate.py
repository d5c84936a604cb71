"""Each reason of the gate, and what must pass it."""

from __future__ import annotations

import pytest

from sgpo_dist.config import PairGateConfig
from sgpo_dist.pair_gate import fenced, judge, make_outcome, talks_about_the_task
from sgpo_dist.prompts import instruction
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Refusal, RefusalReason, Stage
from sgpo_dist.roles import Lease
from sgpo_dist.textual import edit_ratio

GATE = PairGateConfig()
DRAFT = "The capital of Australia is Sydney. It lies on the coast."
BETTER = "The capital of Australia is Canberra. It lies inland."


def completion(text: str, finish: FinishReason = FinishReason.STOP, tokens: int = 10, version: int = 1) -> Completion:
    return Completion(text, tuple(range(tokens)), finish, version)


def lease(reference: str | None = None, stage: Stage = Stage.PREFERENCE) -> Lease:
    prompt = Prompt("p1", (Message("user", "What is the capital of Australia?"),), reference)
    return Lease("uid1", stage, prompt, 0, 0, 4, 0)


def reason(draft: str, rewrite: str, gate: PairGateConfig = GATE, reference: str | None = None, told: str = "") -> RefusalReason | None:
    return judge(completion(draft), completion(rewrite), reference, gate, told)


def test_a_plain_improvement_passes() -> None:
    assert reason(DRAFT, BETTER) is None


@pytest.mark.parametrize(("draft", "rewrite"), [("", BETTER), (DRAFT, " \n")])
def test_empty(draft: str, rewrite: str) -> None:
    assert reason(draft, rewrite) is RefusalReason.EMPTY


def test_a_refinement_cut_at_the_limit_is_refused_unless_no_end_is_required() -> None:
    cut = completion(BETTER, FinishReason.LENGTH)
    assert judge(completion(DRAFT), cut, None, GATE) is RefusalReason.TRUNCATED
    assert judge(completion(DRAFT), cut, None, PairGateConfig(require_eos=False)) is None


def test_a_response_cut_at_the_limit_may_be_the_rejected_half() -> None:
    cut = completion(DRAFT, FinishReason.LENGTH)
    assert judge(cut, completion(BETTER), None, GATE) is None
    assert judge(cut, completion(BETTER), None, PairGateConfig(allow_truncated_rejected=False)) is RefusalReason.TRUNCATED


def test_an_aborted_half_has_no_end() -> None:
    aborted = completion(BETTER, FinishReason.ABORT)
    assert judge(completion(DRAFT), aborted, None, GATE) is RefusalReason.NO_EOS
    assert judge(aborted, completion(DRAFT), None, GATE) is RefusalReason.NO_EOS


def test_identical_but_for_the_space_around() -> None:
    assert reason(DRAFT, DRAFT + "\n") is RefusalReason.IDENTICAL


def test_near_copies_are_refused_up_to_the_ratio() -> None:
    # Ten words and marks each, one differs: edit ratio 1 - 2*9/20 = 0.1.
    draft, rewrite = "a b c d e f g h i .", "a b c d e f g h x ."
    assert reason(draft, rewrite) is None
    assert reason(draft, rewrite, PairGateConfig(near_copy_ratio=0.09)) is None
    assert reason(draft, rewrite, PairGateConfig(near_copy_ratio=0.11)) is RefusalReason.NEAR_COPY
    assert reason("a b", "a  b") is RefusalReason.NEAR_COPY


@pytest.mark.parametrize(
    "talk",
    [
        "Here is the improved version:\n" + BETTER,
        "Sure! Here's a slightly revised answer. " + BETTER,
        "**Improved answer:** " + BETTER,
        "Answer: " + BETTER,
        "I have corrected the answer. " + BETTER,
        BETTER + " This version fixes the capital.",
        BETTER + "\n\nI've improved your grammar.",
        BETTER + " The original answer named Sydney.",
    ],
)
def test_talk_about_the_task(talk: str) -> None:
    assert reason(DRAFT, talk) is RefusalReason.META_TALK


@pytest.mark.parametrize(
    "plain",
    [
        "Here is a better plan: walk there.",
        "Here are the steps. First, rest.",
        "The new version of the phone has two cameras.",
        "I corrected my watch, then the train came.",
        "The answer is four.",
    ],
)
def test_ordinary_text_is_no_talk_about_the_task(plain: str) -> None:
    assert not talks_about_the_task(plain)


def test_talk_in_the_middle_or_in_the_response_too_is_the_texts_own() -> None:
    filler = "The weather was mild and the day was long. " * 4
    assert not talks_about_the_task(filler + "The original version sold well. " + filler)
    assert reason("Here is the revised letter: Dear Sir,", "Here is the revised letter: Dear Madam,") is None


def test_five_words_of_the_instruction_in_a_row_are_a_leak() -> None:
    told = instruction("improver.v1")
    assert reason(DRAFT, BETTER + " Give only the new answer.", told=told) is RefusalReason.INSTRUCTION_LEAK
    assert reason(DRAFT, BETTER + " Give only the new one.", told=told) is None
    assert reason("Give only the new answer, please.", "Give only the new answer, now.", told=told) is None


def test_a_copy_of_the_reference_is_a_leak_unless_the_response_was_as_near() -> None:
    reference = "Canberra is the capital of Australia, and it lies inland."
    copied = "Canberra is the capital of Australia and it lies inland"
    assert reason(DRAFT, copied, reference=reference) is RefusalReason.REFERENCE_LEAK
    assert reason(copied + " now", copied, reference=reference) is None
    assert reason(DRAFT, copied, PairGateConfig(max_reference_overlap=1.0), reference=reference) is None


def test_length_blow_up_counts_tokens() -> None:
    assert judge(completion(DRAFT, tokens=10), completion(BETTER, tokens=25), None, GATE) is None
    assert judge(completion(DRAFT, tokens=10), completion(BETTER, tokens=26), None, GATE) is RefusalReason.LENGTH_BLOW_UP


def test_make_outcome_gives_a_pair_that_carries_everything() -> None:
    response, refinement = completion(DRAFT, version=4), completion(BETTER, version=5)
    pair = make_outcome(lease(), (9, 8), response, refinement, "improver.v1", GATE)
    assert pair == PreferencePair("uid1", Stage.PREFERENCE, lease().prompt, (9, 8), response, refinement, "improver.v1")
    assert isinstance(pair, PreferencePair)
    assert pair.version == 4


def test_make_outcome_refuses_with_the_reason_the_texts_and_figures() -> None:
    outcome = make_outcome(lease(), (9,), completion(DRAFT), completion(DRAFT, FinishReason.LENGTH, 7), "improver.v1", GATE)
    assert isinstance(outcome, Refusal)
    assert outcome.reason is RefusalReason.TRUNCATED
    assert outcome.detail == "response 10 tokens (stop), refinement 7 tokens (length), edit ratio 0.000"
    assert outcome.refinement is not None


def test_no_refinement_means_nothing_to_repair() -> None:
    outcome = make_outcome(lease(stage=Stage.IMPROVER), (9,), completion(DRAFT), None, "tidy", GATE)
    assert isinstance(outcome, Refusal)
    assert (outcome.reason, outcome.prompt_id, outcome.stage) == (RefusalReason.NOTHING_TO_REPAIR, "p1", Stage.IMPROVER)


def test_only_sampled_refinements_are_checked_for_leaks() -> None:
    leak = completion("Give only the new answer. Canberra.")
    assert isinstance(make_outcome(lease(), (9,), completion(DRAFT), leak, "repair", GATE), PreferencePair)
    for template in ("improver.v1", "reviser.v1"):
        rewrite = completion(
            "Give only the new answer. Canberra." if template == "improver.v1" else "Do not mention the example. Canberra."
        )
        outcome = make_outcome(lease(), (9,), completion(DRAFT), rewrite, template, GATE)
        assert isinstance(outcome, Refusal)
        assert outcome.reason is RefusalReason.INSTRUCTION_LEAK
    repaired = completion("It is Canberra.")
    assert isinstance(make_outcome(lease("It is Canberra."), (9,), completion(DRAFT), repaired, "repair", GATE), PreferencePair)
    copied = make_outcome(lease("It is Canberra."), (9,), completion(DRAFT), repaired, "reviser.v1", GATE)
    assert isinstance(copied, Refusal)
    assert copied.reason is RefusalReason.REFERENCE_LEAK


def test_what_an_endpoint_was_told_is_not_to_be_repeated() -> None:
    leak = completion("Showing it how its own answers become better, Canberra lies inland.")
    outcome = make_outcome(lease(), (9,), completion(DRAFT), leak, "endpoint_reviser.v1", GATE)
    assert isinstance(outcome, Refusal)
    assert outcome.reason is RefusalReason.INSTRUCTION_LEAK


def test_the_reference_itself_may_be_of_any_length_and_words_but_must_be_another_text() -> None:
    long = completion("Here is the improved version: " + BETTER, tokens=99)
    assert isinstance(make_outcome(lease(long.text), (9,), completion(DRAFT), long, "reference", GATE), PreferencePair)
    same = make_outcome(lease(DRAFT), (9,), completion(DRAFT), completion(DRAFT), "reference", GATE)
    assert isinstance(same, Refusal)
    assert same.reason is RefusalReason.IDENTICAL


def test_fences_keep_pairs_whose_edit_ratio_lies_on_or_between_them() -> None:
    # Five words each, one differs: edit ratio 1 - 2*4/10 = 0.2.
    pair = PreferencePair("uid1", Stage.PREFERENCE, lease().prompt, (9,), completion("a b c d e"), completion("a b c d x"), "improver.v1")
    exact = edit_ratio("a b c d e", "a b c d x")
    assert fenced(pair, None) is None
    assert fenced(pair, (exact, exact)) is None
    assert fenced(pair, (0.3, 0.6)) == Refusal(
        "uid1", Stage.PREFERENCE, "p1", RefusalReason.FENCED_OUT, "edit ratio 0.200, fences 0.300 to 0.600", pair.response, pair.refinement
    )
    above = fenced(pair, (-0.1, 0.19))
    assert above is not None
    assert above.detail == "edit ratio 0.200, fences -0.100 to 0.190"
