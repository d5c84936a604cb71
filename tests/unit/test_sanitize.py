"""Hostile text is made harmless, secrets are hidden, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgpo_dist.errors import ConfigError
from sgpo_dist.sanitize import HIDDEN, is_secret_name, markup_text, one_line, redact, redact_text, safe_join, secret_values, terminal_text


@pytest.mark.parametrize(
    ("hostile", "harmless"),
    [
        ("a\x1b[31mred\x1b[0m b", "ared b"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link", "link"),
        ("bell\x07 back\x08space \x9b31m", "bell backspace 31m"),
        ("one\r\ntwo\rthree\tfour", "one\ntwo\nthree\tfour"),
        ("abc\u202edcba\u2066x\u2069", "abcdcbax"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("Grüße, 你好, 👍", "Grüße, 你好, 👍"),
    ],
)
def test_terminal_text_removes_only_what_is_dangerous(hostile: str, harmless: str) -> None:
    assert terminal_text(hostile) == harmless


def test_markup_is_said_literally() -> None:
    assert markup_text("[bold]x[/bold]") == r"\[bold]x\[/bold]"


def test_one_line_joins_and_cuts() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("x" * 12, limit=5) == "xxxx…"


@pytest.mark.parametrize("name", ["HF_TOKEN", "api_key", "OPENAI_API_KEY", "client_secret", "DB_PASSWORD", "apiKey", "hf_token"])
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["max_prompt_tokens", "tokenizer", "input_key", "reference_key", "keyword", "loss_type", "max_new_tokens"])
def test_names_that_only_look_secret(name: str) -> None:
    assert not is_secret_name(name)


def test_redact_hides_texts_under_secret_names_at_any_depth() -> None:
    tree = {
        "engine": {"hf_token": "abc", "tokenizer": "path", "max_new_tokens": 5},
        "keys": {"first": "s1", "list": ["s2", 3]},
        "token": "",
    }
    assert redact(tree) == {
        "engine": {"hf_token": HIDDEN, "tokenizer": "path", "max_new_tokens": 5},
        "keys": {"first": HIDDEN, "list": [HIDDEN, 3]},
        "token": "",
    }


def test_known_secret_values_are_hidden_in_running_text() -> None:
    secrets = secret_values({"A_TOKEN": "short", "B_TOKEN": "longer-secret", "C_TOKEN": "longer-secret-2", "HOME": "/home/someone"})
    assert secrets == ("longer-secret-2", "longer-secret")
    assert redact_text("got longer-secret-2 at /home/someone", secrets) == f"got {HIDDEN} at /home/someone"


def test_safe_join_stays_inside(tmp_path: Path) -> None:
    assert safe_join(tmp_path, "a", "b") == tmp_path.resolve() / "a" / "b"
    (tmp_path / "link").symlink_to("/")
    for parts in (("..",), ("a", "../.."), ("/etc/passwd",), ("link", "etc"), (".",)):
        with pytest.raises(ConfigError):
            safe_join(tmp_path, *parts)
