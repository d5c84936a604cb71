"""Rows of data to prompts, and prompts to their roles in a run: references, preference prompts, held-out prompts.

Called once by the assembly. Reads the built-in sets, JSONL and Parquet files and directories of the ``datasets`` library, with the column
names that TRL uses. A row that is missing something is refused with its file and line; nothing is mended silently.
The roles are disjoint by content, and a preference prompt never carries a reference. Leaves out: tokens, but for the length check.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from sgpo_dist.config import DataConfig
from sgpo_dist.errors import DataError
from sgpo_dist.prompts import PromptBook
from sgpo_dist.records import Message, Prompt
from sgpo_dist.sanitize import one_line
from sgpo_dist.starter import chat, orders

BUILT_IN: Final = ("orders", "chat")
ROLES: Final = ("system", "user", "assistant")
MAX_ROW_BYTES: Final = 1_000_000
BARE_PROMPTS: Final = 256
"""Preference prompts of the built-in set ``orders`` when ``data.max_prompts`` does not say."""
_HELD_OUT_SPLITS: Final = ("test", "validation")


@dataclass(frozen=True, slots=True)
class Corpus:
    """All prompts of a run by role.

    ``references`` teach sft and improver, ``prompts`` (without references) give preference pairs, ``heldout`` is only evaluated on.
    ``dropped`` counts preference prompts left out because an earlier role or the held-out set has the same text. ``origins``
    tells file and line of each prompt id, for messages.
    """

    references: tuple[Prompt, ...]
    prompts: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    dropped: int = 0
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def given(self) -> tuple[Prompt, ...]:
        """Rows of the references that bring a pair of their own: chosen and rejected."""
        return tuple(prompt for prompt in self.references if prompt.rejected is not None and prompt.reference is not None)


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of the user's own names, looked up before the usual ones."""

    prompt: str | None = None
    reference: str | None = None


ANY_COLUMNS: Final = Columns()


@dataclass(frozen=True, slots=True)
class _Row:
    prompt: Prompt
    where: str


def load_corpus(data: DataConfig, seed: int) -> Corpus:
    """Read everything the section names and give each row its role. Same data and seed, same corpus. Raises DataError.

    A source whose rows all have references gives its first half (or ``max_references`` of them) to ``references`` and the rest to
    ``prompts``; bare rows are always ``prompts``. ``prompts_path`` replaces this: then every row with a reference keeps it.
    """
    columns = Columns(data.input_key, data.reference_key)
    sources = [_read(spec, "train", columns, data, seed) for spec in _specs(data.path)]
    shares = [_share(rows, data.max_references, data.prompts_path is None) for rows in sources]
    references = _interleave([taught for taught, _ in shares], seed)
    if data.prompts_path is None:
        asked = [asked for _, asked in shares]
    else:
        asked = [_bare_only(spec, columns, data, seed) for spec in _specs(data.prompts_path)]
    heldout = _held_out(data, columns, seed)
    _refuse_shared(references, heldout)
    prompts, dropped = _unseen(_interleave(asked, seed), [*references, *heldout])
    prompts = prompts[: data.max_prompts]
    origins = _origins([*references, *prompts, *heldout])
    return Corpus(_prompts(references), _prompts(prompts), _prompts(heldout), dropped, origins)


def load_rows(spec: str, split: str = "train", columns: Columns = ANY_COLUMNS) -> tuple[Prompt, ...]:
    """The rows of one built-in name, JSONL or Parquet file, or directory, in order. Raises DataError naming file and line.

    ``split`` is "train" or "heldout"; files have only one.
    """
    return _prompts(_parse_all(_raw_rows(spec, split), _source(spec), columns))


def check_lengths(corpus: Corpus, book: PromptBook, max_prompt_tokens: int) -> None:
    """Raises DataError for the first prompt longer than ``max_prompt_tokens`` as the policy reads it."""
    for prompt in (*corpus.references, *corpus.prompts, *corpus.heldout):
        length = len(book.policy_ids(prompt))
        if length > max_prompt_tokens:
            where = corpus.origins.get(prompt.prompt_id, "data")
            raise DataError(
                f"{where}: prompt '{prompt.prompt_id}' has {length} tokens, data.max_prompt_tokens allows {max_prompt_tokens}; "
                "shorten it or raise data.max_prompt_tokens (and rollout.max_model_len)"
            )


# ---- roles -----------------------------------------------------------------------------------------------------------------------


def _read(spec: str, split: str, columns: Columns, data: DataConfig, seed: int) -> list[_Row]:
    raw = _raw_rows(spec, split)
    if spec == "orders" and split == "train" and data.prompts_path is None:
        raw = [*raw, *_bare_orders(data, seed)]
    rows = _parse_all(raw, _source(spec), columns)
    if not rows:
        raise DataError(f"{spec} holds no rows")
    return rows


def _bare_only(spec: str, columns: Columns, data: DataConfig, seed: int) -> list[_Row]:
    raw = _bare_orders(data, seed) if spec == "orders" else _raw_rows(spec, "train")
    rows = [_without_reference(row) for row in _parse_all(raw, _source(spec), columns)]
    if not rows:
        raise DataError(f"{spec} holds no rows")
    return rows


def _bare_orders(data: DataConfig, seed: int) -> list[tuple[str, Any]]:
    rows = orders.bare_prompts(data.max_prompts or BARE_PROMPTS, seed)
    return [(f"orders bare prompt {number}", row) for number, row in enumerate(rows, start=1)]


def _share(rows: Sequence[_Row], max_references: int | None, keep_prompts: bool) -> tuple[list[_Row], list[_Row]]:
    """(rows that teach, rows that only ask)."""
    known = [row for row in rows if row.prompt.reference is not None]
    bare = [row for row in rows if row.prompt.reference is None]
    count = len(known) if bare or not keep_prompts else (len(known) + 1) // 2
    if max_references is not None:
        count = min(max_references, len(known))
    return known[:count], [*bare, *(_without_reference(row) for row in known[count:])]


def _held_out(data: DataConfig, columns: Columns, seed: int) -> list[_Row]:
    """``heldout_path``, or the held-out split of each built-in set in ``path``."""
    built_in = [spec for spec in _specs(data.path) if spec in BUILT_IN]
    specs = built_in if data.heldout_path is None else _specs(data.heldout_path)
    return [row for spec in specs for row in _read(spec, "heldout", columns, data, seed)[: data.max_heldout]]


def _refuse_shared(references: Sequence[_Row], heldout: Sequence[_Row]) -> None:
    taught = {content(row.prompt): row.where for row in references}
    for row in heldout:
        if content(row.prompt) in taught:
            raise DataError(f"{row.where} is held out but {taught[content(row.prompt)]} trains on the same prompt; remove one of them")


def _unseen(asked: Sequence[_Row], seen: Iterable[_Row]) -> tuple[list[_Row], int]:
    known = {content(row.prompt) for row in seen}
    kept = [row for row in asked if content(row.prompt) not in known]
    return kept, len(asked) - len(kept)


def _interleave(groups: Sequence[Sequence[_Row]], seed: int) -> list[_Row]:
    """Each group shuffled by the seed, then all merged evenly: any stretch holds the groups in their proportions."""
    placed = []
    for number, group in enumerate(groups):
        rows = list(group)
        random.Random(f"{seed}/{number}").shuffle(rows)
        placed += [((place + 0.5) / len(rows), number, row) for place, row in enumerate(rows)]
    return [row for _, _, row in sorted(placed, key=lambda entry: entry[:2])]


def _origins(rows: Iterable[_Row]) -> dict[str, str]:
    origins: dict[str, str] = {}
    for row in rows:
        name = row.prompt.prompt_id
        if name in origins:
            raise DataError(f"{row.where}: id '{name}' is also that of {origins[name]}; ids must be unique over all files")
        origins[name] = row.where
    return origins


def content(prompt: Prompt) -> tuple[str, ...]:
    """What counts as the same prompt: the turns but for white space and the system line."""
    return tuple(" ".join(message.content.split()) for message in prompt.messages if message.role != "system")


def _without_reference(row: _Row) -> _Row:
    return replace(row, prompt=replace(row.prompt, reference=None, rejected=None))


def _prompts(rows: Iterable[_Row]) -> tuple[Prompt, ...]:
    return tuple(row.prompt for row in rows)


def _specs(path: str | list[str]) -> list[str]:
    specs = [part.strip() for part in path.split(",")] if isinstance(path, str) else path
    return [spec for spec in specs if spec]


def _source(spec: str) -> str:
    return spec if spec in BUILT_IN else Path(spec).stem


# ---- reading ---------------------------------------------------------------------------------------------------------------------


def _raw_rows(spec: str, split: str) -> list[tuple[str, Any]]:
    """(where, row) of each row, unchecked but for the file's own format."""
    if spec in BUILT_IN:
        rows = (orders if spec == "orders" else chat).rows(split)
        return [(f"{spec} {split} row {number}", row) for number, row in enumerate(rows, start=1)]
    path = Path(spec).expanduser()
    try:
        path.stat()
    except (OSError, ValueError) as problem:
        why = getattr(problem, "strerror", None) or "no path can be so"
        raise DataError(
            f"data path '{one_line(spec, 120)}' is neither a built-in set ({', '.join(BUILT_IN)}) nor a file or directory here ({why})"
        ) from None
    if path.is_dir():
        return list(_dataset_rows(path, split))
    if not path.is_file():
        raise DataError(f"data path '{spec}' is neither a built-in set ({', '.join(BUILT_IN)}) nor a file or directory here")
    if path.suffix == ".parquet":
        return list(parquet_rows(path))
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        return list(json_rows(path))
    raise DataError(f"data path '{spec}' has an unknown format; use .jsonl, .parquet or a directory of the datasets library")


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file and line, row) of a JSONL file. Raises DataError for a line that is no JSON or oversized."""
    try:
        yield from _json_lines(path)
    except OSError as problem:
        raise DataError(f"{path} cannot be read: {problem.strerror}") from None


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        number = 0
        while line := lines.readline(MAX_ROW_BYTES + 1):
            number += 1
            where = f"{path} line {number}"
            if len(line) > MAX_ROW_BYTES:
                raise DataError(f"{where}: the row is longer than {MAX_ROW_BYTES} bytes")
            if line.strip():
                yield where, _json(line, where)


def _json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text") from None
    except (ValueError, RecursionError) as problem:
        what = "nested too deep" if isinstance(problem, RecursionError) else "a number too long"
        if isinstance(problem, json.JSONDecodeError):
            what = f"{problem.msg.removesuffix(' at')} at column {problem.colno}"
        raise DataError(f"{where}: invalid JSON ({what}); each line must hold one JSON object") from None


def parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file and row number, row) of a Parquet file. Raises DataError when it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as problem:
        line = next(iter(str(problem).splitlines()), type(problem).__name__)
        raise DataError(f"{path} after row {number}: not readable as Parquet: {line}") from None


def _dataset_rows(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    """A directory that ``datasets`` saved, or one of data files that it can load."""
    import datasets

    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # they would write over the run's own display
    try:
        loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as problem:
        line = next(iter(str(problem).splitlines()), type(problem).__name__)
        raise DataError(f"{path}: not readable by the datasets library: {line}") from None
    finally:
        if not bars:
            datasets.enable_progress_bars()
    if isinstance(loaded, dict):
        loaded = _choose_split(loaded, path, split)
    for number, row in enumerate(loaded, start=1):
        yield f"{path} row {number}", row


def _choose_split(splits: Mapping[str, Any], path: Path, split: str) -> Any:
    wanted = ("train",) if split == "train" else _HELD_OUT_SPLITS
    for name in (*wanted, *(splits if len(splits) == 1 else ())):
        if name in splits:
            return splits[name]
    known = ", ".join(splits)
    raise DataError(f"{path} has the splits {known}, but '{' or '.join(wanted)}' is needed; save that split alone and name its directory")


# ---- one row ---------------------------------------------------------------------------------------------------------------------


def _parse_all(raw: Iterable[tuple[str, Any]], source: str, columns: Columns) -> list[_Row]:
    rows = []
    seen: dict[str, str] = {}
    for where, row in raw:
        prompt = _parse(row, where, source, columns)
        if prompt.prompt_id in seen:
            raise DataError(f"{where}: id '{prompt.prompt_id}' is already that of {seen[prompt.prompt_id]}")
        seen[prompt.prompt_id] = where
        rows.append(_Row(prompt, where))
    return rows


def _parse(row: Any, where: str, source: str, columns: Columns) -> Prompt:
    if not isinstance(row, dict):
        raise DataError(f"{where}: the row must be a JSON object with columns, not {type(row).__name__}")
    messages, inner = _conversation(row, where, columns)
    reference = _reference(row, where, columns)
    reference = inner if reference is None else reference
    if not messages or messages[-1].role != "user" or not messages[-1].content.strip():
        raise DataError(f"{where}: the prompt must end with a user turn that is not empty")
    named = _optional_text(row, "source", where) or source
    return Prompt(_prompt_id(row, where, source, messages, reference), messages, reference, named, _rejected(row, where))


def _conversation(row: Mapping[str, Any], where: str, columns: Columns) -> tuple[tuple[Message, ...], str | None]:
    """The turns up to the last user turn, and the assistant's answer that follows it, if the column has one."""
    if columns.prompt is not None and columns.prompt not in row:
        raise DataError(f"{where}: has no column '{columns.prompt}' (data.input_key); it has {_names(row)}")
    answered = any(row.get(key) is not None for key in _reference_keys(columns))
    usual = ("prompt", "messages", "chosen") if answered else ("messages", "prompt")  # messages hold the answer when no other column does
    keys = (columns.prompt,) if columns.prompt is not None else usual
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None and any(name in row for name in keys):
        raise DataError(f"{where}: the prompt is null; give it a text, or remove the row")
    if key is None or (key == "chosen" and isinstance(row[key], str)):
        raise DataError(f"{where}: has no column 'prompt' or 'messages'; it has {_names(row)} (data.input_key names another column)")
    if isinstance(row[key], str):
        return (Message("user", checked_text(row[key], f"{where}: '{key}'")),), None
    turns = _turns(row[key], key, where)
    if turns and turns[-1].role == "assistant":
        return turns[:-1], _answer(turns[-1].content, f"{where}: '{key}'")
    return turns, None


def _reference(row: Mapping[str, Any], where: str, columns: Columns) -> str | None:
    if columns.reference is not None and columns.reference not in row:
        raise DataError(f"{where}: has no column '{columns.reference}' (data.reference_key); it has {_names(row)}")
    key = next((key for key in _reference_keys(columns) if row.get(key) is not None), None)
    if key is None:
        return None
    if isinstance(row[key], str):
        return _answer(row[key], f"{where}: '{key}'")
    turns = _turns(row[key], key, where)
    if not turns or turns[-1].role != "assistant":
        raise DataError(f"{where}: '{key}' must end with an assistant turn")
    return _answer(turns[-1].content, f"{where}: '{key}'")


def _rejected(row: Mapping[str, Any], where: str) -> str | None:
    """The given weaker answer of a row of preference data."""
    return _reference(row, where, Columns(reference="rejected")) if row.get("rejected") is not None else None


def _reference_keys(columns: Columns) -> tuple[str, ...]:
    return (columns.reference,) if columns.reference is not None else ("reference", "chosen", "completion")


def _turns(value: Any, key: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise DataError(f"{where}: '{key}' must be a string or a list of messages, not {type(value).__name__}")
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise DataError(f"{where}: '{key}' message {number} must have a role ({', '.join(ROLES)}) and a content string")
        turns.append(Message(turn["role"], checked_text(turn["content"], f"{where}: '{key}' message {number}")))
    return tuple(turns)


def checked_text(value: str, where: str) -> str:
    """The text as it is, if it can be encoded and is not oversized."""
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise DataError(f"{where} holds half of a surrogate pair, which is not text") from None
    if size > MAX_ROW_BYTES:
        raise DataError(f"{where} is longer than {MAX_ROW_BYTES} bytes")
    return value


def _answer(value: str, where: str) -> str:
    text = checked_text(value, where).strip()
    if not text:
        raise DataError(f"{where} is an empty reference; write null or leave the column out for a bare prompt")
    return text


def _optional_text(row: Mapping[str, Any], key: str, where: str) -> str | None:
    value = row.get(key)
    if value is None or (isinstance(value, str) and value.strip()):
        return None if value is None else checked_text(value.strip(), f"{where}: '{key}'")
    raise DataError(f"{where}: '{key}' must be a string that is not empty, not {value!r:.40}")


def _prompt_id(row: Mapping[str, Any], where: str, source: str, messages: Sequence[Message], reference: str | None) -> str:
    """The row's ``id`` (or ``uid``); else a name made of source, row number and content, so that a message can be traced to its line."""
    given = row.get("id", row.get("uid"))
    if isinstance(given, int) and not isinstance(given, bool):
        return str(given)
    if given is not None:
        return _optional_text(row, "id" if "id" in row else "uid", where) or ""
    named = json.dumps([source, [[message.role, message.content] for message in messages], reference], ensure_ascii=False)
    digest = hashlib.blake2b(named.encode(), digest_size=6).hexdigest()
    return f"{source}-{where.rsplit(' ', 1)[-1]}-{digest}"


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(str(name)[:60]) for name in list(row)[:8]) or "no columns"
