"""The small model of the quality benchmark, made from nothing in about 20 seconds on one core.

A word-level tokenizer that knows the language and the wording of both roles, and a Llama of 0.4 million parameters that is taught the
initial model's habits: as policy it answers by ``language.habit``; as improver it keeps a draft's words and, with probability
``REDRAW``, draws one anew from the same habit. Such a rewrite changes drafts without making them better on average, so whatever an
improver gains later was learned in the improver stage. Called by the quality benchmark; the directory loads in transformers and vLLM.
Leaves out: everything after the initial model.

Shapes: ``_B`` = rows, ``_L`` = tokens, ``_A`` = answer tokens (the end included), ``_V`` = vocabulary.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer as WordTokenizer
from tokenizers import models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.quality import language
from sgpo_dist.prompts import IMPROVER, REVISER, PromptBook
from sgpo_dist.records import Message, Prompt

UNKNOWN, USER, ASSISTANT, END, PADDING = "<unk>", "<user>", "<assistant>", "<end>", "<pad>"
SPECIAL: Final = (UNKNOWN, USER, ASSISTANT, END, PADDING)
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ ('<assistant>' if message['role'] == 'assistant' else '<user>') + ' ' + message['content'] + ' <end> ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TEMPLATE: Final = "v1"
"""Version of the product's templates that the model can read."""
VOCABULARY_MULTIPLE: Final = 64
REDRAW: Final = 0.2
"""Probability that the initial improver draws a word of the draft anew."""


@dataclass(frozen=True, slots=True)
class TinyModel:
    """Size of the model and of its training. Heads are 64 wide, because vLLM's CPU attention wants widths such as this."""

    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 2
    max_positions: int = 256
    rows: int = 4096
    batch_size: int = 32
    epochs: int = 3
    learning_rate: float = 3e-3
    improver_share: float = 0.34


DEFAULTS: Final = TinyModel()


@dataclass(frozen=True, slots=True)
class HabitRow:
    """One row of the first training: the answer that is read, and for each of its words what the model should believe about it."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    beliefs: tuple[Mapping[str, float], ...]


def make_model(directory: str | Path, seed: int = 0, shape: TinyModel = DEFAULTS) -> LlamaForCausalLM:
    """Train the initial model and save it with its tokenizer as a Hugging Face directory. Same seed and thread count, same model."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(model_config(tokenizer, shape))
        teach_habits(model, habit_rows(tokenizer, shape, seed), tokenizer, shape, seed)
    model.eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words between white space; unknown ones become ``<unk>``. ``<end>`` ends a turn and is the end token."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *language.CLASSES, *language.WORDS, *_template_words()))}
    words = WordTokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token=UNKNOWN,
        eos_token=END,
        pad_token=PADDING,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def model_config(tokenizer: PreTrainedTokenizerFast, shape: TinyModel = DEFAULTS) -> LlamaConfig:
    """A plain Llama; the vocabulary is padded to a multiple of 64."""
    heads = shape.hidden_size // 64
    return LlamaConfig(
        vocab_size=-(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=shape.max_positions,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def habit_rows(tokenizer: PreTrainedTokenizerFast, shape: TinyModel, seed: int) -> list[list[HabitRow]]:
    """Rows of the policy role and rows of the improver role, two lists; within each all rows are equally long."""
    book, rng = PromptBook(tokenizer, TEMPLATE), random.Random(f"habits/{seed}")
    prompts = [Prompt(text, (Message("user", text),)) for text in language.prompts("pretraining", shape.rows, seed)]
    count = round(shape.improver_share * len(prompts))
    return [[_policy_row(prompt, book, rng) for prompt in prompts[count:]], [_improver_row(prompt, book, rng) for prompt in prompts[:count]]]


def teach_habits(
    model: LlamaForCausalLM, roles: Sequence[Sequence[HabitRow]], tokenizer: PreTrainedTokenizerFast, shape: TinyModel, seed: int
) -> None:
    """Cross-entropy between what the model believes about each answer word and what it should believe; every step sees both roles."""
    packed = [_pack(rows, tokenizer, model.config.vocab_size) for rows in roles]
    batches = _batches([len(rows) for rows in roles], shape, seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=shape.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, shape.learning_rate, total_steps=len(batches), pct_start=0.1)
    model.train()
    for batch in batches:
        for (ids_R_L, beliefs_R_A_V), rows in zip(packed, batch, strict=True):
            share = len(rows) / sum(map(len, batch))
            (share * _surprise(model, ids_R_L[rows], beliefs_R_A_V[rows])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()


def _policy_row(prompt: Prompt, book: PromptBook, rng: random.Random) -> HabitRow:
    answer = language.habitual_answer(prompt.text, rng)
    return HabitRow(book.policy_ids(prompt), book.completion_ids(answer), tuple(language.habit(stem) for stem in prompt.text.split()))


def _improver_row(prompt: Prompt, book: PromptBook, rng: random.Random) -> HabitRow:
    draft = language.habitual_answer(prompt.text, rng)
    beliefs = tuple(_half_kept(word, language.habit(stem)) for word, stem in zip(draft.split(), prompt.text.split(), strict=True))
    answer = " ".join(rng.choices(language.WORDS, weights=[belief[word] for word in language.WORDS])[0] for belief in beliefs)
    return HabitRow(book.improver_ids(prompt, draft), book.completion_ids(answer), beliefs)


def _half_kept(kept: str, habit: Mapping[str, float]) -> dict[str, float]:
    return {word: REDRAW * share + (1.0 - REDRAW) * (word == kept) for word, share in habit.items()}


def _pack(rows: Sequence[HabitRow], tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Token ids ``[R, L]`` and beliefs ``[R, A, V]``; the end token is certain."""
    ids_R_L = torch.tensor([row.prompt_ids + row.answer_ids for row in rows])
    beliefs_R_A_V = torch.zeros(len(rows), language.LENGTH + 1, vocab_size)
    words = torch.tensor(tokenizer.convert_tokens_to_ids(list(language.WORDS)))
    shares_R_A_W = torch.tensor([[[belief[word] for word in language.WORDS] for belief in row.beliefs] for row in rows])
    beliefs_R_A_V[:, :-1, words] = shares_R_A_W
    beliefs_R_A_V[:, -1, tokenizer.eos_token_id] = 1.0
    return ids_R_L, beliefs_R_A_V


def _surprise(model: LlamaForCausalLM, ids_B_L: Tensor, beliefs_B_A_V: Tensor) -> Tensor:
    """Mean cross-entropy (nats) over the answer's tokens."""
    answer_length = beliefs_B_A_V.shape[1]
    logits_B_A_V = model(input_ids=ids_B_L[:, :-1], use_cache=False, logits_to_keep=answer_length).logits
    return -(beliefs_B_A_V * logits_B_A_V.float().log_softmax(-1)).sum(-1).mean()


def _batches(counts: Sequence[int], shape: TinyModel, seed: int) -> list[list[list[int]]]:
    """Row numbers by [step][role]: each role's rows in a fresh order an epoch, spread evenly over its steps."""
    steps = max(1, sum(counts) // shape.batch_size)
    batches = []
    for epoch in range(shape.epochs):
        orders = [random.Random(f"{seed}/{epoch}/{role}").sample(range(count), count) for role, count in enumerate(counts)]
        batches += [[order[step::steps] for order in orders] for step in range(steps)]
    return batches


def _template_words() -> list[str]:
    """Words of the two roles' instructions; the templates' own commands left out."""
    folder = resources.files("sgpo_dist") / "templates"
    texts = [(folder / f"{role}.{TEMPLATE}.jinja").read_text(encoding="utf-8") for role in (IMPROVER, REVISER)]
    plain = " ".join(re.sub(r"\{[{%].*?[}%]\}", " ", text) for text in texts)
    return sorted(set(plain.split()))
