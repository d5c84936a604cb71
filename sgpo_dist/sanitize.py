"""Makes hostile text harmless and secrets unreadable before a person, a log or a file sees them.

Model text and user data may carry terminal escapes, invisible direction marks or markup; configurations may carry tokens. The recorder,
the command line and the report pass everything through here. Escaping of HTML is Jinja's work (``report``), not done here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.markup import escape

from sgpo_dist.errors import ConfigError

HIDDEN: Final = "[hidden]"
SHORTEST_SECRET: Final = 6
"""A shorter value is not searched for in running text: it would blot out ordinary words."""

_ANSI: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?|[ -/]*[0-~])")
_CONTROL: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u2069\u061c\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_SECRET_NAME: Final = re.compile(r"token(?!s|iz)|key(?!word)|secret|passw(?:or)?d|credential", re.IGNORECASE)
_SECRET_SHAPE: Final = re.compile(r"(?<=://)[^\s/]+(?=@)|\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[oprsu]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16})")
"""What is a secret wherever it stands: user and password of an address, and the tokens of hubs and endpoints."""
_COLUMN_NAMES: Final = frozenset({"input_key", "reference_key"})


def terminal_text(text: str) -> str:
    """``text`` without escape sequences, control characters (newline and tab stay), marks that change the reading direction and what is no text."""
    return _CONTROL.sub("", _ANSI.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))


def markup_text(text: str) -> str:
    """``terminal_text`` that also says literally what rich would take for markup."""
    return escape(terminal_text(text))


def one_line(text: str, limit: int = 300) -> str:
    """``terminal_text`` on one line of at most ``limit`` characters."""
    line = " ".join(terminal_text(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def is_secret_name(name: str) -> bool:
    """Whether a key or variable of this name holds a secret: *TOKEN*, *KEY*, *SECRET*, *PASSWORD* (not tokens, tokenizer, keyword)."""
    return name not in _COLUMN_NAMES and _SECRET_NAME.search(name) is not None


def redact(value: Any, name: str = "") -> Any:
    """A copy of a plain tree in which every text under a secret name is hidden, and what looks like a secret elsewhere; all else stays as it is."""
    if isinstance(value, Mapping):
        return {key: redact(item, str(key) if not is_secret_name(name) else name) for key, item in value.items()}
    if isinstance(value, str):
        return HIDDEN if value and is_secret_name(name) else _SECRET_SHAPE.sub(HIDDEN, value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [redact(item, name) for item in value]
    return value


def secret_values(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The values of the environment's secrets that are long enough to be searched for, longest first."""
    found = {value for name, value in environment.items() if is_secret_name(name) and len(value) >= SHORTEST_SECRET}
    return tuple(sorted(found, key=len, reverse=True))


def redact_text(text: str, secrets: Collection[str]) -> str:
    """``text`` with every occurrence of a known secret value hidden, and what looks like one."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return _SECRET_SHAPE.sub(HIDDEN, text)


def safe_join(root: Path, *parts: str) -> Path:
    """``root`` joined with names from outside. Raises ConfigError when the result, links resolved, lies outside ``root``."""
    base = root.resolve()
    path = base.joinpath(*parts).resolve()
    if path == base or not path.is_relative_to(base):
        raise ConfigError(f"'{'/'.join(parts)}' does not name something inside {root}")
    return path
