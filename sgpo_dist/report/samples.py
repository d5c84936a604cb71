"""Stored pairs and refusals, read from a run's database for people: by the ``samples`` command and the report.

Reads only, beside a running driver too. Left out: proving the ledger (``buffer.audit``) and showing.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from sgpo_dist.buffer.codec import unpack_prompt, unpack_text
from sgpo_dist.buffer.schema import mapped_errors
from sgpo_dist.errors import ConfigError
from sgpo_dist.textual import edit_ratio, length_ratio, words

ORDERS: Final = ("prompt-order", "newest", "most-changed", "least-changed", "longest-growth", "most-shrunk", "stalest")

_COLUMNS: Final = (
    "o.uid, o.stage, o.state, o.step, o.prompt_id, p.messages, p.reference, p.source, "
    "x.response_text, x.response_version, x.refinement_text, x.refinement_version"
)
_PAIRS: Final = f"SELECT {_COLUMNS}, '', '' FROM orders o JOIN prompts p USING (stage, prompt_id) JOIN pairs x USING (uid)"  # noqa: S608 constants only
_REFUSALS: Final = (
    f"SELECT {_COLUMNS}, x.reason, x.detail FROM orders o JOIN prompts p USING (stage, prompt_id) JOIN refusals x USING (uid)"  # noqa: S608
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One outcome as text; ``reason`` is empty for a pair. ``state`` is the ledger's, ``step`` where it was assigned."""

    uid: str
    stage: str
    state: str
    step: int | None
    prompt: str
    reference: str | None
    source: str
    response: str | None
    refinement: str | None
    version: int | None
    reason: str = ""
    detail: str = ""

    @property
    def changed(self) -> float:
        """Share of words that differ between response and refinement, in [0, 1]."""
        return edit_ratio(self.response or "", self.refinement or "")

    @property
    def growth(self) -> float:
        """Words of the refinement as a multiple of the response's."""
        return length_ratio(len(words(self.refinement or "")), len(words(self.response or "")))


def read_samples(database: Path, stage: str | None = None, *, refused: bool = False) -> list[Sample]:
    """All pairs (or refusals) of a stage in prompt order; of all stages when None. Raises ConfigError when there is no database."""
    where, values = (" WHERE o.stage = ?", (stage,)) if stage else ("", ())
    query = (_REFUSALS if refused else _PAIRS) + where + " ORDER BY o.rowid"
    with reading(database) as db:
        return [_sample(row) for row in db.execute(query, values)]


def refusal_counts(database: Path) -> dict[str, dict[str, int]]:
    """Refusals by stage and reason, most frequent first."""
    query = "SELECT o.stage, r.reason, count(*) FROM refusals r JOIN orders o USING (uid) GROUP BY 1, 2 ORDER BY 1, 3 DESC"
    return _nested(database, query)


def state_counts(database: Path) -> dict[str, dict[str, int]]:
    """Orders by stage and state."""
    return _nested(database, "SELECT stage, state, count(*) FROM orders GROUP BY 1, 2 ORDER BY min(rowid)")


def ordered(samples: Sequence[Sample], order: str) -> list[Sample]:
    """``samples`` in one of ORDERS."""
    keys: dict[str, Any] = {
        "most-changed": lambda sample: -sample.changed,
        "least-changed": lambda sample: sample.changed,
        "longest-growth": lambda sample: -sample.growth,
        "most-shrunk": lambda sample: sample.growth,
        "stalest": lambda sample: sample.version if sample.version is not None else 0,
    }
    if order in keys:
        return sorted(samples, key=keys[order])
    return list(reversed(samples)) if order == "newest" else list(samples)


@contextmanager
def reading(database: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection. Raises ConfigError when the file is not there."""
    if not database.is_file():
        raise ConfigError(f"{database} does not exist: the run has not made any pairs yet")
    with mapped_errors(str(database)), closing(sqlite3.connect(f"file:{quote(str(database.resolve()))}?mode=ro", uri=True)) as db:
        yield db


def _nested(database: Path, query: str) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    with reading(database) as db:
        for stage, name, count in db.execute(query):
            found.setdefault(stage, {})[name] = count
    return found


def _sample(row: tuple[Any, ...]) -> Sample:
    (
        uid,
        stage,
        state,
        step,
        prompt_id,
        messages,
        reference,
        source,
        response,
        response_version,
        refinement,
        refinement_version,
        reason,
        detail,
    ) = row
    prompt = unpack_prompt(prompt_id, messages, reference, source)
    versions = [version for version in (response_version, refinement_version) if version is not None]
    texts = [None if text is None else unpack_text(text) for text in (response, refinement)]
    return Sample(
        uid,
        stage,
        state,
        step,
        prompt.text,
        prompt.reference,
        source,
        texts[0],
        texts[1],
        min(versions, default=None),
        reason,
        unpack_text(detail),
    )
