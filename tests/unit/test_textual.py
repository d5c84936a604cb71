"""Text measures against values worked out by hand."""

import difflib
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_dist.textual import (
    common_subsequence,
    edit_ratio,
    ends_complete,
    length_ratio,
    overlap,
    quartile_fences,
    repetition,
    sentences,
    similarity,
    words,
)


def test_words_are_words_marks_and_single_characters_of_scripts_without_spaces() -> None:
    assert words('{"total": 4.5}') == ["{", '"', "total", '"', ":", "4", ".", "5", "}"]
    assert words("Don't go!") == ["Don", "'", "t", "go", "!"]
    assert words("猫がGPU") == ["猫", "が", "GPU"]


def test_edit_ratio_counts_the_words_outside_the_longest_common_subsequence() -> None:
    # a b c d against a x c: common a, c; 1 - 2*2/7.
    assert edit_ratio("a b c d", "a x c") == pytest.approx(3 / 7)
    assert edit_ratio("a b", "a  b\n") == 0.0
    assert edit_ratio("a b", "c d") == 1.0
    assert edit_ratio("", "") == 0.0
    assert edit_ratio("A", "a") == 1.0


def _slow_lcs(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        above, row = row, [0]
        for j, y in enumerate(b, start=1):
            row.append(above[j - 1] + 1 if x == y else max(above[j], row[j - 1]))
    return row[-1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_bit_parallel_subsequence_equals_the_table(a: list[str], b: list[str]) -> None:
    assert common_subsequence(a, b) == _slow_lcs(a, b)


def test_long_repetitive_texts_are_compared_quickly_and_never_below_difflib() -> None:
    a, b = "the cat " * 1000, "the dog " * 1000
    assert edit_ratio(a, b) == 0.5
    small_a, small_b = a.split()[:50], b.split()[:50]
    assert 2 * common_subsequence(small_a, small_b) / 100 >= difflib.SequenceMatcher(None, small_a, small_b, autojunk=False).ratio()


def test_similarity_ignores_case_and_marks() -> None:
    assert similarity("Hello, World!", "hello world") == 1.0
    # one two three against one three: 2*2/5.
    assert similarity("one two three", "one, three") == pytest.approx(0.8)


def test_overlap_counts_shared_words_with_multiplicity_in_any_order() -> None:
    assert overlap("the cat the dog", "the dog runs") == pytest.approx(2 * 2 / 7)
    assert overlap("dog cat", "Cat dog.") == 1.0
    assert overlap("a", "b") == 0.0


def test_repetition_is_the_share_of_repeated_triples() -> None:
    # a b c a b c: abc, bca, cab, abc; one of four came before.
    assert repetition("a b c a b c") == 0.25
    assert repetition("a b") == 0.0
    assert repetition("go go go go go") == pytest.approx(2 / 3)


def test_sentences_split_prose_and_lines_but_not_numbers_and_abbreviations() -> None:
    text = 'Dr. Lee paid $3.50, e.g. for tea. "Really?" he asked. Yes!\n1. Go home.\n2. Sleep'
    assert [piece.strip() for piece in sentences(text)] == [
        "Dr. Lee paid $3.50, e.g. for tea.",
        '"Really?"',
        "he asked.",
        "Yes!",
        "1. Go home.",
        "2. Sleep",
    ]
    assert sentences("The U.S. Army read vol. two.") == ["The U.S. Army read vol. two."]
    assert sentences("  ") == []


def test_sentences_of_scripts_without_spaces() -> None:
    assert sentences("猫です。犬です。") == ["猫です。", "犬です。"]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='aB. \n!?1)"。', max_size=40))
def test_joined_sentences_are_the_text(text: str) -> None:
    pieces = sentences(text)
    assert "".join(pieces) == (text if text.strip() else "")
    assert all(piece.strip() for piece in pieces)


@pytest.mark.parametrize("text", ["Done.", 'He said "yes."', "Really?!", '{"a": 1}', "**Bold end.**", "```py\nx\n```", "終わり。", "Wait…"])
def test_complete_ends(text: str) -> None:
    assert ends_complete(text + " \n")


@pytest.mark.parametrize("text", ["", "The cat is", "These are:", "one, two,", "3.5"])
def test_incomplete_ends(text: str) -> None:
    assert not ends_complete(text)


def test_length_ratio() -> None:
    assert length_ratio(30, 20) == 1.5
    assert length_ratio(5, 0) == 5.0


def test_tukeys_fences() -> None:
    # 1..5: Q1 = 2, Q3 = 4, IQR = 2; with k = 1.5 the fences are -1 and 7.
    assert quartile_fences([5, 1, 4, 2, 3], 1.5) == (-1.0, 7.0)
    # 0, 10: quartiles interpolate to 2.5 and 7.5; with k = 1 the fences are -2.5 and 12.5.
    assert quartile_fences([0.0, 10.0], 1.0) == (-2.5, 12.5)
    assert quartile_fences([3.0], 1.5) == (3.0, 3.0)
    assert quartile_fences([], 1.5) == (-math.inf, math.inf)
