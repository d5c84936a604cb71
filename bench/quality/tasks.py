"""The tasks of the quality benchmark: rows of each split, how an answer is scored, and the settings that fit the task.

Called by ``runner``. A task's rows are written once as JSONL and read by the product's own loader. The tuning split is ``validation``; ``test`` is
looked at once, for the table. References of bare prompts are known here (``truths``) but never shown to a run: they only tell, afterwards,
how many self-made pairs were truly better. Leaves out: arms and training.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.quality import chat, extraction, language
from sgpo_dist.data.loading import Corpus, load_rows
from sgpo_dist.records import Prompt

Rows = Sequence[Mapping[str, Any]]
Score = Callable[[str, str | None, str], float]


@dataclass(frozen=True, slots=True)
class Task:
    """``references(seed)`` teach, ``prompts(seed)`` are asked bare, ``heldout(split)`` is scored. ``settings`` are dotted overrides for every arm.

    ``family`` names the arms that fit. ``facts`` are what else decides an arm's figures: sizes, the digest of a file. ``measures`` are
    further scores of greedy answers by name. ``likelihood``: also the log-likelihood per token of the references.
    """

    name: str
    references: Callable[[int], Rows]
    prompts: Callable[[int], Rows]
    heldout: Callable[[str], Rows]
    score: Score
    initial_model: Callable[[Path], str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, Score] = field(default_factory=dict)
    likelihood: bool = False

    @property
    def has_given_pairs(self) -> bool:
        """Whether references bring a weaker answer, as DPO on given pairs needs."""
        return any("rejected" in row for row in self.references(0))

    def truths(self, seed: int) -> dict[str, str]:
        """The reference of each bare prompt by its id, for looking back at pairs."""
        return {str(row["id"]): str(row["reference"]) for row in self.prompts(seed)}

    def corpus(self, folder: Path, seed: int, split: str) -> Corpus:
        """The corpus of one arm. The files in ``folder`` are written anew: they are a function of task, seed and split."""
        folder.mkdir(parents=True, exist_ok=True)
        references = _rows(folder / f"references-{seed}.jsonl", self.references(seed))
        bare = [{key: value for key, value in row.items() if key not in ("reference", "rejected")} for row in self.prompts(seed)]
        prompts = _rows(folder / f"prompts-{seed}.jsonl", bare)
        return Corpus(references, prompts, _rows(folder / f"{split}.jsonl", self.heldout(split)))


def _rows(path: Path, rows: Rows) -> tuple[Prompt, ...]:
    draft = path.with_suffix(f".{os.getpid()}.tmp")  # the runner of the other core writes the same rows
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    draft.replace(path)
    return load_rows(str(path))


def _embedded(_: Path) -> str:
    return "embedded"


def _tiny(folder: Path) -> str:
    """The language's initial model, trained once a machine."""
    directory = folder / "initial"
    if not (directory / "model.safetensors").is_file():
        from bench.quality.tiny_model import make_model

        make_model(directory)
    return str(directory)


ORDERS_SETTINGS: Mapping[str, Any] = {
    "model.dtype": "bfloat16",
    "rollout.dtype": "bfloat16",
    "rollout.max_model_len": 384,
    "data.max_prompt_tokens": 224,
    "rollout.concurrency": 32,
    "rollout.kv_cache_gib": 0.5,
    "rollout.policy.max_new_tokens": 80,
    "rollout.improver.max_new_tokens": 80,
    "learner.max_tokens_per_micro_batch": 2048,
    "learner.zero_stage": 0,
}
CHAT_SETTINGS: Mapping[str, Any] = {
    **ORDERS_SETTINGS,
    "rollout.max_model_len": 512,
    "data.max_prompt_tokens": 256,
    "rollout.policy.max_new_tokens": 64,
    "rollout.improver.max_new_tokens": 64,
}
FILE_SETTINGS: Mapping[str, Any] = {**CHAT_SETTINGS, "rollout.policy.max_new_tokens": 80, "rollout.improver.max_new_tokens": 80}
LANGUAGE_SETTINGS: Mapping[str, Any] = {
    "model.dtype": "float32",
    "rollout.dtype": "float32",
    "rollout.max_model_len": 128,
    "data.max_prompt_tokens": 96,
    "rollout.concurrency": 64,
    "rollout.kv_cache_gib": 0.25,
    "rollout.policy.max_new_tokens": 12,
    "rollout.improver.max_new_tokens": 12,
    "learner.max_tokens_per_micro_batch": 8192,
    "learner.zero_stage": 0,
}


def _language(name: str, noise: float) -> Task:
    counts = {"validation": 200, "test": 400}
    return Task(
        name=name,
        references=lambda seed: language.pair_rows("train", 64, seed, noise),
        prompts=lambda seed: language.rows("bare", 6000, seed),
        heldout=lambda split: language.rows("validation" if split == "validation" else "heldout", counts[split], 7),
        score=language.score,
        initial_model=_tiny,
        settings=LANGUAGE_SETTINGS,
        family=name,
    )


def _chat(name: str, splits: chat.Splits, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> Task:
    sizes = [len(rows) for rows in (splits.references, splits.prompts, splits.validation, splits.test)]
    return Task(
        name=name,
        references=lambda seed: splits.references,
        prompts=lambda seed: splits.prompts,
        heldout=splits.heldout,
        score=chat.similarity,
        initial_model=_embedded,
        settings=settings,
        family="chat",
        facts={**facts, "sizes": sizes},
        measures={"rouge_l": chat.common_words},
        likelihood=True,
    )


def find_task(name: str, file: chat.RowsFile | None = None) -> Task:
    """The task of a name; for ``chat`` on the rows of ``file``, where there is one. Raises DataError for rows that do not fit."""
    if file is None:
        return TASKS[name]
    keys = (file.reference_key, file.rejected_key)
    digest = hashlib.blake2b(file.path.read_bytes() if file.path.is_file() else b"", digest_size=6).hexdigest()
    return _chat(f"{name}-{file.path.stem}", chat.file_splits(file), FILE_SETTINGS, {"file": digest, "keys": list(keys)})


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="orders",
            references=extraction.references,
            prompts=extraction.prompts,
            heldout=extraction.heldout,
            score=extraction.score,
            initial_model=_embedded,
            settings=ORDERS_SETTINGS,
            family="orders",
            facts={"sizes": [extraction.NUM_REFERENCES, extraction.NUM_PROMPTS, *extraction.NUM_HELD_OUT.values()]},
        ),
        _chat("chat", chat.starter_splits(), CHAT_SETTINGS, {}),
        _language("language", 0.0),
        _language("language-noisy", 0.2),
    )
}
