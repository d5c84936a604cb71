"""Records travel between processes by pickle."""

from __future__ import annotations

import pickle
from dataclasses import fields
from typing import Final

import pytest

from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Refusal, RefusalReason, Stage

PROMPT: Final = Prompt("p", (Message("user", "Why?"),), "Because.", "shop")
DRAFT: Final = Completion("a", (1, 2), FinishReason.STOP, 3)
BETTER: Final = Completion("b", (4,), FinishReason.LENGTH, 5)
TRAVELLERS: Final = (
    *PROMPT.messages,
    PROMPT,
    DRAFT,
    PreferencePair("u", Stage.PREFERENCE, PROMPT, (7, 8), DRAFT, BETTER, "improver.v1"),
    Refusal("u", Stage.PREFERENCE, "p", RefusalReason.EMPTY, "nothing there", DRAFT, None),
)


@pytest.mark.parametrize("record", TRAVELLERS, ids=lambda record: type(record).__name__)
def test_what_is_pickled_for_each_pair_is_a_call_of_its_class(record: object) -> None:
    values = tuple(getattr(record, field.name) for field in fields(record))  # type: ignore[arg-type]
    assert record.__reduce__() == (type(record), values)
    assert pickle.loads(pickle.dumps(record)) == record  # noqa: S301 our own
