"""The benchmark's small model: its tokenizer reads every word of both roles, and what is saved loads as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.quality import language
from bench.quality.tiny_model import END, TEMPLATE, UNKNOWN, TinyModel, build_tokenizer, habit_rows, make_model
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.records import Message, Prompt

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

TEXT = "bam dok fel gin hup jas kev lor"
PROMPT = Prompt("p", (Message("user", TEXT),), "bama doka fela gina hupa jasa keva lora")
SMALLEST = TinyModel(rows=32, batch_size=16, epochs=1, num_layers=1)


def test_both_roles_and_the_reviser_are_read_without_an_unknown_word() -> None:
    tokenizer = build_tokenizer()
    book = PromptBook(tokenizer, TEMPLATE)
    assert PROMPT.reference is not None
    read = [book.policy_ids(PROMPT), book.improver_ids(PROMPT, PROMPT.reference), book.revise_ids(PROMPT, PROMPT.reference, PROMPT.reference)]
    assert all(tokenizer.unk_token_id not in ids for ids in read)
    assert len(read[0]) == 8 + 3  # <user>, <end>, <assistant>
    assert tokenizer.encode("unheard-of", add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(UNKNOWN)]


def test_an_answer_comes_back_as_it_was_and_ends_its_turn() -> None:
    tokenizer = build_tokenizer()
    book = PromptBook(tokenizer, TEMPLATE)
    ids = book.completion_ids("bama doka")
    assert ids[-1] == book.eos_id == tokenizer.convert_tokens_to_ids(END)
    assert book.decode(ids) == "bama doka"
    assert len(ids) == 3


def test_the_initial_improver_is_taught_to_keep_four_words_of_five() -> None:
    policy, improver = habit_rows(build_tokenizer(), TinyModel(rows=30, improver_share=0.5), seed=0)
    assert (len(policy), len(improver)) == (15, 15)
    certain = [max(belief.values()) for row in improver for belief in row.beliefs]
    assert min(certain) >= 0.8
    assert all(sum(belief.values()) == pytest.approx(1.0) for row in (*policy, *improver) for belief in row.beliefs)


def test_the_directory_loads_and_the_same_seed_makes_the_same_model(tmp_path: Path) -> None:
    made = make_model(tmp_path / "one", seed=3, shape=SMALLEST)
    make_model(tmp_path / "two", seed=3, shape=SMALLEST)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    ids = torch.tensor([PromptBook(load_tokenizer(tmp_path / "one"), TEMPLATE).policy_ids(PROMPT)])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, made(ids).logits)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()
    assert loaded.config.head_dim == 64
    assert loaded.config.vocab_size % 64 == 0
    assert loaded.generation_config.eos_token_id == PromptBook(build_tokenizer(), TEMPLATE).eos_id


def test_a_short_training_already_lowers_the_surprise(tmp_path: Path) -> None:
    first = make_model(tmp_path / "first", shape=TinyModel(rows=16, batch_size=16, epochs=1, num_layers=1, learning_rate=1e-9))
    later = make_model(tmp_path / "later", shape=TinyModel(rows=256, batch_size=16, epochs=2, num_layers=1))
    assert _share_of_words(later) > 0.9 > 0.5 > _share_of_words(first)


def _share_of_words(model: torch.nn.Module) -> float:
    """How much of the probability of the first answer word lies on the language's words."""
    tokenizer = build_tokenizer()
    with torch.no_grad():
        shares = model(torch.tensor([PromptBook(tokenizer, TEMPLATE).policy_ids(PROMPT)])).logits[0, -1].softmax(-1)
    return float(shares[tokenizer.convert_tokens_to_ids(list(language.WORDS))].sum())
