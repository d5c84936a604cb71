"""Answers of a model as files: our own JSONL, AlpacaEval's model outputs, Arena-Hard's answers; and answers read back to compare with.

Called by ``eval``. The foreign formats are those that alpaca_eval 0.6 and arena-hard-auto (its first version and its second) read. Leaves out:
generating, and judging.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sgpo_dist.errors import DataError
from sgpo_dist.records import Completion, FinishReason, Prompt

_CODE: Final = re.compile(r"```[^`]*```")
_HEADING: Final = re.compile(r"^(#{1,6})\s", re.MULTILINE)
_LISTS: Final = {"ordered": re.compile(r"^\s*\d+\.\s", re.MULTILINE), "unordered": re.compile(r"^\s*[-*+]\s", re.MULTILINE)}
_BOLD: Final = {"**": re.compile(r"\*\*[^*\n]+\*\*"), "__": re.compile(r"__[^_\n]+__")}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model made of one prompt: its response, and its own rewrite of that."""

    prompt: Prompt
    response: Completion
    rewrite: str

    @property
    def text(self) -> str:
        """The response without white space around it."""
        return self.response.text.strip()


def instruction(prompt: Prompt) -> str:
    """The conversation as the one text that single-turn formats hold: the turn itself, or all turns with their roles."""
    if len(prompt.messages) == 1:
        return prompt.text
    return "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in prompt.messages)


def answer_rows(model: str, answers: Iterable[Answer]) -> list[dict[str, Any]]:
    """Our own rows: everything that is known of an answer. ``ended`` = it ended by itself; ``tokens`` count the end token."""
    return [
        {
            "id": answer.prompt.prompt_id,
            "source": answer.prompt.source,
            "model": model,
            "messages": [{"role": message.role, "content": message.content} for message in answer.prompt.messages],
            "reference": answer.prompt.reference,
            "answer": answer.text,
            "rewrite": answer.rewrite,
            "tokens": len(answer.response.token_ids),
            "ended": answer.response.finish_reason is FinishReason.STOP,
        }
        for answer in answers
    ]


def alpaca_rows(model: str, pairs: Iterable[tuple[Prompt, str]]) -> list[dict[str, str]]:
    """AlpacaEval's model outputs: a list of instruction, output, generator (the model's name) and dataset (the prompt's source)."""
    return [{"instruction": instruction(prompt), "output": text, "generator": model, "dataset": prompt.source} for prompt, text in pairs]


def arena_rows(model: str, answers: Iterable[Answer], wall: float) -> list[dict[str, Any]]:
    """Arena-Hard's answers: every row holds the fields of the second version (uid, model, messages, metadata) and of the first
    (question_id, model_id, choices, conv_metadata). ``wall`` is the time in Unix seconds.

    ``metadata.token_len`` counts the model's own tokens; Arena-Hard's style control counts those of one fixed tokenizer.
    """
    return [_arena_row(model, answer, wall) for answer in answers]


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_list(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON list."""
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_answers(path: Path, prompts: Sequence[Prompt]) -> list[str]:
    """The answers of a file to ``prompts``, in their order: our own JSONL, or AlpacaEval's list. Looked up by id, else by the prompt's text.

    Raises DataError when the file is neither or lacks a prompt.
    """
    found: dict[str, str] = {}
    for place, row in enumerate(_rows(path), start=1):
        text = row.get("answer", row.get("output")) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise DataError(f"{path} row {place} has neither 'answer' nor 'output'; write the file with `eval --answers-out` or as AlpacaEval does")
        found |= {key: text.strip() for key in _keys(row)}
    texts = [found.get(f"id {prompt.prompt_id}", found.get(f"text {instruction(prompt)}")) for prompt in prompts]
    missing = [prompt.prompt_id for prompt, text in zip(prompts, texts, strict=True) if text is None]
    if missing:
        raise DataError(f"{path} has no answer to {len(missing)} of {len(prompts)} prompts, '{missing[0]}' among them; answer the same --data")
    return [text for text in texts if text is not None]


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    """Headings by level, list items and bold runs outside of code, as Arena-Hard's style control wants them."""
    prose = _CODE.sub("", text)
    levels = Counter(len(found) for found in _HEADING.findall(prose))
    return {
        "header_count": {f"h{level}": levels[level] for level in range(1, 7)},
        "list_count": {name: len(pattern.findall(prose)) for name, pattern in _LISTS.items()},
        "bold_count": {name: len(pattern.findall(prose)) for name, pattern in _BOLD.items()},
    }


def _arena_row(model: str, answer: Answer, wall: float) -> dict[str, Any]:
    uid, name = answer.prompt.prompt_id, hashlib.blake2b(f"{model}\x1f{answer.prompt.prompt_id}".encode(), digest_size=11).hexdigest()
    tokens = len(answer.response.token_ids)
    metadata = {"token_len": tokens, **markdown_counts(answer.text)}
    asked = [{"role": message.role, "content": message.content} for message in answer.prompt.messages]
    return {
        "uid": uid,
        "ans_id": name,
        "model": model,
        "messages": [*asked, {"role": "assistant", "content": {"answer": answer.text}}],
        "metadata": metadata,
        "question_id": uid,
        "answer_id": name,
        "model_id": model,
        "choices": [{"index": 0, "turns": [{"content": answer.text, "token_len": tokens}]}],
        "conv_metadata": metadata,
        "tstamp": wall,
    }


def _rows(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except OSError as problem:
        raise DataError(f"{path} cannot be read: {problem.strerror}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is neither JSON lines nor one JSON list") from None


def _keys(row: Mapping[str, Any]) -> list[str]:
    keys = [f"id {row['id']}"] if "id" in row else []
    return [*keys, f"text {row['instruction']}"] if isinstance(row.get("instruction"), str) else keys
