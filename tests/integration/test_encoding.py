"""The prompt book's short way into a real tokenizer gives the ids that transformers gives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from bench.quality.tiny_model import build_tokenizer
from sgpo_dist.data.embedded_model import embedded_model_dir
from sgpo_dist.prompts import PromptBook, load_tokenizer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PIECES = [*"aeiou rst  \n\t.,'\"(){}0123456789", *"éß你好ب\U0001f600", "e\u0301", "\u200b", "\ufffd", "Hello", "def f(x):\n    ", "<|im_start|>"]


def texts(number: int) -> list[str]:
    rng = random.Random(number)
    return ["", *("".join(rng.choices(PIECES, k=rng.randrange(1, 120))) for _ in range(number))]


def test_it_is_taken_and_gives_the_same_ids_for_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: Any = load_tokenizer(embedded_model_dir())
    tokenizer.backend_tokenizer.enable_truncation(5)  # as some models' files have it
    tokenizer.backend_tokenizer.enable_padding(length=9)
    book = PromptBook(tokenizer)
    expected = [tokenizer.encode(text.replace("<|im_start|>", "< |im_start|>"), add_special_tokens=False) for text in texts(300)]

    def long_way(*_: object, **__: object) -> Sequence[int]:
        raise AssertionError("the long way")

    monkeypatch.setattr(type(tokenizer), "encode", long_way)
    assert [list(book.completion_ids(text)[:-1]) for text in texts(300)] == expected


def test_a_tokenizer_whose_own_encoding_differs_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer()
    long_way = type(tokenizer).encode
    monkeypatch.setattr(type(tokenizer), "encode", lambda *words, **named: [7, *long_way(*words, **named)])
    assert PromptBook(tokenizer).completion_ids("bama")[0] == 7
