"""Records to columns and back, and the digest that makes a changed row visible.

Called by the ledger. Knows nothing of states or transactions. Token ids are little-endian 32-bit blobs; text longer than
``COMPRESS_ABOVE`` bytes, or text that UTF-8 cannot hold, is a zlib blob, other text stays text.

The digest of a row is blake2b-128 over its fields in column order, each as a tag byte (n, i, s, b), its length in eight little-endian
bytes, and its bytes: null, decimal integer, UTF-8 text, blob. Text and ids enter uncompressed. ``audit`` computes it again on its own.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from array import array
from collections.abc import Sequence
from typing import Any, Final

from sgpo_dist.errors import RunFailed
from sgpo_dist.records import Completion, FinishReason, Message, PreferencePair, Prompt, Refusal, RefusalReason, Stage

COMPRESS_ABOVE: Final = 4096
ZLIB_LEVEL: Final = 1
_JSON: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

Text = str | bytes
Field = str | bytes | int | None
Row = tuple[Any, ...]
_Half = tuple[str | None, bytes | None, str | None, int | None]


def pack_text(text: str) -> Text:
    """A column's value for ``text``: itself when it is short, else a zlib blob (level 1). Lone surrogates survive in the blob."""
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError:
        return zlib.compress(text.encode("utf-8", "surrogatepass"), ZLIB_LEVEL)
    return zlib.compress(raw, ZLIB_LEVEL) if len(raw) > COMPRESS_ABOVE else text


def unpack_text(stored: Text) -> str:
    """Inverse of ``pack_text``."""
    return stored if isinstance(stored, str) else zlib.decompress(stored).decode("utf-8", "surrogatepass")


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as little-endian 32-bit integers. Raises RunFailed for an id outside [0, 2**32)."""
    try:
        packed = array("I", ids)
    except (OverflowError, TypeError):
        raise RunFailed("token ids must be integers in [0, 2**32); the engine returned something else") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(blob: bytes) -> tuple[int, ...]:
    """Inverse of ``pack_ids``."""
    ids = array("I", blob)
    if sys.byteorder == "big":
        ids.byteswap()
    return tuple(ids)


def digest(*fields: Field) -> str:
    """Blake2b-128 (32 hex digits) over the fields, each tagged and length-prefixed so that no two field lists collide."""
    parts: list[bytes] = []
    for field in fields:
        tag, raw = _tagged(field)
        parts += (tag, len(raw).to_bytes(8, "little"), raw)
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _tagged(field: Field) -> tuple[bytes, bytes]:
    if field is None:
        return b"n", b""
    if isinstance(field, bytes):
        return b"b", field
    if isinstance(field, str):
        return b"s", field.encode("utf-8", "surrogatepass")
    return b"i", b"%d" % field


# ---- prompts ---------------------------------------------------------------------------------------------------------------------


def prompt_digest(prompt: Prompt) -> str:
    """Digest of everything a prompt is."""
    return digest(prompt.prompt_id, _messages_json(prompt), prompt.reference, prompt.source)


def pack_prompt(stage: Stage, prompt: Prompt) -> Row:
    """Columns of ``prompts``: stage, prompt_id, messages, reference, source, digest."""
    reference = None if prompt.reference is None else pack_text(prompt.reference)
    return (str(stage), prompt.prompt_id, pack_text(_messages_json(prompt)), reference, prompt.source, prompt_digest(prompt))


def unpack_prompt(prompt_id: str, messages: Text, reference: Text | None, source: str) -> Prompt:
    """A prompt from its columns."""
    turns = tuple(Message(role, content) for role, content in json.loads(unpack_text(messages)))
    return Prompt(prompt_id, turns, None if reference is None else unpack_text(reference), source)


def _messages_json(prompt: Prompt) -> str:
    return _JSON.encode([[message.role, message.content] for message in prompt.messages])


# ---- outcomes --------------------------------------------------------------------------------------------------------------------


def pack_pair(pair: PreferencePair, worker: str, incarnation: int) -> Row:
    """Columns of ``pairs``."""
    prompt_ids = pack_ids(pair.prompt_ids)
    response, refinement = _fields(pair.response), _fields(pair.refinement)
    content = (prompt_ids, *response, *refinement, pair.template, worker, incarnation)
    mark = digest(pair.uid, str(pair.stage), pair.prompt.prompt_id, *content)
    return (pair.uid, prompt_ids, *_columns(response), *_columns(refinement), pair.template, worker, incarnation, mark)


def unpack_pair(uid: str, stage: str, prompt: Prompt, columns: Row) -> PreferencePair:
    """A pair from ``prompt_ids``, four response columns, four refinement columns and ``template``."""
    prompt_ids, *halves, template = columns
    response, refinement = _completion(halves[:4]), _completion(halves[4:])
    if response is None or refinement is None:
        raise RunFailed(f"pair {uid} in buffer.db lacks a half; run the audit command on this run")
    return PreferencePair(uid, Stage(stage), prompt, unpack_ids(prompt_ids), response, refinement, template)


def pack_refusal(refusal: Refusal, worker: str, incarnation: int) -> Row:
    """Columns of ``refusals``."""
    response, refinement = _fields(refusal.response), _fields(refusal.refinement)
    content = (str(refusal.reason), refusal.detail, *response, *refinement, worker, incarnation)
    mark = digest(refusal.uid, str(refusal.stage), refusal.prompt_id, *content)
    return (refusal.uid, str(refusal.reason), pack_text(refusal.detail), *_columns(response), *_columns(refinement), worker, incarnation, mark)


def unpack_refusal(uid: str, stage: str, prompt_id: str, columns: Row) -> Refusal:
    """A refusal from ``reason``, ``detail``, four response columns and four refinement columns."""
    reason, detail, *halves = columns
    return Refusal(uid, Stage(stage), prompt_id, RefusalReason(reason), unpack_text(detail), _completion(halves[:4]), _completion(halves[4:]))


def journal_digest(stage: Stage, step: int, version: int, incarnation: int, uids: str) -> str:
    """Digest of a journal row; ``uids`` are the batch's uids in order, separated by spaces."""
    return digest(str(stage), step, version, incarnation, uids)


def _fields(completion: Completion | None) -> _Half:
    """What enters the digest: text, ids, finish reason, version."""
    if completion is None:
        return (None, None, None, None)
    return (completion.text, pack_ids(completion.token_ids), str(completion.finish_reason), completion.version)


def _columns(half: _Half) -> Row:
    """What enters the row."""
    text, *rest = half
    return (None if text is None else pack_text(text), *rest)


def _completion(columns: Sequence[Any]) -> Completion | None:
    text, ids, finish, version = columns
    return None if text is None else Completion(unpack_text(text), unpack_ids(ids), FinishReason(finish), version)
