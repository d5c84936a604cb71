"""The task ``chat``: open-ended prompts, the starter set's or rows of a file, and how near an answer comes to its reference.

Called by ``tasks`` and, through the product's hooks, by the arms. The test split of the starter set is its own held-out file; everything else is cut
from the train rows: validation first, then references, the rest is asked bare. A file's rows are shuffled by a fixed seed and cut the same way, test
first. Nothing is drawn by the seed of an arm, so that all seeds teach from the same references. Leaves out: training and tables.

Sizes are chosen for a machine of two cores and 135M parameters: docs/evaluation.md has the sum.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from sgpo_dist.data.loading import json_rows
from sgpo_dist.errors import DataError
from sgpo_dist.evaluate.embedding import Embedder
from sgpo_dist.evaluate.text_metrics import rouge_l
from sgpo_dist.starter import chat
from sgpo_dist.textual import sentences

NUM_VALIDATION: Final = 30
NUM_REFERENCES: Final = 80
"""Of the starter set; 81 held-out rows are the test, what is left of 190 is asked bare."""
FILE_VALIDATION, FILE_TEST, FILE_REFERENCES, FILE_PROMPTS = 30, 80, 64, 64
MAX_PROMPT_CHARACTERS: Final = 240
MAX_ANSWER_CHARACTERS: Final = 240
"""A file's rows with longer prompts are left out; its answers are cut at a sentence's end within this."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RowsFile:
    """JSON lines with ``prompt``, an answer under ``reference_key``, and where there is one a weaker answer under ``rejected_key``."""

    path: Path
    reference_key: str = "reference"
    rejected_key: str = "rejected"


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows by role, disjoint. ``references`` may bring a weaker answer under "rejected"; ``prompts`` keep theirs for looking back only."""

    references: Sequence[Row]
    prompts: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]

    def heldout(self, split: str) -> Sequence[Row]:
        """Rows of "validation" or "test"."""
        return self.validation if split == "validation" else self.test


def starter_splits() -> Splits:
    """The starter set. Its held-out rows are the test; no row of them is in another role."""
    rows = random.Random("chat").sample(chat.rows("train"), len(chat.rows("train")))
    validation, references, prompts = cut(rows, NUM_VALIDATION, NUM_REFERENCES, len(rows))
    return Splits(references, prompts, validation, chat.rows("heldout"))


def file_splits(file: RowsFile) -> Splits:
    """The usable rows of a file (``usable``). Raises DataError when they are too few or a column is missing."""
    rows = usable(file)
    needed = FILE_TEST + FILE_VALIDATION + FILE_REFERENCES + FILE_PROMPTS
    if len(rows) < needed:
        raise DataError(
            f"{file.path} has {len(rows)} rows with a prompt of at most {MAX_PROMPT_CHARACTERS} characters and a whole sentence within "
            f"{MAX_ANSWER_CHARACTERS} characters of answer; the chat task needs {needed}"
        )
    rows = random.Random("chat").sample(rows, len(rows))
    test, validation, references, prompts = cut(rows, FILE_TEST, FILE_VALIDATION, FILE_REFERENCES, FILE_PROMPTS)
    return Splits(references, prompts, validation, test)


def cut(rows: Sequence[Row], *counts: int) -> list[Sequence[Row]]:
    """Consecutive parts of so many rows each; the last ones may be shorter."""
    starts = [sum(counts[:place]) for place in range(len(counts))]
    return [rows[start : start + count] for start, count in zip(starts, counts, strict=True)]


def usable(file: RowsFile) -> list[Row]:
    """Rows with a short prompt that no earlier row has, and answers that still say something when cut."""
    found: dict[str, Row] = {}
    for number, (where, raw) in enumerate(json_rows(file.path), start=1):
        for key in ("prompt", file.reference_key):
            if not isinstance(raw, dict) or not isinstance(raw.get(key), str):
                raise DataError(f"{where}: has no text in column '{key}'; name the columns with --reference-key and --rejected-key")
        row = _row(raw, f"{file.path.stem}-{number:05d}", file)
        if row is not None:
            found.setdefault(" ".join(row["prompt"].split()), row)
    return list(found.values())


def shortened(text: str, limit: int = MAX_ANSWER_CHARACTERS) -> str:
    """Whole sentences of ``text`` from its start, at most ``limit`` characters; empty when the first one is longer."""
    kept = ""
    for piece in sentences(text.strip()):
        if len(kept + piece) > limit:
            break
        kept += piece
    return kept


def similarity(text: str, reference: str | None, prompt: str) -> float:
    """Cosine of the embeddings of answer and reference, in [-1, 1]; 0 for an empty answer."""
    del prompt
    if not text.strip():
        return 0.0
    return _embedder().similarities([text.strip()], [(reference or "").strip()])[0]


def common_words(text: str, reference: str | None, prompt: str) -> float:
    """ROUGE-L with the reference."""
    del prompt
    return rouge_l(text, reference or "")


def _row(raw: Mapping[str, Any], row_id: str, file: RowsFile) -> Row | None:
    reference = shortened(raw[file.reference_key])
    if len(raw["prompt"]) > MAX_PROMPT_CHARACTERS or not raw["prompt"].strip() or not reference:
        return None
    row = {"id": row_id, "prompt": raw["prompt"], "reference": reference, "source": "chat"}
    weaker = shortened(raw[file.rejected_key]) if isinstance(raw.get(file.rejected_key), str) else ""
    return row | {"rejected": weaker} if weaker and weaker != reference else row


@cache
def _embedder() -> Embedder:
    """Loaded once a process: a model of 22 million parameters."""
    return Embedder()
