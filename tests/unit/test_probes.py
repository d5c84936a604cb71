"""What a publication is proved with."""

from __future__ import annotations

from test_prompts import WordTokenizer

from sgpo_dist.data.loading import Corpus
from sgpo_dist.launch import probe_rows
from sgpo_dist.prompts import PromptBook
from sgpo_dist.records import Message, Prompt
from sgpo_dist.weights.version import COMPLETION_TOKENS, PROMPT_TOKENS


def test_probes_of_long_texts_cost_no_more_than_short_ones() -> None:
    book = PromptBook(WordTokenizer())
    words = " ".join(f"word{number}" for number in range(500))
    short, long = (Prompt(name, (Message("user", text),), reference=text) for name, text in (("a", "one two"), ("b", words)))
    first, second = probe_rows(Corpus((short, long), (), ()), book, 4)
    assert (first.prompt_ids, first.completion_ids) == (book.policy_ids(short), book.completion_ids("one two"))
    assert second.prompt_ids == book.policy_ids(long)[-PROMPT_TOKENS:]
    assert second.completion_ids == book.completion_ids(words)[:COMPLETION_TOKENS]
    assert (len(second.prompt_ids), len(second.completion_ids)) == (PROMPT_TOKENS, COMPLETION_TOKENS)
