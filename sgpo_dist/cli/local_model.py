"""One model directory in plain transformers: it answers in both roles, greedily, and scores references. Used by ``eval``.

The prompts of both roles are the training's. Torch and transformers are imported when it runs. Leaves out: speed; a run evaluates its own
models on its engines.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sgpo_dist.cli.model_facts import refuse_pickled
from sgpo_dist.data.embedded_model import embedded_model_dir
from sgpo_dist.errors import ConfigError
from sgpo_dist.prompts import PromptBook, load_tokenizer
from sgpo_dist.records import Completion, FinishReason, Prompt

BATCH: Final = 8
IGNORED: Final = -100
"""Label of positions that the loss leaves out."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to answer; ``model`` is a transformers causal language model in evaluation mode."""

    model: Any
    book: PromptBook
    max_new_tokens: int


def load_model(name: str, template: str, max_new_tokens: int) -> LoadedModel:
    """Load a model directory in float32 (bfloat16 on a GPU). Raises ConfigError when there is none; nothing is downloaded."""
    directory = embedded_model_dir() if name == "embedded" else Path(name)
    if not (directory / "config.json").is_file():
        raise ConfigError(f"--model {name} is not a Hugging Face model directory (it has no config.json)")
    refuse_pickled(directory, f"--model {name}")
    book = PromptBook(load_tokenizer(directory), template)
    import torch
    from transformers import AutoModelForCausalLM

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    with _without_progress_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True, use_safetensors=True)
    return LoadedModel(model.to(device).eval(), book, max_new_tokens)


def both_roles(loaded: LoadedModel, prompts: Sequence[Prompt]) -> tuple[list[Completion], list[Completion]]:
    """Responses, and the improver's refinements of them, greedy."""
    book = loaded.book
    responses = answer(loaded, [book.policy_ids(prompt) for prompt in prompts])
    drafts = [book.improver_ids(prompt, response.text) for prompt, response in zip(prompts, responses, strict=True)]
    return responses, answer(loaded, drafts)


def answer(loaded: LoadedModel, prompts_ids: Sequence[tuple[int, ...]]) -> list[Completion]:
    """Greedy completions in the order of the prompts; prompts of like length share a batch."""
    order = sorted(range(len(prompts_ids)), key=lambda place: len(prompts_ids[place]))
    found: dict[int, Completion] = {}
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        found |= zip(places, _generate(loaded, [prompts_ids[place] for place in places]), strict=True)
    return [found[place] for place in range(len(prompts_ids))]


def _generate(loaded: LoadedModel, rows: Sequence[tuple[int, ...]]) -> list[Completion]:
    import torch

    width, eos = max(map(len, rows)), loaded.book.eos_id
    tokens_B_T = torch.tensor([[eos] * (width - len(row)) + list(row) for row in rows], device=loaded.model.device)
    mask_B_T = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=loaded.model.device)
    with torch.inference_mode():
        out_B_T = loaded.model.generate(
            input_ids=tokens_B_T,
            attention_mask=mask_B_T,
            max_new_tokens=loaded.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    return [completion(row[width:], loaded.book) for row in out_B_T.tolist()]


def completion(ids: Sequence[int], book: PromptBook) -> Completion:
    """Generated ids as a completion: up to and with the first end token, or cut by the cap."""
    ended = book.eos_id in ids
    kept = tuple(ids[: ids.index(book.eos_id) + 1] if ended else ids)
    return Completion(book.decode(kept), kept, FinishReason.STOP if ended else FinishReason.LENGTH, 0)


def reference_logps(loaded: LoadedModel, prompts: Sequence[Prompt]) -> list[float | None]:
    """Log-likelihood per token (nats) of each reference, None where there is none; one row at a time."""
    import torch

    found: list[float | None] = []
    for prompt in prompts:
        if prompt.reference is None:
            found.append(None)
            continue
        before, after = loaded.book.policy_ids(prompt), loaded.book.completion_ids(prompt.reference)
        tokens_1_T = torch.tensor([[*before, *after]], device=loaded.model.device)
        labels_1_T = torch.tensor([[IGNORED] * len(before) + list(after)], device=loaded.model.device)
        with torch.inference_mode():
            found.append(-float(loaded.model(input_ids=tokens_1_T, labels=labels_1_T).loss))
    return found


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers' bars stay off the screen while a model loads."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on and os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") != "1":
            logging.enable_progress_bar()
