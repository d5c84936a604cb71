"""Ready-made revisions: rows of a JSONL or Parquet file that say what a prompt's draft becomes.

Called by the reviser ``file``. A row names its prompt by ``id`` or by ``prompt`` (a text, or a list of messages) and brings a ``revision``.
Leaves out: the draft, which it replaces whatever it was, and whether the result may teach.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgpo_dist.data.loading import checked_text, content, json_rows, parquet_rows
from sgpo_dist.errors import ConfigError, DataError
from sgpo_dist.records import Message, Prompt

Name = str | tuple[str, ...]
"""What finds a row: the prompt's id, or the content of its turns."""


@dataclass(frozen=True, slots=True)
class Revisions:
    """Revisions by the names of their prompts."""

    rows: Mapping[Name, str]

    def of(self, prompt: Prompt) -> str | None:
        """The revision of the prompt's id, else of its text; None without one."""
        return self.rows.get(prompt.prompt_id) or self.rows.get(content(prompt))


def load_revisions(path: str) -> Revisions:
    """Read the file. Raises ConfigError when there is none of a known format, DataError naming file and line for a row that is wrong."""
    rows: dict[Name, str] = {}
    origins: dict[Name, str] = {}
    for where, row in _raw_rows(path):
        revision = _revision(row, where)
        for name in _names(row, where):
            if name in rows:
                raise DataError(f"{where}: the same prompt has a revision at {origins[name]}; keep one of them")
            rows[name], origins[name] = revision, where
    if not rows:
        raise DataError(f"{path} holds no revisions")
    return Revisions(rows)


def _raw_rows(path: str) -> Iterator[tuple[str, Any]]:
    file = Path(path).expanduser()
    if not file.is_file() or file.suffix not in (".jsonl", ".ndjson", ".parquet"):
        raise ConfigError(f"improver.revisions_path '{path}' must name a .jsonl or .parquet file that this machine can read")
    return parquet_rows(file) if file.suffix == ".parquet" else json_rows(file)


def _revision(row: Any, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{where}: the row must be a JSON object with columns, not {type(row).__name__}")
    text = row.get("revision")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: column 'revision' must hold a text that is not empty")
    return checked_text(text, f"{where}: 'revision'").strip()


def _names(row: Mapping[str, Any], where: str) -> list[Name]:
    """The names that a row gives its prompt, at least one."""
    names: list[Name] = []
    given, prompt = row.get("id"), row.get("prompt")
    if isinstance(given, str | int) and not isinstance(given, bool) and str(given).strip():
        names.append(str(given).strip())
    if prompt is not None:
        names.append(content(Prompt("", _turns(prompt, where))))
    if not names:
        raise DataError(f"{where}: needs a column 'id' or 'prompt' that says whose revision it is")
    return names


def _turns(prompt: Any, where: str) -> tuple[Message, ...]:
    if isinstance(prompt, str) and prompt.strip():
        return (Message("user", prompt),)
    try:
        turns = tuple(Message(turn["role"], str(turn["content"])) for turn in prompt)
    except (TypeError, LookupError):
        turns = ()
    if not turns:
        raise DataError(f"{where}: 'prompt' must be a text, or a list of messages with role and content")
    return turns
